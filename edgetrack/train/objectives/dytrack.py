"""The two stages of a DyTrack: all branches together, then the decisioners alone.

The first stage trains everything: box losses of every branch, its predicted IoU, and target-aware
self-distillation, which makes the features of early branches look like the last one's where the
target is. The second freezes all but the decisioners, so that the boxes keep their bits and the
IoU that is to be predicted no longer moves. Weights and the form of the distillation are a
reconstruction: the paper's are not public.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetrack.models.dytrack import DyTrack
from edgetrack.models.heads import CenterMaps, decode_center
from edgetrack.models.layers import box_coverage
from edgetrack.models.segmented import SegmentedModel, State
from edgetrack.train.losses import center_loss, giou
from edgetrack.train.objectives.objective import Objective

if TYPE_CHECKING:
    from edgetrack.train.recipes import Recipe, Stage

__all__ = ["DyTrackBranches", "DyTrackDecisioners", "target_aware_distillation"]

# What a cell outside the target counts, where one inside counts 1.
_OUTSIDE = 0.2


class DyTrackBranches(Objective):
    """Box loss, predicted IoU and self-distillation of all branches."""

    model: DyTrack

    def __init__(
        self, model: SegmentedModel, recipe: "Recipe", teacher: SegmentedModel | None = None
    ) -> None:
        super().__init__(_checked(model), recipe, teacher)

    def before_step(self, share: float, stage: "Stage") -> None:
        """A pretrained stem joins late."""
        self.model.stem_requires_grad(share >= stage.frozen_stem_share)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the losses of all branches."""
        model, weights = self.model, self.recipe.loss_weights
        truth = {"bbox_cxcywh": batch["search_bbox_cxcywh"], "is_present": batch["is_present"]}
        state = _run_branches(model, batch)
        last = model.num_exits - 1
        deepest = _search_features(state, last).detach()
        losses: list[Tensor] = []
        log: dict[str, Tensor] = {}
        for index in range(model.num_exits):
            maps = model.box_maps(index, state)
            loss, terms = center_loss(maps, **truth, weights=weights)
            error = iou_loss(model, index, state, maps, batch)
            losses += [loss, weights.iou * error]
            terms["iou_error"] = error.detach()
            if index < last:
                adapted = model.adaptors[index](_search_features(state, index))
                distil = target_aware_distillation(adapted, deepest, **truth)
                losses.append(weights.distil_target * distil)
                terms["distil"] = distil.detach()
            log |= {f"{name}_{index}": value for name, value in terms.items()}
        return torch.stack(losses).sum(), log


class DyTrackDecisioners(Objective):
    """The predicted IoU of all branches; everything but the decisioners is frozen."""

    model: DyTrack

    def __init__(
        self, model: SegmentedModel, recipe: "Recipe", teacher: SegmentedModel | None = None
    ) -> None:
        super().__init__(_checked(model), recipe, teacher)

    def prepare(self) -> None:
        """Only the decisioners learn; batch norms keep their statistics."""
        self.model.eval().requires_grad_(False)
        for index in range(self.model.num_exits):
            self.model.branch(index).decisioner.train().requires_grad_(True)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the errors of the predicted IoUs."""
        model = self.model
        with torch.no_grad():
            state = _run_branches(model, batch)
            maps = [model.box_maps(index, state) for index in range(model.num_exits)]
        errors = [iou_loss(model, k, state, maps[k], batch) for k in range(model.num_exits)]
        log = {f"iou_error_{k}": error.detach() for k, error in enumerate(errors)}
        for k, found in enumerate(maps):
            log[f"iou_{k}"] = _true_iou(model, found, batch).sum() / _num_present(batch)
        return torch.stack(errors).sum(), log


def iou_loss(
    model: DyTrack, index: int, state: State, maps: CenterMaps, batch: Mapping[str, Tensor]
) -> Tensor:
    """Binary cross-entropy of a branch's predicted IoU and its box's, 0 where there is no target.

    The box is the one that the head would answer with, window included; it is not taught.
    """
    logit = model.branch(index).iou_logit(state[f"features_{index}"])
    return F.binary_cross_entropy_with_logits(logit, _true_iou(model, maps, batch))


def target_aware_distillation(
    student: Tensor, teacher: Tensor, *, bbox_cxcywh: Tensor, is_present: Tensor
) -> Tensor:
    """Make features look like deeper ones, above all at the target.

    Squared distances of unit features, a mean weighted by how much of a cell the target covers, and
    the KL divergence of where the features' energy is.

    Args:
        student: Adapted features of the search tokens ``(B, N, C)``.
        teacher: The last branch's, detached, of the same shape.
        bbox_cxcywh: True boxes ``(B, 4)``, normalised to the search region.
        is_present: 1 where the target is in the search region, else 0: ``(B,)``; others teach
            nothing.
    """
    student, teacher = student.float(), teacher.float()
    cover = box_coverage(bbox_cxcywh, grid=math.isqrt(student.shape[1]))
    mask = _OUTSIDE + (1 - _OUTSIDE) * cover
    units = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    distance = (units[0] - units[1]).square().sum(-1)
    pattern = (mask * distance).sum(1) / mask.sum(1)
    log_student = student.square().mean(-1).log_softmax(1)
    log_teacher = teacher.square().mean(-1).log_softmax(1)
    energy = (log_teacher.exp() * (log_teacher - log_student)).sum(1)
    return (is_present * (pattern + energy)).mean()


def _run_branches(model: DyTrack, batch: Mapping[str, Tensor]) -> State:
    """Tokens and features of all branches."""
    state = model.embed_template(batch["template"], batch["template_bbox_cxcywh"])
    state["search_region"] = batch["search_region"]
    for index in range(model.num_exits):
        state |= model.run_trunk(index, state)
        state[f"features_{index}"] = model.branch_features(index, state)
    return state


def _search_features(state: State, index: int) -> Tensor:
    return state[f"features_{index}"][:, 1:]


@torch.no_grad()
def _true_iou(model: DyTrack, maps: CenterMaps, batch: Mapping[str, Tensor]) -> Tensor:
    boxes = decode_center(maps, window=model.window)["bbox_cxcywh"], batch["search_bbox_cxcywh"]
    corners = [torch.cat([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], 1) for b in boxes]
    iou, _ = giou(corners[0], corners[1])
    return iou.clamp(0, 1) * batch["is_present"]


def _num_present(batch: Mapping[str, Tensor]) -> Tensor:
    return batch["is_present"].sum().clamp(min=1)


def _checked(model: SegmentedModel) -> DyTrack:
    if not isinstance(model, DyTrack):
        raise ValueError(f"objective: expected a dytrack, got {model.family}")
    return model
