"""The service on a real vLLM server: the same turns, agents as its models, and a death in the middle."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from preconcert.agents import ChannelSettings
from preconcert.core import derive_seed
from preconcert.models import VLLMSettings
from preconcert.serving.app import create_app
from preconcert.serving.client import RemoteTeam, ServiceClient
from preconcert.serving.launch import start_vllm_engine
from preconcert.serving.metrics import Metrics
from preconcert.serving.settings import ServiceSettings
from preconcert.serving.team import team_of_run
from preconcert.training.rollout import rollout
from preconcert.training.run_folder import load_model, load_recipe_of
from tests.serving.conftest import running
from tests.serving.run_folder import run_folder
from tests.serving.test_same_turns import SPECS, same
from tests.training.teams import team_on

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("runs") / "random")


@pytest.fixture(scope="module")
def service(run: Path) -> Iterator[tuple[str, int]]:
    """Its address, and the process of the vLLM server behind it."""
    recipe, metrics, settings = load_recipe_of(run), Metrics(), ServiceSettings(timeout_s=300.0)
    writer, model = start_vllm_engine(run, recipe, VLLMSettings(memory=0.25), settings, metrics, print)
    pid = writer.server.pid
    assert pid is not None
    with running(create_app(team_of_run(run, recipe, model), settings, writer, metrics=metrics)) as url:
        yield url, pid


def test_turns_are_those_of_a_rollout_and_survive_a_death(service: tuple[str, int], run: Path) -> None:
    url, pid = service
    here = team_on(load_model(load_recipe_of(run), run, run / "adapters"))
    wanted = rollout(SPECS, here, ChannelSettings(), derive_seed(2, "eval"))
    client = ServiceClient(url, timeout_s=330.0)

    def there() -> RemoteTeam:
        return RemoteTeam(client, SPECS, 2)

    team = there()
    same(rollout(SPECS, team, team.channel, derive_seed(2, "eval")), wanted)
    team.close()

    def strike(step: int, live: int) -> None:
        if step == 1:
            os.killpg(pid, signal.SIGKILL)

    team = there()
    same(rollout(SPECS, team, team.channel, derive_seed(2, "eval"), on_step=strike), wanted)
    team.close()
    deadline = time.monotonic() + 60
    while "preconcert_engine_restarts_total 1.0" not in httpx.get(f"{url}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert httpx.get(f"{url}/ready").status_code == 200


def test_agents_are_models(service: tuple[str, int]) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{service[0]}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["agent_0", "agent_1"]
        asked = {"prompt": "left 3 row 0 col 2", "max_tokens": 6, "temperature": 0}
        texts = {agent: client.completions.create(model=agent, **asked) for agent in ("agent_0", "agent_1")}
        for agent, answer in texts.items():
            assert answer.model == agent
            parts = list(client.completions.create(model=agent, stream=True, **asked))
            assert "".join(part.choices[0].text for part in parts) == answer.choices[0].text
            assert {part.model for part in parts} == {agent}
        with pytest.raises(openai.UnprocessableEntityError, match="vllm_xargs"):
            client.completions.create(model="agent_0", prompt="row", extra_body={"vllm_xargs": {"a": "b"}})
        with pytest.raises(openai.UnprocessableEntityError):
            client.completions.create(model="agent_0", prompt="row " * 5000)
        with pytest.raises(openai.NotFoundError, match="did you mean 'agent_0'"):
            client.completions.create(model="agent0", prompt="row")
