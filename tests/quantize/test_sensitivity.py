import dataclasses
from typing import Any

import pytest
from onnx_models import operators_of

from edgetrack.bundle import Bundle
from edgetrack.errors import CalibrationError
from edgetrack.quantize.cache import CalibrationCache
from edgetrack.quantize.calibrate import smoothed_graphs
from edgetrack.quantize.int8 import planned_layers, quantize_bundle
from edgetrack.quantize.sensitivity import keep_worst_in_float, rank_layers

NamedCrops = list[tuple[str, dict[str, Any]]]
BAD = "segment_1/exits.1.bypass.reduce"


@pytest.fixture(scope="module")
def clipping(shipped_bundle: Bundle, cache: CalibrationCache) -> CalibrationCache:
    """A cache that clips nearly all of what one layer reads."""
    ranges = {graph: dict(of_graph) for graph, of_graph in cache.ranges.items()}
    graph, _, name = BAD.partition("/")
    layers = planned_layers(smoothed_graphs(shipped_bundle, cache)[graph], graph, cache)
    (read,) = next(layer.inputs for layer in layers if layer.name == name)
    ranges[graph][read] /= 50
    return dataclasses.replace(cache, ranges=ranges)


@pytest.fixture(scope="module")
def ranked(
    shipped_bundle: Bundle, clipping: CalibrationCache, crops: NamedCrops
) -> CalibrationCache:
    return rank_layers(shipped_bundle, clipping, crops[-2:])


@pytest.mark.slow
def test_the_layer_that_suffers_most_comes_first(ranked: CalibrationCache) -> None:
    (first, loss), (_, next_loss), *_ = ranked.losses.items()

    assert first == BAD
    assert loss > 5 * next_loss
    assert list(ranked.losses.values()) == sorted(ranked.losses.values(), reverse=True)


@pytest.mark.slow
def test_every_int8_layer_is_ranked(shipped_bundle: Bundle, ranked: CalibrationCache) -> None:
    quantized = quantize_bundle(shipped_bundle, ranked)

    assert len(ranked.losses) == 23
    assert sum(operators_of(m).count("QuantizeLinear") for m in quantized.values()) == 23


@pytest.mark.slow
def test_the_worst_are_kept_in_float_until_the_budget_holds(
    shipped_bundle: Bundle, ranked: CalibrationCache, crops: NamedCrops
) -> None:
    kept = keep_worst_in_float(shipped_bundle, ranked, crops[-2:], max_loss=0.05)

    assert kept.float_layers == (BAD,)
    before, after = (
        operators_of(quantize_bundle(shipped_bundle, cache)["segment_1"]).count("QuantizeLinear")
        for cache in (ranked, kept)
    )
    assert after == before - 1


@pytest.mark.slow
def test_a_budget_that_holds_keeps_nothing(
    shipped_bundle: Bundle, ranked: CalibrationCache, crops: NamedCrops
) -> None:
    before = dataclasses.replace(ranked, float_layers=(BAD,))

    kept = keep_worst_in_float(shipped_bundle, before, crops[-1:], max_loss=10.0)

    assert kept.float_layers == ()  # what was kept before is asked again


def test_what_is_not_ranked_cannot_be_kept(
    shipped_bundle: Bundle, cache: CalibrationCache, crops: NamedCrops
) -> None:
    with pytest.raises(CalibrationError, match=r"expected a loss of segment_\S+, got none"):
        keep_worst_in_float(shipped_bundle, cache, crops[:1], max_loss=0.1)


def test_wrong_arguments_are_refused(
    shipped_bundle: Bundle, cache: CalibrationCache, crops: NamedCrops, toy: Bundle
) -> None:
    with pytest.raises(ValueError, match="max_loss: expected a number from 0 on, got -1"):
        keep_worst_in_float(shipped_bundle, cache, crops, max_loss=-1)
    with pytest.raises(CalibrationError, match="expected crops, got none"):
        rank_layers(shipped_bundle, cache, [])
    with pytest.raises(CalibrationError, match="expected one of toy"):
        rank_layers(toy, cache, crops)
