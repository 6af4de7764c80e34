"""The model card of an export: what a stranger needs to load the agents, ask them something and judge them.

The front matter is what the Hugging Face hub reads. Figures come from an evaluation that was made elsewhere; prompts
and completions from real episodes. Parts: `Export` (everything that is told) and what belongs to it, `model_card`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from preconcert.training.measures import Measures
from preconcert.training.recipe import Recipe

_TEMPLATES = Path(__file__).parent / "templates"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""


class Kind(StrEnum):
    """What an adapter is for."""

    AGENT = "agent"
    """Writes turns, for one agent or several."""
    LEAGUE = "league"
    """Learned beside the team: a counter, or a past self."""
    WORLD = "world"
    """Writes what a step leads to."""


@dataclass(frozen=True, slots=True)
class ExportedAdapter:
    """One adapter."""

    name: str
    kind: Kind
    agents: tuple[str, ...]
    """For whom it writes in the run; empty for others."""
    codec: bool
    """Are there files for latent messages?"""


@dataclass(frozen=True, slots=True)
class Spoken:
    """A prompt and what was written, as text."""

    agent: str
    adapter: str
    chat: tuple[Mapping[str, str], ...]
    """The messages of a request; empty where there is no chat that makes this prompt."""
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Export:
    """Everything that the card and the manifest tell."""

    run: str
    """Name of the run's folder."""
    recipe: Recipe
    agents: Mapping[str, str]
    """Adapter by agent."""
    adapters: tuple[ExportedAdapter, ...]
    base: str
    """What loads the base: `base`, or the hub's name."""
    tokenizer: str
    """The folder with the tokenizer."""
    hub: bool
    """Is the base on the hub?"""
    refitted: bool
    """Were its attention heads put into larger ones?"""
    refused: str | None
    """Why vLLM does not take it, if so."""
    longest: int
    """Tokens of the longest turn."""
    shape: str
    """A turn in the form of its grammar."""
    words: Mapping[str, tuple[str, ...]]
    """What can stand in each place of it."""
    about: str
    """The task in one sentence."""
    seed: int
    """Of the held-out instance of the example."""
    example: tuple[Spoken, ...]
    """Its first steps."""
    world: Spoken | None
    """What the world model was asked, and its answer."""
    checked: Mapping[str, int]
    """`prompts`: how many were compared with the template's; `equal`: how many were the same, token for token."""
    free: Measures
    """Of the same instances played without the grammar, as an engine plays that does not know it."""
    constrained: Measures
    """And with it."""


def model_card(found: Export, evaluation: Mapping[str, Any] | None) -> str:
    """The card as Markdown.

    Args:
        found: what was exported.
        evaluation: what `preconcert eval --json` prints; None leaves the table out.
    """
    templates = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    played = [each for each in found.adapters if each.kind is not Kind.WORLD]
    asked = found.example[0]
    chat = [dict(message) for message in asked.chat]
    return templates.get_template("model_card.md.jinja").render(
        metadata=yaml.safe_dump(_metadata(found, evaluation), sort_keys=False, allow_unicode=True).strip(),
        export=found,
        recipe=found.recipe,
        params=", ".join(f"{key} {value}" for key, value in found.recipe.params.items()),
        agents=found.agents,
        parts=_parts(found.recipe),
        adapters=found.adapters,
        played=played,
        past=[each.name for each in found.adapters if each.kind is Kind.LEAGUE],
        vectors=found.recipe.agent.codec.type == "latent",
        codecs=any(each.codec for each in found.adapters),
        talks=found.recipe.agent.spans.say,
        asked=asked,
        python_chat=json.dumps(chat, ensure_ascii=False, indent=4),
        rank=next((rank for rank in _RANKS if rank >= found.recipe.lora.r), found.recipe.lora.r),
        table=_table(evaluation) if evaluation is not None else None,
        evaluation=evaluation,
        figure=_figure,
    )


def _parts(recipe: Recipe) -> str:
    """What a turn says, in words."""
    spans = recipe.agent.spans
    parts = ["what it expects each of the others to do (`<intend>`)"] if spans.intend else []
    parts += ["what it expects to see (`<foresee>`)"] if spans.foresee else []
    parts += ["what it tells the others (`<say>`)"] if spans.say else []
    return ", ".join(parts) + (", and " if parts else "") + "what it does (`<act>`)"


def _metadata(found: Export, evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    content: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if found.hub:
        content["base_model"] = found.base
    content["tags"] = ["preconcert", "multi-agent", "lora", "transformers", "vllm", f"task:{found.recipe.task}"]
    metrics = [] if evaluation is None else _metrics(evaluation)
    if evaluation is not None and metrics:
        task = {"type": "reinforcement-learning", "name": "reinforcement-learning"}
        name = f"{found.recipe.task}, {evaluation['episodes']} held-out instances"
        dataset = {"type": found.recipe.task, "name": name, "split": "heldout"}
        results = [{"task": task, "dataset": dataset, "metrics": metrics}]
        content["model-index"] = [{"name": found.run, "results": results}]
    return content


def _metrics(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Success where the task knows it, else the return; of the team sampled, greedy, and with shuffled messages."""
    metrics: list[dict[str, Any]] = []
    for arm in ("trained", "trained-greedy", "trained-shuffled"):
        figures = evaluation["arms"].get(arm)
        if figures is None:
            continue
        rate = figures["success_rate"]
        kind = "mean_return" if rate is None else "success_rate"
        value = figures["return_mean"] if rate is None else rate
        metrics.append({"type": kind, "name": f"{kind.replace('_', ' ')}, {figures['title']}", "value": value})
    return metrics


def _table(evaluation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of `preconcert eval`'s table; the first one is the head."""
    arms = list(evaluation["arms"].values())
    columns = {
        "success (95%)": any(arm["success_rate"] is not None for arm in arms),
        "return": True,
        "exploitability": any(arm.get("exploitability") is not None for arm in arms),
        "intentions right (copy-last)": any(arm["intention_accuracy"] is not None for arm in arms),
        "forecasts right (copy-last)": any(arm["forecast_exact_match"] is not None for arm in arms),
        "malformed": True,
        "bits per turn": True,
    }
    rows = [("who plays", *(name for name, shown in columns.items() if shown))]
    for arm in arms:
        low, high = arm["success_ci95"] or (0.0, 0.0)
        cells = {
            "success (95%)": f"{_figure(arm['success_rate'])} ({low:.2f}–{high:.2f})" if arm["success_ci95"] else "–",
            "return": _figure(arm["return_mean"]),
            "exploitability": _figure(arm.get("exploitability"), 3),
            "intentions right (copy-last)": _beside(arm["intention_accuracy"], arm["intention_copy_last"]),
            "forecasts right (copy-last)": _beside(arm["forecast_exact_match"], arm["forecast_copy_last"]),
            "malformed": _figure(arm["malformed_rate"], 3) if arm["generated_tokens"] else "–",
            "bits per turn": _figure(arm["message_bits_per_turn"]),
        }
        rows.append((arm["title"], *(cells[name] for name, shown in columns.items() if shown)))
    return rows


def _beside(value: float | None, copied: float | None) -> str:
    return "–" if value is None else f"{_figure(value)} ({_figure(copied)})"


def _figure(value: float | None, places: int = 2) -> str:
    return "–" if value is None else f"{value:.{places}f}"
