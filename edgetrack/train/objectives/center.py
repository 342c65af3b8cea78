"""OSTrack's training: focal, GIoU and L1 losses of its CENTER head (see ``losses.center_loss``)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from edgetrack.models.ostrack import OSTrack
from edgetrack.models.segmented import SegmentedModel
from edgetrack.train.losses import center_loss
from edgetrack.train.objectives.early_exit import run_trunk
from edgetrack.train.objectives.objective import Objective

if TYPE_CHECKING:
    from edgetrack.train.recipes import Recipe

__all__ = ["CenterExit", "center_task_loss"]


class CenterExit(Objective):
    """Task loss of an OSTrack; all of it learns."""

    model: OSTrack

    def __init__(
        self, model: SegmentedModel, recipe: "Recipe", teacher: SegmentedModel | None = None
    ) -> None:
        if not isinstance(model, OSTrack):
            raise ValueError(f"objective: expected an ostrack, got {model.family}")
        super().__init__(model, recipe, teacher)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the one exit."""
        return center_task_loss(self.model, run_trunk(self.model, batch), batch, self.recipe)


def center_task_loss(
    model: OSTrack,
    state: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    recipe: "Recipe",
) -> tuple[Tensor, dict[str, Tensor]]:
    """``losses.center_loss`` of what the trunk wrote; the names of the terms end in ``_0``."""
    loss, terms = center_loss(
        model.center_maps(state),
        bbox_cxcywh=batch["search_bbox_cxcywh"],
        is_present=batch["is_present"],
        weights=recipe.loss_weights,
    )
    return loss, {f"{name}_0": value for name, value in terms.items()}
