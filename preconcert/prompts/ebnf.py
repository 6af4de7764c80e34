"""A token automaton in the notation of xgrammar, which vLLM takes with a request as `structured_outputs.grammar`.

Tokens stand there by their numbers (`Token(17)`), so that the same token sequences pass as here, whatever the
tokenizer; over characters, a word that begins with another one could be broken off. Parts: `ebnf`.
"""

from __future__ import annotations

from collections import defaultdict

from preconcert.core import GrammarError
from preconcert.prompts.automaton import Automaton


def ebnf(automaton: Automaton, eos: int) -> str:
    """One rule per state.

    Args:
        automaton: whose sequences all end with the end-of-sequence token.
        eos: that token; engines add it by themselves.

    Raises:
        GrammarError: a sequence ends without it.
    """
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
                options.append('""')
            else:
                options.append(f"Token({', '.join(map(str, tokens))}) s{target}")
        lines.append(f"s{state} ::= {' | '.join(options)}")
    return "\n".join(lines) + "\n"
