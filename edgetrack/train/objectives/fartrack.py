"""FARTrack's three stages: frames, self-distillation between depths, roll-outs.

The first trains the final depth on single frames with all tokens of all templates; the second every
depth from a third of the layers on, each taught by the next; the third lets the tracker follow
targets by its own answers, with templates that lost tokens, and learns from what that led to.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgetrack.models.coordinates import expected_corners
from edgetrack.models.fartrack import FARTrack
from edgetrack.models.segmented import SegmentedModel
from edgetrack.models.template_bank import (
    choose_templates,
    enter_template,
    first_clock,
    first_history,
)
from edgetrack.train.coordinate_losses import (
    coordinate_cross_entropy,
    depth_divergence,
    siou_loss,
)
from edgetrack.train.objectives.objective import Objective
from edgetrack.train.rollouts import cut_windows

if TYPE_CHECKING:
    from edgetrack.train.recipes import Recipe, Stage

__all__ = ["FARTrackDepths", "FARTrackFrames", "FARTrackRollout"]

_CE_WEIGHT, _SIOU_WEIGHT, _KL_WEIGHT = 2.0, 2.0, 0.01


class _FARTrackObjective(Objective):
    """What the stages share."""

    model: FARTrack

    def __init__(
        self, model: SegmentedModel, recipe: "Recipe", teacher: SegmentedModel | None = None
    ) -> None:
        if not isinstance(model, FARTrack):
            raise ValueError(f"objective: expected a fartrack model, got {model.family}")
        super().__init__(model, recipe, teacher)
        self.depth = model.config.exit_after[-1]

    def before_step(self, share: float, stage: "Stage") -> None:
        """A pretrained stem joins late."""
        self.model.stem_requires_grad(share >= stage.frozen_stem_share)

    def logits_of(self, batch: Mapping[str, Tensor], depths: Sequence[int]) -> list[Tensor]:
        """Logits at some depths, all tokens of all templates seen."""
        is_one = "templates" not in batch
        templates = batch["template"][:, None] if is_one else batch["templates"]
        bboxes = (
            batch["template_bbox_cxcywh"][:, None] if is_one else batch["templates_bbox_cxcywh"]
        )
        state = self.model.embed_templates(templates, bboxes, is_sparse=False)
        state["search_region"] = batch["search_region"]
        return self.model.logits_at(depths, state)

    def task_loss(
        self, logits: Tensor, batch: Mapping[str, Tensor], *, depth: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``2 CE + 2 SIoU`` where the target is present; the names of the terms end in its depth.

        Pairs without the target have no true coordinates and teach nothing.
        """
        num_bins, is_present = self.model.config.num_bins, batch["is_present"]
        corners = _corners(batch["search_bbox_cxcywh"])
        ce = coordinate_cross_entropy(logits, corners, num_bins=num_bins)
        siou, iou = siou_loss(expected_corners(logits, num_bins), corners)
        # Of the batch's size, not the number of targets: a process may have few.
        ce, siou = (ce * is_present).mean(), (siou * is_present).mean()
        mean_iou = (iou * is_present).sum() / is_present.sum().clamp(min=1)
        log = {"ce": ce, "siou": siou, "iou": mean_iou}
        loss = _CE_WEIGHT * ce + _SIOU_WEIGHT * siou
        return loss, {f"{name}_{depth}": value.detach() for name, value in log.items()}


class FARTrackFrames(_FARTrackObjective):
    """Frame level: the final depth on single frames."""

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Task loss of the final depth."""
        (logits,) = self.logits_of(batch, [self.depth])
        return self.task_loss(logits, batch, depth=self.depth)


class FARTrackDepths(_FARTrackObjective):
    """Task-specific self-distillation: every depth from a third of the layers on.

    Of 15 layers these are 5 to 15, as published.
    """

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean task loss of all depths, and 0.01 of the mean divergence of neighbours."""
        depths = range(max(self.depth // 3, 1), self.depth + 1)
        logits = self.logits_of(batch, depths)
        losses: list[Tensor] = []
        log: dict[str, Tensor] = {}
        for depth, at_depth in zip(depths, logits, strict=True):
            loss, terms = self.task_loss(at_depth, batch, depth=depth)
            losses.append(loss)
            is_shown = depth in self.model.config.exit_after
            log |= {name: value for name, value in terms.items() if is_shown}
        total = torch.stack(losses).mean()
        if len(logits) > 1:
            num_bins, is_present = self.model.config.num_bins, batch["is_present"]
            pairs = itertools.pairwise(logits)
            steps = [depth_divergence(low, up, num_bins=num_bins) for low, up in pairs]
            divergence = (torch.stack(steps).mean(0) * is_present).mean()
            total = total + _KL_WEIGHT * divergence
            log["kl"] = divergence.detach()
        return total, log


class FARTrackRollout(_FARTrackObjective):
    """Inter-frame autoregressive sparsification: SIoU on what the tracker's own answers led to.

    Batch norms keep their statistics, as at run time.
    """

    def prepare(self) -> None:
        """All learns but batch norms."""
        super().prepare()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean SIoU of all exits over the frames whose search region shows the target.

        Raises:
            ValueError: The batch holds pairs.
        """
        if "frames" not in batch:
            raise ValueError(
                "fartrack_rollout: expected a batch of runs, got pairs; set num_frames of the stage"
            )
        with torch.no_grad():
            seen = self._roll_out(batch["frames"], batch["bboxes_cxcywh"])
        total = torch.zeros((), device=seen["is_visible"].device)
        log: dict[str, Tensor] = {}
        depths = self.model.config.exit_after
        for depth, logits in zip(depths, self._answers(seen), strict=True):
            corners = expected_corners(logits, self.model.config.num_bins)
            siou, iou = siou_loss(corners, _corners(seen["truth"]))
            count = seen["is_visible"].sum().clamp(min=1)
            total = total + _SIOU_WEIGHT * (siou * seen["is_visible"]).mean() / len(depths)
            log[f"iou_{depth}"] = ((iou * seen["is_visible"]).sum() / count).detach()
        log["visible"] = seen["is_visible"].mean()
        return total, log

    def _roll_out(self, frames: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Follow the targets.

        Args:
            frames: uint8 ``(B, T, S, S, 3)``.
            truth: ``(B, T, 4)``, normalised to the frames.

        Returns:
            ``template`` ``(B, T, ...)`` and ``template_bbox_cxcywh`` of all frames; and of all but
            the first ``search_region``, ``slots`` ``(B, T - 1, S)`` (the frames whose templates
            were used), ``truth`` in the search region, ``is_visible``, and ``trajectory`` where
            the model reads one.
        """
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        run = _Run(self.model, frames, truth)
        for index in range(1, frames.shape[1]):
            run.step(index)
        for module, mode in modes.items():
            module.training = mode
        return run.seen()

    def _answers(self, seen: Mapping[str, Tensor]) -> list[Tensor]:
        """Logits of all exits for the frames that were seen, ``(B * (T - 1), 4, words)``."""
        slots = seen["slots"]
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None, None]
        templates = seen["template"][rows, slots].flatten(0, 1)
        bboxes = seen["template_bbox_cxcywh"][rows, slots].flatten(0, 1)
        state = self.model.embed_templates(templates, bboxes, is_sparse=True)
        state["search_region"] = seen["search_region"].flatten(0, 1)
        if "trajectory" in seen:
            state["trajectory"] = seen["trajectory"].flatten(0, 1)
        return self.model.logits_at(self.model.config.exit_after, state)


class _Run:
    """A batch of targets that are followed by the model's own answers, as the runtime does it."""

    def __init__(self, model: FARTrack, frames: Tensor, truth: Tensor) -> None:
        self.model, self.frames, self.truth = model, frames, truth
        self.bbox = truth[:, 0]
        template, bbox = self._template(0)
        self.state = model.embed_template(template, bbox)
        number = torch.zeros(len(frames), 1, device=frames.device)
        self.numbers = first_history(number, model.config.history_places)
        self.clock = first_clock(number)
        self.slots = number.expand(-1, model.config.num_templates)
        self.templates, self.template_bboxes = [template], [bbox]
        self.rows: list[dict[str, Tensor]] = []

    def step(self, index: int) -> None:
        """Search frame ``index``, move there, and take in its template."""
        model = self.model
        side = self._side(model.crops.search_factor)
        windows = torch.cat([self.bbox[:, :2], side], 1)
        search_region = cut_windows(
            self.frames[:, index], windows, size_px=model.crops.search_size_px
        )
        truth = _in_window(self.truth[:, index], windows)
        is_visible = ((truth[:, :2] - 0.5).abs() < 0.5).all(1).float()
        row = {
            "search_region": search_region,
            "slots": self.slots.long(),
            "truth": truth,
            "is_visible": is_visible,
        }
        if "trajectory" in self.state:
            row["trajectory"] = self.state["trajectory"]
        self.rows.append(row)
        self.state["search_region"] = search_region
        for segment in range(model.num_exits):
            self.state |= model.run_segment(segment, self.state)
        answer = self.state["bbox_cxcywh"]
        centre = windows[:, :2] + (answer[:, :2] - 0.5) * side
        self.bbox = torch.cat([centre.clamp(0, 1), (answer[:, 2:] * side).clamp(0.01, 1)], 1)
        template, bbox = self._template(index)
        self.templates.append(template)
        self.template_bboxes.append(bbox)
        self._update(template, bbox, index)

    def seen(self) -> dict[str, Tensor]:
        """See ``FARTrackRollout._roll_out``."""
        found = {name: torch.stack([row[name] for row in self.rows], 1) for name in self.rows[0]}
        found["truth"] = found["truth"].flatten(0, 1)
        found["is_visible"] = found["is_visible"].flatten(0, 1)
        found["template"] = torch.stack(self.templates, 1)
        found["template_bbox_cxcywh"] = torch.stack(self.template_bboxes, 1)
        return found

    def _update(self, template: Tensor, bbox: Tensor, index: int) -> None:
        model = self.model
        inputs = {**self.state, "template": template, "template_bbox_cxcywh": bbox}
        written = model.run_update(inputs)
        # The same walk with numbers of frames in the place of templates.
        number = torch.full_like(self.numbers[:, 0], index)
        numbers, clock = enter_template(self.numbers, self.clock, number)
        slots = choose_templates(numbers, clock, number, model.config.num_templates)[..., 0]
        is_taken = (written["next_bank_clock"] != self.state["bank_clock"]).any(1, keepdim=True)
        self.numbers = torch.where(is_taken[..., None], numbers, self.numbers)
        self.clock = torch.where(is_taken, clock, self.clock)
        self.slots = torch.where(is_taken, slots, self.slots)
        self.state |= {name: written[source] for name, source in model.carried.items()}

    def _template(self, index: int) -> tuple[Tensor, Tensor]:
        """The crop around the box in frame ``index``, and the box in it."""
        crops = self.model.crops
        windows = torch.cat([self.bbox[:, :2], self._side(crops.template_factor)], 1)
        template = cut_windows(self.frames[:, index], windows, size_px=crops.template_size_px)
        return template, _in_window(self.bbox, windows)

    def _side(self, factor: float) -> Tensor:
        return self.bbox[:, 2:].prod(1, keepdim=True).sqrt() * factor


def _in_window(bbox_cxcywh: Tensor, windows: Tensor) -> Tensor:
    """Boxes ``(B, 4)`` in the coordinates of windows ``(B, 3)``: centres and sides."""
    side = windows[:, 2:]
    centre = (bbox_cxcywh[:, :2] - windows[:, :2]) / side + 0.5
    return torch.cat([centre, bbox_cxcywh[:, 2:] / side], 1)


def _corners(bbox_cxcywh: Tensor) -> Tensor:
    half = bbox_cxcywh[..., 2:] / 2
    return torch.cat([bbox_cxcywh[..., :2] - half, bbox_cxcywh[..., :2] + half], -1)
