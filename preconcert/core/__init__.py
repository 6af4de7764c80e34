"""The worldview: records, protocols, errors and seeds. Read this folder first.

An `Env` shows each agent an `Observation`; a `Policy` answers with `Turn`s (what an agent intends, foresees, says and
does, as sampled tokens); finished play is an `Episode` of `Trajectory` by agent name. Finished data is frozen.
"""

from preconcert.core.candidate import Candidate, Move
from preconcert.core.episode import Episode, StopReason, Trajectory
from preconcert.core.errors import (
    CodingError,
    ConfigError,
    EngineAwayError,
    EnvError,
    GateError,
    GrammarError,
    ModelError,
    PreconcertError,
    StoreError,
    TrainingError,
    UnknownNameError,
    nearest,
)
from preconcert.core.foresight import ImaginedStep, Judgement, Outcome, Planner, WorldModel
from preconcert.core.intention import Forecast, Intention
from preconcert.core.language import REWARD_TOLERANCE, Slot, TaskLanguage, Truth
from preconcert.core.message import MOST_ROUNDS, Delivery, Fate, Latent, Message
from preconcert.core.misfit import Misfit, describe
from preconcert.core.observation import Observation, StepResult
from preconcert.core.protocols import Codec, Env, Located, Player, Policy, TurnRequest
from preconcert.core.rehearsal import Rehearsing
from preconcert.core.seeds import derive_seed, uniforms
from preconcert.core.store import (
    StoredEpisodes,
    append_episodes,
    dump_episode,
    keep_episodes_before,
    load_episodes,
    parse_episode,
)
from preconcert.core.turn import Decision, Span, SpanKind, Turn
from preconcert.core.view import View, ViewField

__all__ = [
    "MOST_ROUNDS", "Candidate", "Codec", "CodingError", "ConfigError", "Decision", "Delivery", "EngineAwayError", "Env",
    "EnvError", "Episode", "Fate", "Forecast", "GateError", "GrammarError", "ImaginedStep", "Intention", "Judgement",
    "Latent", "Located", "Message", "Misfit", "ModelError", "Move", "Observation", "Outcome", "Planner", "Player",
    "Policy", "PreconcertError", "REWARD_TOLERANCE", "Rehearsing", "Slot", "Span", "SpanKind", "StepResult",
    "StopReason", "StoreError", "StoredEpisodes", "TaskLanguage", "TrainingError", "Trajectory", "Truth", "Turn",
    "TurnRequest", "UnknownNameError", "View", "ViewField", "WorldModel", "append_episodes", "derive_seed", "describe",
    "dump_episode", "keep_episodes_before", "load_episodes", "nearest", "parse_episode", "uniforms",
]
