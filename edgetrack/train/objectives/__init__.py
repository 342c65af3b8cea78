"""What the stages of training minimise, by name."""

from collections.abc import Mapping

from edgetrack.train.objectives.center import CenterExit
from edgetrack.train.objectives.dytrack import DyTrackBranches, DyTrackDecisioners
from edgetrack.train.objectives.early_exit import FinalExit, FinalHead, ShallowExits
from edgetrack.train.objectives.fartrack import FARTrackDepths, FARTrackFrames, FARTrackRollout
from edgetrack.train.objectives.low_resolution import LowResolution
from edgetrack.train.objectives.objective import Objective
from edgetrack.train.objectives.slimming import Slimming

__all__ = ["OBJECTIVES", "Objective"]

OBJECTIVES: Mapping[str, type[Objective]] = {
    "center_exit": CenterExit,
    "dytrack_branches": DyTrackBranches,
    "dytrack_decisioners": DyTrackDecisioners,
    "fartrack_depths": FARTrackDepths,
    "fartrack_frames": FARTrackFrames,
    "fartrack_rollout": FARTrackRollout,
    "final_exit": FinalExit,
    "final_head": FinalHead,
    "low_resolution": LowResolution,
    "shallow_exits": ShallowExits,
    "slimming": Slimming,
}
