"""Exit thresholds for a quantised model: rounding shifts the entropies that they are compared with.

Near a threshold the quantised model's criterion is off by some amount in the middle, and by noise.
The threshold follows the former; a shift that may be noise is none.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgetrack.bundle import Bundle
from edgetrack.parity import ExitAnswers
from edgetrack.runtime.policies import CRITERIA, ExitPolicy

__all__ = ["exit_agreement", "fit_operating_points", "fit_threshold"]

Float64Array = npt.NDArray[np.float64]

_NUM_NEAREST = 24  # crops that say by how much a threshold moves
_MIN_CROPS = 12
_MIN_ERRORS = 2.0  # standard errors that a shift must exceed
# Of a median: of the mean that of normal noise times sqrt(pi / 2), from the median deviation.
_ERROR_OF_MEDIAN = math.sqrt(math.pi / 2) * 1.4826


def fit_threshold(threshold: float, reference: Float64Array, quantized: Float64Array) -> float:
    """Move a threshold so that a quantised exit stops at the crops at which the float exit does.

    Args:
        threshold: Of the float exit; 0 and infinity, which do not look at the crop, stay.
        reference: The float exit's criterion on N crops, ``(N,)``.
        quantized: The quantised exit's on the same.
    """
    is_known = np.isfinite(reference) & np.isfinite(quantized)
    reference, quantized = reference[is_known], quantized[is_known]
    if threshold == 0 or math.isinf(threshold) or len(reference) < _MIN_CROPS:
        return threshold
    nearest = np.argsort(np.abs(reference - threshold), kind="stable")[:_NUM_NEAREST]
    shifts = quantized[nearest] - reference[nearest]
    shift = float(np.median(shifts))
    noise = _ERROR_OF_MEDIAN * float(np.median(np.abs(shifts - shift))) / math.sqrt(len(shifts))
    moved = threshold + shift
    # At 0 it would never stop again, and a noisy tail is no reason for that.
    if abs(shift) <= _MIN_ERRORS * noise or moved <= 0:
        return threshold
    stops = reference < threshold

    def agreement(candidate: float) -> float:
        return float(((quantized < candidate) == stops).mean())

    gain = agreement(moved) - agreement(threshold)
    # Where all or none stop, by how much a shift counts is a guess, and it must help.
    is_between = reference.min() < threshold <= reference.max()
    return moved if gain > 0 or (gain == 0 and is_between) else threshold


def fit_operating_points(
    bundle: Bundle, reference: ExitAnswers, quantized: ExitAnswers
) -> dict[str, tuple[float, ...]]:
    """Thresholds of all operating points of a bundle for its quantised engines.

    Args:
        bundle: Whose operating points.
        reference: What the float engines said.
        quantized: What the quantised ones said on the same crops.
    """
    exact, rounded = (_criterion(bundle, answers) for answers in (reference, quantized))
    return {
        name: tuple(
            fit_threshold(threshold, exact[:, k], rounded[:, k])
            for k, threshold in enumerate(thresholds)
        )
        for name, thresholds in bundle.operating_points.items()
    }


def exit_agreement(
    bundle: Bundle,
    reference: ExitAnswers,
    quantized: ExitAnswers,
    points: Mapping[str, tuple[float, ...]] | None = None,
) -> dict[str, float]:
    """Share of the crops that take the same exit, by operating point.

    Args:
        bundle: Whose operating points.
        reference: What the float engines said; they exit by the bundle's thresholds.
        quantized: What the quantised ones said on the same crops.
        points: Their thresholds; ``None`` fits them to one half of the crops and counts on the
            other, both ways round, so that it holds for crops that were not fitted to.
    """
    if points is not None:
        same = _same_exits(bundle, reference, quantized, points)
        return {name: float(is_same.mean()) for name, is_same in same.items()}
    half = len(reference.score) // 2
    sides = [slice(None, half), slice(half, None)]
    counted: dict[str, list[npt.NDArray[np.bool_]]] = {name: [] for name in bundle.operating_points}
    for fitted_to, counted_on in (sides, sides[::-1]):
        fitted = fit_operating_points(bundle, reference.on(fitted_to), quantized.on(fitted_to))
        same = _same_exits(bundle, reference.on(counted_on), quantized.on(counted_on), fitted)
        for name, is_same in same.items():
            counted[name].append(is_same)
    return {name: float(np.concatenate(parts).mean()) for name, parts in counted.items()}


def _same_exits(
    bundle: Bundle,
    reference: ExitAnswers,
    quantized: ExitAnswers,
    points: Mapping[str, tuple[float, ...]],
) -> dict[str, npt.NDArray[np.bool_]]:
    same = {}
    for name, thresholds in bundle.operating_points.items():
        wanted = reference.exits_taken(ExitPolicy(thresholds, bundle.criterion))
        taken = quantized.exits_taken(ExitPolicy(points[name], bundle.criterion))
        same[name] = np.asarray(wanted == taken)
    return same


def _criterion(bundle: Bundle, answers: ExitAnswers) -> Float64Array:
    weight, score_weight = CRITERIA[bundle.criterion]
    return weight * answers.uncertainty + score_weight * (1 - answers.score)
