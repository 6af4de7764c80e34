"""Episodes as rows for a world model: what one agent had before it, what it did, and what came of that.

Parts: `Step` (one real transition), `world_steps` (from episodes), `WorldRow` (tokens, and which part of the answer
each belongs to), `world_row`, `value_range_of`. What rows a batch has is said in `world_data.py`, the loss in
`world_model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from preconcert.core import Episode, Message, Move, StopReason
from preconcert.prompts import OWN_TEAM, WorldAnswer, WorldFormat, WorldPart
from preconcert.world_models import TokenBelief
from preconcert.world_models.token import last_words, lived


class Loss(StrEnum):
    """What a token counts towards: the parts of an answer, and its form."""

    OTHERS = WorldPart.OTHERS
    VIEW = WorldPart.VIEW
    REWARD = WorldPart.REWARD
    DONE = WorldPart.DONE
    HEAR = WorldPart.HEAR
    VALUE = WorldPart.VALUE
    FORM = "form"
    """Tokens that the grammar forces: only answers written without it need to know them."""


LOSSES = tuple(Loss)
"""Kind `k` of a row's token is `LOSSES[k - 1]`; 0 is none."""


@dataclass(frozen=True, slots=True)
class Step:
    """One transition as one agent lived it."""

    belief: TokenBelief
    move: Move
    """The others' real actions included."""
    view: str
    """The text of the next view."""
    reward: float
    done: bool
    heard: Mapping[str, str]
    """The agent's next inbox; empty at the end."""
    to_go: float
    """Sum of the rewards after this step."""
    ending: bool
    """The last step of its episode, or one whose reward is not the commonest one."""


def world_steps(episode: Episode, memory: int, partners: str = OWN_TEAM, recall: int = 0) -> list[list[Step]]:
    """Every agent's steps in order.

    Args:
        episode: finished play.
        memory: how many of its own last actions an agent is reminded of.
        partners: who played, one of `PARTNERS`.
        recall: how many earlier moments a belief holds.
    """
    chains: list[list[Step]] = []
    for agent, mine in episode.trajectories.items():
        others = tuple(other for other in episode.trajectories if other != agent)
        rewards = [turn.reward for turn in mine.turns]
        commonest = max(sorted(set(rewards)), key=rewards.count) if rewards else 0.0
        actions = [turn.action for turn in mine.turns]
        chain: list[Step] = []
        for index, turn in enumerate(mine.turns):
            last = index + 1 == len(mine.turns)
            recent = tuple(actions[max(0, index - memory) : index]) if memory else ()
            theirs = {other: episode.trajectories[other].turns[index].action for other in others}
            chain.append(
                Step(
                    belief=TokenBelief(
                        agent,
                        others,
                        turn.observation,
                        turn.inbox,
                        recent,
                        partners,
                        last_words(mine.turns[:index]),
                        lived(mine.turns[:index], recall),
                    ),
                    move=Move(turn.action, turn.message.payload if turn.message is not None else None, theirs),
                    view=(mine.final_observation if last else mine.turns[index + 1].observation).text,
                    reward=turn.reward,
                    done=last and mine.stop_reason is not StopReason.CUT,
                    heard={} if last else heard_of(mine.turns[index + 1].inbox),
                    to_go=sum(rewards[index + 1 :]),
                    ending=last or turn.reward != commonest,
                )
            )
        # Of a cut episode nobody knows what was heard after its last step.
        chains.append(chain[:-1] if mine.stop_reason is StopReason.CUT else chain)
    return [chain for chain in chains if chain]


def heard_of(inbox: Sequence[Message]) -> dict[str, str]:
    """The words last received, by sender."""
    return {message.sender: message.payload for message in inbox}


def value_range_of(episodes: Sequence[Episode]) -> tuple[float, float]:
    """The least and the greatest sum of rewards after any step, 0 among them."""
    sums = [0.0]
    for episode in episodes:
        for trajectory in episode.trajectories.values():
            ahead = 0.0
            for turn in reversed(trajectory.turns):
                sums.append(ahead)
                ahead += turn.reward
    return min(sums), max(sums)


@dataclass(frozen=True, slots=True)
class WorldRow:
    """One answer to learn, with its prompt."""

    ids: tuple[int, ...]
    kinds: tuple[int, ...]
    """Per token what it counts towards, as numbers of `LOSSES` from 1; 0 where there is no loss."""
    weight: float = 1.0
    """Of every token of the row."""


def world_row(
    spelling: WorldFormat,
    step: Step,
    given: bool,
    order: Sequence[str] = (),
    dice: float | None = 0.5,
    belief: TokenBelief | None = None,
    weight: float = 1.0,
) -> WorldRow:
    """The row of one transition.

    Args:
        spelling: of prompts and answers.
        step: what really happened.
        given: put the others' actions into the prompt; otherwise the answer has them.
        order: in which the others are written; by default that of the episode.
        dice: rounds the value to its digit; None leaves the value without loss.
        belief: what the agent had before it, where that is not the real thing. The target stays the real one.
        weight: of every token.

    Raises:
        GrammarError: something that happened does not fit the task's language.
    """
    belief = belief or step.belief
    others = belief.others
    asked = () if given else tuple(order) or others
    theirs = step.move.others or {}
    move = Move(step.move.action, step.move.message, theirs if given else None)
    prompt = spelling.prompt_ids(
        belief.agent,
        belief.observation,
        belief.inbox,
        others,
        belief.memory,
        move,
        belief.partners,
        belief.said,
        belief.earlier,
    )
    valued = spelling.valued and not step.done
    answer = WorldAnswer(
        view=step.view,
        reward=spelling.reward_word(step.reward),
        done=step.done,
        others={other: theirs[other] for other in asked},
        heard=step.heard if spelling.talks and not step.done else {},
        value=spelling.digit_of(step.to_go, 0.0 if dice is None else dice) if valued else None,
    )
    written = spelling.write(answer, others, asked)
    kinds = [0 if chosen else 1 + LOSSES.index(Loss.FORM) for chosen in written.chosen]
    for span in written.spans:
        silent = span.part is WorldPart.VALUE and dice is None
        for place in range(span.start, span.end):
            if written.chosen[place]:
                kinds[place] = 0 if silent else 1 + LOSSES.index(Loss(span.part))
    if spelling.automaton(others, asked) is None:
        # The mark after words of any kind belongs to them: where they end is to be learnt.
        ends = {span.end for span in written.spans if span.part is WorldPart.VIEW}
        kinds = [1 + LOSSES.index(Loss.VIEW) if place in ends else kind for place, kind in enumerate(kinds)]
    return WorldRow((*prompt, *written.ids), (*[0] * len(prompt), *kinds), weight)
