"""What planning costs: one decision of many agents by best-of-K in a token world model.

`PlanningBench` has the sides of the comparisons that `run.py` tabulates:

* planning: 32 agents decide at once, 16 candidates each, imagined 5 steps ahead: all imaginations of an imagined step
  in one call of the world model and one of the policy;
* candidate by candidate: the same search with a call for each candidate's step; fewer agents;
* bare generation: transformers' `generate` on the bare base with the prompts of that decision and as many new tokens,
  in the same batches, without adapters, grammar, parsing, beliefs or scores.

Nothing is trained: weights are random, so nearly all candidates differ and nothing is saved by their being equal. An
untrained world model would end half of its imaginations at every step; here they go on to the horizon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from preconcert.agents import AgentSettings, GenerativeTeam
from preconcert.agents.planners import BestOfK, PlanningTeam, ScoreSettings
from preconcert.agents.planners.paths import Moment, advance, move_of, propose, respond, start, weigh
from preconcert.core import ImaginedStep, Move, Turn, TurnRequest, derive_seed
from preconcert.envs import make_env
from preconcert.models import (
    Completion,
    GenerateRequest,
    LoraSettings,
    StarterSettings,
    TransformersModel,
    build_starter,
)
from preconcert.prompts import WorldFormat, starter_words
from preconcert.world_models.token import TokenWorldModel

TASK = "rendezvous"
# A candidate alone has no share of the samples to be weighed by.
SEARCH = BestOfK(candidates=16, samples=1, horizon=5, score=ScoreSettings(prior_weight=0.0))
AGENTS_AT_ONCE = 32
WORLD = "world"


class Endless:
    """A world model whose imaginations never end."""

    def __init__(self, inner: TokenWorldModel) -> None:
        self.inner = inner

    def begin(self, requests: Sequence[TurnRequest], pasts: Sequence[Sequence[Turn]]) -> list[Any]:
        """As the model within."""
        return list(self.inner.begin(requests, pasts))

    def advance(self, beliefs: Sequence[Any], moves: Sequence[Move], seeds: Sequence[int]) -> list[ImaginedStep]:
        """As the model within, without ends."""
        return [replace(step, done=False) for step in self.inner.advance(beliefs, moves, seeds)]

    def judge(self, beliefs: Any, moves: Any, outcomes: Any) -> Any:
        """As the model within."""
        return self.inner.judge(beliefs, moves, outcomes)

    def finish(self, episode: str) -> None:
        """As the model within."""
        self.inner.finish(episode)


class PlanningBench:
    """The models and the sides; each is made ready when it is first asked for.

    Args:
        width: of the starter model.
        folder: for its checkpoint.
        agents: deciding at once.
    """

    def __init__(self, width: int, folder: Path, agents: int = AGENTS_AT_ONCE) -> None:
        env: Any = make_env(TASK, {}, 0)
        self.agents = agents
        self.language = env.language
        words = starter_words(env.words, env.language, env.agents, digits=True)
        shape = StarterSettings(width=width, ffn=2 * width)
        self.checkpoint = build_starter(words, folder / "planner", 0, shape)
        self.model = self._load((*env.agents, WORLD))
        self.team = GenerativeTeam(self.model, env.language, AgentSettings(), {agent: agent for agent in env.agents})
        self.world = Endless(TokenWorldModel(self.model, WorldFormat(self.team.format), WORLD))

    def planning(self) -> int:
        """One decision of every agent."""
        return len(self._decide(self.requests))

    def one_by_one(self) -> int:
        """One decision of one agent, its candidates one after the other."""
        self._decide_alone(self.requests[0])
        return 1

    def bare_generation(self) -> int:
        """The prompts of one decision of every agent through transformers' `generate`."""
        for prompts, new in self._calls:
            with torch.no_grad():
                self._bare.generate(
                    prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=True, top_k=0,
                    eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
        return self.agents

    def check(self) -> None:
        """Both ways of searching weigh the same, or the comparison compares nothing."""
        [turn] = self._decide(self.requests[:1])
        scores = self._decide_alone(self.requests[0])
        pairs = zip(sorted(each.score for each in turn.candidates), sorted(scores), strict=True)
        assert all(abs(one - other) < 1e-4 for one, other in pairs), "the two ways weigh differently"

    @cached_property
    def requests(self) -> list[TurnRequest]:
        """The first moments of as many agents."""
        found: list[TurnRequest] = []
        number = 0
        while len(found) < self.agents:
            env = make_env(TASK, {}, number)
            views = env.reset()
            for agent in env.agents:
                others = tuple(other for other in env.agents if other != agent)
                seed = derive_seed("bench", number, agent)
                found.append(TurnRequest(f"e{number}", agent, views[agent], (), others, self.language, seed, env))
            number += 1
        return found[: self.agents]

    @cached_property
    def tokens(self) -> int:
        """Tokens written for one decision of every agent."""
        return sum(new * len(prompts) for prompts, new in self._calls)

    def _decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        planner = PlanningTeam(self.team, self.world, SEARCH)
        turns = planner.decide(requests)
        for request in requests:
            planner.finish(request.episode)
        return turns

    def _decide_alone(self, request: TurnRequest) -> list[float]:
        [belief] = self.world.begin([request], [()])
        memory = self.team.recall(request.episode, request.agent)
        moment = Moment(request, memory, belief, SEARCH.horizon)
        [proposals] = propose(self.team, [request], [memory], SEARCH.candidates)
        scores: list[float] = []
        for proposal in proposals:
            paths = [start(moment, proposal, sample) for sample in range(SEARCH.samples)]
            advance(self.world, paths, [proposal.move] * len(paths))
            for _ in range(SEARCH.horizon - 1):
                advance(self.world, paths, [move_of(turn) for turn in respond(self.team, paths)])
            scores.append(weigh(paths, [None] * len(paths), moment, SEARCH.score)[0])
        return scores

    @cached_property
    def _calls(self) -> list[tuple[torch.Tensor, int]]:
        """The prompts of every call of one decision, and how many tokens were written after them."""
        recorded: list[tuple[torch.Tensor, int]] = []
        generate = self.model.generate

        def listening(requests: Sequence[GenerateRequest]) -> list[Completion]:
            completions = generate(requests)
            ids = torch.tensor([request.prompt_ids for request in requests])
            recorded.append((ids, max(len(completion.ids) for completion in completions)))
            return completions

        self.model.generate = listening  # type: ignore[method-assign]
        try:
            self._decide(self.requests)
        finally:
            self.model.generate = generate  # type: ignore[method-assign]
        return recorded

    @cached_property
    def _bare(self) -> Any:
        """The base alone, never wrapped."""
        return self._load(()).base

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
