"""The language of turns: the span grammar, its templates, rendering, strict parsing, and the automata behind it."""

from preconcert.prompts.automaton import Automaton, AutomatonBuilder
from preconcert.prompts.spans import END_OF_PLAY, SpanSettings, TurnContent
from preconcert.prompts.turn_format import SILENCE, TurnFormat, Written
from preconcert.prompts.turn_grammar import Piece, turn_pieces
from preconcert.prompts.vocabulary import starter_words

__all__ = [
    "END_OF_PLAY", "SILENCE", "Automaton", "AutomatonBuilder", "Piece", "SpanSettings", "TurnContent", "TurnFormat",
    "Written", "starter_words", "turn_pieces",
]
