"""Preconcert: teams of language-model agents that write the future before they act."""

__version__ = "0.1.0"
