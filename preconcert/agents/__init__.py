"""Agents: the generative team and the channel its members talk through."""

from preconcert.agents.behaviour import Behaviour, behaviour
from preconcert.agents.channel import Channel, ChannelMode, ChannelSettings
from preconcert.agents.team import AgentSettings, Context, GenerativeTeam

__all__ = [
    "AgentSettings",
    "Behaviour",
    "Channel",
    "ChannelMode",
    "ChannelSettings",
    "Context",
    "GenerativeTeam",
    "behaviour",
]
