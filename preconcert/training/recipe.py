"""The recipe: one object that says everything about a run. YAML, overrides and the Python API fill the same model."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from preconcert.agents import AgentSettings, ChannelHarm, ChannelMode, ChannelSettings, Context
from preconcert.core import SpanKind
from preconcert.envs import TALK_ROUNDS, with_rounds
from preconcert.models import LatentMethod, LoraSettings, StarterSettings
from preconcert.training.credit import AgentCredit, CreditSettings, PredictionSettings, RewardMode, RewardSettings
from preconcert.training.critic_settings import CriticSettings
from preconcert.training.imagination import ImaginationSettings
from preconcert.training.latent_start import LatentStartSettings
from preconcert.training.league import LeagueSettings
from preconcert.training.message_credit import MessageCreditSettings
from preconcert.training.message_price import MessagePriceSettings, MeterName
from preconcert.training.rows import SpeechGradient
from preconcert.training.sampler import Engine, RolloutSettings
from preconcert.training.update import Order, RatioLevel, UpdateSettings
from preconcert.training.warm_start import WarmStartSettings
from preconcert.training.world_settings import WorldModelSettings

STARTER = "starter"
"""The model name that stands for the embedded default."""


class Algorithm(StrEnum):
    """Where advantages come from."""

    GRPO = "grpo"
    """Returns compared with one another."""
    PPO = "ppo"
    """Returns compared with a critic's values."""


class Adapters(StrEnum):
    """Who has an adapter of its own."""

    PER_AGENT = "per_agent"
    """Every agent."""
    SHARED = "shared"
    """All agents share one, named `team`."""


class GateSettings(BaseModel):
    """What the warm start must show before reinforcement learning starts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_gap: float = Field(0.15, ge=0, le=1)
    """Success with messages minus success with shuffled messages. 0 lets every warm start pass."""
    episodes: int = Field(256, ge=1)
    """Episodes per arm, on training layouts."""


class GRPOSettings(BaseModel):
    """Reinforcement learning: rollouts, credit, loss and optimiser, of either algorithm."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    iterations: int = Field(60, ge=0)
    """Rollouts; 0 stops after the warm start."""
    seeds: int = Field(16, ge=1)
    """Task instances per rollout."""
    group: int = Field(8, ge=2)
    """Episodes per task instance."""
    credit: CreditSettings = AgentCredit()
    """Estimator: a name, or a mapping with its `type` and settings."""
    rewards: RewardSettings = RewardSettings()
    """How rewards are put together before any estimator reads them."""
    epochs: int = Field(2, ge=1)
    """Passes over each rollout (TRL's num_iterations)."""
    minibatches: int = Field(4, ge=1)
    """Optimiser steps per pass."""
    accumulate: int = Field(1, ge=1)
    """Forward passes per optimiser step; divides `minibatches`."""
    lr: float = Field(2.5e-3, gt=0)
    """Peak learning rate, after a short warm-up; decays to a tenth along a cosine."""
    warmup_iterations: int = Field(3, ge=0)
    """Length of the warm-up."""
    clip_low: float = Field(0.2, gt=0)
    """Lower clip of the probability ratio."""
    clip_high: float = Field(0.28, gt=0)
    """Upper clip."""
    max_grad_norm: float = Field(0.5, gt=0)
    """Clip of the gradient's norm."""
    beta: float = Field(0.0, ge=0)
    """Weight of the KL term to the warm start."""
    entropy: float = Field(0.0, ge=0)
    """Weight of the mean entropy of the policy's tokens, in reward per token. Against other players it is what keeps
    policies from chasing each other in circles, and what keeps alive the actions that are not worth it yet."""
    entropy_end: float | None = Field(None, ge=0)
    """The weight moves evenly from `entropy` to this in the course of the run; null leaves it."""
    loss: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = "dapo"
    """TRL's loss type."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of rollouts."""
    policy_spans: tuple[SpanKind, ...] = (SpanKind.FORESEE, SpanKind.SAY, SpanKind.ACT)
    """Spans that receive the task's advantage. `foresee` is written before `act` and carries part of the decision."""
    hindsight_weight: float = Field(0.3, ge=0)
    """Weight of the cross-entropy that keeps `intend`, `foresee` and announced actions true; 0 is off."""
    bind_action: bool = True
    """The cross-entropy includes the action taken, where the forecast came true: actions then follow forecasts, and
    exploration happens in what is foreseen. For tasks whose forecast says what the action leads to."""
    hindsight_fraction: float = Field(0.25, ge=0, le=1)
    """Share of the turns without an advantage that enter it; turns with one always do."""
    prediction: PredictionSettings | None = None
    """Rewards for foretelling rightly, paid to the words of predictions alone; null: none. With one, the log says how
    true predictions are and how predictable the agents."""
    message_price: MessagePriceSettings | None = None
    """What messages cost their senders, up to a cap on bits that is met by raising the price; null: nothing."""
    message_credit: MessageCreditSettings | None = None
    """Reinforce messages with what they were worth to who heard them, by a world model; null: with the game's advantage
    alone. Values that disagree with the real ablation stop the run before it trains."""
    speech: SpeechGradient = SpeechGradient.SCORE
    """How senders of latent messages learn: `score`, `path` or `both`."""
    speech_weight: float = Field(0.02, ge=0)
    """Weight of the score function's loss on vectors. A Gaussian's score is far larger than a token's: with weight 1
    the noise in it drowns in the gradient what words and actions have to learn."""
    codec_lr: float = Field(2.5e-4, gt=0)
    """Peak learning rate of codecs: what vectors mean should change more slowly than who reads them learns."""
    imagination: ImaginationSettings | None = None
    """Train on imagined games beside the real ones; null: on real ones only. Needs a `world_model`."""
    checkpoint_every: int = Field(5, ge=1)
    """Iterations between checkpoints."""
    gradient_checkpointing: bool = False
    """Trade compute for memory in the update."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Where TRL sends the log of reinforcement learning besides the run folder; the package of that name must be
    installed."""

    @model_validator(mode="after")
    def _minibatches_fit(self) -> GRPOSettings:
        if self.minibatches % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide minibatches={self.minibatches}")
        return self

    @model_validator(mode="after")
    def _predictions_stay_apart(self) -> GRPOSettings:
        """What is paid for predictions must reach nothing that the task pays for."""
        wanted = self.prediction
        if wanted is None:
            return self
        if self.credit.branches:
            raise ValueError(f"prediction needs whole games, and credit={self.credit.type} branches off them")
        for paid, span in ((wanted.action, SpanKind.INTEND), (wanted.observation, SpanKind.FORESEE)):
            if paid and span in self.policy_spans:
                raise ValueError(f"prediction pays for {span.value}, which policy_spans gives the task's advantage")
        if any(wanted.weights(0.0)) and (self.loss != "dapo" or self.entropy):
            raise ValueError("prediction needs loss=dapo and entropy=0: others take one mean over all tokens")
        return self


class RunEvaluation(BaseModel):
    """How a run is judged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    episodes: int = Field(200, ge=1)
    """Held-out task seeds."""


CHECKPOINT_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "warm_start": {"method": "lora", "lr": 2e-4, "batch": 16},
    "grpo": {"lr": 5e-5},
}
"""What a recipe has by default where `model` is not the starter."""


class Recipe(BaseModel):
    """Everything about a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    """A built-in task, or `module:Class`."""
    params: Mapping[str, Any] = Field(default_factory=dict)
    """The task's parameters."""
    model: str = STARTER
    """`starter`, or the name or folder of a Hugging Face checkpoint, for which `CHECKPOINT_DEFAULTS` hold."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the base's weights."""
    starter: StarterSettings = StarterSettings()
    """Shape of the starter model."""
    lora: LoraSettings = LoraSettings()
    """Shape of the adapters."""
    adapters: Adapters | Mapping[str, str] = Adapters.PER_AGENT
    """`per_agent`, `shared`, or adapter names by agent."""
    frozen: tuple[str, ...] = ()
    """Adapters that are not trained."""
    agent: AgentSettings = AgentSettings()
    """How agents read and write."""
    channel: ChannelSettings = ChannelSettings()
    """How messages travel."""
    channels: dict[str, ChannelHarm] = Field(default_factory=dict)
    """By name, what is wrong with the channel in training: each task instance draws one of them by weight, for all of
    its episodes; empty: nothing. The warm start shows messages lost and late, reinforcement learning everything. A run
    is judged, served and shown on `channel` alone."""
    warm_start: WarmStartSettings = WarmStartSettings()
    """Supervised fine-tuning before reinforcement learning."""
    latent_start: LatentStartSettings = LatentStartSettings()
    """Supervised fine-tuning of latent messages after it, where `agent.codec` is `latent`."""
    gate: GateSettings = GateSettings()
    """What the warm start must show."""
    algorithm: Algorithm = Algorithm.GRPO
    """`grpo`, or `ppo` with a critic; `grpo.credit` is then `gae` unless it says otherwise."""
    grpo: GRPOSettings = GRPOSettings()
    """Reinforcement learning, of either algorithm."""
    critic: CriticSettings = CriticSettings()
    """The critic of `ppo`."""
    update: UpdateSettings = UpdateSettings()
    """Order of agents, level of the ratio, corrections and limits."""
    rollout: RolloutSettings = RolloutSettings()
    """What samples, in training and when the run is played; with `engine: vllm`, `update.correction` is 2 unless it
    says otherwise."""
    world_model: WorldModelSettings | None = None
    """A token world model beside the team: rows for it in the warm start, and an adapter of its own; null: none."""
    league: LeagueSettings | None = None
    """Who plays against whom where agents are opponents; null: the assigned adapters, all of them at present. With a
    league all agents share one adapter."""
    keep_episodes: bool = True
    """Append every training episode to episodes.jsonl, some MB per iteration. A run resumes exactly either way."""
    evaluation: RunEvaluation = RunEvaluation()
    """How the run is judged."""
    seed: int = Field(0, ge=0)
    """Everything random follows from it."""
    threads: int = Field(0, ge=0)
    """CPU threads; 0 leaves torch's default."""

    @model_validator(mode="before")
    @classmethod
    def _credit_of_ppo(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("algorithm") == Algorithm.PPO:
            grpo = given.get("grpo", {})
            if isinstance(grpo, Mapping) and "credit" not in grpo:
                return {**given, "grpo": {**grpo, "credit": {"type": "gae"}}}
        return given

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_checkpoints(cls, given: Any) -> Any:
        """A pretrained model is tuned by adapters, gently: what suits a starter made from nothing would wreck it."""
        if not isinstance(given, Mapping) or given.get("model", STARTER) == STARTER:
            return given
        sections = {}
        for name, defaults in CHECKPOINT_DEFAULTS.items():
            section = given.get(name, {})
            if isinstance(section, Mapping):
                sections[name] = {**defaults, **section}
        return {**given, **sections}

    @model_validator(mode="before")
    @classmethod
    def _correction_of_other_engines(cls, given: Any) -> Any:
        """What another engine sampled is weighed by what the trainer thinks of it."""
        rollout = given.get("rollout") if isinstance(given, Mapping) else None
        engine = rollout.get("engine") if isinstance(rollout, Mapping) else getattr(rollout, "engine", None)
        if engine == Engine.VLLM:
            update = given.get("update", {})
            if isinstance(update, Mapping) and "correction" not in update:
                return {**given, "update": {**update, "correction": 2.0}}
        return given

    @model_validator(mode="before")
    @classmethod
    def _one_adapter_in_a_league(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("league") is not None and "adapters" not in given:
            return {**given, "adapters": Adapters.SHARED}
        return given

    @model_validator(mode="before")
    @classmethod
    def _rounds_in_one_place(cls, given: Any) -> Any:
        """Rounds of talk belong to the task that is played: `channel.rounds` is written into its parameters."""
        params = given.get("params", {}) if isinstance(given, Mapping) else None
        if not isinstance(params, Mapping):
            return given
        channel = given.get("channel") or {}
        rounds = channel.get("rounds") if isinstance(channel, Mapping) else getattr(channel, "rounds", None)
        if isinstance(channel, ChannelSettings) and "rounds" not in channel.model_fields_set:
            rounds = None
        if isinstance(rounds, float) and rounds.is_integer():  # as pydantic reads it
            rounds = int(rounds)
        if isinstance(rounds, int) and not isinstance(rounds, bool):
            return {**given, "params": with_rounds(params, rounds)}
        if rounds is None and TALK_ROUNDS in params:
            told = {"rounds": params[TALK_ROUNDS]}
            whole = channel.model_copy(update=told) if isinstance(channel, ChannelSettings) else {**channel, **told}
            return {**given, "channel": whole}
        return given

    @model_validator(mode="after")
    def _a_league_fits(self) -> Recipe:
        if self.league is None:
            return self
        credit = self.grpo.credit
        shared = self.adapters is Adapters.SHARED
        if not shared and (isinstance(self.adapters, Adapters) or len(set(self.adapters.values())) > 1):
            raise ValueError("a league has one main adapter: set adapters=shared")
        if self.frozen:
            raise ValueError("a league freezes its own adapters; frozen must be empty")
        if self.grpo.rewards.mode is not RewardMode.INDIVIDUAL or credit.type == "joint":
            raise ValueError(
                "in a league opponents do not share rewards: set grpo.rewards.mode=individual and a credit other than "
                "joint"
            )
        if credit.branches:
            raise ValueError(f"grpo.credit={credit.type} branches off running games, which a league does not")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        credit = self.grpo.credit
        if credit.needs_values and self.algorithm is not Algorithm.PPO:
            raise ValueError(f"grpo.credit={credit.type} needs a critic's values: set algorithm=ppo")
        if not credit.needs_values and self.algorithm is Algorithm.PPO:
            raise ValueError(f"grpo.credit={credit.type} does not look at a critic: set algorithm=grpo, or credit=gae")
        self._engine_fits()
        self._predictions_fit()
        self._imagination_fits()
        self._latents_fit()
        self._messages_fit()
        if self.channel.rounds > 1 and self.world_model is not None:
            raise ValueError(
                f"channel.rounds={self.channel.rounds} and a world_model do not go together: world models foretell "
                "steps, and in a round of talk nothing moves"
            )
        if self.grpo.entropy_end is not None and not self.grpo.entropy:
            raise ValueError(f"grpo.entropy_end={self.grpo.entropy_end:g} needs a grpo.entropy to begin with")
        if self.update.order is Order.SEQUENTIAL and self.grpo.accumulate > 1:
            raise ValueError(
                f"update.order=sequential takes one optimiser step per minibatch, not grpo.accumulate="
                f"{self.grpo.accumulate}"
            )
        return self

    def _engine_fits(self) -> None:
        """What needs the trained model itself for rollouts."""
        if self.rollout.engine is not Engine.VLLM:
            if self.rollout.staleness:
                raise ValueError(f"rollout.staleness={self.rollout.staleness} needs rollout.engine=vllm")
            return
        if self.league is not None:
            raise ValueError("rollout.engine=vllm and a league do not go together: opponents come and go")
        if self.agent.codec.type == "latent" and self.rollout.staleness:
            raise ValueError(
                f"rollout.staleness={self.rollout.staleness} and agent.codec=latent do not go together: vectors are "
                "written by the model that would be training meanwhile"
            )
        if self.rollout.staleness and (self.grpo.imagination is not None or self.world_model is not None):
            raise ValueError(
                f"rollout.staleness={self.rollout.staleness} does not go with a world model or imagination: both play "
                "with the team while it would be playing ahead"
            )

    def _latents_fit(self) -> None:
        """What cannot go with vectors."""
        if self.agent.codec.type != "latent":
            self._paths_fit()
            return
        if not self.agent.spans.say:
            raise ValueError("agent.codec=latent and agent.spans.say=false do not go together: nobody would talk")
        if self.league is not None:
            raise ValueError("agent.codec=latent and a league do not go together: opponents read no vectors")
        if self.grpo.beta:
            raise ValueError("grpo.beta and agent.codec=latent do not go together: the reference reads no vectors")
        if self.grpo.imagination is not None:
            raise ValueError("grpo.imagination and agent.codec=latent do not go together: the imagined read words")
        if self.update.order is not Order.SIMULTANEOUS or self.update.ratio is not RatioLevel.TOKEN:
            raise ValueError(
                "agent.codec=latent needs update.order=simultaneous and update.ratio=token: what is said in vectors is "
                "no part of the other ratios"
            )
        if self.grpo.loss != "dapo":
            raise ValueError(f"agent.codec=latent needs grpo.loss=dapo, not {self.grpo.loss}: others count rows")
        self._paths_fit()

    def _paths_fit(self) -> None:
        """Where the gradient through a message reaches nobody."""
        speech, channel = self.grpo.speech, self.channel
        if speech is SpeechGradient.SCORE:
            return
        if self.agent.codec.type != "latent" or self.agent.codec.method is LatentMethod.ALIGNED:
            raise ValueError(f"grpo.speech={speech.value} is for agent.codec=latent with method=learned")
        if self.grpo.gradient_checkpointing:
            raise ValueError(f"grpo.speech={speech.value} does not go with gradient_checkpointing")
        if channel.mode is not ChannelMode.ON:
            raise ValueError(f"grpo.speech={speech.value} needs channel.mode=on, where messages arrive")
        if self.grpo.credit.branches:
            raise ValueError(
                f"grpo.speech={speech.value} and grpo.credit={self.grpo.credit.type} do not go together: a branch's "
                "first turn heard what was said before it"
            )

    def _messages_fit(self) -> None:
        """What codecs cannot go with, and what can have a price."""
        codec, priced, paid = self.agent.codec, self.grpo.message_price, self.grpo.prediction
        if codec.type != "slots" and self.world_model is not None:
            raise ValueError(f"a world_model foretells every word of the task's message slots, not codec={codec.type}")
        if codec.type in ("raw-state", "intention") and self.league is not None and self.league.scripts:
            raise ValueError(f"a league's scripts talk in the task's message slots, not in codec={codec.type}")
        if codec.type == "learned" and paid is not None and paid.announcement:
            raise ValueError(
                "agent.codec=learned gives announced actions the task's advantage, since they need not be said: set "
                "grpo.prediction.announcement=0"
            )
        self._message_credit_fits()
        if priced is None:
            return
        if codec.type not in ("slots", "learned"):
            raise ValueError(f"grpo.message_price is for words that senders choose; codec={codec.type} has none")
        if not self.agent.spans.say or SpanKind.SAY not in self.grpo.policy_spans:
            raise ValueError("grpo.message_price needs agent.spans.say, and say among grpo.policy_spans")
        fixed = codec.type == "slots" and priced.meter is MeterName.RAW
        if fixed and (priced.price or priced.cap_bits is not None):
            raise ValueError(
                "every message of codec=slots has the same raw bits, whatever they cost: use codec=learned or "
                "grpo.message_price.meter=prior"
            )
        if self.grpo.credit.branches and (priced.redundancy or priced.meter is MeterName.PRIOR):
            raise ValueError(
                f"grpo.credit={self.grpo.credit.type} trains on the first turns of branches, which do not know what "
                "was said before them: grpo.message_price then takes meter=raw and redundancy=0"
            )
        if self.update.ratio is not RatioLevel.TOKEN:
            raise ValueError(
                "grpo.message_price needs update.ratio=token: others put messages and actions into one number"
            )

    def _message_credit_fits(self) -> None:
        if self.grpo.message_credit is None:
            return
        if self.agent.codec.type not in ("slots", "learned"):
            raise ValueError(
                f"grpo.message_credit is for words that senders choose; codec={self.agent.codec.type} has none"
            )
        if not self.agent.spans.say or SpanKind.SAY not in self.grpo.policy_spans:
            raise ValueError("grpo.message_credit needs agent.spans.say, and say among grpo.policy_spans")
        if self.agent.context is not Context.TURN:
            raise ValueError(
                f"grpo.message_credit takes messages back, which agent.context={self.agent.context.value} cannot: set "
                "agent.context=turn"
            )
        if self.grpo.credit.branches or self.league is not None or self.channel.rounds > 1:
            raise ValueError("grpo.message_credit needs whole games: no branching credit, league or rounds of talk")
        if self.channel.mode is not ChannelMode.ON:
            raise ValueError(
                f"grpo.message_credit: with channel.mode={self.channel.mode.value} nobody hears what is said"
            )
        if self.update.ratio is not RatioLevel.TOKEN:
            raise ValueError(
                "grpo.message_credit needs update.ratio=token: others put messages and actions into one number"
            )
        if self.rollout.staleness:
            raise ValueError(
                f"rollout.staleness={self.rollout.staleness} does not go with grpo.message_credit: both play with the "
                "team at once"
            )

    def _predictions_fit(self) -> None:
        wanted = self.grpo.prediction
        if wanted is None or not any(wanted.weights(0.0)):
            return
        if wanted.action and not self.agent.spans.intend:
            raise ValueError("grpo.prediction pays for intentions, and agent.spans.intend is off")
        if wanted.observation and not self.agent.spans.foresee:
            raise ValueError("grpo.prediction pays for forecasts, and agent.spans.foresee is off")
        if self.update.ratio is not RatioLevel.TOKEN or self.update.order is not Order.SIMULTANEOUS:
            raise ValueError(
                "grpo.prediction needs update.ratio=token and update.order=simultaneous: others put the ratios of "
                "predictions and of decisions into one number"
            )

    def _imagination_fits(self) -> None:
        if self.grpo.imagination is None:
            return
        credit = self.grpo.credit
        if credit.needs_values or credit.branches or not credit.grouped or credit.type == "adalign":
            raise ValueError(
                f"grpo.imagination compares imaginations of one moment with one another, which grpo.credit="
                f"{credit.type} does not: use agent, turn, loo, joint or global"
            )
        if self.league is not None:
            raise ValueError("grpo.imagination and a league do not go together: opponents are no part of a moment")
