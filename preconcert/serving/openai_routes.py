"""Agents as models of the OpenAI-compatible API: `/v1/models`, `/v1/completions`, `/v1/chat/completions`.

A chat is an agent's turn: its messages are put into the prompt that the agent was trained on (`chat_template`), and the
answer keeps to the grammar of its turns, on either engine; a stream comes token by token after all of them have been
written. A completion goes on with any text, without a grammar. Where vLLM writes, completions are checked here and
passed on under the adapter's name; only what is listed in the bodies below goes through, since the engine also takes
instructions that are nobody else's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import httpx
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from jinja2.exceptions import TemplateError
from pydantic import ConfigDict, Field

from preconcert.agents import Context
from preconcert.core import UnknownNameError, derive_seed, nearest
from preconcert.models.language_model import Completion, CompletionEnd, GenerateRequest
from preconcert.prompts.automaton import Automaton
from preconcert.prompts.chat_template import chat_template
from preconcert.serving.engine import Supervised, Writer
from preconcert.serving.errors import ServiceError
from preconcert.serving.settings import ServiceSettings
from preconcert.serving.team import ServedTeam
from preconcert.serving.wire import Body, Seed

BASE = "base"
"""What vLLM calls the model without adapters."""
_CHAT_TOKENS = 256
"""Of an answer in a chat, where nobody says."""
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(Body):
    """Of a stream."""

    include_usage: bool = False


class _Asked(Body):
    """What both kinds of requests have in common."""

    model: Annotated[str, Field(max_length=256)]
    """An agent's name."""
    max_tokens: Annotated[int, Field(ge=1, le=131_072)] | None = None
    temperature: Annotated[_Number, Field(ge=0, le=10)] = 1.0
    top_p: Annotated[_Number, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=16)] = 1
    seed: Seed | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=8)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[_Number, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[_Number, Field(ge=-2, le=2)] = 0.0
    user: Annotated[str, Field(max_length=256)] | None = None


class CompletionBody(_Asked):
    """`POST /v1/completions`."""

    prompt: Annotated[str, Field(min_length=1, max_length=1_048_576)] | Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=131_072)
    ]
    """Words, or tokens."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class ChatMessage(Body):
    """One message."""

    model_config = ConfigDict(extra="ignore", frozen=True)  # clients send names and the like

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=1_048_576)]


class ChatBody(_Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=512)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=131_072)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


def add_openai_routes(app: FastAPI, team: ServedTeam, settings: ServiceSettings, writer: Writer) -> None:
    """Add them to the application."""
    turns = _Written(team, settings)
    texts = turns if writer.url is None else _Passed(team, settings, writer)

    @app.get("/v1/models", tags=["openai"])
    async def models() -> dict[str, Any]:
        """The agents, as models."""
        made = int(started)
        return {
            "object": "list",
            "data": [
                {"id": name, "object": "model", "created": made, "owned_by": "preconcert", "root": adapter}
                for name, adapter in team.assignment.items()
            ],
        }

    @app.post("/v1/completions", tags=["openai"], response_class=Response)
    async def completions(body: CompletionBody) -> Response:
        """A text goes on."""
        return await texts.answer(body)

    @app.post("/v1/chat/completions", tags=["openai"], response_class=Response)
    async def chat(body: ChatBody) -> Response:
        """An agent's turn for what it sees: a user message is the text of its view, or lines `NAME said: WORDS`,
        `You did: ACTIONS`, `You see: VIEW` and `You may: ACTIONS`, of which all but the view may be left out."""
        return await turns.answer(body)

    started = time.time()


def _adapter_of(team: ServedTeam, name: str) -> str | None:
    known = {**{adapter: adapter for adapter in team.assignment.values() if adapter is not None}, **team.assignment}
    if name not in known:
        unknown = UnknownNameError("model", name, team.assignment)
        raise ServiceError(404, "model_not_found", str(unknown))
    return known[name]


class _Written:
    """By the team's own model."""

    def __init__(self, team: ServedTeam, settings: ServiceSettings) -> None:
        self.team = team
        self.settings = settings
        self._threads = ThreadPoolExecutor(max_workers=64, thread_name_prefix="openai")
        self._template = chat_template(team.format, tuple(team.assignment), team.agents.context is Context.TRANSCRIPT)

    async def answer(self, body: CompletionBody | ChatBody) -> Response:
        """One answer, or a stream."""
        self._refuse(body)
        adapter = _adapter_of(self.team, body.model)
        # All of it in a thread: reading a long prompt and spelling out a long answer would keep everybody waiting.
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._written, body, adapter)
        try:
            return await asyncio.wait_for(work, self.settings.timeout_s)
        except TimeoutError:
            raise ServiceError(
                503,
                "timeout",
                f"the answer took longer than {self.settings.timeout_s:g} s",
                retry_after=self.settings.retry_after_s,
            ) from None

    def _written(self, body: CompletionBody | ChatBody, adapter: str | None) -> Response:
        tokenizer, chat = self.team.model.tokenizer, isinstance(body, ChatBody)
        ids = self._prompt(body)
        grammar = self._grammar(body) if isinstance(body, ChatBody) else None
        limit = body.max_tokens
        if isinstance(body, ChatBody):
            left = self.team.model.max_context - len(ids)
            limit = body.max_completion_tokens or body.max_tokens or max(1, min(_CHAT_TOKENS, left))
        seed = secrets.randbits(62) if body.seed is None else body.seed
        requests = [
            GenerateRequest(
                ids, derive_seed(seed, number), adapter, grammar, limit or 16, temperature=body.temperature
            )
            for number in range(body.n)
        ]
        found = self.team.model.generate(requests)
        name = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        kind = "chat.completion" if chat else "text_completion"
        head = {"id": name, "object": kind, "created": int(time.time()), "model": body.model}
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        texts = [_cut(tokenizer, each, stops) for each in found]
        written = sum(len(each.ids) for each in found)
        usage = {"prompt_tokens": len(ids), "completion_tokens": written, "total_tokens": len(ids) + written}
        if body.stream:
            return StreamingResponse(
                _chunks(body, head, texts, usage), media_type="text/event-stream", headers={"cache-control": "no-store"}
            )
        choices = [
            self._choice(body, number, completion, "".join(pieces), ended)
            for number, (completion, (pieces, ended)) in enumerate(zip(found, texts, strict=True))
        ]
        return Response(json.dumps({**head, "choices": choices, "usage": usage}), media_type="application/json")

    def _prompt(self, body: CompletionBody | ChatBody) -> tuple[int, ...]:
        tokenizer = self.team.model.tokenizer
        if isinstance(body, ChatBody):
            messages = [
                {"role": each.role.replace("developer", "system"), "content": each.content} for each in body.messages
            ]
            try:
                text = tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=True,
                    agent=self._agent(body),
                )
            except TemplateError as error:
                raise ServiceError(422, "invalid_request", f"messages: {error}") from None
            if not text:
                raise ServiceError(422, "invalid_request", "messages: none of them is a user's")
            return self.team.format.encode(text)  # which names the words that the tokenizer does not know
        elif isinstance(body.prompt, str):
            text = body.prompt
        else:
            size = len(tokenizer)
            for token in body.prompt:
                if token >= size:
                    raise ServiceError(422, "invalid_request", f"prompt: token {token} is beyond the last, {size - 1}")
            return tuple(body.prompt)
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        if not ids:
            raise ServiceError(422, "invalid_request", "the prompt is empty: there is nothing to continue")
        return ids

    def _agent(self, body: ChatBody) -> str:
        """Who is meant: the model's name, or for an adapter that several share the one that a system message names.

        Raises:
            ServiceError: nobody is.
        """
        agents = tuple(self.team.assignment)
        if body.model in agents:
            return body.model
        told = " ".join(each.content for each in body.messages if each.role in ("system", "developer"))
        for word in told.replace(",", " ").replace(".", " ").split():
            if word in agents:
                return word
        known = ", ".join(agents)
        raise ServiceError(
            422, "invalid_request", f"model: {body.model!r} writes for several agents; ask for one of {known}"
        )

    def _grammar(self, body: ChatBody) -> Automaton | None:
        """Of the agent's turn; None for a team that writes freely."""
        if not self.team.agents.constrained:
            return None
        me, actions = self._agent(body), self.team.language.actions
        legal: tuple[str, ...] = actions
        asked = [each.content for each in body.messages if each.role == "user"]
        for line in asked[-1].splitlines() if asked else ():
            if line.startswith("You may:"):
                legal = tuple(dict.fromkeys(line.removeprefix("You may:").replace(",", " ").split()))
        for action in legal:
            if action not in actions:
                raise ServiceError(
                    422, "invalid_request", f"messages: unknown action {action!r}; {nearest(action, actions)}"
                )
        return self.team.format.automaton([each for each in self.team.assignment if each != me], legal or actions)

    def _refuse(self, body: CompletionBody | ChatBody) -> None:
        """What the embedded model does not do is said, not left out."""
        for key, plain in (("top_p", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
            if getattr(body, key) != plain:
                raise ServiceError(
                    422, "unsupported", f"{key} = {getattr(body, key)}: only {plain:g} is offered here"
                )
        if body.top_logprobs if isinstance(body, ChatBody) else body.logprobs:
            raise ServiceError(422, "unsupported", "no log-probabilities of other tokens are offered here")

    def _choice(
        self, body: CompletionBody | ChatBody, number: int, completion: Completion, text: str, ended: str
    ) -> dict[str, Any]:
        tokenizer = self.team.model.tokenizer
        tokens = [tokenizer.decode([token]) for token in completion.ids]
        choice: dict[str, Any] = {"index": number, "finish_reason": ended, "logprobs": None}
        if isinstance(body, ChatBody):
            choice["message"] = {"role": "assistant", "content": text}
            if body.logprobs:
                listed = zip(tokens, completion.logprobs, strict=True)
                choice["logprobs"] = {
                    "content": [
                        {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
                        for token, value in listed
                    ]
                }
        else:
            choice["text"] = text
            if body.logprobs is not None:
                choice["logprobs"] = {
                    "tokens": tokens,
                    "token_logprobs": list(completion.logprobs),
                    "top_logprobs": None,
                    "text_offset": None,
                }
        return choice


def _cut(tokenizer: Any, completion: Completion, stops: Sequence[str]) -> tuple[list[str], str]:
    """A completion's text in pieces, one per token, as far as the first stop; and why it ended."""
    pieces: list[str] = []
    length = 0
    reach = max(map(len, stops), default=1) - 1
    """As much of what was there before can belong to a stop."""
    tail = ""
    for piece in _pieces(tokenizer, completion.ids):
        pieces.append(piece)
        length += len(piece)
        text = tail + piece
        if places := [text.find(stop) for stop in stops if stop in text]:
            return _first(pieces, length - len(text) + min(places)), "stop"
        tail = text[max(0, len(text) - reach) :]
    return pieces, "length" if completion.ended is CompletionEnd.LENGTH else "stop"


def _first(pieces: Sequence[str], length: int) -> list[str]:
    """The first characters of a text in pieces."""
    found: list[str] = []
    for piece in pieces:
        if length <= 0:
            break
        found.append(piece[:length])
        length -= len(piece)
    return found


def _pieces(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """The text token by token; characters of several tokens come with the last. A token is decoded after the one before
    it, since at the beginning of a text it may look otherwise."""
    special = set(tokenizer.all_special_ids)
    before: list[int] = []
    """The token that showed last."""
    new: list[int] = []
    """What did not show yet."""
    shown = ""
    for token in ids:
        if token in special:
            yield ""
            continue
        new.append(token)
        text: str = tokenizer.decode(before + new, skip_special_tokens=True)
        if text.endswith("\ufffd"):  # a character that is not complete yet
            continue
        yield text[len(shown) :]
        if len(text) > len(shown):
            before, new = new, []
            shown = tokenizer.decode(before, skip_special_tokens=True)


async def _chunks(
    body: CompletionBody | ChatBody, head: dict[str, Any], texts: list[tuple[list[str], str]], usage: dict[str, int]
) -> AsyncIterator[bytes]:
    chat = isinstance(body, ChatBody)
    head = {**head, "object": "chat.completion.chunk" if chat else "text_completion"}

    def event(number: int, text: str | None, ended: str | None, first: bool = False) -> bytes:
        part: dict[str, Any] = {"index": number, "finish_reason": ended, "logprobs": None}
        if chat:
            part["delta"] = {**({"role": "assistant"} if first else {}), **({} if text is None else {"content": text})}
        else:
            part["text"] = text or ""
        return f"data: {json.dumps({**head, 'choices': [part]})}\n\n".encode()

    for number, (pieces, ended) in enumerate(texts):
        for place, piece in enumerate(pieces):
            yield event(number, piece, None, place == 0)
        yield event(number, None, ended)
    if body.stream_options is not None and body.stream_options.include_usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n".encode()
    yield b"data: [DONE]\n\n"


class _Passed:
    """By a vLLM server; asked again if it dies before it has said anything."""

    def __init__(self, team: ServedTeam, settings: ServiceSettings, writer: Writer) -> None:
        assert writer.url is not None
        self.team = team
        self.settings = settings
        self.writer = writer
        key = getattr(getattr(getattr(writer, "server", None), "settings", None), "api_key", None)
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.http = httpx.AsyncClient(
            base_url=writer.url,
            headers=headers,
            timeout=settings.timeout_s,
            limits=httpx.Limits(max_connections=settings.max_requests),
            trust_env=False,
        )

    async def answer(self, body: CompletionBody | ChatBody) -> Response:
        """One answer, or a stream, as vLLM gives it but for the model's name."""
        adapter = _adapter_of(self.team, body.model)
        path = "/v1/chat/completions" if isinstance(body, ChatBody) else "/v1/completions"
        content = {**body.model_dump(exclude_unset=True, mode="json"), "model": adapter or BASE}
        answer = await self._asked(path, content)
        if answer.status_code != 200:
            await answer.aread()
            raise ServiceError(
                422 if answer.status_code == 400 else answer.status_code, "invalid_request", _said(answer)
            )
        if body.stream:
            return StreamingResponse(
                self._lines(answer, body.model), media_type="text/event-stream", headers={"cache-control": "no-store"}
            )
        found = json.loads(await answer.aread())
        return Response(json.dumps({**found, "model": body.model}), media_type="application/json")

    async def _asked(self, path: str, content: dict[str, Any]) -> httpx.Response:
        deadline = time.monotonic() + self.settings.timeout_s
        while True:
            starts = self.writer.starts if isinstance(self.writer, Supervised) else 0
            try:
                request = self.http.build_request("POST", path, json=content)
                answer = await self.http.send(request, stream=True)
                if answer.status_code < 500:
                    if not content.get("stream"):
                        await answer.aread()  # here, where it can still be asked for again
                    return answer
                await answer.aread()
                why = _said(answer)
            except httpx.HTTPError as error:
                why = f"{type(error).__name__} {error}".strip()
            again = False
            if isinstance(self.writer, Supervised):
                waits = asyncio.to_thread(self.writer.recovered, starts)
                with contextlib.suppress(TimeoutError):
                    again = await asyncio.wait_for(waits, max(0.0, deadline - time.monotonic()))
            if not again:
                raise ServiceError(
                    503, "engine_down", f"vLLM gave no answer: {why}", retry_after=self.settings.retry_after_s
                )

    async def _lines(self, answer: httpx.Response, name: str) -> AsyncIterator[bytes]:
        try:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    line = "data: " + json.dumps({**json.loads(line[6:]), "model": name})
                yield f"{line}\n".encode()
        except httpx.HTTPError:
            error = {"type": "engine_down", "message": "vLLM went away in the middle of the stream; ask again"}
            yield f"data: {json.dumps({'error': error})}\n\n".encode()
        finally:
            await answer.aclose()


def _said(answer: httpx.Response) -> str:
    try:
        content = answer.json()
    except ValueError:
        return answer.text[:300]
    error = content.get("error", content) if isinstance(content, dict) else content
    return str(error.get("message", error) if isinstance(error, dict) else error)[:600]
