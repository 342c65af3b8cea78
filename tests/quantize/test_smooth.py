from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_models import (
    NUM_BLOCKS,
    WIDTH,
    mlp_blocks,
    model_of,
    relative_error,
    run,
    tokens,
    weights_of,
)
from tolerances import FROM_TWIN

from edgetrack.quantize.layers import find_layers
from edgetrack.quantize.qdq import insert_qdq
from edgetrack.quantize.smooth import fold_smoothing, smoothable_tensors, smoothing_factors

SEEDS = range(8)
NORMED = tuple(f"normed_{k}" for k in range(NUM_BLOCKS))


def channel_maxima(model: onnx.ModelProto) -> dict[str, Any]:
    seen = [run(model, {"tokens_in": tokens(s)}, watched=NORMED) for s in SEEDS]
    return {name: np.max([np.abs(s[name]).max((0, 1)) for s in seen], axis=0) for name in NORMED}


def smoothed(model: onnx.ModelProto, *, strength: float = 0.5) -> onnx.ModelProto:
    factors = smoothing_factors(model, channel_maxima(model), strength=strength)
    return fold_smoothing(model, factors)


def quantized(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every linear layer in INT8, with the largest magnitudes as ranges."""
    layers = [layer for layer in find_layers(model) if not layer.reason]
    assert len(layers) == 2 * NUM_BLOCKS
    watched = [name for layer in layers for name in layer.inputs]
    seen = [run(model, {"tokens_in": tokens(s)}, watched=watched) for s in SEEDS]
    ranges: Mapping[str, float] = {n: max(float(np.abs(s[n]).max()) for s in seen) for n in watched}
    return insert_qdq(model, layers, ranges)


def error_of(model: onnx.ModelProto, reference: onnx.ModelProto) -> float:
    inputs = {"tokens_in": tokens(100)}
    return relative_error(run(model, inputs)["tokens"], run(reference, inputs)["tokens"])


@pytest.mark.parametrize("outlier", [1.0, 40.0])
def test_a_smoothed_model_computes_the_same(outlier: float) -> None:
    model = mlp_blocks(outlier=outlier)

    got = smoothed(model)

    inputs = {"tokens_in": tokens(100)}
    np.testing.assert_allclose(
        run(got, inputs)["tokens"], run(model, inputs)["tokens"], atol=FROM_TWIN["float32"]
    )


def test_outlier_channels_ruin_int8_and_smoothing_saves_it() -> None:
    model = mlp_blocks(outlier=40.0)

    assert error_of(quantized(model), model) > 0.02
    assert error_of(quantized(smoothed(model)), model) < 0.01


def test_parameters_that_norms_share_are_given_to_each() -> None:
    model = mlp_blocks()

    got = weights_of(smoothed(model))

    betas = [weight for name, weight in got.items() if name.startswith("beta")]
    assert len(betas) == NUM_BLOCKS
    assert not np.array_equal(betas[0], betas[1])


def test_full_strength_makes_all_channels_equally_large() -> None:
    model = smoothed(mlp_blocks(outlier=40.0), strength=1.0)

    for maxima in channel_maxima(model).values():
        np.testing.assert_allclose(maxima, maxima[0], rtol=1e-3)


def test_no_strength_evens_out_the_weights_instead() -> None:
    model = smoothed(mlp_blocks(), strength=0.0)

    for k in range(NUM_BLOCKS):
        rows = np.abs(weights_of(model)[f"blocks.{k}.up.weight"]).max(1)
        np.testing.assert_allclose(rows, rows[0], rtol=1e-3)


def test_a_channel_that_is_never_active_keeps_finite_parameters() -> None:
    model = mlp_blocks()
    maxima = channel_maxima(model)
    maxima["normed_0"][3] = 0

    factors = smoothing_factors(model, maxima, strength=0.5)["normed_0"]

    assert np.isfinite(factors).all()
    assert (factors > 0).all()


def test_the_argument_is_not_written_to() -> None:
    model = mlp_blocks()
    before = model.SerializeToString()

    smoothed(model)

    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    "reader",
    [
        ("Relu", ["normed"]),  # not a product
        ("MatMul", ["normed", "tokens_in"]),  # a product of two activations
        ("MatMul", ["weight", "normed"]),  # the weight is on the left
    ],
)
def test_a_norm_that_something_else_reads_is_left_alone(reader: tuple[str, Sequence[str]]) -> None:
    operator, inputs = reader
    nodes = [
        helper.make_node("LayerNormalization", ["tokens_in", "gamma"], ["normed"]),
        helper.make_node("MatMul", ["normed", "weight"], ["product"]),
        helper.make_node(operator, inputs, ["other"]),
    ]
    square = [WIDTH, WIDTH]
    model = model_of(
        nodes,
        {"tokens_in": square},
        {"product": square, "other": square},
        {"gamma": np.ones(WIDTH, np.float32), "weight": np.eye(WIDTH, dtype=np.float32)},
    )

    assert smoothable_tensors(model) == ()


def test_a_norm_whose_output_is_handed_on_is_left_alone() -> None:
    nodes = [
        helper.make_node("LayerNormalization", ["tokens_in", "gamma"], ["normed"]),
        helper.make_node("MatMul", ["normed", "weight"], ["product"]),
    ]
    square = [WIDTH, WIDTH]
    weights = {"gamma": np.ones(WIDTH, np.float32), "weight": np.eye(WIDTH, dtype=np.float32)}
    shapes = {"normed": square, "product": square}
    model = model_of(nodes, {"tokens_in": square}, shapes, weights)

    assert smoothable_tensors(model) == ()
