"""A small run that kills itself: `python resumable_run.py OUT STAGE COUNT`.

The process ends by SIGKILL, as by a power cut, when stage STAGE reports COUNT units done; with COUNT −1 it goes on.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from preconcert.training.recipe import Recipe
from preconcert.training.run import train
from tests.training.teams import recipe_of

ITERATIONS = 5


class Killer:
    """A reporter that ends the process at a chosen moment."""

    def __init__(self, stage: str, count: int) -> None:
        self.wanted, self.count = stage, count
        self.now = ""

    def stage(self, name: str, total: int) -> None:
        """Remembered."""
        self.now = name

    def advance(self, done: int, note: str = "") -> None:
        """The moment, if it is this one."""
        if self.now == self.wanted and done == self.count:
            os.kill(os.getpid(), signal.SIGKILL)

    def say(self, text: str) -> None:
        """Ignored."""


def recipe() -> Recipe:
    """Five iterations, a checkpoint after the third (inside a pass over TRL's data); hindsight and minibatches on."""
    return recipe_of(
        iterations=ITERATIONS, seeds=4, group=3, minibatches=2, epochs=2, hindsight_weight=0.5,
        warmup_iterations=1, checkpoint_every=3, lr=0.02,
    )  # fmt: skip


if __name__ == "__main__":
    train(recipe(), Path(sys.argv[1]), resume=True, reporter=Killer(sys.argv[2], int(sys.argv[3])))
