import math

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgetrack.evaluate.metrics import (
    Metrics,
    bootstrap_interval,
    mean_metrics,
    roc_auc,
    score_boxes,
    spearman_rho,
)

METRICS = ("success_auc", "precision_20px", "norm_precision", "ao", "sr_50", "sr_75")


def random_pair(seed: int, *, num_frames: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.concatenate(
        [rng.uniform(0, 200, (num_frames, 2)), rng.uniform(8, 90, (num_frames, 2))], 1
    )
    return truth + rng.normal(0, rng.uniform(1, 15), truth.shape) * [1, 1, 0.3, 0.3], truth


def score_slowly(boxes: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Slow twin: one frame and one threshold at a time."""
    overlaps, errors, normalised = [], [], []
    for (x, y, w, h), (tx, ty, tw, th) in zip(boxes.tolist(), truth.tolist(), strict=True):
        shared_w = max(min(x + w, tx + tw) - max(x, tx), 0)
        shared_h = max(min(y + h, ty + th) - max(y, ty), 0)
        shared = shared_w * shared_h
        overlaps.append(shared / (w * h + tw * th - shared))
        dx, dy = (x + w / 2) - (tx + tw / 2), (y + h / 2) - (ty + th / 2)
        errors.append(math.hypot(dx, dy))
        normalised.append(math.hypot(dx / tw, dy / th))
    count = len(overlaps)
    success = [sum(o > k / 20 for o in overlaps) / count for k in range(21)]
    precision = [sum(e <= k / 100 for e in normalised) / count for k in range(51)]
    return {
        "success_auc": sum(success) / 21,
        "precision_20px": sum(e <= 20 for e in errors) / count,
        "norm_precision": sum(precision) / 51,
        "ao": sum(overlaps) / count,
        "sr_50": sum(o > 0.5 for o in overlaps) / count,
        "sr_75": sum(o > 0.75 for o in overlaps) / count,
    }


@pytest.mark.parametrize("seed", range(10))
def test_metrics_equal_the_slow_ones(seed: int) -> None:
    boxes, truth = random_pair(seed)

    metrics = score_boxes(boxes, truth)

    expected = score_slowly(boxes, truth)
    assert_allclose(
        [getattr(metrics, m) for m in METRICS], [expected[m] for m in METRICS], rtol=1e-12
    )


def test_a_perfect_tracker_has_20_of_21_success_and_all_of_the_rest() -> None:
    _, truth = random_pair(0, num_frames=5000)

    metrics = score_boxes(truth, truth)

    assert metrics.success_auc == 20 / 21
    assert metrics.ao == pytest.approx(1, rel=1e-12)
    assert [getattr(metrics, m) for m in METRICS if m not in ("success_auc", "ao")] == [1.0] * 4


def test_a_tracker_that_is_far_off_has_nothing() -> None:
    _, truth = random_pair(0)

    metrics = score_boxes(np.add(truth, [1000, 0, 0, 0]), truth)

    assert [getattr(metrics, m) for m in METRICS] == [0.0] * 6


def test_half_an_overlap_is_not_above_one_half() -> None:
    metrics = score_boxes(np.array([[0.0, 0, 10, 5]]), np.array([[0.0, 0, 10, 10]]))

    assert metrics.ao == 0.5
    assert metrics.sr_50 == 0.0
    assert metrics.success_auc == 10 / 21


def test_twenty_pixels_off_is_precise_and_a_bit_more_is_not() -> None:
    truth = np.array([[0.0, 0, 100, 100]])

    assert score_boxes(np.add(truth, [12, 16, 0, 0]), truth).precision_20px == 1.0
    assert score_boxes(np.add(truth, [12, 16.01, 0, 0]), truth).precision_20px == 0.0


def test_normalised_precision_divides_by_the_truth_s_width_and_height() -> None:
    truth = np.array([[0.0, 0, 100, 20]])

    wide, high = (
        score_boxes(np.add(truth, shift), truth) for shift in ([25, 0, 0, 0], [0, 5, 0, 0])
    )

    assert wide.norm_precision == high.norm_precision == 26 / 51


def test_a_box_with_nan_counts_as_missed() -> None:
    _, truth = random_pair(0, num_frames=4)
    boxes = truth.copy()
    boxes[[1, 2], [0, 3]] = np.nan

    metrics = score_boxes(boxes, truth)

    assert metrics.success_auc == pytest.approx(10 / 21)
    assert [metrics.precision_20px, metrics.sr_50, metrics.sr_75] == [0.5] * 3
    assert metrics.ao == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("boxes", "truth", "message"),
    [
        (np.ones((3, 4)), np.ones((2, 4)), r"got \(3, 4\) and \(2, 4\)"),
        (np.ones((0, 4)), np.ones((0, 4)), "T of at least 1"),
        (np.ones((3, 5)), np.ones((3, 5)), r"one shape \(T, 4\)"),
        (np.ones((1, 4)), np.full((1, 4), np.nan), "truth in each row, got NaN"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    boxes: np.ndarray, truth: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score_boxes(boxes, truth)


def test_the_mean_counts_each_sequence_once() -> None:
    low, high = (Metrics(**dict.fromkeys(METRICS, v)) for v in (0.25, 0.75))

    assert mean_metrics([low, high, high, high]) == Metrics(**dict.fromkeys(METRICS, 0.625))


def spearman_slowly(a: np.ndarray, b: np.ndarray) -> float:
    """Slow twin: ranks by counting, correlation by NumPy."""

    def ranks(values: np.ndarray) -> list[float]:
        return [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_levels", [3, 20, 10_000])
def test_spearman_equals_the_slow_one(seed: int, num_levels: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, num_levels, 50)
    b = a * rng.uniform(-1, 1) + rng.integers(0, num_levels, 50)

    assert_allclose(spearman_rho(a, b), spearman_slowly(a, b), rtol=1e-12)


def test_spearman_by_hand() -> None:
    assert spearman_rho([1, 2, 3, 4], [10, 100, 1000, 10_000]) == pytest.approx(1)
    assert spearman_rho([1, 2, 3, 4], [0, -1, -2, -9]) == pytest.approx(-1)
    assert spearman_rho([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)


def test_spearman_leaves_out_pairs_with_nan() -> None:
    assert spearman_rho([1, np.nan, 2, 3], [1, 9, 3, np.nan]) == pytest.approx(1)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1], [1]), ([1, 2, 3], [5, 5, 5])])
def test_spearman_is_nan_where_nothing_can_be_said(a: list[float], b: list[float]) -> None:
    assert math.isnan(spearman_rho(a, b))


def test_roc_auc_counts_pairs_and_half_of_ties() -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 8, 40) / 8, rng.integers(0, 6, 30) / 8

    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]

    assert roc_auc(positive.tolist(), negative.tolist()) == pytest.approx(np.mean(pairs))
    assert roc_auc([1.0, 2.0], [0.0]) == 1
    assert math.isnan(roc_auc([], [0.5]))


def test_the_bootstrap_interval_of_many_numbers_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(0.3, 2.0, 400)

    interval = bootstrap_interval(values, seed=1)

    half = 1.96 * values.std() / math.sqrt(len(values))
    assert_allclose(interval, [values.mean() - half, values.mean() + half], atol=0.05 * half)


def test_the_bootstrap_interval_depends_on_its_seed_alone() -> None:
    values = [0.1, -0.2, 0.05, 0.3]

    first, again, other = (bootstrap_interval(values, seed=s, num_resamples=50) for s in (3, 3, 4))

    assert first == again != other


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [[1.0]]])
def test_the_bootstrap_interval_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"bootstrap_interval: expected .* finite"):
        bootstrap_interval(values, seed=0)
