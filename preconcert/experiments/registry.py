"""The experiments by name."""

from __future__ import annotations

from collections.abc import Mapping

from preconcert.core import UnknownNameError
from preconcert.experiments.channel_study import CHANNEL
from preconcert.experiments.communication import COMMUNICATION
from preconcert.experiments.credit import CREDIT
from preconcert.experiments.experiment import Experiment
from preconcert.experiments.foresight import FORESIGHT
from preconcert.experiments.planning import PLANNING
from preconcert.experiments.two_bases import TWO_BASES
from preconcert.experiments.world_model import WORLD_MODEL

EXPERIMENTS: Mapping[str, Experiment] = {
    each.name: each for each in (CREDIT, FORESIGHT, WORLD_MODEL, PLANNING, COMMUNICATION, CHANNEL, TWO_BASES)
}


def experiment_named(name: str) -> Experiment:
    """An experiment.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in EXPERIMENTS:
        raise UnknownNameError("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]
