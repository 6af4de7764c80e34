"""The rollout source of a run: task seeds, play, record, credit, rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed
from numpy.typing import NDArray

from preconcert.agents import GenerativeTeam
from preconcert.agents.channel import drawn
from preconcert.core import ConfigError, Episode, append_episodes, derive_seed
from preconcert.training.branching import branch
from preconcert.training.credit import (
    AgentTurnCredit,
    Credit,
    Game,
    Kind,
    Ledger,
    Number,
    Score,
    TurnKey,
    Values,
    estimate,
    ledger_of,
)
from preconcert.training.grpo_rollout import Rollout
from preconcert.training.imagination import Imaginer, damped_advantages
from preconcert.training.league import League
from preconcert.training.measures import measure
from preconcert.training.message_costs import MessageLedger
from preconcert.training.message_credit import MessageCredit
from preconcert.training.message_meter import meter_of
from preconcert.training.message_price import check_price
from preconcert.training.prediction import foretold, pay, payments, prediction_metrics
from preconcert.training.recipe import Recipe
from preconcert.training.rollout import EpisodeSpec, rollout
from preconcert.training.rows import GrammarTable, Row, RowSettings, build_rows, worth_training
from preconcert.training.sampler import Publisher
from preconcert.training.update import Order

EPISODES = "episodes.jsonl"


@dataclass(frozen=True, slots=True)
class _Play:
    episodes: tuple[Episode, ...]
    """What is trained on."""
    whole: tuple[Episode, ...]
    """Games from beginning to end, which the metrics are about."""
    lines: tuple[Episode, ...] = ()
    """The games that branches came from."""
    seconds: float = 0.0
    """What playing took."""
    version: int = 0
    """Updates behind the adapters that played."""


class GameSource:
    """Plays groups of episodes with the present adapters and turns them into rows.

    Everything random follows from the recipe's seed and the iteration's number, so an iteration that is played again
    after a crash is the same.

    Args:
        recipe: what to play.
        team: whose turns are trained; its version is set to the iteration.
        table: shared with the trainer.
        trainable: adapters that learn.
        folder: `episodes.jsonl` is appended to there (per process); None keeps no record.
        rank: this process.
        world: number of processes; each plays whole groups.
        on_rollout: called with (iteration, episodes, metrics).
        values: a critic's estimates of a rollout, for credit estimators that need them.
        league: who plays whom; None for the team's own assignment.
        imaginer: lets the agents play on in a world model; None where nothing is imagined.
        worth: values messages; None where they are reinforced with the game's advantage alone.
        publisher: brings the trainer's adapters to the team's engine; None where the team plays with the trainer's own.

    Raises:
        ConfigError: the credit estimator needs values and there is nobody to give them, or rewards are scaled for an
            agent that the team does not have.
    """

    def __init__(
        self,
        recipe: Recipe,
        team: GenerativeTeam,
        table: GrammarTable,
        trainable: frozenset[str],
        folder: Path | None,
        rank: int = 0,
        world: int = 1,
        on_rollout: Callable[[int, list[Episode], dict[str, float]], None] | None = None,
        values: Callable[[Sequence[Episode]], Values] | None = None,
        league: League | None = None,
        imaginer: Imaginer | None = None,
        worth: MessageCredit | None = None,
        publisher: Publisher | None = None,
    ) -> None:
        if recipe.grpo.credit.needs_values and values is None:
            raise ConfigError(f"grpo.credit={recipe.grpo.credit.type} needs a critic's values, and there is no critic")
        recipe.grpo.rewards.check(team.assignment)
        self.recipe = recipe
        self.team = team
        self.table = table
        self.folder = folder
        self.rank, self.world = rank, world
        self.on_rollout = on_rollout
        self.values = values
        self.league = league
        self.imaginer = imaginer
        self.worth = worth
        self.publisher = publisher
        self._ahead: tuple[int, Future[_Play]] | None = None
        self._player = ThreadPoolExecutor(1, "rollout") if publisher is not None and publisher.staleness else None
        team.keep_distributions = recipe.grpo.prediction is not None
        self.credit_state: dict[str, float] = {}
        self.messages = self._message_ledger(trainable)
        self.settings = RowSettings(
            policy_spans=frozenset(recipe.grpo.policy_spans),
            hindsight=recipe.grpo.hindsight_weight > 0,
            bind_action=recipe.grpo.bind_action,
            trainable=trainable,
            first_turn_only=recipe.grpo.credit.branches,
            speech=recipe.grpo.speech,
        )

    def state_dict(self) -> dict[str, Any]:
        """What the next iteration needs to know of the ones before, as JSON takes it."""
        state: dict[str, Any] = {"credit": dict(self.credit_state)}
        if self.messages is not None:
            state["messages"] = self.messages.state_dict()
        return state if self.league is None else {**state, "league": self.league.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.credit_state = {str(name): float(value) for name, value in state["credit"].items()}
        if self.messages is not None:
            self.messages.load_state_dict(state["messages"])
        if self.league is not None:
            self.league.load_state_dict(state["league"])

    def specs(self, iteration: int) -> list[EpisodeSpec]:
        """The episodes that this process plays."""
        recipe = self.recipe
        credit = recipe.grpo.credit
        casts = self.league.cast if self.league is not None else _no_cast
        harms = self.harms(iteration)
        return [
            EpisodeSpec(
                recipe.task,
                recipe.params,
                self._seed(iteration, number),
                "train",
                sample,
                iteration,
                casts(iteration, number),
                recipe.channels[harms[number]].of(recipe.channel) if harms else None,
            )
            for number in range(recipe.grpo.seeds)
            if number % self.world == self.rank
            for sample in range(credit.lines if isinstance(credit, AgentTurnCredit) else recipe.grpo.group)
        ]

    def harms(self, iteration: int) -> tuple[str, ...]:
        """What is wrong with the channel in each task instance of an iteration, by name; none where nothing ever is."""
        recipe = self.recipe
        return drawn(recipe.channels, recipe.grpo.seeds, derive_seed(recipe.seed, "channels", iteration))

    def collect(self, iteration: int) -> Rollout:
        """Play and build one iteration."""
        recipe = self.recipe
        started = time.perf_counter()
        restarted = self.league.prepare(iteration) if self.league is not None else ()
        self.team.temperature = recipe.grpo.temperature
        play, engine = self._next(iteration)
        episodes = play.episodes
        played = time.perf_counter()
        if self.folder is not None:
            append_episodes(self.folder / record_name(self.rank), [*play.lines, *episodes])
        stored = time.perf_counter()
        values = self.values(episodes) if self.values is not None and recipe.grpo.credit.needs_values else None
        valued = time.perf_counter()
        ledger = ledger_of(episodes, recipe.grpo.rewards, values, self.settings.trainable)
        credit = self._credit(iteration, episodes, ledger)
        self.credit_state = dict(credit.state)
        credited = time.perf_counter()
        rows = self._rows(play, credit.advantages)
        rows, valued_messages = self._value_messages(iteration, rows, play)
        imagined, figures = self._imagine(iteration, episodes)
        of_task = [row.policy for row in (*rows, *imagined)]
        policy_tokens = sum(int(mask.sum()) for mask in of_task)
        rows, predicted = self._pay_predictions(iteration, rows, episodes, policy_tokens)
        free = [*rows, *imagined]
        rows, said = self._charge_messages(iteration, free, of_task, play)
        if recipe.grpo.beta == recipe.grpo.entropy == 0.0 and recipe.grpo.loss == "dapo":
            # In a sequential update the ratios of all rows weigh on the agents still to come, those without an
            # advantage included.
            rows, _ = worth_training(
                rows,
                recipe.grpo.hindsight_fraction,
                derive_seed(recipe.seed, "rows", iteration),
                keep=recipe.update.order is Order.SEQUENTIAL,
                free=free,
            )
        elif recipe.grpo.entropy:  # forced turns have none
            rows = [row for row in rows if row.policy.any() or (row.targets >= 0).any() or row.said] or rows[:1]
        found = measure(play.whole, self.team.language, recipe.agent.spans)
        metrics: dict[str, float] = {
            name: float(value)
            for name, value in {
                "success": found.success_rate,
                "return": found.return_mean,
                "malformed": found.malformed_rate,
                "intention_accuracy": found.intention_accuracy,
                "forecast_exact_match": found.forecast_exact_match,
                "message_bits_per_turn": found.message_bits_per_turn,
                "generated_tokens": _tokens(episodes),
                "episode_steps": found.steps_mean,
                "line_success": _success(play.lines),
                "environment_steps": sum(episode.steps for episode in episodes),
                "rollout_s": played - started,
                "record_s": stored - played,
                "values_s": valued - stored if values is not None else None,
                "credit_s": credited - valued,
                "rows_s": time.perf_counter() - credited,
            }.items()
            if value is not None
        }
        metrics |= engine | predicted | figures | said | valued_messages | self._by_harm(iteration, play.whole)
        if self.league is not None:
            metrics |= self.league.record(play.whole)
        if self.on_rollout is not None:
            self.on_rollout(iteration, list(play.whole), metrics)
        return Rollout(rows, metrics, policy_tokens, episodes, credit.returns, restarted)

    def _by_harm(self, iteration: int, episodes: Sequence[Episode]) -> dict[str, float]:
        """Success on each kind of channel."""
        harms = self.harms(iteration)
        of = {self._seed(iteration, number): name for number, name in enumerate(harms)}
        found: dict[str, float] = {}
        for name in dict.fromkeys(harms):
            success = _success([episode for episode in episodes if of[episode.seed] == name])
            if success is not None:
                found[f"channel/{name}/success"] = success
        return found

    def _seed(self, iteration: int, number: int) -> int:
        """Of one task instance."""
        return derive_seed(self.recipe.seed, "train", iteration, number) % 2**31

    def _credit(self, iteration: int, episodes: Sequence[Episode], ledger: Ledger) -> Credit:
        """This process's part of the credit for the whole rollout.

        Baselines and normalisation run over all processes' games, in the order in which one process would play them, so
        that a division of the work changes nothing.
        """
        estimator = self.recipe.grpo.credit
        if self.world == 1:
            return estimator.estimate(ledger, self.credit_state)
        numbers = {self._seed(iteration, number): number for number in range(self.recipe.grpo.seeds)}
        mine = [(numbers[episode.seed], game) for episode, game in zip(episodes, ledger, strict=True)]
        parts: list[list[tuple[int, Game]]] = [[] for _ in range(self.world)]
        torch.distributed.all_gather_object(parts, mine)
        order = sorted(
            (number, rank, place) for rank, part in enumerate(parts) for place, (number, _) in enumerate(part)
        )
        credit = estimator.estimate([parts[rank][place][1] for _, rank, place in order], self.credit_state)
        places = {position: place for position, (_, rank, place) in enumerate(order) if rank == self.rank}

        def own(numbers: Mapping[TurnKey, Number]) -> dict[TurnKey, Number]:
            return {
                TurnKey(places[key.episode], key.agent, key.index): number
                for key, number in numbers.items()
                if key.episode in places
            }

        returns = None if credit.returns is None else own(credit.returns)
        return Credit(own(credit.advantages), returns, credit.state)

    def close(self) -> None:
        """Give up a rollout that is being played ahead."""
        self._ahead = None
        if self._player is not None:
            self._player.shutdown(wait=True, cancel_futures=True)

    def _next(self, iteration: int) -> tuple[_Play, dict[str, float]]:
        """The games of an iteration, and figures of the engine that played them.

        Where the engine may lag behind, the games of the iteration after begin here: they are played while the trainer
        works. An adapter is never replaced within a rollout.
        """
        publisher = self.publisher
        if publisher is None:
            return self._played(iteration, iteration), {}
        ahead, self._ahead = self._ahead, None
        published = 0.0
        if ahead is not None and ahead[0] == iteration:
            play = ahead[1].result()
        else:
            publisher.publish_for(iteration, iteration)
            published = publisher.seconds
            play = self._played(iteration, publisher.version)
        if self._player is not None and iteration + 1 < self.recipe.grpo.iterations:
            publisher.publish_for(iteration + 1, iteration)
            published += publisher.seconds
            self._ahead = iteration + 1, self._player.submit(self._played, iteration + 1, publisher.version)
        return play, {
            "sampler_staleness": float(iteration - play.version),
            "publish_s": published,
            "played_s": play.seconds,
        }

    def _played(self, iteration: int, version: int) -> _Play:
        """The games of an iteration by adapters with so many updates behind them."""
        started = time.perf_counter()
        self.team.version = version
        play = self._play(iteration)
        return replace(play, seconds=time.perf_counter() - started, version=version)

    def _play(self, iteration: int) -> _Play:
        """Whole games, or branches of games where credit is given per agent and turn."""
        recipe, credit = self.recipe, self.recipe.grpo.credit
        specs, seed = self.specs(iteration), derive_seed(self.recipe.seed, "play", iteration)
        if not isinstance(credit, AgentTurnCredit):
            episodes = tuple(rollout(specs, self.team, recipe.channel, seed))
            return _Play(episodes, episodes)
        played = branch(
            specs, self.team, recipe.channel, seed, recipe.grpo.group, credit.score, credit.follow, recipe.grpo.rewards
        )
        # Where branches are played to the end, those of the first moments are games as the policy plays them; a line
        # that follows the best branches is better than that.
        whole = played.from_the_start if credit.score is Score.ROLLOUT else played.lines
        return _Play(played.branches, whole, played.lines)

    def _imagine(self, iteration: int, episodes: Sequence[Episode]) -> tuple[list[Row], dict[str, float]]:
        """Rows of what the agents imagine, credited among themselves, and figures about them. Imaginations teach no
        predictions, and estimators learn nothing for the next iteration from them."""
        imaginer, started = self.imaginer, time.perf_counter()
        if imaginer is None or iteration < imaginer.settings.warmup_iterations:
            return [], {}
        found = imaginer.imagine(episodes, derive_seed(self.recipe.seed, "imagine", iteration))
        ledger = ledger_of(found.episodes, self.recipe.grpo.rewards, None, self.settings.trainable)
        advantages = self.recipe.grpo.credit.estimate(ledger, self.credit_state).advantages
        if imaginer.settings.damped:
            real = ledger_of(episodes, self.recipe.grpo.rewards, None, self.settings.trainable)
            advantages = damped_advantages(advantages, ledger, real)
        blind = replace(self.settings, hindsight=False)
        rows = build_rows(found.episodes, advantages, self.team, self.table, blind)
        if self.messages is not None:
            rows = self.messages.charged(rows, found.episodes, before=found.before)
        offset = sum(episode.steps for episode in episodes)
        rows = [replace(row, joint=np.where(row.joint >= 0, row.joint + offset, -1)) for row in rows]
        figures = {"imagination/rows": float(len(rows)), "imagination_s": time.perf_counter() - started}
        return rows, {**found.metrics, **figures}

    def _pay_predictions(
        self, iteration: int, rows: list[Row], episodes: Sequence[Episode], task_tokens: int
    ) -> tuple[list[Row], dict[str, float]]:
        """Rows with what their predictions are paid, and how true those were."""
        settings = self.recipe.grpo.prediction
        if settings is None:
            return rows, {}
        found = foretold(episodes, self.team.language)
        weights = settings.weights(iteration / max(1, self.recipe.grpo.iterations - 1))
        metrics = {f"prediction/weight_{kind.name.lower()}": weights[kind] for kind in Kind}
        metrics |= prediction_metrics(episodes, found)
        if any(weights):
            paid = payments(episodes, found, weights, self.settings.trainable)
            if self.world > 1:
                parts: list[Any] = [None] * self.world
                torch.distributed.all_gather_object(parts, (paid.totals, task_tokens))
                paid = replace(paid, totals=sum(part[0] for part in parts))
                task_tokens = sum(part[1] for part in parts)
            rows = pay(rows, episodes, paid, weights, task_tokens, settings.scale)
        return rows, metrics

    def _message_ledger(self, trainable: frozenset[str]) -> MessageLedger | None:
        """What keeps account of messages; None where they cost nothing.

        Raises:
            ConfigError: as `check_price`.
        """
        recipe, settings = self.recipe, self.recipe.grpo.message_price
        if settings is None:
            return None
        check_price(settings, self.team.format.speech)
        meter = meter_of(settings.meter, self.team.format.speech, recipe.channel, bool(recipe.channels))
        return MessageLedger(settings, meter, recipe.grpo.iterations, trainable, self.world)

    def _value_messages(
        self, iteration: int, rows: list[Row], play: _Play
    ) -> tuple[list[Row], dict[str, float]]:
        """Rows with what their messages were worth to others, and figures about it."""
        if self.worth is None:
            return rows, {}
        started = time.perf_counter()
        rows, figures = self.worth.paid(rows, play.episodes, iteration)
        return rows, {**figures, "message_value_s": time.perf_counter() - started}

    def _charge_messages(
        self, iteration: int, rows: list[Row], of_task: Sequence[NDArray[np.bool_]], play: _Play
    ) -> tuple[list[Row], dict[str, float]]:
        """Rows with what their messages cost, and how much was said; imagined ones have paid already.

        Announcements that are paid as predictions (`of_task` says which tokens are not) cost nothing: what they are
        worth is their truth alone.
        """
        if self.messages is None:
            return rows, {}
        charged = self.messages.charged(rows, play.episodes, of_task)
        return charged, self.messages.observe(iteration, play.whole)

    def _rows(self, play: _Play, advantages: Mapping[TurnKey, Number]) -> list[Row]:
        """What is trained on. A branch that was cut does not know what came next; there the lines teach predictions."""
        credit = self.recipe.grpo.credit
        if not isinstance(credit, AgentTurnCredit) or credit.score is Score.ROLLOUT or not self.settings.hindsight:
            return build_rows(play.episodes, advantages, self.team, self.table, self.settings)
        blind = replace(self.settings, hindsight=False)
        nothing = dict.fromkeys(estimate(play.lines).advantages, 0.0)
        taught = build_rows(play.lines, nothing, self.team, self.table, self.settings)
        rows = build_rows(play.episodes, advantages, self.team, self.table, blind)
        return rows + [_targets_only(row) for row in taught]


def _targets_only(row: Row) -> Row:
    """Without a part in the policy loss."""
    return replace(
        row,
        policy=np.zeros_like(row.policy),
        logprobs=np.zeros_like(row.logprobs),
        joint=np.full_like(row.joint, -1),
    )


def _tokens(episodes: Sequence[Episode]) -> int:
    return sum(len(turn.completion_ids) for e in episodes for t in e.trajectories.values() for turn in t.turns)


def _success(episodes: Sequence[Episode]) -> float | None:
    judged = [episode.success for episode in episodes if episode.success is not None]
    return sum(judged) / len(judged) if judged else None


def _no_cast(iteration: int, number: int) -> dict[str, str]:
    return {}


def record_name(rank: int) -> str:
    """The episode file of a process."""
    return EPISODES if rank == 0 else f"episodes-{rank}.jsonl"
