"""What a message is worth to who hears it: with it minus without it, as a world model sees it, and as the world does.

    value = V(receiver's history, message) - V(receiver's history, no message)

Without it, the receiver still has what the same sender said before. Both futures are played with the same random
numbers, so a message that changes nothing that the receiver does is worth exactly 0, and messages that say what was
said before are left out. Later messages travel over a channel that loses nothing.

Parts: `Heard` and `heard` (messages and the moments at which they first count), `imagined_values` (in a world model),
`real_values` (the real ablation: the same moment of the environment, with the message delivered and withheld), and
`AblationCheck` with `check_values`, which holds one against the other by rank and refuses values that the world does
not bear out. Values that have not passed it must not enter training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preconcert.agents import ChannelSettings, Context, GenerativeTeam
from preconcert.agents.channel import Channel
from preconcert.agents.planners.paths import Path, advance, move_of, respond
from preconcert.agents.planners.scoring import lambda_return
from preconcert.agents.team import Memory
from preconcert.core import Env, Episode, Message, TrainingError, Turn, TurnRequest, WorldModel, derive_seed
from preconcert.envs import make_env
from preconcert.training.imagination import Moment, replayed
from preconcert.training.rollout import EpisodeSpec, Running, play_out

THRESHOLD = 0.6
"""Rank correlation below which imagined values are not to be trained on."""


@dataclass(frozen=True, slots=True)
class Heard:
    """One message at the moment its receiver first has it."""

    moment: Moment
    """The receiver's turn."""
    message: Message
    without: tuple[Message, ...]
    """The inbox as it would be had the message not come."""

    @property
    def turn(self) -> Turn:
        """The turn before which it was heard."""
        return self.moment.episode.trajectories[self.moment.agent].turns[self.moment.index]

    @property
    def name(self) -> str:
        """Unique among what is heard in a run."""
        return f"{self.moment.name}:{self.message.sender}"


def heard(episodes: Sequence[Episode], limit: int | None = None, seed: int = 0) -> list[Heard]:
    """Messages that said something else than their sender's last one, where they first stood in an inbox.

    Args:
        episodes: finished play.
        limit: as many at the most, each as likely as any other.
        seed: of that choice.
    """
    found: list[Heard] = []
    for episode in episodes:
        for agent, trajectory in episode.trajectories.items():
            for index, turn in enumerate(trajectory.turns):
                before = {mail.sender: mail for mail in trajectory.turns[index - 1].inbox} if index else {}
                for mail in turn.inbox:
                    old = before.get(mail.sender)
                    if old is not None and (old.payload, old.latent) == (mail.payload, mail.latent):
                        continue
                    rest = [other for other in turn.inbox if other.sender != mail.sender] + ([old] if old else [])
                    without = tuple(sorted(rest, key=lambda each: (each.sent_at, each.sender)))
                    found.append(Heard(Moment(episode, agent, index), mail, without))
    if limit is None or len(found) <= limit:
        return found
    return sorted(found, key=lambda each: derive_seed(seed, "heard", each.name))[:limit]


def imagined_values(
    team: GenerativeTeam,
    model: WorldModel,
    messages: Sequence[Heard],
    samples: int,
    horizon: int,
    seed: int,
    oracle: bool = False,
    lam: float = 1.0,
) -> list[float]:
    """What messages are worth in a world model, in which the receiver plays on by its own policy.

    Args:
        team: whose agent hears them; nothing that it remembers is changed.
        model: what the agent plays in. Its values, where it has any, stand for what comes after the horizon.
        messages: from `heard`.
        samples: futures per message and arm.
        horizon: steps to imagine at the most.
        seed: everything random follows from it.
        oracle: the model looks at environments and at everybody's views, and is given both.
        lam: of the lambda-return: 1 trusts the value at the horizon, 0 that after the first step.
    """
    returns = [_imagined(team, model, messages, arm, samples, horizon, seed, oracle, lam) for arm in (True, False)]
    found: list[float] = (returns[0] - returns[1]).mean(axis=1).tolist() if messages else []
    return found


def _imagined(
    team: GenerativeTeam,
    model: WorldModel,
    messages: Sequence[Heard],
    delivered: bool,
    samples: int,
    horizon: int,
    seed: int,
    oracle: bool,
    lam: float,
) -> NDArray[np.float64]:
    """Returns by message and sample, in one arm."""
    paths: list[Path] = []
    names: set[str] = set()
    envs: dict[str, Env] = {}
    for each in messages:
        if oracle:
            env = replayed(each.moment)
        else:  # a learned model looks at no environment; one stands for all of its task
            task = each.moment.episode.task
            env = envs.setdefault(task, make_env(task, each.moment.episode.params, each.moment.episode.seed))
        agents = [each.moment.agent, *(other for other in each.moment.episode.trajectories if oracle)]
        requests = [_request(each, agent, delivered, env, team) for agent in dict.fromkeys(agents)]
        pasts = [each.moment.episode.trajectories[one.agent].turns[: each.moment.index] for one in requests]
        memories = [_memory(team, past) for past in pasts]
        if oracle:  # it asks the team what the others do
            for request, memory in zip(requests, memories, strict=True):
                team.remember(request.episode, request.agent, memory)
        belief = model.begin(requests, pasts)[0]
        names.add(requests[0].episode)
        paths += [
            Path(requests[0], derive_seed(seed, each.name, sample), belief, memories[0]) for sample in range(samples)
        ]
    for _ in range(horizon):
        live = [path for path in paths if not path.over]
        advance(model, live, [move_of(turn) for turn in respond(team, live)])
    for name in names:
        model.finish(name)
        team.finish(name)
    returns = [
        lambda_return([step.reward for step in path.steps], [step.value for step in path.steps], 1.0, lam)
        for path in paths
    ]
    return np.array(returns, dtype=np.float64).reshape(len(messages), samples)


def _request(each: Heard, agent: str, delivered: bool, env: Env, team: GenerativeTeam) -> TurnRequest:
    trajectories = each.moment.episode.trajectories
    turn = trajectories[agent].turns[each.moment.index]
    withheld = agent == each.moment.agent and not delivered
    return TurnRequest(
        episode=each.name,
        agent=agent,
        observation=turn.observation,
        inbox=each.without if withheld else turn.inbox,
        others=tuple(other for other in trajectories if other != agent),
        language=team.language,
        seed=0,
        env=env,
        player=turn.adapter,
    )


def _memory(team: GenerativeTeam, past: Sequence[Turn]) -> Memory:
    """What a team remembers of an agent that has taken these turns.

    Raises:
        TrainingError: its agents remember whole transcripts, in which a message cannot be taken back.
    """
    if team.settings.context is not Context.TURN:
        raise TrainingError("a message can only be withheld from agents with agent.context=turn")
    return Memory(tuple(turn.action for turn in past))


def real_values(
    team: GenerativeTeam, messages: Sequence[Heard], samples: int, seed: int
) -> NDArray[np.float64]:
    """What messages are worth in the world: the moment is put back, and everybody plays on to the end.

    Args:
        team: plays all agents.
        messages: from `heard`.
        samples: games per message and arm.
        seed: everything random follows from it.

    Returns:
        The receiver's return with the message minus that without it, by message and sample.

    Raises:
        TrainingError: the environment is not the one that was played in.
    """
    found = np.zeros((len(messages), samples))
    snapshots = [replayed(each.moment).snapshot() for each in messages]
    for index in sorted({each.moment.index for each in messages}):
        places = [place for place, each in enumerate(messages) if each.moment.index == index]
        for sign, delivered in ((1.0, True), (-1.0, False)):
            # The same names and so the same luck in both arms.
            live = {
                f"{messages[place].name}:{sample}": _put_back(messages[place], snapshots[place])
                for place in places
                for sample in range(samples)
            }
            talk = Channel(ChannelSettings(), derive_seed(seed, "ablation"))
            groups = {name: state.spec.group for name, state in live.items()}
            for place in places:
                for sample in range(samples):
                    name = f"{messages[place].name}:{sample}"
                    _tell(talk, team, messages[place], delivered, name, groups[name])
            ended = play_out(live, team, talk, seed, index)
            for place in places:
                agent = messages[place].moment.agent
                for sample in range(samples):
                    game = ended[f"{messages[place].name}:{sample}"]
                    found[place, sample] += sign * game.trajectories[agent].total_reward
    return found


def _put_back(each: Heard, snapshot: Any) -> Running:
    """The moment in a world of its own."""
    one = each.moment.episode
    env = make_env(one.task, one.params, one.seed, one.split)
    env.reset()
    env.restore(snapshot)
    cast = {agent: turns[0].adapter for agent, turns in _turns(one).items() if turns[0].adapter is not None}
    spec = EpisodeSpec(one.task, one.params, one.seed, one.split, one.sample, one.iteration, cast)
    state = Running(spec, env, {agent: turns[each.moment.index].observation for agent, turns in _turns(one).items()})
    state.states.append(env.state())
    return state


def _turns(episode: Episode) -> dict[str, tuple[Turn, ...]]:
    return {agent: trajectory.turns for agent, trajectory in episode.trajectories.items()}


def _tell(talk: Channel, team: GenerativeTeam, each: Heard, delivered: bool, name: str, group: str) -> None:
    """Fill the inboxes and the team's memory of a game that is put back."""
    index = each.moment.index
    mails: list[Message] = []
    for agent, turns in _turns(each.moment.episode).items():
        withheld = agent == each.moment.agent and not delivered
        inbox = each.without if withheld else turns[index].inbox
        mails += [replace(mail, recipients=(agent,)) for mail in inbox]
        team.remember(name, agent, _memory(team, turns[:index]))
    if mails:
        talk.transmit({name: mails}, {name: group}, index - 1)


@dataclass(frozen=True, slots=True)
class AblationCheck:
    """Imagined values of messages beside what their absence really changed."""

    imagined: tuple[float, ...]
    real: tuple[float, ...]
    """Means over the samples."""
    correlation: float | None
    """Spearman's, of the two; None where one of them never varies."""
    reliability: float | None
    """The same between one half of the real samples and the other: no judge can agree much better with either."""
    threshold: float = THRESHOLD

    @property
    def passed(self) -> bool:
        """May the values enter training?"""
        return self.correlation is not None and self.correlation >= self.threshold

    def require(self) -> None:
        """Let nobody train on values that the world does not bear out.

        Raises:
            TrainingError: the check was not passed.
        """
        if not self.passed:
            shown = "not defined" if self.correlation is None else f"{self.correlation:.2f}"
            raise TrainingError(
                f"imagined values of messages are not to be trained on: over {len(self.real)} messages their rank "
                f"correlation with the real ablation is {shown}, and {self.threshold:g} is needed"
            )


def check_values(
    imagine: Callable[[Sequence[Heard]], Sequence[float]],
    team: GenerativeTeam,
    messages: Sequence[Heard],
    samples: int,
    seed: int,
    threshold: float = THRESHOLD,
) -> AblationCheck:
    """Hold imagined values against the real ablation.

    Args:
        imagine: gives the values, e.g. `imagined_values` with its other arguments bound.
        team: plays the real games.
        messages: from `heard`, best of episodes that nothing was fitted on.
        samples: real games per message and arm, at least 2.
        seed: everything random in the real games follows from it.
        threshold: rank correlation that is enough.

    Raises:
        TrainingError: there are fewer than three messages or two samples, or the values are not as many.
    """
    if len(messages) < 3 or samples < 2:
        raise TrainingError(f"{len(messages)} messages with {samples} samples each give no rank correlation")
    imagined = tuple(float(value) for value in imagine(messages))
    if len(imagined) != len(messages):
        raise TrainingError(f"{len(imagined)} values were imagined for {len(messages)} messages")
    real = real_values(team, messages, samples, seed)
    halves = rank_correlation(real[:, ::2].mean(axis=1), real[:, 1::2].mean(axis=1))
    means = real.mean(axis=1)
    return AblationCheck(imagined, tuple(means.tolist()), rank_correlation(imagined, means), halves, threshold)


def rank_correlation(
    one: Sequence[float] | NDArray[np.float64], other: Sequence[float] | NDArray[np.float64]
) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None where one side never varies."""
    first, second = _ranks(np.asarray(one, dtype=np.float64)), _ranks(np.asarray(other, dtype=np.float64))
    if len(first) != len(second):
        raise TrainingError(f"{len(first)} values cannot be ranked against {len(second)}")
    first, second = first - first.mean(), second - second.mean()
    spread = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / spread if spread > 0 else None


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    # Sums of the same numbers in another order are ties.
    _, places, counts = np.unique(np.round(values, 9), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = (ends - (counts - 1) / 2)[places]
    return ranks
