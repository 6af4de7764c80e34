"""The work of the cells of experiments `communication` and `channel`: a team is trained, and played through channels.

Parts: `talk_and_judge` (the work), `silenced` (a recipe without messages), `lengths` (bits counted three ways), `area`
(success against bits) and `examples` (some of what was said).
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from preconcert.agents import ChannelSettings, FallbackTeam, SlotsSettings
from preconcert.core import Episode, Message, Policy, Slot
from preconcert.experiments.cell import CellFound
from preconcert.experiments.evaluation import Players, heldout_specs, play
from preconcert.experiments.judgement import LAST, course, curves_of, read_log
from preconcert.experiments.world_data import share_run, shared_run
from preconcert.models.entropy_coding import MessageCoder
from preconcert.training.measures import measure
from preconcert.training.message_prior import CountPrior, coding_report, slots_of, spoken
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy
from preconcert.training.run import train

_OF_TEAMS = ("greedy", "warm")
"""What a channel's settings say of the team that plays."""
SHOWN = 400
"""Messages that a cell keeps as examples."""
_MOST_NUMBERS = 64
"""Of a message that is kept; whole embeddings are not."""


def talk_and_judge(
    recipe: Recipe, folder: Path, options: Mapping[str, Any], warm_cache: Path, reporter: Reporter
) -> CellFound:
    """Train in FOLDER/run, going on with what is there, and play held-out instances through every channel asked for.

    Args:
        recipe: of the run.
        folder: of the cell.
        options: `episodes`, held-out instances per channel; `channels`, by name what is different in the channel (and
            `greedy`: true for the most likely words, `warm`: true for the team before reinforcement learning); `caps`,
            bits per message at which success is also measured;
            `fitting`, training instances that the shared prior of messages is counted on; `subjects`, by task the word
            of an observation after which stands what messages are about; `player`, a scripted player in the team's
            place, which is not trained; `patience`, steps after which agents that have heard nothing act as the team
            would that was trained alike without messages.
        warm_cache: shared warm starts.
        reporter: receives progress.
    """
    episodes = int(options["episodes"])
    specs = heldout_specs(recipe, episodes, 0)
    if options.get("player"):
        reporter.stage("held-out play", episodes)
        played = play(specs, ScriptedPolicy(str(options["player"])), recipe.channel, 0, reporter)
        return CellFound({"success_on": rate(played)}, {})
    patience = options.get("patience")
    silent: Players | None = None
    if patience is None:
        run = train(recipe, folder / "run", resume=True, reporter=reporter, warm_cache=warm_cache)
    else:
        run = shared_run(recipe, folder, warm_cache, reporter)
        without = silenced(recipe)
        silent = Players(shared_run(without, folder / "silent", warm_cache, reporter), without)
    log = read_log(run / "log.jsonl")
    curves = curves_of(log, recipe)
    players = Players(run, recipe)

    def team_of(greedy: bool = False, warm: bool = False) -> Policy:
        talking = players.team(greedy, warm)
        if silent is None or patience is None:
            return talking
        return FallbackTeam(talking, silent.team(greedy, warm), int(patience))

    talks = recipe.agent.spans.say and bool(players.env.language.message)
    measures = capped(log, recipe)
    notes: dict[str, Any] = {}
    for name, changed in options["channels"].items():
        if not talks and name not in ("on", "greedy", "warm"):
            continue
        reporter.stage(f"held-out play, {name}", episodes)
        team = team_of(bool(changed.get("greedy", False)), bool(changed.get("warm", False)))
        over = ChannelSettings.model_validate(
            {**recipe.channel.model_dump(), **{key: value for key, value in changed.items() if key not in _OF_TEAMS}}
        )
        played = play(specs, team, over, 0, reporter)
        measures[f"success_{name}"] = rate(played)
        if isinstance(team, FallbackTeam):
            measures[f"fallen_back_{name}"] = team.fallen_back / team.decisions
        if name == "on":
            found = measure(played, players.env.language, recipe.agent.spans)
            measures["return_on"] = found.return_mean
            measures["malformed"] = found.malformed_rate
            measures["steps"] = found.steps_mean
            if talks:
                train_specs = [
                    EpisodeSpec(recipe.task, recipe.params, 10_000 + number, "train", number)
                    for number in range(int(options["fitting"]))
                ]
                counted = play(train_specs, team_of(), over, 0)
                measures |= lengths(counted, played, players.env.language.message)
                subject = dict(options.get("subjects", {})).get(recipe.task)
                notes["messages"] = examples(played, subject)
    if talks and options.get("caps"):
        points: list[tuple[float, float]] = []
        for cap in options["caps"]:
            reporter.stage(f"held-out play, {cap} bits", episodes)
            over = recipe.channel.model_copy(update={"cap_bits": float(cap)})
            success = rate(play(specs, team_of(), over, 0, reporter))
            measures[f"success_cap_{cap}"] = success
            points.append((float(cap), success or 0.0))
        measures["area"] = area(points)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # some MB each; the adapters stay
    share_run(recipe, run, warm_cache, reporter)
    return CellFound(measures | course(curves), curves, notes)


def silenced(recipe: Recipe) -> Recipe:
    """The same without messages, and so without anything wrong with their channel."""
    spans = recipe.agent.spans.model_copy(update={"say": False})
    agent = recipe.agent.model_copy(update={"spans": spans, "codec": SlotsSettings()})
    return recipe.model_copy(update={"agent": agent, "channel": ChannelSettings(), "channels": {}})


def capped(log: Sequence[Mapping[str, Any]], recipe: Recipe) -> dict[str, float | None]:
    """`bits_at_end`, per message, mean of the last five iterations; and their `cap`, where the recipe has one."""
    price = recipe.grpo.message_price
    said = [line["message/bits_per_message"] for line in log[-LAST:] if "message/bits_per_message" in line]
    if price is None or price.cap_bits is None or not said:
        return {}
    return {"bits_at_end": sum(said) / len(said), "cap": price.cap_bits}


def rate(episodes: Sequence[Episode]) -> float | None:
    """Share of the episodes that succeeded; None where the task has no such notion."""
    judged = [episode.success for episode in episodes if episode.success is not None]
    return sum(judged) / len(judged) if judged else None


def lengths(
    counted: Sequence[Episode], played: Sequence[Episode], slots: Sequence[Slot]
) -> dict[str, float | None]:
    """Bits per episode: without a model, under the senders' own policies, and coded under a shared prior.

    The prior counts words on the first episodes and codes the second, bits that could be sent: each message is decoded
    again. Numbers that are not quantised have no code.

    Args:
        counted: played on training instances.
        played: on held-out ones.
        slots: of the task's messages.
    """
    sent = [turn.message for e in played for t in e.trajectories.values() for turn in t.turns]
    said = [message for message in sent if message is not None]
    found: dict[str, float | None] = {
        "messages_per_episode": len(said) / len(played),
        "words_per_message": sum(len(m.payload.split()) for m in said) / len(said) if said else None,
        "bits_raw": sum(message.raw_bits for message in said) / len(played),
        "bits_own": sum(message.bits for message in said) / len(played),
    }
    if any(message.latent is not None for message in said):
        found["bits_own"] = None  # a density of numbers is no length
    if not said or any(message.latent is not None and not message.latent.levels for message in said):
        return found
    learned, heldout = [_in_numbers(episode) for episode in counted], [_in_numbers(episode) for episode in played]
    messages = [message for episode in learned for message in spoken(episode, slots)]
    made_of, stops = slots_of(message.text for message in messages)
    prior = CountPrior(made_of, stops).fit(messages)
    coded = coding_report(heldout, {"count": MessageCoder(prior)}, slots)["count"]
    found["bits_coded"] = coded.per_episode
    return found


def _in_numbers(episode: Episode) -> Episode:
    """The same with every quantised number of a latent message as a word of its own, so that a prior can count it."""
    return replace(
        episode,
        trajectories={
            agent: replace(
                trajectory,
                turns=tuple(
                    replace(
                        turn,
                        message=_worded(turn.message),
                        inbox=tuple(worded for held in turn.inbox if (worded := _worded(held)) is not None),
                    )
                    for turn in trajectory.turns
                ),
            )
            for agent, trajectory in episode.trajectories.items()
        },
    )


def _worded(message: Message | None) -> Message | None:
    if message is None or message.latent is None:
        return message
    words = re.sub(",", " ", message.payload)
    count = len(words.split())
    return replace(message, payload=words, latent=None, word_bits=(math.log2(message.latent.levels),) * count)


def area(points: Sequence[tuple[float, float]]) -> float:
    """Area under success against log2(1 + bits per message), as a share of the whole range of bits.

    Args:
        points: (cap in bits, success); at least two caps.
    """
    bits, success = (np.array(column) for column in zip(*sorted(points), strict=True))
    x = np.log2(1.0 + bits)
    return float(np.trapezoid(success, x) / (x[-1] - x[0]))


def examples(episodes: Sequence[Episode], subject: str | None) -> list[dict[str, Any]]:
    """Some messages, drawn evenly from all: words, numbers of latent ones, who said them when, and about what.

    Args:
        episodes: that were played.
        subject: the word of an observation after which stands what messages are about; None if nothing does.
    """
    found: list[dict[str, Any]] = []
    for episode in episodes:
        for agent, trajectory in episode.trajectories.items():
            for turn in trajectory.turns:
                if turn.message is None:
                    continue
                words = turn.observation.text.split()
                about = words[words.index(subject) + 1] if subject in words[:-1] else ""
                latent = turn.message.latent
                numbers = [] if latent is None else [round(n, 4) for vector in latent.values for n in vector]
                if len(numbers) > _MOST_NUMBERS:
                    continue
                found.append(
                    {
                        "words": turn.message.payload,
                        "numbers": numbers,
                        "sender": agent,
                        "step": turn.step,
                        "about": about,
                        "action": turn.action,
                    }
                )
    chosen = np.random.default_rng(0).permutation(len(found))[:SHOWN]
    return [found[int(place)] for place in sorted(chosen)]
