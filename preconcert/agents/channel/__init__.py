"""The channel between agents: what is said in one step, metered, limited, delayed, lost and distorted on its way.

Parts: `settings` (what a recipe can ask for), `topology` (who hears whom), `meter` (bits, truncation and caps),
`distortion` (words and numbers that change, and the messages of the controls), `harms` (what is wrong in some episodes
of training), `channel` (the way of all messages of one rollout, and the record of it).
"""

from preconcert.agents.channel.channel import Channel, Scene
from preconcert.agents.channel.harms import ChannelHarm, drawn
from preconcert.agents.channel.meter import slot_bits
from preconcert.agents.channel.settings import ChannelMode, ChannelSettings
from preconcert.agents.channel.topology import (
    Broadcast,
    Messenger,
    Nearest,
    Pairs,
    TopologySettings,
    check_places,
    check_topology,
    positions_of,
)

__all__ = [
    "Broadcast", "Channel", "ChannelHarm", "ChannelMode", "ChannelSettings", "Messenger", "Nearest", "Pairs", "Scene",
    "TopologySettings", "check_places", "check_topology", "drawn", "positions_of", "slot_bits",
]
