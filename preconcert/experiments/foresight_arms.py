"""The arms of experiment `foresight` and what is compared between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preconcert.experiments.experiment import ExperimentArm
from preconcert.experiments.readings import Contrast

WARM, PLAIN, PAID, ANNEALED, HINDSIGHT = "warm", "plain", "paid", "annealed", "hindsight"
REAL, PASSES, REAL_SLOW = "real", "real-passes", "real-slow"
IMAGINED, IMAGINED_SLOW, UNDAMPED, ORACLE = "imagined", "imagined-slow", "imagined-undamped", "imagined-oracle"
_BARE: Mapping[str, Any] = {"grpo.hindsight_weight": 0.0}
_LOGGED: Mapping[str, Any] = {"action": 0.0, "announcement": 0.0}
_PAID: Mapping[str, Any] = {"action": 0.3, "announcement": 0.3}
_PLAIN = ("rendezvous", "box-push", "pursuit")
"""The tasks of the first part."""
PREDICTIONS: tuple[ExperimentArm, ...] = (
    ExperimentArm(WARM, "warm start alone", {"grpo.iterations": 0}, tasks=_PLAIN),
    ExperimentArm(PLAIN, "nothing for predictions", {**_BARE, "grpo.prediction": _LOGGED}, tasks=_PLAIN),
    ExperimentArm(PAID, "prediction rewards", {**_BARE, "grpo.prediction": _PAID}, tasks=_PLAIN),
    ExperimentArm(
        ANNEALED,
        "prediction rewards, annealed to 0",
        {**_BARE, "grpo.prediction": {**_PAID, "end": 0.0}},
        tasks=_PLAIN,
    ),
    ExperimentArm(HINDSIGHT, "cross-entropy to what happened", {"grpo.prediction": _LOGGED}, tasks=_PLAIN),
)
"""The arms of the first part."""
_WORLDS = ("rendezvous-world",)
"""The tasks of the second part."""
_SLOW: Mapping[str, Any] = {"grpo.lr": 0.001}
"""With few games in an iteration a smaller step is steadier, and a gain over real games that are learned from too fast
is no gain of imagination."""
_DREAMS: Mapping[str, Any] = {"ratio": 4.0, "group": 8, "horizon": 4}
# The base is the same, since it was warm-started with the same rows; the model itself is not used.
_UNUSED: Mapping[str, Any] = {
    "world_model.training.steps": 1, "world_model.heldout_episodes": 1, "world_model.refresh_every": 0,
}  # fmt: skip
IMAGINATIONS: tuple[ExperimentArm, ...] = (
    ExperimentArm(REAL, "real games only", _UNUSED, tasks=_WORLDS),
    ExperimentArm(PASSES, "real games only, three times the passes", {**_UNUSED, "grpo.epochs": 6}, tasks=_WORLDS),
    ExperimentArm(REAL_SLOW, "real games only, learning rate 0.001", {**_UNUSED, **_SLOW}, tasks=_WORLDS),
    ExperimentArm(IMAGINED, "imagined games beside real ones", {"grpo.imagination": _DREAMS}, tasks=_WORLDS),
    ExperimentArm(
        IMAGINED_SLOW,
        "imagined games beside real ones, learning rate 0.001",
        {"grpo.imagination": _DREAMS, **_SLOW},
        tasks=_WORLDS,
    ),
    ExperimentArm(
        UNDAMPED, "imagined games, groups not damped", {"grpo.imagination": {**_DREAMS, "damped": False}}, tasks=_WORLDS
    ),
    ExperimentArm(
        ORACLE,
        "imagined in the environment itself",
        {**_UNUSED, "grpo.imagination": {**_DREAMS, "model": "oracle"}},
        tasks=_WORLDS,
    ),
)
"""The arms of the second part."""
CONTRASTS = (
    Contrast(PAID, PLAIN, "prediction rewards – nothing"),
    Contrast(ANNEALED, PLAIN, "annealed rewards – nothing"),
    Contrast(PAID, ANNEALED, "prediction rewards – annealed rewards"),
    Contrast(HINDSIGHT, PLAIN, "cross-entropy – nothing"),
    Contrast(PAID, HINDSIGHT, "prediction rewards – cross-entropy"),
)
"""What is compared in the first part; fixed before the runs."""
