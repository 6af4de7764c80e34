"""What goes over the line: requests with bounds, and answers.

A request that does not fit is refused by name before anything is done with it. Answers hold a turn as it was sampled,
so that `client.py` makes the same record of it that a rollout in this process would have made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from preconcert.agents.planners import PlannerSettings
from preconcert.core import (
    Candidate,
    Forecast,
    Intention,
    Message,
    Observation,
    Slot,
    Span,
    TaskLanguage,
    Turn,
)

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\s\x00-\x1f]+$")]
"""Of an agent, an adapter, a slot."""
Word = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\s\x00-\x1f]+$")]
"""One word of a task's language."""
Text = Annotated[str, Field(max_length=65_536)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Scalar = bool | int | Annotated[float, Field(allow_inf_nan=False)] | Annotated[str, Field(max_length=256)] | None
AGENTS = 64
"""Most agents of a session."""
MOST_WORDS = 4096
"""Most actions and choices of a client's language."""


class Body(BaseModel):
    """What all requests have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SlotBody(Body):
    """One word position with a closed set of words."""

    name: Name
    choices: Annotated[tuple[Word, ...], Field(min_length=1, max_length=512)]
    null: Word | None = None
    """The word that says nothing."""


class LanguageBody(Body):
    """The words of a session that is on no task of the service."""

    actions: Annotated[tuple[Word, ...], Field(min_length=1, max_length=512)]
    message: Annotated[tuple[SlotBody, ...], Field(max_length=32)] = ()
    forecast: Annotated[tuple[SlotBody, ...], Field(max_length=64)] = ()
    rewards: Annotated[tuple[Word, ...], Field(max_length=64)] = ()
    default_action: Word | None = None
    """Taken for a turn that cannot be read; by default the first legal one."""

    @model_validator(mode="after")
    def _few_words(self) -> LanguageBody:
        """A grammar's tables have a cell for each of its tokens in each of its states."""
        words = len(self.actions) + sum(len(slot.choices) for slot in (*self.message, *self.forecast))
        if words > MOST_WORDS:
            raise ValueError(f"{words} actions and choices are more than the limit of {MOST_WORDS} together")
        return self

    def language(self) -> TaskLanguage:
        """As the team reads it."""
        return TaskLanguage(
            self.actions,
            tuple(Slot(slot.name, slot.choices, null=slot.null) for slot in self.message),
            tuple(Slot(slot.name, slot.choices, null=slot.null) for slot in self.forecast),
            self.rewards,
            self.default_action or "",
        )


class SessionBody(Body):
    """`POST /v1/sessions`."""

    task: Annotated[str, Field(max_length=256)] | None = None
    """The service's own task; nothing else is known to its team. None takes it, or, with `language`, none."""
    params: Annotated[dict[Name, Scalar | list[Scalar]], Field(max_length=64)] = {}
    """Of the task, where they differ from the run's."""
    instance: Seed | None = None
    """Seed of the task's instance; by default `seed`."""
    seed: Seed = 0
    """Every choice of the agents follows from it and the instance, as in `preconcert eval --seed`."""
    split: Annotated[str, Field(max_length=16)] = "heldout"
    """`train` or `heldout`."""
    greedy: bool = False
    """Always take the most likely token."""
    temperature: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    """Of sampling; by default 1."""
    plan: PlannerSettings | None = None
    """Search in the run's world model before each turn; None does not."""
    agents: Annotated[dict[Name, Name], Field(max_length=AGENTS)] = {}
    """Adapter by agent. On a task: who plays otherwise than in the run. With `language`: everybody, in order."""
    language: LanguageBody | None = None
    """The words of a session whose world is the client's own."""

    @model_validator(mode="after")
    def _fits(self) -> SessionBody:
        if self.greedy and self.temperature is not None:
            raise ValueError(f"greedy = True and temperature = {self.temperature} do not go together")
        if self.greedy and self.plan is not None:
            raise ValueError("greedy = True and a plan do not go together: a plan weighs turns that are sampled")
        if self.language is not None:
            if self.task is not None:
                raise ValueError(f"task = {self.task!r} and a language of its own do not go together")
            if self.params:
                raise ValueError("params belong to a task, and a session with a language of its own has none")
            if not self.agents:
                raise ValueError("agents is empty: a session with a language of its own names its agents")
        return self


class ObservationBody(Body):
    """What one agent sees now."""

    text: Text
    legal_actions: Annotated[tuple[Word, ...], Field(min_length=1, max_length=512)]
    fields: Annotated[dict[Name, Word], Field(max_length=256)] = {}
    sees: Annotated[tuple[Name, ...], Field(max_length=AGENTS)] = ()


class AskBody(Body):
    """What `observe` and `step` have in common."""

    step: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Which turn is asked for, from 0; the same one may be asked for again. None: the next one."""
    stream: bool = False
    """Answer as server-sent events, one per turn as it is ready; so does `Accept: text/event-stream`."""
    plan: bool = False
    """With what a planner weighed."""
    prompts: bool = False
    """With the tokens of the prompts."""


class ObserveBody(AskBody):
    """`POST /v1/sessions/{id}/observe`."""

    observations: Annotated[dict[Name, ObservationBody], Field(min_length=1, max_length=AGENTS)]
    """By agent, all of them."""
    positions: (
        Annotated[dict[Name, Annotated[tuple[int, ...], Field(max_length=8)]], Field(max_length=AGENTS)] | None
    ) = None
    """Where the agents are now; for teams whose messages go to the nearest."""


class StepBody(AskBody):
    """`POST /v1/sessions/{id}/step`."""

    replay: bool = False
    """With the episode so far as people read it: boards, and what was foretold beside what came."""


class SeenBody(Body):
    """An observation as the service's own world gives it."""

    text: str
    legal_actions: tuple[str, ...]
    fields: Mapping[str, str]
    sees: tuple[str, ...]

    @classmethod
    def of(cls, observation: Observation) -> SeenBody:
        """From the record."""
        return cls(
            text=observation.text,
            legal_actions=observation.legal_actions,
            fields=dict(observation.fields),
            sees=observation.sees,
        )


class TurnAnswer(Body):
    """One agent's turn."""

    agent: str
    step: int
    adapter: str | None
    action: str
    message: Message | None
    intentions: tuple[Intention, ...]
    forecast: Forecast | None
    malformed: bool
    """The turn could not be read; `action` is then the task's default action."""
    text: str
    """The turn in words."""
    heard: tuple[Message, ...]
    """The inbox it was written with."""
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural, one per token; 0 for forced ones."""
    sampled: tuple[bool, ...]
    """False for tokens that the grammar forced."""
    spans: tuple[Span, ...]
    prompt_tokens: int
    prompt_ids: tuple[int, ...] | None = None
    plan: tuple[Candidate, ...] | None = None
    """What was weighed, best first."""

    @classmethod
    def of(cls, turn: Turn, plan: bool = False, prompts: bool = False) -> TurnAnswer:
        """From the record."""
        return cls(
            agent=turn.agent,
            step=turn.step,
            adapter=turn.adapter,
            action=turn.action,
            message=turn.message,
            intentions=turn.intentions,
            forecast=turn.forecast,
            malformed=turn.malformed,
            text=turn.text,
            heard=turn.inbox,
            token_ids=turn.completion_ids,
            logprobs=turn.logprobs,
            sampled=turn.sampled,
            spans=turn.spans,
            prompt_tokens=len(turn.prompt_ids),
            prompt_ids=turn.prompt_ids if prompts else None,
            plan=turn.candidates if plan else None,
        )

    def turn(self, observation: Observation) -> Turn:
        """The record, for whoever knows what was observed."""
        return Turn(
            agent=self.agent,
            step=self.step,
            observation=observation,
            inbox=self.heard,
            prompt_ids=self.prompt_ids or (),
            completion_ids=self.token_ids,
            logprobs=self.logprobs,
            sampled=self.sampled,
            spans=self.spans,
            intentions=self.intentions,
            forecast=self.forecast,
            message=self.message,
            action=self.action,
            malformed=self.malformed,
            reward=0.0,
            text=self.text,
            adapter=self.adapter,
            candidates=self.plan or (),
        )


class Answer(Body):
    """The turns of one step."""

    session: str
    step: int
    turns: tuple[TurnAnswer, ...]
    """In the order of the agents."""


class StepAnswer(Answer):
    """And what they led to in the service's own world."""

    rewards: Mapping[str, float]
    observations: Mapping[str, SeenBody]
    """What the agents see now."""
    done: bool
    success: bool | None
    state: str
    """The whole truth, in words."""
    board: tuple[str, ...]
    replay: Any = None


class SessionAnswer(Body):
    """A session."""

    id: str
    task: str | None
    params: Mapping[str, Any]
    instance: int
    seed: int
    split: str
    temperature: float
    plan: Any
    agents: Mapping[str, str | None]
    """Adapter by agent."""
    step: int
    """Turns so far."""
    horizon: int
    done: bool
    observations: Mapping[str, SeenBody]
    """What the agents see first in the service's own world; empty without a task."""
    channel: Mapping[str, Any]
    replay: Any = None
