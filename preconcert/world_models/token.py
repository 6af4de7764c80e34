"""The world model in tokens: a language model writes what a step leads to.

A belief is what one agent has before it: the view, the inbox, its last actions and words, and as many of the moments
before as the format recalls. One `advance` is one `generate` call for all imaginations. Parts: `TokenWorldSettings`,
`TokenBelief`, `TokenWorldModel`. How rows are spelled is in `prompts/world_format.py`, how the adapter learns in
`training/world_model.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from preconcert.core import (
    GrammarError,
    ImaginedStep,
    Judgement,
    Message,
    Move,
    Observation,
    Outcome,
    Turn,
    TurnRequest,
    UnknownNameError,
)
from preconcert.models.language_model import (
    ChoiceRequest,
    Completion,
    GenerateRequest,
    LanguageModel,
    ScoreRequest,
)
from preconcert.prompts import OWN_TEAM, Earlier, WorldAnswer, WorldFormat, WorldPart, recent_of
from preconcert.world_models.legal import LegalActions


class TokenWorldSettings(BaseModel):
    """How answers are sampled."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(1.0, ge=0)
    """0 imagines what is likeliest, word by word."""
    constrained: bool = True
    """Allow only tokens of an answer; off to count what is malformed. Views that are words of any kind are never
    constrained."""
    max_tokens: int = Field(192, ge=1)
    """Tokens per answer at the most, where no grammar bounds them."""


@dataclass(frozen=True, slots=True)
class TokenBelief:
    """What an agent has before it at a real or an imagined moment."""

    agent: str
    others: tuple[str, ...]
    """The other agents, in the episode's order."""
    observation: Observation
    inbox: tuple[Message, ...]
    memory: tuple[str, ...]
    """Its last actions, oldest first, as many as the prompt shows."""
    partners: str = OWN_TEAM
    """Whose play the others' is, one of `PARTNERS`."""
    said: str | None = None
    """Its own last message, which the others now have; None before the first."""
    earlier: tuple[Earlier, ...] = ()
    """The moments before this one, oldest first, as many as the prompt shows."""


class TokenWorldModel:
    """A `WorldModel` that a language model with an adapter writes.

    Args:
        model: the backend.
        format: spells prompts and answers.
        adapter: who writes; None for the base model.
        assignment: adapter by agent, for agents with another one.
        settings: how answers are sampled.
        legal: what agents may do at imagined moments; None for every action.

    Raises:
        UnknownNameError: an adapter that the model does not have.
    """

    def __init__(
        self,
        model: LanguageModel,
        format: WorldFormat,
        adapter: str | None,
        assignment: Mapping[str, str | None] | None = None,
        settings: TokenWorldSettings | None = None,
        legal: LegalActions | None = None,
    ) -> None:
        self.model = model
        self.format = format
        self.adapter = adapter
        self.assignment = dict(assignment or {})
        self.settings = settings or TokenWorldSettings()
        self.legal = legal or LegalActions(format.language.actions, {}, {})
        self.tokens_generated = 0
        """Tokens of imagined answers written so far, forced ones included."""
        for name in (adapter, *self.assignment.values()):
            if name is not None and name not in model.adapters:
                raise UnknownNameError("adapter", name, model.adapters)

    def begin(self, requests: Sequence[TurnRequest], pasts: Sequence[Sequence[Turn]]) -> list[TokenBelief]:
        """Beliefs about the present moments."""
        return [
            TokenBelief(
                request.agent,
                request.others,
                request.observation,
                request.inbox,
                recent_of([turn.action for turn in past], self.format.turns.memory),
                request.partners or OWN_TEAM,
                last_words(past),
                lived(past, self.format.recall),
            )
            for request, past in zip(requests, pasts, strict=True)
        ]

    def advance(
        self, beliefs: Sequence[TokenBelief], moves: Sequence[Move], seeds: Sequence[int]
    ) -> list[ImaginedStep]:
        """One imagined step each, from a single batch.

        Raises:
            GrammarError: a move has a word that the tokenizer lacks.
        """
        completions = self.model.generate(
            [
                self._request(belief, move, seed)
                for belief, move, seed in zip(beliefs, moves, seeds, strict=True)
            ]
        )
        self.tokens_generated += sum(len(completion.ids) for completion in completions)
        return [
            self._step(belief, move, completion)
            for belief, move, completion in zip(beliefs, moves, completions, strict=True)
        ]

    def judge(
        self, beliefs: Sequence[TokenBelief], moves: Sequence[Move], outcomes: Sequence[Outcome]
    ) -> list[Judgement | None]:
        """What the model would have thought of real outcomes, in two passes: one over the outcomes, one over the
        others' actions, each other agent asked for as if it were the first. Actions that the move gives are asked for
        all the same.

        Raises:
            GrammarError: an outcome does not fit the task's language.
        """
        scored = self._score_outcomes(beliefs, moves, outcomes)
        others = self._others(beliefs, moves)
        return [
            Judgement(nll, reward, done, about)
            for (nll, reward, done), about in zip(scored, others, strict=True)
        ]

    def finish(self, episode: str) -> None:
        """Nothing is held."""

    # ---- asking

    def _request(self, belief: TokenBelief, move: Move, seed: int) -> GenerateRequest:
        asked = self.format.asked(belief.others, move)
        automaton = self.format.automaton(belief.others, asked) if self.settings.constrained else None
        watched = self.format.value_state(belief.others, asked) if automaton is not None else None
        return GenerateRequest(
            prompt_ids=self._prompt(belief, move),
            seed=seed,
            adapter=self._adapter(belief),
            automaton=automaton,
            max_tokens=self.settings.max_tokens if automaton is None else automaton.longest,
            temperature=self.settings.temperature,
            watch=frozenset() if watched is None else frozenset({watched[0]}),
        )

    def _prompt(self, belief: TokenBelief, move: Move) -> tuple[int, ...]:
        return self.format.prompt_ids(
            belief.agent,
            belief.observation,
            belief.inbox,
            belief.others,
            belief.memory,
            move,
            belief.partners,
            belief.said,
            belief.earlier,
        )

    def _adapter(self, belief: TokenBelief) -> str | None:
        return self.assignment.get(belief.agent, self.adapter)

    # ---- reading

    def _step(self, belief: TokenBelief, move: Move, completion: Completion) -> ImaginedStep:
        asked = self.format.asked(belief.others, move)
        given = dict(move.others or {})
        try:
            answer, _ = self.format.parse(completion.ids, belief.others, asked)
        except GrammarError:
            return ImaginedStep(None, belief.inbox, given, 0.0, True, None, belief, malformed=True)
        observation = self.observe(belief, answer.view)
        inbox = belief.inbox if answer.done else self._inbox(belief, answer)
        now = Earlier(belief.observation.text, words_by_sender(belief.inbox), move.message, move.action)
        return ImaginedStep(
            observation=observation,
            inbox=inbox,
            others={other: given.get(other) or answer.others[other] for other in belief.others},
            reward=float(answer.reward) if answer.reward is not None else 0.0,
            done=answer.done,
            value=0.0 if answer.done else self._value(belief, asked, answer, completion),
            belief=replace(
                belief,
                observation=observation,
                inbox=inbox,
                memory=recent_of([*belief.memory, move.action], self.format.turns.memory),
                said=belief.said if move.message is None else move.message,
                earlier=recent_of([*belief.earlier, now], self.format.recall),
            ),
        )

    def observe(self, belief: TokenBelief, text: str) -> Observation:
        """The observation that a written view stands for, one step after a belief's."""
        view = self.format.language.view
        fields: dict[str, str] = {}
        if view is not None:
            values = view.parse(text)
            fields = {slot.name: values[view.index(slot.name)] for slot in self.format.language.forecast}
        step = belief.observation.step + 1
        return Observation(belief.agent, text, self.legal.at(belief.agent, step, text), step, fields)

    def _inbox(self, belief: TokenBelief, answer: WorldAnswer) -> tuple[Message, ...]:
        """The last message of every sender: what is heard takes the place of what was there."""
        held = {message.sender: message for message in belief.inbox}
        for sender, words in answer.heard.items():
            if sender not in held or held[sender].payload != words:
                sent_at = belief.observation.step
                held.pop(sender, None)
                held[sender] = Message(sender, (belief.agent,), words, 0.0, len(words.split()), sent_at)
        return tuple(held.values())

    def _value(
        self, belief: TokenBelief, asked: tuple[str, ...], answer: WorldAnswer, completion: Completion
    ) -> float | None:
        """The expectation over the digits, where their distribution was watched."""
        state = self.format.value_state(belief.others, asked)
        for watched in completion.watched:
            if state is not None and watched.state == state[0]:
                weights = np.exp(np.array(watched.logprobs))
                digits = np.array([state[1][token] for token in watched.tokens])
                return self.format.value_of(float((weights * digits).sum() / weights.sum()))
        return None if answer.value is None else self.format.value_of(answer.value)

    # ---- judging

    def _score_outcomes(
        self, beliefs: Sequence[TokenBelief], moves: Sequence[Move], outcomes: Sequence[Outcome]
    ) -> list[tuple[float, float, float]]:
        requests: list[ScoreRequest] = []
        tables = []
        for belief, move, outcome in zip(beliefs, moves, outcomes, strict=True):
            answer = WorldAnswer(outcome.observation.text, self.format.reward_word(outcome.reward), True)
            written = self.format.write(answer, belief.others, ())
            given = Move(move.action, move.message, outcome.others)
            # The answer breaks off after the word on the end, so that it serves for either end.
            spans = [span for span in written.spans if span.part is not WorldPart.DONE]
            (over,) = (span for span in written.spans if span.part is WorldPart.DONE)
            automaton = self.format.automaton(belief.others, ())
            ids = written.ids[: over.end]
            requests.append(ScoreRequest(self._prompt(belief, given), ids, self._adapter(belief), automaton))
            tables.append((spans, over))
        answers: list[tuple[float, float, float]] = []
        for logprobs, (spans, over) in zip(self.model.score(requests), tables, strict=True):
            parts = {
                part: sum(sum(logprobs[span.start : span.end]) for span in spans if span.part is part)
                for part in (WorldPart.VIEW, WorldPart.REWARD)
            }
            done = math.exp(sum(logprobs[over.start : over.end]))
            answers.append((-parts[WorldPart.VIEW], math.exp(parts[WorldPart.REWARD]), done))
        return answers

    def _others(self, beliefs: Sequence[TokenBelief], moves: Sequence[Move]) -> list[dict[str, dict[str, float]]]:
        requests: list[ChoiceRequest] = []
        for belief, move in zip(beliefs, moves, strict=True):
            prompt = self._prompt(belief, Move(move.action, move.message))
            for other in belief.others:
                tag, options = self.format.action_options(other)
                requests.append(ChoiceRequest(prompt + tag, options, self._adapter(belief)))
        answers = iter(self.model.choose(requests))
        actions = self.format.language.actions
        return [
            {
                other: {action: math.exp(logprob) for action, logprob in zip(actions, next(answers), strict=True)}
                for other in belief.others
            }
            for belief in beliefs
        ]


def words_by_sender(inbox: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    """The messages of an inbox as plain words, in its order."""
    return tuple((message.sender, message.payload) for message in inbox)


def lived(past: Sequence[Turn], count: int) -> tuple[Earlier, ...]:
    """The last turns, at most as many as are asked for, as moments that are over."""
    return tuple(
        Earlier(
            turn.observation.text,
            words_by_sender(turn.inbox),
            None if turn.message is None else turn.message.payload,
            turn.action,
        )
        for turn in recent_of(past, count)
    )


def last_words(past: Sequence[Turn]) -> str | None:
    """What an agent said last in some turns; None if nothing."""
    return next((turn.message.payload for turn in reversed(past) if turn.message is not None), None)
