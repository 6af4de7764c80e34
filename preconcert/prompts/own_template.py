"""Which chat template a tokenizer brings along, apart from what an export has put around it.

Parts: `own_template`, and the marks that `chat_template.py` writes.
"""

from __future__ import annotations

from typing import Any

COMPACT_MARK = "{#- preconcert: compact -#}"
"""Begins a template made for a tokenizer that has none of its own."""
BASE_BEGINS, BASE_ENDS = "{#- preconcert: the base's own template -#}", "{#- preconcert: end of the base's own -#}"
"""Around the base's own template, where a template was made for a tokenizer that has one."""


def own_template(tokenizer: Any) -> str | None:
    """The chat template that prompts are written in; None where the compact spelling is to be used.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    if not isinstance(template, str):  # several by name
        return str(tokenizer.get_chat_template())
    if template.startswith(COMPACT_MARK):
        return None
    _, begins, rest = template.partition(BASE_BEGINS)
    inner, ends, _ = rest.partition(BASE_ENDS)
    return inner if begins and ends else template
