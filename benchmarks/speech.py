"""What it costs to count and to code messages, beside the rollout that they are said in.

`metering` gives every message of a rollout its length under counts of words, which are new in every rollout; `coding`
turns every message into bits under a model's adapter and back into words, as sender and receiver would, each with
distributions of its own. A prior is fitted once, so those that came up in one rollout are still held in the next one;
the messages are another rollout's every time.

`hearing` answers prompts that hold a latent message of k vectors, `reading` the same prompts with k words in their
place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preconcert.agents import AgentSettings, ChannelSettings, GenerativeTeam, codec_of, turn_format_of
from preconcert.agents.codecs import LatentCodecSettings
from preconcert.core import Episode, Latent, derive_seed
from preconcert.envs import make_env
from preconcert.models import (
    GenerateRequest,
    LatentSettings,
    LoraSettings,
    Placed,
    StarterSettings,
    TransformersModel,
    build_starter,
    quantised,
)
from preconcert.models.entropy_coding import MessageCoder
from preconcert.prompts import SpanSettings, starter_words
from preconcert.prompts.prior_format import PriorFormat
from preconcert.training.message_prior import ADAPTER, CountPrior, PublicContext, model_prior, spoken
from preconcert.training.rollout import EpisodeSpec, rollout

TASK = "rendezvous"
_ROLLOUTS = 4
"""Whose messages take turns."""


class SpeechBench:
    """The models and the sides; each is made ready when it is first asked for.

    Args:
        width: of the starter model.
        folder: for its checkpoint.
        seeds: of the rollout.
        group: episodes per seed.
    """

    def __init__(self, width: int, folder: Path, seeds: int, group: int) -> None:
        self.env: Any = make_env(TASK, {}, 0)
        self.seeds, self.group = seeds, group
        self._turn = 0
        words = starter_words(self.env.words, self.env.language, self.env.agents)
        shape = StarterSettings(width=width, ffn=2 * width)
        self.checkpoint = build_starter(words, folder / "speaker", 0, shape)
        self.model = self._load((*self.env.agents, ADAPTER))
        self.team = GenerativeTeam(
            self.model, self.env.language, AgentSettings(), {agent: agent for agent in self.env.agents}
        )
        self.format = PriorFormat(self.team.format, self.env.language.message)

    def metering(self) -> int:
        """Lengths of all messages under counts of another rollout."""
        messages = self._next()
        MessageCoder(self._counts).bits(messages)
        return len(messages)

    def coding(self) -> int:
        """All messages to bits and back."""
        messages = self._next()
        self._there_and_back(messages, *self._ends)
        return len(messages)

    def hearing(self) -> int:
        """Turns after prompts with vectors in them."""
        return len(self.model.generate(self._asked(True)))

    def reading(self) -> int:
        """Turns after the same prompts with as many words."""
        return len(self.model.generate(self._asked(False)))

    def _asked(self, vectors: bool) -> list[GenerateRequest]:
        return self._prompts[vectors]

    @cached_property
    def _prompts(self) -> tuple[list[GenerateRequest], list[GenerateRequest]]:
        """The prompts of a rollout's second turns, each with words or with vectors from everyone else."""
        count = len(self.env.language.message)
        shape = LatentSettings(tokens=count)
        for number, agent in enumerate(self.env.agents):
            self.model.add_codec(agent, shape, number)
        words: list[GenerateRequest] = []
        latent: list[GenerateRequest] = []
        settings = LatentCodecSettings(tokens=count)
        codec = codec_of(settings, self.env.language, SpanSettings())
        places = turn_format_of(self.model.tokenizer, AgentSettings(codec=settings), codec)
        for episode in self._play(9):
            for agent, trajectory in episode.trajectories.items():
                turn = trajectory.turns[1]
                others = tuple(other for other in episode.trajectories if other != agent)
                automaton = self.team.format.automaton(others, turn.observation.legal_actions)
                plain = GenerateRequest(turn.prompt_ids, len(words), agent, automaton, max_tokens=96)
                ids, starts = places.prompt_with_places(agent, turn.observation, turn.inbox, others)
                assert len(ids) == len(turn.prompt_ids), "the prompts are of different lengths"
                # The same words, the same vectors: equal prompts are read once on either side.
                rng = np.random.default_rng(derive_seed(*(message.payload for message in turn.inbox)))
                values = quantised(torch.from_numpy(rng.normal(size=(len(others), count, shape.dims))), shape.levels)
                heard = tuple(
                    Placed(starts[other], Latent(tuple(map(tuple, numbers)), shape.levels))
                    for other, numbers in zip(others, values.tolist(), strict=True)
                )
                words.append(plain)
                latent.append(replace(plain, prompt_ids=ids, latents=heard))
        return words, latent

    def check(self) -> None:
        """What is coded comes back, or nothing was measured."""
        messages = self._next()
        back = self._there_and_back(messages, *self._ends)
        assert back == [text for _, text in messages], "a message came back as another"

    def _there_and_back(
        self, messages: Sequence[tuple[PublicContext, str]], sender: MessageCoder, receiver: MessageCoder
    ) -> list[str]:
        codes = sender.encode(messages)
        return receiver.decode([(context, code) for (context, _), code in zip(messages, codes, strict=True)])

    @cached_property
    def _ends(self) -> tuple[MessageCoder, MessageCoder]:
        """Sender and receiver, who have coded a rollout before."""
        sender, receiver = (MessageCoder(model_prior(self.model, self.format)) for _ in range(2))
        self._there_and_back(self._next(), sender, receiver)
        return sender, receiver

    def _next(self) -> list[tuple[PublicContext, str]]:
        """The messages of the next rollout: one per turn."""
        self._turn = (self._turn + 1) % len(self._messages)
        return self._messages[self._turn]

    @cached_property
    def _messages(self) -> list[list[tuple[PublicContext, str]]]:
        return [
            [(each.context, each.text) for episode in self._play(seed) for each in spoken(episode)]
            for seed in range(1, 1 + _ROLLOUTS)
        ]

    @cached_property
    def _counts(self) -> CountPrior:
        said = [each for episode in self._play(0) for each in spoken(episode)]
        return CountPrior(self.env.language.message).fit(said)

    def _play(self, seed: int) -> list[Episode]:
        specs = [EpisodeSpec(TASK, {}, number, sample=k) for number in range(self.seeds) for k in range(self.group)]
        return rollout(specs, self.team, ChannelSettings(), seed)

    def _load(self, adapters: Sequence[str]) -> TransformersModel:
        model = TransformersModel.load(self.checkpoint, LoraSettings(), device="cpu")
        for number, name in enumerate(adapters):
            model.add_adapter(name, number)
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for key, value in model.adapter_parameters(name).items():
                    if "lora_B" in key:
                        value.normal_(0, 0.02, generator=generator)
        return model
