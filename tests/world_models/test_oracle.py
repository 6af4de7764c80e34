"""The world as its own model: it foresees what happens, is exact where it is judged, and planning with it pays."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preconcert.agents import ChannelSettings
from preconcert.agents.planners import PLANNERS, Beam, BestOfK, PlannerSettings, PlanningTeam, Tree
from preconcert.core import ConfigError, EnvError, Episode, Message, Move, Outcome, TurnRequest, WorldModel
from preconcert.envs import make_env, tasks
from preconcert.experiments.planned import WorldKind, world_of
from preconcert.models import TransformersModel
from preconcert.training.recipe import Recipe
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout
from preconcert.world_models import OracleValue, OracleWorldModel
from tests.training.teams import PARAMS, TASK, load, starter_checkpoint, team_on

PLAIN = ChannelSettings()


@pytest.fixture
def starter(tmp_path: Path) -> TransformersModel:
    return load(starter_checkpoint(tmp_path / "starter"))


class Recorder:
    """A policy that keeps what it was asked and how it answered."""

    version = -1

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.asked: list[tuple[TurnRequest, Any, Any]] = []

    def decide(self, requests: Any) -> Any:
        turns = self.policy.decide(requests)
        for request, turn in zip(requests, turns, strict=True):
            self.asked.append((request, request.env.snapshot(), turn))
        return turns

    def finish(self, episode: str) -> None:
        self.policy.finish(episode)


def moments(task: str, kind: str = "scripted", seed: int = 0) -> tuple[Episode, list[tuple[TurnRequest, Any, Any]]]:
    recorder = Recorder(ScriptedPolicy(kind))
    [episode] = rollout([EpisodeSpec(task, {}, seed)], recorder, PLAIN, 0)
    return episode, recorder.asked


@pytest.mark.parametrize("task", tasks())
def test_it_foresees_what_happens(task: str) -> None:
    """With the actions that were really taken, view, reward and end are the real ones, whatever is stepped between."""
    episode, asked = moments(task)
    model = OracleWorldModel(ScriptedPolicy("scripted"))
    assert isinstance(model, WorldModel)
    for agent, trajectory in episode.trajectories.items():
        own = [each for each in asked if each[0].agent == agent]
        for step, (request, snapshot, turn) in enumerate(own):
            request.env.restore(snapshot)
            here = [each[0] for each in asked if each[0].observation.step == request.observation.step]
            beliefs = model.begin(here, [[] for _ in here])
            belief = beliefs[[each.agent for each in here].index(agent)]
            others = {other: episode.trajectories[other].turns[step].action for other in request.others}
            said = turn.message.payload if turn.message else None
            last = step + 1 == len(trajectory.turns)
            real = trajectory.final_observation if last else trajectory.turns[step + 1].observation
            for _ in range(2):  # a belief is not changed by going on from it
                [imagined] = model.advance([belief], [Move(turn.action, said, others)], [step])
                assert imagined.observation == real
                assert imagined.reward == trajectory.turns[step].reward
                assert imagined.done == last
                assert imagined.others == others
                assert imagined.value == (0.0 if last else None)
            outcome = Outcome(real, others, trajectory.turns[step].reward, last)
            [judged] = model.judge([belief], [Move(turn.action)], [outcome])
            assert judged is not None
            assert judged.view_nll == 0.0
            assert judged.reward_probability == 1.0
            assert judged.done_probability == (1.0 if last else model.floor)
            assert judged.others.keys() == set(request.others)
            for shares in judged.others.values():
                assert sum(shares.values()) == pytest.approx(1.0)
            wrong = replace(outcome, reward=outcome.reward + 7, observation=replace(real, text="elsewhere"))
            [judged] = model.judge([belief], [Move(turn.action)], [wrong])
            assert judged is not None
            assert judged.view_nll == pytest.approx(-math.log(model.floor))
            assert judged.reward_probability == model.floor
    model.finish(episode.trajectories and own[0][0].episode)
    assert not model._copies


def present(seed: int = 0, kind: str = "expert") -> list[TurnRequest]:
    env = make_env("rendezvous", {}, seed)
    views = env.reset()
    return [
        TurnRequest("e", agent, views[agent], (), tuple(a for a in env.agents if a != agent), env.language, seed, env)
        for agent in env.agents
    ]


def test_messages_travel_for_one_step() -> None:
    requests = present()
    model = OracleWorldModel(ScriptedPolicy("expert"))
    belief = model.begin(requests, [(), ()])[0]
    [step] = model.advance([belief], [Move("stay", "a north")], [0])
    assert [message.sender for message in step.inbox] == ["agent_1"]
    assert step.inbox[0].sent_at == 0
    heard = step.belief.inboxes["agent_1"]
    assert heard == (Message("agent_0", ("agent_1",), "a north", 0.0, 2, 0),)
    # an inbox holds the last message of each sender, and silence leaves it as it is
    [later] = model.advance([step.belief], [Move("stay")], [0])
    assert [message.sent_at for message in later.inbox] == [1]
    assert later.belief.inboxes["agent_1"] == heard


def test_experts_imagine_their_success_and_values_are_their_returns() -> None:
    """Two experts meet: the oracle says so from the first step on, and sees it coming to the end."""
    requests = present()
    model = OracleWorldModel(ScriptedPolicy("expert"), OracleValue.ROLLOUT)
    belief = model.begin(requests, [(), ()])[0]
    policy = ScriptedPolicy("expert")
    done, rewards = False, 0.0
    env = make_env("rendezvous", {}, 0)
    env.reset()
    while not done:
        env.restore(belief.snapshot)
        moment = replace(requests[0], observation=belief.observations["agent_0"], inbox=belief.inboxes["agent_0"])
        [turn] = policy.decide([replace(moment, env=env)])
        [step] = model.advance([belief], [Move(turn.action, turn.message and turn.message.payload)], [0])
        rewards += step.reward
        done, belief = step.done, step.belief
        assert step.value == (0.0 if done else 1.0)
    assert rewards == 1.0


def test_refusals() -> None:
    requests = present()
    model = OracleWorldModel(ScriptedPolicy("scripted"))
    [alone] = model.begin(requests[:1], [()])
    with pytest.raises(ConfigError, match="agent_1"):
        model.advance([alone], [Move("stay")], [0])
    [step] = model.advance([alone], [Move("stay", None, {"agent_1": "stay"})], [0])
    assert step.others == {"agent_1": "stay"}
    with pytest.raises(EnvError, match="sty"):
        model.advance([alone], [Move("sty", None, {"agent_1": "stay"})], [0])


SEARCHES: dict[str, PlannerSettings] = {
    "best-of-k": BestOfK(candidates=12, samples=1, horizon=3),
    "beam": Beam(candidates=8, samples=1, width=3, branch=3, horizon=3),
    "tree": Tree(candidates=8, branch=3, rounds=8, leaves=6, horizon=3),
}


@pytest.mark.parametrize("kind", PLANNERS)
def test_planning_beats_the_same_team_without(kind: str, starter: TransformersModel) -> None:
    """An untrained team that does anything, on layouts that are solved by walking together to one of nine cells."""
    team = team_on(starter)
    specs = [EpisodeSpec(TASK, PARAMS, seed) for seed in range(8)]
    reactive = rollout(specs, team, PLAIN, 0)
    planner = PlanningTeam(team, OracleWorldModel(team, OracleValue.ROLLOUT), SEARCHES[kind])
    planned = rollout(specs, planner, PLAIN, 0)
    assert _solved(planned) > _solved(reactive)
    assert planner.decisions == 8 * 3 * 2
    assert planner.tokens_generated > 8 * 3 * 2 * 14
    turn = planned[0].trajectories["agent_0"].turns[0]
    assert sum(each.chosen for each in turn.candidates) == 1
    best = next(each for each in turn.candidates if each.chosen)
    assert best.action == turn.action
    assert best.message == (turn.message and turn.message.payload)
    assert best.moves[0].others is not None
    assert not team._memories
    assert not planner._pasts


def test_plans_are_the_same_in_any_company(starter: TransformersModel) -> None:
    team = team_on(starter)
    specs = [EpisodeSpec(TASK, PARAMS, seed) for seed in range(2)]
    planner = PlanningTeam(team, OracleWorldModel(team), SEARCHES["best-of-k"])
    together = rollout(specs, planner, PLAIN, 5)
    alone = [rollout([spec], planner, PLAIN, 5)[0] for spec in specs]
    for one, other in zip(together, alone, strict=True):
        for agent in one.trajectories:
            for a, b in zip(one.trajectories[agent].turns, other.trajectories[agent].turns, strict=True):
                assert (a.action, a.completion_ids, a.message and a.message.payload) == (
                    b.action, b.completion_ids, b.message and b.message.payload
                )  # fmt: skip
                assert [(c.action, c.path, c.score) for c in a.candidates] == [
                    (c.action, c.path, c.score) for c in b.candidates
                ]


def _solved(episodes: list[Episode]) -> int:
    return sum(bool(episode.success) for episode in episodes)


def test_the_ceiling_of_the_commands_sees_beyond_its_horizon() -> None:
    """`--model oracle` looks one step ahead and knows already that two experts will meet, which pays at the end."""
    team = ScriptedPolicy("expert")
    players = SimpleNamespace(recipe=Recipe(task="rendezvous"))
    world = world_of(players, Path("nowhere"), WorldKind.ORACLE, team)  # type: ignore[arg-type]
    planner = PlanningTeam(team, world, BestOfK(candidates=2, samples=1, horizon=1))
    for turn in planner.decide(present()):
        assert turn.candidates[0].mean > 0.9
