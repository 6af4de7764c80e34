"""Commands that make, judge and compare runs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from preconcert.cli_checks import check_env_of
from preconcert.cli_options import (
    AsJson,
    FallbackRun,
    Patience,
    Plan,
    PlannerKind,
    PlayOverrides,
    RunFolder,
    WorldModelKind,
    around,
    planned_with,
)
from preconcert.cli_text import INTERRUPTED, make_console, print_json, quiet
from preconcert.core import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from preconcert.training.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, or another run's folder.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="E.g. seed=1 grpo.lr=3e-3 params.size=6", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The run folder; runs/<recipe name> if not given.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in the folder and start over.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a team: scripted play, warm start, gate, reinforcement learning."""
    from preconcert.config import load_recipe

    if resume and fresh:
        raise ConfigError("--resume goes on with a run and --fresh deletes it; take one of them")
    with quiet():
        resolved = load_recipe(recipe, overrides or [])
        folder = out or Path("runs") / _run_name(recipe)
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{str(folder)!r} is a file; a run needs a folder")
        if ":" in resolved.task:
            check_env_of(resolved.task, resolved.params)
        if fresh and os.environ.get("RANK", "0") == "0":
            from preconcert.training.run import check_begin

            check_begin(resolved)  # whatever is refused deletes nothing
            _delete_run(folder)
        again = shlex.join(["preconcert", "train", str(recipe), *(overrides or []), "--out", str(folder), "--resume"])
        _train(resolved, folder, resume, again)
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        found: dict[str, Any] = {"run": str(folder), "recipe": resolved.model_dump(mode="json")}
        for stage in ("warm_start", "gate", "result"):
            file = folder / f"{stage}.json"
            found[stage] = json.loads(file.read_text()) if file.is_file() else None
        print_json(found)
    else:
        print(folder)


def evaluate(
    run: RunFolder,
    overrides: PlayOverrides = None,
    episodes: Annotated[
        int | None, typer.Option(min=1, help="Held-out episodes per arm; by default the recipe's.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the task instances and of every choice.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Put the greedy figures in front.")] = False,
    plan: Plan = False,
    planner: PlannerKind = None,
    model: WorldModelKind = None,
    fallback: FallbackRun = None,
    patience: Patience = None,
    as_json: AsJson = False,
) -> None:
    """Judge a run on held-out instances, beside baselines and message controls."""
    from preconcert.config import load_run, override_play

    with quiet():
        from preconcert.experiments.evaluation import evaluate as judge
        from preconcert.experiments.terminal import ProgressReporter, arms_table

        planned, others = planned_with(plan, planner, model, greedy, overrides or [])
        special = around(planned, fallback, patience)
        changed = override_play(load_run(run), others)
        with ProgressReporter(make_console(err=True), keep=False) as reporter:
            found = judge(run, changed, episodes, seed, greedy, reporter, special)
    if as_json:
        print_json(found.to_json())
    else:
        make_console().print(arms_table(found))


def diagnose(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", help="The page; RUN/diagnostics.html if not given.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How training went: gradients, clipping, entropy, shares, critic; as figures and as a page."""
    from preconcert.config import load_run

    with quiet():
        from preconcert.experiments.diagnostics import diagnose as figures_of
        from preconcert.experiments.diagnostics import diagnostics_page, read_log, said
        from preconcert.experiments.replay import write_page

        recipe = load_run(run)
        log = read_log(run)
        found = figures_of(log)
        file = out or run / "diagnostics.html"
        facts = [
            ("run", str(run)),
            ("algorithm", recipe.algorithm.value),
            ("credit", recipe.grpo.credit.type),
            ("update", recipe.update.order.value),
            ("seed", str(recipe.seed)),
        ]
        try:
            write_page(file, diagnostics_page(f"How {recipe.task} was trained", facts, log))
        except OSError as error:
            raise ConfigError(f"{str(file)!r} cannot be written: {error.strerror}") from error
    if as_json:
        print_json({"run": str(run), "page": str(file), **found})
    else:
        table = Table("figure", "", title=str(run), title_justify="left")
        for label, text in said(found):
            table.add_row(label, text)
        make_console().print(table)
        print(file)


def export(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder; RUN/export if not given.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there.")] = False,
    episodes: Annotated[
        int | None,
        typer.Option(min=1, help="Evaluate anew with so many held-out episodes per arm.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a folder that vLLM, peft and transformers load without this package, with a model card.

    The card's table is the run's largest evaluation, the newest of equals; a run without one is evaluated first, as by
    `preconcert eval`.
    """
    from preconcert.config import load_run

    with quiet():
        from preconcert.experiments.evaluation import evaluate as judge
        from preconcert.experiments.evaluation import saved_evaluation
        from preconcert.experiments.terminal import ProgressReporter
        from preconcert.serving.export import MANIFEST, check_export, export_run

        recipe = load_run(run)
        folder = out or run / "export"
        check_export(run, folder, force)
        with ProgressReporter(make_console(err=True), keep=False) as reporter:
            found = None if episodes else saved_evaluation(run)
            if found is None:
                found = judge(run, recipe, episodes, reporter=reporter).to_json()
            export_run(run, folder, found, force, reporter)
    if as_json:
        print_json({"export": str(folder), **json.loads((folder / MANIFEST).read_text(encoding="utf-8"))})
    else:
        print(folder)


def crossplay(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Finished runs of one task.", show_default=False)
    ],
    script: Annotated[
        list[str] | None,
        typer.Option("--script", help="A player of the task that plays too; all of its opponents if not given."),
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Per pair and seating, where no exact figure is known.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the task instances and of every choice.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the files go; the first RUN if not given.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Every past and present self, counter and script against every other: a table, a file and a heat map."""
    from preconcert.config import load_run

    with quiet():
        from preconcert.experiments.crossplay import cross_play, write_cross_play
        from preconcert.experiments.terminal import ProgressReporter, crossplay_table

        for run in runs:
            load_run(run)
        with ProgressReporter(make_console(err=True), keep=False) as reporter:
            found = cross_play(runs, script, episodes, seed, reporter)
        files = write_cross_play(found, out or runs[0])
    if as_json:
        print_json(found.to_json())
        return
    make_console().print(crossplay_table(found))
    for file in files:
        print(file)


def experiment(
    name: Annotated[str, typer.Argument(help="Which one, e.g. credit.", show_default=False)],
    scale: Annotated[str, typer.Option(help="smoke (a minute), standard (hours on two cores) or full.")] = "smoke",
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Training seeds; by default the scale's.", show_default=False)
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Only this task; may be given again.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Its folder; runs/experiments/NAME-SCALE.", show_default=False)
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cells side by side; one per core.", show_default=False)
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Do nothing; the page of what is done so far.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train and compare arms over seeds; a page, figures and every number. Started again, it goes on."""
    with quiet():
        from preconcert.experiments.experiment import Scale
        from preconcert.experiments.page import PAGE, carry_out_experiment
        from preconcert.experiments.provenance import machine
        from preconcert.experiments.registry import experiment_named
        from preconcert.experiments.terminal import ScheduleProgress, experiment_view

        if scale not in list(Scale):
            raise UnknownNameError("scale", scale, Scale)
        chosen = experiment_named(name)
        folder = out or Path("runs") / "experiments" / f"{name}-{scale}"
        side_by_side = jobs or int(machine()["cores"] or 1)
        try:
            with ScheduleProgress(make_console(err=True)) as reporter:
                result = carry_out_experiment(
                    chosen, Scale(scale), folder, seeds, side_by_side, reporter, task or (), report
                )
        except KeyboardInterrupt:
            print("interrupted; the same command goes on", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json({"out": str(folder), **result.summary()})
    else:
        make_console().print(experiment_view(result))
        print(folder / PAGE)
    if result.failed and not report:
        raise typer.Exit(1)


def _train(recipe: Recipe, folder: Path, resume: bool, again: str) -> None:
    """The run itself: bars, a hint after Ctrl-C, and no folder left behind by a run that could not begin.

    Args:
        recipe: what to do.
        folder: the run folder.
        resume: go on with what it holds.
        again: the command that goes on after an interruption.
    """
    from preconcert.experiments.terminal import ProgressReporter
    from preconcert.training.run import train as carry_out

    existed = folder.is_dir()
    begun = existed and any(folder.iterdir())
    try:
        with ProgressReporter(make_console(err=True)) as reporter:
            carry_out(recipe, folder, resume, reporter)
    except KeyboardInterrupt:
        print(f"interrupted; go on with: {again}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except Exception:
        if not begun and not (folder / "warm_start.json").exists() and folder.is_dir():
            _empty(folder)
            if not existed:
                folder.rmdir()
        raise


def _run_name(recipe: Path) -> str:
    """What a recipe's run is called if nobody says."""
    if recipe.is_dir():
        return recipe.resolve().name
    return recipe.resolve().parent.name if recipe.name == "recipe.json" else recipe.stem


def _delete_run(folder: Path) -> None:
    """Delete what is in a run folder, and nothing else."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "recipe.json").is_file():
        raise ConfigError(f"{str(folder)!r} is not a run: it has no recipe.json; nothing was deleted")
    _empty(folder)


def _empty(folder: Path) -> None:
    """Delete what is in a folder; it may itself be a link to where runs are kept."""
    for path in list(folder.iterdir()):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
