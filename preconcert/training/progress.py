"""Progress of a TRL trainer, told to a run's reporter."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from preconcert.training.reporter import Reporter


class LossProgress(TrainerCallback):
    """Tells the reporter how far a supervised phase is, and its latest loss.

    Args:
        reporter: receives it.
        logged: the trainer's name of the loss.
        shown: what it is called beside the bar.
    """

    def __init__(self, reporter: Reporter, logged: str = "loss", shown: str = "loss") -> None:
        self.reporter = reporter
        self.logged, self.shown = logged, shown

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step over."""
        last = state.log_history[-1].get(self.logged) if state.log_history else None
        self.reporter.advance(state.global_step, f"{self.shown} {last:.3f}" if last is not None else "")
