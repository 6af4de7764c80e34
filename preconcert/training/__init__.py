"""Training: rollouts, credit, warm start, gate and multi-agent GRPO, put together as resumable runs."""

from preconcert.training.credit import ESTIMATORS, Credit, RewardSettings, TurnKey, estimate
from preconcert.training.gate import GateResult, run_gate
from preconcert.training.grpo import MultiAgentGRPOTrainer
from preconcert.training.grpo_rollout import Rollout, RolloutSource
from preconcert.training.measures import Measures, measure
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter, Silent
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout
from preconcert.training.run import train
from preconcert.training.run_folder import load_model, load_recipe_of
from preconcert.training.world_settings import WorldModelSettings, WorldTraining
from preconcert.training.world_stage import load_world_model

__all__ = [
    "ESTIMATORS", "Credit", "EpisodeSpec", "GateResult", "Measures", "MultiAgentGRPOTrainer", "Recipe", "Reporter",
    "RewardSettings", "Rollout", "RolloutSource", "ScriptedPolicy", "Silent", "TurnKey", "WorldModelSettings",
    "WorldTraining", "estimate", "load_model", "load_recipe_of", "load_world_model", "measure", "rollout", "run_gate",
    "train",
]
