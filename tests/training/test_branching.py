"""Branches leave from one moment, are all scored before any is followed, and are what the world says they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from preconcert.agents import AgentSettings, ChannelMode, ChannelSettings, Context
from preconcert.core import ConfigError, Episode, Observation, Slot, StepResult, StopReason, TaskLanguage
from preconcert.envs import make_env
from preconcert.models import TransformersModel
from preconcert.training import branching
from preconcert.training.branching import Branched, branch, scored, select
from preconcert.training.credit import Follow, RewardSettings, Score
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy
from tests.training.teams import AGENTS, PARAMS, TASK, settings_of, team_on

HORIZON: int = PARAMS["horizon"]
LINES, CANDIDATES = 3, 4


class Tally:
    """Two agents, three steps; each is paid how far it was moved, times the step, less what it was pushed."""

    agents = ("ann", "bob")
    horizon = 3
    language = TaskLanguage(actions=("left", "stay", "right"), default_action="stay", message=(Slot("w", ("x", "y")),))
    steps_taken = 0

    def __init__(self, params: Mapping[str, Any], seed: int, split: str = "train") -> None:
        self.rng = np.random.default_rng(seed)
        self.place, self.step_number = [0, 0], 0

    def reset(self) -> Mapping[str, Observation]:
        return self._views()

    def step(self, actions: Mapping[str, str]) -> StepResult:
        Tally.steps_taken += 1
        paid = {}
        for i, agent in enumerate(self.agents):
            push = int(self.rng.integers(3)) - 1  # the world's own randomness
            move = self.language.actions.index(actions[agent]) - 1
            self.place[i] += move + push
            paid[agent] = float((self.step_number + 1) * move)
        self.step_number += 1
        return StepResult(self._views(), paid, self.step_number == self.horizon, success=True, truncated=True)

    def state(self) -> str:
        return f"{self.step_number} {self.place}"

    def snapshot(self) -> Any:
        return (list(self.place), self.step_number, self.rng.bit_generator.state)

    def restore(self, snapshot: Any) -> None:
        self.place, self.step_number = list(snapshot[0]), snapshot[1]
        self.rng.bit_generator.state = snapshot[2]

    def legal_actions(self, agent: str) -> tuple[str, ...]:
        return self.language.actions

    def _views(self) -> dict[str, Observation]:
        return {
            agent: Observation(agent, self.state(), self.language.actions, self.step_number) for agent in self.agents
        }


TALLY = f"{__name__}:Tally"


def specs(task: str, params: Mapping[str, Any] | None = None) -> list[EpisodeSpec]:
    """Three lines, two of them on one seed."""
    return [EpisodeSpec(task, params or {}, seed, sample=sample) for seed, sample in ((5, 0), (5, 1), (8, 0))]


def scripted(task: str = TALLY, candidates: int = CANDIDATES, **options: Any) -> Branched:
    return branch(specs(task), ScriptedPolicy("random"), ChannelSettings(), 0, candidates, **options)


def moments(played: Branched) -> dict[str, list[Episode]]:
    found: dict[str, list[Episode]] = defaultdict(list)
    for one in played.branches:
        found[one.group].append(one)
    return found


def actions_of(episode: Episode) -> list[dict[str, str]]:
    return [
        {agent: trajectory.turns[i].action for agent, trajectory in episode.trajectories.items()}
        for i in range(episode.steps)
    ]


def by_hand(episode: Episode, before: Sequence[Mapping[str, str]]) -> tuple[list[str], dict[str, list[float]]]:
    """States and rewards of the episode's actions after some others, in a world that was never copied."""
    env = make_env(episode.task, episode.params, episode.seed, episode.split)
    env.reset()
    for actions in before:
        env.step(actions)
    states, rewards = [env.state()], defaultdict(list)
    for actions in actions_of(episode):
        result = env.step(actions)
        states.append(env.state())
        for agent, paid in result.rewards.items():
            rewards[agent].append(paid)
    return states, dict(rewards)


@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("follow", Follow)
def test_branches_are_what_the_world_says(score: Score, follow: Follow) -> None:
    played = scripted(score=score, follow=follow)
    assert len(played.lines) == LINES
    groups = moments(played)
    assert len(groups) == LINES * Tally.horizon
    for spec, line in zip(specs(TALLY), played.lines, strict=True):
        assert (line.group, line.sample, line.steps) == (spec.group, spec.sample, Tally.horizon)
        chosen = actions_of(line)
        states, rewards = by_hand(line, [])
        assert list(line.states) == states
        assert {a: [t.reward for t in tr.turns] for a, tr in line.trajectories.items()} == rewards
        for step in range(line.steps):
            group = groups[f"{spec.group}/{spec.sample}/{step}"]
            assert [one.sample for one in group] == list(range(CANDIDATES))
            best = select(scored(group), follow)
            assert actions_of(group[best])[0] == chosen[step], "the line went on with another branch"
            for one in group:
                states, rewards = by_hand(one, chosen[:step])
                assert list(one.states) == states
                assert {a: [t.reward for t in tr.turns] for a, tr in one.trajectories.items()} == rewards
                stop = next(iter(one.trajectories.values())).stop_reason
                ended = score is Score.ROLLOUT or step + 1 == Tally.horizon
                assert one.steps == (Tally.horizon - step if score is Score.ROLLOUT else 1)
                assert stop is (StopReason.TRUNCATED if ended else StopReason.CUT)
    assert {one.steps for one in played.from_the_start} == {Tally.horizon if score is Score.ROLLOUT else 1}
    assert len(played.from_the_start) == LINES * CANDIDATES


@pytest.mark.parametrize(("score", "expected"), [(Score.ROLLOUT, 1 + 2 + 3), (Score.IMMEDIATE, 3)])
def test_every_step_of_every_world_is_counted(score: Score, expected: int) -> None:
    Tally.steps_taken = 0
    played = scripted(score=score)
    assert played.environment_steps == Tally.steps_taken == LINES * CANDIDATES * expected


@pytest.mark.parametrize("score", Score)
def test_nothing_is_followed_before_everything_is_scored(score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, int]] = []

    def watched_scores(branches: Sequence[Episode], rewards: RewardSettings | None = None) -> list[dict[str, float]]:
        found = scored(branches, rewards)
        assert all(set(mine) == set(Tally.agents) for mine in found)
        assert {one.steps for one in branches} == ({branches[0].steps} if score is Score.ROLLOUT else {1})
        events.append(("scored", len(found)))
        return found

    def watched_choice(scores: Sequence[Mapping[str, float]], follow: Follow) -> int:
        events.append(("chosen", len(scores)))
        return select(scores, follow)

    monkeypatch.setattr(branching, "scored", watched_scores)
    monkeypatch.setattr(branching, "select", watched_choice)
    scripted(score=score)
    assert events == [("scored", LINES * CANDIDATES), *[("chosen", CANDIDATES)] * LINES] * Tally.horizon


def test_the_best_is_best_for_the_team_and_ties_go_to_the_first() -> None:
    scores = [{"ann": 1.0, "bob": 0.0}, {"ann": 0.0, "bob": 2.0}, {"ann": 2.0, "bob": 0.0}]
    assert select(scores, Follow.BEST) == 1
    assert select(scores, Follow.FIRST) == 0


def test_following_the_best_pays() -> None:
    def mean(follow: Follow) -> float:
        many = [EpisodeSpec(TALLY, {}, seed) for seed in range(12)]
        played = branch(many, ScriptedPolicy("random"), ChannelSettings(), 0, 6, Score.IMMEDIATE, follow)
        return float(np.mean([t.total_reward for one in played.lines for t in one.trajectories.values()]))

    assert mean(Follow.BEST) > mean(Follow.FIRST) + 1.0


def test_rewards_are_shaped_for_the_choice() -> None:
    played = scripted(rewards=RewardSettings(scale={"bob": 0.0}), score=Score.IMMEDIATE)
    for spec, line in zip(specs(TALLY), played.lines, strict=True):
        for step in range(line.steps):
            group = moments(played)[f"{spec.group}/{spec.sample}/{step}"]
            paid = [one.trajectories["ann"].turns[0].reward for one in group]
            assert line.trajectories["ann"].turns[step].reward == max(paid)


@pytest.mark.parametrize("context", Context)
def test_branches_of_a_moment_have_read_the_same(starter: TransformersModel, context: Context) -> None:
    """Memory, transcript and inboxes are copied, so prompts are equal; what is sampled is not."""
    settings = AgentSettings(memory=2, context=context) if context is Context.TURN else settings_of(context)
    team = team_on(starter, settings)
    played = branch(specs(TASK, PARAMS), team, ChannelSettings(), 3, CANDIDATES)
    groups = moments(played)
    assert len(groups) == LINES * HORIZON
    heard = 0
    for name, group in groups.items():
        firsts = [{agent: one.trajectories[agent].turns[0] for agent in AGENTS} for one in group]
        assert len({one.states[0] for one in group}) == 1
        for agent in AGENTS:
            assert len({turns[agent].prompt_ids for turns in firsts}) == 1
            assert len({turns[agent].inbox for turns in firsts}) == 1
            assert {turns[agent].step for turns in firsts} == {int(name.rpartition("/")[2])}
            heard += bool(firsts[0][agent].inbox)
        assert len({turns[agent].completion_ids for turns in firsts for agent in AGENTS}) > len(AGENTS)
    assert heard == LINES * (HORIZON - 1) * len(AGENTS)
    for line in played.lines:
        for trajectory in line.trajectories.values():
            past = trajectory.turns[0]
            for turn in trajectory.turns[1:]:
                assert turn.inbox
                if context is Context.TRANSCRIPT:
                    assert turn.prompt_ids[: len(past.prompt_ids)] == past.prompt_ids
                past = turn
    assert not team._memories, "a finished game left its memory behind"


def test_one_policy_call_per_step(starter: TransformersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    generate = starter.generate

    def counted(requests: Any) -> Any:
        sizes.append(len(requests))
        return generate(requests)

    monkeypatch.setattr(starter, "generate", counted)
    branch(specs(TASK, PARAMS), team_on(starter), ChannelSettings(), 0, CANDIDATES)
    assert sizes == [LINES * CANDIDATES * len(AGENTS)] * (HORIZON * (HORIZON + 1) // 2)


@pytest.mark.parametrize("mode", ChannelMode)
def test_the_controls_of_the_channel_hold_in_branches(starter: TransformersModel, mode: ChannelMode) -> None:
    played = branch(specs(TASK, PARAMS), team_on(starter), ChannelSettings(mode=mode, drop=0.2), 0, 2)
    inboxes = [turn.inbox for one in played.branches for t in one.trajectories.values() for turn in t.turns]
    assert any(inboxes) == (mode is not ChannelMode.OFF)


def test_the_same_seed_plays_the_same() -> None:
    assert scripted() == scripted()
    assert scripted().lines != branch(specs(TALLY), ScriptedPolicy("random"), ChannelSettings(), 1, CANDIDATES).lines


def test_a_policy_that_cannot_be_in_two_places_is_refused() -> None:
    class Stubborn:
        version = -1

        def decide(self, requests: Any) -> Any:
            return ScriptedPolicy("random").decide(requests)

        def finish(self, episode: str) -> None:
            """Nothing is held."""

    with pytest.raises(ConfigError, match="Stubborn cannot go on twice from one moment"):
        branch(specs(TALLY), Stubborn(), ChannelSettings(), 0, 2)
