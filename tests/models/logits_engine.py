"""The least that an engine is: whole forward passes, one row after the other, and the dice of vLLM's logits processor.

It shows what `VLLMModel` makes of an engine's answers, and what the dice do to logits, where vLLM is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from preconcert.models import LoraSettings, TransformersModel, route_rows
from preconcert.models.vllm_instructions import Dicing, Row, Written, instructions, read_instructions


class LogitsEngine:
    """A `RowEngine` on a transformers model.

    Args:
        base: folder of the base model, as an engine gets it.
        lora: the shape of the adapters.
    """

    def __init__(self, base: Path, lora: LoraSettings) -> None:
        self.model = TransformersModel.load(base, lora)
        self.names: dict[str, str] = {}
        self.log: list[str] = []

    def write(self, rows: Sequence[Row]) -> list[Written]:
        """Every row by itself; instructions go through JSON as they would over HTTP."""
        return [self._write(row) for row in rows]

    def load(self, name: str, path: Path) -> None:
        """Adapters of peft have no dots in their names."""
        self.log.append(f"load {name}")
        self.names[name] = f"a{len(self.log)}"
        self.model.load_adapter(self.names[name], path)

    def unload(self, name: str) -> None:
        """Forget an adapter."""
        self.log.append(f"unload {name}")
        self.model.delete_adapter(self.names.pop(name))

    def served(self) -> dict[str, Path | None]:
        """None from the start."""
        return {}

    def close(self) -> None:
        """Nothing to close."""

    def _write(self, row: Row) -> Written:
        extra = json.loads(json.dumps(instructions([row])))
        outputs: list[int] = []
        dicing = Dicing()
        read = read_instructions(extra, self.model.base.config.vocab_size, "cpu", row.prompt_ids, outputs)
        assert read is not None
        dicing.rows[1] = read  # row 0 is somebody else's
        logprobs: list[float] = []
        tables: list[dict[int, float]] = []
        while len(outputs) < row.tokens and not (outputs and outputs[-1] in row.stops):
            with torch.no_grad(), route_rows(self.model.base, [self.names[row.adapter] if row.adapter else None]):
                if row.embeds is None:
                    logits = self.model.base(input_ids=torch.tensor([[*row.prompt_ids, *outputs]])).logits
                else:
                    new = self.model.base.get_input_embeddings()(torch.tensor(outputs, dtype=torch.long))
                    logits = self.model.base(inputs_embeds=torch.cat([row.embeds, new])[None]).logits
            both = logits[0, -1:].repeat(2, 1)
            before = both[0].clone()
            dicing.decide(both)
            assert torch.equal(both[0], before), "somebody else's row was changed"
            picked = both.argmax(-1)
            ids, values = picked[:, None].repeat(1, row.watched + 1), torch.full((2, row.watched + 1), 7.0)
            dicing.report(ids, values)
            assert bool((values[0] == 7.0).all()), "somebody else's log-probabilities were changed"
            outputs.append(int(ids[1, 0]))
            logprobs.append(float(values[1, 0]))
            tables.append(dict(zip(ids[1].tolist(), values[1].tolist(), strict=True)))
        return Written(tuple(outputs), tuple(logprobs), tuple(tables) if row.watched else ())
