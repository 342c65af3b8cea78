import math

import pytest
import torch
from tolerances import FROM_TWIN
from torch.testing import assert_close

from edgetrack.train.coordinate_losses import (
    coordinate_cross_entropy,
    depth_divergence,
    siou_loss,
)

Box = list[float]


def slow_siou(predicted: Box, true: Box, *, theta: int = 4) -> float:
    """The formulas of the paper (arXiv 2205.12740), equations 1 to 17, one by one."""
    (px1, py1, px2, py2), (tx1, ty1, tx2, ty2) = predicted, true
    pw, ph, tw, th = px2 - px1, py2 - py1, tx2 - tx1, ty2 - ty1
    overlap_w = max(0.0, min(px2, tx2) - max(px1, tx1))
    overlap_h = max(0.0, min(py2, ty2) - max(py1, ty1))
    intersection = overlap_w * overlap_h
    iou = intersection / (pw * ph + tw * th - intersection)

    pcx, pcy, tcx, tcy = (px1 + px2) / 2, (py1 + py2) / 2, (tx1 + tx2) / 2, (ty1 + ty2) / 2
    sigma = math.hypot(tcx - pcx, tcy - pcy)
    c_h = max(tcy, pcy) - min(tcy, pcy)
    angle_cost = 1 - 2 * math.sin(math.asin(c_h / sigma) - math.pi / 4) ** 2 if sigma else 0.0

    hull_w, hull_h = max(px2, tx2) - min(px1, tx1), max(py2, ty2) - min(py1, ty1)
    gamma = 2 - angle_cost
    rho_x, rho_y = ((tcx - pcx) / hull_w) ** 2, ((tcy - pcy) / hull_h) ** 2
    distance_cost = (1 - math.exp(-gamma * rho_x)) + (1 - math.exp(-gamma * rho_y))

    omega_w, omega_h = abs(pw - tw) / max(pw, tw), abs(ph - th) / max(ph, th)
    shape_cost = (1 - math.exp(-omega_w)) ** theta + (1 - math.exp(-omega_h)) ** theta
    return 1 - iou + (distance_cost + shape_cost) / 2


@pytest.mark.parametrize(
    ("predicted", "true"),
    [
        ([0.1, 0.2, 0.5, 0.6], [0.2, 0.1, 0.7, 0.5]),
        ([0.1, 0.2, 0.5, 0.6], [0.1, 0.2, 0.5, 0.6]),
        ([0.1, 0.1, 0.2, 0.2], [0.7, 0.6, 0.9, 0.9]),
        ([0.2, 0.2, 0.8, 0.8], [0.4, 0.4, 0.6, 0.6]),
        ([0.2, 0.2, 0.4, 0.4], [0.5, 0.2, 0.7, 0.4]),
        ([0.2, 0.2, 0.4, 0.4], [0.2, 0.6, 0.4, 0.9]),
        ([-0.3, -0.4, 1.4, 1.2], [0.45, 0.5, 0.55, 0.52]),
    ],
)
def test_siou_equals_the_papers_formulas(predicted: Box, true: Box) -> None:
    loss, _ = siou_loss(torch.tensor(predicted).double(), torch.tensor(true).double())

    assert float(loss) == pytest.approx(slow_siou(predicted, true), abs=FROM_TWIN["float32"])


def test_the_iou_beside_the_loss_is_the_boxes() -> None:
    _, iou = siou_loss(torch.tensor([0.0, 0.0, 0.4, 0.2]), torch.tensor([0.2, 0.0, 0.6, 0.2]))

    assert_close(iou, torch.tensor(1 / 3), atol=FROM_TWIN["float32"], rtol=0)


@pytest.mark.parametrize(
    "predicted",
    [[0.5, 0.5, 0.5, 0.5], [0.7, 0.7, 0.2, 0.2], [0.3, 0.3, 0.6, 0.6], [0.3, 0.2, 0.6, 0.5]],
)
def test_siou_and_its_gradient_are_finite_for_any_box(predicted: Box) -> None:
    """Empty, swapped, equal, and straight above: where a square root or arcsin would break."""
    box = torch.tensor(predicted, requires_grad=True)

    loss, _ = siou_loss(box, torch.tensor([0.3, 0.3, 0.6, 0.6]))
    torch.autograd.backward(loss)

    assert loss.isfinite()
    assert box.grad is not None
    assert box.grad.isfinite().all()


def test_a_better_box_has_a_smaller_siou_loss() -> None:
    true = torch.tensor([0.4, 0.4, 0.6, 0.7])
    shifts = torch.tensor([0.0, 0.02, 0.1, 0.3, 0.8])

    losses, _ = siou_loss(true + shifts[:, None], true.expand(5, 4))

    assert (losses.diff() > 0).all()
    assert_close(losses[0], torch.tensor(0.0), atol=1e-4, rtol=0)


def test_cross_entropy_equals_a_slow_twin() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 25) * 3
    corners = torch.rand(3, 4) * 1.6 - 0.3

    loss = coordinate_cross_entropy(logits, corners, num_bins=20)

    for row in range(3):
        terms = []
        for token in range(4):
            word = int((float(corners[row, token]) + 0.5) * (20 / 2 - 1))
            weights = [math.exp(v) for v in logits[row, token].tolist()]
            terms.append(-math.log(weights[word] / sum(weights)))
        assert_close(loss[row], torch.tensor(sum(terms) / 4), atol=FROM_TWIN["float32"], rtol=0)


def test_depths_diverge_as_a_slow_twin_says() -> None:
    torch.manual_seed(0)
    shallow, deep = torch.randn(2, 4, 25), torch.randn(2, 4, 25)

    divergence = depth_divergence(shallow, deep, num_bins=20)

    for row in range(2):
        total = 0.0
        for token in range(4):
            p = deep[row, token, :20].double().softmax(0).tolist()
            q = shallow[row, token, :20].double().softmax(0).tolist()
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert_close(divergence[row], torch.tensor(total), atol=FROM_TWIN["float32"], rtol=0)


def test_the_deeper_depth_is_the_teacher() -> None:
    shallow = torch.randn(2, 4, 25, requires_grad=True)
    deep = torch.randn(2, 4, 25, requires_grad=True)

    torch.autograd.backward(depth_divergence(shallow, deep, num_bins=20).sum())

    assert deep.grad is None
    assert shallow.grad is not None
    assert not shallow.grad[..., 20:].any()
