"""The losses of the CENTER head, against twins after CornerNet's and OSTrack's released code."""

import math

import pytest
import torch
from tolerances import FROM_TWIN
from torch import Tensor
from torch.testing import assert_close

from edgetrack.models.heads import CenterMaps
from edgetrack.train.losses import (
    LossWeights,
    center_focal_loss,
    center_heatmap,
    center_loss,
    giou,
)

GRID = 16
BOXES = torch.tensor(
    [
        [0.50, 0.50, 0.42, 0.35],
        [0.12, 0.81, 0.50, 0.63],
        [0.47, 0.52, 0.04, 0.05],
        [0.31, 0.22, 0.20, 0.30],
    ]
)
IS_PRESENT = torch.tensor([1.0, 1.0, 1.0, 0.0])


def random_maps(seed: int = 0) -> CenterMaps:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(4, GRID**2, generator=generator).clamp(1e-4, 1 - 1e-4)
    offset = torch.randn(4, GRID**2, 2, generator=generator)
    size = torch.rand(4, GRID**2, 2, generator=generator)
    return CenterMaps(*(t.requires_grad_() for t in (score, offset, size)))


def radius_slowly(width: float, height: float) -> int:
    """CornerNet's radius as released: the roots are divided by 2, not by 2a."""
    overlap = 0.7
    b1, c1 = height + width, width * height * (1 - overlap) / (1 + overlap)
    r1 = (b1 + math.sqrt(b1**2 - 4 * c1)) / 2
    b2, c2 = 2 * (height + width), (1 - overlap) * width * height
    r2 = (b2 + math.sqrt(b2**2 - 4 * 4 * c2)) / 2
    a3, b3, c3 = 4 * overlap, -2 * overlap * (height + width), (overlap - 1) * width * height
    r3 = (b3 + math.sqrt(b3**2 - 4 * a3 * c3)) / 2
    return max(0, int(min(r1, r2, r3)))


def heatmap_slowly(bbox: Tensor) -> list[float]:
    """A patch of a Gaussian, pasted where it overlaps the map."""
    cx, cy, w, h = (float(v) * GRID for v in bbox)
    column, row = round(cx), round(cy)
    radius = radius_slowly(w, h)
    sigma = (2 * radius + 1) / 6
    heat = [0.0] * GRID**2
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            if 0 <= row + dy < GRID and 0 <= column + dx < GRID:
                value = math.exp(-(dx * dx + dy * dy) / (2 * sigma * sigma))
                heat[(row + dy) * GRID + column + dx] = value
    return heat


def loss_slowly(maps: CenterMaps, weights: LossWeights) -> Tensor:
    """Sample by sample, cell by cell."""
    total = torch.zeros(())
    for b in range(4):
        heat = heatmap_slowly(BOXES[b]) if IS_PRESENT[b] else [0.0] * GRID**2
        for cell, target in enumerate(heat):
            p = maps.score[b, cell]
            if target == 1.0:
                total = total - weights.score * torch.log(p) * (1 - p) ** 2
            else:
                falling = torch.log(1 - p) * p**2 * (1 - target) ** 4
                total = total - weights.score * falling
        if not IS_PRESENT[b]:
            continue
        if weights.boxes_at == "winner":
            shares = {int(maps.score[b].argmax()): 1.0}
        else:
            shares = {c: v / sum(heat) for c, v in enumerate(heat) if v > 0}
        cx, cy, w, h = BOXES[b]
        truth = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]).clamp(0, 1)
        for cell, share in shares.items():
            x = (cell % GRID + maps.offset[b, cell, 0]) / GRID
            y = (cell // GRID + maps.offset[b, cell, 1]) / GRID
            half_w, half_h = maps.size[b, cell] / 2
            box = torch.stack([x - half_w, y - half_h, x + half_w, y + half_h])
            _, generalised = giou(box, truth)
            l1 = (box - truth).abs().mean()
            total = total + share * (weights.giou * (1 - generalised) + weights.l1 * l1)
    return total / 4


@pytest.mark.parametrize("boxes_at", ["winner", "heatmap"])
def test_the_center_loss_equals_the_slow_twin_gradients_included(boxes_at: str) -> None:
    weights = LossWeights(score=1.1, giou=2.2, l1=5.5, boxes_at=boxes_at)
    maps, twins = random_maps(), random_maps()

    loss, _ = center_loss(maps, bbox_cxcywh=BOXES, is_present=IS_PRESENT, weights=weights)
    expected = loss_slowly(twins, weights)
    gradients = torch.autograd.grad(loss, maps)
    expected_gradients = torch.autograd.grad(expected, twins)

    assert_close(loss, expected, atol=0, rtol=FROM_TWIN["float32"])
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, other, atol=FROM_TWIN["float32"], rtol=1e-4)


def test_a_heatmap_equals_cornernets() -> None:
    heat = center_heatmap(BOXES, grid=GRID)

    assert [radius_slowly(*(BOXES[b, 2:] * GRID).tolist()) for b in range(4)] == [1, 2, 0, 1]
    for b in range(4):
        assert_close(heat[b], torch.tensor(heatmap_slowly(BOXES[b])), atol=1e-6, rtol=0)


def test_a_centre_beyond_the_last_cell_has_no_peak() -> None:
    heat = center_heatmap(torch.tensor([[0.99, 0.5, 0.5, 0.5]]), grid=GRID)

    assert 0 < heat.max() < 1


def test_only_the_peak_is_to_rise_and_cells_near_it_may() -> None:
    score = torch.full((4,), 0.5, requires_grad=True)

    loss = center_focal_loss(score, torch.tensor([1.0, 0.9, 0.5, 0.0]))
    loss.sum().backward()

    assert_close(loss, 0.25 * math.log(2) * torch.tensor([1.0, 0.1**4, 0.5**4, 1.0]))
    assert score.grad is not None
    assert score.grad[0] < 0 < score.grad[1] < score.grad[2] < score.grad[3]


def test_an_absent_target_teaches_scores_to_fall_and_no_box() -> None:
    maps = random_maps()

    loss, terms = center_loss(
        maps, bbox_cxcywh=BOXES, is_present=torch.zeros(4), weights=LossWeights()
    )
    score, offset, size = torch.autograd.grad(loss, maps)

    assert [terms[name].item() for name in ("giou", "l1", "iou")] == [0, 0, 0]
    assert (score > 0).all()
    assert not offset.any()
    assert not size.any()


def test_a_truth_beyond_the_search_region_counts_as_far_as_it_is_seen() -> None:
    maps = random_maps()
    beyond = torch.tensor([[0.95, 0.5, 0.3, 0.2]]).expand(4, 4)
    cut = torch.tensor([[0.9, 0.5, 0.2, 0.2]]).expand(4, 4)
    weights = LossWeights(score=0.0)

    losses = [
        center_loss(maps, bbox_cxcywh=b, is_present=torch.ones(4), weights=weights)[0]
        for b in (beyond, cut)
    ]

    assert_close(losses[0], losses[1])


def test_cells_whose_boxes_count_are_named_as_known() -> None:
    with pytest.raises(ValueError, match=r"^boxes_at: expected 'winner' or 'heatmap', got 'all'"):
        LossWeights(boxes_at="all")
