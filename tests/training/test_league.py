"""Leagues: settings, populations, casts, and runs that are taken up again where they were."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from preconcert.agents import AgentSettings
from preconcert.core import ConfigError, UnknownNameError, load_episodes
from preconcert.envs import make_env
from preconcert.experiments.crossplay import entrants_of
from preconcert.prompts import SpanSettings
from preconcert.training.league import LeagueMode, LeagueSettings, Member, Population, evicted, learners_of
from preconcert.training.matchmaking import Sampler
from preconcert.training.recipe import Adapters, Recipe
from preconcert.training.run import make_league, train
from preconcert.training.run_folder import assign, load_model
from tests.training.teams import recipe_of

TIMES = ("_s", "_time", "_runtime", "_per_second")


def recipe(iterations: int = 5, **league: Any) -> Recipe:
    """Kuhn poker with a league; small, but every part of it happens."""
    small = recipe_of(
        iterations=iterations, seeds=12, group=2, minibatches=2, checkpoint_every=2, lr=0.02, entropy=0.1,
        entropy_end=0.02, policy_spans=("act",), credit={"type": "loo"},
    )  # fmt: skip
    wanted = {"mode": "crossplay", "every": 1, "size": 2, "scripts": ["honest"], "sampler": "rating", **league}
    return Recipe(
        task="kuhn",
        starter=small.starter,
        lora=small.lora,
        warm_start=small.warm_start,
        gate=small.gate,
        grpo=small.grpo,
        seed=small.seed,
        agent=AgentSettings(spans=SpanSettings(intend=False, foresee=False, say=False)),
        league=LeagueSettings(**wanted),
    )


# ---- settings


def test_a_league_has_one_main_adapter() -> None:
    assert recipe().adapters is Adapters.SHARED
    content = json.loads(recipe().model_dump_json())
    for change, finding in (
        ({"adapters": "per_agent"}, "adapters=shared"),
        ({"adapters": {"agent_0": "x", "agent_1": "y"}}, "adapters=shared"),
        ({"frozen": ["team"]}, "frozen must be empty"),
        ({"grpo": {**content["grpo"], "rewards": {"mode": "joint"}}}, "rewards.mode=individual"),
        ({"grpo": {**content["grpo"], "credit": "agent-turn"}}, "branches"),
    ):
        with pytest.raises(ValidationError, match=finding):
            Recipe(**{**content, **change})
    one = Recipe(**{**content, "adapters": {"agent_0": "x", "agent_1": "x"}})
    assert learners_of(one.league or LeagueSettings(), "x") == ("x", "counter")
    with pytest.raises(ConfigError, match="another name"):
        learners_of(LeagueSettings(), "counter")


def test_sides() -> None:
    agents = ("a", "b", "c", "d")
    assert LeagueSettings().sides_of(agents) == (("a",), ("b",), ("c",), ("d",))
    assert LeagueSettings(sides=(("a", "c"), ("b", "d"))).sides_of(agents) == (("a", "c"), ("b", "d"))
    with pytest.raises(UnknownNameError, match="agent 'e'"):
        LeagueSettings(sides=(("a", "e"), ("b",))).sides_of(agents)
    with pytest.raises(ConfigError, match="'d' is on no side"):
        LeagueSettings(sides=(("a", "c"), ("b",))).sides_of(agents)
    for sides, finding in (
        ((("a",), ("a",)), "two sides"),
        ((("a",),), "at least two"),
        ((("a",), ()), "none of them"),
    ):
        with pytest.raises(ValidationError, match=finding):
            LeagueSettings(sides=sides)
    with pytest.raises(ValidationError, match="meets nobody else"):
        LeagueSettings(mode=LeagueMode.SELFPLAY, scripts=("honest",))


# ---- population


def test_what_is_left_is_spread_over_the_run() -> None:
    assert [evicted(each) for each in ([0, 5], [0, 5, 10], [0, 5, 10, 20], [0, 10, 15, 20])] == [0, 1, 1, 2]
    population = Population(LeagueSettings(size=4))
    for iteration in range(0, 100, 5):
        population.add(Member("team", iteration))
    kept = [member.iteration for member in population.members]
    assert len(kept) == 4
    assert (kept[0], kept[-1]) == (0, 95)
    assert max(b - a for a, b in zip(kept, kept[1:], strict=False)) <= 50


def test_names_of_members() -> None:
    assert Member.parse("team@12") == Member("team", 12)
    assert Member("team", 12).name == "team@12"
    with pytest.raises(ConfigError, match="'team' is not the name of a snapshot"):
        Member.parse("team")


@pytest.mark.parametrize(
    ("mode", "main", "counter"),
    [
        ("selfplay", [], []),
        ("past", ["team@0", "team@5", "counter@5", "script:honest"], []),
        ("crossplay", ["team@0", "team@5", "counter@5", "script:honest"], ["team@0", "team@5"]),
    ],
)
def test_who_meets_whom(mode: str, main: list[str], counter: list[str]) -> None:
    settings = LeagueSettings(mode=LeagueMode(mode), scripts=() if mode == "selfplay" else ("honest",))
    population = Population(settings, [Member("team", 0), Member("team", 5), Member("counter", 5)])
    assert population.opponents("team") == main
    if mode == "crossplay":
        assert population.opponents("counter") == counter


def test_ratings_change_who_is_met() -> None:
    settings = LeagueSettings(sampler=Sampler.RATING, floor=0.0, sharpness=1.0, decay=0.0)
    population = Population(settings, [Member("team", 0), Member("team", 5)])
    assert population.chances("team") == {"team@0": 0.5, "team@5": 0.5}
    population.record({("team", "team@0"): [1.0, 1.0, 0.5, 0.5], ("team", "team@5"): [0.0, 0.5]})
    assert population.ratings == {"team": {"team@0": 0.75, "team@5": 0.25}}
    assert population.chances("team") == {"team@0": 0.25, "team@5": 0.75}
    again = Population(settings)
    again.load_state_dict(json.loads(json.dumps(population.state_dict())))
    assert again == population


def test_casts(tmp_path: Path) -> None:
    """Shares of self-play, of counters, of sides and of opponents are those that were asked for."""
    wanted = recipe(selfplay=0.25, counters=0.5, sampler="uniform")
    env = make_env("kuhn", {}, 0)
    train(wanted.model_copy(update={"grpo": wanted.grpo.model_copy(update={"iterations": 0})}), tmp_path / "run")
    model = load_model(wanted, tmp_path / "run", tmp_path / "run" / "warm")
    from preconcert.agents import GenerativeTeam

    team = GenerativeTeam(model, env.language, wanted.agent, assign(wanted, env))
    league = make_league(wanted, tmp_path / "run", model, env, team)
    assert league.learners == ("team", "counter")
    assert league.prepare(0) == ()
    assert [member.name for member in league.population.members] == ["team@0"]
    assert league.prepare(1) == ("counter",)
    assert [member.name for member in league.population.members] == ["team@0", "team@1", "counter@1"]
    casts = [league.cast(1, number) for number in range(4000)]
    assert casts == [league.cast(1, number) for number in range(4000)]
    assert casts != [league.cast(2, number) for number in range(4000)]
    counted = Counter(tuple(cast.items()) for cast in casts)
    assert 0.1 < counted[()] / 4000 < 0.15
    mains = {k: n for k, n in counted.items() if k and ("team" in dict(k).values())}
    counters = {k: n for k, n in counted.items() if k and ("counter" in dict(k).values())}
    assert {other for k in mains for other in dict(k).values()} == {
        "team", "team@0", "team@1", "counter@1", "script:honest",
    }  # fmt: skip
    assert {other for k in counters for other in dict(k).values()} == {"counter", "team@0", "team@1"}
    assert 0.45 < sum(counters.values()) / 4000 < 0.55
    assert all(0.03 < count / 4000 < 0.17 for count in counted.values())
    assert all(tuple(dict(k)) == env.agents for k in [*mains, *counters])
    assert not any(p.requires_grad for p in model.adapter_parameters("team@0").values())


def test_unknown_scripts_are_refused(tmp_path: Path) -> None:
    wanted = recipe(scripts=["honst"])
    with pytest.raises(UnknownNameError, match="unknown player 'honst'; did you mean 'honest'"):
        train(wanted, tmp_path / "run")


# ---- whole runs


class Stop(Exception):
    """Ends a run in the middle."""


class Stopper:
    """A reporter that raises when reinforcement learning has got so far."""

    def __init__(self, at: int) -> None:
        self.at, self.now = at, ""

    def stage(self, name: str, total: int) -> None:
        """Remembered."""
        self.now = name

    def advance(self, done: int, note: str = "") -> None:
        """The moment, if it is this one."""
        if self.now == "reinforcement learning" and done == self.at:
            raise Stop

    def say(self, text: str) -> None:
        """Ignored."""


def log_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in lines]


def weights(folder: Path) -> dict[str, Any]:
    return {path.name: load_file(path / "adapter_model.safetensors") for path in sorted(folder.iterdir())}


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert all(bool((tensors[key] == other[name][key]).all()) for key in tensors), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    return train(recipe(), tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_keeps_its_past(whole: Path) -> None:
    state = json.loads((whole / "checkpoints" / "checkpoint-10" / "source.json").read_text())["league"]
    assert state["iteration"] == 4
    kept = weights(whole / "league")
    assert set(state["members"]) <= kept.keys()
    assert len([name for name in state["members"] if name.startswith("team@")]) == 2
    assert_equal({"team@0": kept["team@0"]}, {"team@0": weights(whole / "warm")["team"]})
    trained = weights(whole / "adapters")
    assert sorted(trained) == ["counter", "team"]
    for name in trained:
        warm = weights(whole / "warm")[name]
        assert any(bool((warm[key] != trained[name][key]).any()) for key in warm)
    assert not list(whole.glob("checkpoints/*/*@*")), "checkpoints hold the learners alone"


def test_the_entropy_bonus_moves_evenly(whole: Path) -> None:
    found = [line["entropy_coef"] for line in log_of(whole)]
    assert found == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])
    with pytest.raises(ValidationError, match=r"needs a grpo\.entropy"):
        Recipe(task="kuhn", grpo={"entropy_end": 0.1})  # type: ignore[arg-type]


def test_who_played_is_on_record(whole: Path) -> None:
    played = load_episodes(whole / "episodes.jsonl").episodes
    seen: set[tuple[str | None, int]] = set()
    for episode in played:
        for trajectory in episode.trajectories.values():
            (player,) = {turn.adapter for turn in trajectory.turns}
            seen.add((player, trajectory.policy_version))
            assert player is not None
            if "@" in player:
                assert trajectory.policy_version == Member.parse(player).iteration <= episode.iteration
            elif player.startswith("script:"):
                assert trajectory.policy_version == -1
            else:
                assert trajectory.policy_version == episode.iteration
    players = {player for player, _ in seen}
    assert {"team", "counter", "team@0", "script:honest"} <= players
    assert any(player is not None and player.startswith("counter@") for player in players)
    groups: dict[str, set[Any]] = {}
    for episode in played:
        cast = tuple(trajectory.turns[0].adapter for trajectory in episode.trajectories.values())
        groups.setdefault(f"{episode.iteration} {episode.group}", set()).add(cast)
    assert all(len(casts) == 1 for casts in groups.values())


def test_a_counter_begins_again(whole: Path) -> None:
    """With a snapshot every iteration, what it learned is what one iteration teaches."""
    assert all(line["score/counter"] >= 0 for line in log_of(whole))
    assert any("lowest_rating/team" in line for line in log_of(whole))


@pytest.mark.parametrize("at", [1, 3])
def test_a_run_taken_up_again_is_the_same(whole: Path, tmp_path: Path, at: int) -> None:
    """Before the first checkpoint, and between two of them, when later snapshots have been taken already."""
    out = tmp_path / "run"
    with pytest.raises(Stop):
        train(recipe(), out, reporter=Stopper(at))
    assert (out / "league" / f"team@{at - 1}").is_dir()
    (out / "league" / ".team@9-half-written").mkdir()
    train(recipe(), out, resume=True)
    assert not [folder for folder in (out / "league").iterdir() if folder.name.startswith(".")]
    entrants = entrants_of(out, 0)
    (out / "league" / ".team@9-half-written").mkdir()
    assert entrants_of(out, 0) == entrants
    (out / "league" / ".team@9-half-written").rmdir()
    assert log_of(out) == log_of(whole)
    for folder in ("adapters", "league"):
        assert_equal(weights(out / folder), weights(whole / folder))
    states = [json.loads((run / "checkpoints" / "checkpoint-10" / "source.json").read_text()) for run in (out, whole)]
    assert states[0] == states[1]


def test_plain_self_play_has_a_past_that_nobody_meets(tmp_path: Path) -> None:
    out = train(recipe(2, mode="selfplay", scripts=[]), tmp_path / "run")
    assert sorted(path.name for path in (out / "league").iterdir()) == ["team@0", "team@1"]
    played = load_episodes(out / "episodes.jsonl").episodes
    assert {turn.adapter for e in played for t in e.trajectories.values() for turn in t.turns} == {"team"}
    assert sorted(path.name for path in (out / "adapters").iterdir()) == ["team"]
