"""A team that is somewhere else, as a policy: rollouts, replays and evaluations play with it as with one in here.

Parts: `ServiceClient` (requests, retries, errors as exceptions) and `RemoteTeam`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from preconcert.agents import ChannelSettings
from preconcert.agents.channel import positions_of
from preconcert.agents.planners import PlannerSettings
from preconcert.core import ConfigError, ModelError, Observation, Slot, Turn, TurnRequest
from preconcert.serving.wire import TurnAnswer
from preconcert.training.rollout import EpisodeSpec

_RETRIES = 8
"""How often a request is sent again that was answered with 503, or not at all."""


class ServiceClient:
    """Talks to a service.

    Args:
        url: of the service.
        api_key: sent with every request.
        timeout_s: longest wait for one answer.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 150.0) -> None:
        self.url = url.rstrip("/")
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s)

    def get(self, path: str) -> Any:
        """What a path answers.

        Raises:
            ConfigError: the service refuses.
            ModelError: there is no service, or none that answers.
        """
        return self._ask("GET", path, None)

    def post(self, path: str, body: Any) -> Any:
        """What a path answers to a body; errors as of `get`."""
        return self._ask("POST", path, body)

    def delete(self, path: str) -> None:
        """Delete; errors as of `get`."""
        self._ask("DELETE", path, None)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _ask(self, method: str, path: str, body: Any) -> Any:
        why = ""
        for attempt in range(_RETRIES):
            pause = min(5.0, 0.25 * 2**attempt)
            try:
                answer = self._http.request(method, path, json=body) if body is not None else self._http.request(
                    method, path
                )
            except httpx.HTTPError as error:
                why = f"{type(error).__name__}: {error}"
                if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
                    raise ConfigError(f"{self.url!r} is no address of a service: {error}") from None
                if attempt == 2 and isinstance(error, httpx.ConnectError):
                    break
            else:
                if answer.status_code != 503:
                    return self._content(answer)
                why = _message(answer)
                pause = max(pause, float(answer.headers.get("retry-after", 0)))
            time.sleep(pause)
        raise ModelError(f"no answer from the service at {self.url}: {why}")

    def _content(self, answer: httpx.Response) -> Any:
        if answer.status_code == 204:
            return None
        if answer.status_code >= 400:
            raise ConfigError(f"the service at {self.url} refuses: {_message(answer)}")
        try:
            return answer.json()
        except json.JSONDecodeError:
            raise ModelError(f"what answers at {self.url} is no preconcert service") from None


class RemoteTeam:
    """A `Policy` whose turns come from a service; one session per episode.

    The episodes' channel has to be the service's: what arrives there has to arrive here.

    Args:
        client: of the service.
        specs: what will be played.
        seed: of the choices, as for `preconcert eval`.
        greedy: always take the most likely token.
        plan: search before each turn.
        at_once: episodes asked for at once.
    """

    version = 0

    def __init__(
        self,
        client: ServiceClient,
        specs: Sequence[EpisodeSpec],
        seed: int,
        greedy: bool = False,
        plan: PlannerSettings | None = None,
        at_once: int = 16,
    ) -> None:
        self.client = client
        self.about: dict[str, Any] = client.get("/v1/agents")
        self.channel = ChannelSettings.model_validate(self.about["channel"])
        """How messages travel there."""
        self._specs = {spec.name: spec for spec in specs}
        self._seed = seed
        self._greedy = greedy
        self._plan = plan
        self._sessions: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="remote")

    def decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """One turn per request; every episode's agents are asked together.

        Raises:
            ConfigError: the service refuses.
            ModelError: the service is away, or messages travel otherwise there.
        """
        episodes: dict[str, list[TurnRequest]] = {}
        for request in requests:
            episodes.setdefault(request.episode, []).append(request)
        turns: dict[tuple[str, str], Turn] = {}
        for asked, found in zip(episodes.values(), self._pool.map(self._observe, episodes.values()), strict=True):
            for request in asked:
                turn = found[request.agent].turn(request.observation)
                if turn.inbox != request.inbox:
                    raise ModelError(
                        f"agent {request.agent!r} has {[each.payload for each in turn.inbox]} in its inbox at the "
                        f"service, and {[each.payload for each in request.inbox]} here: the channels differ"
                    )
                turns[request.episode, request.agent] = turn
        return [turns[request.episode, request.agent] for request in requests]

    def finish(self, episode: str) -> None:
        """Close the episode's session."""
        session = self._sessions.pop(episode, None)
        if session is not None:
            self.client.delete(f"/v1/sessions/{session}")

    def message_slots(self, others: Sequence[str]) -> tuple[Slot, ...] | None:
        """Not known from here."""
        return None

    def close(self) -> None:
        """Close what is still open."""
        for episode in list(self._sessions):
            self.finish(episode)
        self._pool.shutdown()

    def _observe(self, requests: Sequence[TurnRequest]) -> dict[str, TurnAnswer]:
        first = requests[0]
        session = self._sessions.get(first.episode)
        if session is None:
            session = self._sessions[first.episode] = self._open(self._specs[first.episode])
        body: dict[str, Any] = {
            "step": first.observation.step,
            "observations": {request.agent: _seen(request.observation) for request in requests},
            "plan": True,
            "prompts": True,
        }
        where = positions_of(first.env)
        if where is not None:
            body["positions"] = {agent: list(place) for agent, place in where.items()}
        answer = self.client.post(f"/v1/sessions/{session}/observe", body)
        return {turn["agent"]: TurnAnswer.model_validate_json(json.dumps(turn)) for turn in answer["turns"]}

    def _open(self, spec: EpisodeSpec) -> str:
        body: dict[str, Any] = {
            "task": spec.task,
            "params": {key: value for key, value in spec.params.items() if self.about["params"].get(key) != value},
            "instance": spec.seed,
            "seed": self._seed,
            "split": spec.split,
            "greedy": self._greedy,
            "agents": dict(spec.cast),
        }
        if self._plan is not None:
            body["plan"] = self._plan.model_dump(mode="json")
        return str(self.client.post("/v1/sessions", body)["id"])


def _seen(observation: Observation) -> dict[str, Any]:
    return {
        "text": observation.text,
        "legal_actions": list(observation.legal_actions),
        "fields": dict(observation.fields),
        "sees": list(observation.sees),
    }


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}: {answer.text[:200]}"


__all__ = ["RemoteTeam", "ServiceClient"]
