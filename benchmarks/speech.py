"""What it costs to count and to code messages, beside the rollout that they are said in.

`metering` gives every message of a rollout its length under counts of words, which are new in every rollout; `coding`
turns every message into bits under a model's adapter and back into words, as sender and receiver would, each with
distributions of its own. A prior is fitted once, so those that came up in one rollout are still held in the next one;
the messages are another rollout's every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from preconcert.agents import AgentSettings, ChannelSettings, GenerativeTeam
from preconcert.core import Episode
from preconcert.envs import make_env
from preconcert.models import LoraSettings, StarterSettings, TransformersModel, build_starter
from preconcert.models.entropy_coding import MessageCoder
from preconcert.prompts import starter_words
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
