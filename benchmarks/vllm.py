"""What vLLM is worth beside the embedded backend: planning, where prompts have much in common, and plain rollouts.

`VLLMBench` has the sides of the comparisons that `run.py` tabulates, each on vLLM in an engine of its own and on
transformers in this process, with the same seeds and so the same tokens:

* planning: agents decide at once, 16 candidates each, imagined 5 steps ahead by the token world model; every prompt
  begins with the same 300 tokens, as the rules of a game do for a pretrained checkpoint, and then two that are new in
  every repetition, so that nothing but the 300 is known from the one before;
* rollout: whole episodes in lockstep, prompts as they are: too short to share a block of the prefix cache.

Nothing is trained: weights are random. The engine has a process of its own, and so on a machine with several cores one
more than the embedded backend; `OMP_NUM_THREADS` is the same for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planning import SEARCH, WORLD, Endless, PlanningBench
from preconcert.agents import AgentSettings, ChannelSettings, GenerativeTeam
from preconcert.agents.planners import PlanningTeam
from preconcert.core import Turn
from preconcert.models import ChoiceRequest, Completion, GenerateRequest, LoraSettings, ScoreRequest, VLLMSettings
from preconcert.models.vllm_model import VLLMModel
from preconcert.models.vllm_start import vllm_builds
from preconcert.prompts import WorldFormat
from preconcert.training.rollout import EpisodeSpec, rollout
from preconcert.world_models.token import TokenWorldModel

TASK = "rendezvous"
PREFIX_TOKENS = 300


class Prefixed:
    """A language model whose prompts all begin with the same tokens.

    Args:
        inner: the backend.
        prefix: the tokens.
    """

    def __init__(self, inner: Any, prefix: tuple[int, ...]) -> None:
        self.inner, self.prefix = inner, prefix
        self.tokenizer = inner.tokenizer

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those of the backend."""
        found: tuple[str, ...] = self.inner.adapters
        return found

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """With the prefix before every prompt."""
        found: list[Completion] = self.inner.generate([self._prefixed(one) for one in requests])
        return found

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, ...]]:
        """With the prefix before every prompt."""
        found: list[tuple[float, ...]] = self.inner.score([self._prefixed(one) for one in requests])
        return found

    def choose(self, requests: Sequence[ChoiceRequest]) -> list[tuple[float, ...]]:
        """With the prefix before every prompt."""
        found: list[tuple[float, ...]] = self.inner.choose([self._prefixed(one) for one in requests])
        return found

    def close_session(self, session: str) -> None:
        """As the backend does."""
        self.inner.close_session(session)

    def _prefixed(self, request: Any) -> Any:
        return replace(request, prompt_ids=self.prefix + request.prompt_ids)


class VLLMBench:
    """The two backends and the sides; made ready when first asked for.

    Args:
        width: of the starter model.
        folder: for its checkpoint and adapters.
        agents: that plan at once.
        seeds: of the rollout's episodes.
        group: episodes per seed.
    """

    def __init__(self, width: int, folder: Path, agents: int, seeds: int, group: int) -> None:
        self.seeds, self.group = seeds, group
        self._folder = folder
        self._width, self._agents = width, agents
        self._repetitions = {"vllm": 0, "transformers": 0}

    @staticmethod
    def possible() -> bool:
        """Is vLLM installed?"""
        return len(vllm_builds()) == 1

    def planning(self, engine: str) -> int:
        """One decision of every agent.

        Args:
            engine: `vllm` or `transformers`.
        """
        return len(self._decide(engine))

    def rollout(self, engine: str) -> int:
        """All episodes; the number of turns.

        Args:
            engine: `vllm` or `transformers`.
        """
        specs = [EpisodeSpec(TASK, {}, seed, sample=k) for seed in range(self.seeds) for k in range(self.group)]
        episodes = rollout(specs, self._team(self._model(engine)), ChannelSettings(), 0)
        return sum(len(trajectory.turns) for one in episodes for trajectory in one.trajectories.values())

    def check(self) -> None:
        """Both decide alike, or the comparison compares nothing."""
        ours, other = (self._decide(engine) for engine in ("vllm", "transformers"))
        for one, two in zip(ours, other, strict=True):
            assert one.completion_ids == two.completion_ids, "the two engines decide differently"

    def close(self) -> None:
        """End vLLM's engine."""
        if "_engine" in self.__dict__:
            self._engine.close()

    def _decide(self, engine: str) -> list[Turn]:
        number, words = self._repetitions[engine], len(self._plain.model.tokenizer) - 3
        self._repetitions[engine] += 1
        model = Prefixed(self._model(engine), (*self._prefix, 3 + number // words % words, 3 + number % words))
        team = self._team(model)
        world = Endless(TokenWorldModel(model, WorldFormat(team.format), WORLD))
        planner = PlanningTeam(team, world, SEARCH)
        turns = planner.decide(self._plain.requests)
        for request in self._plain.requests:
            planner.finish(request.episode)
        return turns

    def _team(self, model: Any) -> GenerativeTeam:
        agents = [name for name in self._plain.model.adapters if name != WORLD]
        return GenerativeTeam(model, self._plain.language, AgentSettings(), {agent: agent for agent in agents})

    @cached_property
    def _plain(self) -> PlanningBench:
        return PlanningBench(self._width, self._folder / "vllm", self._agents)

    @cached_property
    def _prefix(self) -> tuple[int, ...]:
        rng = np.random.default_rng(0)
        return tuple(int(token) for token in rng.integers(3, len(self._plain.model.tokenizer), size=PREFIX_TOKENS))

    def _model(self, engine: str) -> Any:
        return {"vllm": lambda: self._engine, "transformers": lambda: self._plain.model}[engine]()

    @cached_property
    def _engine(self) -> VLLMModel:
        settings = VLLMSettings(max_rows=512, memory=1.0, timeout_s=600.0)
        engine = VLLMModel.load(self._plain.checkpoint, LoraSettings(), settings=settings)
        for name in self._plain.model.adapters:
            self._plain.model.save_adapter(name, self._folder / "adapters" / name)
            engine.load_adapter(name, self._folder / "adapters" / name)
        return engine
