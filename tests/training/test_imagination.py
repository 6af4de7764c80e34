"""Learning in imagination, with a world model that is exact because it is the environment."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from preconcert.agents import AgentSettings, Context
from preconcert.core import (
    ConfigError,
    Env,
    Episode,
    ImaginedStep,
    Judgement,
    Move,
    Outcome,
    StopReason,
    TrainingError,
    Turn,
    TurnRequest,
    WorldModel,
    derive_seed,
)
from preconcert.models import TransformersModel
from preconcert.training.credit import AgentCredit, Game, Strand, estimate
from preconcert.training.imagination import (
    IMAGINED,
    ImaginationSettings,
    Imaginer,
    Moment,
    damped_advantages,
    replayed,
    valued_oracle,
)
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Silent
from preconcert.training.rows import GrammarTable, Row, build_rows
from preconcert.training.run import make_imaginer, train
from preconcert.training.source import GameSource
from preconcert.world_models import OracleValue
from tests.training.teams import (
    AGENTS,
    PARAMS,
    FixedSource,
    gradients_of,
    largest_difference,
    load,
    play,
    recipe_of,
    settings_of,
    team_on,
    trainer_on,
    weights_of,
)

HORIZON: int = PARAMS["horizon"]


class Truth:
    """The environment as a world model. The others stay where they are and are silent.

    Args:
        lucky: pays for the distance to the corner, since an untrained team earns nothing.
        value: said at every view.
        fails: an action whose outcome it cannot write.
    """

    def __init__(self, lucky: bool = False, value: float | None = 0.25, fails: str = "") -> None:
        self.lucky, self.value, self.fails = lucky, value, fails
        self.calls: list[int] = []
        self.finished: list[str] = []
        self.tokens_generated = 0

    def begin(self, requests: Sequence[TurnRequest], pasts: Sequence[Sequence[Turn]]) -> list[Any]:
        for request, past in zip(requests, pasts, strict=True):
            assert [turn.step for turn in past] == list(range(request.observation.step))
        return [(request.env, request.agent, request.others, request.inbox) for request in requests]

    def advance(self, beliefs: Sequence[Any], moves: Sequence[Move], seeds: Sequence[int]) -> list[ImaginedStep]:
        self.calls.append(len(moves))
        self.tokens_generated += 10 * len(moves)
        assert len(set(seeds)) == len(seeds)
        return [self._one(belief, move) for belief, move in zip(beliefs, moves, strict=True)]

    def judge(
        self, beliefs: Sequence[Any], moves: Sequence[Move], outcomes: Sequence[Outcome]
    ) -> list[Judgement | None]:
        return [None] * len(beliefs)

    def finish(self, episode: str) -> None:
        self.finished.append(episode)

    def _one(self, belief: tuple[Env, str, Sequence[str], Any], move: Move) -> ImaginedStep:
        env, agent, others, inbox = belief
        if move.action == self.fails:
            return ImaginedStep(None, (), {}, 0.0, False, None, None, malformed=True)
        after = copy.deepcopy(env)
        stays = dict.fromkeys(others, "stay")
        result = after.step({agent: move.action, **stays})
        reward = lucky_reward(result.observations[agent].fields) if self.lucky else result.rewards[agent]
        return ImaginedStep(
            result.observations[agent], inbox, stays, reward, result.done, self.value, (after, agent, others, inbox)
        )


def lucky_reward(fields: Mapping[str, str]) -> float:
    return 0.1 * int(fields["row"]) + 0.01 * int(fields["col"])


def imaginer_on(team: Any, model: WorldModel, **settings: Any) -> Imaginer:
    plain: dict[str, Any] = {"ratio": 3.0, "group": 3, "horizon": 2}
    return Imaginer(ImaginationSettings(**{**plain, **settings}), team, model, AGENTS, oracle=True)


def as_played(imagined: Episode, real: Sequence[Episode]) -> Episode:
    """The same decisions carried out in the environment: what would have been recorded had they been real."""
    name, agent = imagined.group, next(a for a, t in imagined.trajectories.items() if t.turns[0].completion_ids)
    start = next(
        moment
        for one in real
        for index in range(one.steps)
        if name == f"{(moment := Moment(one, agent, index)).name}:{IMAGINED}"
    )
    env = replayed(start)
    trajectories = dict(imagined.trajectories)
    mine = trajectories[agent]
    turns = []
    for turn in mine.turns:
        others = {other: "stay" for other in imagined.trajectories if other != agent}
        seen = env.step({agent: turn.action, **others}).observations[agent]
        turns.append(replace(turn, reward=lucky_reward(seen.fields)))
    if mine.stop_reason is StopReason.TRUNCATED:
        turns[-1] = replace(turns[-1], reward=turns[-1].reward + 0.25)
    trajectories[agent] = replace(mine, turns=tuple(turns), final_observation=seen)
    return replace(imagined, split="train", trajectories=trajectories)


def same(one: Row, other: Row) -> bool:
    """In everything but the name and the number of the step."""
    arrays = ("policy", "targets", "logprobs", "advantages", "allowed", "kinds")
    return (
        all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
        and (one.adapter, one.agent) == (other.adapter, other.agent)
        and (one.prompt_ids, one.completion_ids) == (other.prompt_ids, other.completion_ids)
    )


@pytest.mark.parametrize("settings", [settings_of(), settings_of(Context.TRANSCRIPT), AgentSettings(memory=2)])
def test_imagined_games_are_trained_on_like_real_ones(
    starter: TransformersModel, tmp_path: Path, settings: AgentSettings
) -> None:
    """The decisions imagined in an exact model, carried out, are the same episodes, rows and gradients."""
    team, table = team_on(starter, settings), GrammarTable()
    recipe = recipe_of(hindsight_weight=0.5)
    imaginer = imaginer_on(team, Truth(lucky=True), damped=False)
    source = GameSource(recipe, team, table, frozenset(AGENTS), None, imaginer=imaginer)
    real = play(team, seeds=2, group=2)
    rows, figures = source._imagine(0, real)
    imagined = imaginer.imagine(real, derive_seed(recipe.seed, "imagine", 0)).episodes
    played = [as_played(one, real) for one in imagined]
    for dreamt, lived in zip(imagined, played, strict=True):
        for agent, trajectory in dreamt.trajectories.items():
            for mine, theirs in zip(trajectory.turns, lived.trajectories[agent].turns, strict=True):
                assert mine.reward == pytest.approx(theirs.reward) or not mine.completion_ids
    blind = replace(source.settings, hindsight=False)
    twins = build_rows(played, estimate(played).advantages, team, table, blind)
    assert len(rows) == len(twins) == figures["imagination/rows"]
    assert all(same(one, other) for one, other in zip(rows, twins, strict=True))
    assert sum(float(np.abs(row.advantages).sum()) for row in rows) > 1.0
    assert not any((row.targets >= 0).any() for row in rows)
    first, second = (
        gradients_of(trainer_on(starter, FixedSource(some), table, tmp_path), starter) for some in (rows, twins)
    )
    assert largest_difference(first, second) == 0.0
    assert max(float(value.abs().max()) for value in first.values()) > 1e-3


def game_of(group: str, agent: str, earned: float) -> Game:
    """One whose agent learns, beside one who does not."""
    learner = Strand(agent, np.array([0.0, earned]), ((True,), (True,)))
    return Game(group, {agent: learner, "other": Strand("other", np.array([0.0, earned]), ((), ()))})


def test_groups_that_hardly_differ_hardly_count() -> None:
    """One at stake with deviation 1, one with a hundredth of that, and another agent's, of which there is one."""
    games = [game_of("at stake", "a", value) for value in (0.0, 2.0)]
    games += [game_of("noise", "a", value) for value in (0.5, 0.52)]
    games += [game_of("alone", "b", value) for value in (0.5, 0.52)]
    credit = AgentCredit().estimate(games)
    plain = {(key.episode, key.agent): value for key, value in credit.advantages.items() if key.index}
    found = damped_advantages(credit.advantages, games)
    damped = {(key.episode, key.agent): value for key, value in found.items() if key.index}
    usual = np.sqrt((1.0**2 + 0.01**2) / 2)
    assert plain[3, "a"] == pytest.approx(plain[1, "a"], rel=0.01), "the estimator alone takes them for equal"
    assert damped[0, "a"] == plain[0, "a"]
    assert damped[1, "a"] == plain[1, "a"] > 0.5
    assert damped[3, "a"] == pytest.approx(0.01 / usual * plain[3, "a"])
    assert damped[5, "b"] == pytest.approx(plain[5, "b"])
    lived = [game_of("lived", "a", value) for value in (0.0, 6.0)] + [game_of("lived", "b", 0.5)] * 2
    beside = {
        (key.episode, key.agent): value
        for key, value in damped_advantages(credit.advantages, games, lived).items()
        if key.index
    }
    assert beside[1, "a"] == pytest.approx(plain[1, "a"] / 3), "real games differ by 3"
    assert beside[3, "a"] == pytest.approx(0.01 / 3 * plain[3, "a"])
    assert beside[5, "b"] == damped[5, "b"], "real games of an agent that do not differ say nothing"
    even = [game_of("same", "a", 0.5), game_of("same", "a", 0.5)]
    assert set(damped_advantages(AgentCredit().estimate(even).advantages, even).values()) == {0.0}


def test_damping_is_what_a_run_does(starter: TransformersModel) -> None:
    """Rows differ by the weight of their group alone."""
    team, table, recipe = team_on(starter), GrammarTable(), recipe_of()
    real = play(team, seeds=2, group=2)
    found = []
    for damped in (False, True):
        imaginer = imaginer_on(team, Truth(lucky=True), damped=damped)
        source = GameSource(recipe, team, table, frozenset(AGENTS), None, imaginer=imaginer)
        found.append(source._imagine(0, real)[0])
    sizes = [[float(np.abs(row.advantages).sum()) for row in rows] for rows in found]
    assert all(after <= before for before, after in zip(*sizes, strict=True))
    assert sum(sizes[1]) < sum(sizes[0])


def test_a_rollout_counts_real_and_imagined_apart(starter: TransformersModel) -> None:
    team, model = team_on(starter), Truth(lucky=True)
    recipe = recipe_of(warmup_iterations=0)
    alone = GameSource(recipe, team_on(starter), GrammarTable(), frozenset(AGENTS), None).collect(1)
    imaginer = imaginer_on(team, model, ratio=2.0, warmup_iterations=1)
    source = GameSource(recipe, team, GrammarTable(), frozenset(AGENTS), None, imaginer=imaginer)
    first = source.collect(0)
    assert not any(name.startswith("imagination/") for name in first.metrics)
    assert not model.calls
    both = source.collect(1)
    for name in ("environment_steps", "generated_tokens", "success", "return", "episode_steps"):
        assert both.metrics[name] == alone.metrics[name]
    assert both.metrics["environment_steps"] == 2 * 2 * HORIZON
    turns = 2 * 2 * HORIZON * len(AGENTS)
    groups = both.metrics["imagination/groups"]
    assert groups == pytest.approx(2 * turns / (3 * 2), rel=0.5)
    assert sum(model.calls) == both.metrics["imagination/steps"] == both.metrics["imagination/rows"]
    assert both.metrics["imagination/world_tokens"] == 10 * both.metrics["imagination/steps"]
    assert model.calls[0] == 3 * groups  # one call a step, for all imaginations at once
    assert len(model.calls) == 2
    assert len(model.finished) == len(set(model.finished)) == groups
    assert len(both.episodes) == len(alone.episodes) == 4
    real = sum(int(row.policy.sum()) for row in alone.rows) if len(alone.rows) == turns else alone.policy_tokens
    assert both.policy_tokens == real + both.metrics["imagination/rows"] * real / turns
    steps = max(int(row.joint.max()) for row in both.rows)
    assert steps >= 2 * 2 * HORIZON  # numbered after the real ones


def test_the_same_iteration_imagines_the_same(starter: TransformersModel) -> None:
    def collect() -> Any:
        team = team_on(starter)
        imaginer = imaginer_on(team, Truth(lucky=True))
        return GameSource(
            recipe_of(), team, GrammarTable(), frozenset(AGENTS), None, imaginer=imaginer
        ).collect(3)

    one, other = collect(), collect()
    assert all(same(a, b) for a, b in zip(one.rows, other.rows, strict=True))
    assert [row.name for row in one.rows] == [row.name for row in other.rows]


def test_returns_and_ends(starter: TransformersModel) -> None:
    team = team_on(starter)
    real = play(team, seeds=1, group=2)
    for one in imaginer_on(team, Truth(lucky=True)).imagine(real, 0).episodes:
        (mine,) = [t for t in one.trajectories.values() if t.turns[0].completion_ids]
        (other,) = [t for t in one.trajectories.values() if not t.turns[0].completion_ids]
        assert one.split == IMAGINED
        assert one.success is None
        assert one.steps == len(mine.turns) == len(other.turns) <= 2
        assert {turn.action for turn in other.turns} == {"stay"}
        over = mine.turns[0].step + len(mine.turns) == HORIZON
        assert mine.stop_reason is (StopReason.TERMINATED if over else StopReason.TRUNCATED)
        views = [turn.observation for turn in mine.turns[1:]] + [mine.final_observation]
        assert mine.total_reward == pytest.approx(sum(lucky_reward(v.fields) for v in views) + 0.25 * (not over))
        assert other.total_reward == mine.total_reward
    bare = imaginer_on(team, Truth(lucky=True, value=None), value=False).imagine(real, 0)
    assert bare.metrics["imagination/return"] < 0.5
    with pytest.raises(TrainingError, match="Truth gives no value at the horizon"):
        imaginer_on(team, Truth(value=None), horizon=1).imagine(real, 0)
    assert imaginer_on(team, Truth(value=None), horizon=HORIZON).imagine(real, 0).metrics["imagination/ended"] == 1


def test_what_the_model_cannot_write_is_worth_the_least(starter: TransformersModel) -> None:
    team = team_on(starter)
    real = play(team, seeds=2, group=2)
    found = imaginer_on(team, Truth(lucky=True, fails="north")).imagine(real, 0)
    totals: dict[bool, list[float]] = {True: [], False: []}
    least: dict[str, float] = {}
    for one in found.episodes:
        (mine,) = [t for t in one.trajectories.values() if t.turns[0].completion_ids]
        broken = mine.turns[-1].action == "north"
        assert broken == (mine.stop_reason is StopReason.CUT)
        totals[broken].append(mine.total_reward)
        if not broken:
            least[mine.agent] = min(least.get(mine.agent, 9.0), mine.total_reward)
        assert "north" not in [turn.action for turn in mine.turns[:-1]]
    assert max(totals[True]) <= max(least.values())
    assert found.metrics["imagination/malformed"] == pytest.approx(len(totals[True]) / len(found.episodes))
    assert totals[True]
    assert found.metrics["imagination/return"] == pytest.approx(np.mean(totals[False]))
    # All groups still compare: a broken imagination never has a positive advantage beside a whole one.
    credit = estimate(found.episodes).advantages
    for key, advantage in credit.items():
        if found.episodes[key.episode].trajectories[key.agent].stop_reason is StopReason.CUT:
            assert float(np.max(advantage)) <= 1e-9


def test_nobody_imagines_who_does_not_learn(starter: TransformersModel) -> None:
    team = team_on(starter)
    real = play(team, seeds=1, group=2)
    plain = ImaginationSettings(ratio=5.0, group=2, horizon=1)
    found = Imaginer(plain, team, Truth(), {"agent_1"}, oracle=True).imagine(real, 0)
    writers = {a for one in found.episodes for a, t in one.trajectories.items() if t.turns[0].completion_ids}
    assert writers == {"agent_1"}
    assert Imaginer(plain, team, Truth(), set()).imagine(real, 0).episodes == ()


def test_the_world_models_adapter_is_not_trained(checkpoint: Any, tmp_path: Path) -> None:
    model = load(checkpoint("starter"), (*AGENTS, "world"))
    team, table = team_on(model), GrammarTable()
    imaginer = imaginer_on(team, Truth(lucky=True))
    source = GameSource(recipe_of(), team, table, frozenset(AGENTS), None, imaginer=imaginer)
    before = weights_of(model)
    trainer_on(model, source, table, tmp_path).train()
    after = weights_of(model)
    for key, value in after.items():
        moved = not bool((value == before[key]).all())
        assert moved != key.startswith("world"), key


def test_a_moment_that_cannot_be_found_again_is_refused(starter: TransformersModel) -> None:
    (real, *_) = play(team_on(starter), seeds=1, group=2)
    env = replayed(Moment(real, "agent_1", 2))
    assert env.state() == real.states[2]
    with pytest.raises(TrainingError, match="the environment shows"):
        replayed(Moment(replace(real, seed=real.seed + 1), "agent_0", 1))


@pytest.mark.parametrize(
    ("grpo", "rest", "message"),
    [
        ({"credit": "role"}, {}, "grpo.credit=role does not"),
        ({"credit": "agent-turn"}, {}, "grpo.credit=agent-turn does not"),
        ({"credit": "adalign"}, {}, "grpo.credit=adalign does not"),
        ({}, {"algorithm": "ppo"}, "grpo.credit=gae does not"),
        ({}, {"league": {}}, "do not go together"),
    ],
)
def test_settings_that_compare_nothing_are_refused(grpo: Any, rest: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({"task": "kuhn", "grpo": {"imagination": {}, **grpo}, **rest})


class Interrupted(Exception):
    """The power went."""


class Breaker(Silent):
    """A reporter that ends a run after some iterations."""

    def __init__(self, iterations: int) -> None:
        self.iterations, self.name = iterations, ""

    def stage(self, name: str, total: int) -> None:
        self.name = name

    def advance(self, done: int, note: str = "") -> None:
        if self.name == "reinforcement learning" and done == self.iterations:
            raise Interrupted


def test_a_run_that_imagines_goes_on_where_it_was(tmp_path: Path) -> None:
    """Imagined games and annealed prediction rewards: an interrupted run ends like one that was not."""
    recipe = recipe_of(
        iterations=4, checkpoint_every=2, lr=0.02, prediction={"action": 1.0, "end": 0.5},
        imagination={"model": "oracle", "ratio": 1.0, "group": 2, "horizon": 2, "warmup_iterations": 1},
    )  # fmt: skip
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "broken", reporter=Breaker(3))
    broken = train(recipe, tmp_path / "broken", resume=True)
    one, other = (
        [
            {key: value for key, value in json.loads(line).items() if not key.endswith(("_s", "_time", "_runtime"))}
            for line in (run / "log.jsonl").read_text().splitlines()
        ]
        for run in (whole, broken)
    )
    assert one == other
    assert len(one) == 4
    assert all(line["environment_steps"] == 2 * 2 * HORIZON for line in one)
    assert [line.get("imagination/rows", 0) > 0 for line in one] == [False, True, True, True]
    assert [line["prediction/weight_action"] for line in one] == pytest.approx([1.0, 5 / 6, 4 / 6, 0.5])
    for name in AGENTS:
        mine = load_file(whole / "adapters" / name / "adapter_model.safetensors")
        theirs = load_file(broken / "adapters" / name / "adapter_model.safetensors")
        assert all(bool((mine[key] == theirs[key]).all()) for key in mine)


def test_imagining_in_a_world_model_needs_one(starter: TransformersModel) -> None:
    team = team_on(starter)
    with pytest.raises(ConfigError, match="no world_model section"):
        make_imaginer(recipe_of(imagination={}), team, AGENTS, None)
    assert make_imaginer(recipe_of(), team, AGENTS, None) is None
    assert make_imaginer(recipe_of(imagination={}), team, AGENTS, Truth()) is not None


@pytest.mark.parametrize("settings", [settings_of(Context.TRANSCRIPT), AgentSettings(memory=2)])
def test_the_oracles_values_need_agents_without_a_memory(starter: TransformersModel, settings: AgentSettings) -> None:
    """Where games are played to the end from an imagined moment, turns that were only imagined are not remembered."""
    with pytest.raises(ConfigError, match=r"agent\.memory=0"):
        valued_oracle(team_on(starter, settings))
    assert valued_oracle(team_on(starter, AgentSettings())).value is OracleValue.ROLLOUT
