"""The speed comparisons: what the library costs beside the least that the same work could cost.

    .venv/bin/python -m benchmarks.run [--quick] [--size WIDTH] [--json] [--save]

Each row of the table is one piece of the library (`ours`) beside a plain way of doing the same (`other`):

* rollout: a lockstep rollout, beside episodes played one after the other and agents asked one after the other, every
  token decoded from the full prompt, forced ones included, without a cache (per turn; the other way plays fewer);
* generation: the same rollout, beside nothing but transformers' `generate` on the bare base with the same prompts and
  as many new tokens in the same batches, without adapters, grammar, parsing, channel or environment;
* update: a step of the multi-agent GRPO trainer on rows of two adapters, beside forward and backward passes and an
  optimiser step of the same tokens with one active adapter and cross-entropy; no hindsight in either;
* PPO: two passes of the trainer over the rows of a rollout, a central critic's values of it and its own learning from
  it, beside the two passes alone;
* credit: from 4,096 finished turns to advantages, beside what playing and training on a turn takes;
* messages: the length of every message of a rollout under counts of words, and every message turned into bits under a
  model's adapter and back, beside the rollout; turns after prompts with latent messages, beside as many words (see
  `speech.py`);
* planning: one decision of 32 agents, 16 candidates each imagined 5 steps ahead by the token world model, beside the
  same search candidate by candidate, and beside bare generation of as many tokens (see `planning.py`);
* vLLM: the same planning after 300 tokens that all prompts begin with, and the rollout, on an engine of vLLM beside
  transformers in this process (see `vllm.py`); left out where vLLM is not installed.

Times are medians of repetitions that take turns; peak memory is that of a fresh process that does one side once, with
what it started.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.planning import PlanningBench
from benchmarks.speech import SpeechBench
from benchmarks.vllm import VLLMBench
from preconcert.agents import AgentSettings, ChannelSettings, GenerativeTeam
from preconcert.core import Episode, uniforms
from preconcert.envs import make_env
from preconcert.models import (
    Completion,
    CompletionEnd,
    GenerateRequest,
    LoraSettings,
    StarterSettings,
    TransformersModel,
    build_starter,
    route_rows,
)
from preconcert.models.decoding import sample
from preconcert.prompts import starter_words
from preconcert.training.batch import collate
from preconcert.training.credit import TurnKey, estimate
from preconcert.training.critic import Critic
from preconcert.training.critic_settings import CriticSettings
from preconcert.training.grpo import MultiAgentGRPOTrainer
from preconcert.training.grpo_rollout import Rollout
from preconcert.training.recipe import GRPOSettings, Recipe
from preconcert.training.rollout import EpisodeSpec, rollout
from preconcert.training.rows import GrammarTable, Row, build_rows
from preconcert.training.run import grpo_config
from preconcert.training.source import GameSource

TASK = "rendezvous"
AGENTS = ("agent_0", "agent_1")
RESULTS = Path(__file__).parent / "results"
_CREDIT_TURNS = 4096


@dataclass(frozen=True, slots=True)
class Scale:
    """How much work a side does."""

    width: int
    """Of the starter model."""
    seeds: int
    group: int
    slow_episodes: int
    """Episodes that the rollout's other side plays."""
    update_rows: int
    """Rows in one training step, as in one minibatch of the default recipe."""
    planners: int
    """Agents that plan at once."""
    repetitions: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row of the table."""

    name: str
    ours: str
    """Side by name."""
    other: str
    unit: str
    """What one unit of work is."""
    target: float
    faster: bool
    """The ratio is other time by our time, to be at least `target`; else our time by other time, to be at most that."""


COMPARISONS = (
    Comparison("rollout / one agent at a time, no cache", "rollout", "one at a time", "turn", 4.0, True),
    Comparison("rollout / bare batched generation", "rollout", "bare generation", "turn", 0.6, True),
    Comparison("GRPO update / bare forward and backward", "update", "bare update", "step", 1.3, False),
    Comparison("PPO update, critic included / GRPO update", "ppo", "grpo", "rollout", 1.8, False),
    Comparison("credit / playing and training", "credit", "training", "turn", 0.02, False),
    Comparison("metering messages / rollout", "metering", "rollout", "turn", 0.05, False),
    Comparison("coding messages by a model / rollout", "coding", "rollout", "turn", 0.05, False),
    Comparison("prompts with vectors / with as many words", "hearing", "reading", "turn", 1.05, False),
    Comparison("planning / candidate by candidate", "planning", "candidate by candidate", "decision", 5.0, True),
    Comparison("planning / bare generation", "planning", "bare imagination", "decision", 1.5, False),
    Comparison("planning, 300 tokens in common: vLLM", "vllm planning", "transformers planning", "decision", 2.0, True),
    Comparison("rollout: vLLM / transformers", "vllm rollout", "transformers rollout", "turn", 0.5, True),
)


class OneAtATime:
    """A language model that knows neither batches nor caches: every token costs a pass over the whole context."""

    def __init__(self, model: TransformersModel) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self.adapters = model.adapters

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One request after the other, with the seeds, masks and tokens of the real thing."""
        with torch.no_grad():
            return [self._write(request) for request in requests]

    def close_session(self, session: str) -> None:
        """Nothing is held."""

    def _write(self, request: GenerateRequest) -> Completion:
        automaton = request.automaton
        assert automaton is not None
        seeds = np.array([request.seed], dtype=np.uint64)
        state, ids, logprobs, sampled = 0, list[int](), list[float](), list[bool]()
        with route_rows(self.model.base, [request.adapter]):
            while not automaton.is_final(state):
                logits = self.model.base(input_ids=torch.tensor([[*request.prompt_ids, *ids]])).logits[:, -1]
                allowed = torch.zeros(logits.shape, dtype=torch.bool)
                allowed[0, list(automaton.transitions[state])] = True
                dice = uniforms(seeds, len(ids))
                token, logprob = sample(logits, allowed, np.array([request.temperature]), dice)
                sampled.append(len(automaton.transitions[state]) > 1)
                ids.append(int(token[0]))
                logprobs.append(float(logprob[0]))
                state = automaton.transitions[state][ids[-1]]
        return Completion(tuple(ids), tuple(logprobs), tuple(sampled), CompletionEnd.GRAMMAR)


class Fixed:
    """A rollout source that hands out rows made beforehand."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def collect(self, iteration: int) -> Rollout:
        """Always the same."""
        return Rollout(self.rows, {}, sum(int(row.policy.sum()) for row in self.rows))


class Bench:
    """The models and the sides of the comparisons; each side is made ready when it is first asked for."""

    def __init__(self, scale: Scale, folder: Path) -> None:
        self.scale = scale
        self.folder = folder
        self.env: Any = make_env(TASK, {}, 0)
        words = starter_words(self.env.words, self.env.language, self.env.agents)
        shape = StarterSettings(width=scale.width, ffn=2 * scale.width)
        self.checkpoint = build_starter(words, folder / "starter", 0, shape)
        self.model = self._load(AGENTS)
        self.turns = 0

    def side(self, name: str) -> Callable[[], int]:
        """Does the work once and returns how many units it was."""
        return {
            "rollout": self.rollout,
            "one at a time": self.one_at_a_time,
            "bare generation": self.bare_generation,
            "update": self.update,
            "bare update": self.bare_update,
            "grpo": self.grpo,
            "ppo": self.ppo,
            "credit": self.credit,
            "training": self.training,
            "metering": lambda: self._speech.metering(),
            "coding": lambda: self._speech.coding(),
            "hearing": lambda: self._speech.hearing(),
            "reading": lambda: self._speech.reading(),
            "planning": lambda: self._planner.planning(),
            "candidate by candidate": lambda: self._planner.one_by_one(),
            "bare imagination": lambda: self._planner.bare_generation(),
            "vllm planning": lambda: self._vllm.planning("vllm"),
            "transformers planning": lambda: self._vllm.planning("transformers"),
            "vllm rollout": lambda: self._vllm.rollout("vllm"),
            "transformers rollout": lambda: self._vllm.rollout("transformers"),
        }[name]

    def rollout(self) -> int:
        """The library's rollout."""
        episodes = self._play(self.model, self.scale.seeds, self.scale.group)
        return sum(len(t.turns) for e in episodes for t in e.trajectories.values())

    def one_at_a_time(self) -> int:
        """The same episodes, fewer of them."""
        turns = 0
        for number in range(self.scale.slow_episodes):
            spec = EpisodeSpec(TASK, {}, number // self.scale.group, sample=number % self.scale.group)
            (episode,) = rollout([spec], self._team(OneAtATime(self.model)), ChannelSettings(), 0)
            turns += sum(len(t.turns) for t in episode.trajectories.values())
        return turns

    def bare_generation(self) -> int:
        """Transformers' `generate` on what the rollout's prompts were, step by step."""
        for prompts, new in self._prompts:
            with torch.no_grad():
                self._bare.generate(
                    prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=True, top_k=0,
                    eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
        return sum(len(prompts) for prompts, _ in self._prompts)

    def update(self) -> int:
        """One step of the trainer: forward, backward, clip, optimiser."""
        trainer, optimizer = self._trainer
        trainer._step = 1  # inside an iteration: the rows are in the buffer
        trainer.training_step(trainer.model, [{}], None)
        _step(optimizer)
        return 1

    def bare_update(self) -> int:
        """The same tokens through the same LoRA model with one adapter."""
        model, optimizer, ids, mask, labels = self._plain
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:]).backward()
        _step(optimizer)
        return 1

    def grpo(self) -> int:
        """Two passes over the rows of a rollout, in minibatches of one step's rows."""
        for _ in range(2 * self._minibatches):
            self.update()
        return 1

    def ppo(self) -> int:
        """The same, and a critic that values the rollout and learns from it."""
        critic, episodes, returns = self._critic
        critic.values(episodes)
        critic.fit(returns, 0)
        return self.grpo()

    def credit(self) -> int:
        """From episodes to advantages, by the default estimator."""
        estimate(self._many)
        return _CREDIT_TURNS

    def training(self) -> int:
        """A rollout, and two passes over its rows."""
        self.grpo()
        return self.rollout()

    def check(self) -> None:
        """Both sides of the first comparison sample the same tokens, or it compares nothing."""
        spec = EpisodeSpec(TASK, {}, 0)
        teams = self._team(self.model), self._team(OneAtATime(self.model))
        ours, other = (rollout([spec], team, ChannelSettings(), 0)[0] for team in teams)
        self._planner.check()
        self._speech.check()
        if VLLMBench.possible():
            self._vllm.check()
        for agent in AGENTS:
            pairs = zip(ours.trajectories[agent].turns, other.trajectories[agent].turns, strict=True)
            assert all(a.completion_ids == b.completion_ids for a, b in pairs), "the two sides sampled differently"

    # ---- what the sides need

    def _load(self, adapters: Sequence[str]) -> TransformersModel:
        model = TransformersModel.load(self.checkpoint, LoraSettings(), device="cpu")
        for number, name in enumerate(adapters):
            model.add_adapter(name, number)
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for key, value in model.adapter_parameters(name).items():
                    if "lora_B" in key:
                        value.normal_(0, 0.02, generator=generator)
        return model

    def _team(self, model: Any) -> GenerativeTeam:
        return GenerativeTeam(model, self.env.language, AgentSettings(), {agent: agent for agent in AGENTS})

    def _play(self, model: Any, seeds: int, group: int) -> list[Episode]:
        specs = [EpisodeSpec(TASK, {}, seed, sample=k) for seed in range(seeds) for k in range(group)]
        return rollout(specs, self._team(model), ChannelSettings(), 0)

    @cached_property
    def _speech(self) -> SpeechBench:
        return SpeechBench(self.scale.width, self.folder, self.scale.seeds, self.scale.group)

    @cached_property
    def _planner(self) -> PlanningBench:
        return PlanningBench(self.scale.width, self.folder, self.scale.planners)

    @cached_property
    def _vllm(self) -> VLLMBench:
        return VLLMBench(self.scale.width, self.folder, self.scale.planners, self.scale.seeds, self.scale.group)

    def close(self) -> None:
        """End what runs in processes of its own."""
        if "_vllm" in self.__dict__:
            self._vllm.close()

    @cached_property
    def _prompts(self) -> list[tuple[torch.Tensor, int]]:
        """The prompts of each step of the rollout, and how long the turns were."""
        by_step: dict[int, list[Any]] = {}
        for episode in self._play(self.model, self.scale.seeds, self.scale.group):
            for trajectory in episode.trajectories.values():
                for turn in trajectory.turns:
                    by_step.setdefault(turn.step, []).append(turn)
        return [
            (torch.tensor([turn.prompt_ids for turn in turns]), max(len(turn.completion_ids) for turn in turns))
            for _, turns in sorted(by_step.items())
        ]

    @cached_property
    def _bare(self) -> Any:
        """The base alone, never wrapped."""
        return self._load(()).base

    @cached_property
    def _rows(self) -> tuple[list[Row], GrammarTable]:
        team, table = self._team(self.model), GrammarTable()
        need = -(-self.scale.update_rows // (len(AGENTS) * self.env.horizon * self.scale.group))
        episodes = self._play(self.model, need, self.scale.group)
        rng = np.random.default_rng(0)
        credit = {key: float(rng.normal()) for key in estimate(episodes).advantages}
        settings = GameSource(self._recipe, team, table, frozenset(AGENTS), None).settings
        return build_rows(episodes, credit, team, table, settings)[: self.scale.update_rows], table

    @property
    def _recipe(self) -> Recipe:
        return Recipe(task=TASK, grpo=GRPOSettings(minibatches=1, epochs=2, hindsight_weight=0.0))

    @cached_property
    def _trainer(self) -> tuple[MultiAgentGRPOTrainer, torch.optim.Optimizer]:
        rows, table = self._rows
        config = grpo_config(self._recipe, self.folder / "checkpoints")
        model: Any = self.model.model
        trainer = MultiAgentGRPOTrainer(model, self.model.tokenizer, config, Fixed(rows), AGENTS, table)
        trainer.current_gradient_accumulation_steps = 1
        trainer._buffered_inputs = [trainer._generate_and_score_completions(None)]
        return trainer, trainer.create_optimizer()

    @property
    def _minibatches(self) -> int:
        """Of a whole rollout."""
        return -(-self.scale.seeds * self.scale.group * self.env.horizon * len(AGENTS) // self.scale.update_rows)

    @cached_property
    def _critic(self) -> tuple[Critic, list[Episode], dict[TurnKey, float]]:
        episodes = self._play(self.model, self.scale.seeds, self.scale.group)
        rng = np.random.default_rng(1)
        returns = {key: float(rng.integers(2)) for key in estimate(episodes).advantages}
        return Critic(self._load(AGENTS), self.env.agents, CriticSettings(), 0), episodes, returns

    @cached_property
    def _many(self) -> list[Episode]:
        found: list[Episode] = []
        turns = 0
        while turns < _CREDIT_TURNS:
            episodes = self._play(self.model, self.scale.seeds, self.scale.group)
            found += [replace(episode, group=f"{episode.group}:{len(found)}") for episode in episodes]
            turns += sum(len(t.turns) for e in episodes for t in e.trajectories.values())
        return found

    @cached_property
    def _plain(self) -> tuple[Any, torch.optim.Optimizer, torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = collate(self._rows[0], AGENTS, self.model.tokenizer.pad_token_id, 1)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : batch["prompt_ids"].shape[1]] = -100
        model: Any = self._load(("solo",)).model
        model.train()
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), ids, mask, labels


def _step(optimizer: torch.optim.Optimizer) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    # A rate of nothing: the weights, and with them the work, stay what they are.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()


def measure(scale: Scale, folder: Path) -> list[dict[str, Any]]:
    """Every comparison, as plain values."""
    bench = Bench(scale, folder)
    bench.check()
    found: list[dict[str, Any]] = []
    memory: dict[str, float] = {}
    for comparison in COMPARISONS:
        sides = (comparison.ours, comparison.other)
        if "vllm" in comparison.ours and not VLLMBench.possible():
            print(f"left out, as vLLM is not installed: {comparison.name}", file=sys.stderr)
            continue
        for name in sides:
            bench.side(name)()  # warm
            if name not in memory:
                memory[name] = peak_memory(scale, name)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(scale.repetitions):
            for name in sides:
                started = time.perf_counter()
                units = bench.side(name)()
                times[name].append((time.perf_counter() - started) / units)
        ours, other = (statistics.median(times[name]) for name in sides)
        ratio = other / ours if comparison.faster else ours / other
        each = [
            b / a if comparison.faster else a / b for a, b in zip(times[sides[0]], times[sides[1]], strict=True)
        ]
        found.append(
            {
                "comparison": comparison.name, "ratio": ratio, "ratio_min": min(each), "ratio_max": max(each),
                "target": comparison.target, "target_is": "at least" if comparison.faster else "at most",
                "met": ratio >= comparison.target if comparison.faster else ratio <= comparison.target,
                "unit": comparison.unit, "ours_ms": ours * 1000, "other_ms": other * 1000,
                "ours_peak_mib": memory[sides[0]], "other_peak_mib": memory[sides[1]],
            }
        )  # fmt: skip
    bench.close()
    return found


def peak_memory(scale: Scale, name: str) -> float:
    """Peak resident memory in MiB of a fresh process that does one side once."""
    # As a module: as a script its folder would come first on the path, where `vllm.py` is not vLLM.
    command = [sys.executable, "-m", "benchmarks.run", "--side", name, "--scale", json.dumps(asdict(scale))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.strip().splitlines()[-1])


def table(found: Sequence[dict[str, Any]], scale: Scale) -> str:
    """The results as Markdown."""
    lines = [
        f"Starter model of width {scale.width}; medians of {scale.repetitions} repetitions that take turns; "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread, {platform.machine()}.",
        "",
        "| ours / other | ratio (range) | target | met | ours | other | peak memory: ours | other |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        sign = "≥" if row["target_is"] == "at least" else "≤"
        lines.append(
            f"| {row['comparison']} | {_short(row['ratio'])} ({_short(row['ratio_min'])}–{_short(row['ratio_max'])}) "
            f"| {sign} {row['target']:g} | {'yes' if row['met'] else 'NO'} "
            f"| {_short(row['ours_ms'])} ms/{row['unit']} | {_short(row['other_ms'])} ms/{row['unit']} "
            f"| {row['ours_peak_mib']:.0f} MiB | {row['other_peak_mib']:.0f} MiB |"
        )
    return "\n".join(lines)


def _short(number: float) -> str:
    return f"{number:.2f}" if number >= 0.1 else f"{number:.2g}"


def main(arguments: Sequence[str]) -> None:
    """Run what the arguments say."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    options = list(arguments)

    def value(name: str) -> str | None:
        if name not in options:
            return None
        place = options.index(name)
        if place + 1 == len(options):
            sys.exit(f"{name} needs a value")
        del options[place]
        return options.pop(place)

    side, given, width = value("--side"), value("--scale"), int(value("--size") or 64)
    flags = {name: name in options for name in ("--quick", "--json", "--save")}
    unknown = [option for option in options if option not in flags]
    if unknown:
        sys.exit(f"unknown argument {unknown[0]!r}; there are --quick, --size WIDTH, --json and --save")
    with tempfile.TemporaryDirectory() as folder:
        if side is not None and given is not None:
            bench = Bench(Scale(**json.loads(given)), Path(folder))
            bench.side(side)()
            bench.close()
            kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
            print(sum(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024)
            return
        scale = Scale(width, 4, 4, 1, 128, 8, 5) if flags["--quick"] else Scale(width, 16, 8, 2, 512, 32, 7)
        found = measure(scale, Path(folder))
    text = table(found, scale)
    result = {"scale": asdict(scale), "torch": torch.__version__, "rows": found}
    print(json.dumps(result, indent=1) if flags["--json"] else text)
    if flags["--save"]:
        RESULTS.mkdir(exist_ok=True)
        name = "cpu" if width == 64 else f"cpu-{width}"
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / f"{name}.md").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
