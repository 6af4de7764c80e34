"""Log-probabilities under the grammar's mask, with gradients: what the trainer scores its rows with.

`constrained_logprobs` is the computation; `add_constrained_head` makes a model's own forward pass return it, so that it
works through peft, DDP and TRL's wrappers. The table of masks comes from `grammar_table`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import ModelOutput

from preconcert.core import ModelError
from preconcert.prompts.automaton import Automaton

UNCONSTRAINED = -1
"""`allowed_index` of a position that any token may fill."""
UNSCORED = -2
"""`allowed_index` of padding: log-probability and entropy are 0."""


@dataclass
class ConstrainedOutput(ModelOutput):
    """What a forward pass with `constrained_head=True` returns; each of shape (batch, logits_to_keep)."""

    logprobs: Tensor | None = None
    """Of each completion token, in float32."""
    entropy: Tensor | None = None
    """Of the distribution that each token comes from, in nats."""
    target_logprobs: Tensor | None = None
    """Of `target_ids` at the same places, where they were given."""
    states: Tensor | None = None
    """Hidden states at `state_columns`, where they were given; shape (batch, places, width)."""


@dataclass(frozen=True)
class HeadScale:
    """What a few architectures do to their logits after the projection."""

    factor: float = 1.0
    softcap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """The model's logits from the bare projection."""
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_scale(config: Any) -> HeadScale:
    """Read the logit scale and soft cap from a model's configuration."""
    text = config.get_text_config()
    factor = getattr(text, "logit_scale", None)
    if factor is None and getattr(text, "logits_scaling", None) is not None:
        factor = 1.0 / text.logits_scaling
    return HeadScale(1.0 if factor is None else float(factor), getattr(text, "final_logit_softcapping", None))


def grammar_table(
    automatons: Sequence[Automaton],
) -> tuple[Int[np.ndarray, " columns"], Bool[np.ndarray, "states columns"], list[int]]:
    """Put the masks of several automatons into one table.

    Returns:
        The union of their tokens (ascending), which of them are allowed in each state, and per automaton the row of its
        state 0; its state `s` is row `start + s`.
    """
    if not automatons:
        return np.zeros(0, dtype=np.int64), np.zeros((0, 0), dtype=np.bool_), []
    tokens = np.unique(np.concatenate([automaton.tokens for automaton in automatons]))
    starts = np.concatenate([[0], np.cumsum([automaton.size for automaton in automatons])])
    allowed = np.zeros((int(starts[-1]), len(tokens)), dtype=np.bool_)
    for automaton, start in zip(automatons, starts[:-1], strict=True):
        columns = np.searchsorted(tokens, automaton.tokens)
        allowed[start : start + automaton.size, columns] = automaton.allowed
    return tokens, allowed, [int(start) for start in starts[:-1]]


def constrained_logprobs(
    hidden: Float[Tensor, "batch time width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"] | None,
    completion_ids: Int[Tensor, "batch time"],
    allowed_index: Int[Tensor, "batch time"],
    table_tokens: Int[Tensor, " columns"],
    table_allowed: Bool[Tensor, "states columns"],
    temperature: float = 1.0,
    scale: HeadScale | None = None,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Log-probability of each token among those its grammar allows, and the entropy of that choice.

    Args:
        hidden: the states that predict the completion tokens.
        weight: of the language-model head.
        bias: of the head, or None.
        completion_ids: the tokens to score.
        allowed_index: per token a row of `table_allowed`, `UNCONSTRAINED`, or `UNSCORED`.
        table_tokens: the token ids that are the columns of the table, ascending.
        table_allowed: may this token come next?
        temperature: the logits are divided by it.
        scale: what the architecture does to its logits.

    Raises:
        ModelError: a token to score is not allowed where it stands.
    """
    scale = scale or HeadScale()
    shape = completion_ids.shape
    flat, ids, index = hidden.reshape(-1, hidden.shape[-1]), completion_ids.reshape(-1), allowed_index.reshape(-1)
    free = index == UNCONSTRAINED
    has_free, has_table = bool(free.any()), bool((index >= 0).any())
    # A differentiable zero keeps the graph connected where nothing is scored.
    logprobs = entropy = flat.sum(-1).float() * 0.0
    if has_table:
        bound = index >= 0
        logits = functional.linear(flat, weight[table_tokens], None if bias is None else bias[table_tokens])
        logits = scale.apply(logits.float()) / temperature
        allowed = table_allowed[index.clamp(min=0)]
        column = torch.searchsorted(table_tokens, ids).clamp(max=len(table_tokens) - 1)
        legal = (table_tokens[column] == ids) & allowed.gather(1, column[:, None])[:, 0]
        if bool((bound & ~legal).any()):
            place = int((bound & ~legal).nonzero()[0, 0])
            raise ModelError(
                f"token {int(ids[place])} of row {place // shape[1]}, position {place % shape[1]} is not allowed by "
                f"its grammar state {int(index[place])}"
            )
        # Rows that are not bound see every column, so that nothing here is infinite.
        logps = torch.where(allowed | ~bound[:, None], logits, -torch.inf).log_softmax(-1)
        finite = torch.where(allowed | ~bound[:, None], logps, 0.0)
        own = finite.gather(1, column[:, None])[:, 0]
        logprobs = torch.where(bound, own, logprobs)
        entropy = torch.where(bound, -(finite.exp() * finite * allowed).sum(-1), entropy)
    if has_free:
        logps = (scale.apply(functional.linear(flat[free], weight, bias).float()) / temperature).log_softmax(-1)
        logprobs = logprobs.masked_scatter(free, logps.gather(1, ids[free][:, None])[:, 0])
        entropy = entropy.masked_scatter(free, -(logps.exp() * logps).sum(-1))
    return logprobs.view(shape), entropy.view(shape)


def add_constrained_head(model: nn.Module) -> None:
    """Let the model's forward pass score completions under the grammar's mask.

    Afterwards `model(input_ids=..., attention_mask=..., constrained_head=True, logits_to_keep=T, completion_ids=...,
    allowed_index=..., table_tokens=..., table_allowed=..., temperature=...)` returns a `ConstrainedOutput` for the last
    `T` tokens of each row; with `target_ids` (-1 for none) also of other tokens at the same places, and with
    `state_columns`, shape (batch, places), the hidden states at these of the `T` places. Without
    `constrained_head=True` nothing changes. May be called before or after TRL's own `add_fused_lm_head`, and more than
    once.

    Args:
        model: a causal language model, or a peft model around one.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(base, "_has_constrained_head", False):
        return
    original = base.forward
    scale = head_scale(base.config)

    # The signature stays that of the class: `generate` and the Trainer look at it.
    @functools.wraps(type(base).forward)
    def forward(
        self: Any,
        *args: Any,
        constrained_head: bool = False,
        completion_ids: Tensor | None = None,
        allowed_index: Tensor | None = None,
        table_tokens: Tensor | None = None,
        table_allowed: Tensor | None = None,
        temperature: float = 1.0,
        target_ids: Tensor | None = None,
        state_columns: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not constrained_head:
            return original(*args, **kwargs)
        if completion_ids is None or allowed_index is None or table_tokens is None or table_allowed is None:
            raise ModelError("constrained_head needs completion_ids, allowed_index, table_tokens and table_allowed")
        keep = kwargs.pop("logits_to_keep")
        kwargs.pop("labels", None)
        kwargs["use_cache"] = False
        if kwargs.get("position_ids") is None and kwargs.get("attention_mask") is not None:
            kwargs["position_ids"] = (kwargs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
        every = self.base_model(*args, **kwargs).last_hidden_state
        states = None
        if state_columns is not None:
            row = torch.arange(len(every), device=every.device)[:, None]
            states = every[:, -keep:][row, state_columns.clamp(max=keep - 1)]
        hidden = every[:, -keep - 1 : -1]
        head = self.get_output_embeddings()
        bias = getattr(head, "bias", None)
        grammar = (table_tokens, table_allowed, temperature, scale)
        logprobs, entropy = constrained_logprobs(hidden, head.weight, bias, completion_ids, allowed_index, *grammar)
        targets = None
        if target_ids is not None:
            other = (target_ids >= 0) & (target_ids != completion_ids)
            found, _ = constrained_logprobs(
                hidden[other][None], head.weight, bias, target_ids[other][None], allowed_index[other][None], *grammar
            )
            targets = logprobs.masked_scatter(other, found[0])
        return ConstrainedOutput(logprobs=logprobs, entropy=entropy, target_logprobs=targets, states=states)

    base.forward = types.MethodType(forward, base)
    base._has_constrained_head = True
