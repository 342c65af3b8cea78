"""The field's metrics of single-object tracking, fractions in [0, 1].

Conventions, pinned by tests:

- ``success_auc`` (OTB): the share of frames whose overlap is strictly above each of 21
  thresholds 0, 0.05 … 1, averaged. So a perfect tracker has 20 / 21.
- ``precision_20px`` (OTB): the share of frames whose centre is at most 20 pixels off.
- ``norm_precision`` (TrackingNet, LaSOT): the centre error in x and y is divided by the truth's
  width and height; the share of frames at most at each of 51 thresholds 0, 0.01 … 0.5, averaged.
  Some toolkits print the share at 0.2 instead.
- ``ao``, ``sr_50``, ``sr_75`` (GOT-10k): mean overlap; share of frames strictly above 0.5, 0.75.

A box that holds a NaN counts as missed. Which frames are scored at all is the protocol's part.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetrack.boxes import iou_xywh

__all__ = [
    "Metrics",
    "bootstrap_interval",
    "mean_metrics",
    "roc_auc",
    "score_boxes",
    "spearman_rho",
]

Float64Array = npt.NDArray[np.float64]

SUCCESS_THRESHOLDS = np.linspace(0, 1, 21)
NORM_PRECISION_THRESHOLDS = np.linspace(0, 0.5, 51)
PRECISION_PX = 20


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics over the scored frames of one sequence, or their mean over sequences.

    Attributes:
        success_auc: Area under the success curve.
        precision_20px: Share of centres at most 20 pixels off.
        norm_precision: Area under the size-normalised precision curve up to 0.5.
        ao: Average overlap.
        sr_50: Share of overlaps above 0.5.
        sr_75: Share of overlaps above 0.75.
    """

    success_auc: float
    precision_20px: float
    norm_precision: float
    ao: float
    sr_50: float
    sr_75: float


def score_boxes(boxes_xywh: npt.NDArray[np.floating], truth_xywh: Float64Array) -> Metrics:
    """Score boxes ``(T, 4)`` against the truth ``(T, 4)``, frame by frame; pixels.

    Raises:
        ValueError: The shapes differ, there is no frame, or the truth has a NaN.
    """
    boxes = np.asarray(boxes_xywh, np.float64)
    if boxes.shape != truth_xywh.shape or boxes.shape[1:] != (4,) or len(boxes) == 0:
        raise ValueError(
            f"score_boxes: expected two arrays of one shape (T, 4) with T of at least 1, got "
            f"{boxes.shape} and {truth_xywh.shape}"
        )
    if np.isnan(truth_xywh).any():
        raise ValueError("score_boxes: expected truth in each row, got NaN; leave those frames out")
    # Comparisons with NaN are false, so a missed frame fails at every threshold.
    overlaps = iou_xywh(boxes, truth_xywh)
    centres, truth_centres = (b[:, :2] + b[:, 2:] / 2 for b in (boxes, truth_xywh))
    errors = centres - truth_centres
    errors_px = np.hypot(*errors.T)
    errors_of_size = np.hypot(*(errors / truth_xywh[:, 2:]).T)
    return Metrics(
        success_auc=float((overlaps[:, None] > SUCCESS_THRESHOLDS).mean()),
        precision_20px=float((errors_px <= PRECISION_PX).mean()),
        norm_precision=float((errors_of_size[:, None] <= NORM_PRECISION_THRESHOLDS).mean()),
        ao=float(np.nan_to_num(overlaps).mean()),
        sr_50=float((overlaps > 0.5).mean()),
        sr_75=float((overlaps > 0.75).mean()),
    )


def mean_metrics(metrics: Sequence[Metrics]) -> Metrics:
    """The mean over sequences: each counts the same, however long it is."""
    rows = [dataclasses.astuple(m) for m in metrics]
    names = [f.name for f in dataclasses.fields(Metrics)]
    return Metrics(**dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True)))


def spearman_rho(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Spearman's rank correlation of two samples ``(N,)``; ties share their mean rank.

    Pairs with a NaN are left out. NaN where fewer than two pairs remain, or a sample is constant.
    """
    pairs = np.stack([np.asarray(a, np.float64), np.asarray(b, np.float64)])
    ranks = np.stack([_ranks(row) for row in pairs[:, ~np.isnan(pairs).any(0)]])
    ranks -= ranks.mean(1, keepdims=True) if ranks.size else 0
    spread = math.sqrt(float((ranks**2).sum(1).prod()))
    return float(ranks.prod(0).sum() / spread) if spread > 0 else math.nan


def _ranks(values: Float64Array) -> Float64Array:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[group], np.float64)


def roc_auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """How well a number tells two kinds of frames apart: area under the ROC curve.

    Args:
        positive: The number on frames where it should be high.
        negative: The number on the others.

    Returns:
        The chance that a positive exceeds a negative, ties counted half; NaN if one is empty.
    """
    if not len(positive) or not len(negative):
        return math.nan
    ordered = np.sort(np.asarray(negative, np.float64))
    values = np.asarray(positive, np.float64)
    below = np.searchsorted(ordered, values, side="left")
    equal = np.searchsorted(ordered, values, side="right") - below
    return float((below + equal / 2).mean() / len(ordered))


def bootstrap_interval(
    differences: npt.ArrayLike, *, seed: int, num_resamples: int = 10_000
) -> tuple[float, float]:
    """The 95 % interval of a mean, by drawing the sample again with replacement (percentiles).

    Args:
        differences: ``(N,)``, such as of one metric of two trackers, one per sequence.
        seed: Of the drawing.
        num_resamples: How often the sample is drawn.

    Returns:
        Its lower and its upper end.

    Raises:
        ValueError: There is no difference, or one is not finite.
    """
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(
            f"bootstrap_interval: expected at least one finite number (N,), got {values}"
        )
    drawn = np.random.default_rng(seed).integers(len(values), size=(num_resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)
