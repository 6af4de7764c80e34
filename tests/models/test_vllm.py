"""The backend on the real vLLM, in this process and as a server: one engine each for the whole session.

The engine of this process keeps what prompts have in common, the server does not, so that both ways are tested.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preconcert.agents import AgentSettings, ChannelSettings, GenerativeTeam
from preconcert.core import ModelError
from preconcert.envs import make_env
from preconcert.models import (
    ChoiceRequest,
    GenerateRequest,
    ScoreRequest,
    TransformersModel,
    VLLMSettings,
    check_backend,
)
from preconcert.models.vllm_model import VLLMModel
from preconcert.models.vllm_server import VLLMServer
from preconcert.models.vllm_start import vllm_builds
from preconcert.training.rollout import EpisodeSpec, rollout
from tests.models.checkpoints import WORDS
from tests.models.vllm_worlds import LORA, TASK, build_base, build_reference, distance, requests

pytestmark = [
    pytest.mark.skipif(not vllm_builds(), reason="vLLM is not installed"),
    pytest.mark.xdist_group("vllm"),  # one worker, so that the engines are started once
]
SETTINGS = VLLMSettings(memory=0.1, max_rows=64, latents=True, timeout_s=300.0)
KINDS = ("embedded", "server")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as patch:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # What vLLM knows of model classes may stay where it is: to find it out takes as long as to start an engine.
        patch.setenv("VLLM_CACHE_ROOT", os.environ.get("VLLM_CACHE_ROOT") or str(cache / "vllm"))
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        yield root


@pytest.fixture(scope="session")
def base(place: Path) -> Path:
    return build_base(place)


@pytest.fixture(scope="session")
def reference(base: Path, place: Path) -> TransformersModel:
    return build_reference(base, place)


@pytest.fixture(scope="session")
def server(base: Path, reference: TransformersModel, place: Path) -> Iterator[VLLMServer]:
    adapters = {name: place / name for name in ("red", "blue")}
    settings = SETTINGS.model_copy(update={"prefix_caching": False, "api_key": "secret"})
    with VLLMServer(base, LORA, adapters, settings=settings, log=place / "server.log") as made:
        yield made


@pytest.fixture(scope="session")
def engines(base: Path, reference: TransformersModel, place: Path) -> Iterator[Callable[[str], VLLMModel]]:
    made: dict[str, VLLMModel] = {}

    def start() -> VLLMModel:
        model = VLLMModel.load(base, LORA, settings=SETTINGS)
        for name in ("red", "blue"):
            model.load_adapter(name, place / name)
        return model

    yield lambda kind: made.setdefault(kind, made.get(kind) or start())
    for model in made.values():
        model.close()


@pytest.fixture
def model(request: pytest.FixtureRequest, base: Path, place: Path) -> Iterator[VLLMModel]:
    """Each kind in turn, by indirect parametrisation."""
    if request.param == "embedded":
        yield request.getfixturevalue("engines")("embedded")
        return
    made = connect(request.getfixturevalue("server"), base, place)
    yield made
    made.close()


def connect(server: VLLMServer, base: Path, place: Path, **changes: Any) -> VLLMModel:
    settings = SETTINGS.model_copy(update={"url": server.url, "api_key": "secret", **changes})
    made = VLLMModel.load(base, LORA, settings=settings)
    for name in ("red", "blue"):
        made.load_adapter(name, place / name)
    return made


both = pytest.mark.parametrize("model", KINDS, indirect=True)
embedded = pytest.mark.parametrize("model", ["embedded"], indirect=True)


@both
def test_it_keeps_the_contract(model: VLLMModel) -> None:
    assert len(check_backend(model, WORDS)) == 14
    assert model.adapters == ("red", "blue")


@both
@pytest.mark.parametrize("latents", [False, True])
def test_it_writes_what_transformers_writes(model: VLLMModel, reference: TransformersModel, latents: bool) -> None:
    asked = requests(reference, 60, latents)
    expected = reference.generate(asked)
    assert distance(model.generate(asked), expected) < 1e-4
    # Once more, with what the first time left in the prefix cache.
    assert distance(model.generate(asked[::-1]), expected[::-1]) < 1e-4


@both
def test_scores_and_choices_are_those_of_transformers(model: VLLMModel, reference: TransformersModel) -> None:
    asked = requests(reference, 30) + requests(reference, 10, latents=True)
    texts = [
        ScoreRequest(one.prompt_ids, written.ids, one.adapter, grammar, one.latents)
        for one, written in zip(asked, reference.generate(asked), strict=True)
        for grammar in {None, one.automaton}
    ]
    for mine, theirs in zip(model.score(texts), reference.score(texts), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    north, south, east = (tuple(reference.tokenizer.encode(w, add_special_tokens=False)) for w in WORDS[:3])
    for options in ((south, north), (north + east, south, east)):
        choices = [ChoiceRequest(one.prompt_ids, options, one.adapter) for one in asked[:5]]
        for mine, theirs in zip(model.choose(choices), reference.choose(choices), strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)


@both
def test_rows_without_an_adapter_are_the_bases_when_every_slot_is_taken(
    model: VLLMModel, reference: TransformersModel, place: Path
) -> None:
    names = [f"other-{number}" for number in range(SETTINGS.max_adapters)]
    for name in names:
        model.load_adapter(name, place / "blue")
    try:
        asked = [
            GenerateRequest((3, 4, 5 + number % 4), number, name, max_tokens=4)
            for number, name in enumerate([None, *names, None])
        ]
        wanted = [replace(one, adapter=one.adapter and "blue") for one in asked]
        assert distance(model.generate(asked), reference.generate(wanted)) < 1e-4
    finally:
        for name in names:
            model.delete_adapter(name)


@both
def test_threads_are_served_together(model: VLLMModel, reference: TransformersModel) -> None:
    asked = requests(reference, 48)
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(model.generate, [asked[start : start + 6] for start in range(0, 48, 6)])
        assert distance([one for part in parts for one in part], reference.generate(asked)) < 1e-4


def decisions(model: Any, episodes: int) -> list[tuple[str, ...]]:
    """What greedy agents do in held-out episodes."""
    env: Any = make_env(TASK, {}, 0)
    team = GenerativeTeam(
        model, env.language, AgentSettings(), dict(zip(env.agents, ("red", "blue"), strict=True)), temperature=0.0
    )
    specs = [EpisodeSpec(TASK, {}, 10_000 + seed) for seed in range(episodes)]
    return [
        tuple(turn.action for turn in trajectory.turns)
        for episode in rollout(specs, team, ChannelSettings(), 0)
        for trajectory in episode.trajectories.values()
    ]


@both
def test_greedy_decisions_are_the_same(model: VLLMModel, reference: TransformersModel) -> None:
    assert decisions(model, 4) == decisions(reference, 4)


@pytest.mark.slow
@both
def test_greedy_decisions_are_the_same_for_long(model: VLLMModel, reference: TransformersModel) -> None:
    assert decisions(model, 50) == decisions(reference, 50)


@both
def test_a_published_adapter_is_never_stale(model: VLLMModel, reference: TransformersModel, place: Path) -> None:
    # Long enough for several blocks of the prefix cache, asked twice so that they are in it.
    asked = [GenerateRequest(tuple(range(3, 13)) * 10, seed, "red", max_tokens=6, temperature=0.0) for seed in (1, 2)]
    other = [replace(one, adapter="blue") for one in asked]
    for _ in range(2):
        assert distance(model.generate(asked), reference.generate(asked)) < 1e-4
    model.publish("red", place / "blue", 1)
    first = model.generate(asked)
    assert distance(first, reference.generate(other)) < 1e-4
    assert [one.logprobs for one in first] != [one.logprobs for one in reference.generate(asked)]
    model.publish("red", place / "red", 2)
    assert distance(model.generate(asked), reference.generate(asked)) < 1e-4
    assert model.version("red") == 2
    served = [inner for inner in model.engine.served() if inner.startswith("red@")]
    assert len(served) == 1


@both
def test_requests_under_way_keep_the_adapter_they_began_with(
    model: VLLMModel, reference: TransformersModel, place: Path
) -> None:
    asked = [
        GenerateRequest((3, 4, 5 + number), number, "blue", max_tokens=60, temperature=1.0) for number in range(8)
    ]
    expected = reference.generate(asked), reference.generate([replace(one, adapter="red") for one in asked])
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(model.generate, [one]) for one in asked]
        model.publish("blue", place / "red", 1)
        found = [future.result()[0] for future in running]
    model.publish("blue", place / "blue", 2)
    for one, before, after in zip(found, *expected, strict=True):
        assert one.ids in (before.ids, after.ids)
        wanted = before if one.ids == before.ids else after
        assert one.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)


@embedded
def test_no_answer_in_time_is_an_error_and_no_more(model: VLLMModel, reference: TransformersModel) -> None:
    engine: Any = model.engine
    asked = [GenerateRequest((3, 4), seed, max_tokens=300) for seed in range(16)]
    engine._timeout_s = 0.01
    try:
        with pytest.raises(ModelError, match=r"no answer to 16 requests within 0.01 s"):
            model.generate(asked)
    finally:
        engine._timeout_s = SETTINGS.timeout_s
    some = requests(reference, 6)
    assert distance(model.generate(some), reference.generate(some)) < 1e-4
    assert engine.restarts == 0


def test_a_server_that_answers_late_or_never_is_named(server: VLLMServer, base: Path, place: Path) -> None:
    made = connect(server, base, place)
    client: Any = made.engine
    client._http.timeout = 0.01
    with pytest.raises(ModelError, match=f"{server.url} gave no answer within"):
        made.generate([GenerateRequest((3, 4), 1, max_tokens=300)])
    client._http.timeout = 60.0
    made.close()
    began = time.monotonic()
    nowhere = SETTINGS.model_copy(update={"url": "http://127.0.0.1:9", "retries": 2})
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9 is away, and was after 2 retries"):
        VLLMModel.load(base, LORA, settings=nowhere)
    assert time.monotonic() - began > 0.7  # it waited, longer each time
    with pytest.raises(ModelError, match="401"):
        VLLMModel.load(base, LORA, settings=SETTINGS.model_copy(update={"url": server.url, "api_key": "wrong"}))


def test_a_server_that_goes_away_is_asked_again(
    server: VLLMServer, base: Path, place: Path, reference: TransformersModel
) -> None:
    """Nobody listens at the address for a while; then the server is there."""
    from tests.models.relay import Relay

    some = requests(reference, 12)
    with Relay(server.host, server.port) as relay:
        made = connect(server, base, place, url=relay.url, retries=8)
        relay.close()
        threading.Timer(1.5, relay.open).start()
        assert distance(made.generate(some), reference.generate(some)) < 1e-4
        made.close()


def test_others_get_what_they_always_got(server: VLLMServer, base: Path, place: Path) -> None:
    """Plain requests in the batch with ours: the same top log-probabilities as alone, and ours as alone."""
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
    made = connect(server, base, place)

    def plain() -> Any:
        [choice] = client.completions.create(
            model="red", prompt=[3, 4, 5, 6], max_tokens=40, temperature=0, logprobs=5, extra_body={"ignore_eos": True}
        ).choices
        return choice.logprobs

    alone = plain()
    asked = [GenerateRequest((3, 4, 5, 6), seed, "blue", max_tokens=200) for seed in range(8)]
    quiet = made.generate(asked)
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(made.generate, asked)
        found = [plain() for _ in range(3)]
        assert distance(busy.result(), quiet) < 1e-4
    for one in found:
        assert one.tokens == alone.tokens
        assert one.token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-4)
        for mine, theirs in zip(one.top_logprobs, alone.top_logprobs, strict=True):
            assert len(mine) >= 5
            assert mine == pytest.approx(theirs, abs=1e-4)
    with pytest.raises(openai.BadRequestError, match="preconcert_rows"):
        client.completions.create(
            model="red", prompt=[3], temperature=0, extra_body={"vllm_xargs": {"preconcert_rows": ["nonsense"]}}
        )
    made.close()


@pytest.mark.slow
@embedded
def test_a_dead_engine_is_made_anew(model: VLLMModel, reference: TransformersModel, place: Path) -> None:
    engine: Any = model.engine
    model.publish("red", place / "red", 7)
    some = requests(reference, 12)
    long = [GenerateRequest((3, 4), seed, "red", max_tokens=400) for seed in range(32)]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(model.generate, asked) for asked in (long, some)]
        time.sleep(0.3)
        os.kill(engine.core_pid, signal.SIGKILL)
        found = [future.result() for future in running]
    assert distance(found[1], reference.generate(some)) < 1e-4
    assert distance(found[0], reference.generate(long)) < 1e-4
    assert engine.restarts == 1
    assert model.version("red") == 7


@pytest.mark.slow
def test_a_server_that_is_killed_comes_back_with_its_adapters(
    server: VLLMServer, base: Path, place: Path, reference: TransformersModel
) -> None:
    made = connect(server, base, place, retries=40)
    made.publish("red", place / "blue", 5)
    some = requests(reference, 12)
    expected = reference.generate([replace(one, adapter="blue") if one.adapter == "red" else one for one in some])
    assert server.pid is not None
    os.killpg(server.pid, signal.SIGKILL)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(made.generate, some)
        server.restart()
        assert distance(running.result(), expected) < 1e-4
    made.close()
