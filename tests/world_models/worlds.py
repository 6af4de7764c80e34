"""Small worlds for tests of world models: a counter that is moved by two, real play, and models that know or fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preconcert.agents import ChannelSettings
from preconcert.core import (
    Env,
    Episode,
    ImaginedStep,
    Judgement,
    Message,
    Move,
    Observation,
    Outcome,
    Slot,
    StopReason,
    TaskLanguage,
    Trajectory,
    Turn,
    TurnRequest,
    View,
    ViewField,
)
from preconcert.envs import make_env
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout
from preconcert.world_models.fidelity import Case, cases_of, choose_starts

ACTIONS = ("up", "stay")
VIEW = View(
    (
        ViewField("height", ("0", "1", "2", "3", "4"), "height", number=True, determined=True),
        ViewField("light", ("red", "green"), "light"),
    )
)
LANGUAGE = TaskLanguage(
    ACTIONS, (Slot("word", ("go", "wait")),), (Slot("height", VIEW.fields[0].choices),), ("0", "1"), "stay", VIEW
)
NOBODY: Any = None
"""Stands for an environment that no model here looks at."""


def seen(agent: str, height: int, light: str, step: int) -> Observation:
    """A view of the counter."""
    return Observation(agent, f"height {height} light {light}", ACTIONS, step, {"height": str(height)})


def counted(plan: Sequence[tuple[str, str]], lights: Sequence[str], words: Sequence[str] = ()) -> Episode:
    """An episode in which the height rises by one for every `up`; reaching 4 is rewarded. Both agents see the same.

    Args:
        plan: what a and b do.
        lights: in the first view and after each step.
        words: what b says in each step; none by default.
    """
    heights = [0]
    for joint in plan:
        heights.append(min(4, heights[-1] + joint.count("up")))
    paid = [float(new == 4 and old < 4) for old, new in zip(heights, heights[1:], strict=False)]
    turns: dict[str, list[Turn]] = {"a": [], "b": []}
    for t, joint in enumerate(plan):
        for agent, action in zip("ab", joint, strict=True):
            heard = words[t - 1] if agent == "a" and 0 < t <= len(words) else None
            inbox = () if heard is None else (Message("b", ("a",), heard, 0.0, 1, t - 1),)
            said = Message("b", ("a",), words[t], 0.0, 1, t) if agent == "b" and t < len(words) else None
            turns[agent].append(
                Turn(
                    agent, t, seen(agent, heights[t], lights[t], t), inbox, (), (), (), (), (), (), None, said, action,
                    False, paid[t],
                )
            )  # fmt: skip
    end = len(plan)
    return Episode(
        "counter", {}, 0, "train", "g", 0, -1,
        {
            agent: Trajectory(
                agent, tuple(mine), -1, StopReason.TERMINATED, seen(agent, heights[end], lights[end], end)
            )
            for agent, mine in turns.items()
        },
        heights[end] == 4, tuple(str(height) for height in heights),
    )  # fmt: skip


def no_env(episode: Episode, step: int) -> Env:
    """For models that do not look at it."""
    return NOBODY


def request_of(
    episode: Episode, agent: str, step: int, name: str = "e", language: TaskLanguage = LANGUAGE
) -> TurnRequest:
    """The moment before a step."""
    turn = episode.trajectories[agent].turns[step]
    others = tuple(other for other in episode.trajectories if other != agent)
    return TurnRequest(name, agent, turn.observation, turn.inbox, others, language, 0, NOBODY)


def played(
    task: str, params: Mapping[str, Any], count: int, kind: str = "scripted", split: str = "train"
) -> list[Episode]:
    """Real episodes by one of the task's own players."""
    specs = [EpisodeSpec(task, params, seed, split, sample=seed) for seed in range(count)]
    return rollout(specs, ScriptedPolicy(kind), ChannelSettings(), 0)


def language_of(task: str, params: Mapping[str, Any]) -> TaskLanguage:
    """The vocabularies of a task."""
    return make_env(task, params, 0, "train").language


def env_at(episode: Episode, step: int) -> Env:
    """The world of an episode as it stood before a step."""
    env = make_env(episode.task, episode.params, episode.seed, episode.split)
    env.reset()
    for at in range(step):
        env.step({agent: mine.turns[at].action for agent, mine in episode.trajectories.items()})
    return env


def cases(episodes: Sequence[Episode], language: TaskLanguage, horizons: Sequence[int], count: int = 3) -> list[Case]:
    """Cases of all agents of all episodes."""
    return [
        case
        for number, episode in enumerate(episodes)
        for case in cases_of(
            episode, f"e{number}", language, choose_starts(episode.steps, horizons, count, number), no_env
        )
    ]


@dataclass
class Knowing:
    """A model that has read the future: it answers with the outcomes of the cases, given or not given the others.

    Args:
        cases: whose futures it knows.
        malformed_from: the step of an imagination, from 1, from which it writes nonsense; None for never.
        ends_at: the step at which it says that all is over; None for when it really is.
    """

    cases: Sequence[Case]
    malformed_from: int | None = None
    ends_at: int | None = None

    def begin(self, requests: Sequence[TurnRequest], pasts: Sequence[Sequence[Turn]]) -> list[Any]:
        """Which case, and how far."""
        known = {(case.request.episode, case.request.agent): case for case in self.cases}
        return [(known[request.episode, request.agent], 0) for request in requests]

    def advance(self, beliefs: Sequence[Any], moves: Sequence[Move], seeds: Sequence[int]) -> list[ImaginedStep]:
        """What will happen."""
        found = []
        for (case, at), _ in zip(beliefs, moves, strict=True):
            outcome = case.outcomes[at]
            if self.malformed_from is not None and at + 1 >= self.malformed_from:
                found.append(ImaginedStep(None, (), {}, 0.0, False, None, None, malformed=True))
                continue
            done = outcome.done or at + 1 == self.ends_at
            found.append(
                ImaginedStep(outcome.observation, (), outcome.others, outcome.reward, done, 0.0, (case, at + 1))
            )
        return found

    def judge(
        self, beliefs: Sequence[Any], moves: Sequence[Move], outcomes: Sequence[Outcome]
    ) -> list[Judgement | None]:
        """It is certain."""
        return [
            Judgement(
                0.0, 1.0, float(each.done),
                {other: {action: float(action == did) for action in ACTIONS} for other, did in each.others.items()},
            )
            for each in outcomes
        ]  # fmt: skip

    def finish(self, episode: str) -> None:
        """Nothing is held."""
