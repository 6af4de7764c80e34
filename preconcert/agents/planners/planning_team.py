"""A team that plans: a policy that proposes, a world model that imagines, and a search; usable wherever a policy is.

At every decision the first action of the best plan is carried out and its message sent; at the next one everything is
planned anew. With one candidate and nothing to choose from it plays exactly as the policy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from preconcert.agents.planners.beam import beam
from preconcert.agents.planners.best_of_k import best_of_k
from preconcert.agents.planners.horizon import HorizonTracker
from preconcert.agents.planners.paths import Critic, Moment, Plan
from preconcert.agents.planners.settings import Beam, BestOfK, PlannerSettings, Tree
from preconcert.agents.planners.tree import tree_search
from preconcert.core import Rehearsing, Slot, Turn, TurnRequest, WorldModel


class PlanningTeam:
    """A `Policy` and a `Planner`.

    Args:
        policy: proposes turns and goes on with them in imagination; usually a `GenerativeTeam`.
        world: imagines what follows.
        settings: the kind of search and its size.
        critic: values of imagined moments, where the world model has none.
    """

    def __init__(
        self, policy: Rehearsing, world: WorldModel, settings: PlannerSettings, critic: Critic | None = None
    ) -> None:
        self.policy = policy
        self.world = world
        self.settings = settings
        self.critic = critic
        self.decisions = 0
        """Turns decided so far."""
        self.policy_tokens = 0
        """Tokens written by the policy for them, forced ones included."""
        self.world_tokens = 0
        """Tokens written by the world model for them; 0 for one that does not write."""
        self._pasts: dict[tuple[str, str], list[Turn]] = {}
        self._trackers: dict[tuple[str, str], HorizonTracker] = {}

    @property
    def version(self) -> int:
        """That of the policy."""
        return self.policy.version

    @version.setter
    def version(self, value: int) -> None:
        self.policy.version = value

    @property
    def tokens_generated(self) -> int:
        """Tokens written so far, by policy and world model."""
        return self.policy_tokens + self.world_tokens

    def version_of(self, adapter: str) -> int:
        """Number of updates behind an adapter."""
        asked = getattr(self.policy, "version_of", None)
        return self.policy.version if asked is None else int(asked(adapter))

    def message_slots(self, others: Sequence[str]) -> tuple[Slot, ...] | None:
        """Those of the policy; None where it has none of its own."""
        asked = getattr(self.policy, "message_slots", None)
        return None if asked is None else tuple(asked(others))

    def decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """One planned turn per request, in order; `Turn.candidates` holds what was weighed."""
        if not requests:
            return []
        before = _tokens(self.policy), _tokens(self.world)
        beliefs = self.world.begin(requests, [self._pasts.get(_key(request), []) for request in requests])
        moments = [
            Moment(request, self.policy.recall(request.episode, request.agent), belief, self._horizon(request))
            for request, belief in zip(requests, beliefs, strict=True)
        ]
        turns: list[Turn] = []
        for request, plan in zip(requests, self._search(moments), strict=True):
            turn = replace(plan.chosen.turn, candidates=plan.candidates)
            self.policy.remember(request.episode, request.agent, plan.chosen.memory)
            self._pasts.setdefault(_key(request), []).append(turn)
            if self.settings.adaptive is not None:
                self._trackers[_key(request)].act(turn.action, plan.paths)
            turns.append(turn)
        self.decisions += len(turns)
        self.policy_tokens += _tokens(self.policy) - before[0]
        self.world_tokens += _tokens(self.world) - before[1]
        return turns

    def plan(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """The same, as a `Planner`."""
        return self.decide(requests)

    def finish(self, episode: str) -> None:
        """Let go of what is held for an episode."""
        self.policy.finish(episode)
        self.world.finish(episode)
        for held in (self._pasts, self._trackers):
            for key in [key for key in held if key[0] == episode]:
                del held[key]  # type: ignore[attr-defined]

    def fork(self, episode: str, name: str) -> None:
        """Give another episode this one's memory."""
        for (held, agent), past in list(self._pasts.items()):
            if held == episode:
                self._pasts[(name, agent)] = list(past)
                self.policy.remember(name, agent, self.policy.recall(episode, agent))
        for (held, agent), tracker in list(self._trackers.items()):
            if held == episode:
                self._trackers[(name, agent)] = tracker.copy()

    def _horizon(self, request: TurnRequest) -> int:
        adaptive = self.settings.adaptive
        if adaptive is None:
            return self.settings.horizon
        fresh = HorizonTracker(adaptive, self.settings.horizon, request.language.view)
        tracker = self._trackers.setdefault(_key(request), fresh)
        tracker.see(request.observation)
        return tracker.horizon

    def _search(self, moments: Sequence[Moment]) -> list[Plan]:
        match self.settings:
            case BestOfK():
                return best_of_k(self.policy, self.world, moments, self.settings, self.critic)
            case Beam():
                return beam(self.policy, self.world, moments, self.settings, self.critic)
            case Tree():
                return tree_search(self.policy, self.world, moments, self.settings, self.critic)


def _key(request: TurnRequest) -> tuple[str, str]:
    return request.episode, request.agent


def _tokens(writer: Any) -> int:
    """A writer counts its own tokens; what does not write has no count."""
    return int(getattr(writer, "tokens_generated", 0))
