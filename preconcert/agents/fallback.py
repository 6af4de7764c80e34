"""A team that talks, and one that does not for as long as nothing has been heard.

A team that has learned to act on messages waits for them, and where the channel is dead it waits for good. Whoever has
learned without messages does not. Each agent decides for itself, turn by turn and from its own inbox alone: until a
first message has arrived, it acts as the silent team would, and says what the talking team would, since it does not
know whether others hear it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from preconcert.agents.team import GenerativeTeam
from preconcert.core import ConfigError, Slot, Turn, TurnRequest


class FallbackTeam:
    """A `Policy` made of two teams for the same task.

    A turn of the silent team is put on record as it was written, with the other team's message; what is recorded so is
    not to be trained on.

    Args:
        talking: writes messages, and acts on them.
        silent: acts where none has arrived; one that writes no messages.
        patience: steps of an episode that agents wait for a first message; by then one that was sent at the first step,
            over a channel with nothing wrong, has arrived.

    Raises:
        ConfigError: a team that remembers its turns, which are not all its own here; a silent team that is not; other
            agents than the talking team's; patience below 1.
    """

    def __init__(self, talking: GenerativeTeam, silent: GenerativeTeam, patience: int = 3) -> None:
        if patience < 1:
            raise ConfigError(f"patience = {patience}: nothing can have arrived before step 1")
        for team in (talking, silent):
            if team.settings.remembers:
                raise ConfigError(
                    "a team to fall back on needs agent.memory=0 and agent.context=turn on both sides: agents would "
                    "remember turns that they have not taken"
                )
        if silent.settings.spans.say:
            raise ConfigError(
                "the team to fall back on writes messages itself: it has not learned to do without (agent.spans.say)"
            )
        if set(talking.assignment) != set(silent.assignment):
            raise ConfigError(
                f"the team to fall back on has agents {sorted(silent.assignment)}, not {sorted(talking.assignment)}"
            )
        self.talking, self.silent = talking, silent
        self.patience = patience
        self.version = talking.version
        self.decisions = 0
        """Turns decided so far."""
        self.fallen_back = 0
        """Turns of them in which an agent acted as the silent team would."""

    def deaf(self, moment: TurnRequest | Turn) -> bool:
        """Has an agent waited long enough without having heard anything? Its turn is the silent team's then."""
        return not moment.inbox and moment.observation.step >= self.patience

    def decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """One turn per request, from a batch of each team."""
        turns = self.talking.decide(requests)
        places = [place for place, request in enumerate(requests) if self.deaf(request)]
        acted = self.silent.decide([requests[place] for place in places]) if places else []
        for place, turn in zip(places, acted, strict=True):
            turns[place] = replace(turn, message=turns[place].message)
        self.decisions += len(requests)
        self.fallen_back += len(places)
        return turns

    def message_slots(self, others: Sequence[str]) -> tuple[Slot, ...]:
        """Those of the talking team: whatever is sent is its words."""
        return self.talking.message_slots(others)

    def finish(self, episode: str) -> None:
        """Let go of what is held for an episode."""
        self.talking.finish(episode)
        self.silent.finish(episode)
