"""World models: what imagines the next view, the others' actions, the reward and the end; and how they are judged."""

from preconcert.world_models.consistency import Consistency, consistency_of
from preconcert.world_models.fidelity import Case, Fidelity, Mode, cases_of, measure_fidelity
from preconcert.world_models.imagination import Imagination, imagine
from preconcert.world_models.legal import LegalActions
from preconcert.world_models.oracle import OracleValue, OracleWorldModel
from preconcert.world_models.recurrent import RecurrentSettings, RecurrentWorldModel
from preconcert.world_models.recurrent_training import train_recurrent
from preconcert.world_models.shuffled import ShuffledWorldModel
from preconcert.world_models.tables import CopyLast, CountTable
from preconcert.world_models.token import TokenBelief, TokenWorldModel, TokenWorldSettings

__all__ = [
    "Case", "Consistency", "CopyLast", "CountTable", "Fidelity", "Imagination", "LegalActions", "Mode", "OracleValue",
    "OracleWorldModel", "RecurrentSettings", "RecurrentWorldModel", "ShuffledWorldModel", "TokenBelief",
    "TokenWorldModel", "TokenWorldSettings", "cases_of", "consistency_of", "imagine", "measure_fidelity",
    "train_recurrent",
]  # fmt: skip
