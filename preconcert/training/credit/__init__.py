"""Credit: from finished episodes to advantages. Pure functions; no model, no tensor.

`ledger_of` turns episodes into the record that estimators read, after `RewardSettings` have put the rewards together.
An estimator turns a ledger into `Credit`: one advantage per turn or per token, what a critic should have said, and
its new state. All estimators read the same record, so they can be compared on identical rollouts. Each is one module:

| name | module | compares | from |
|---|---|---|---|
| `agent`, `agent-centred` | `group_relative` | returns, per task instance and agent | Dr. MAS |
| `global`, `global-centred` | `group_relative` | returns, per task instance, agents pooled | GRPO |
| `turn` | `turn` | returns-to-go, per task instance and agent | MARS / MARSHAL |
| `agent-turn` | `agent_turn` | candidate turns of one moment, per agent | AT-GRPO |
| `joint` | `joint` | the team's return-to-go, per task instance and turn | MAGRPO |
| `role` | `role` | a return with the role's running baseline | SPIRAL |
| `loo` | `leave_one_out` | a return with the mean of the others | RLOO |
| `gae` | `gae` | a critic's values along an agent's turns | GAE |
| `chained-gae` | `chained_gae` | a critic's values along agents, then steps | MARFT |
| `adalign` | `alignment` | `turn`'s, with the other's advantage mixed in | advantage alignment |

The loss knows none of them: it reads the advantages of rows (`preconcert/training/rows.py`). What predictions are paid
is no estimator, since it compares no returns: `prediction`.
"""

from preconcert.training.credit.agent_turn import AgentTurnCredit, Follow, Score
from preconcert.training.credit.alignment import AlignedCredit
from preconcert.training.credit.chained_gae import ChainedGAECredit
from preconcert.training.credit.estimator import Credit, Estimator, Shift
from preconcert.training.credit.gae import GAECredit, Normalise
from preconcert.training.credit.group_relative import AgentCredit, GlobalCredit, Weighting
from preconcert.training.credit.joint import JointCredit
from preconcert.training.credit.leave_one_out import LeaveOneOutCredit
from preconcert.training.credit.ledger import Game, Ledger, Number, Strand, TurnKey, Values, ledger_of
from preconcert.training.credit.prediction import (
    Guess,
    Kind,
    Outlook,
    PredictionSettings,
    guess_advantages,
    outlook_advantages,
)
from preconcert.training.credit.registry import ESTIMATORS, SHORT, CreditSettings, estimate
from preconcert.training.credit.rewards import RewardMode, RewardSettings
from preconcert.training.credit.role import RoleCredit
from preconcert.training.credit.turn import TurnCredit

__all__ = [
    "ESTIMATORS", "SHORT", "AgentCredit", "AgentTurnCredit", "AlignedCredit", "ChainedGAECredit", "Credit",
    "CreditSettings", "Estimator", "Follow", "GAECredit", "Game", "GlobalCredit", "Guess", "JointCredit", "Kind",
    "LeaveOneOutCredit", "Ledger", "Normalise", "Number", "Outlook", "PredictionSettings", "RewardMode",
    "RewardSettings", "RoleCredit", "Score", "Shift", "Strand", "TurnCredit", "TurnKey", "Values", "Weighting",
    "estimate", "guess_advantages", "ledger_of", "outlook_advantages",
]
