"""Views of the built-in tasks: they read every text, and what they call determined is."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from preconcert.core import Observation
from preconcert.envs import make_env, tasks
from preconcert.envs.box_push import _State
from preconcert.envs.check_view import Seen, check_determined
from preconcert.envs.grid_view import offset_fields

PARAMS: dict[str, list[dict[str, Any]]] = {
    "rendezvous": [{}, {"agents": 4, "landmarks": 5}, {"size": 12, "horizon": 64}, {"size": 2, "landmarks": 2}],
    "box-push": [
        {}, {"agents": 4}, {"size": 12, "horizon": 64, "view": 4, "push": 3}, {"walls": 0, "view": 1},
        {"walls": 0, "size": 5, "push": 1},
    ],
    "pursuit": [
        {}, {"agents": 3, "evaders": 2, "walls": 6, "horizon": 32}, {"size": 12, "horizon": 64, "view": 4},
        {"size": 5, "view": 1, "reach": 0}, {"novel": True},
    ],
}  # fmt: skip
WITHOUT = {"signal", "dilemma", "kuhn", "matrix", "repeated-rps"}
"""Tasks whose agents read texts of different forms, or next to nothing."""
# From what, besides the actions, each determined field follows; the fewer, the more moments are compared.
BASIS: dict[str, dict[str, set[str]]] = {
    "rendezvous": {"left": {"left"}, "row": {"row"}, "col": {"col"}, "open": {"open"}},
    "box-push": {
        "left": {"left"}, "did": set(), "goal": {"goal"},
        **{cell: {"row", "col", "box_down", "box_right", "mate_down", "mate_right"} for cell in ("row", "col")},
    },
    "pursuit": {
        "left": {"left"}, "did": set(),
        **{cell: {cell, "wall_north", "wall_east", "wall_south", "wall_west"} for cell in ("row", "col")},
    },
}  # fmt: skip
CASES = [(task, params) for task, several in PARAMS.items() for params in several]
Step = tuple[Mapping[str, Observation], Mapping[str, str], Mapping[str, Observation]]


def steps(task: str, params: Mapping[str, Any], seed: int, split: str) -> Iterator[Step]:
    """One episode, half at random and half by the script, so that rare things happen too."""
    env, rng = make_env(task, params, seed, split), np.random.default_rng(seed)
    script = tasks()[task].player("scripted")
    views = env.reset()
    for _ in range(env.horizon):
        scripted = rng.random() < 0.5
        actions = {
            agent: script.decide(env, view, (), rng).action if scripted else str(rng.choice(view.legal_actions))
            for agent, view in views.items()
        }
        result = env.step(actions)
        yield views, actions, result.observations
        views = result.observations
        if result.done:
            return


def test_which_tasks_have_a_view() -> None:
    assert {task for task in tasks() if make_env(task, {}, 0).language.view is None} == WITHOUT
    assert set(PARAMS) == set(tasks()) - WITHOUT


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize(("task", "params"), CASES)
def test_views_read_every_text_and_are_determined_where_they_say_so(
    task: str, params: Mapping[str, Any], split: str
) -> None:
    seen: Seen = {}
    env = make_env(task, params, 0, split)
    view = env.language.view
    assert view is not None
    assert {word for field in view.fields for word in field.choices} <= set(env.words)
    fields = {field.name: field for field in view.fields}
    assert all(fields[slot.name].choices == slot.choices for slot in env.language.forecast)
    follows: dict[tuple[Any, ...], str] = {}
    compared = 0
    for seed in range(2 + 240 // env.horizon):
        for before, actions, after in steps(task, params, seed, split):
            for observation in (*before.values(), *after.values()):
                values = view.parse(observation.text)
                assert view.render(values) == observation.text
                told = {field.name: value for field, value in zip(view.fields, values, strict=True)}
                assert {**told, **observation.fields} == told
            check_determined(env.language, [(before, actions, after)], seen)
            for agent, observation in before.items():
                now = dict(zip(fields, view.parse(observation.text), strict=True))
                then = dict(zip(fields, view.parse(after[agent].text), strict=True))
                for name in (name for name, field in fields.items() if field.determined):
                    basis = tuple(value for field, value in now.items() if field in BASIS[task][name])
                    key = (name, agent, basis, tuple(actions.items()))
                    compared += key in follows
                    assert follows.setdefault(key, then[name]) == then[name], (key, then[name])
    assert compared > 200


def test_what_is_determined_by_task() -> None:
    def names(task: str, **params: Any) -> list[str]:
        return [field.name for field in make_env(task, params, 0).language.view.fields if field.determined]

    assert names("rendezvous") == ["left", "row", "col", "open"]
    assert names("pursuit") == names("pursuit", walls=3) == ["left", "did", "row", "col"]
    assert names("box-push") == ["left", "did", "goal"]
    assert names("box-push", walls=0) == ["left", "did", "row", "col", "goal"]
    assert names("box-push", walls=0, agents=3) == ["left", "did", "goal"]


def test_a_wall_beyond_the_box_decides_about_a_push_unseen() -> None:
    """Why the next cell in box-push is not called determined."""
    outcomes: dict[str, set[str]] = {}
    for seed in range(20):
        env: Any = make_env("box-push", {"horizon": 40}, seed)
        env.reset()
        for box in ((row, column) for row in range(1, 5) for column in range(1, 5)):
            behind = (box[0] + 1, box[1])
            if {box, behind} & env.walls or env.goal == (box[0] - 1, box[1]):
                continue
            mark = env.snapshot()
            env._state = _State((behind, behind), box, ("stay", "stay"))
            before = env._observe("agent_0").text
            env._phase = type(env._phase).RUNNING
            after = env.step({"agent_0": "north", "agent_1": "north"}).observations["agent_0"]
            outcomes.setdefault(before, set()).add(after.fields["row"])
            env.restore(mark)
    assert max(map(len, outcomes.values())) == 2


def test_offsets_out_of_view_are_never_a_small_error() -> None:
    for view in (1, 2, 4):
        for field in offset_fields("box", view):
            seen = field.choices[:-1]
            assert len(seen) == 2 * view + 1
            widest = field.error(seen[0], seen[-1])
            assert all(widest <= field.error(word, "far") <= 1.0 for word in seen)
            assert field.error(seen[0], seen[1]) == pytest.approx(widest / (2 * view) ** 2)
