"""Limits, errors, streams, repeats and the end of a service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest

from preconcert.agents import ChannelSettings
from preconcert.agents.channel import Nearest
from preconcert.core import EngineAwayError
from preconcert.envs import make_env
from preconcert.models import TransformersModel
from preconcert.models.language_model import Completion, GenerateRequest
from preconcert.serving.app import create_app
from preconcert.serving.session import Session
from preconcert.serving.settings import ServiceSettings
from preconcert.serving.shared_model import SharedModel
from preconcert.serving.team import ServedTeam
from tests.serving.conftest import running
from tests.training.teams import AGENTS, TASK

LANGUAGE = {
    "actions": ["north", "south", "stay"],
    "message": [{"name": "target", "choices": ["a", "b", "unknown"]}],
    "forecast": [{"name": "row", "choices": ["0", "1", "2"]}],
}
FREE = {"language": LANGUAGE, "agents": {"agent_0": "agent_0", "agent_1": "agent_1"}}


def seen(text: str = "row 0 col 1", actions: Sequence[str] = ("north", "stay")) -> dict[str, Any]:
    return {agent: {"text": text, "legal_actions": list(actions)} for agent in AGENTS}


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


def session(http: httpx.Client, **body: Any) -> str:
    answer = http.post("/v1/sessions", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def refused(answer: httpx.Response, status: int, *words: str) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"type", "message"}
    assert "\n" not in error["message"]
    for word in words:
        assert word in error["message"]
    return str(error["message"])


def test_pages(http: httpx.Client) -> None:
    assert http.get("/health").json()["engine"] == "transformers"
    assert http.get("/ready").json()["status"] == "ready"
    assert http.get("/v1/agents").json()["agents"] == [{"name": name, "adapter": name} for name in AGENTS]
    assert "openapi" in http.get("/openapi.json").json()
    reference = http.get("/docs").text
    for words in ("/v1/sessions/{name}/observe", "Always take the most likely token", "/v1/chat/completions"):
        assert words in reference
    for outside in ("<script", "src=", "@import", "url("):
        assert outside not in reference
    assert "preconcert" in http.get("/").text


def test_metrics(http: httpx.Client) -> None:
    name = session(http, instance=4)
    http.post(f"/v1/sessions/{name}/step")
    text = http.get("/metrics").text
    assert 'preconcert_turns_total{agent="agent_0",malformed="false"}' in text
    assert 'preconcert_requests_total{method="POST",route="/v1/sessions/{name}/step",status="200"}' in text
    assert "process_resident_memory_bytes" in text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"task": "rendezvouz"}, ["'rendezvous'", "'rendezvouz'"]),
        ({"sead": 1}, ["unknown key 'sead'", "did you mean 'seed'?"]),
        ({"seed": -1}, ["seed = -1", "at least 0"]),
        ({"seed": 10**40}, ["seed"]),
        ({"seed": "x"}, ["seed = 'x'", "a whole number"]),
        ({"temperature": 0}, ["temperature = 0", "more than 0"]),
        ({"temperature": 1, "greedy": True}, ["greedy"]),
        ({"split": "held"}, ["split", "did you mean 'heldout'?"]),
        ({"params": {"sise": 3}}, ["'sise'", "did you mean 'size'?"]),
        ({"params": {"size": 10**9}}, ["size"]),
        ({"params": {"agents": 5}}, ["nobody plays"]),
        ({"params": {"talk_rounds": 10**9}}, ["'talk_rounds'", "from 1 to 16"]),
        ({"agents": {"agent_0": "nobody"}}, ["unknown adapter 'nobody'"]),
        ({"agents": {"agent_9": "agent_0"}}, ["unknown agent 'agent_9'"]),
        ({"plan": {"type": "best-of-k"}}, ["no world model"]),
        ({"plan": {"type": "best-of-k", "candidates": 512, "samples": 64}}, ["plan"]),
        ({"plan": {"type": "best"}}, ["plan"]),
        ({"plan": {"type": "tree", "branch": 64}}, ["plan", "10256 turns and 160 imagined steps", "4096"]),
        ({"language": LANGUAGE}, ["agents is empty"]),
        ({"language": LANGUAGE, "agents": {"a": "agent_0"}, "task": TASK}, ["task"]),
        ([], ["JSON object"]),
        (None, ["JSON object"]),
        (3, ["JSON object"]),
    ],
)
def test_sessions_are_refused_by_name(http: httpx.Client, body: Any, words: list[str]) -> None:
    refused(http.post("/v1/sessions", json=body), 422, *words)


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff\xfe", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}", b'{"a":' * 20_000, b""],
    ids=["cut", "bytes", "deep", "digits", "deep-objects", "empty"],
)
def test_what_is_no_json(http: httpx.Client, content: bytes) -> None:
    answer = http.post("/v1/sessions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]


def test_numbers_that_are_none_and_halves_of_characters(http: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    for content in ('{"temperature": NaN}', '{"temperature": Infinity}', '{"task": "\\ud800"}', '{"\\ud800": 1}'):
        refused(http.post("/v1/sessions", content=content, headers=headers), 422)


def test_paths_and_methods(http: httpx.Client) -> None:
    refused(http.get("/v1/session"), 404, "/v1/sessions")
    refused(http.put("/v1/sessions"), 405)
    refused(http.get("/v1/sessions/nobody"), 404, "nobody")
    refused(http.delete("/v1/sessions/nobody"), 404)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"observations": {"agent_0": seen()["agent_0"]}}, ["none of agent 'agent_1'"]),
        ({"observations": {**seen(), "agent_2": seen()["agent_0"]}}, ["unknown agent 'agent_2'", "did you mean"]),
        ({"observations": seen(actions=["nort"])}, ["unknown action 'nort'", "did you mean 'north'?"]),
        ({"observations": seen(actions=[])}, ["legal_actions"]),
        ({"observations": seen(actions=["stay", "stay"])}, ["twice"]),
        ({"observations": seen("row zebra")}, ["'zebra'"]),
        ({"observations": {}}, ["observations"]),
        ({"step": 1}, ["step = 1"]),
        ({"step": "first"}, ["step"]),
        ({}, []),
    ],
)
def test_observations_are_refused_and_the_session_stands(
    http: httpx.Client, change: dict[str, Any], words: list[str]
) -> None:
    name = session(http, **FREE, seed=2)
    body = {"step": 0, "observations": seen(), **change}
    if change:
        refused(http.post(f"/v1/sessions/{name}/observe", json=body), 409 if "step = 1" in words else 422, *words)
    answer = http.post(f"/v1/sessions/{name}/observe", json={"step": 0, "observations": seen()})
    assert answer.status_code == 200
    other = session(http, **FREE, seed=2)
    there = http.post(f"/v1/sessions/{other}/observe", json={"observations": seen()}).json()
    assert [turn["token_ids"] for turn in answer.json()["turns"]] == [turn["token_ids"] for turn in there["turns"]]


def test_a_first_observation_that_is_refused_does_not_bind_the_session(http: httpx.Client) -> None:
    names = [session(http, instance=3, seed=2) for _ in range(2)]
    refused(http.post(f"/v1/sessions/{names[0]}/observe", json={"observations": seen(actions=["nort"])}), 422, "nort")
    answers = [http.post(f"/v1/sessions/{name}/step") for name in names]
    assert answers[0].status_code == 200
    tried, plain = ([turn["token_ids"] for turn in answer.json()["turns"]] for answer in answers)
    assert tried == plain


def test_a_world_of_the_clients_own(http: httpx.Client) -> None:
    name = session(http, **FREE, seed=3)
    first = http.post(f"/v1/sessions/{name}/observe", json={"observations": seen()}).json()
    assert [turn["agent"] for turn in first["turns"]] == list(AGENTS)
    for turn in first["turns"]:
        assert turn["action"] in ("north", "stay")
        assert turn["heard"] == []
        assert len(turn["token_ids"]) == len(turn["logprobs"]) == len(turn["sampled"])
    second = http.post(f"/v1/sessions/{name}/observe", json={"observations": seen("row 1 col 1")}).json()
    said = {turn["agent"]: turn["message"]["payload"] for turn in first["turns"]}
    heard = {turn["agent"]: [mail["payload"] for mail in turn["heard"]] for turn in second["turns"]}
    assert heard == {"agent_0": [said["agent_1"]], "agent_1": [said["agent_0"]]}
    refused(http.post(f"/v1/sessions/{name}/step"), 409, "observe")
    assert http.get(f"/v1/sessions/{name}").json()["step"] == 2
    assert http.delete(f"/v1/sessions/{name}").status_code == 204
    refused(http.get(f"/v1/sessions/{name}"), 404)


def test_the_same_step_again_is_the_same_answer(http: httpx.Client) -> None:
    name = session(http, instance=3, seed=1)
    once = http.post(f"/v1/sessions/{name}/step", json={"step": 0}).json()
    assert http.post(f"/v1/sessions/{name}/step", json={"step": 0}).json() == once
    assert http.get(f"/v1/sessions/{name}").json()["step"] == 1
    refused(http.post(f"/v1/sessions/{name}/step", json={"step": 5}), 409, "step = 5", "at step 1")
    refused(http.post(f"/v1/sessions/{name}/observe", json={"observations": seen()}), 409, "step")


def test_a_stream_is_the_answer_in_parts(http: httpx.Client) -> None:
    names = [session(http, instance=3, seed=9) for _ in range(2)]
    plain = http.post(f"/v1/sessions/{names[0]}/step").json()
    answer = http.post(f"/v1/sessions/{names[1]}/step", headers={"accept": "text/event-stream"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [part.split("\n") for part in answer.text.strip().split("\n\n")]
    kinds = [lines[0].removeprefix("event: ") for lines in events]
    contents = [json.loads(lines[1].removeprefix("data: ")) for lines in events]
    assert kinds == ["turn", "turn", "done"]
    whole = contents[-1]
    assert [turn["token_ids"] for turn in whole["turns"]] == [turn["token_ids"] for turn in plain["turns"]]
    for turn in contents[:2]:
        assert turn in whole["turns"]
    refused(http.post(f"/v1/sessions/{names[1]}/step", json={"step": 7, "stream": True}), 409)


def test_an_episode_ends(http: httpx.Client) -> None:
    name = session(http, instance=3)
    for _ in range(3):
        answer = http.post(f"/v1/sessions/{name}/step").json()
        if answer["done"]:
            break
    assert answer["done"]
    assert answer["success"] in (True, False)
    refused(http.post(f"/v1/sessions/{name}/step"), 409, "over")


def test_keys_sizes_and_counts(served: Callable[..., ServedTeam]) -> None:
    settings = ServiceSettings(api_key="sesame", max_sessions=2, max_body=2048, idle_s=0.6, retry_after_s=1)
    with running(create_app(served(max_context=40), settings)) as url, httpx.Client(base_url=url) as http:
        for headers in ({}, {"authorization": "Bearer sesam"}, {"authorization": "Basic sesame"}):
            answer = http.post("/v1/sessions", json={}, headers=headers)
            refused(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
            refused(http.get("/metrics", headers=headers), 401)
        assert http.get("/health").status_code == http.get("/").status_code == 200
        http.headers["authorization"] = "Bearer sesame"
        refused(http.post("/v1/sessions", content=b" " * 3000), 413, "2048")
        refused(http.post("/v1/sessions", content=iter([b" " * 1500] * 3)), 413, "2048")
        one, two = session(http, **FREE), session(http, **FREE)
        answer = http.post("/v1/sessions", json=FREE)
        refused(answer, 503, "2 sessions")
        assert int(answer.headers["retry-after"]) == 1
        long = {"observations": seen("row 0 col 1 " * 20)}
        refused(http.post(f"/v1/sessions/{one}/observe", json=long), 422, "40 tokens")
        assert http.post(f"/v1/sessions/{one}/observe", json={"observations": seen()}).status_code == 200
        time.sleep(1.5)
        refused(http.get(f"/v1/sessions/{two}"), 404)
        session(http, **FREE)


class Slow:
    """A real model that takes its time."""

    def __init__(self, model: TransformersModel, seconds: float) -> None:
        self.model = model
        self.seconds = seconds
        self.began = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.began.set()
        time.sleep(self.seconds)
        return self.model.generate(requests)


class Counting(Slow):
    """Writes down how many are asked for at once; the first of all takes a while."""

    def __init__(self, model: Any, tried: list[int]) -> None:
        super().__init__(model, 0.0)
        self.tried = tried

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.tried.append(len(requests))
        time.sleep(1.0 if len(self.tried) == 1 else 0.0)
        return self.model.generate(requests)


def test_who_is_told_to_wait_gets_the_turn_later(served: Callable[..., ServedTeam]) -> None:
    team = served()
    team.model.inner = Slow(team.model.inner, 1.0)  # type: ignore[arg-type]
    settings = ServiceSettings(timeout_s=0.3, retry_after_s=1)
    with running(create_app(team, settings)) as url, httpx.Client(base_url=url) as http:
        name = session(http, instance=3)
        answer = http.post(f"/v1/sessions/{name}/step", json={"step": 0})
        refused(answer, 503, "step 0")
        assert answer.headers["retry-after"] == "1"
        refused(http.post(f"/v1/sessions/{name}/step"), 409, "writing")
        deadline = time.monotonic() + 20
        while (answer := http.post(f"/v1/sessions/{name}/step", json={"step": 0})).status_code == 503:
            assert time.monotonic() < deadline
        assert answer.status_code == 200
        assert http.get(f"/v1/sessions/{name}").json()["step"] == 1


def test_what_is_being_written_at_the_end_is_finished(served: Callable[..., ServedTeam]) -> None:
    team = served()
    slow = Slow(team.model.inner, 1.5)  # type: ignore[arg-type]
    team.model.inner = slow  # type: ignore[assignment]
    found: list[httpx.Response] = []
    with running(create_app(team)) as url:
        name = session(httpx.Client(base_url=url), instance=3)
        asking = threading.Thread(target=lambda: found.append(httpx.post(f"{url}/v1/sessions/{name}/step", timeout=20)))
        asking.start()
        assert slow.began.wait(20)
    asking.join(20)
    assert found[0].status_code == 200
    assert len(found[0].json()["turns"]) == 2


def test_a_batch_fails_only_for_who_broke_it(model: TransformersModel) -> None:
    tried: list[int] = []
    common = SharedModel(Counting(model, tried), 4096)  # type: ignore[arg-type]
    good = GenerateRequest((5, 6, 7), 1, "agent_0", max_tokens=4)
    bad = GenerateRequest((5, 6, 7), 1, "nobody", max_tokens=4)
    expected = model.generate([good])[0].ids
    answers: dict[int, Any] = {}

    def ask(number: int) -> None:
        try:
            answers[number] = common.generate([bad if number == 3 else good])[0].ids
        except Exception as error:
            answers[number] = error

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(9)]
    threads[8].start()  # while it is being answered, the others queue up
    deadline = time.monotonic() + 20
    while not tried:
        assert time.monotonic() < deadline
    for thread in threads[:8]:
        thread.start()
    for thread in threads:
        thread.join(30)
    common.close()
    assert tried[0] == 1
    assert max(tried) > 1, "nothing was ever answered together"
    assert sum(tried[1:]) > 8, "who shares a batch with a bad call is asked for again, alone"
    assert "unknown adapter 'nobody'" in str(answers.pop(3))
    assert set(answers.values()) == {expected}
    assert len(answers) == 8


def test_episodes_are_as_long_as_the_service_allows(served: Callable[..., ServedTeam]) -> None:
    team = served()
    own = make_env(TASK, team.params, 0, "heldout").horizon
    with running(create_app(team, ServiceSettings(max_steps=2 * own))) as url, httpx.Client(base_url=url) as http:
        session(http, params={"talk_rounds": 2})
        refused(http.post("/v1/sessions", json={"params": {"talk_rounds": 3}}), 422, f"{3 * own} steps")
    with running(create_app(served(), ServiceSettings(max_steps=1))) as url, httpx.Client(base_url=url) as http:
        session(http)


def test_an_engine_that_is_away_is_not_the_requests_fault(served: Callable[..., ServedTeam]) -> None:
    """All who wait in one batch are told at once, to ask again; and then they get it."""
    team = served()
    inner, calls = team.model.inner, threading.Semaphore(0)
    away = threading.Event()
    away.set()

    class Away(Slow):
        def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
            if not away.is_set():
                return inner.generate(requests)
            calls.release()
            self.began.set()
            time.sleep(0.5)
            raise EngineAwayError("vLLM gave no answer within 900 s")

    slow = Away(inner, 0.5)  # type: ignore[arg-type]
    team.model.inner = slow  # type: ignore[assignment]
    with running(create_app(team)) as url, httpx.Client(base_url=url, timeout=30) as http:
        name = session(http, instance=3)
        answer = http.post(f"/v1/sessions/{name}/step", json={"step": 0})
        refused(answer, 503, "no answer within 900 s")
        assert int(answer.headers["retry-after"]) > 0
        answer = http.post("/v1/completions", json={"model": "agent_0", "prompt": "row"})
        refused(answer, 503)
        while calls.acquire(blocking=False):
            pass
        failed: list[Exception] = []

        def ask(number: int) -> None:
            try:
                team.model.generate([GenerateRequest((5, 6, 7), number, "agent_0", max_tokens=4)])
            except Exception as error:
                failed.append(error)

        slow.began.clear()
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        threads[0].start()
        assert slow.began.wait(20)
        for thread in threads[1:]:  # these wait for the first, and then for one answer together
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [type(error) for error in failed] == [EngineAwayError] * 6
        tried = 0
        while calls.acquire(blocking=False):
            tried += 1
        assert tried <= 3
        away.clear()
        assert http.post(f"/v1/sessions/{name}/step", json={"step": 0}).status_code == 200


def test_open_paths_wait_for_no_body(served: Callable[..., ServedTeam]) -> None:
    settings = ServiceSettings(api_key="sesame", max_requests=1)
    with running(create_app(served(), settings)) as url, contextlib.ExitStack() as stack:
        host, port = url.removeprefix("http://").split(":")
        for path in ("/health", "/", "/docs", "/v1/agents"):
            line = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            line.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{{".encode())
            said = line.recv(4096).decode().lower()
            assert said.split()[1] in ("405", "401")
            assert path == "/v1/agents" or "connection: close" in said
        for _ in range(2):
            answer = httpx.get(f"{url}/v1/agents", headers={"authorization": "Bearer sesame"})
            assert answer.status_code == 200, answer.text


def test_clients_cannot_invent_figures(served: Callable[..., ServedTeam]) -> None:
    app = create_app(served())

    async def ask() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            for number in range(5):
                await client.request(f"FROB{number}", "/health")

    asyncio.run(ask())
    with running(app) as url, httpx.Client(base_url=url) as http:
        agents = {"north": "agent_0", "agent_1": "agent_1"}
        name = session(http, language=LANGUAGE, agents=agents)
        views = dict(zip(agents, seen().values(), strict=True))
        assert http.post(f"/v1/sessions/{name}/observe", json={"observations": views}).status_code == 200
        text = http.get("/metrics").text
    assert "FROB" not in text
    assert 'preconcert_requests_total{method="other",' in text
    assert 'agent="north"' not in text
    assert 'preconcert_turns_total{agent="other",' in text
    assert 'preconcert_turns_total{agent="agent_1",' in text


def test_places_have_the_same_number_of_coordinates(served: Callable[..., ServedTeam]) -> None:
    team = served(channel=ChannelSettings(topology=Nearest(k=1)))
    with running(create_app(team)) as url, httpx.Client(base_url=url) as http:
        name = session(http, **FREE)
        for places, words in (
            ({"agent_0": [1, 2]}, "positions are needed of all"),
            ({"agent_0": [1, 2], "agent_1": [1]}, "'agent_0' has 2 coordinates and 'agent_1' 1"),
        ):
            body = {"observations": seen(), "positions": places}
            refused(http.post(f"/v1/sessions/{name}/observe", json=body), 422, words)
        body["positions"] = {"agent_0": [1, 2], "agent_1": [1, 1]}
        for _ in range(2):
            assert http.post(f"/v1/sessions/{name}/observe", json=body).status_code == 200


def test_a_session_that_takes_too_long_to_open_is_none(
    served: Callable[..., ServedTeam], monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, closed = threading.Event(), threading.Event()

    class Stuck(Session):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            assert goes_on.wait(20)

        def close(self) -> None:
            super().close()
            closed.set()

    settings = ServiceSettings(timeout_s=0.3, max_sessions=1)
    with running(create_app(served(), settings)) as url, httpx.Client(base_url=url, timeout=20) as http:
        with monkeypatch.context() as patch:
            patch.setattr("preconcert.serving.sessions.Session", Stuck)
            answer = http.post("/v1/sessions", json={})
        refused(answer, 503, "not open within 0.3 s")
        assert int(answer.headers["retry-after"]) > 0
        refused(http.post("/v1/sessions", json={}), 503, "1 sessions")  # its thread is not free yet
        goes_on.set()
        assert closed.wait(20)
        assert http.get("/ready").json()["sessions"] == 0
        deadline = time.monotonic() + 20
        while (answer := http.post("/v1/sessions", json={})).status_code == 503:
            assert time.monotonic() < deadline
        assert answer.status_code == 201
