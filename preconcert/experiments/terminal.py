"""Evaluations, replays, experiments and progress on a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from preconcert.experiments.crossplay import CrossPlay
from preconcert.experiments.evaluation import Evaluation
from preconcert.experiments.exact_games import GameValue
from preconcert.experiments.page import Result
from preconcert.experiments.plans import ImaginedMove, Weighed
from preconcert.experiments.replay import Frame, Replay, View
from preconcert.experiments.schedule import Running
from preconcert.training.measures import Measures

_COLOURS = ("blue", "dark_orange3", "green4", "magenta", "gold3", "red3", "cyan", "yellow4")
_SECONDS_BETWEEN_LINES = 20.0
_CANDIDATES = 6
"""Shown of a planned decision; the rest is counted."""


class ProgressReporter:
    """A `Reporter` that draws one bar per stage; where there is no terminal, now and then a line.

    Args:
        console: where to; should be standard error, so that results can be piped.
        keep: leave finished bars on the screen.
    """

    def __init__(self, console: Console, keep: bool = True) -> None:
        self.console = console
        self._bars: Progress | None = None
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<24}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=not keep,
            )
        self._task: TaskID | None = None
        self._name, self._total, self._done, self._note = "", 0, 0, ""
        self._started = self._said = time.monotonic()

    def __enter__(self) -> ProgressReporter:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        if self._bars is not None:
            self._bars.stop()

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` units begins; the one before it is over."""
        self._finish()
        self._name, self._total, self._done, self._note = name, total, 0, ""
        self._started = self._said = time.monotonic()
        if self._bars is not None:
            self._task = self._bars.add_task(name, total=total, note="")

    def advance(self, done: int, note: str = "") -> None:
        """`done` units of the present stage are over."""
        self._done, self._note = done, note or self._note
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, note=self._note)
        elif time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._line()

    def say(self, text: str) -> None:
        """A line worth keeping."""
        self._finish()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _finish(self) -> None:
        if not self._name:
            return
        if self._bars is None:
            self._line()
        elif self._task is not None:
            self._bars.stop_task(self._task)
        self._name, self._task = "", None

    def _line(self) -> None:
        self._said = time.monotonic()
        parts = [f"{self._name}: {self._done}/{self._total}", self._note, f"{self._said - self._started:.0f} s"]
        self.console.print(", ".join(part for part in parts if part), markup=False, highlight=False, soft_wrap=True)


class ScheduleProgress:
    """A `ScheduleReporter` that draws a bar for all cells and a line for each that runs; without a terminal, now and
    then a line.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started = self._said = time.monotonic()
        self._before: int | None = None
        self._live = Live(console=console, transient=True, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> ScheduleProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, done: int, failed: int, total: int, running: Sequence[Running]) -> None:
        """Cells done, running and failed, and the time left if the others take as long."""
        over = done + failed
        if self._before is None:
            self._before = over
        passed = time.monotonic() - self._started
        left = passed / (over - self._before) * (total - over) if over > self._before else None
        text = f"cells: {done} of {total} done"
        text += f", {failed} failed" if failed else ""
        text += f", {passed / 60:.0f} min" + ("" if left is None else f", about {left / 60:.0f} min left")
        if self._live is not None:
            rows = Table.grid(padding=(0, 2))
            for each in running:
                rows.add_row(Text(each.name), Text(each.stage, style="dim"), _steps(each))
            bar = ProgressBar(total=max(1, total), completed=over, width=40)
            self._live.update(Group(Text(text), bar, rows))
        elif time.monotonic() - self._said > _SECONDS_BETWEEN_LINES or over == total:
            self._said = time.monotonic()
            now = "; ".join(f"{each.name} {each.stage} {_steps(each)}".strip() for each in running)
            self.console.print(f"{text}; {now}" if now else text, markup=False, highlight=False, soft_wrap=True)


def _steps(running: Running) -> str:
    return f"{running.done}/{running.total}" if running.total else ""


def experiment_view(result: Result) -> RenderableType:
    """An experiment's findings and tables."""
    parts: list[RenderableType] = [Text(result.experiment.question, style="bold"), Text("")]
    for finding in result.report.findings:
        parts.append(Text(("• " if finding.clear else "· ") + finding.text, style="" if finding.clear else "dim"))
    for found in result.report.tables:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), title=found.title, title_justify="left", title_style="bold")
        for number, column in enumerate(found.columns):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in found.shown():
            table.add_row(*(escape(f"{text} ({interval})" if interval else text) for text, interval in row))
        parts.append(table)
    parts += [Text(f"failed: {where}: {error}", style="red") for where, error in result.failures()]
    return Group(*parts)


def arms_table(found: Evaluation) -> RenderableType:
    """All arms, one row each, and the ceiling below."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), title_justify="left", title_style="bold")
    table.title = f"{found.task}: {found.arms[0].measures.episodes} held-out episodes, seed {found.seed}"
    table.add_column("who plays", min_width=16, overflow="fold")
    table.add_column("success\n(95% interval)", justify="right")
    table.add_column("return", justify="right")
    seats = all(result.measures.success_rate is None for result in found.arms)
    exact = any(result.worth is not None for result in found.arms)
    if seats:
        table.add_column("by role", overflow="fold")
    if exact:
        table.add_column("exploitability\n(value)", justify="right")
    intends = any(result.measures.intention_accuracy is not None for result in found.arms)
    foresees = any(result.measures.forecast_exact_match is not None for result in found.arms)
    if intends:
        table.add_column("intends right\n(copy-last, chance)", justify="right")
    if foresees:
        table.add_column("foresees right\n(copy-last)", justify="right")
    table.add_column("malformed", justify="right")
    table.add_column("bits\nper turn", justify="right")
    for result in found.arms:
        measures = result.measures
        title = escape(result.arm.title)
        table.add_row(
            f"[bold]{title}[/bold]" if result.arm.name == found.main else title,
            success(measures),
            f"{measures.return_mean:.2f}",
            *([", ".join(f"{name} {each:.2f}" for name, each in measures.returns.items())] if seats else []),
            *([_worth(result.worth)] if exact else []),
            *([_rate(measures.intention_accuracy, measures.intention_copy_last, measures.intention_chance)] * intends),
            *([_rate(measures.forecast_exact_match, measures.forecast_copy_last)] * foresees),
            f"{measures.malformed_rate:.1%}" if measures.generated_tokens else "–",
            "–" if measures.message_bits_per_turn is None else f"{measures.message_bits_per_turn:.2f}",
        )
    ceiling = found.no_message_ceiling
    note = (
        "No ceiling without messages is known for this task."
        if ceiling is None
        else f"No team without messages can exceed a success of {ceiling:.3f} in expectation."
    )
    notes = [Text(note, style="dim")]
    if exact:
        notes.append(Text("\n".join(_units(found)), style="dim"))
    return Group(table, *notes)


def _worth(found: GameValue | None) -> str:
    return "–" if found is None else f"{found.exploitability:.3f} ({next(iter(found.values.values())):.3f})"


def _units(found: Evaluation) -> list[str]:
    """What exploitabilities are measured in, and how they were found."""
    worth = next(result.worth for result in found.arms if result.worth is not None)
    unit = "pots of two antes" if worth.unit == "pots" else "units of payoff"
    lines = [f"Exploitability in {unit}, mean over the sides; in brackets what {next(iter(worth.values))!r} wins."]
    if any(result.worth is not None and result.worth.samples is not None for result in found.arms):
        lines.append("The teams' probabilities are counts of sampled turns: what follows from them is no exact figure.")
    return lines


def crossplay_table(found: CrossPlay) -> RenderableType:
    """One row each: how it does on the whole and where worst, and what it is worth where that is known."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), title_justify="left", title_style="bold")
    table.title = f"{found.task}: return of one side, the seatings taken together"
    table.add_column("who plays", overflow="fold")
    table.add_column("mean", justify="right")
    table.add_column("lowest", justify="right")
    table.add_column("against", overflow="fold")
    if found.worth:
        table.add_column("exploitability", justify="right")
    for label, returns in zip(found.labels, found.returns, strict=True):
        worst = int(returns.argmin())
        worth = [f"{found.worth[label].exploitability:.3f}"] if found.worth else []
        table.add_row(
            escape(label), f"{returns.mean():.2f}", f"{returns[worst]:.2f}", escape(found.labels[worst]), *worth
        )
    return table


def success(measures: Measures) -> str:
    """Success and its interval."""
    if measures.success_rate is None or measures.success_ci95 is None:
        return "–"
    low, high = measures.success_ci95
    return f"{measures.success_rate:.2f} ({low:.2f}–{high:.2f})"


def _rate(value: float | None, *others: float | None) -> str:
    if value is None:
        return "–"
    shown = ", ".join("–" if other is None else f"{other:.2f}" for other in others)
    return f"{value:.2f} ({shown})"


def episode_view(replay: Replay, width: int) -> RenderableType:
    """An episode, step by step."""
    end = "no notion of success" if replay.success is None else "solved" if replay.success else "not solved"
    parts: list[RenderableType] = [
        Text(f"{replay.task}, {replay.split} seed {replay.seed}", style="bold"),
    ]
    if replay.legend:
        parts.append(Text(replay.legend, style="dim"))
    for frame in replay.frames:
        parts.append(_frame(frame, width))
    colour = {None: "", True: "green", False: "red"}[replay.success]
    cut = ", stopped by the horizon" if replay.truncated else ""
    parts.append(Text(f"{end}{cut}; return {replay.mean_return:g}", style=f"bold {colour}".strip()))
    return Group(*parts)


def _frame(frame: Frame, width: int) -> RenderableType:
    world = Text("\n".join(frame.board) or frame.state, no_wrap=bool(frame.board))
    title = f"step {frame.step}" if frame.views else "the end"
    views = Group(*(_view(view, number, number + 1 < len(frame.views)) for number, view in enumerate(frame.views)))
    if not frame.views:
        return Panel(world, title=title, title_align="left", border_style="dim", expand=False)
    board_width = max(map(len, frame.board), default=0)
    if not frame.board or board_width > 30 or width < 100:
        return Panel(Group(world, Text(""), views), title=title, title_align="left", border_style="dim")
    grid = Table.grid(padding=(0, 3))
    grid.add_column(width=board_width)
    grid.add_column(ratio=1)
    grid.add_row(world, views)
    return Panel(grid, title=title, title_align="left", border_style="dim")


def _view(view: View, number: int, more: bool) -> RenderableType:
    lines = Table.grid(padding=(0, 1))
    lines.add_column(width=9, style="dim")
    lines.add_column()
    name = Text(view.agent, style=f"bold {_COLOURS[number % len(_COLOURS)]}")
    does = Text.assemble("does ", (view.does, "bold"))
    if view.reward:
        does.append(f", reward {view.reward:g}", style="green")
    lines.add_row("saw", view.saw)
    lines.add_row("heard", "; ".join(f"{each.sender}: {each.words}" for each in view.heard) or "nothing yet")
    if view.alone:
        lines.add_row("acts", Text("as the silent team would, having heard nothing", style="dim"))
    if view.malformed:
        lines.add_row("wrote", Text("a malformed turn; the default action was taken", style="red"))
    if view.intends:
        text = Text()
        for guess in view.intends:
            text.append("; " if text else "")
            text.append(f"{guess.about} will {', '.join(guess.actions)}")
            if guess.right is not None:
                text.append(" ✓" if guess.right else f" ✗ did {', '.join(guess.real)}", style=_verdict(guess.right))
            text.append("" if guess.known else " (neither seen nor heard)", style="dim")
        lines.add_row("intends", text)
    if view.foresees:
        text = Text()
        for each in view.foresees:
            text.append(", " if text else "")
            text.append(f"{each.slot} {each.expected}")
            text.append(" ✓" if each.right else f" ✗ came {each.came}", style=_verdict(each.right))
        lines.add_row("foresees", text)
    if view.weighed:
        lines.add_row("weighs", _weighed(view.weighed))
    said = "nothing" if view.says is None else f"“{view.says}”"
    lines.add_row("says", said + ("" if view.bits is None else f"  {view.bits:.2f} bits"))
    return Group(Text.assemble(name, "  ", does), lines, *([Text("")] if more else []))


def _weighed(candidates: Sequence[Weighed]) -> RenderableType:
    """The candidates with their scores, the one taken in full, of the others the first imagined step."""
    parts: list[RenderableType] = []
    for each in candidates[:_CANDIDATES]:
        says = "" if each.says is None else f" “{each.says}”"
        line = Text("▸ " if each.chosen else "  ", style="bold" if each.chosen else "")
        line.append(f"{each.does}{says}")
        line.append(
            f"  score {each.score:.3f}: mean {each.mean:.3f}, spread {each.spread:.3f}, "
            f"disagreement {each.disagreement:.2f}, {each.visits} {'step' if each.visits == 1 else 'steps'}",
            style="" if each.chosen else "dim",
        )
        parts.append(line)
        parts += [_imagined(step, number) for number, step in enumerate(each.steps if each.chosen else each.steps[:1])]
    if len(candidates) > _CANDIDATES:
        rest = candidates[_CANDIDATES:]
        parts.append(Text(f"  and {len(rest)} more, scores {rest[0].score:.3f} to {rest[-1].score:.3f}", style="dim"))
    return Group(*parts)


def _imagined(step: ImaginedMove, number: int) -> RenderableType:
    line = Text()
    if number:
        line.append(f"then {step.does}" + ("" if step.says is None else f" “{step.says}”") + ", ")
    for other in step.others:
        line.append(f"{other.agent} does {other.expected}", style=_against(other.expected, other.came))
        line.append("" if other.came in (None, other.expected) else f" (did {other.came})", style="dim")
        line.append(", ")
    line.append("sees ")
    for part in step.view:
        line.append(part.expected, style=_against(part.expected, part.came))
        line.append(" " if part.came in (None, part.expected) else f" ({part.came}) ", style="dim")
    if step.reward:
        line.append(f"reward {step.reward:g}", style="green")
    if step.paid is not None and step.paid != step.reward:
        line.append(f" (paid {step.paid:g})", style="red")
    return Padding(line, (0, 0, 0, 4))


def _against(expected: str, came: str | None) -> str:
    return "dim" if came is None else _verdict(expected == came)


def _verdict(right: bool) -> str:
    return "green" if right else "red"
