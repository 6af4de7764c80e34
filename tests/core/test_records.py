"""Finished data is frozen, picklable and says what it is."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

import preconcert.core as core
from preconcert.core import (
    Candidate,
    Decision,
    Delivery,
    Episode,
    Fate,
    Forecast,
    ImaginedStep,
    Intention,
    Judgement,
    Latent,
    Message,
    Move,
    Observation,
    Outcome,
    Slot,
    Span,
    SpanKind,
    StepResult,
    StopReason,
    StoredEpisodes,
    TaskLanguage,
    Trajectory,
    Turn,
    TurnRequest,
    View,
    ViewField,
)

OBSERVATION = Observation("a", "a corner", ("wait",), 0)
FORECAST = Forecast({"row": "r0"}, "0", False)
TURN = Turn("a", 0, OBSERVATION, (), (1,), (2,), (-0.5,), (True,), (), (), None, None, "wait", False, 0.0)
TRAJECTORY = Trajectory("a", (TURN,), 0, StopReason.TERMINATED, OBSERVATION)
EPISODE = Episode("signal", {}, 0, "test", "g", 0, -1, {"a": TRAJECTORY}, True, ("s", "e"))
LANGUAGE = TaskLanguage(("wait",))

RECORDS: list[Any] = [
    Candidate("wait", None, 1.0, 1.0, 0.0, 0.0, 1, True, ("left 1",), (Move("wait"),), (1.0,)),
    Decision("wait"),
    Delivery("a", "b", 0, Fate.ARRIVED, 1, 2.0, True),
    EPISODE,
    FORECAST,
    Judgement(0.1, 0.9, 0.2, {"b": {"wait": 1.0}}),
    Move("wait", "hello", {"b": "wait"}),
    Outcome(OBSERVATION, {"b": "wait"}, 1.0, True),
    View((ViewField("left", ("0", "1"), "left", number=True),)),
    ViewField("left", ("0", "1"), "left", number=True),
    ImaginedStep(None, (), {"b": "wait"}, 0.0, True, None, None, True),
    Intention("b", ("wait",), 1.0),
    LANGUAGE,
    Latent(((0.5, -1.0),), 5),
    Message("a", ("b",), "hello", 1.0, 1, 0),
    OBSERVATION,
    Slot("row", ("r0", "r1")),
    Span(SpanKind.ACT, 0, 1, "action"),
    StepResult({"a": OBSERVATION}, {"a": 0.0}, True),
    StoredEpisodes((EPISODE,), 0),
    TRAJECTORY,
    TURN,
    TurnRequest("e", "a", OBSERVATION, (), ("b",), LANGUAGE, 0, env=None),  # type: ignore[arg-type]  # no env is needed
]


def test_every_record_is_covered() -> None:
    public = {name for name in core.__all__ if dataclasses.is_dataclass(getattr(core, name))}
    assert {type(record).__name__ for record in RECORDS} == public


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_no_field_can_be_assigned_or_deleted(record: Any) -> None:
    for field in dataclasses.fields(record):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field.name, getattr(record, field.name))
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(record, field.name)
    assert not hasattr(record, "__dict__")


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_survives_pickling(record: Any) -> None:
    assert pickle.loads(pickle.dumps(record)) == record


def test_records_of_their_own_mappings_do_not_share_them() -> None:
    assert Observation("a", "", (), 0).fields is not Observation("b", "", (), 0).fields


def test_every_public_name_is_there() -> None:
    assert len(set(core.__all__)) == len(core.__all__)
    assert [name for name in core.__all__ if not hasattr(core, name)] == []
