"""Agents: the generative team and the channel its members talk through."""

from preconcert.agents.behaviour import Behaviour, behaviour
from preconcert.agents.channel import ChannelMode, ChannelSettings, TextChannel
from preconcert.agents.team import AgentSettings, Context, GenerativeTeam

__all__ = [
    "AgentSettings",
    "Behaviour",
    "ChannelMode",
    "ChannelSettings",
    "Context",
    "GenerativeTeam",
    "TextChannel",
    "behaviour",
]
