"""Losses of the heads, each a mean over samples.

Quality Focal Loss and Distribution Focal Loss: Li et al., NeurIPS 2020, arXiv 2006.04388. GIoU:
Rezatofighi et al., CVPR 2019, arXiv 1902.09630. Localisation distillation: Zheng et al., CVPR
2022, arXiv 2102.12252. Penalty-reduced focal loss of centres: CornerNet, Law and Deng, ECCV 2018,
arXiv 1808.01244, as CenterNet and OSTrack have it.

Every term is normalised within its sample, so the loss of a batch does not depend on how the
batch is spread over processes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetrack.models.heads import CenterMaps, center_boxes, edge_distances

__all__ = [
    "LossWeights",
    "cell_targets",
    "center_focal_loss",
    "center_heatmap",
    "center_loss",
    "distillation_loss",
    "distribution_focal_loss",
    "giou",
    "quality_focal_loss",
    "tracking_loss",
]

# Score maps are summed as if they had 8 x 8 cells: a finer grid does not weigh more.
_REFERENCE_CELLS = 64
# IoU that a box with corners inside a centre's radius still has (CornerNet).
_MIN_OVERLAP = 0.7


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms; the defaults are GFL's and OSTrack's, of distillation our own.

    Attributes:
        score: Quality Focal Loss.
        giou: Generalised IoU.
        l1: L1 on normalised corners.
        dfl: Distribution Focal Loss.
        distil_edges: KL from the final head's edge distributions (stage 2).
        distil_score: Binary cross-entropy to the final head's score map (stage 2).
        temperature: Temperature of the KL.
        iou: Regression of the predicted IoU (DyTrack).
        distil_target: Target-aware self-distillation from the last branch (DyTrack).
        boxes_at: Cells of a CENTER head whose boxes are taught: the ``winner``, as OSTrack does,
            or all around the true centre by the ``heatmap``, which little data asks for.
        qkv: QKV-KD from a high-resolution teacher (LoReTrack).
        disc: Disc-KD from it.
        qkv_form: ``kl`` or ``mse`` (see ``objectives.low_resolution``).
        target_energy: Of the mean square of a teacher's feature over its channels, from which on a
            cell counts as the target's in Disc-KD. The default is the published one, for OSTrack's
            trunk; a trunk whose last norm has other scales needs another.
    """

    score: float = 1.0
    giou: float = 2.0
    l1: float = 5.0
    dfl: float = 0.25
    distil_edges: float = 1.0
    distil_score: float = 0.25
    temperature: float = 1.0
    iou: float = 1.0
    distil_target: float = 1.0
    boxes_at: str = "winner"
    qkv: float = 0.01
    disc: float = 0.01
    qkv_form: str = "kl"
    target_energy: float = 0.20

    def __post_init__(self) -> None:
        """Refuse an unknown choice."""
        if self.boxes_at not in ("winner", "heatmap"):
            raise ValueError(f"boxes_at: expected 'winner' or 'heatmap', got {self.boxes_at!r}")
        if self.qkv_form not in ("kl", "mse"):
            raise ValueError(f"qkv_form: expected 'kl' or 'mse', got {self.qkv_form!r}")


def giou(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of corner boxes ``(..., 4)`` that broadcast.

    Returns:
        ``(...)`` in [0, 1] and ``(...)`` in [-1, 1].
    """
    area_a = (a_xyxy[..., 2:] - a_xyxy[..., :2]).clamp(min=0).prod(-1)
    area_b = (b_xyxy[..., 2:] - b_xyxy[..., :2]).clamp(min=0).prod(-1)
    low, high = torch.maximum(a_xyxy, b_xyxy), torch.minimum(a_xyxy, b_xyxy)
    intersection = (high[..., 2:] - low[..., :2]).clamp(min=0).prod(-1)
    hull = (low[..., 2:] - high[..., :2]).clamp(min=0).prod(-1) + 1e-7
    union = area_a + area_b - intersection + 1e-7
    iou = intersection / union
    return iou, iou - (hull - union) / hull


def quality_focal_loss(logits: Tensor, quality: Tensor) -> Tensor:
    """``|sigmoid(logits) - quality|^2`` times binary cross-entropy, element by element."""
    bce = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return bce * (logits.sigmoid() - quality).square()


def distribution_focal_loss(edge_logits: Tensor, distance_bins: Tensor) -> Tensor:
    """Cross-entropy to the two bins around a distance.

    Args:
        edge_logits: ``(..., K)``.
        distance_bins: Distances in bins ``(...)``; clamped to [0, K - 1.01].

    Returns:
        ``(...)``.
    """
    distance = distance_bins.clamp(0, edge_logits.shape[-1] - 1.01)
    below = distance.floor()
    share = (distance - below)[..., None]
    log_probs = edge_logits.log_softmax(-1)
    index = below.long()[..., None]
    low, high = log_probs.gather(-1, index), log_probs.gather(-1, index + 1)
    return -((1 - share) * low + share * high).squeeze(-1)


def cell_targets(bbox_cxcywh: Tensor, *, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which cells answer for a box.

    Args:
        bbox_cxcywh: True boxes ``(B, 4)``, normalised to the search region.
        grid: Cells per side.

    Returns:
        The centres of the cells ``(HW, 2)``; a mask ``(B, HW)`` of the cells inside the box (the
        nearest cell always is); how central each is ``(B, HW)`` in (0, 1], 1 at the nearest.
    """
    steps = (torch.arange(grid, device=bbox_cxcywh.device) + 0.5) / grid
    centres = torch.stack([steps.repeat(grid), steps.repeat_interleave(grid)], -1)
    offset = (centres - bbox_cxcywh[:, None, :2]).abs()
    size = bbox_cxcywh[:, None, 2:]
    nearest = F.one_hot(offset.square().sum(-1).argmin(1), grid * grid).bool()
    inside = (offset < size / 2).all(-1) | nearest
    # Not in GFL, where every cell inside a box counts alike: little data asks for a clear centre.
    spread = 0.22 * size + 0.5 / grid
    central = torch.exp(-0.5 * (offset / spread).square().sum(-1))
    return centres, inside, torch.where(nearest, torch.ones_like(central), central)


def tracking_loss(
    cls_logits: Tensor,
    edge_logits: Tensor,
    *,
    bbox_cxcywh: Tensor,
    is_present: Tensor,
    bin_size: float,
    weights: LossWeights,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The task loss of one exit.

    Args:
        cls_logits: ``(B, HW)``.
        edge_logits: ``(B, HW, 4, K)``.
        bbox_cxcywh: True boxes ``(B, 4)``, normalised to the search region.
        is_present: 1 where the target is in the search region, else 0: ``(B,)``.
        bin_size: Width of a bin as a share of the search region.
        weights: Of the terms.

    Returns:
        The loss, and its terms with the mean IoU for the log (detached).
    """
    cls_logits, edge_logits = cls_logits.float(), edge_logits.float()
    grid = math.isqrt(cls_logits.shape[1])
    centres, inside, central = cell_targets(bbox_cxcywh, grid=grid)
    true_xyxy = _to_xyxy(bbox_cxcywh)[:, None]
    distances = edge_distances(edge_logits, bin_size=bin_size)
    sides = torch.tensor([-1.0, -1.0, 1.0, 1.0], device=cls_logits.device)
    corners = centres.repeat(1, 2)
    predicted_xyxy = corners + sides * distances
    iou, generalised = giou(predicted_xyxy, true_xyxy)

    mask = inside * is_present[:, None]
    share = mask * (central + 0.05)
    share = share / share.sum(1, keepdim=True).clamp(min=1e-6)
    quality = mask * central * (0.4 + 0.6 * iou.detach().clamp(0, 1))
    distance_bins = sides * (true_xyxy - corners) / bin_size
    terms = {
        "score": quality_focal_loss(cls_logits, quality).sum(1) * (_REFERENCE_CELLS / grid**2),
        "giou": (share * (1 - generalised)).sum(1),
        "l1": (share * (predicted_xyxy - true_xyxy).abs().mean(-1)).sum(1),
        "dfl": (share * distribution_focal_loss(edge_logits, distance_bins).mean(-1)).sum(1),
    }
    total = torch.stack([getattr(weights, k) * v.mean() for k, v in terms.items()]).sum()
    log = {k: v.detach().mean() for k, v in terms.items()}
    log["iou"] = (share * iou).sum().detach() / is_present.sum().clamp(min=1)
    return total, log


def distillation_loss(
    cls_logits: Tensor,
    edge_logits: Tensor,
    *,
    teacher_cls_logits: Tensor,
    teacher_edge_logits: Tensor,
    bbox_cxcywh: Tensor,
    is_present: Tensor,
    weights: LossWeights,
) -> Tensor:
    """Teach a shallow exit by the final one; the teacher's maps must be detached.

    Args:
        cls_logits: ``(B, HW)``.
        edge_logits: ``(B, HW, 4, K)``.
        teacher_cls_logits: ``(B, HW)``.
        teacher_edge_logits: ``(B, HW, 4, K)``.
        bbox_cxcywh: True boxes ``(B, 4)``: edges are taught at the cells inside them.
        is_present: ``(B,)``, 0 or 1.
        weights: Of the terms, and the temperature.
    """
    grid = math.isqrt(cls_logits.shape[1])
    _, inside, central = cell_targets(bbox_cxcywh, grid=grid)
    share = inside * is_present[:, None] * (central + 0.05)
    share = share / share.sum(1, keepdim=True).clamp(min=1e-6)
    t = weights.temperature
    log_student = (edge_logits.float() / t).log_softmax(-1)
    log_teacher = (teacher_edge_logits.float() / t).log_softmax(-1)
    kl = (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean(-1) * t**2
    bce = F.binary_cross_entropy_with_logits(
        cls_logits.float(), teacher_cls_logits.float().sigmoid(), reduction="none"
    )
    edges = (share * kl).sum(1).mean()
    score = bce.sum(1).mean() * (_REFERENCE_CELLS / grid**2)
    return weights.distil_edges * edges + weights.distil_score * score


def center_heatmap(bbox_cxcywh: Tensor, *, grid: int) -> Tensor:
    """How well each cell stands for the centre of a box: a Gaussian of CornerNet's radius.

    The radius is that of CornerNet's released code, which divides its roots by 2 instead of 2a, and
    so are all numbers in OSTrack's line of work.

    Args:
        bbox_cxcywh: Boxes ``(B, 4)``, normalised to the search region.
        grid: Cells per side.

    Returns:
        ``(B, grid * grid)`` in [0, 1]: 1 at the cell whose corner is nearest to the centre, which
        may lie outside the grid; 0 beyond the radius.
    """
    total, product = bbox_cxcywh[:, 2:].sum(1) * grid, bbox_cxcywh[:, 2:].prod(1) * grid**2
    low, high = 1 - _MIN_OVERLAP, 1 + _MIN_OVERLAP
    # a, b, c of the three quadratic equations: one corner inside, both inside, both outside
    roots = [
        (b + (b.square() - 4 * a * c).clamp(min=0).sqrt()) / 2
        for a, b, c in (
            (1.0, total, product * low / high),
            (4.0, 2 * total, product * low),
            (4 * _MIN_OVERLAP, -2 * _MIN_OVERLAP * total, -product * low),
        )
    ]
    radius = torch.stack(roots).amin(0).floor().clamp(min=0)[:, None]
    sigma = (2 * radius + 1) / 6
    steps = torch.arange(grid, device=bbox_cxcywh.device, dtype=bbox_cxcywh.dtype)
    centre = (bbox_cxcywh[:, :2] * grid).round()

    def along(at: Tensor) -> Tensor:
        distance = (steps - at[:, None]).abs()
        return torch.exp(-0.5 * (distance / sigma).square()) * (distance <= radius)

    return (along(centre[:, 1])[:, :, None] * along(centre[:, 0])[:, None, :]).flatten(1)


def center_focal_loss(score: Tensor, heatmap: Tensor) -> Tensor:
    """CornerNet's penalty-reduced focal loss (alpha 2, beta 4), cell by cell.

    Args:
        score: In (0, 1).
        heatmap: Of the same shape, in [0, 1]; only where it is 1 the score is to rise.
    """
    rising = -score.log() * (1 - score).square()
    falling = -(1 - score).log() * score.square() * (1 - heatmap).pow(4)
    return torch.where(heatmap == 1, rising, falling)


def center_loss(
    maps: CenterMaps,
    *,
    bbox_cxcywh: Tensor,
    is_present: Tensor,
    weights: LossWeights,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The task loss of a CENTER head, as OSTrack's.

    Args:
        maps: Of the head.
        bbox_cxcywh: True boxes ``(B, 4)``, normalised to the search region.
        is_present: 1 where the target is in the search region, else 0: ``(B,)``.
        weights: Of the terms, and which cells' boxes count.

    Returns:
        The loss, and its terms with the mean IoU for the log (detached).
    """
    grid = math.isqrt(maps.score.shape[1])
    heatmap = center_heatmap(bbox_cxcywh, grid=grid) * is_present[:, None]
    if weights.boxes_at == "winner":
        share = F.one_hot(maps.score.argmax(1), grid**2) * is_present[:, None]
    else:
        share = heatmap / heatmap.sum(1, keepdim=True).clamp(min=1e-6)
    true_xyxy = _to_xyxy(bbox_cxcywh).clamp(0, 1)[:, None]
    predicted_xyxy = _to_xyxy(center_boxes(maps))
    iou, generalised = giou(predicted_xyxy, true_xyxy)
    terms = {
        "score": center_focal_loss(maps.score, heatmap).sum(1),
        "giou": (share * (1 - generalised)).sum(1),
        "l1": (share * (predicted_xyxy - true_xyxy).abs().mean(-1)).sum(1),
    }
    total = torch.stack([getattr(weights, k) * v.mean() for k, v in terms.items()]).sum()
    log = {k: v.detach().mean() for k, v in terms.items()}
    log["iou"] = (share * iou).sum().detach() / is_present.sum().clamp(min=1)
    return total, log


def _to_xyxy(bbox_cxcywh: Tensor) -> Tensor:
    centre, half = bbox_cxcywh[..., :2], bbox_cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)
