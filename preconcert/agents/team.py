"""The generative team: every agent's turns written by one language model, in one batch.

An agent is a name; `assignment` says which adapter writes for it, and a request's `player` overrules that for its
episode. One `decide` call turns all requests into prompts, makes a single `generate` call with the adapters mixed, and
parses what came back. A turn that does not parse is a record with `malformed` set and the task's default action.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from preconcert.agents.channel.meter import spelled
from preconcert.agents.codecs import CodecSettings, LatentCodecSettings, SlotsSettings, TurnCodec, codec_of
from preconcert.core import (
    ConfigError,
    Forecast,
    GrammarError,
    Intention,
    Message,
    Observation,
    Slot,
    Span,
    SpanKind,
    TaskLanguage,
    Turn,
    TurnRequest,
    UnknownNameError,
)
from preconcert.models.language_model import (
    Completion,
    CompletionEnd,
    GenerateRequest,
    LanguageModel,
    LatentModel,
    Placed,
    SpeakRequest,
)
from preconcert.prompts import SpanSettings, TurnContent, TurnFormat


class Context(StrEnum):
    """What an agent's prompt holds."""

    TURN = "turn"
    """The present observation, the inbox and a short memory: one training row per turn."""
    TRANSCRIPT = "transcript"
    """Everything since the episode began, append-only: one training row per agent and episode."""


class AgentSettings(BaseModel):
    """How an agent reads and writes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    spans: SpanSettings = SpanSettings()
    """The parts of a turn."""
    codec: CodecSettings = SlotsSettings()
    """What messages are made of: `slots`, `learned`, `raw-state`, `intention` or `latent`, or a mapping with its `type`
    and settings."""
    context: Context = Context.TURN
    """What the prompt holds. The starter model learns in `turn` only."""
    memory: int = Field(0, ge=0, le=16)
    """How many of its own last actions an agent is reminded of (context `turn`)."""
    constrained: bool = True
    """Allow only tokens that the grammar allows, in sampling and in the loss."""
    max_tokens: int = Field(96, ge=1)
    """Tokens per turn at the most, where the grammar does not bound them."""

    @property
    def remembers(self) -> bool:
        """Does a turn depend on earlier ones of the same agent?"""
        return bool(self.memory) or self.context is not Context.TURN

    @model_validator(mode="after")
    def _vectors_stand_in_turns(self) -> AgentSettings:
        if isinstance(self.codec, LatentCodecSettings) and self.context is not Context.TURN:
            raise ValueError(f"codec=latent needs context=turn, not {self.context.value}")
        return self

    @model_validator(mode="after")
    def _transcripts_remember_by_themselves(self) -> AgentSettings:
        if self.memory and self.context is not Context.TURN:
            raise ValueError(f"memory={self.memory} is for context=turn; a {self.context.value} holds every action")
        return self


def turn_format_of(tokenizer: Any, settings: AgentSettings, codec: TurnCodec) -> TurnFormat:
    """The form of an agent's turns and prompts.

    Args:
        tokenizer: a Hugging Face tokenizer.
        settings: how agents read and write.
        codec: what their messages are made of.
    """
    return TurnFormat(tokenizer, codec.language, settings.spans, settings.memory, codec.speech)


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered of one agent in one running episode."""

    actions: tuple[str, ...] = ()
    """What it did, oldest first."""
    ids: tuple[int, ...] = ()
    """Everything read and written (context `transcript`)."""
    ended_with_eos: bool = True
    """Did the last completion end with its end-of-sequence token?"""


_NOTHING = Memory()


class GenerativeTeam:
    """A `Policy` for any number of agents on one language model.

    Args:
        model: the backend.
        language: the task's vocabularies.
        settings: how agents read and write.
        assignment: adapter by agent name; None for the base model.
        temperature: 0 decides greedily.
        version: number of updates behind the adapters.

    Raises:
        UnknownNameError: an adapter that the model does not have.
        ConfigError: an adapter's codec for latent messages has another shape than the settings say.
    """

    def __init__(
        self,
        model: LanguageModel,
        language: TaskLanguage,
        settings: AgentSettings,
        assignment: Mapping[str, str | None],
        temperature: float = 1.0,
        version: int = 0,
    ) -> None:
        for adapter in assignment.values():
            if adapter is not None and adapter not in model.adapters:
                raise UnknownNameError("adapter", adapter, model.adapters)
        self.model = model
        self.settings = settings
        self.assignment = dict(assignment)
        self.temperature = temperature
        self.version = version
        self.versions: dict[str, int] = {}
        """Updates behind adapters that stay as they are, by name; `version` goes for all others."""
        self.codec = codec_of(settings.codec, language, settings.spans)
        self.codec.check(tuple(assignment))
        self.format = turn_format_of(model.tokenizer, settings, self.codec)
        self._check_codecs()
        self.language = language
        self.tokens_generated = 0
        """Tokens written so far, forced ones included."""
        self.decisions = 0
        """Turns decided so far; rehearsed ones are none."""
        self.keep_distributions = False
        """Keep with every intention the probabilities of all the words it could have been (`Intention.distributions`).
        Needs `settings.constrained`, and words that begin with different tokens; where they do not, none is kept."""
        self._memories: dict[tuple[str, str], Memory] = {}

    def _check_codecs(self) -> None:
        """Adapters write messages of the shape that prompts have room for, and that they were trained with."""
        wanted = self.settings.codec
        if not isinstance(wanted, LatentCodecSettings):
            return
        held: Mapping[str, Any] = getattr(self.model, "codecs", {})
        for adapter in dict.fromkeys(self.assignment.values()):
            if adapter is not None and adapter in held:
                own = held[adapter].settings
                for key in ("tokens", "dims", "levels", "method"):
                    if getattr(own, key) != getattr(wanted, key):
                        raise ConfigError(
                            f"agent.codec.{key}={getattr(wanted, key)}, but the codec of adapter {adapter!r} has "
                            f"{getattr(own, key)}"
                        )

    def decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """One turn per request, from a single batch.

        Raises:
            UnknownNameError: a request for an agent that the team does not have, or for an adapter that the model does
                not have.
        """
        memories = [self.recall(request.episode, request.agent) for request in requests]
        answers = self._write(requests, memories, kept=self.settings.context is Context.TRANSCRIPT)
        self.decisions += len(requests)
        for request, (_, memory) in zip(requests, answers, strict=True):
            self.remember(request.episode, request.agent, memory)
        return [turn for turn, _ in answers]

    def rehearse(self, requests: Sequence[TurnRequest], memories: Sequence[Memory]) -> list[tuple[Turn, Memory]]:
        """What `decide` would answer with these memories, and what would be remembered then; nothing is kept.

        Raises:
            UnknownNameError: as `decide`.
        """
        return self._write(requests, memories, kept=False)

    def recall(self, episode: str, agent: str) -> Memory:
        """What is remembered of an agent in a running episode."""
        return self._memories.get((episode, agent), _NOTHING)

    def remember(self, episode: str, agent: str, memory: Memory) -> None:
        """Take over what was rehearsed: it has been done."""
        self._memories[(episode, agent)] = memory

    def finish(self, episode: str) -> None:
        """Let go of an episode's memory and caches."""
        for key in [key for key in self._memories if key[0] == episode]:
            del self._memories[key]
            self.model.close_session(f"{key[0]}/{key[1]}")

    def fork(self, episode: str, name: str) -> None:
        """Give another episode this one's memory. Its caches are not copied: the first prompt is read afresh."""
        for (held, agent), memory in list(self._memories.items()):
            if held == episode:
                self._memories[(name, agent)] = memory

    def apart(
        self, temperature: float | None = None, assignment: Mapping[str, str | None] | None = None
    ) -> GenerativeTeam:
        """The same team with a memory and counts of its own; model and compiled grammars are shared.

        Args:
            temperature: another one.
            assignment: other adapters.

        Raises:
            UnknownNameError: an adapter that the model does not have.
        """
        for adapter in (assignment or {}).values():
            if adapter is not None and adapter not in self.model.adapters:
                raise UnknownNameError("adapter", adapter, self.model.adapters)
        other = copy.copy(self)
        other.assignment = dict(self.assignment if assignment is None else assignment)
        other.temperature = self.temperature if temperature is None else temperature
        other.tokens_generated, other.decisions, other._memories = 0, 0, {}
        return other

    def version_of(self, adapter: str) -> int:
        """Number of updates behind an adapter."""
        return self.versions.get(adapter, self.version)

    def adapter_of(self, request: TurnRequest) -> str | None:
        """Who writes a turn; None for the base model.

        Raises:
            UnknownNameError: the team has no such agent, or the model no such adapter.
        """
        if request.agent not in self.assignment:
            raise UnknownNameError("agent", request.agent, self.assignment)
        if request.player is None:
            return self.assignment[request.agent]
        if request.player not in self.model.adapters:
            raise UnknownNameError("adapter", request.player, self.model.adapters)
        return request.player

    def _write(
        self, requests: Sequence[TurnRequest], memories: Sequence[Memory], kept: bool
    ) -> list[tuple[Turn, Memory]]:
        """One turn per request, from a single batch; `kept` says whether caches are worth keeping."""
        prompts = [self._prompt(request, memory) for request, memory in zip(requests, memories, strict=True)]
        heard = [
            self.heard(request.agent, request.observation, request.inbox, request.others, memory.actions)
            for request, memory in zip(requests, memories, strict=True)
        ]
        forms = [
            self.format.automaton(request.others, request.observation.legal_actions)
            if self.settings.constrained
            else None
            for request in requests
        ]
        completions = self.model.generate(
            [
                GenerateRequest(
                    prompt_ids=prompt,
                    seed=request.seed,
                    adapter=self.adapter_of(request),
                    automaton=form,
                    max_tokens=self.settings.max_tokens if form is None else form.longest,
                    temperature=self.temperature,
                    session=f"{request.episode}/{request.agent}" if kept else None,
                    watch=frozenset(self._intended(request)),
                    latents=latents,
                )
                for request, prompt, latents, form in zip(requests, prompts, heard, forms, strict=True)
            ]
        )
        self.tokens_generated += sum(len(completion.ids) for completion in completions)
        answers = [
            self._turn(request, memory, prompt, completion)
            for request, memory, prompt, completion in zip(requests, memories, prompts, completions, strict=True)
        ]
        return self._spoken(requests, answers, heard) if self.codec.speech.vectors else answers

    def heard(
        self,
        agent: str,
        observation: Observation,
        inbox: Sequence[Message],
        others: Sequence[str],
        memory: Sequence[str],
    ) -> tuple[Placed, ...]:
        """The latent messages of a prompt and where they stand in it; arguments as in `TurnFormat.prompt_ids`."""
        received = {message.sender: message.latent for message in inbox if message.latent is not None}
        if not received:
            return ()
        _, starts = self.format.prompt_with_places(agent, observation, inbox, others, memory)
        return tuple(Placed(starts[sender], latent) for sender, latent in received.items() if sender in starts)

    def _spoken(
        self,
        requests: Sequence[TurnRequest],
        answers: Sequence[tuple[Turn, Memory]],
        heard: Sequence[tuple[Placed, ...]],
    ) -> list[tuple[Turn, Memory]]:
        """The same turns with the vectors that their writers send."""
        if not isinstance(self.model, LatentModel):
            raise ConfigError(f"agent.codec=latent: {type(self.model).__name__} cannot write latent messages")
        speaking = [place for place, (turn, _) in enumerate(answers) if turn.message is not None]
        asked: list[SpeakRequest] = []
        for place in speaking:
            turn = answers[place][0]
            if turn.adapter is None:
                raise ConfigError(f"agent.codec=latent: agent {turn.agent!r} has no adapter, and so no codec")
            ids = turn.prompt_ids + turn.completion_ids
            asked.append(SpeakRequest(ids, turn.adapter, requests[place].seed, self.temperature, heard[place]))
        found = list(answers)
        for place, latent in zip(speaking, self.model.speak(asked) if asked else (), strict=True):
            turn, memory = answers[place]
            assert turn.message is not None
            message = replace(
                turn.message,
                payload=" ".join(spelled(latent)),
                bits=latent.bits,
                tokens=len(latent.values),
                latent=replace(latent, words=turn.message.payload),
            )
            found[place] = replace(turn, message=message), memory
        return found

    def _intended(self, request: TurnRequest) -> dict[int, dict[int, str]]:
        """By automaton state before a foretold action: the action that each token begins, where that is wanted."""
        if not (self.keep_distributions and self.settings.constrained):
            return {}
        return self.format.beginnings(SpanKind.INTEND, request.others, request.observation.legal_actions)

    def _prompt(self, request: TurnRequest, memory: Memory) -> tuple[int, ...]:
        if memory.ids:
            return memory.ids + self.format.followup_ids(
                request.agent, request.observation, request.inbox, request.others, memory.ended_with_eos
            )
        return self.format.prompt_ids(
            request.agent, request.observation, request.inbox, request.others, memory.actions
        )

    def _turn(
        self, request: TurnRequest, memory: Memory, prompt: tuple[int, ...], completion: Completion
    ) -> tuple[Turn, Memory]:
        legal = request.observation.legal_actions
        spans: tuple[Span, ...] = ()
        content: TurnContent | None = None
        try:
            content, spans = self.format.parse(completion.ids, request.others, legal)
        except GrammarError:
            content = None
        if content is None:
            default = self.language.default_action
            action = default if default in legal else legal[0]
        else:
            action = content.action
        after = replace(memory, actions=(*memory.actions, action))
        if self.settings.context is Context.TRANSCRIPT:
            after = replace(
                after, ids=prompt + completion.ids, ended_with_eos=completion.ended is not CompletionEnd.LENGTH
            )
        turn = Turn(
            agent=request.agent,
            step=request.observation.step,
            observation=request.observation,
            inbox=request.inbox,
            prompt_ids=prompt,
            completion_ids=completion.ids,
            logprobs=completion.logprobs,
            sampled=completion.sampled,
            spans=spans,
            intentions=_intentions(content, spans, completion, self._intended(request), self.temperature),
            forecast=_forecast(content, self.language),
            message=self._written(content, spans, completion, request),
            action=action,
            malformed=content is None,
            reward=0.0,
            text=self.format.text(completion.ids),
            adapter=self.adapter_of(request),
        )
        return replace(turn, message=self.message_of(turn)), after

    def message_slots(self, others: Sequence[str]) -> tuple[Slot, ...]:
        """The words that can stand in each place of a message to these agents; see `TurnCodec.slots`."""
        return self.codec.slots(others)

    def message_of(self, turn: Turn) -> Message | None:
        """What a turn sends, made by the codec.

        Args:
            turn: as written: its message says to whom it goes, and has the words that it wrote as one, if any.
        """
        message = self.codec.encode(turn)
        if message is None or self.codec.speech.slots:
            return message
        return replace(message, tokens=len(self.format.encode(message.payload)))

    def _written(
        self, content: TurnContent | None, spans: Sequence[Span], completion: Completion, request: TurnRequest
    ) -> Message | None:
        """The words that a turn wrote as its message; a blank one where it writes none; None where nobody can hear, or
        where it should have written some and cannot be read."""
        if not (self.codec.talks and request.others):
            return None
        words = () if content is None else content.message
        said = [span for span in spans if span.kind is SpanKind.SAY]
        if self.codec.speech.slots and not said:
            return None
        return Message(
            sender=request.agent,
            recipients=request.others,
            payload=" ".join(words),
            bits=-_logprob(completion, said) / math.log(2.0) + 0.0,
            tokens=sum(span.end - span.start for span in said[: len(words)]),
            sent_at=request.observation.step,
        )


def _logprob(completion: Completion, spans: Sequence[Span]) -> float:
    return sum(sum(completion.logprobs[span.start : span.end]) for span in spans)


def _intentions(
    content: TurnContent | None,
    spans: Sequence[Span],
    completion: Completion,
    words: Mapping[int, Mapping[int, str]],
    temperature: float,
) -> tuple[Intention, ...]:
    if content is None:
        return ()
    found: list[Intention] = []
    for about, actions in content.intentions.items():
        mine = [span for span in spans if span.kind is SpanKind.INTEND and span.slot == about]
        given = _distributions(mine, completion, words, temperature)
        found.append(Intention(about, actions, math.exp(_logprob(completion, mine)), given))
    return tuple(found)


def _distributions(
    spans: Sequence[Span], completion: Completion, words: Mapping[int, Mapping[int, str]], temperature: float
) -> tuple[Mapping[str, float], ...] | None:
    """What the word of each span was sampled from; None unless that is known of all of them."""
    known = {watched.position: watched for watched in completion.watched if watched.state in words}
    if not spans or any(span.start not in known for span in spans):
        return None
    found: list[Mapping[str, float]] = []
    for span in spans:
        watched = known[span.start]
        # Watched are those at temperature 1. A greedy choice is made from them as they are.
        scaled = [logprob / (temperature or 1.0) for logprob in watched.logprobs]
        weights = [math.exp(value - max(scaled)) for value in scaled]
        found.append(
            {
                words[watched.state][token]: weight / sum(weights)
                for token, weight in zip(watched.tokens, weights, strict=True)
            }
        )
    return tuple(found)


def _forecast(content: TurnContent | None, language: TaskLanguage) -> Forecast | None:
    if content is None or not (content.forecast or content.reward):
        return None
    names = [slot.name for slot in language.forecast]
    return Forecast(
        dict(zip(names, content.forecast, strict=True)) if content.forecast else {},
        content.reward,
        None if content.done is None else content.done == "yes",
    )
