"""How far a world model can be trusted: what it imagines, step by step, against what really happened.

Parts: `Case` (a moment of a real episode and what followed), `cases_of`, `choose_starts`, `Mode`, `measure_fidelity`
and the `Fidelity` it returns. `consistency.py` asks whether plans succeed in the model and in the world alike.

A case is rolled open-loop under the agent's real actions, with the others' real actions given (mode `a`) or left to
the model (mode `b`). At horizon h, over all cases that last that long:

    mse             squared error of the view's fields, each from 0 to 1 (`ViewField.error`), mean over fields
    field_exact     share of fields that are right
    exact           share of views that are right in all fields
    determined      share of the determined fields that are right
    nll             nats of the whole real view, judged from the imagined belief at h - 1; at most NLL_CEILING per field
    reward_error    |imagined reward - real reward|
    auroc           of the judged probability of the end against the real end (ties count half)
    mate_accuracy, mate_ce, mate_brier, mate_ece
                    of the judged distribution over each other agent's action: its top choice, nats of the real action
                    (at most NLL_CEILING), half the squared distance (0 to 1), calibration error of the top choice
    malformed       share of imaginations that are malformed at h or before
    ended_early     share that had ended before h although the episode went on

What is malformed counts as wrong in the worst way from there on: squared error 1, nothing exact, the ceiling for nll
and mate_ce, the widest gap between two rewards, the end foretold with certainty where there is none and the other way
round, a certain and wrong guess at the others. Where the model ends an episode that goes on, its last view stands
for all later ones, nothing is paid, and what really happens has no probability, the others' actions included.

`drift` is the least-squares slope of mse over h = 1, 2, ..., over the cases that last to the longest horizon, so that
it is always the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from preconcert.core import (
    ConfigError,
    Env,
    Episode,
    ImaginedStep,
    Judgement,
    Move,
    Outcome,
    StopReason,
    TaskLanguage,
    Turn,
    TurnRequest,
    View,
    WorldModel,
    derive_seed,
)
from preconcert.world_models.calibration import (
    Array,
    ReliabilityBin,
    auroc,
    calibration_error,
    reliability_bins,
    slope,
)
from preconcert.world_models.experience import check_view
from preconcert.world_models.imagination import view_values

HORIZONS = (1, 5, 10, 20)
NLL_CEILING = math.log(1e4)
"""Nats per field, and per action of another agent: what a guess with a probability of 1 in 10,000 costs."""


class Mode(StrEnum):
    """What the model is told about the other agents."""

    GIVEN = "a"
    """Their real actions."""
    IMAGINED = "b"
    """Nothing."""


@dataclass(frozen=True, slots=True)
class Case:
    """One agent at one moment of a real episode, and everything that followed."""

    request: TurnRequest
    past: tuple[Turn, ...]
    moves: tuple[Move, ...]
    """From this moment on, the others' actions filled in."""
    outcomes: tuple[Outcome, ...]


def cases_of(
    episode: Episode,
    name: str,
    language: TaskLanguage,
    starts: Sequence[int],
    env_at: Callable[[Episode, int], Env],
    agents: Sequence[str] | None = None,
    partners: str | None = None,
) -> list[Case]:
    """Cases of one episode.

    Args:
        episode: what really happened.
        name: unique among the episodes.
        language: of the task.
        starts: steps from which to imagine.
        env_at: the episode's environment as it stood before a step, for models that look at it.
        agents: whose; all by default.
        partners: who played the episode, where models are to know.
    """
    found: list[Case] = []
    for start in starts:
        env = env_at(episode, start)
        for agent in agents if agents is not None else tuple(episode.trajectories):
            mine = episode.trajectories[agent]
            others = tuple(other for other in episode.trajectories if other != agent)
            now = mine.turns[start]
            request = TurnRequest(
                f"{name}@{start}", agent, now.observation, now.inbox, others, language,
                derive_seed(name, agent, start), env, partners=partners,
            )  # fmt: skip
            moves, outcomes = [], []
            for at in range(start, len(mine.turns)):
                turn, last = mine.turns[at], at + 1 == len(mine.turns)
                theirs = {other: episode.trajectories[other].turns[at].action for other in others}
                words = turn.message.payload if turn.message is not None else None
                moves.append(Move(turn.action, words, theirs))
                after = mine.final_observation if last else mine.turns[at + 1].observation
                done = last and mine.stop_reason is not StopReason.CUT
                outcomes.append(Outcome(after, theirs, turn.reward, done))
            found.append(Case(request, mine.turns[:start], tuple(moves), tuple(outcomes)))
    return found


def choose_starts(steps: int, horizons: Sequence[int], count: int, seed: int) -> list[int]:
    """Moments to start from: about half at random, half so that a horizon falls on the last step, the first among them.

    Args:
        steps: length of the episode.
        horizons: that are measured.
        count: how many.
        seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    ending = [steps - h for h in horizons if h <= steps]
    chosen = {0, *(int(start) for start in rng.permutation(ending)[: count // 2])}
    for start in rng.permutation(steps):
        if len(chosen) >= min(count, steps):
            break
        chosen.add(int(start))
    return sorted(chosen)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Figures of a model in one mode."""

    figures: Mapping[int, Mapping[str, float | None]]
    """By horizon, then by name as in the module's docstring; None where there is nothing to measure it by."""
    cases: Mapping[int, int]
    """How many cases last to each horizon."""
    mse: tuple[float, ...]
    """At h = 1, 2, ... over the cases that last to the longest horizon."""
    exact: tuple[float, ...]
    """`exact` over the same."""
    drift: float | None
    """Slope of `mse` per step."""
    reliability: Mapping[int, tuple[ReliabilityBin, ...]] = field(default_factory=dict)
    """By horizon, per bin of confidence: mean confidence, share that was right, how many."""

    def measures(self, mode: Mode) -> dict[str, float | None]:
        """Flat, as `NAME_MODE_H`."""
        found = {f"{name}_{mode}_{h}": value for h, held in self.figures.items() for name, value in held.items()}
        return {**found, f"drift_{mode}": self.drift}


@dataclass(slots=True)
class _Rolled:
    """A case and a sample on the way."""

    case: Case
    sample: int
    belief: object
    shown: ImaginedStep | None = None
    """The last step that was imagined."""
    ended: bool = False
    judgements: list[tuple[Judgement | None, bool]] = field(default_factory=list)

    @property
    def malformed(self) -> bool:
        return self.shown is not None and self.shown.malformed


def measure_fidelity(
    model: WorldModel,
    cases: Sequence[Case],
    mode: Mode,
    horizons: Sequence[int] = HORIZONS,
    samples: int = 1,
    seed: int = 0,
    batch: int = 512,
) -> Fidelity:
    """Roll and judge.

    Args:
        model: to be measured.
        cases: all of one task.
        mode: what it is told about the others.
        horizons: where it is measured; those that no case reaches are left out.
        samples: imaginations per case; figures are means over them.
        seed: everything random follows from it.
        batch: imaginations at a time.

    Raises:
        ConfigError: no cases, or a task without a view.
    """
    if not cases:
        raise ConfigError("there is no case to measure a world model by")
    language = cases[0].request.language
    longest = max((h for h in horizons if any(len(case.outcomes) >= h for case in cases)), default=0)
    if not longest:
        raise ConfigError(f"no episode goes on for {min(horizons)} steps")
    tally = _Tally(check_view(language), language, cases, tuple(h for h in horizons if h <= longest), longest)
    per_call = max(1, batch // samples)
    for start in range(0, len(cases), per_call):
        some = cases[start : start + per_call]
        beliefs = model.begin([case.request for case in some], [case.past for case in some])
        rolled = [
            _Rolled(case, sample, belief)
            for case, belief in zip(some, beliefs, strict=True)
            for sample in range(samples)
        ]
        for h in range(1, longest + 1):
            rolled = [each for each in rolled if len(each.case.outcomes) >= h]
            _step(model, rolled, h, mode, h in tally.horizons, seed, tally)
        for case in some:
            model.finish(case.request.episode)
    return tally.result()


def _step(
    model: WorldModel, rolled: Sequence[_Rolled], h: int, mode: Mode, measured: bool, seed: int, tally: _Tally
) -> None:
    """Imagine step h of all, and read it."""
    live = [each for each in rolled if not each.ended]
    judged: dict[int, Judgement | None] = {}
    moves = [_told(each.case.moves[h - 1], mode) for each in live]
    if measured and live:
        outcomes = [each.case.outcomes[h - 1] for each in live]
        answers = model.judge([each.belief for each in live], moves, outcomes)
        judged = {id(each): answer for each, answer in zip(live, answers, strict=True)}
    ended_before = {id(each) for each in rolled if each.ended and not each.malformed}
    if live:
        seeds = [
            derive_seed(seed, each.case.request.episode, each.case.request.agent, each.sample, h) for each in live
        ]
        for each, step in zip(live, model.advance([each.belief for each in live], moves, seeds), strict=True):
            if not step.malformed and view_values(step, tally.view) is None:
                step = ImaginedStep(None, (), step.others, step.reward, False, None, None, malformed=True)
            if step.malformed or step.done:
                each.ended = True
            each.shown, each.belief = step, step.belief
    for each in rolled:
        tally.add(each, h, id(each) in ended_before, measured, judged.get(id(each)))


def _told(move: Move, mode: Mode) -> Move:
    return move if mode is Mode.GIVEN else Move(move.action, move.message, None)


class _Tally:
    """Adds up what was imagined."""

    def __init__(
        self, view: View, language: TaskLanguage, cases: Sequence[Case], horizons: tuple[int, ...], longest: int
    ) -> None:
        self.view, self.language, self.horizons, self.longest = view, language, horizons, longest
        paid = [outcome.reward for case in cases for outcome in case.outcomes]
        paid += [float(word) for word in language.rewards]
        self.widest = max(paid) - min(paid) if len(set(paid)) > 1 else 1.0
        self.determined = np.array([each.determined for each in view.fields])
        self._tables = [_table(view, number) for number in range(len(view.fields))]
        self._place = [{choice: i for i, choice in enumerate(each.choices)} for each in view.fields]
        self._rows: dict[int, list[dict[str, float]]] = {h: [] for h in horizons}
        self._mates: dict[int, list[tuple[float, float, float, float]]] = {h: [] for h in horizons}
        self._ends: dict[int, list[tuple[float, bool]]] = {h: [] for h in horizons}
        self._curve: list[list[tuple[float, bool]]] = [[] for _ in range(longest)]
        self._judges = False
        """Has the model given any probability?"""
        self.counted: dict[int, set[tuple[str, str]]] = {h: set() for h in horizons}

    def add(self, each: _Rolled, h: int, over: bool, measured: bool, judged: Judgement | None) -> None:
        """One imagination at step h.

        Args:
            each: the imagination; its last step is the h-th, or an earlier one if it had ended.
            h: the step.
            over: had the model ended the episode before?
            measured: is h one of the horizons?
            judged: of the real outcome; None where there is no probability, or where it had ended.
        """
        full = len(each.case.outcomes) >= self.longest
        if not (measured or full):
            return
        outcome = each.case.outcomes[h - 1]
        errors, right = self._compare(each, outcome)
        if full:
            self._curve[h - 1].append((float(errors.mean()), bool(right.all())))
        if not measured:
            return
        case = each.case.request
        self.counted[h].add((case.episode, case.agent))
        row = {
            "mse": float(errors.mean()),
            "field_exact": float(right.mean()),
            "exact": float(right.all()),
            "malformed": float(each.malformed),
            "ended_early": float(over),
        }
        if self.determined.any():
            row["determined"] = float(right[self.determined].mean())
        self._judges |= judged is not None
        ceiling = NLL_CEILING * len(self.view.fields)
        if each.malformed or over:
            # A step that comes out malformed is not excused by the probabilities that it was drawn from.
            row["reward_error"] = self.widest if each.malformed else abs(outcome.reward)
            row["nll"] = ceiling
            self._ends[h].append((1.0 if over else float(not outcome.done), outcome.done))
            self._mates[h] += [(1.0, 0.0, NLL_CEILING, 1.0)] * len(outcome.others)
        else:
            assert each.shown is not None
            row["reward_error"] = abs(each.shown.reward - outcome.reward)
            if judged is not None:
                row["nll"] = min(judged.view_nll, ceiling)
                self._ends[h].append((judged.done_probability, outcome.done))
                given = [(judged.others.get(other), action) for other, action in outcome.others.items()]
                self._mates[h] += [_guess(shares, action) for shares, action in given if shares]
        self._rows[h].append(row)

    def result(self) -> Fidelity:
        """The means."""
        figures: dict[int, dict[str, float | None]] = {}
        if not self._judges:  # the penalties of what went wrong are no figures by themselves
            self._ends, self._mates = {h: [] for h in self.horizons}, {h: [] for h in self.horizons}
        reliability: dict[int, tuple[ReliabilityBin, ...]] = {}
        for h in self.horizons:
            rows = self._rows[h]
            figures[h] = {
                name: _mean([row[name] for row in rows if name in row])
                for name in (
                    "mse", "field_exact", "exact", "determined", "nll", "reward_error", "malformed", "ended_early",
                )
            }  # fmt: skip
            if not self._judges:
                figures[h]["nll"] = None
            figures[h]["auroc"] = auroc([p for p, _ in self._ends[h]], [end for _, end in self._ends[h]])
            mates = np.array(self._mates[h], dtype=np.float64).reshape(-1, 4)
            bins = reliability_bins(mates[:, 0], mates[:, 1])
            figures[h] |= {
                "mate_accuracy": _mean(mates[:, 1]),
                "mate_ce": _mean(mates[:, 2]),
                "mate_brier": _mean(mates[:, 3]),
                "mate_ece": calibration_error(bins),
            }
            reliability[h] = bins
        mse = tuple(float(np.mean([error for error, _ in found])) for found in self._curve)
        exact = tuple(float(np.mean([right for _, right in found])) for found in self._curve)
        counts = {h: len(self.counted[h]) for h in self.horizons}
        return Fidelity(figures, counts, mse, exact, slope(mse), reliability)

    def _compare(self, each: _Rolled, outcome: Outcome) -> tuple[Array, NDArray[np.bool_]]:
        """Squared error of every field, and whether it is right."""
        count = len(self.view.fields)
        said = view_values(each.shown, self.view) if each.shown is not None else None
        if said is None:
            return np.ones(count), np.zeros(count, dtype=bool)
        real = self.view.parse(outcome.observation.text)
        errors = np.array(
            [
                table[place[one], place[other]]
                for table, place, one, other in zip(self._tables, self._place, said, real, strict=True)
            ]
        )
        return errors, np.array([one == other for one, other in zip(said, real, strict=True)])


def _guess(shares: Mapping[str, float], real: str) -> tuple[float, float, float, float]:
    """Confidence of the top choice, was it right, nats, half the squared distance."""
    top = max(shares, key=lambda action: shares[action])
    given = shares.get(real, 0.0)
    squared = sum((share - (action == real)) ** 2 for action, share in shares.items()) + (real not in shares)
    nats = NLL_CEILING if given <= 0 else min(-math.log(given), NLL_CEILING)
    return shares[top], float(top == real), nats, squared / 2


def _table(view: View, number: int) -> Array:
    one = view.fields[number]
    return np.array([[one.error(a, b) for b in one.choices] for a in one.choices])


def _mean(values: Sequence[float] | Array) -> float | None:
    return float(np.mean(values)) if len(values) else None
