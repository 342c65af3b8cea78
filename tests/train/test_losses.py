import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from tolerances import FROM_TWIN
from torch import Tensor
from torch.testing import assert_close

from edgetrack.train.losses import (
    LossWeights,
    cell_targets,
    distillation_loss,
    distribution_focal_loss,
    giou,
    quality_focal_loss,
    tracking_loss,
)

GRID, NUM_BINS, BIN_SIZE = 5, 7, 1 / 6
WEIGHTS = LossWeights(score=1.1, giou=2.2, l1=5.5, dfl=0.3, distil_edges=0.7, distil_score=1.3)
BOXES = torch.tensor(
    [
        [0.50, 0.50, 0.42, 0.35],
        [0.12, 0.81, 0.50, 0.33],
        [0.93, 0.05, 0.30, 0.40],
        [0.47, 0.52, 0.04, 0.05],
    ]
)
IS_PRESENT = torch.tensor([1.0, 1.0, 0.0, 1.0])

Maps = tuple[Tensor, Tensor]


def random_maps(seed: int = 0) -> Maps:
    generator = torch.Generator().manual_seed(seed)
    cls_logits = torch.randn(4, GRID**2, generator=generator)
    edge_logits = 2 * torch.randn(4, GRID**2, 4, NUM_BINS, generator=generator)
    return cls_logits.requires_grad_(), edge_logits.requires_grad_()


def task_loss(maps: Maps, rows: slice = slice(None), weights: LossWeights = WEIGHTS) -> Tensor:
    loss, _ = tracking_loss(
        maps[0][rows],
        maps[1][rows],
        bbox_cxcywh=BOXES[rows],
        is_present=IS_PRESENT[rows],
        bin_size=BIN_SIZE,
        weights=weights,
    )
    return loss


def distil(
    maps: Maps, teacher: Maps, rows: slice = slice(None), weights: LossWeights = WEIGHTS
) -> Tensor:
    return distillation_loss(
        maps[0][rows],
        maps[1][rows],
        teacher_cls_logits=teacher[0][rows].detach(),
        teacher_edge_logits=teacher[1][rows].detach(),
        bbox_cxcywh=BOXES[rows],
        is_present=IS_PRESENT[rows],
        weights=weights,
    )


def giou_slowly(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of two boxes, after the paper's algorithm 1."""
    width = torch.clamp(torch.min(a[2], b[2]) - torch.max(a[0], b[0]), min=0)
    height = torch.clamp(torch.min(a[3], b[3]) - torch.max(a[1], b[1]), min=0)
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    hull = (torch.max(a[2], b[2]) - torch.min(a[0], b[0])) * (
        torch.max(a[3], b[3]) - torch.min(a[1], b[1])
    )
    iou = intersection / union
    return iou, iou - (hull - union) / hull


def bce_slowly(logit: Tensor, target: Tensor) -> Tensor:
    prob = torch.sigmoid(logit)
    return -(target * torch.log(prob) + (1 - target) * torch.log(1 - prob))


def dfl_slowly(logits: Tensor, distance: float) -> Tensor:
    """``-((i + 1 - y) log S_i + (y - i) log S_{i+1})``, after the paper's equation 6."""
    distance = min(max(distance, 0.0), NUM_BINS - 1.01)
    below = int(distance)
    probs = torch.softmax(logits, 0)
    return -(
        (below + 1 - distance) * torch.log(probs[below])
        + (distance - below) * torch.log(probs[below + 1])
    )


def cells_slowly(bbox: Tensor) -> tuple[list[tuple[float, float]], list[bool], list[float]]:
    """Centres of the cells, whether they lie in the box, how central they are."""
    cx, cy, w, h = bbox.tolist()
    centres = [((i % GRID + 0.5) / GRID, (i // GRID + 0.5) / GRID) for i in range(GRID**2)]
    distances = [math.dist((x, y), (cx, cy)) for x, y in centres]
    nearest = distances.index(min(distances))
    inside, central = [], []
    for i, (x, y) in enumerate(centres):
        inside.append(i == nearest or (abs(x - cx) < w / 2 and abs(y - cy) < h / 2))
        spread_x, spread_y = 0.22 * w + 0.5 / GRID, 0.22 * h + 0.5 / GRID
        bell = math.exp(-0.5 * (((x - cx) / spread_x) ** 2 + ((y - cy) / spread_y) ** 2))
        central.append(1.0 if i == nearest else bell)
    return centres, inside, central


def shares_slowly(bbox: Tensor) -> list[float]:
    _, inside, central = cells_slowly(bbox)
    raw = [(c + 0.05) if i else 0.0 for i, c in zip(inside, central, strict=True)]
    return [r / sum(raw) for r in raw]


def task_loss_slowly(maps: Maps) -> Tensor:
    """Twin of ``tracking_loss``: sample by sample, cell by cell, edge by edge."""
    cls_logits, edge_logits = maps
    samples = []
    for b in range(4):
        cx, cy, w, h = BOXES[b]
        truth = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        centres, inside, central = cells_slowly(BOXES[b])
        shares = shares_slowly(BOXES[b])
        score = box = torch.zeros(())
        for i, (x, y) in enumerate(centres):
            bins = torch.arange(NUM_BINS)
            left, top, right, bottom = (
                (torch.softmax(edge_logits[b, i, e], 0) * bins).sum() * BIN_SIZE for e in range(4)
            )
            predicted = torch.stack([x - left, y - top, x + right, y + bottom])
            iou, generalised = giou_slowly(predicted, truth)
            is_taught = inside[i] and IS_PRESENT[b] == 1
            quality = central[i] * (0.4 + 0.6 * iou.detach()) if is_taught else torch.zeros(())
            focus = (torch.sigmoid(cls_logits[b, i]) - quality) ** 2
            score = score + focus * bce_slowly(cls_logits[b, i], quality)
            if is_taught:
                distances = (x - truth[0], y - truth[1], truth[2] - x, truth[3] - y)
                dfl = sum(
                    dfl_slowly(edge_logits[b, i, e], float(d) / BIN_SIZE)
                    for e, d in enumerate(distances)
                )
                l1 = (predicted - truth).abs().sum() / 4
                box = box + shares[i] * (
                    WEIGHTS.giou * (1 - generalised) + WEIGHTS.l1 * l1 + WEIGHTS.dfl * dfl / 4
                )
        samples.append(WEIGHTS.score * score * 64 / GRID**2 + box)
    return torch.stack(samples).mean()


def distil_slowly(maps: Maps, teacher: Maps, temperature: float) -> Tensor:
    """Twin of ``distillation_loss``."""
    samples = []
    for b in range(4):
        edges = score = torch.zeros(())
        for i, share in enumerate(shares_slowly(BOXES[b])):
            for e in range(4):
                p = torch.softmax(teacher[1][b, i, e].detach() / temperature, 0)
                q = torch.softmax(maps[1][b, i, e] / temperature, 0)
                divergence = (p * torch.log(p / q)).sum() * temperature**2
                edges = edges + IS_PRESENT[b] * share * divergence / 4
            target = torch.sigmoid(teacher[0][b, i].detach())
            score = score + bce_slowly(maps[0][b, i], target)
        samples.append(WEIGHTS.distil_edges * edges + WEIGHTS.distil_score * score * 64 / GRID**2)
    return torch.stack(samples).mean()


def assert_equal_with_gradients(
    fast: Callable[[Maps], Tensor], slow: Callable[[Maps], Tensor]
) -> None:
    maps, twins = random_maps(), random_maps()

    value, expected = fast(maps), slow(twins)
    gradients = torch.autograd.grad(value, maps)
    expected_gradients = torch.autograd.grad(expected, twins)

    assert_close(value, expected, atol=FROM_TWIN["float32"], rtol=1e-5)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, other, atol=FROM_TWIN["float32"], rtol=1e-4)


def test_the_task_loss_equals_the_slow_twin_gradients_included() -> None:
    assert_equal_with_gradients(task_loss, task_loss_slowly)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_equals_the_slow_twin_gradients_included(temperature: float) -> None:
    weights = dataclasses.replace(WEIGHTS, temperature=temperature)
    teacher = random_maps(seed=1)

    assert_equal_with_gradients(
        lambda maps: distil(maps, teacher, weights=weights),
        lambda maps: distil_slowly(maps, teacher, temperature),
    )


@pytest.mark.parametrize("loss", [task_loss, lambda m, r: distil(m, random_maps(1), r)])
def test_the_loss_of_a_batch_is_the_mean_of_its_halves(
    loss: Callable[[Maps, slice], Tensor],
) -> None:
    maps = random_maps()

    whole = loss(maps, slice(0, 4))
    halves = [loss(maps, rows) for rows in (slice(0, 2), slice(2, 4))]  # one has an absent target

    assert_close(whole, sum(halves, torch.zeros(())) / 2)


@pytest.mark.parametrize(
    ("a", "b", "iou", "generalised"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0, 1.0),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7, 1 / 7 - 2 / 9),
        ((0, 0, 1, 1), (3, 0, 4, 1), 0.0, -0.5),
        ((0, 0, 4, 4), (1, 1, 2, 2), 1 / 16, 1 / 16),
    ],
    ids=["equal", "across", "apart", "nested"],
)
def test_giou_in_closed_form(
    a: tuple[float, ...], b: tuple[float, ...], iou: float, generalised: float
) -> None:
    got = giou(torch.tensor(a).float(), torch.tensor(b).float())

    assert [v.item() for v in got] == pytest.approx([iou, generalised], abs=1e-6)


def test_giou_equals_the_slow_twin_with_gradients() -> None:
    corners = torch.rand(20, 2, 2, generator=torch.Generator().manual_seed(0))
    sizes = 0.1 + torch.rand(20, 2, 2, generator=torch.Generator().manual_seed(1))
    boxes = torch.cat([corners, corners + sizes], -1)
    fast, slow = boxes.clone().requires_grad_(), boxes.clone().requires_grad_()

    values = torch.stack(giou(fast[:, 0], fast[:, 1]))
    expected = torch.stack([torch.stack(giou_slowly(a, b)) for a, b in slow], 1)
    values.sum().backward()
    expected.sum().backward()

    assert_close(values, expected, atol=FROM_TWIN["float32"], rtol=0)
    assert_close(fast.grad, slow.grad, atol=1e-4, rtol=0)


def test_a_score_equal_to_its_quality_costs_nothing_and_pulls_nowhere() -> None:
    logits = torch.tensor([-1.5, 0.0, 2.0], requires_grad=True)

    loss = quality_focal_loss(logits, logits.detach().sigmoid())
    loss.sum().backward()

    assert_close(loss, torch.zeros(3))
    assert_close(logits.grad, torch.zeros(3))


def test_quality_focal_loss_in_closed_form() -> None:
    loss = quality_focal_loss(torch.tensor([0.0]), torch.tensor([1.0]))

    assert_close(loss, torch.tensor([0.25 * math.log(2)]))


@pytest.mark.parametrize("distance", [0.0, 0.3, 2.0, 4.75, 5.9])
def test_dfl_is_least_at_the_two_bins_around_a_distance(distance: float) -> None:
    below = int(distance)
    share = distance - below
    logits = torch.full((NUM_BINS,), -1000.0)
    logits[below : below + 2] = torch.tensor([1 - share, share]).clamp(min=1e-30).log()
    logits.requires_grad_()

    loss = distribution_focal_loss(logits, torch.tensor(distance))
    loss.backward()

    entropy = -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)
    assert loss.item() == pytest.approx(entropy, abs=1e-5)
    assert_close(logits.grad, torch.zeros(NUM_BINS), atol=1e-6, rtol=0)


@pytest.mark.parametrize("distance", [-3.0, 6.0, 50.0])
def test_a_distance_beyond_the_bins_counts_as_the_first_or_last(distance: float) -> None:
    logits = torch.arange(NUM_BINS).float()
    clamped = min(max(distance, 0.0), NUM_BINS - 1.01)

    loss = distribution_focal_loss(logits, torch.tensor(distance))

    assert_close(loss, distribution_focal_loss(logits, torch.tensor(clamped)))


def test_the_cells_of_a_box_equal_the_slow_twin() -> None:
    centres, inside, central = cell_targets(BOXES, grid=GRID)

    for b in range(4):
        expected_centres, expected_inside, expected_central = cells_slowly(BOXES[b])
        assert_close(centres, torch.tensor(expected_centres))
        assert inside[b].tolist() == expected_inside
        assert_close(central[b], torch.tensor(expected_central), atol=1e-5, rtol=0)


def test_a_box_smaller_than_a_cell_still_has_one() -> None:
    _, inside, central = cell_targets(torch.tensor([[0.31, 0.52, 0.001, 0.001]]), grid=GRID)

    assert inside.sum() == 1
    assert central[inside].item() == 1.0


def test_an_absent_target_teaches_scores_to_fall_and_no_edge() -> None:
    cls_logits, edge_logits = random_maps()

    loss, terms = tracking_loss(
        cls_logits,
        edge_logits,
        bbox_cxcywh=BOXES,
        is_present=torch.zeros(4),
        bin_size=BIN_SIZE,
        weights=WEIGHTS,
    )
    loss.backward()

    assert [terms[name].item() for name in ("giou", "l1", "dfl", "iou")] == [0, 0, 0, 0]
    assert edge_logits.grad is not None
    assert not edge_logits.grad.any()
    assert cls_logits.grad is not None
    assert (cls_logits.grad > 0).all()


def test_terms_are_logged_without_their_weights_or_a_graph() -> None:
    maps = random_maps()

    loss, terms = tracking_loss(
        *maps, bbox_cxcywh=BOXES, is_present=IS_PRESENT, bin_size=BIN_SIZE, weights=WEIGHTS
    )

    names = ("score", "giou", "l1", "dfl")
    assert_close(loss, torch.stack([getattr(WEIGHTS, n) * terms[n] for n in names]).sum())
    assert terms.keys() == {*names, "iou"}
    assert not any(value.requires_grad for value in terms.values())


def test_a_student_equal_to_its_teacher_has_no_edge_to_learn() -> None:
    maps = random_maps()
    weights = dataclasses.replace(WEIGHTS, distil_score=0.0)

    loss = distil(maps, maps, weights=weights)
    (gradient,) = torch.autograd.grad(loss, maps[1])

    assert_close(loss, torch.zeros(()))
    assert_close(gradient, torch.zeros_like(gradient), atol=1e-7, rtol=0)


def test_a_student_equal_to_its_teacher_has_no_score_to_learn() -> None:
    maps = random_maps()

    (gradient,) = torch.autograd.grad(distil(maps, maps), maps[0])

    assert_close(gradient, torch.zeros_like(gradient), atol=1e-7, rtol=0)


def test_losses_are_computed_in_float32_under_autocast() -> None:
    cls_logits, edge_logits = random_maps()

    halves = (cls_logits.bfloat16(), edge_logits.bfloat16())

    for loss in (task_loss, lambda maps: distil(maps, halves)):
        assert torch.equal(loss(halves), loss((halves[0].float(), halves[1].float())))
