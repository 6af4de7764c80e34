"""Text-grounded tasks: the built-in ones, how to name one, how to test one, and PettingZoo both ways.

`Task` is only what the built-in tasks share. A user's own environment follows the `Env` protocol of `preconcert.core`,
is named `module:Class`, and is tested with `check_env`.
"""

from preconcert.envs.box_push import BoxPush, BoxPushParams
from preconcert.envs.check import check_env
from preconcert.envs.dilemma import Dilemma, DilemmaParams
from preconcert.envs.kuhn import DecisionPoint, Kuhn, KuhnParams, decision_points
from preconcert.envs.matrix import Matrix, MatrixParams
from preconcert.envs.pettingzoo_in import FromPettingZoo, from_pettingzoo
from preconcert.envs.pettingzoo_out import PettingZooTask, to_pettingzoo
from preconcert.envs.pursuit import Pursuit, PursuitParams
from preconcert.envs.registry import make_env, register, task_class, tasks
from preconcert.envs.rendezvous import Rendezvous, RendezvousParams
from preconcert.envs.repeated_rps import RepeatedRps, RepeatedRpsParams
from preconcert.envs.signal import Signal, SignalParams
from preconcert.envs.talk import LISTEN, TALK_ROUNDS, TalkRounds, rounds_of, talking, with_rounds, without_rounds
from preconcert.envs.task import PLAYERS, SPLITS, Task, TaskParams, Variety, split_of

__all__ = [
    "LISTEN", "PLAYERS", "SPLITS", "TALK_ROUNDS", "BoxPush", "BoxPushParams", "DecisionPoint", "Dilemma",
    "DilemmaParams", "FromPettingZoo", "Kuhn", "KuhnParams", "Matrix", "MatrixParams", "PettingZooTask", "Pursuit",
    "PursuitParams", "Rendezvous", "RendezvousParams", "RepeatedRps", "RepeatedRpsParams", "Signal", "SignalParams",
    "TalkRounds", "Task", "TaskParams", "Variety", "check_env", "decision_points", "from_pettingzoo", "make_env",
    "register", "rounds_of", "split_of", "talking", "task_class", "tasks", "to_pettingzoo", "with_rounds",
    "without_rounds",
]
