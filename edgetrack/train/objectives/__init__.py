"""What the stages of training minimise, by name."""

from collections.abc import Mapping

from edgetrack.train.objectives.early_exit import FinalExit, ShallowExits
from edgetrack.train.objectives.objective import Objective

__all__ = ["OBJECTIVES", "Objective"]

OBJECTIVES: Mapping[str, type[Objective]] = {
    "final_exit": FinalExit,
    "shallow_exits": ShallowExits,
}
