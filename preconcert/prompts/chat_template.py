"""A chat template under which the agents of one team get, from any engine, the prompts that they were trained on.

It goes with the tokenizer of an export. A request says which agent it is for and what that agent sees, and the template
writes the prompt as `TurnFormat` does: in the compact spelling, or inside of the base's own template with the rules of
the turn before it. The rules of the template itself are in `templates/chat.jinja`. Parts: `chat_template`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preconcert.core import Observation
from preconcert.prompts.own_template import BASE_BEGINS, BASE_ENDS, COMPACT_MARK, own_template
from preconcert.prompts.speech import SILENCE
from preconcert.prompts.turn_format import TurnFormat

_RULES = Path(__file__).parent / "templates" / "chat.jinja"
_SENTINEL = "\u2063answer\u2063"


def chat_template(turns: TurnFormat, agents: Sequence[str], transcript: bool = False) -> str:
    """The template, as text in Jinja's language.

    Args:
        turns: how the team's turns are written, with the tokenizer that the template is for.
        agents: names of the team's agents, in the episode's order.
        transcript: prompts hold everything since the episode began; otherwise the last user message alone.
    """
    nothing = Observation(agent="", text="", legal_actions=(), step=0)
    systems = {
        agent: turns.chat(agent, nothing, (), [other for other in agents if other != agent])[0]["content"]
        for agent in agents
    }
    own = {
        "agents": list(agents),
        "actions": list(turns.language.actions),
        "systems": systems,
        "talks": bool(turns.spans.say and turns.language.message),
        "silence": turns.speech.shown_silence(turns.compact),
        "nothing": SILENCE,
        "memory": turns.memory,
        "compact": turns.compact,
        "transcript": transcript,
        "mark": _SENTINEL,
        "end": turns.tokenizer.eos_token,
    }
    values = f"{{%- set own = {_literal(own)} -%}}\n"
    rules = _RULES.read_text(encoding="utf-8")
    template = own_template(turns.tokenizer)
    if template is None:
        return f"{COMPACT_MARK}\n{values}{rules}"
    # A tokenizer's template is read without its last line break; within a macro nothing takes it away.
    inner = template.removesuffix("\n")
    return (
        "{% macro base(messages, add_generation_prompt) %}{% set enable_thinking = false %}"
        f"{BASE_BEGINS}{inner}{BASE_ENDS}{{% endmacro %}}\n{values}{rules}"
    )


def _literal(value: Any) -> str:
    """A value as Jinja writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
        return f'"{escaped}"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(map(_literal, value)) + "]"
