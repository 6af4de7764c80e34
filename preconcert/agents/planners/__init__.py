"""Planners: searches over turns in a world model, and the policies made of them."""

from preconcert.agents.planners.beam import beam
from preconcert.agents.planners.best_of_k import best_of_k
from preconcert.agents.planners.horizon import HorizonTracker
from preconcert.agents.planners.paths import Critic, Moment, Path, Plan, Proposal
from preconcert.agents.planners.planning_team import PlanningTeam
from preconcert.agents.planners.same_tokens import Choice, SameTokensTeam, samples_for
from preconcert.agents.planners.scoring import disagreement, lambda_return, view_error, worst_return
from preconcert.agents.planners.settings import (
    PLANNERS,
    Beam,
    BestOfK,
    HorizonSettings,
    PlannerSettings,
    ScoreSettings,
    Tree,
)
from preconcert.agents.planners.tree import tree_search

__all__ = [
    "PLANNERS", "Beam", "BestOfK", "Choice", "Critic", "HorizonSettings", "HorizonTracker", "Moment", "Path", "Plan",
    "PlannerSettings", "PlanningTeam", "Proposal", "SameTokensTeam", "ScoreSettings", "Tree", "beam", "best_of_k",
    "disagreement", "lambda_return", "samples_for", "tree_search", "view_error", "worst_return",
]
