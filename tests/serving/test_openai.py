"""Agents as models for an unmodified OpenAI client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from preconcert.agents import AgentSettings, GenerativeTeam
from preconcert.core import derive_seed
from preconcert.envs import make_env
from preconcert.models import TransformersModel
from preconcert.models.language_model import Completion, CompletionEnd, GenerateRequest
from preconcert.serving.openai_routes import _cut
from tests.models.checkpoints import build_chat_tokenizer
from tests.training.teams import AGENTS, PARAMS, TASK

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(url: str):  # type: ignore[no-untyped-def]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_agents_are_models(client) -> None:  # type: ignore[no-untyped-def]
    assert [model.id for model in client.models.list()] == ["agent_0", "agent_1"]


def test_completions_are_what_the_model_writes(client, model: TransformersModel) -> None:  # type: ignore[no-untyped-def]
    prompt = "left 3 row 0 col 2"
    ids = tuple(model.tokenizer.encode(prompt, add_special_tokens=False))
    for agent in ("agent_0", "agent_1"):
        answer = client.completions.create(model=agent, prompt=prompt, max_tokens=8, seed=5, n=2, logprobs=0)
        wanted = model.generate([GenerateRequest(ids, derive_seed(5, n), agent, max_tokens=8) for n in range(2)])
        for choice, one in zip(answer.choices, wanted, strict=True):
            assert choice.text == model.tokenizer.decode(list(one.ids), skip_special_tokens=True)
            assert choice.logprobs.token_logprobs == pytest.approx(one.logprobs, abs=1e-4)
        assert answer.usage.prompt_tokens == len(ids)


def test_a_chat_is_the_turn_that_the_agent_would_write(client, model: TransformersModel) -> None:  # type: ignore[no-untyped-def]
    env = make_env(TASK, PARAMS, 3, "heldout")
    team = GenerativeTeam(model, env.language, AgentSettings(), {agent: agent for agent in AGENTS})
    for agent, seen in env.reset().items():
        others = [other for other in AGENTS if other != agent]
        legal = seen.legal_actions[:3]
        asked = f"You see: {seen.text}\nYou may: {', '.join(legal)}"
        answer = client.chat.completions.create(
            model=agent, messages=[{"role": "user", "content": asked}], seed=5, n=2, logprobs=True
        )
        ids = team.format.prompt_ids(agent, seen, (), others, ())
        grammar = team.format.automaton(others, legal)
        wanted = model.generate([GenerateRequest(ids, derive_seed(5, n), agent, grammar) for n in range(2)])
        assert answer.usage.prompt_tokens == len(ids)
        for choice, one in zip(answer.choices, wanted, strict=True):
            assert choice.finish_reason == "stop"
            assert choice.message.content == model.tokenizer.decode(list(one.ids), skip_special_tokens=True)
            assert [each.logprob for each in choice.logprobs.content] == pytest.approx(one.logprobs, abs=1e-4)
            content, _ = team.format.parse(one.ids, others, legal)
            assert content.action in legal


def test_chats_and_streams(client) -> None:  # type: ignore[no-untyped-def]
    env = make_env(TASK, PARAMS, 3, "heldout")
    messages = [{"role": "user", "content": env.reset()["agent_1"].text}]
    whole = client.chat.completions.create(model="agent_1", messages=messages, seed=1)
    parts = list(client.chat.completions.create(model="agent_1", messages=messages, seed=1, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    texts = client.completions.create(model="agent_1", prompt="row 0", max_tokens=6, seed=1, stream=True)
    plain = client.completions.create(model="agent_1", prompt="row 0", max_tokens=6, seed=1)
    assert "".join(part.choices[0].text for part in texts) == plain.choices[0].text


def test_what_is_refused_is_named(client) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(openai.NotFoundError, match="did you mean 'agent_0'"):
        client.completions.create(model="agent0", prompt="row")
    with pytest.raises(openai.UnprocessableEntityError, match="top_p"):
        client.completions.create(model="agent_0", prompt="row", top_p=0.5)
    with pytest.raises(openai.UnprocessableEntityError, match="limit of"):
        client.completions.create(model="agent_0", prompt="row " * 1000)
    with pytest.raises(openai.UnprocessableEntityError, match="unknown key 'vllm_xargs'"):
        client.completions.create(model="agent_0", prompt="row", extra_body={"vllm_xargs": {"a": "b"}})
    def chat(text: str, role: str = "user") -> None:
        client.chat.completions.create(model="agent_0", messages=[{"role": role, "content": text}])

    with pytest.raises(openai.UnprocessableEntityError, match="unknown action 'up'"):
        chat("You see: row 0\nYou may: up")
    with pytest.raises(openai.UnprocessableEntityError, match="does not know 'zebra'"):
        chat("zebra")
    with pytest.raises(openai.UnprocessableEntityError, match="none of them is a user's"):
        chat("agent_0", "system")
    with pytest.raises(openai.UnprocessableEntityError, match="temperature"):
        client.completions.create(model="agent_0", prompt="row", temperature=-1)


class Counting:
    """A tokenizer that says how much it was asked to decode."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        self.decoded += len(ids)
        return str(self.tokenizer.decode(ids, **options))


def written(tokenizer: Any, ids: Sequence[int]) -> Completion:
    return Completion(tuple(ids), (0.0,) * len(ids), (True,) * len(ids), CompletionEnd.LENGTH)


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_a_long_answer_is_spelled_out_once(kind: str, model: TransformersModel) -> None:
    tokenizer = Counting(model.tokenizer if kind == "words" else build_chat_tokenizer())
    words = "row 1 col 2 north south left 3 " if kind == "words" else "Ünder the ☂ — naïve, two  spaces ; 東京 "
    ids = tokenizer.encode(words * 60, add_special_tokens=False)
    ids = [*ids[:7], tokenizer.eos_token_id, *ids[7:]]
    pieces, ended = _cut(tokenizer, written(tokenizer, ids), [])
    assert ended == "length"
    assert len(pieces) > 200
    assert "".join(pieces) == tokenizer.tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.decoded < 12 * len(ids)


@pytest.mark.parametrize(
    ("stops", "text"),
    [(["2"], "row 1 col "), (["l 2 n"], "row 1 co"), (["north", "col 2"], "row 1 "), (["south", "row 1"], "")],
)
def test_an_answer_ends_before_its_first_stop(stops: list[str], text: str, model: TransformersModel) -> None:
    ids = model.tokenizer.encode("row 1 col 2 north south", add_special_tokens=False)
    pieces, ended = _cut(model.tokenizer, written(model.tokenizer, ids), stops)
    assert ("".join(pieces), ended) == (text, "stop")
