"""Muon for hidden matrices and AdamW for everything else, as one optimiser.

Small models trained from scratch learn in a fraction of the steps this way (Muon: Jordan et al. 2024; the torch
implementation is used).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Two optimisers behind one interface, so that schedulers and trainers see all parameter groups.

    Args:
        model: its trainable parameters are optimised.
        muon_lr: for matrices that are neither embeddings nor heads.
        adamw_lr: for all other parameters.
        weight_decay: of both.
    """

    def __init__(self, model: nn.Module, muon_lr: float, adamw_lr: float, weight_decay: float = 0.0) -> None:
        hidden, rest = split_parameters(model)
        self.parts: list[torch.optim.Optimizer] = []
        if hidden:
            self.parts.append(
                torch.optim.Muon(hidden, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="original")
            )
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=adamw_lr, weight_decay=weight_decay, betas=(0.9, 0.95)))
        self.defaults: dict[str, Any] = {}
        self.state: Any = {}
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self._optimizer_step_pre_hooks: Any = {}
        self._optimizer_step_post_hooks: Any = {}

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both states; the parameter groups stay shared with the parts."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as (hidden matrices, everything else)."""
    outside: set[int] = set()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, name)() if hasattr(model, name) else None
        if module is not None:
            outside.update(id(parameter) for parameter in module.parameters())
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in _trainable(model.parameters()):
        (hidden if parameter.ndim == 2 and id(parameter) not in outside else rest).append(parameter)
    return hidden, rest


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]
