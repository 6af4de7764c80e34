"""World models: what imagines the next view, the others' actions, the reward and the end; and how they are judged."""

from preconcert.world_models.oracle import OracleValue, OracleWorldModel

__all__ = ["OracleValue", "OracleWorldModel"]
