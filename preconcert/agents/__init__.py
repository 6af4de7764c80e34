"""Agents: the generative team and the channel its members talk through."""

from preconcert.agents.behaviour import Behaviour, behaviour
from preconcert.agents.channel import Channel, ChannelHarm, ChannelMode, ChannelSettings
from preconcert.agents.codecs import CodecSettings, SlotsSettings, TurnCodec, codec_of
from preconcert.agents.fallback import FallbackTeam
from preconcert.agents.team import AgentSettings, Context, GenerativeTeam, turn_format_of

__all__ = [
    "AgentSettings",
    "Behaviour",
    "Channel",
    "ChannelHarm",
    "ChannelMode",
    "ChannelSettings",
    "CodecSettings",
    "Context",
    "FallbackTeam",
    "GenerativeTeam",
    "SlotsSettings",
    "TurnCodec",
    "behaviour",
    "codec_of",
    "turn_format_of",
]
