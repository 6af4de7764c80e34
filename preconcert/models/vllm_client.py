"""The client of a running vLLM server: `ServerEngine`, the other `RowEngine`.

Rows go through the server's OpenAI-compatible completions. Rows that are alike but for prompt and seed share one
request; the logits processor on the other side tells them apart by their prompts. A server that goes away is asked
again with longer and longer pauses, and one that comes back without the adapters we gave it gets them again.
"""

from __future__ import annotations

import base64
import io
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import PretrainedConfig

from preconcert.core import EngineAwayError, ModelError, nearest
from preconcert.models.loading import first_line
from preconcert.models.vllm_instructions import Row, Spelling, Written, instructions
from preconcert.models.vllm_settings import VLLMSettings

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGER, _LONGEST_PAUSE_S = 0.5, 3.0, 60.0
"""Five retries take a minute: as long as a server that is started again."""
_TOGETHER = 64
"""Prompts in one request at the most."""
_CONNECT_S = 30.0
"""Until a connection has to be there."""
_AT_ONCE = 64
"""Requests under way at the most."""
_AWAY = (502, 503, 504)
"""What a server or a proxy says that will answer again later."""


class ServerEngine:
    """A vLLM server that was started with `server_command`'s flags.

    Args:
        settings: with its `url`.
        config: of the base model that it is supposed to serve.

    Raises:
        ModelError: it does not answer, or is not one of ours.
    """

    def __init__(self, settings: VLLMSettings, config: PretrainedConfig) -> None:
        assert settings.url is not None
        self.url = settings.url.rstrip("/").removesuffix("/v1")
        self._settings = settings
        headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(settings.timeout_s, connect=min(settings.timeout_s, _CONNECT_S)),
            limits=httpx.Limits(max_connections=_AT_ONCE, max_keepalive_connections=_AT_ONCE),
        )
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="preconcert-vllm")
        self._given: dict[str, Path] = {}
        self._lock = threading.Lock()
        self._vocabulary = int(config.get_text_config().vocab_size)
        self.base = ""
        """The name that the server has for its base model."""
        self.served()
        self._check_flags()

    def write(self, rows: Sequence[Row]) -> list[Written]:
        """The continuations of these rows, in as few requests as can be.

        Raises:
            EngineAwayError: there is no answer in time, or none after all retries.
            ModelError: a request is refused.
        """
        parts = _alike(rows)
        if len(parts) == 1:
            return self._write_part(rows)
        answers: list[Written | None] = [None] * len(rows)
        running = [(part, self._pool.submit(self._write_part, [rows[index] for index in part])) for part in parts]
        for part, future in running:
            for index, written in zip(part, future.result(), strict=True):
                answers[index] = written
        return [one for one in answers if one is not None]

    def load(self, name: str, path: Path) -> None:
        """Give the server an adapter; it reads the folder itself, so that it must be able to."""
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}, f"adapter {name!r}")
        with self._lock:
            self._given[name] = path

    def unload(self, name: str) -> None:
        """Take an adapter away; one that a restarted server does not have any more is gone already."""
        with self._lock:
            self._given.pop(name, None)
        answer = self._ask(lambda: self._http.post("/v1/unload_lora_adapter", json={"lora_name": name}))
        if answer.status_code not in (200, 404):
            raise ModelError(f"vLLM at {self.url} keeps adapter {name!r}: {_reason(answer)}")

    def served(self) -> dict[str, Path | None]:
        """The adapters it knows, and their folders where we gave them."""
        answer = self._ask(lambda: self._http.get("/v1/models"))
        if answer.status_code != 200:
            raise ModelError(f"vLLM at {self.url} does not list its models: {_reason(answer)}")
        found = [str(one["id"]) for one in answer.json()["data"] if one.get("parent")]
        bases = [str(one["id"]) for one in answer.json()["data"] if not one.get("parent")]
        if not bases:
            raise ModelError(f"the server at {self.url} has no base model")
        self.base = bases[0]
        return {name: self._given.get(name) for name in found}

    def close(self) -> None:
        """Close the connections; the server goes on, without the adapters that it got from here."""
        for name in list(self._given):
            try:
                self._http.post("/v1/unload_lora_adapter", json={"lora_name": name}, timeout=5.0)
            except httpx.HTTPError:
                break  # it is gone, and they with it
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def _check_flags(self) -> None:
        """A grammar of one word, whose log-probability is 0 only if the server draws as it is told."""
        token = self._vocabulary - 1
        spelling = Spelling(f"[[{token},1,{token - 1},1],[]]", (), 1, None)
        row = Row((0,), None, 1, spelling, 1, 1.0, watch=(0,), watched=2)
        try:
            [written] = self._write_part([row])
            table = written.tables[0]
            total = sum(2.718281828459045**table[one] for one in (token, token - 1))
        except EngineAwayError:
            raise
        except (ModelError, KeyError) as error:
            raise ModelError(
                f"the server at {self.url} does not follow our instructions: start it with preconcert's command "
                f"({first_line(error)})"
            ) from error
        if abs(total - 1.0) > 1e-3:
            raise ModelError(f"the server at {self.url} does not draw as told: start it with preconcert's command")

    def _write_part(self, rows: Sequence[Row]) -> list[Written]:
        first = rows[0]
        body: dict[str, Any] = {
            "model": first.adapter or self.base,
            "max_tokens": first.tokens,
            "temperature": 0.0,
            "logprobs": first.watched,
            "stop_token_ids": list(first.stops),
            "ignore_eos": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            "vllm_xargs": instructions(rows),
        }
        if first.embeds is None:
            body["prompt"] = [list(row.prompt_ids) for row in rows]
        else:
            buffer = io.BytesIO()
            torch.save(first.embeds, buffer)
            body["prompt_embeds"] = base64.b64encode(buffer.getvalue()).decode()
        choices = self._post("/v1/completions", body, f"{len(rows)} requests").json()["choices"]
        if len(choices) != len(rows):
            raise ModelError(f"vLLM at {self.url} answered {len(choices)} of {len(rows)} requests")
        found: list[Written] = []
        for row, choice in zip(rows, sorted(choices, key=lambda one: one["index"]), strict=True):
            if choice.get("finish_reason") not in ("stop", "length"):
                raise ModelError(f"vLLM at {self.url} ended a request by {choice.get('finish_reason')!r}")
            logprobs = choice["logprobs"]
            tables: tuple[Mapping[int, float], ...] = ()
            if row.watched:
                tables = tuple(
                    {int(name.rpartition(":")[2]): float(value) for name, value in one.items()}
                    for one in logprobs["top_logprobs"]
                )
            ids = tuple(int(name.rpartition(":")[2]) for name in logprobs["tokens"])
            found.append(Written(ids, tuple(map(float, logprobs["token_logprobs"])), tables))
        return found

    def _post(self, path: str, body: Mapping[str, Any], what: str) -> httpx.Response:
        answer = self._ask(lambda: self._http.post(path, json=body))
        if answer.status_code == 404 and body.get("model") in self._given:
            # It was started anew since: what it got from us is gone.
            for name, folder in list(self._given.items()):
                given = {"lora_name": name, "lora_path": str(folder)}
                self._ask(lambda given=given: self._http.post("/v1/load_lora_adapter", json=given))  # type: ignore[misc]
            answer = self._ask(lambda: self._http.post(path, json=body))
        if answer.status_code == 404 and "model" in body:
            raise ModelError(
                f"vLLM at {self.url} has no model {body['model']!r}; {nearest(str(body['model']), self.served())}"
            )
        if answer.status_code != 200:
            raise ModelError(f"vLLM at {self.url} refuses {what}: {_reason(answer)}")
        return answer

    def _ask(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        """An answer, whatever it says; the server may be away for a while.

        Raises:
            EngineAwayError: there is no answer in time, or none after all retries.
        """
        pause, attempt, broken = _FIRST_PAUSE_S, 0, False
        while True:
            try:
                answer = send()
                if answer.status_code not in _AWAY and not _engine_died(answer):
                    return answer
                why = _reason(answer)
            except httpx.TimeoutException as error:
                if not isinstance(error, httpx.ConnectTimeout):
                    raise EngineAwayError(
                        f"vLLM at {self.url} gave no answer within {self._settings.timeout_s:g} s"
                    ) from error
                why = "it takes no connection"
            except httpx.TransportError as error:
                why = f"{type(error).__name__}: {first_line(error)}"
                if not broken and not isinstance(error, httpx.ConnectError):
                    # Likely an idle connection that the server closed just then. Requests carry their seeds: whatever
                    # became of this one, another one gets the same answer.
                    broken = True
                    continue
            if attempt >= self._settings.retries:
                raise EngineAwayError(f"vLLM at {self.url} is away, and was after {attempt} retries: {why}")
            attempt += 1
            _log.warning("vLLM at %s is away (%s); asked again in %.2g s", self.url, why, pause)
            time.sleep(pause)
            pause = min(_LONGER * pause, _LONGEST_PAUSE_S)


def _alike(rows: Sequence[Row]) -> list[list[int]]:
    """Places of rows that can share a request: of one kind, and no prompt twice."""
    groups: dict[Any, list[list[int]]] = {}
    seen: dict[Any, dict[tuple[int, ...], int]] = {}
    for index, row in enumerate(rows):
        kind = (
            row.adapter,
            None if row.grammar is None else id(row.grammar),
            row.tokens,
            row.watch,
            row.watched,
            row.stops,
            index if row.embeds is not None else None,
        )
        counts = seen.setdefault(kind, {})
        number = counts[row.prompt_ids] = counts.get(row.prompt_ids, -1) + 1
        parts = groups.setdefault((kind, number), [[]])
        if len(parts[-1]) >= _TOGETHER:
            parts.append([])
        parts[-1].append(index)
    return [part for parts in groups.values() for part in parts]


def _engine_died(answer: httpx.Response) -> bool:
    return answer.status_code == 500 and "EngineDead" in answer.text


def _reason(answer: httpx.Response) -> str:
    try:
        content = answer.json()
        error = content.get("error", content)
        said = error.get("message", "") if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        said = answer.text
    return f"status {answer.status_code}: {' '.join(str(said).split())[:300]}"
