"""What one stage of a family's training minimises, and which parameters learn in it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from edgetrack.models.segmented import SegmentedModel

if TYPE_CHECKING:
    from edgetrack.train.recipes import Recipe, Stage

__all__ = ["Objective"]


class Objective(nn.Module):
    """The loss of one stage.

    Args:
        model: What is trained; it stays the caller's.
        recipe: The run that the stage belongs to.
        teacher: A frozen model to learn from, in eval mode; ``None`` where there is none.

    Raises:
        ValueError: The stage cannot train this model, or lacks its teacher.

    Attributes:
        reads_teacher_crops: Whether pairs are to come at the sizes of the teacher's crops.
    """

    reads_teacher_crops: ClassVar[bool] = False

    def __init__(
        self, model: SegmentedModel, recipe: "Recipe", teacher: SegmentedModel | None = None
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.teacher = model, recipe, teacher

    @staticmethod
    def is_needed(model: SegmentedModel) -> bool:
        """Whether the stage has anything to train in this model; if not, it is left out."""
        return True

    def prepare(self) -> None:
        """Say what learns: modes and ``requires_grad`` of all modules of the model."""
        self.model.train().requires_grad_(True)

    def before_step(self, share: float, stage: "Stage") -> None:
        """Change what learns as the stage goes on.

        Args:
            share: Of the stage's steps that are done, in [0, 1).
            stage: The stage.
        """

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch (see ``sampling.PairSampler.render``).

        Returns:
            The loss, and detached terms for the log; ``iou_<exit>`` is shown while training.
        """
        raise NotImplementedError
