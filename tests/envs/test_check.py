"""`check_env` passes what keeps the protocol and names what does not."""

import itertools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from preconcert.core import EnvError, Observation, Slot, StepResult, TaskLanguage, View, ViewField
from preconcert.envs import Rendezvous, check_env, make_env, tasks
from tests.envs.playing import EXAMPLES

LARGER: dict[str, dict[str, Any]] = {
    "box-push": {"agents": 4}, "rendezvous": {"agents": 4}, "signal": {"agents": 4},
    "pursuit": {"agents": 4, "hands": 3, "evaders": 2, "walls": 3, "horizon": 32},
    "dilemma": {"rounds": 20, "history": 8}, "repeated-rps": {"rounds": 20, "history": 8},
    "kuhn": {"first": "agent_1"}, "matrix": {"game": "fxp-counterexample", "rounds": 5},
}  # fmt: skip

@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("larger", [False, True])
@pytest.mark.parametrize("task", sorted(tasks()))
def test_built_in_tasks_keep_the_protocol(task: str, larger: bool, split: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = LARGER[task] if larger else {}
        assert "snapshot and restore" in check_env(lambda seed: make_env(task, params, seed, split))


@pytest.mark.parametrize("task", ["lights_out:LightsOut", "mpe_spread:MpeSpread"])
def test_documented_examples_keep_the_protocol(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    assert check_env(lambda seed: make_env(task, {}, seed))


COUNT = itertools.count()


class Broken(Rendezvous):
    """A task whose results a test bends."""

    bend_view: Callable[[Observation], Observation] = staticmethod(lambda view: view)
    bend_result: Callable[[StepResult], StepResult] = staticmethod(lambda result: result)

    def _observe(self, agent: str) -> Observation:
        return self.bend_view(super()._observe(agent))

    def step(self, actions: Mapping[str, str]) -> StepResult:
        return self.bend_result(super().step(actions))


def viewed(*fields: ViewField) -> TaskLanguage:
    return TaskLanguage(("go",), view=View(fields))


def build(**members: Any) -> Callable[[int], Any]:
    kind = type("Bent", (Broken,), members)
    return lambda seed: kind({}, seed)


@pytest.mark.parametrize(
    ("bend", "finding"),
    [
        (lambda view: replace(view, text=""), "observation of 'agent_0' at step 0: text must be a non-empty str"),
        (lambda view: replace(view, agent="bob"), "belongs to 'bob'"),
        (lambda view: replace(view, step=7), "step is 7"),
        (lambda view: replace(view, fields={"row": "1"}), "fields lack the forecast slot 'col'"),
        (lambda view: replace(view, fields={"row": "99", "col": "1"}), "field 'row' = '99' is not in"),
        (lambda view: replace(view, legal_actions=()), "legal_actions must be a non-empty tuple"),
        (lambda view: replace(view, legal_actions=("fly",)), r"legal actions \['fly'\] are not in language.actions"),
        (lambda view: replace(view, legal_actions=("stay",)), "but env.legal_actions gives"),
        (lambda view: replace(view, sees=("bob",)), r"sees \['bob'\], not among the other agents"),
        (lambda view: view.text, "must be an Observation, not str"),
        (lambda view: replace(view, text=f"left {next(COUNT) % 7} {view.text[7:]}"), "start with different views"),
        (lambda view: replace(view, text=view.text + " on"), "language.view does not read .*: view: 'on' is left over"),
        (lambda view: replace(view, text=" " + view.text), "language.view writes 'left 8"),
    ],
)
def test_broken_views_are_named(bend: Callable[[Observation], Any], finding: str) -> None:
    with pytest.raises(EnvError, match=finding):
        check_env(build(bend_view=staticmethod(bend)))


@pytest.mark.parametrize(
    ("bend", "finding"),
    [
        (lambda result: None, "step must return a StepResult, not NoneType"),
        (lambda result: replace(result, rewards={}), "rewards must be a mapping by exactly"),
        (lambda result: replace(result, rewards=dict.fromkeys(result.rewards, "1")), "must be a finite float, not '1'"),
        (lambda result: replace(result, rewards=dict.fromkeys(result.rewards, 0.3)), "reward 0.3 of 'agent_0' has no"),
        (lambda result: replace(result, observations={}), "observations must be a mapping by exactly"),
        (lambda result: replace(result, done=False, success=None), "not over after horizon = 8 steps"),
        (lambda result: replace(result, truncated=True), "truncated but not done"),
        (lambda result: replace(result, success=1), "success must be bool or None, not 1"),
    ],
)
def test_broken_results_are_named(bend: Callable[[StepResult], Any], finding: str) -> None:
    with pytest.raises(EnvError, match=finding):
        check_env(build(bend_result=staticmethod(bend)))


@pytest.mark.parametrize(
    ("members", "finding"),
    [
        ({"state": lambda self: 3}, r"state\(\) must give a non-empty str, not 3"),
        ({"snapshot": lambda self: (lambda: None)}, "snapshot of type function cannot be pickled"),
        ({"snapshot": lambda self: None, "restore": lambda self, snapshot: None}, "restored from a kept snapshot"),
        ({"_check": lambda self, actions: None}, "illegal action 'no_such_action' of 'agent_0' raised KeyError"),
    ],
)
def test_broken_members_are_named(members: dict[str, Any], finding: str) -> None:
    with pytest.raises(EnvError, match=finding):
        check_env(build(**members))


@pytest.mark.parametrize(
    ("name", "value", "finding"),
    [
        ("agents", ("a", "a"), r"agents must be unique: \('a', 'a'\)"),
        ("agents", (), r"agents must be a non-empty tuple of names, not \(\)"),
        ("horizon", 0, "horizon must be a positive int, not 0"),
        ("language", "words", "language must be a TaskLanguage, not str"),
        ("language", TaskLanguage(("go on",)), "language.actions: 'go on' is not a word"),
        ("language", TaskLanguage(("go",), default_action="gone"), "default_action 'gone' is not one of"),
        ("language", TaskLanguage(("go",), rewards=("much",)), "language.rewards: 'much' is not a number"),
        ("language", TaskLanguage(("go",), (Slot("x", ("a",)), Slot("x", ("b",)))), "slot names must be unique"),
        ("language", TaskLanguage(("go",), view="left 3"), "language.view must be a View with fields or None"),
        ("language", viewed(ViewField("x", ("a",)), ViewField("x", ("b",))), "field names must be unique"),
        ("language", viewed(ViewField("x", ("a", "a"))), "language.view field 'x' must be unique"),
        ("language", viewed(ViewField("x", ("1", "2"), number=True)), "choices must be 0, 1, ... in order"),
        ("language", viewed(ViewField("x", ("a", "b"), places=(0.0,))), "1 places for 2 choices"),
        ("language", viewed(ViewField("x", ("a", "b"), places=(0.0, 2.0))), "places must be from 0 to 1"),
        ("language", viewed(ViewField("x", ("a",), "two  blanks")), "must be words with single spaces"),
    ],
)
def test_broken_attributes_are_named(name: str, value: Any, finding: str) -> None:
    def make(seed: int) -> Any:
        env = Rendezvous({}, seed)
        setattr(env, name, value)
        return env

    with pytest.raises(EnvError, match=finding):
        check_env(make)


def test_a_forecast_field_that_contradicts_the_text_is_named() -> None:
    def lie(view: Observation) -> Observation:
        return replace(view, fields={**view.fields, "row": "0" if view.fields["row"] != "0" else "1"})

    with pytest.raises(EnvError, match=r"row is '\d' in the text, but '\d' in fields"):
        check_env(build(bend_view=staticmethod(lie)))


def test_a_field_that_is_not_determined_is_named() -> None:
    def late(view: Observation) -> Observation:
        return replace(view, text=f"luck {view.fields['row'] if view.step > 3 else 0}")

    def make(seed: int) -> Any:
        env = build(bend_view=staticmethod(late))(seed)
        luck = ViewField("luck", tuple("01234"), "luck", number=True, determined=True)
        env.language = replace(env.language, view=View((luck,)))
        return env

    with pytest.raises(EnvError, match="field 'luck' claims to be determined, but after 'luck 0' of 'agent_0'"):
        check_env(make, range(60))


def test_missing_members_are_named() -> None:
    class Empty:
        agents = ("a",)

    with pytest.raises(EnvError, match="Empty has no 'horizon'"):
        check_env(lambda seed: Empty())  # type: ignore[arg-type, return-value] # the mistake that is tested


def test_equal_seeds_are_a_warning() -> None:
    with pytest.warns(UserWarning, match="all start with the same views"):
        check_env(lambda seed: make_env("rendezvous", {}, 3))


def test_a_declared_game_without_chance_may_start_the_same() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(lambda seed: make_env("dilemma", {}, seed))


def test_global_random_state_is_watched() -> None:
    def draw(view: Observation) -> Observation:
        np.random.random()  # noqa: NPY002 - the mistake that is tested
        return view

    with pytest.raises(EnvError, match="global random state"):
        check_env(build(bend_view=staticmethod(draw)))
