"""Episodes survive the way to the disk and back, and a crash on that way."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preconcert.core import (
    Episode,
    Forecast,
    Intention,
    Message,
    Observation,
    Span,
    SpanKind,
    StopReason,
    StoredEpisodes,
    StoreError,
    Trajectory,
    Turn,
    append_episodes,
    dump_episode,
    keep_episodes_before,
    load_episodes,
    parse_episode,
)

OBSERVATION = Observation(
    agent="Ada",
    text="you are at row 1 – «čtvrtý» 目標\u2028next\r\nline",
    legal_actions=("north", "wait"),
    step=3,
    fields={"row": "r1", "naïve": "☃"},
    sees=("Béla",),
)
MESSAGE = Message("Béla", ("Ada", "Čeněk"), payload="r1 c2", bits=3.169925001442312, tokens=2, sent_at=2)
TURN = Turn(
    agent="Ada",
    step=3,
    observation=OBSERVATION,
    inbox=(MESSAGE,),
    prompt_ids=(1, 2, 151_936),
    completion_ids=(7, 8, 9),
    logprobs=(0.0, -0.1, -1e-300),
    sampled=(False, True, True),
    spans=tuple(Span(kind, start, start + 1, f"slot {kind}") for start, kind in enumerate(SpanKind)),
    intentions=(Intention("Béla", ("wait", "north"), 0.25),),
    forecast=Forecast({"row": "r0"}, "1", False),
    message=dataclasses.replace(MESSAGE, sender="Ada", recipients=("Béla",)),
    action="north",
    malformed=True,
    reward=-0.5,
    text="<intend Béla> wait\n<act> \U0001f9ed north",
    adapter="Ada",
)
BARE_TURN = Turn(
    agent="Béla", step=0, observation=OBSERVATION, inbox=(), prompt_ids=(), completion_ids=(), logprobs=(), sampled=(),
    spans=(), intentions=(), forecast=None, message=None, action="wait", malformed=False, reward=0.0,
)  # fmt: skip
EPISODE = Episode(
    task="rendezvous",
    params={"size": 5, "noise": 0.1, "landmarks": ["NE", "SW"], "nested": {"talk": True, "none": None}},
    seed=2**63 - 1,
    split="train",
    group="rendezvous/17",
    sample=4,
    iteration=2,
    trajectories={
        "Ada": Trajectory("Ada", (TURN, BARE_TURN), 12, StopReason.TRUNCATED, OBSERVATION),
        "Béla": Trajectory("Béla", (), -1, StopReason.TERMINATED, OBSERVATION),
    },
    success=None,
    states=("start", "end ✓"),
)


def numbered(*iterations: int) -> list[Episode]:
    return [dataclasses.replace(EPISODE, iteration=n, sample=i) for i, n in enumerate(iterations)]


def test_every_field_survives_the_round_trip() -> None:
    line = dump_episode(EPISODE)
    assert b"\n" not in line
    assert b"\r" not in line
    back = parse_episode(line)
    assert back == EPISODE
    assert type(back.trajectories["Ada"].stop_reason) is StopReason
    assert type(back.trajectories["Ada"].turns[0].spans[0].kind) is SpanKind
    assert type(back.trajectories["Ada"].turns[0].prompt_ids) is tuple


floats = st.floats(allow_nan=False)
words = st.text(max_size=12)
ids = st.lists(st.integers(0, 2**31), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(words, words, st.lists(floats, max_size=4), ids, floats, st.none() | st.booleans())
def test_any_values_survive_the_round_trip(
    text: str, name: str, numbers: list[float], ids: tuple[int, ...], reward: float, success: bool | None
) -> None:
    message = Message(name, (name, text), text, reward, len(ids), 0)
    turn = dataclasses.replace(
        TURN, agent=name, inbox=(message,), message=message, completion_ids=ids, logprobs=tuple(numbers), reward=reward,
        sampled=tuple(n < 0 for n in numbers), text=text, intentions=(Intention(name, (text,), reward),),
        forecast=Forecast({name: text}, text, success), adapter=name,
    )  # fmt: skip
    trajectory = Trajectory(name, (turn,), 0, StopReason.TRUNCATED, dataclasses.replace(OBSERVATION, text=text))
    episode = dataclasses.replace(
        EPISODE, params={name: text, "x": reward}, trajectories={name: trajectory}, success=success, states=(text,)
    )
    assert parse_episode(dump_episode(episode)) == episode


def test_numbers_of_a_diverged_run_can_be_read_back() -> None:
    turn = dataclasses.replace(TURN, logprobs=(-math.inf, math.nan, 0.0), reward=math.inf)
    trajectories = {"Ada": dataclasses.replace(EPISODE.trajectories["Ada"], turns=(turn,))}
    back = parse_episode(dump_episode(dataclasses.replace(EPISODE, trajectories=trajectories, params={"x": math.nan})))
    (read,) = back.trajectories["Ada"].turns
    assert read.logprobs[0] == -math.inf
    assert math.isnan(read.logprobs[1])
    assert read.reward == math.inf
    assert math.isnan(back.params["x"])


def test_what_is_appended_is_loaded_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "episodes.jsonl"
    append_episodes(path, numbered(0, 0))
    append_episodes(path, [])
    append_episodes(path, iter(numbered(1)))
    assert load_episodes(path) == StoredEpisodes((*numbered(0, 0), *numbered(1)), torn_bytes=0)


def test_an_empty_file_holds_no_episodes(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    append_episodes(path, [])
    assert load_episodes(path) == StoredEpisodes((), torn_bytes=0)


@pytest.mark.parametrize("length", [1, 100, -1])
def test_a_torn_last_line_is_reported_and_the_rest_loads(tmp_path: Path, length: int) -> None:
    path = tmp_path / "episodes.jsonl"
    append_episodes(path, numbered(0, 1))
    torn = dump_episode(EPISODE)[:length]
    with open(path, "ab") as file:
        file.write(torn)
    assert load_episodes(path) == StoredEpisodes(tuple(numbered(0, 1)), torn_bytes=len(torn))


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("length", [1, 100, 200_000])  # the last is longer than the block that is searched at a time
def test_appending_cuts_a_torn_last_line_off(tmp_path: Path, before: int, length: int) -> None:
    path = tmp_path / "episodes.jsonl"
    whole = numbered(*range(before))
    append_episodes(path, whole)
    with open(path, "ab") as file:
        file.write(b'{"task": "' + b"x" * length)
    append_episodes(path, [EPISODE])
    assert load_episodes(path) == StoredEpisodes((*whole, EPISODE), torn_bytes=0)


@pytest.mark.parametrize("broken", [b"{}", b"", b"not json", b"\xff\xfe", dump_episode(EPISODE)[:-20]])
def test_a_corrupt_whole_line_is_an_error_with_its_number(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "episodes.jsonl"
    lines = [dump_episode(episode) for episode in numbered(0, 1, 2, 3)]
    lines[2] = broken
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(StoreError, match=r"^episodes\.jsonl line 3: not an episode: "):
        load_episodes(path)


def test_an_error_names_the_field() -> None:
    line = dump_episode(EPISODE).replace(b'"stop_reason":"truncated"', b'"stop_reason":"bored"')
    with pytest.raises(StoreError, match=r"trajectories\.Ada\.stop_reason"):
        parse_episode(line)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"gone\.jsonl"):
        load_episodes(tmp_path / "gone.jsonl")


def test_going_back_to_an_iteration_drops_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    episodes = numbered(-1, 0, 2, 1, 2, 3)
    append_episodes(path, episodes)
    with open(path, "ab") as file:
        file.write(b'{"torn')
    assert keep_episodes_before(path, 2) == 3
    kept = tuple(episode for episode in episodes if episode.iteration < 2)
    assert load_episodes(path) == StoredEpisodes(kept, torn_bytes=0)
    assert keep_episodes_before(path, 2) == 0
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_going_back_without_a_file_drops_nothing(tmp_path: Path) -> None:
    assert keep_episodes_before(tmp_path / "none.jsonl", 0) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_records_answer_simple_questions() -> None:
    assert EPISODE.steps == 1
    assert EPISODE.trajectories["Ada"].total_reward == -0.5
    assert EPISODE.trajectories["Béla"].total_reward == 0
