"""The service under load: clients that behave and clients that do not, every answer held against a rollout.

    .venv/bin/python -m benchmarks.load RUN [--engine transformers] [--sessions 64] [--seconds 120] [--kill] [--json]
    .venv/bin/python -m benchmarks.load RUN --overhead [--engine transformers] [--sessions 32] [--width 512] [--json]

The first starts `preconcert serve` and plays on it: `--sessions` clients open sessions, go through whole episodes by
`observe`, `step` or streams, break connections off in the middle and ask again, or leave without a word; beside them
others send what is no JSON, wrong keys, bodies and contexts that are too long, half requests and noise, and OpenAI
clients ask for texts. Every turn is compared with the one that `rollout` writes for the same instance and seed. With
`--kill` the vLLM process is killed in the middle. The exit code is 1 if any answer was wrong.

The second says what the service costs: sessions over HTTP beside the same turns on the bare engine, where the team
decides all agents of a step in one call. What both are asked was written beforehand, worlds and records included, and
both have been asked all of it before. They take turns, and who is first does too. `--engine vllm` gives each side a
vLLM server of its own, so that a GPU needs room for two (`-- vllm.memory=0.4`). `--width` takes a model of random
weights of that width in place of the run's own. Only loopback addresses are used.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from preconcert.agents import GenerativeTeam
from preconcert.config import section
from preconcert.core import Episode, Turn, TurnRequest, derive_seed
from preconcert.envs import make_env
from preconcert.models import LanguageModel, StarterSettings, TransformersModel, VLLMSettings, build_starter
from preconcert.prompts import starter_words
from preconcert.serving.launch import start_vllm_engine
from preconcert.serving.metrics import Metrics
from preconcert.serving.settings import ServiceSettings
from preconcert.training.json_file import write_json
from preconcert.training.recipe import Recipe
from preconcert.training.rollout import EpisodeSpec, rollout
from preconcert.training.run_folder import adapter_names, assign, load_model, load_recipe_of

EPISODES = 48
"""Different ones; clients take them at random, often the same at the same time."""
_ROOT = Path(__file__).parents[1]


@dataclass
class Tally:
    """What happened."""

    turns: int = 0
    episodes: int = 0
    wrong: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    """Seconds per answered step."""
    repeats: int = 0
    """Steps asked for again after a connection was broken off."""
    again: int = 0
    """Requests sent again after a 503."""
    lost: int = 0
    """Connections that broke by themselves."""
    bad: Counter[str] = field(default_factory=Counter)
    """Misbehaviour, by kind, that was answered as it should be."""
    texts: int = 0

    def fail(self, what: str) -> None:
        """Keep the first failures in words, count all."""
        self.wrong.append(what)


@dataclass(frozen=True)
class Game:
    """One episode that is known, as requests and expected turns."""

    seed: int
    episode: Episode

    def opening(self) -> dict[str, Any]:
        """The body that opens its session."""
        return {"task": self.episode.task, "instance": self.episode.seed, "seed": self.seed}

    def views(self, step: int) -> dict[str, Any]:
        """The body that asks for a step's turns."""
        return {
            agent: {
                "text": each.turns[step].observation.text,
                "legal_actions": list(each.turns[step].observation.legal_actions),
                "fields": dict(each.turns[step].observation.fields),
                "sees": list(each.turns[step].observation.sees),
            }
            for agent, each in self.episode.trajectories.items()
        }

    def differs(self, step: int, turns: Sequence[dict[str, Any]]) -> str | None:
        """Where an answer is not what a rollout wrote; None if nowhere."""
        if [turn["agent"] for turn in turns] != list(self.episode.trajectories):
            return f"agents {[turn['agent'] for turn in turns]}"
        for turn in turns:
            wanted = self.episode.trajectories[turn["agent"]].turns[step]
            said = None if wanted.message is None else wanted.message.payload
            heard = [(mail["sender"], mail["payload"]) for mail in turn["heard"]]
            if turn["action"] != wanted.action or tuple(turn["token_ids"]) != wanted.completion_ids:
                return f"{turn['agent']} at step {step}: {turn['text']!r} for {wanted.text!r}"
            if (turn["message"] or {}).get("payload") != said:
                return f"{turn['agent']} at step {step} says {turn['message']!r} for {said!r}"
            if heard != [(mail.sender, mail.payload) for mail in wanted.inbox]:
                return f"{turn['agent']} at step {step} heard {heard!r}"
            if max(map(abs, map(float.__sub__, turn["logprobs"], wanted.logprobs)), default=0.0) > 2e-3:
                return f"{turn['agent']} at step {step}: other log-probabilities"
        return None


class Player:
    """One client that plays episode after episode, not always politely."""

    def __init__(self, http: httpx.AsyncClient, games: Sequence[Game], number: int, tally: Tally, until: float) -> None:
        self.http, self.games, self.tally, self.until = http, games, tally, until
        self.rng = random.Random(number)

    async def run(self) -> None:
        """Play until the time is over; the episode that is under way is finished."""
        while time.monotonic() < self.until:
            game = self.rng.choice(self.games)
            try:
                await self.play(game)
            except Exception as error:
                self.tally.fail(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.5)

    async def play(self, game: Game) -> None:
        """One episode, to its end or left in the middle."""
        opened = await self.ask("POST", "/v1/sessions", game.opening(), 201)
        place = f"/v1/sessions/{opened['id']}"
        own = self.rng.random() < 0.3
        leave = self.rng.random() < 0.05
        for step in range(game.episode.steps):
            if leave and step == game.episode.steps // 2:
                return  # the session is left to expire
            body: dict[str, Any] = {"step": step}
            if not own:
                body["observations"] = game.views(step)
            path = f"{place}/{'step' if own else 'observe'}"
            if self.rng.random() < 0.08:
                await self.break_off(path, body)
            began = time.monotonic()
            stream = self.rng.random() < 0.25
            turns = await self.streamed(path, body) if stream else (await self.ask("POST", path, body, 200))["turns"]
            self.tally.waits.append(time.monotonic() - began)
            self.tally.turns += len(turns)
            if (found := game.differs(step, turns)) is not None:
                self.tally.fail(f"instance {game.episode.seed}, seed {game.seed}: {found}")
                break
        self.tally.episodes += 1
        with suppress(httpx.TransportError):
            await self.ask("DELETE", place, None, 204)

    async def ask(self, method: str, path: str, body: Any, wanted: int) -> Any:
        """An answer; 503 and broken connections are asked again, as the service says."""
        deadline = time.monotonic() + 900
        while True:
            try:
                answer = await self.http.request(method, path, json=body)
            except httpx.TransportError:  # an idle connection that was closed just then, say
                self.tally.lost += 1
                if method == "DELETE" or time.monotonic() > deadline:
                    raise
                continue
            self.tally.statuses[answer.status_code] += 1
            if answer.status_code == 503 or (answer.status_code == 409 and "busy" in answer.text):
                if "retry-after" not in answer.headers:
                    self.tally.fail(f"{answer.status_code} without Retry-After: {answer.text}")
                self.tally.again += 1
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} is refused for a quarter of an hour: {answer.text}")
                await asyncio.sleep(float(answer.headers.get("retry-after", 1)))
                continue
            if answer.status_code != wanted:
                raise ValueError(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
            return answer.json() if answer.content else None

    async def streamed(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The same step as events; whatever breaks the stream, the plain answer has the same turns."""
        headers = {"accept": "text/event-stream"}
        early: list[dict[str, Any]] = []
        try:
            async with self.http.stream("POST", path, json=body, headers=headers) as answer:
                self.tally.statuses[answer.status_code] += 1
                kind = ""
                async for line in answer.aiter_lines():
                    if line.startswith("event: "):
                        kind = line[7:]
                    elif line.startswith("data: ") and kind == "turn":
                        early.append(json.loads(line[6:]))
                    elif line.startswith("data: ") and kind == "done":
                        turns: list[dict[str, Any]] = json.loads(line[6:])["turns"]
                        if sorted(each["agent"] for each in early) != sorted(each["agent"] for each in turns):
                            self.tally.fail(f"a stream had turns of {[each['agent'] for each in early]} only")
                        return turns
        except httpx.TransportError:
            self.tally.lost += 1
        found: list[dict[str, Any]] = (await self.ask("POST", path, body, 200))["turns"]
        return found

    async def break_off(self, path: str, body: dict[str, Any]) -> None:
        """Ask, and hang up before the answer is there."""
        self.tally.repeats += 1
        with suppress(httpx.HTTPError, TimeoutError):
            await asyncio.wait_for(self.http.post(path, json=body), self.rng.uniform(0.001, 0.05))


async def misbehave(url: str, key: str, tally: Tally, until: float, number: int, limit: int) -> None:
    """One client that sends what nobody should."""
    rng = random.Random(1000 + number)
    port = int(url.rpartition(":")[2])
    json_type = {"content-type": "application/json"}
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as http:
        good = {"authorization": f"Bearer {key}"}

        async def wanted(kind: str, codes: Sequence[int], **request: Any) -> None:
            headers = {**good, **json_type, **request.pop("headers", {})}
            path = request.pop("path", "/v1/sessions")
            try:
                answer = await http.request(request.pop("method", "POST"), path, headers=headers, **request)
            except httpx.HTTPError as error:
                if isinstance(error, httpx.TimeoutException):
                    tally.fail(f"{kind}: {type(error).__name__}: {error}")
                else:  # the service hangs up on what it will not read, and on idle connections
                    tally.lost += 1
                return
            tally.statuses[answer.status_code] += 1
            if answer.status_code == 503 and "retry-after" in answer.headers:
                return
            if answer.status_code not in codes or "message" not in answer.json().get("error", {}):
                tally.fail(f"{kind}: {answer.status_code} {answer.text[:200]}")
            else:
                tally.bad[kind] += 1

        async def noise() -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(rng.choice([b"\x00\xff\x16\x03 no\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/sessions"]))
            with suppress(ConnectionError):
                await writer.drain()
            writer.close()
            tally.bad["noise"] += 1

        async def half() -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"POST /v1/sessions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
            writer.write(f"{head}content-length: 500\r\n\r\n{{".encode())
            with suppress(ConnectionError):
                await writer.drain()
            await asyncio.sleep(0.05)
            writer.close()
            tally.bad["half a body"] += 1

        texts, views = "/v1/completions", "/v1/sessions/x/observe"
        nobody = f"/v1/sessions/{secrets.token_urlsafe(16)}/step"
        seen = {"agent": {"text": "word " * 10_000, "legal_actions": ["x"]}}
        short = {"model": "agent_0", "prompt": "north"}
        long = {**short, "prompt": "north " * (limit // 7)}
        while time.monotonic() < until:
            await rng.choice(
                [
                    lambda: wanted("no JSON", [400, 422], content=rng.choice([b"{", b"\xff\xfe", b"[" * 50_000, b""])),
                    lambda: wanted("NaN", [422], content=b'{"temperature": NaN}'),
                    lambda: wanted("wrong type", [422], json={"seed": rng.choice([[], {}, "x", -1, 10**30, 1.5])}),
                    lambda: wanted("unknown key", [422], json={"sead": 1}),
                    lambda: wanted("wrong key", [401], json={}, headers={"authorization": "Bearer wrong"}),
                    lambda: wanted("no key", [401], method="GET", path="/metrics", headers={"authorization": ""}),
                    lambda: wanted("long body", [413], content=b" " * (limit + 1)),
                    lambda: wanted("nobody's session", [404], path=nobody, json={}),
                    lambda: wanted("long context", [422], path=texts, json=long),
                    lambda: wanted("no such model", [404], path=texts, json={**short, "model": "x"}),
                    lambda: wanted("smuggled", [422], path=texts, json={**short, "vllm_xargs": {"a": 1}}),
                    lambda: wanted("wrong views", [404, 422], path=views, json={"observations": seen}),
                    noise,
                    half,
                ]
            )()
            await asyncio.sleep(rng.uniform(0.05, 0.4))


async def converse(http: httpx.AsyncClient, agents: Sequence[str], tally: Tally, until: float, number: int) -> None:
    """One OpenAI client; greedy texts have to stay what they were."""
    rng = random.Random(2000 + number)
    known: dict[tuple[str, str], str] = {}
    while time.monotonic() < until:
        agent, prompt = rng.choice(agents), rng.choice(["row 1 col 2", "last none", "north south"])
        body = {"model": agent, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        answer = await http.post("/v1/completions", json=body)
        tally.statuses[answer.status_code] += 1
        if answer.status_code == 503 and "retry-after" in answer.headers:
            await asyncio.sleep(float(answer.headers["retry-after"]))
            continue
        if answer.status_code != 200:
            tally.fail(f"completion: {answer.status_code} {answer.text[:200]}")
            continue
        text = answer.json()["choices"][0]["text"]
        if known.setdefault((agent, prompt), text) != text:
            tally.fail(f"completion of {prompt!r} by {agent}: {text!r} for {known[agent, prompt]!r}")
        tally.texts += 1
        await asyncio.sleep(rng.uniform(0.1, 0.5))


@contextmanager
def service(run: Path, engine: str, key: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`preconcert serve` on a free loopback port; stopped by SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "preconcert.cli", "serve", str(run), "--port", str(port), "--engine", engine]
    environment = {**os.environ, "PRECONCERT_API_KEY": key}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, *options], cwd=_ROOT, env=environment, stderr=log, stdout=log, text=True)
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 900
            while True:
                with suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/ready", timeout=5, trust_env=False).status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(f"the service did not start: {log.read()[-2000:]}")
                time.sleep(0.25)
            yield process, url
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(120)
            if process.poll() is None:
                process.kill()
            log.seek(0)
            said = [line for line in log.read().splitlines() if "vLLM" in line or "Error" in line or "failed" in line]
            for line in said[-12:]:
                print(f"service: {line[:200]}", file=sys.stderr)


def descendants(pid: int) -> list[int]:
    """Processes below one, by /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def resident_mib(pids: Sequence[int]) -> float:
    """Memory of processes together."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total / 2**20


class Noting(GenerativeTeam):
    """A team that keeps what it was asked, call by call."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked: list[Sequence[TurnRequest]] = []

    def decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """As the team does."""
        self.asked.append(requests)
        return super().decide(requests)


def played(model: LanguageModel, recipe: Recipe, count: int, seed: int) -> tuple[list[Game], Noting]:
    """Episodes as a rollout in this process plays them, and the team that did."""
    env = make_env(recipe.task, recipe.params, 0, "heldout")
    team = Noting(model, env.language, recipe.agent, assign(recipe, env))
    specs = [EpisodeSpec(recipe.task, recipe.params, number, "heldout") for number in range(100, 100 + count)]
    return [Game(seed, each) for each in rollout(specs, team, recipe.channel, derive_seed(seed, "eval"))], team


def known_games(model: LanguageModel, recipe: Recipe, count: int, seeds: Sequence[int] = (0, 1)) -> list[Game]:
    """Episodes by several seeds of the choices, as many of each."""
    return [game for seed in seeds for game in played(model, recipe, count // len(seeds), seed)[0]]


async def load(
    process: subprocess.Popen[str], url: str, key: str, games: Sequence[Game], asked: argparse.Namespace, limit: int
) -> dict[str, Any]:
    """The load itself, and what was seen."""
    tally, began = Tally(), time.monotonic()
    until = began + asked.seconds
    headers = {"authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=asked.sessions + 32)
    memory: list[tuple[float, float, float]] = []
    kill: dict[str, Any] = {}
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=300, limits=limits, trust_env=False
    ) as http:
        agents = [each["name"] for each in (await http.get("/v1/agents")).json()["agents"]]

        async def watch() -> None:
            while time.monotonic() < until:
                below = descendants(process.pid)
                memory.append((time.monotonic() - began, resident_mib([process.pid]), resident_mib(below)))
                await asyncio.sleep(1.0)

        async def strike() -> None:
            await asyncio.sleep(asked.seconds / 2)
            victims = descendants(process.pid)
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            struck = time.monotonic()
            kill["processes"] = len(victims)
            kill["turns_before"] = tally.turns
            await asyncio.sleep(1.0)
            while (await http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.25)
            kill["recovered_after_s"] = round(time.monotonic() - struck, 1)

        work = [Player(http, games, number, tally, until).run() for number in range(asked.sessions)]
        work += [misbehave(url, key, tally, until, number, limit) for number in range(4)]
        work += [converse(http, agents, tally, until, number) for number in range(2)]
        work += [watch()] + ([strike()] if asked.kill else [])
        await asyncio.gather(*work)
        took = time.monotonic() - began
        if kill:
            kill["turns_after"] = tally.turns - kill.pop("turns_before")
        await asyncio.sleep(1.0)
        figures = (await http.get("/metrics")).text
    fives = {code: count for code, count in tally.statuses.items() if code >= 500 and code != 503}
    waits = sorted(tally.waits)
    settled = [own for when, own, _ in memory if when > asked.seconds / 4]
    return {
        "engine": asked.engine,
        "sessions": asked.sessions,
        "seconds": round(took, 1),
        "episodes": tally.episodes,
        "turns": tally.turns,
        "turns_per_s": round(tally.turns / took, 1),
        "step_ms": {
            "median": round(1000 * statistics.median(waits), 1),
            "p95": round(1000 * waits[int(0.95 * len(waits))], 1),
            "max": round(1000 * waits[-1], 1),
        },
        "wrong_answers": len(tally.wrong),
        "first_wrong": tally.wrong[:5],
        "5xx_but_503": fives,
        "503_with_retry_after": tally.statuses[503],
        "statuses": dict(sorted(tally.statuses.items())),
        "broken_off_and_asked_again": tally.repeats,
        "connections_lost": tally.lost,
        "refused_as_documented": dict(sorted(tally.bad.items())),
        "openai_texts": tally.texts,
        "memory_mib": {
            "service_at_a_quarter": round(settled[0], 1),
            "service_at_the_end": round(settled[-1], 1),
            "service_highest": round(max(own for _, own, _ in memory), 1),
            "engine_at_the_end": round(memory[-1][2], 1),
        },
        "engine_restarts": _metric(figures, "preconcert_engine_restarts_total"),
        **({"killed": kill} if kill else {}),
    }


def _metric(text: str, name: str) -> float | None:
    found = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(found[0].rpartition(" ")[2]) if found else None


def random_run(recipe: Recipe, folder: Path, width: int) -> Path:
    """A run like another one, with random weights of some width."""
    env = make_env(recipe.task, recipe.params, 0, "heldout")
    heads = max(1, width // 64)
    shape = StarterSettings(layers=8, width=width, heads=heads, kv_heads=heads, ffn=3 * width, max_context=1024)
    words = starter_words(env.words, env.language, env.agents)  # type: ignore[attr-defined]
    build_starter(words, folder / "base", seed=0, settings=shape)
    model = TransformersModel.load(folder / "base", recipe.lora, recipe.dtype)
    for name in adapter_names(recipe, assign(recipe, env)):
        model.add_adapter(name, 0)
        model.save_adapter(name, folder / "adapters" / name)
    write_json(folder / "recipe.json", recipe.model_copy(update={"world_model": None}).model_dump(mode="json"))
    return folder


class Line:
    """A client that costs next to nothing: one connection, requests written beforehand."""

    def __init__(self, port: int, key: str) -> None:
        self.port, self.key = port, key

    async def open(self) -> None:
        """Connect."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, path: str, body: bytes, method: str = "POST") -> bytes:
        """The body of the answer."""
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.key}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        said = await self.reader.readuntil(b"\r\n\r\n")
        lengths = (int(line[15:]) for line in said.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        length = next(lengths, 0)
        content = await self.reader.readexactly(length)
        if b" 20" not in said[:16]:
            sys.exit(f"{path}: {said[:100]!r} {content[:300]!r}")
        return content


async def over_http(port: int, key: str, games: Sequence[Game]) -> tuple[float, list[list[bytes]]]:
    """Seconds to play these episodes, all at once, and the answers by episode and step."""
    lines = [Line(port, key) for _ in games]
    places: list[str] = []
    for line, game in zip(lines, games, strict=True):
        await line.open()
        places.append(json.loads(await line.ask("/v1/sessions", json.dumps(game.opening()).encode()))["id"])
    bodies = [
        [json.dumps({"step": step, "observations": game.views(step)}).encode() for step in range(game.episode.steps)]
        for game in games
    ]

    async def play(line: Line, place: str, asked: Sequence[bytes]) -> list[bytes]:
        return [await line.ask(f"/v1/sessions/{place}/observe", body) for body in asked]

    began = time.perf_counter()
    answers = await asyncio.gather(*(play(*each) for each in zip(lines, places, bodies, strict=True)))
    took = time.perf_counter() - began
    for line, place in zip(lines, places, strict=True):
        await line.ask(f"/v1/sessions/{place}", b"", "DELETE")
        line.writer.close()
    return took, answers


def on_engine(team: Noting, asked: Sequence[Sequence[TurnRequest]]) -> float:
    """Seconds to decide the same turns with nothing around the team, from an empty memory."""
    mine = team.apart()
    began = time.perf_counter()
    for requests in asked:
        GenerativeTeam.decide(mine, requests)
    took = time.perf_counter() - began
    for episode in {request.episode for requests in asked for request in requests}:
        mine.finish(episode)
    return took


@contextmanager
def bare_model(run: Path, recipe: Recipe, asked: argparse.Namespace) -> Iterator[LanguageModel]:
    """The engine as the service has it, without the service."""
    if asked.engine == "transformers":
        yield load_model(recipe, run, run / "adapters")
        return
    own = [each.removeprefix("vllm.") for each in asked.options if each.startswith("vllm.")]
    vllm = section(VLLMSettings, own, "vllm.")
    writer, model = start_vllm_engine(run, recipe, vllm, ServiceSettings(), Metrics(), lambda text: None)
    try:
        yield model.inner
    finally:
        model.close()
        writer.close()


def overhead(run: Path, recipe: Recipe, asked: argparse.Namespace) -> dict[str, Any]:
    """Sessions over HTTP and the same turns on the bare engine: turns per second, and processor time per turn of the
    process itself, which other work on the machine does not change (that of a vLLM server is not in it)."""
    key = secrets.token_urlsafe(12)
    walls: dict[str, list[float]] = {"bare": [], "served": []}
    spent: dict[str, list[float]] = {"bare": [], "served": []}
    headers = {"authorization": f"Bearer {key}"}
    with bare_model(run, recipe, asked) as model, service(run, asked.engine, key, *asked.options) as (process, url):
        games, team = played(model, recipe, asked.sessions, 0)
        turns = sum(len(each.turns) for game in games for each in game.episode.trajectories.values())
        port = int(url.rpartition(":")[2])
        for repetition in range(asked.repetitions + 1):
            found: dict[str, tuple[float, float]] = {}
            for name in ("bare", "served") if repetition % 2 else ("served", "bare"):
                used = _used_s(name, process.pid)
                if name == "bare":
                    wall = on_engine(team, team.asked)
                else:
                    wall, answers = asyncio.run(over_http(port, key, games))
                found[name] = wall, _used_s(name, process.pid) - used
            if not repetition:  # warms up, and shows that both do the same
                _compare(games, answers)
                continue
            for name, (wall, cpu) in found.items():
                walls[name].append(wall)
                spent[name].append(cpu)
        figures = httpx.get(f"{url}/metrics", headers=headers, trust_env=False).text
    rows = _metric(figures, "preconcert_model_rows_sum") or 0
    ratios = [
        [there / here - 1 for there, here in zip(each["served"], each["bare"], strict=True)] for each in (walls, spent)
    ]
    return {
        "engine": asked.engine,
        **({"parameters": sum(map(torch.numel, model.base.parameters()))} if hasattr(model, "base") else {}),
        "sessions": asked.sessions,
        "turns": turns,
        "repetitions": asked.repetitions,
        **{f"{name}_turns_per_s": _spread([turns / one for one in each], 1) for name, each in walls.items()},
        **{f"{name}_cpu_ms_per_turn": _spread([1000 * one / turns for one in each], 3) for name, each in spent.items()},
        "rows_per_call": round(rows / (_metric(figures, "preconcert_model_rows_count") or 1), 1),
        "overhead_wall": _spread(ratios[0], 3),
        "overhead_cpu": _spread(ratios[1], 3),
    }


def _used_s(side: str, pid: int) -> float:
    return time.process_time() if side == "bare" else processor_s(pid)


def _compare(games: Sequence[Game], answers: Sequence[Sequence[bytes]]) -> None:
    """Did the service decide what the rollout decided?"""
    for game, steps in zip(games, answers, strict=True):
        for step, answer in enumerate(steps):
            if (wrong := game.differs(step, json.loads(answer)["turns"])) is not None:
                sys.exit(f"instance {game.episode.seed}: {wrong}")


def _spread(values: Sequence[float], digits: int) -> dict[str, float]:
    """Median, least and most."""
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def processor_s(pid: int) -> float:
    """Processor time of a process so far, all threads, in seconds."""
    parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Read the arguments, do it, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--engine", default="transformers", choices=["transformers", "vllm"])
    parser.add_argument("--sessions", type=int, help="64, and 32 with --overhead, if not given")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--width", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("options", nargs="*", help="for `preconcert serve`, after --")
    asked = parser.parse_args()
    asked.sessions = asked.sessions or (32 if asked.overhead else 64)
    if asked.kill and asked.engine != "vllm":
        parser.error("--kill needs --engine vllm: the embedded engine is the service itself")
    recipe = load_recipe_of(asked.run)
    with tempfile.TemporaryDirectory() as folder:
        run = asked.run if asked.width is None else random_run(recipe, Path(folder), asked.width)
        if asked.overhead:
            found = overhead(run, recipe, asked)
        else:
            games = known_games(load_model(recipe, run, run / "adapters"), recipe, EPISODES)
            key, limit = secrets.token_urlsafe(12), 65_536
            own = ["--max-sessions", str(asked.sessions + 8), "--idle", "60", "--max-body", str(limit), *asked.options]
            with service(run, asked.engine, key, *own) as (process, url):
                found = asyncio.run(load(process, url, key, games, asked, limit))
            found["ended_with"] = process.returncode
    if asked.json:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            print(f"{name:28} {value}")
    if found.get("wrong_answers") or found.get("5xx_but_503") or found.get("ended_with"):
        sys.exit(1)


if __name__ == "__main__":
    main()
