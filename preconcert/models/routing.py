"""Per-row adapters: each row of a batch goes through its own LoRA adapter, in generation and in training.

`route_rows` holds two hooks on every LoRA layer. The first makes peft compute the base layer alone (its own path for
mixed batches, every row named `__base__`); the second adds each row's low-rank term. Nothing else of the model is
touched: neither the active adapter nor `requires_grad`. Keep the route open until after the backward pass, since
activation checkpointing runs the forward pass a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from preconcert.core import ModelError, nearest

_open_routes: WeakKeyDictionary[nn.Module, list[AdapterRoute]] = WeakKeyDictionary()
"""The open routes of each LoRA layer, innermost last; only the innermost counts."""


class AdapterRoute:
    """An open route; a context manager, and closed by hand with `close`."""

    def __init__(self, model: nn.Module, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.runs = _runs_of(self.names)
        self._base_names = ["__base__"] * len(self.names)
        self._rows: dict[tuple[str, torch.device], Tensor] = {}
        self._handles: list[Any] = []
        layers = lora_layers(model)
        known = sorted({name for layer in layers.values() for name in layer.lora_A})
        for name in self.runs:
            if name not in known:
                raise ModelError(f"unknown adapter {name!r}; {nearest(name, known)}")
        self._layers = tuple(layers.values())
        for path, layer in layers.items():
            if layer.lora_embedding_A or layer.lora_variant:
                raise ModelError(f"rows cannot be routed through {path!r}: only plain LoRA on linear layers can")
        for layer in self._layers:
            _open_routes.setdefault(layer, []).append(self)
            self._handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._after))

    def close(self) -> None:
        """Take the hooks away. Closing twice is allowed."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers:
            stack = _open_routes.get(layer, [])
            if self in stack:
                stack.remove(self)
        self._layers = ()

    def __enter__(self) -> AdapterRoute:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if _open_routes[layer][-1] is not self:
            return None
        if args[0].shape[0] != len(self.names):
            raise ModelError(f"{args[0].shape[0]} rows reached a LoRA layer, but {len(self.names)} are routed")
        return args, {**kwargs, "adapter_names": self._base_names}

    def _after(self, layer: LoraLayer, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if _open_routes[layer][-1] is not self or layer.disable_adapters or not self.runs:
            return output
        inputs = args[0]
        present = [(name, rows) for name, rows in self.runs.items() if name in layer.lora_A]
        if all(isinstance(rows, slice) for _, rows in present):
            return self._add_to_slices(layer, inputs, output, present)
        for name, rows in present:
            index = self._index_of(name, rows, inputs.device)
            term = _low_rank(layer, name, inputs.index_select(0, index))
            output = output.index_add(0, index, term.to(output.dtype))
        return output

    def _add_to_slices(
        self, layer: LoraLayer, inputs: Tensor, output: Tensor, present: list[tuple[str, Any]]
    ) -> Tensor:
        """Every adapter's rows are neighbours: work on views and put the pieces together once."""
        recording = torch.is_grad_enabled()
        if not recording:
            for name, rows in present:
                _add_low_rank_(layer, name, inputs[rows], output[rows])
            return output
        pieces, end = [], 0
        for name, rows in sorted(present, key=lambda pair: pair[1].start):
            if rows.start > end:
                pieces.append(output[end : rows.start])
            pieces.append(output[rows] + _low_rank(layer, name, inputs[rows]).to(output.dtype))
            end = rows.stop
        if end < len(output):
            pieces.append(output[end:])
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _index_of(self, name: str, rows: Any, device: torch.device) -> Tensor:
        key = (name, device)
        if key not in self._rows:
            places = list(range(rows.start, rows.stop)) if isinstance(rows, slice) else rows
            self._rows[key] = torch.tensor(places, device=device)
        return self._rows[key]


def route_rows(model: nn.Module, names: Sequence[str | None]) -> AdapterRoute:
    """Send row `i` of every following forward pass through adapter `names[i]`; None is the base model.

    Routes nest: while an inner one is open, it alone counts.

    Args:
        model: a peft model, or the base model inside one.
        names: one per row of the batch.

    Raises:
        ModelError: an adapter is unknown, or is not plain LoRA on linear layers.
    """
    return AdapterRoute(model, names)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of a model by their path in it."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def _runs_of(names: tuple[str | None, ...]) -> dict[str, slice | list[int]]:
    """The rows of each adapter in order of first appearance: a slice where they are neighbours."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            rows.setdefault(name, []).append(row)
    return {
        name: slice(places[0], places[-1] + 1) if places[-1] - places[0] + 1 == len(places) else places
        for name, places in rows.items()
    }


def _low_rank(layer: LoraLayer, name: str, inputs: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
    down, up = layer.lora_A[name], layer.lora_B[name]
    return up(down(layer.lora_dropout[name](inputs.to(down.weight.dtype)))) * layer.scaling[name]


def _add_low_rank_(
    layer: LoraLayer, name: str, inputs: Float[Tensor, "*rows in"], output: Float[Tensor, "*rows out"]
) -> None:
    """Add in place; used where no gradient is recorded."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    plain = up.bias is None and output.dtype == up.weight.dtype and output.is_contiguous()
    if not plain or torch.is_autocast_enabled(output.device.type) or layer.training:
        output += _low_rank(layer, name, inputs).to(output.dtype)
        return
    hidden = functional.linear(inputs, down.weight).view(-1, down.out_features)
    output.view(-1, up.out_features).addmm_(hidden, up.weight.t(), alpha=layer.scaling[name])
