"""Experiment `foresight`: what is gained by paying for predictions, and by learning from imagined games.

First part: reinforcement learning without anything that keeps predictions true; with prediction rewards; with
prediction rewards that are annealed to nothing; and with the cross-entropy to what really happened, which needs no
rewards. It asks whether teammates' actions are foretold better on held-out instances at no loss of success, and shows
beside it how predictable the agents became.

Second part, arms with the same world model: training on real games only, the same with more passes over them, training
on imagined games beside the real ones, the same without damping, and the same with the environment itself in the world
model's place; real games only and imagined ones with a smaller learning rate too. All play equally many real steps in
reinforcement learning; read are those until the success that real games alone end with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preconcert.experiments.experiment import Experiment, ExperimentTask, Plan, Scale
from preconcert.experiments.foresight_arms import IMAGINATIONS, IMAGINED, PAID, PLAIN, PREDICTIONS, REAL
from preconcert.experiments.foresight_report import report

_LEAN: Mapping[str, Any] = {"gate": {"min_gap": 0.0, "episodes": 16}, "keep_episodes": False}
_WORLD: Mapping[str, Any] = {"random_episodes": 1000, "learner_episodes": 500, "refresh_every": 2}
SMOKE = Plan(
    arms=tuple(arm for arm in (*PREDICTIONS, *IMAGINATIONS) if arm.name in (PLAIN, PAID, REAL, IMAGINED)),
    tasks=(
        ExperimentTask(
            "rendezvous",
            {
                **_LEAN,
                "task": "rendezvous",
                "params": {"size": 3, "landmarks": 2, "horizon": 4},
                "starter": {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "ffn": 32},
                "warm_start": {"episodes": 64, "steps": 15, "batch": 64},
                "grpo": {"iterations": 2, "seeds": 2, "group": 2, "minibatches": 2, "checkpoint_every": 1},
            },
        ),
        ExperimentTask(
            "rendezvous-world",
            {
                **_LEAN,
                "task": "rendezvous",
                "params": {"size": 3, "landmarks": 2, "horizon": 4},
                "starter": {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "ffn": 32},
                "warm_start": {"episodes": 64, "steps": 15, "batch": 64},
                "world_model": {
                    "random_episodes": 16, "scripted_episodes": 16, "learner_episodes": 8, "heldout_episodes": 4,
                    "refresh_every": 1, "refresh_steps": 2, "training": {"steps": 6, "batch": 32},
                },
                "grpo": {"iterations": 2, "seeds": 2, "group": 2, "minibatches": 2, "checkpoint_every": 1},
            },
        ),
    ),
    seeds=1,
    options={"episodes": 8},
)
STANDARD = Plan(
    arms=(*PREDICTIONS, *IMAGINATIONS),
    tasks=(
        ExperimentTask(
            "rendezvous",
            {**_LEAN, "task": "rendezvous", "grpo": {"iterations": 24, "seeds": 8, "group": 8}},
            seeds=10,
        ),
        ExperimentTask(
            "box-push",
            {
                **_LEAN,
                "task": "box-push",
                "warm_start": {"episodes": 4000, "steps": 900},
                "grpo": {"hindsight_weight": 0.1, "iterations": 24, "seeds": 8, "group": 4},
            },
            seeds=10,
        ),
        ExperimentTask(
            "rendezvous-world",
            {
                **_LEAN,
                "task": "rendezvous",
                "world_model": _WORLD,
                "grpo": {"iterations": 24, "seeds": 4, "group": 8},
            },
        ),
    ),
    seeds=5,
    options={"episodes": 400},
)
FULL = Plan(
    arms=(*PREDICTIONS, *IMAGINATIONS),
    tasks=(
        ExperimentTask("rendezvous", {**_LEAN, "task": "rendezvous", "grpo": {"iterations": 60, "seeds": 16}}),
        ExperimentTask(
            "box-push",
            {
                **_LEAN,
                "task": "box-push",
                "warm_start": {"episodes": 8000, "steps": 2000},
                "grpo": {"hindsight_weight": 0.1, "iterations": 60, "seeds": 16},
            },
        ),
        ExperimentTask(
            "pursuit",
            {
                **_LEAN,
                "task": "pursuit",
                "adapters": "shared",
                "warm_start": {"episodes": 8000, "steps": 2000},
                "grpo": {"iterations": 60, "seeds": 16},
            },
        ),
        ExperimentTask(
            "rendezvous-world",
            {**_LEAN, "task": "rendezvous", "world_model": _WORLD, "grpo": {"iterations": 60, "seeds": 8}},
        ),
    ),
    seeds=10,
    options={"episodes": 400},
)

FORESIGHT = Experiment(
    name="foresight",
    question=(
        "Do rewards for foretelling rightly make agents foretell their teammates better without costing success, and "
        "do agents that also learn from imagined games need fewer real ones?"
    ),
    plans={Scale.SMOKE: SMOKE, Scale.STANDARD: STANDARD, Scale.FULL: FULL},
    work="preconcert.experiments.judgement:train_and_judge",
    report=report,
    limits=(
        "The models are starters of about 0.13 million parameters, made from nothing and taught by a script.",
        "Agents are asked about the teammate's present action only. Whether they plan by what they foretell is not "
        "measured here.",
        "What is foretold is what the same training makes of the teammate: an arm may be more accurate because it "
        "foretells better or because its teammate is easier to foretell. The tables of predictability are there to "
        "tell the two apart, as far as views alone can.",
        "The world model has seen play before reinforcement learning begins (random, scripted, and of the warm-started "
        "team). All arms of the second part have that model, and none counts those steps; only three use it.",
        "Every arm runs with the same learning rate, clipping and number of passes, but for those that are named after "
        "another.",
        "Percentile intervals from five seeds are known to be somewhat too narrow.",
    ),
)
