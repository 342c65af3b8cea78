"""Losses of trackers that speak coordinates: cross-entropy, SIoU, and KL between depths.

SIoU: "SIoU Loss: More Powerful Learning for Bounding Box Regression", Gevorgyan, 2022,
arXiv 2205.12740.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetrack.models.coordinates import NUM_SPECIAL_WORDS, quantise_corners

__all__ = ["coordinate_cross_entropy", "depth_divergence", "siou_loss"]

_SPECIAL_WEIGHT = 0.1
_SHAPE_POWER = 4  # theta of the paper
_EPS = 1e-7


def coordinate_cross_entropy(logits: Tensor, corners: Tensor, *, num_bins: int) -> Tensor:
    """Cross-entropy to the bins of true coordinates; special words, if true, count a tenth.

    Args:
        logits: ``(B, 4, words)``.
        corners: True boxes ``(B, 4)``, corners normalised to the search region.
        num_bins: Coordinate bins.

    Returns:
        ``(B,)``, the mean over the four.
    """
    weight = torch.ones(num_bins + NUM_SPECIAL_WORDS, device=logits.device)
    weight[num_bins:] = _SPECIAL_WEIGHT
    words = quantise_corners(corners, num_bins)
    flat = F.cross_entropy(logits.float().flatten(0, 1), words.flatten(), weight, reduction="none")
    return flat.view(words.shape).mean(1)


def siou_loss(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """SIoU loss of corner boxes: overlap, distance that follows the angle, and shape.

    Args:
        predicted: ``(..., 4)``; corners that are swapped make an empty box.
        true: ``(..., 4)``.

    Returns:
        The loss and the IoU, both ``(...)``.
    """
    size_p = (predicted[..., 2:] - predicted[..., :2]).clamp(min=_EPS)
    size_t = (true[..., 2:] - true[..., :2]).clamp(min=_EPS)
    low = torch.maximum(predicted[..., :2], true[..., :2])
    high = torch.minimum(predicted[..., 2:], true[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    union = size_p.prod(-1) + size_t.prod(-1) - intersection
    iou = intersection / (union + _EPS)

    offset = ((true[..., :2] + true[..., 2:]) - (predicted[..., :2] + predicted[..., 2:])) / 2
    hull = torch.maximum(predicted[..., 2:], true[..., 2:])
    hull = hull - torch.minimum(predicted[..., :2], true[..., :2])
    # 1 - 2 sin²(arcsin x - π/4) is the sine of twice the angle, which has no arcsin to derive.
    angle = 2 * offset.abs().prod(-1) / (offset.square().sum(-1) + _EPS)
    share = (offset / (hull + _EPS)).square()
    distance = (1 - torch.exp((angle - 2)[..., None] * share)).sum(-1)
    change = (size_p - size_t).abs() / torch.maximum(size_p, size_t)
    shape = (1 - torch.exp(-change)).pow(_SHAPE_POWER).sum(-1)
    return 1 - iou + (distance + shape) / 2, iou


def depth_divergence(shallow: Tensor, deep: Tensor, *, num_bins: int) -> Tensor:
    """KL from a depth's coordinate distributions to the next deeper depth's, which is the teacher.

    Args:
        shallow: Logits ``(B, 4, words)``.
        deep: Logits ``(B, 4, words)``; no gradient reaches them.
        num_bins: Coordinate bins; special words are left out.

    Returns:
        ``(B,)``: the sum over the four coordinates.
    """
    taught = shallow[..., :num_bins].float().log_softmax(-1)
    teacher = deep.detach()[..., :num_bins].float().log_softmax(-1)
    return F.kl_div(taught, teacher, reduction="none", log_target=True).sum((1, 2))
