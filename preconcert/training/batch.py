"""Rows as the tensors that TRL's GRPO loss reads.

`completion_mask` says which tokens exist (attention), `tool_mask` which carry the policy loss: TRL multiplies the two
and normalises by the product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from preconcert.models import UNSCORED
from preconcert.training.rows import Row
from preconcert.training.speech_loss import speech_columns


def collate(
    rows: Sequence[Row],
    adapters: Sequence[str],
    pad_id: int,
    multiple: int,
    at_least: int = 0,
    agents: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """All rows of a rollout, prompts padded left, completions right.

    TRL cuts the batch into equal parts and silently drops a remainder, so the number of rows is brought to a multiple
    by repeating the first one with every loss masked.

    Args:
        rows: at least one.
        adapters: names in the order of the `adapter` column.
        pad_id: fills both sides.
        multiple: the number of parts.
        at_least: how many rows there must be; processes that train together need equally many.
        agents: names in the order of the `agent` column; None for those of the rows, sorted.

    Returns:
        `prompt_ids`, `prompt_mask` (B, P); `completion_ids`, `completion_mask`, `tool_mask`, `target_ids`,
        `old_per_token_logps`, `advantages`, `allowed`, `joint` (B, T); `adapter`,
        `agent` (B,); and the columns of `speech_columns` where there are latent messages.
    """
    total = -(-max(len(rows), at_least) // multiple) * multiple
    everything = [*rows, *([rows[0]] * (total - len(rows)))]
    prompt_width = max(len(row.prompt_ids) for row in rows)
    # A row that says something in vectors goes on with a place for each of them.
    spoken = [0 if row.said is None else len(row.said.drawn) for row in everything]
    width = max(len(row.completion_ids) + more for row, more in zip(everything, spoken, strict=True))
    prompt_ids = np.full((total, prompt_width), pad_id, dtype=np.int64)
    prompt_mask = np.zeros((total, prompt_width), dtype=np.int64)
    completion_ids = np.full((total, width), pad_id, dtype=np.int64)
    completion_mask = np.zeros((total, width), dtype=np.int64)
    policy = np.zeros((total, width), dtype=np.int64)
    targets = np.full((total, width), -1, dtype=np.int64)
    logprobs = np.zeros((total, width), dtype=np.float32)
    advantages = np.zeros((total, width), dtype=np.float32)
    allowed = np.full((total, width), UNSCORED, dtype=np.int64)
    joint = np.full((total, width), -1, dtype=np.int64)
    for i, row in enumerate(everything):
        p, n = len(row.prompt_ids), len(row.completion_ids)
        prompt_ids[i, prompt_width - p :] = row.prompt_ids
        prompt_mask[i, prompt_width - p :] = 1
        completion_ids[i, :n] = row.completion_ids
        completion_mask[i, : n + spoken[i]] = 1
        if i < len(rows):
            policy[i, :n] = row.policy
            targets[i, :n] = row.targets
            logprobs[i, :n] = row.logprobs
            advantages[i, :n] = row.advantages
            joint[i, :n] = row.joint
            allowed[i, :n] = np.where(row.policy | (row.targets >= 0), row.allowed, UNSCORED)
    index = {name: i for i, name in enumerate(adapters)}
    column = np.array([index[row.adapter] for row in everything], dtype=np.int64)
    number = {name: i for i, name in enumerate(sorted({row.agent for row in rows}) if agents is None else agents)}
    writer = np.array([number[row.agent] for row in everything], dtype=np.int64)
    return {
        "prompt_ids": _tensor(prompt_ids),
        "prompt_mask": _tensor(prompt_mask),
        "completion_ids": _tensor(completion_ids),
        "completion_mask": _tensor(completion_mask),
        "tool_mask": _tensor(policy),
        "target_ids": _tensor(targets),
        "old_per_token_logps": _tensor(logprobs),
        "advantages": _tensor(advantages),
        "allowed": _tensor(allowed),
        "joint": _tensor(joint),
        "adapter": _tensor(column),
        "agent": _tensor(writer),
        **speech_columns(rows, total, prompt_width, adapters),
    }


def _tensor(array: NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(array)
