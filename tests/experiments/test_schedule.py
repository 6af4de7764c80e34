"""Cells in processes of their own: what is kept, what is done again, and what is said of those that fail."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from preconcert.core import ConfigError, UnknownNameError
from preconcert.experiments.cell import FOUND, carry_out, write_spec
from preconcert.experiments.experiment import Experiment, ExperimentArm, ExperimentTask, Plan, Scale, cells_of, resolve
from preconcert.experiments.page import Result, carry_out_experiment
from preconcert.experiments.registry import EXPERIMENTS, experiment_named
from preconcert.experiments.schedule import Running, run_cells
from tests.experiments.quick_work import report

ROOT = Path(__file__).parents[2]
WORK = "tests.experiments.quick_work:work"
TASK = ExperimentTask("meet", {"task": "rendezvous", "params": {"size": 3, "landmarks": 2}})


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # cells import their work from there


def experiment(*epochs: int, seeds: int = 1) -> Experiment:
    arms = tuple(ExperimentArm(f"e{number}", f"{number} epochs", {"grpo.epochs": number}) for number in epochs)
    return Experiment("quick", "Is it quick?", {Scale.SMOKE: Plan(arms, (TASK,), seeds)}, WORK, report)


def calls(out: Path) -> dict[str, int]:
    found = out.glob("cells/*/calls.txt")
    return {path.parent.name.split("-")[1]: len(path.read_text().splitlines()) for path in found}


def test_failures_are_recorded_and_tried_again_and_the_rest_is_kept(tmp_path: Path) -> None:
    chosen = experiment(1, 3, 4)
    found = {each.cell.arm: each for each in run_cells(cells_of(chosen, Scale.SMOKE), tmp_path, 3)}
    assert found["e1"].error is None
    assert found["e1"].measures == {"seed": 0.0, "gone": None}
    assert found["e1"].curves == {"x": [1.0, None]}
    assert found["e3"].error == "TrainingError: three passes are too many"
    assert found["e4"].error is not None
    assert "signal 9" in found["e4"].error
    assert "about to go" in found["e4"].error
    result = carry_out_experiment(chosen, Scale.SMOKE, tmp_path, jobs=2)
    assert calls(tmp_path) == {"e1": 1, "e3": 2, "e4": 2}
    assert [where for where, _ in result.failures()] == ["e3 on meet, seed 0", "e4 on meet, seed 0"]
    held = json.loads((tmp_path / "result.json").read_text())
    assert [each["arm"] for each in held["cells_failed"]] == ["e3", "e4"]
    assert "three passes are too many" in (tmp_path / "index.html").read_text()


def test_equal_work_is_done_once(tmp_path: Path) -> None:
    same = {"grpo.epochs": 1}
    plan = Plan((ExperimentArm("one", "one", same), ExperimentArm("other", "other", same)), (TASK,), 1)
    chosen = Experiment("quick", "?", {Scale.SMOKE: plan}, WORK, report)
    found = run_cells(cells_of(chosen, Scale.SMOKE), tmp_path, 2)
    assert [(each.cell.arm, each.measures["seed"]) for each in found] == [("one", 0.0), ("other", 0.0)]
    assert len(list(tmp_path.glob("cells/*"))) == 1


def test_the_schedule_stops_its_processes(tmp_path: Path) -> None:
    class Impatient:
        def update(self, done: int, failed: int, total: int, running: Sequence[Running]) -> None:
            if running and running[0].stage == "thinking":
                raise KeyboardInterrupt

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_cells(cells_of(experiment(5), Scale.SMOKE), tmp_path, 1, Impatient())
    assert time.monotonic() - before < 55
    (folder,) = tmp_path.glob("cells/*")
    assert not (folder / FOUND).exists()


def test_a_terminated_schedule_takes_its_processes_along(tmp_path: Path) -> None:
    class Terminated:
        def update(self, done: int, failed: int, total: int, running: Sequence[Running]) -> None:
            if running and running[0].stage == "thinking":
                os.kill(os.getpid(), signal.SIGTERM)

    held = signal.getsignal(signal.SIGTERM)
    before = time.monotonic()
    with pytest.raises(SystemExit):
        run_cells(cells_of(experiment(5), Scale.SMOKE), tmp_path, 1, Terminated())
    assert time.monotonic() - before < 55
    assert signal.getsignal(signal.SIGTERM) is held


def test_two_processes_do_not_share_a_cell(tmp_path: Path) -> None:
    """As when a cell outlives the schedule that began it, and another schedule begins."""
    (cell,) = cells_of(experiment(1), Scale.SMOKE)
    write_spec(cell, tmp_path)
    threads = [threading.Thread(target=carry_out, args=(tmp_path, tmp_path / "warm")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "calls.txt").read_text() == "called\n"


def test_the_hash_is_of_what_is_done(tmp_path: Path) -> None:
    (cell,) = cells_of(experiment(1), Scale.SMOKE)
    (other,) = cells_of(experiment(2), Scale.SMOKE)
    assert cell.name.startswith("meet-e1-s0-")
    assert cell.digest != other.digest
    assert len(cells_of(experiment(1, 2), Scale.SMOKE, seeds=3)) == 6
    with pytest.raises(ConfigError, match="jobs = 0"):
        run_cells([cell], tmp_path, 0)


def test_a_task_may_have_seeds_of_its_own(tmp_path: Path) -> None:
    chosen = experiment(1)
    plan = chosen.plans[Scale.SMOKE]
    (task,) = plan.tasks
    tasks = (task, replace(task, name="more", seeds=3))
    chosen = replace(chosen, plans={Scale.SMOKE: replace(plan, tasks=tasks)})
    found = [(cell.task, cell.seed) for cell in cells_of(chosen, Scale.SMOKE)]
    assert found == [("meet", 0), ("more", 0), ("more", 1), ("more", 2)]
    assert [cell.task for cell in cells_of(chosen, Scale.SMOKE, seeds=2)] == ["meet", "more"] * 2
    assert len(cells_of(chosen, Scale.SMOKE, tasks=["more"])) == 3
    carry_out_experiment(chosen, Scale.SMOKE, tmp_path)
    written = json.loads((tmp_path / "result.json").read_text())
    assert (written["seeds"], written["seeds_by_task"]) == (1, {"meet": 1, "more": 3})
    assert "meet 1, more 3" in (tmp_path / "index.html").read_text()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no experiment"):
        carry_out_experiment(experiment(1), Scale.SMOKE, tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_published_result_is_gone_on_with(tmp_path: Path) -> None:
    chosen = experiment(1, 3)
    first = carry_out_experiment(chosen, Scale.SMOKE, tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name in ("result.json", "notes.json"):
        shutil.copy(tmp_path / "a" / name, tmp_path / "b")
    more = carry_out_experiment(chosen, Scale.SMOKE, tmp_path / "b", seeds=2)
    done = {each.parent.name.rpartition("-")[0]: each.read_text() for each in tmp_path.glob("b/cells/*/calls.txt")}
    assert done == {"meet-e3-s0": "called\n", "meet-e1-s1": "called\n", "meet-e3-s1": "called\n"}
    (old,) = [each for each in first.cells if each.error is None]
    (new,) = [each for each in more.cells if each.error is None and each.cell.seed == 0]
    assert new == old
    assert new.notes == {"words": ["a", "b"]}
    assert json.loads((tmp_path / "b" / "notes.json").read_text()) == {new.cell.digest: new.notes}, "of the first seed"
    other = replace(chosen, name="slow")
    with pytest.raises(ConfigError, match="'quick', not 'slow'"):
        carry_out_experiment(other, Scale.SMOKE, tmp_path / "a")
    (tmp_path / "b" / "result.json").write_text("[]")
    with pytest.raises(ConfigError, match="no result of an experiment"):
        carry_out_experiment(chosen, Scale.SMOKE, tmp_path / "b")


def test_the_page_of_what_is_done_so_far(tmp_path: Path) -> None:
    chosen = experiment(1, 3)  # of which one fails
    with pytest.raises(ConfigError, match="holds no cell of quick at scale smoke"):
        carry_out_experiment(chosen, Scale.SMOKE, tmp_path / "new", done_only=True)
    carry_out_experiment(chosen, Scale.SMOKE, tmp_path)
    calls = {each: each.read_text() for each in tmp_path.glob("cells/*/calls.txt")}
    so_far = carry_out_experiment(chosen, Scale.SMOKE, tmp_path, seeds=2, done_only=True)
    assert {each: each.read_text() for each in tmp_path.glob("cells/*/calls.txt")} == calls, "something was carried out"
    said = [(each.cell.seed, each.error == "not carried out", each.error is None) for each in so_far.cells]
    assert said == [(0, False, True), (0, False, False), (1, True, False), (1, True, False)]
    assert "not carried out" in (tmp_path / "index.html").read_text()
    assert len(json.loads((tmp_path / "result.json").read_text())["cells_failed"]) == 3


def test_some_tasks_alone(tmp_path: Path) -> None:
    arms = (ExperimentArm("both", "both", {"grpo.epochs": 1}), ExperimentArm("one", "one", tasks=("meet",)))
    other = replace(TASK, name="meet again")
    chosen = Experiment("quick", "?", {Scale.SMOKE: Plan(arms, (TASK, other), 1)}, WORK, report)
    result = carry_out_experiment(chosen, Scale.SMOKE, tmp_path, tasks=["meet again"])
    assert [(each.cell.arm, each.cell.task) for each in result.cells] == [("both", "meet again")]
    assert [arm.name for arm in result.plan.arms] == ["both"]
    assert result.command == "preconcert experiment quick --scale smoke --task 'meet again'"
    with pytest.raises(UnknownNameError, match="task of quick at scale smoke 'met'; did you mean 'meet'"):
        carry_out_experiment(chosen, Scale.SMOKE, tmp_path, tasks=["met"])


def test_overrides_reach_into_the_recipe() -> None:
    task = ExperimentTask("t", {"task": "signal", "grpo": {"iterations": 3, "seeds": 2}})
    recipe = resolve(ExperimentArm("a", "a", {"grpo.iterations": 5, "channel.drop": 0.5, "frozen": ["x"]}), task, 4)
    assert (recipe.grpo.iterations, recipe.grpo.seeds, recipe.channel.drop) == (5, 2, 0.5)
    assert (recipe.frozen, recipe.seed) == (("x",), 4)
    assert task.recipe["grpo"] == {"iterations": 3, "seeds": 2}
    arm = ExperimentArm("a", "a", {"grpo.group": 3, "grpo.seeds": 9}, {"t": {"grpo.seeds": 7}, "u": {"grpo.seeds": 1}})
    assert (resolve(arm, task, 0).grpo.group, resolve(arm, task, 0).grpo.seeds) == (3, 7)
    with pytest.raises(ConfigError, match=r"arm 'a' on 't': grpo\.sedes"):
        resolve(ExperimentArm("a", "a", {"grpo.sedes": 1}), task, 0)


def test_few_seeds_and_smoke_are_said_to_show_little() -> None:
    plan = Plan((), (), 2)
    chosen = Experiment("quick", "?", {Scale.SMOKE: plan, Scale.FULL: plan}, WORK, report, ("Nothing else.",))
    for scale, says in ((Scale.SMOKE, "numbers mean nothing"), (Scale.FULL, "2 seeds")):
        result = Result(chosen, scale, plan, {"meet": 2}, [], report(plan, []), "", {})
        assert len(result.limits) == 2
        assert says in result.limits[0]


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("scale", Scale)
def test_every_experiment_can_be_resolved_and_pickled(name: str, scale: Scale) -> None:
    chosen = experiment_named(name)
    plan = chosen.plans[scale]
    assert len({arm.name for arm in plan.arms}) == len(plan.arms)
    assert len({cell.name for cell in cells_of(chosen, scale)}) == len(cells_of(chosen, scale))
    assert pickle.loads(pickle.dumps(chosen)).name == name
    assert chosen.limits
    if scale is not Scale.SMOKE:
        assert plan.seeds >= 5


def test_unknown_experiments_are_named() -> None:
    with pytest.raises(UnknownNameError, match="'credit'"):
        experiment_named("credits")
