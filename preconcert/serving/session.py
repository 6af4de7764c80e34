"""One session: an episode that is played turn by turn, whoever owns the world.

Parts: `OutsideWorld` (an environment that is the client's), `Session`. Requests, seeds, channel and record are those of
`training/rollout.py`, so that a session decides what an evaluation decides for the same instance and seed. Everything
here blocks; `sessions.py` keeps sessions and asks them one thing at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from preconcert.agents import Channel, GenerativeTeam
from preconcert.agents.channel import Nearest, check_places
from preconcert.agents.planners import Beam, BestOfK, PlanningTeam, Tree
from preconcert.core import (
    ConfigError,
    EnvError,
    Episode,
    Observation,
    StepResult,
    StopReason,
    TaskLanguage,
    Turn,
    TurnRequest,
    derive_seed,
    nearest,
)
from preconcert.serving.errors import ServiceError
from preconcert.serving.settings import ServiceSettings
from preconcert.serving.team import ServedTeam
from preconcert.serving.wire import ObservationBody, ObserveBody, SessionBody
from preconcert.training.rollout import EpisodeSpec, Running, begin, carry_out, record, turn_requests

FREE = "free-form"
"""Stands for the task in the seeds of sessions without one."""

OnTurn = Callable[[Turn], None]


class OutsideWorld:
    """An `Env` whose steps happen somewhere else.

    Args:
        agents: their names.
        language: what can be said.
        horizon: steps at the most.
    """

    def __init__(self, agents: tuple[str, ...], language: TaskLanguage, horizon: int) -> None:
        self.agents = agents
        self.language = language
        self.horizon = horizon
        self._observations: Mapping[str, Observation] = {}
        self._positions: Mapping[str, tuple[int, ...]] | None = None

    def supply(
        self, observations: Mapping[str, Observation], positions: Mapping[str, tuple[int, ...]] | None
    ) -> None:
        """What the client says came of the last step."""
        self._observations, self._positions = observations, positions

    def reset(self) -> Mapping[str, Observation]:
        """What was supplied."""
        return self._observations

    def step(self, actions: Mapping[str, str]) -> StepResult:
        """What was supplied; rewards are nobody's business here."""
        return StepResult(self._observations, dict.fromkeys(self.agents, 0.0), False)

    def state(self) -> str:
        """Not known."""
        return ""

    def snapshot(self) -> Any:
        """Not possible.

        Raises:
            EnvError: always.
        """
        raise EnvError("the world of this session is the client's: nobody here can go back to a moment of it")

    def restore(self, snapshot: Any) -> None:
        """As `snapshot`."""
        self.snapshot()

    def legal_actions(self, agent: str) -> tuple[str, ...]:
        """As supplied."""
        return self._observations[agent].legal_actions

    def positions(self) -> Mapping[str, tuple[int, ...]] | None:
        """As supplied."""
        return self._positions


@dataclass(frozen=True, slots=True)
class Decided:
    """One step of a session."""

    step: int
    turns: tuple[Turn, ...]
    """In the order of the agents."""
    episode: Episode | None = None
    """So far, where the world is the service's."""
    done: bool = False


class Session:
    """One episode.

    Args:
        id: its name.
        team: plays.
        body: what was asked for.
        settings: limits.
        hands: runs the agents of one step side by side, where their turns are wanted as they come.

    Raises:
        PreconcertError: the task, a parameter, an agent, an adapter or a word cannot be used.
    """

    def __init__(
        self, id: str, team: ServedTeam, body: SessionBody, settings: ServiceSettings, hands: Executor
    ) -> None:
        self.id = id
        self.body = body
        self.temperature = 0.0 if body.greedy else (body.temperature or 1.0)
        self.step = 0
        """Turns that were decided."""
        self.done = False
        self._hands = hands
        self._seed = derive_seed(body.seed, "eval")
        self.talk = Channel(team.channel, derive_seed(self._seed, "rollout"))
        instance = body.seed if body.instance is None else body.instance
        language: TaskLanguage | None = None
        assignment: dict[str, str | None] | None = None
        _check_plan(body, settings)
        if body.language is None:
            if body.task not in (None, team.task):
                raise ConfigError(f"this service plays {team.task!r}, not {body.task!r}")
            team.check_players(body.agents)
            params = {**team.params, **body.params}
            spec = EpisodeSpec(team.task, params, instance, body.split, cast=dict(body.agents))
            ((name, state),) = begin([spec], team.channel).items()
            if body.params and state.env.horizon > settings.max_steps:  # the run's own is not the client's doing
                raise ConfigError(
                    f"params: an episode of {state.env.horizon} steps, rounds of talk included, is longer than the "
                    f"limit of {settings.max_steps}"
                )
            for agent in state.env.agents:
                if agent not in team.assignment:
                    raise ConfigError(f"params: nobody plays {agent!r}; the team has {', '.join(team.assignment)}")
            if body.params and state.env.language != team.language:
                # Parameters may change what can be said; words that the model lacks are refused when they come up.
                language, assignment = state.env.language, team.assignment
            self.state = state
        else:
            language = body.language.language()
            agents = tuple(body.agents)
            for name in team.channel.topology.names():
                if name not in agents:
                    raise ConfigError(f"the team's channel goes by {name!r}; {nearest(name, agents)}")
            spec = EpisodeSpec(FREE, {}, instance, body.split)
            name = spec.name
            self.state = Running(spec, OutsideWorld(agents, language, settings.max_steps), {})
            assignment = dict(body.agents)
        self.name = name
        self.policy = team.policy(self.temperature, body.plan, language, assignment)
        self.assignment: Mapping[str, str | None] = {
            agent: body.agents.get(agent, team.assignment.get(agent)) for agent in self.state.env.agents
        }
        self._outside: OutsideWorld | None = None
        if isinstance(self.state.env, OutsideWorld):
            self._outside = self.state.env
        self._max_steps = settings.max_steps
        self._undelivered: dict[str, Turn] | None = None
        """Turns of the last step whose messages wait for the client's next view."""
        self.first = dict(self.state.observations)
        """What the agents see first in the service's own world."""

    @property
    def horizon(self) -> int:
        """Steps at the most."""
        return self.state.env.horizon

    def observe(self, body: ObserveBody, on_turn: OnTurn | None = None) -> Decided:
        """The agents' turns for what they see in the client's world.

        Args:
            body: what they see.
            on_turn: receives every turn as it is ready.

        Raises:
            PreconcertError: something in it cannot be used; the session stands where it stood.
        """
        observations = self._observations(body.observations)
        needs_places = isinstance(self.talk.settings.topology, Nearest)
        if needs_places and (body.positions is None or set(body.positions) != set(self.state.env.agents)):
            raise ConfigError(
                f"positions are needed of all agents, since messages go to the nearest: "
                f"{', '.join(self.state.env.agents)}"
            )
        if needs_places:
            check_places(body.positions or {})
        world, before = self._outside, self.state
        if world is None:
            if self.step:
                raise ServiceError(
                    409, "conflict", f"the service plays the world of session {self.id!r}: go on with `step`"
                )
            env = self.state.env
            world = self._outside = OutsideWorld(env.agents, env.language, env.horizon)
            self.state = Running(self.state.spec, world, {})
        if self.step >= min(world.horizon, self._max_steps):
            raise ServiceError(
                409, "conflict", f"session {self.id!r} is over after {self.step} steps; open another one"
            )
        try:
            world.supply(observations, body.positions)
            if self._undelivered is not None:
                self._carry_out(self._undelivered)
                self._undelivered = None
                self.state.turns.clear()
            self.state.observations = observations
            turns = self._decide(on_turn)
        except Exception:
            if not self.step:  # nobody has played in the client's world yet
                self._outside, self.state = None, before
            raise
        self._undelivered = turns
        self.step += 1
        return Decided(self.step - 1, tuple(turns.values()))

    def advance(self, on_turn: OnTurn | None = None) -> Decided:
        """One step in the service's own world.

        Args:
            on_turn: receives every turn as it is ready.

        Raises:
            ServiceError: the world is the client's, or the episode is over.
        """
        if self._outside is not None:
            raise ServiceError(
                409, "conflict", f"the world of session {self.id!r} is the client's: go on with `observe`"
            )
        if self.done:
            raise ServiceError(409, "conflict", f"the episode of session {self.id!r} is over after {self.step} steps")
        turns = self._decide(on_turn)
        ended = self._carry_out(turns)
        self.step += 1
        self.done = ended is not None
        episode = ended if ended is not None else self.so_far()
        return Decided(self.step - 1, tuple(turns.values()), episode, self.done)

    def so_far(self) -> Episode:
        """What was played in the service's own world, as if it were over."""
        return record(self.state, self.policy, StopReason.CUT, None)

    def close(self) -> None:
        """Let go of what is held."""
        self.policy.finish(self.id)

    def _carry_out(self, turns: Mapping[str, Turn]) -> Episode | None:
        live, groups = {self.name: self.state}, {self.name: self.state.spec.group}
        return carry_out(live, {self.name: turns}, self.talk, self.policy, groups, self._last_step()).get(self.name)

    def _last_step(self) -> int:
        """That of the turns which are carried out."""
        return self.step - 1 if self._undelivered is not None else self.step

    def _decide(self, on_turn: OnTurn | None) -> dict[str, Turn]:
        requests = [
            # The seeds are the episode's; memory and caches are the session's.
            replace(request, episode=self.id)
            for request in turn_requests({self.name: self.state}, self.talk, self._seed)
        ]
        memories = {request.agent: self.policy_memory(request) for request in requests}
        try:
            if on_turn is None or isinstance(self.policy, PlanningTeam):
                turns = self.policy.decide(requests)
                for turn in turns if on_turn is not None else ():
                    on_turn(turn)  # type: ignore[misc]
            else:
                turns = self._as_they_come(requests, self.policy, on_turn)
        except Exception:
            for agent, memory in memories.items():
                self._inner.remember(self.id, agent, memory)
            raise
        return {turn.agent: turn for turn in turns}

    def _as_they_come(self, requests: Sequence[TurnRequest], policy: GenerativeTeam, on_turn: OnTurn) -> list[Turn]:
        """Every agent asked on its own; the model puts them into one batch, if that is quicker."""

        def ask(request: TurnRequest) -> Turn:
            (turn,) = policy.decide([request])
            on_turn(turn)
            return turn

        waiting = [self._hands.submit(ask, request) for request in requests]
        failed: Exception | None = None
        turns: list[Turn] = []
        for each in waiting:  # all of them, so that nobody writes on when this has failed
            try:
                turns.append(each.result())
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return turns

    def policy_memory(self, request: TurnRequest) -> Any:
        """What is remembered of an agent."""
        return self._inner.recall(self.id, request.agent)

    @property
    def _inner(self) -> Any:
        return self.policy.policy if isinstance(self.policy, PlanningTeam) else self.policy

    def _observations(self, given: Mapping[str, ObservationBody]) -> dict[str, Observation]:
        agents, actions = self.state.env.agents, self.state.env.language.actions
        for agent in given:
            if agent not in agents:
                raise ConfigError(f"observations of unknown agent {agent!r}; {nearest(agent, agents)}")
        found: dict[str, Observation] = {}
        for agent in agents:
            if agent not in given:
                raise ConfigError(f"observations: none of agent {agent!r}; all of {', '.join(agents)} are needed")
            seen = given[agent]
            for action in seen.legal_actions:
                if action not in actions:
                    raise ConfigError(
                        f"observations.{agent}.legal_actions: unknown action {action!r}; {nearest(action, actions)}"
                    )
            if len(set(seen.legal_actions)) != len(seen.legal_actions):
                raise ConfigError(f"observations.{agent}.legal_actions has an action twice")
            found[agent] = Observation(
                agent, seen.text, seen.legal_actions, self.step, dict(seen.fields), seen.sees
            )
        return found


def _check_plan(body: SessionBody, settings: ServiceSettings) -> None:
    """How large a search may be."""
    plan = body.plan
    if plan is None:
        return
    match plan:
        case Tree():
            leaves = plan.rounds * plan.leaves
            turns, steps = plan.candidates + leaves * plan.branch, leaves
        case Beam():
            grown = plan.width * plan.branch * (plan.horizon - 1)
            turns, steps = plan.candidates + grown, (plan.candidates + grown) * plan.samples
        case BestOfK():
            ways = plan.candidates * plan.samples
            turns, steps = plan.candidates + ways * (plan.horizon - 1), ways * plan.horizon
    if turns + steps > settings.max_plan:
        raise ConfigError(
            f"plan: {turns} turns and {steps} imagined steps to decide one turn are more than the limit of "
            f"{settings.max_plan} together"
        )


__all__ = ["FREE", "Decided", "OutsideWorld", "Session"]
