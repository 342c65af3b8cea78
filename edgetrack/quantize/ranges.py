"""Choose the range of a tensor from a histogram of its magnitudes.

Four ways to trade what is clipped against how fine the steps are: ``max`` clips nothing;
``percentile`` clips a share of the values; ``entropy`` loses the least information between the
histogram and its 128 levels (Migacz, "8-bit inference with TensorRT", GTC 2017); ``mse`` makes the
mean squared error of rounding and clipping least.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["METHODS", "NUM_BINS", "MagnitudeHistogram", "choose_range"]

METHODS = ("max", "percentile", "entropy", "mse")
NUM_BINS = 2048
_NUM_LEVELS = 128
_STRIDE = 8  # bins between two candidates of the searches

Float64Array = npt.NDArray[np.float64]


class MagnitudeHistogram:
    """Counts of the magnitudes of one tensor, in bins from 0 to its largest.

    Adding the same values in another order, or in other pieces, gives the same counts.

    Args:
        amax: The largest magnitude, known beforehand; what is larger counts in the last bin.

    Attributes:
        amax: As given.
        counts: int64 ``(NUM_BINS,)``.
    """

    def __init__(self, amax: float) -> None:
        self.amax = amax
        self.counts = np.zeros(NUM_BINS, np.int64)
        self._bins_per_unit = np.float32(NUM_BINS / amax) if amax > 0 else np.float32(0)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count the magnitudes of an array of any shape."""
        bins = (np.abs(values) * self._bins_per_unit).astype(np.int32).ravel()
        np.minimum(bins, NUM_BINS - 1, out=bins)
        self.counts += np.bincount(bins, minlength=NUM_BINS)


def choose_range(histogram: MagnitudeHistogram, method: str, *, percentile: float = 99.99) -> float:
    """The largest magnitude that INT8 shall represent.

    Args:
        histogram: Of the tensor.
        method: One of ``METHODS``.
        percentile: Share of the values that ``percentile`` does not clip, in percent.

    Returns:
        A magnitude in (0, ``histogram.amax``]; 0 if all values are 0.

    Raises:
        ValueError: The method is unknown, or the percentile not in (0, 100].
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile: expected a number in (0, 100], got {percentile!r}")
    counts = histogram.counts.astype(np.float64)
    if histogram.amax <= 0 or not counts.any():
        return 0.0
    if method == "max":
        return histogram.amax
    if method == "percentile":
        num_bins = int(np.searchsorted(counts.cumsum(), counts.sum() * percentile / 100)) + 1
    elif method == "entropy":
        num_bins = _least_divergence(counts)
    else:
        num_bins = _least_squared_error(counts)
    return histogram.amax * min(num_bins, NUM_BINS) / NUM_BINS


def _least_divergence(counts: Float64Array) -> int:
    """The number of bins whose 128 levels tell most of the whole histogram."""
    counts = counts.copy()
    counts[0] = counts[1]  # zeros, which ReLU makes many of, are exact at any scale
    if not counts.any():
        return NUM_BINS
    candidates = range(_NUM_LEVELS, NUM_BINS + 1, _STRIDE)
    return min(candidates, key=lambda n: _divergence(counts, n))


def _divergence(counts: Float64Array, num_bins: int) -> float:
    """Kullback and Leibler's divergence of the clipped histogram from its 128 levels."""
    kept = counts[:num_bins].copy()
    is_filled = kept > 0
    kept[-1] += counts[num_bins:].sum()
    level = np.arange(num_bins) * _NUM_LEVELS // num_bins
    sums = np.bincount(level, weights=counts[:num_bins], minlength=_NUM_LEVELS)
    filled = np.bincount(level, weights=is_filled, minlength=_NUM_LEVELS)
    spread = np.where(is_filled, sums[level] / np.maximum(filled[level], 1), 0)
    if not spread.any():
        return np.inf
    present = kept > 0
    wanted, got = kept[present] / kept.sum(), spread[present] / spread.sum()
    if not got.all():
        return np.inf  # clipped values fall where nothing was
    return float((wanted * np.log(wanted / got)).sum())


def _least_squared_error(counts: Float64Array) -> int:
    """The number of bins that rounds and clips with the least mean squared error."""
    centres = np.arange(NUM_BINS) + 0.5
    candidates = np.arange(_NUM_LEVELS // 2, NUM_BINS + 1, _STRIDE)

    def squared_error(num_bins: int) -> float:
        step = num_bins / (_NUM_LEVELS - 1)
        rounded = np.minimum(np.rint(centres / step), _NUM_LEVELS - 1) * step
        return float((counts * (centres - rounded) ** 2).sum())

    return min((int(n) for n in candidates), key=squared_error)
