"""How large gradients are before they are clipped, and whose: by adapter, and by agent where agents share one.

Parts: `GradientShares`, `adapter_parameters`, `set_trainable`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import PeftModel

from preconcert.models.latents import CODECS


class GradientShares:
    """Sums squared norms over an iteration's optimiser steps.

    Args:
        trainable: adapters that learn.
        agents: every agent whose rows may be trained.
    """

    def __init__(self, trainable: Sequence[str], agents: Sequence[str]) -> None:
        self.trainable = tuple(trainable)
        self.agents = tuple(agents)
        self._by_adapter: defaultdict[str, float] = defaultdict(float)
        self._by_agent: defaultdict[str, float] = defaultdict(float)
        self._largest = 0.0

    @property
    def shared(self) -> bool:
        """Do agents share an adapter?"""
        return len(self.agents) > len(self.trainable)

    @torch.no_grad()
    def note(self, model: PeftModel, agent: str | None) -> dict[str, float]:
        """Count what an optimiser step is about to use.

        Args:
            model: with its gradients.
            agent: whose step it is; None where all agents learn at once.

        Returns:
            By adapter that has one, the norm of its gradient.
        """
        norms: dict[str, float] = {}
        everything = 0.0
        for name in self.trainable:
            gradients = [p.grad for p in adapter_parameters(model, name) if p.grad is not None]
            if gradients:
                square = float(sum(gradient.double().pow(2).sum() for gradient in gradients))
                norms[name] = math.sqrt(square)
                self._by_adapter[name] += square
                everything += square
                if agent is not None:
                    self._by_agent[agent] += square
        self._largest = max(self._largest, everything)
        return norms

    def note_agent(self, agent: str, gradient: torch.Tensor) -> None:
        """One agent's part of an iteration's first gradient."""
        self._by_agent[agent] = float(gradient.double().pow(2).sum())

    def take(self) -> Iterator[tuple[str, float]]:
        """The names and values of what an iteration logs; then count anew."""
        yield "gradient_norm/largest", math.sqrt(self._largest)
        shares = _shares({name: self._by_adapter[name] for name in self.trainable})
        if self.shared and self._by_agent:  # agents with adapters of their own, which are named like them, among them
            shares |= _shares({agent: self._by_agent[agent] for agent in self.agents})
        yield from ((f"gradient_share/{name}", share) for name, share in shares.items())
        self._largest = 0.0
        self._by_adapter.clear()
        self._by_agent.clear()


def set_trainable(model: PeftModel, adapters: Sequence[str]) -> None:
    """Let exactly these adapters' parameters require gradients."""
    wanted = {id(p) for name in adapters for p in adapter_parameters(model, name)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)


def adapter_parameters(model: PeftModel, adapter: str) -> list[torch.nn.Parameter]:
    """The parameters of one adapter, those of its codec included, in the model's order."""
    own = re.compile(rf"\.(lora_\w+|{CODECS})\.{re.escape(adapter)}(\.|$)")
    return [p for name, p in model.named_parameters() if own.search(name)]


def _shares(squares: Mapping[str, float]) -> dict[str, float]:
    total = sum(squares.values())
    return {name: square / total if total else 0.0 for name, square in squares.items()}
