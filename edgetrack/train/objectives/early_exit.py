"""The two stages of a General Distribution tracker: the final exit, then the shallow ones.

The first stage trains the trunk and the final head. The second freezes both, so that the final
answer keeps its bits, and trains the shallow exits, with self-distillation from the final head.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgetrack.models.general_distribution import GeneralDistributionModel
from edgetrack.models.one_stream import OneStreamModel
from edgetrack.models.segmented import SegmentedModel, State
from edgetrack.train.losses import distillation_loss, tracking_loss
from edgetrack.train.objectives.objective import Objective

if TYPE_CHECKING:
    from edgetrack.train.recipes import Recipe, Stage

__all__ = [
    "FinalExit",
    "FinalHead",
    "ShallowExits",
    "freeze_all_but_shallow_exits",
    "run_trunk",
    "task_loss",
]


class FinalExit(Objective):
    """Task loss of the final head; the shallow exits are not run."""

    model: GeneralDistributionModel

    def __init__(
        self, model: SegmentedModel, recipe: "Recipe", teacher: SegmentedModel | None = None
    ) -> None:
        super().__init__(_checked(model), recipe, teacher)

    def prepare(self) -> None:
        """All learns but the shallow exits."""
        super().prepare()
        self.model.exits[:-1].requires_grad_(False)

    def before_step(self, share: float, stage: "Stage") -> None:
        """A pretrained stem joins late."""
        self.model.stem_requires_grad(share >= stage.frozen_stem_share)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the final exit."""
        state = run_trunk(self.model, batch)
        last = self.model.num_exits - 1
        return task_loss(self.model, last, self.model.exit_logits(last, state), batch, self.recipe)


class FinalHead(FinalExit):
    """Task loss of the final head on a frozen trunk, such as a published one."""

    def prepare(self) -> None:
        """Only the final head learns; the trunk keeps its bits."""
        self.model.eval().requires_grad_(False)
        self.model.exits[-1].train().requires_grad_(True)

    def before_step(self, share: float, stage: "Stage") -> None:
        """A stem stays frozen, like the rest of the trunk."""


class ShallowExits(Objective):
    """Task and distillation losses of the shallow exits; the trunk and final head are frozen."""

    model: GeneralDistributionModel

    def __init__(
        self, model: SegmentedModel, recipe: "Recipe", teacher: SegmentedModel | None = None
    ) -> None:
        super().__init__(_checked(model), recipe, teacher)

    @staticmethod
    def is_needed(model: SegmentedModel) -> bool:
        """A model with one exit has no shallow ones."""
        return model.num_exits > 1

    def prepare(self) -> None:
        """Only the shallow exits learn."""
        freeze_all_but_shallow_exits(self.model)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the losses of the shallow exits."""
        model, last = self.model, self.model.num_exits - 1
        with torch.no_grad():
            state = run_trunk(model, batch)
            teacher_cls, teacher_edges = model.exit_logits(last, state)
        total = torch.zeros((), device=teacher_cls.device)
        log: dict[str, Tensor] = {}
        for index in range(last):
            logits = model.exit_logits(index, state)
            loss, terms = task_loss(model, index, logits, batch, self.recipe)
            distil = distillation_loss(
                *logits,
                teacher_cls_logits=teacher_cls,
                teacher_edge_logits=teacher_edges,
                bbox_cxcywh=batch["search_bbox_cxcywh"],
                is_present=batch["is_present"],
                weights=self.recipe.loss_weights,
            )
            total = total + loss + distil
            log |= terms | {f"distil_{index}": distil.detach()}
        return total, log


def freeze_all_but_shallow_exits(model: GeneralDistributionModel) -> list[nn.Parameter]:
    """Freeze all but the shallow exits, batch-norm statistics included.

    Returns:
        The parameters that still learn. Everything else keeps its bits.
    """
    model.eval().requires_grad_(False)
    shallow = model.exits[:-1]
    return list(shallow.train().requires_grad_(True).parameters())


def run_trunk(
    model: GeneralDistributionModel | OneStreamModel, batch: Mapping[str, Tensor]
) -> State:
    """All that the trunk writes for a batch of pairs."""
    state = model.embed_template(batch["template"], batch["template_bbox_cxcywh"])
    state["search_region"] = batch["search_region"]
    for index in range(model.num_exits):
        state |= model.run_trunk(index, state)
    return state


def task_loss(
    model: GeneralDistributionModel,
    index: int,
    logits: tuple[Tensor, Tensor],
    batch: Mapping[str, Tensor],
    recipe: "Recipe",
) -> tuple[Tensor, dict[str, Tensor]]:
    """``losses.tracking_loss`` of one exit; the names of the terms end in ``_<index>``."""
    loss, terms = tracking_loss(
        *logits,
        bbox_cxcywh=batch["search_bbox_cxcywh"],
        is_present=batch["is_present"],
        bin_size=model.bin_size,
        weights=recipe.loss_weights,
    )
    return loss, {f"{name}_{index}": value for name, value in terms.items()}


def _checked(model: SegmentedModel) -> GeneralDistributionModel:
    if not isinstance(model, GeneralDistributionModel):
        raise ValueError(
            f"objective: expected a model with General Distribution heads, got {model.family}"
        )
    return model
