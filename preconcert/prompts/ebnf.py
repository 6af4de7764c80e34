"""A token automaton in the notation of xgrammar, which vLLM takes with a request as `structured_outputs.grammar`.

Tokens stand there by their numbers (`Token(17)`), so that the same token sequences pass as here, whatever the
tokenizer; over characters, a word that begins with another one could be broken off. Parts: `ebnf`.

xgrammar (0.2.8) keeps what it computed for a rule and takes it for every rule of the same form, without looking at the
tokens' numbers: the second grammar of a server would be enforced with the first one's words. A rule's form includes the
rules that it leads to, so every grammar ends in a mark of its own: an alternative to the end that no model takes.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict

from preconcert.core import GrammarError
from preconcert.prompts.automaton import Automaton

MARK = "\U0010fffd"
"""A character that is in no vocabulary: at the most its first byte is, in those that have all bytes."""


def ebnf(automaton: Automaton, eos: int) -> str:
    """One rule per state.

    Args:
        automaton: whose sequences all end with the end-of-sequence token.
        eos: that token; engines add it by themselves.

    Raises:
        GrammarError: a sequence ends without it.
    """
    content = json.dumps([sorted(row.items()) for row in automaton.transitions])
    own = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    lines = ["root ::= s0"]
    for state, transitions in enumerate(automaton.transitions):
        if automaton.is_final(state):
            continue
        by_target: dict[int, list[int]] = defaultdict(list)
        for token, target in sorted(transitions.items()):
            by_target[target].append(token)
        options: list[str] = []
        for target, tokens in by_target.items():
            if automaton.is_final(target):
                if tokens != [eos]:
                    raise GrammarError(f"token {tokens[0]} ends a sequence, which only {eos} may")
                options += ['""', f'"{MARK}{own}"']
            else:
                options.append(f"Token({', '.join(map(str, tokens))}) s{target}")
        lines.append(f"s{state} ::= {' | '.join(options)}")
    return "\n".join(lines) + "\n"
