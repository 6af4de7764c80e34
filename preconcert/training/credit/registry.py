"""Every estimator, as a union for recipes and as a table by name.

A recipe writes `credit: agent`, or `credit: {type: turn, per_index: true}` where it changes a setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from preconcert.core import Episode, UnknownNameError, nearest
from preconcert.training.credit.agent_turn import AgentTurnCredit
from preconcert.training.credit.alignment import AlignedCredit
from preconcert.training.credit.chained_gae import ChainedGAECredit
from preconcert.training.credit.estimator import Credit, Estimator
from preconcert.training.credit.gae import GAECredit
from preconcert.training.credit.group_relative import AgentCredit, GlobalCredit
from preconcert.training.credit.joint import JointCredit
from preconcert.training.credit.leave_one_out import LeaveOneOutCredit
from preconcert.training.credit.ledger import Values, ledger_of
from preconcert.training.credit.rewards import RewardSettings
from preconcert.training.credit.role import RoleCredit
from preconcert.training.credit.turn import TurnCredit

SHORT: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "agent-centred": {"type": "agent", "scale": False},
        "global-centred": {"type": "global", "scale": False},
    }
)
"""Names that stand for a type and settings."""

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        "agent": AgentCredit(),
        "global": GlobalCredit(),
        "agent-centred": AgentCredit(scale=False),
        "global-centred": GlobalCredit(scale=False),
        "turn": TurnCredit(),
        "agent-turn": AgentTurnCredit(),
        "joint": JointCredit(),
        "role": RoleCredit(),
        "loo": LeaveOneOutCredit(),
        "gae": GAECredit(),
        "chained-gae": ChainedGAECredit(),
        "adalign": AlignedCredit(),
    }
)
"""Every estimator by name, with its defaults; the property tests run over this table."""


def _in_full(given: Any) -> Any:
    """A name as a mapping; an unknown one is refused with the nearest."""
    if isinstance(given, Mapping) and "type" not in given:
        raise PydanticCustomError("type_missing", "{said}", {"said": f"needs a type; known: {', '.join(_types())}"})
    name = given.get("type") if isinstance(given, Mapping) else given
    if not isinstance(name, str) or name in ESTIMATORS:
        return dict(SHORT.get(given, {"type": given})) if isinstance(given, str) else given
    if isinstance(given, Mapping):
        said = f"unknown type {name!r}; {nearest(name, _types())}"
        raise PydanticCustomError("unknown_type", "{said}", {"said": said})
    expected = ", ".join(repr(known) for known in ESTIMATORS)
    raise PydanticCustomError("unknown_type", "unknown {name}", {"name": repr(name), "expected": expected})


def _types() -> list[str]:
    return [name for name in ESTIMATORS if name not in SHORT]


CreditSettings = Annotated[
    Annotated[
        AgentCredit
        | GlobalCredit
        | TurnCredit
        | AgentTurnCredit
        | JointCredit
        | RoleCredit
        | LeaveOneOutCredit
        | GAECredit
        | ChainedGAECredit
        | AlignedCredit,
        Field(discriminator="type"),
    ],
    BeforeValidator(_in_full),
]
"""What a recipe's `credit` may be."""


def estimate(
    episodes: Sequence[Episode],
    credit: str | Estimator = "agent",
    rewards: RewardSettings | None = None,
    values: Values | None = None,
    state: Mapping[str, float] | None = None,
) -> Credit:
    """Ledger and estimator in one call.

    Args:
        episodes: a rollout.
        credit: an estimator, or the name of one.
        rewards: how rewards are put together; None takes them as the environment paid them.
        values: a critic's, where the estimator needs them.
        state: of the previous call, where the estimator has one.

    Raises:
        UnknownNameError: there is no such estimator.
    """
    if isinstance(credit, str):
        if credit not in ESTIMATORS:
            raise UnknownNameError("credit estimator", credit, ESTIMATORS)
        credit = ESTIMATORS[credit]
    return credit.estimate(ledger_of(episodes, rewards, values), state)
