"""Codecs: what messages are made of. `docs/messages.md` compares them.

| `agent.codec` | a message is | module |
|---|---|---|
| `slots` | every word of the task's message slots | `slots` |
| `learned` | as many of these words as the sender likes | `learned` |
| `raw-state` | the sender's observation | `raw_state` |
| `intention` | what its turn intends and foresees | `intention` |
| `latent` | a few vectors | `latent` |
"""

from preconcert.agents.codecs.codec import TurnCodec, bits_of
from preconcert.agents.codecs.intention import IntentionCodec
from preconcert.agents.codecs.latent import LatentTurnCodec
from preconcert.agents.codecs.learned import LearnedCodec
from preconcert.agents.codecs.raw_state import RawStateCodec
from preconcert.agents.codecs.settings import (
    CodecSettings,
    IntentionSettings,
    LatentCodecSettings,
    LearnedSettings,
    RawStateSettings,
    SlotsSettings,
    Words,
)
from preconcert.agents.codecs.slots import SlotsCodec
from preconcert.core import TaskLanguage
from preconcert.prompts import SpanSettings

__all__ = [
    "CodecSettings", "IntentionCodec", "IntentionSettings", "LatentCodecSettings", "LatentTurnCodec", "LearnedCodec",
    "LearnedSettings", "RawStateCodec", "RawStateSettings", "SlotsCodec", "SlotsSettings", "TurnCodec", "Words",
    "bits_of", "codec_of",
]


def codec_of(settings: CodecSettings, language: TaskLanguage, spans: SpanSettings) -> TurnCodec:
    """The codec that settings ask for.

    Args:
        settings: of the agent.
        language: the task's vocabularies.
        spans: which parts a turn has.

    Raises:
        ConfigError: it does not fit the task, or there is none yet.
    """
    match settings:
        case LearnedSettings():
            return LearnedCodec(language, spans, settings)
        case RawStateSettings():
            return RawStateCodec(language, spans)
        case IntentionSettings():
            return IntentionCodec(language, spans, settings)
        case LatentCodecSettings():
            return LatentTurnCodec(language, spans, settings)
    return SlotsCodec(language, spans)
