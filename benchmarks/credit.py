"""What credit costs: processor seconds per estimator, from the finished episodes of a rollout to advantages.

    .venv/bin/python benchmarks/credit.py [TURNS]
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np

from preconcert.core import Episode, Observation, StopReason, Trajectory, Turn
from preconcert.training.credit import ESTIMATORS, TurnKey, Values, estimate

AGENTS = ("agent_0", "agent_1")
HORIZON, GROUP, TOKENS = 16, 8, 24


def credit_seconds(turns: int = 4096, repetitions: int = 5) -> dict[str, float]:
    """Median processor seconds of every estimator on a rollout of two agents, groups of eight and 24 tokens per turn.

    Args:
        turns: in all.
        repetitions: of each.
    """
    episodes = _rollout(turns // (len(AGENTS) * HORIZON))
    rng = np.random.default_rng(1)
    values: Values = {
        TurnKey(position, agent, index): rng.normal(size=TOKENS)
        for position in range(len(episodes))
        for agent in AGENTS
        for index in range(HORIZON)
    }
    found: dict[str, float] = {}
    for name, estimator in ESTIMATORS.items():
        times = []
        for _ in range(repetitions):
            started = time.process_time()
            estimate(episodes, estimator, values=values if estimator.needs_values else None)
            times.append(time.process_time() - started)
        found[name] = statistics.median(times)
    return found


def _rollout(count: int) -> list[Episode]:
    rng = np.random.default_rng(0)
    return [_episode(number, rng.normal(size=(len(AGENTS), HORIZON))) for number in range(count)]


def _episode(number: int, rewards: np.ndarray) -> Episode:
    view = Observation(AGENTS[0], "", ("stay",), 0)
    trajectories = {
        agent: Trajectory(
            agent,
            tuple(
                Turn(
                    agent, step, view, (), (1,), (2,) * TOKENS, (-1.0,) * TOKENS, (True,) * TOKENS, (), (), None, None,
                    "stay", False, float(rewards[i, step]),
                )
                for step in range(HORIZON)
            ),
            0, StopReason.TERMINATED, view,
        )
        for i, agent in enumerate(AGENTS)
    }  # fmt: skip
    group, states = f"g{number // GROUP}", ("",) * (HORIZON + 1)
    return Episode("", {}, 0, "train", group, number % GROUP, 0, trajectories, None, states)


if __name__ == "__main__":
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    for title, seconds in credit_seconds(wanted).items():
        print(f"{title:16} {seconds * 1000:7.1f} ms for {wanted} turns")
