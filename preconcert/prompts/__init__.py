"""The language of turns and of world models: grammars, templates, rendering, strict parsing, the automata behind."""

from preconcert.prompts.automaton import Automaton, AutomatonBuilder
from preconcert.prompts.chat_template import chat_template
from preconcert.prompts.ebnf import ebnf
from preconcert.prompts.grammar import Grammar, Reading
from preconcert.prompts.own_template import own_template
from preconcert.prompts.spans import END_OF_PLAY, SpanSettings, TurnContent
from preconcert.prompts.speech import SILENCE, STOP, Speech, whole_messages
from preconcert.prompts.turn_format import TurnFormat, Written
from preconcert.prompts.turn_grammar import DONE_WORDS, Piece, turn_pieces
from preconcert.prompts.vocabulary import starter_words
from preconcert.prompts.world_format import OWN_TEAM, PARTNERS, Earlier, WorldFormat, WorldWritten, recent_of
from preconcert.prompts.world_grammar import VALUES, WorldAnswer, WorldPart, WorldSpan

__all__ = [
    "DONE_WORDS", "END_OF_PLAY", "OWN_TEAM", "PARTNERS", "SILENCE", "STOP", "VALUES", "Automaton", "AutomatonBuilder",
    "Earlier", "Grammar", "Piece", "Reading", "SpanSettings", "Speech", "TurnContent", "TurnFormat", "WorldAnswer",
    "WorldFormat", "WorldPart", "WorldSpan", "WorldWritten", "Written", "chat_template", "ebnf", "own_template",
    "recent_of", "starter_words", "turn_pieces", "whole_messages",
]
