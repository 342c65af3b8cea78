import numpy as np
import pytest

from edgetrack.quantize.ranges import METHODS, MagnitudeHistogram, choose_range


def histogram_of(values: np.ndarray) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram(float(np.abs(values).max()))
    histogram.add(values.astype(np.float32))
    return histogram


@pytest.fixture
def heavy_tailed() -> np.ndarray:
    values = np.random.default_rng(0).normal(size=100_000)
    values[:5] = 40
    return values


def test_max_clips_nothing(heavy_tailed: np.ndarray) -> None:
    assert choose_range(histogram_of(heavy_tailed), "max") == 40


def test_percentile_equals_numpy_to_a_bin(heavy_tailed: np.ndarray) -> None:
    got = choose_range(histogram_of(heavy_tailed), "percentile", percentile=99.9)

    assert got == pytest.approx(np.percentile(np.abs(heavy_tailed), 99.9), abs=2 * 40 / 2048)


def test_mse_is_the_range_with_the_least_squared_error(heavy_tailed: np.ndarray) -> None:
    def squared_error(amax: float) -> float:
        step = amax / 127
        rounded = np.clip(np.rint(heavy_tailed / step), -127, 127) * step
        return float(((heavy_tailed - rounded) ** 2).mean())

    got = choose_range(histogram_of(heavy_tailed), "mse")

    best = min(squared_error(amax) for amax in np.linspace(1, 40, 400))
    assert squared_error(got) == pytest.approx(best, rel=0.02)


def test_entropy_clips_a_tail_but_not_the_body(heavy_tailed: np.ndarray) -> None:
    got = choose_range(histogram_of(heavy_tailed), "entropy")

    assert 2 < got < 20


def test_entropy_keeps_a_uniform_tensor_whole() -> None:
    values = np.random.default_rng(0).uniform(-3, 3, 200_000)

    assert choose_range(histogram_of(values), "entropy") == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_ranges_scale_with_the_tensor(method: str, heavy_tailed: np.ndarray) -> None:
    small = choose_range(histogram_of(heavy_tailed), method)
    large = choose_range(histogram_of(heavy_tailed * 1000), method)

    assert large == pytest.approx(1000 * small, rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros_has_no_range(method: str) -> None:
    histogram = MagnitudeHistogram(0.0)
    histogram.add(np.zeros(100, np.float32))

    assert choose_range(histogram, method) == 0


@pytest.mark.parametrize("method", METHODS)
def test_one_value_alone_is_kept(method: str) -> None:
    values = np.zeros(1000)
    values[0] = 5

    assert choose_range(histogram_of(values), method, percentile=100) == pytest.approx(5, rel=0.1)


def test_counts_do_not_depend_on_order_or_pieces(heavy_tailed: np.ndarray) -> None:
    whole = histogram_of(heavy_tailed)
    pieces = MagnitudeHistogram(40)
    for piece in np.split(heavy_tailed[::-1].astype(np.float32), 10):
        pieces.add(piece)

    np.testing.assert_array_equal(whole.counts, pieces.counts)


def test_memory_does_not_grow_with_what_is_counted() -> None:
    histogram = MagnitudeHistogram(1.0)
    before = histogram.counts.nbytes
    for _ in range(10):
        histogram.add(np.ones(1000, np.float32))

    assert histogram.counts.nbytes == before
    assert histogram.counts.sum() == 10_000


def test_unknown_methods_and_percentiles_are_refused() -> None:
    histogram = histogram_of(np.ones(10))

    with pytest.raises(ValueError, match=r"method: expected one of .*'mse'.*, got 'mean'"):
        choose_range(histogram, "mean")
    for percentile in (0, -1, 101, float("nan")):
        with pytest.raises(ValueError, match=r"percentile: expected a number in \(0, 100\]"):
            choose_range(histogram, "percentile", percentile=percentile)
