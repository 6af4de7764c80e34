"""Every built-in task: the same again from its seed, in words that are known, refusing misuse.

Those with a success are solvable and imperfectly taught; those with messages are unsolvable without them.
"""

import pickle
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from preconcert.core import ConfigError, EnvError, Player, UnknownNameError
from preconcert.envs import BoxPush, Rendezvous, Signal, Task, Variety, make_env, split_of, tasks
from preconcert.envs.signal import unique_words
from tests.envs.playing import play, success

TASKS = sorted(tasks())
SPLITS = ("train", "heldout")
# The share of solved instances that each imperfect teacher is tuned to.
TAUGHT = {
    "box-push": (0.40, 0.62), "matrix": (0.33, 0.50), "pursuit": (0.35, 0.55), "rendezvous": (0.28, 0.50),
    "signal": (0.33, 0.50),
}  # fmt: skip
JUDGED = sorted(TAUGHT)
"""The tasks whose episodes have a success, at the default parameters."""
TALKING = [task for task in TASKS if make_env(task, {}, 0).language.message]
SIZED = [task for task in TASKS if "agents" in tasks()[task].Params.model_fields]
"""The tasks for any number of agents."""
VARIETY = {
    "box-push": Variety.LAYOUTS, "dilemma": Variety.NOTHING, "kuhn": Variety.CHANCE, "matrix": Variety.NOTHING,
    "pursuit": Variety.LAYOUTS, "rendezvous": Variety.LAYOUTS, "repeated-rps": Variety.NOTHING,
    "signal": Variety.LAYOUTS,
}  # fmt: skip


def instance(task: str, seed: int = 0, split: str = "train", **params: Any) -> Any:
    return make_env(task, params, seed, split)


def global_state() -> str:
    return repr((random.getstate(), np.random.get_state(legacy=True)))  # noqa: NPY002 - watched, not used


def test_what_every_task_is() -> None:
    """Said here once more, so that no task slips out of the tests below by a mistake in its attributes."""
    assert {task: tasks()[task].variety for task in TASKS} == VARIETY
    assert TALKING == SIZED == ["box-push", "pursuit", "rendezvous", "signal"]


@pytest.mark.parametrize("task", TASKS)
def test_success_is_judged_or_never_there(task: str) -> None:
    for kind in ("expert", "scripted", "random"):
        for seed in range(10):
            assert (play(instance(task, seed), task, kind, seed).success is not None) == (task in JUDGED)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", JUDGED)
def test_expert_always_succeeds(task: str, split: str) -> None:
    assert success(task, {}, "expert", split, 200) == 1.0


@pytest.mark.parametrize("agents", [3, 5])
@pytest.mark.parametrize("task", SIZED)
def test_expert_succeeds_in_larger_teams(task: str, agents: int) -> None:
    assert success(task, {"agents": agents}, "expert", "train", 50) == 1.0


@pytest.mark.parametrize(
    ("task", "params"),
    [
        ("box-push", {"size": 8, "push": 3, "walls": 6, "horizon": 24}),
        ("box-push", {"size": 5, "view": 1, "walls": 0}),
        ("pursuit", {"size": 9, "evaders": 2, "walls": 4, "horizon": 30}),
        ("pursuit", {"size": 5, "view": 1, "reach": 0}),
        ("pursuit", {"novel": True}),
        ("rendezvous", {"size": 7, "landmarks": 6, "horizon": 14}),
        ("rendezvous", {"size": 3, "landmarks": 2, "horizon": 4}),
        ("signal", {"candidates": 6, "rounds": 4, "colours": 6, "shapes": 6}),
        ("signal", {"candidates": 2, "rounds": 1}),
    ],
)
def test_expert_succeeds_at_other_sizes(task: str, params: dict[str, int]) -> None:
    assert success(task, params, "expert", "heldout", 40) == 1.0


@pytest.mark.parametrize("task", JUDGED)
def test_scripted_team_leaves_room_to_learn(task: str) -> None:
    low, high = TAUGHT[task]
    assert low <= success(task, {}, "scripted", "train", 500) <= high


@pytest.mark.parametrize("task", TALKING)
def test_scripted_team_needs_its_messages(task: str) -> None:
    ceiling = tasks()[task].no_message_ceiling(instance(task).params) or 0.1
    assert success(task, {}, "scripted", "train", 300, talk=False) <= ceiling + 0.05


@pytest.mark.parametrize("task", TALKING)
def test_random_team_fails(task: str) -> None:
    assert success(task, {}, "random", "train", 200) < 0.12


def test_ceilings() -> None:
    assert Rendezvous.no_message_ceiling(instance("rendezvous", landmarks=4).params) == 0.25
    assert Signal.no_message_ceiling(instance("signal", candidates=4, rounds=2).params) == 1 / 16
    assert BoxPush.no_message_ceiling(instance("box-push").params) is None
    for task in set(TASKS) - set(TALKING):
        assert tasks()[task].no_message_ceiling(instance(task).params) is None


@pytest.mark.parametrize("task", [task for task in TASKS if VARIETY[task] is Variety.LAYOUTS])
def test_splits_share_no_layout(task: str) -> None:
    train, held_out = ({instance(task, seed, split).layout_key() for seed in range(150)} for split in SPLITS)
    assert not train & held_out
    assert len(train) > 75
    assert len(held_out) > 40


@pytest.mark.parametrize("task", [task for task in TASKS if VARIETY[task] is Variety.CHANCE])
def test_splits_of_a_game_of_chance_share_all_that_chance_can_draw(task: str) -> None:
    drawn = {split: [instance(task, seed, split).layout_key() for seed in range(300)] for split in SPLITS}
    assert set(drawn["train"]) == set(drawn["heldout"])
    assert drawn["train"] != drawn["heldout"]
    counts = Counter(drawn["train"])
    assert max(counts.values()) < 2.5 * min(counts.values())


@pytest.mark.parametrize("task", [task for task in TASKS if VARIETY[task] is Variety.NOTHING])
def test_a_game_without_chance_is_the_same_for_every_seed(task: str) -> None:
    assert len({(instance(task, seed, split).state(), str(instance(task, seed, split).reset()))
                for seed in range(20) for split in SPLITS}) == 1  # fmt: skip


def test_held_out_signal_rounds_are_new_one_by_one() -> None:
    for seed in range(30):
        for split in SPLITS:
            assert {split_of(key) for key in instance("signal", seed, split).layout_key().split(" then ")} == {split}


@pytest.mark.parametrize("task", TASKS)
def test_instance_follows_from_its_seed_alone(task: str) -> None:
    before = global_state()
    one, again = instance(task, 5), instance(task, 5)
    assert (one.state(), one.reset(), one.board()) == (again.state(), again.reset(), again.board())
    assert play(instance(task, 5), task, "scripted", 1) == play(instance(task, 5), task, "scripted", 1)
    assert before == global_state()
    different = {Variety.LAYOUTS: 16, Variety.CHANCE: 8, Variety.NOTHING: 1}[VARIETY[task]]
    assert len({instance(task, seed).state() for seed in range(20)}) >= different


@pytest.mark.parametrize("task", TASKS)
def test_words_are_closed_and_texts_short(task: str) -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        env = instance(task, seed, **({"agents": 3} if task in SIZED else {}))
        views = env.reset()
        lengths = {agent: len(view.text.split()) for agent, view in views.items()}
        assert max(lengths.values()) <= 25
        for _ in range(env.horizon):
            result = env.step({agent: str(rng.choice(view.legal_actions)) for agent, view in views.items()})
            views = result.observations
            for agent, view in views.items():
                words = view.text.split(" ")
                assert len(words) == lengths[agent]
                assert set(words) <= set(env.words)
                assert all(word.replace("_", "").isalnum() and word == word.lower() for word in words)
            assert set(env.state().split(" ")) <= set(env.words)
            assert env.board()
            if result.done:
                break


@pytest.mark.parametrize("task", TASKS)
def test_snapshot_of_an_instance_restores_another_of_the_same_seed(task: str) -> None:
    one, other = instance(task, 3), instance(task, 3)
    start = pickle.dumps(one.snapshot())
    one.reset()
    one.step({agent: one.legal_actions(agent)[0] for agent in one.agents})
    other.restore(one.snapshot())
    assert (other.state(), other.board()) == (one.state(), one.board())
    other.restore(pickle.loads(start))
    assert other.reset()
    strangers = [other for other in (instance(task, seed) for seed in range(4, 9))
                 if other.layout_key() != one.layout_key()]
    assert bool(strangers) == (VARIETY[task] is not Variety.NOTHING)
    for stranger in strangers:
        with pytest.raises(EnvError, match="snapshot of"):
            stranger.restore(one.snapshot())


@pytest.mark.parametrize("task", TASKS)
def test_misuse_is_refused_in_one_clear_line(task: str) -> None:
    env = instance(task)
    with pytest.raises(EnvError, match="before reset"):
        env.step({})
    env.reset()
    with pytest.raises(EnvError, match="second time"):
        env.reset()
    legal = {agent: env.legal_actions(agent)[0] for agent in env.agents}
    with pytest.raises(EnvError, match="no action for 'agent_1' at step 0"):
        env.step({"agent_0": legal["agent_0"]})
    with pytest.raises(EnvError, match="unknown agent 'agnt_1'; did you mean 'agent_1'"):
        env.step({**legal, "agnt_1": "stay"})
    with pytest.raises(EnvError, match="illegal action 'fly' of 'agent_0' at step 0"):
        env.step({**legal, "agent_0": "fly"})
    assert env.step(legal).observations["agent_0"].step == 1


@pytest.mark.parametrize("task", TASKS)
def test_players_by_name(task: str) -> None:
    kinds = ("expert", "scripted", "random", *tasks()[task].opponents)
    assert all(isinstance(tasks()[task].player(kind), Player) for kind in kinds)
    with pytest.raises(UnknownNameError, match="unknown player 'exprt'; did you mean 'expert'"):
        tasks()[task].player("exprt")


@pytest.mark.parametrize("task", TASKS)
def test_parameters_are_documented_and_checked(task: str) -> None:
    params: type[BaseModel] = tasks()[task].Params
    assert all(field.description for field in params.model_fields.values())
    name = next(iter(params.model_fields))
    misspelt = name[:-2] + name[-1]
    with pytest.raises(ConfigError, match=rf"{task}: unknown parameter '{misspelt}' = 3; did you mean '{name}'"):
        make_env(task, {misspelt: 3}, 0)
    bounded = "agents" if task in SIZED else "rounds"
    if bounded in params.model_fields:
        with pytest.raises(ConfigError, match=rf"{task}: parameter '{bounded}' = 99: .*less than or equal to \d+"):
            make_env(task, {bounded: 99}, 0)
    with pytest.raises(UnknownNameError, match="unknown split 'test'"):
        make_env(task, {}, 0, "test")
    with pytest.raises(ConfigError, match="seed = -1"):
        make_env(task, {}, -1)


def test_impossible_layout_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"box-push: no train layout"):
        make_env("box-push", {"size": 4, "push": 2}, 0)


def test_rendezvous_tells_only_one_agent_and_only_at_the_end() -> None:
    for seed in range(20):
        env = instance("rendezvous", seed, agents=4)
        views = env.reset()
        assert Counter("open unknown" in view.text for view in views.values()) == {True: 3, False: 1}
        assert all(view.sees == () for view in views.values())
        for step in range(env.horizon):
            result = env.step(dict.fromkeys(env.agents, "stay"))
            assert result.done == (step + 1 == env.horizon)
            assert result.done or set(result.rewards.values()) == {0.0}


def test_rendezvous_pays_when_all_stand_on_the_open_landmark() -> None:
    env = instance("rendezvous", 1)
    env.reset()
    where = env.snapshot()
    env.restore(replace(where, step=env.horizon - 1, state=(env.open_cell, env.open_cell)))
    result = env.step(dict.fromkeys(env.agents, "stay"))
    assert (result.success, result.truncated, dict(result.rewards)) == (True, False, {"agent_0": 1.0, "agent_1": 1.0})
    assert result.observations["agent_0"].text.startswith("left 0 ")
    assert "here" in result.observations["agent_0"].text


def test_signal_target_does_not_show_in_the_candidates() -> None:
    for seed in range(100):
        for this in instance("signal", seed, agents=3).rounds:
            unique = [len(unique_words(thing, this.things)) for thing in this.things]
            assert min(unique) >= 1
            assert unique.count(1) >= 2
            assert this.target in this.things
            assert all(sorted(order) == sorted(this.things) for order in this.orders)
    places = Counter(
        this.orders[0].index(this.target) for seed in range(400) for this in instance("signal", seed).rounds
    )
    assert max(places.values()) < 1.25 * min(places.values())


def test_signal_listeners_pick_one_step_after_the_speaker_saw_the_target() -> None:
    env = instance("signal", 2)
    views = env.reset()
    target = views["agent_0"].text.split()[5:7]
    assert views["agent_1"].legal_actions == ("wait",)
    listener = env.step(dict.fromkeys(env.agents, "wait")).observations["agent_1"]
    words = listener.text.split()
    right = next(words[at] for at in range(4, len(words), 3) if words[at + 1 : at + 3] == target)
    result = env.step({"agent_0": "wait", "agent_1": right})
    assert result.rewards == {"agent_0": 0.5, "agent_1": 0.5}
    assert result.observations["agent_1"].fields == {"last": "right"}


def test_box_moves_for_two_agents_together_only() -> None:
    env = instance("box-push", 0, walls=0, agents=3)
    env.reset()
    box, (down, right) = env.box, {"north": (-1, 0), "south": (1, 0), "east": (0, 1), "west": (0, -1)}[env.direction]
    behind, corner = (box[0] - down, box[1] - right), (0, 0)
    ready = replace(env.snapshot(), state=replace(env.snapshot().state, agents=(behind, behind, corner)))

    env.restore(ready)
    env.step({"agent_0": env.direction, "agent_1": "stay", "agent_2": "stay"})
    assert (env.box, env.cell_of("agent_0")) == (box, behind)

    env.restore(ready)
    first = env.step({"agent_0": env.direction, "agent_1": env.direction, "agent_2": "stay"})
    assert (env.box, env.cell_of("agent_0"), first.done) == ((box[0] + down, box[1] + right), box, False)
    assert first.observations["agent_0"].sees[:1] == ("agent_1",)
    last = env.step({"agent_0": env.direction, "agent_1": env.direction, "agent_2": "stay"})
    assert (last.done, last.success, last.truncated, last.rewards["agent_2"]) == (True, True, False, 1.0)

    ahead = (box[0] + down, box[1] + right)
    env.restore(replace(ready, state=replace(ready.state, agents=(behind, behind, ahead))))
    env.step({"agent_0": env.direction, "agent_1": env.direction, "agent_2": "stay"})
    assert env.box == box


def test_box_push_sees_no_further_than_its_view() -> None:
    env = instance("box-push", 0, walls=0)
    env.reset()
    row, column = env.box
    before = env.snapshot()
    env.restore(replace(before, state=replace(before.state, agents=((row - 2, column - 2), (row + 2, column + 2)))))
    views = env.step(dict.fromkeys(env.agents, "stay")).observations
    assert "box s2 e2 mate far far" in views["agent_0"].text
    assert views["agent_0"].sees == ()
    env.restore(replace(before, state=replace(before.state, agents=((0, 0), (0, 1)))))
    views = env.step(dict.fromkeys(env.agents, "stay")).observations
    assert "mate v0 e1 walls wall free free wall" in views["agent_0"].text
    assert views["agent_0"].sees == ("agent_1",)


def test_box_push_horizon_cuts_off() -> None:
    env = instance("box-push", 0)
    env.reset()
    results = [env.step(dict.fromkeys(env.agents, "stay")) for _ in range(env.horizon)]
    assert (results[-1].done, results[-1].success, results[-1].truncated) == (True, False, True)
    assert issubclass(type(env), Task)


def test_box_push_agents_read_what_they_tried_last() -> None:
    env = instance("box-push", 0)
    words = {agent: seen.text.split() for agent, seen in env.reset().items()}
    assert all(text[2:4] == ["did", "stay"] for text in words.values())
    after = env.step({"agent_0": "north", "agent_1": "west"}).observations
    assert [after[agent].text.split()[2:4] for agent in env.agents] == [["did", "north"], ["did", "west"]]
