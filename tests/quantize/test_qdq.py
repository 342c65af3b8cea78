import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_models import (
    NUM_BLOCKS,
    WIDTH,
    mlp_blocks,
    model_of,
    operators_of,
    relative_error,
    run,
    tokens,
    weights_of,
)

from edgetrack.bundle import Bundle
from edgetrack.quantize.fp16 import to_fp16
from edgetrack.quantize.layers import find_layers
from edgetrack.quantize.qdq import insert_qdq, quantized_weight, scale_of

INPUTS = {"tokens_in": tokens(0)}


def quantized(model: onnx.ModelProto, *, amax: float = 6.0) -> onnx.ModelProto:
    layers = [layer for layer in find_layers(model) if not layer.reason]
    return insert_qdq(model, layers, {name: amax for layer in layers for name in layer.inputs})


def producer_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.output)


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    return types | {i.name: i.data_type for i in model.graph.initializer}


def test_dequantize_stands_directly_before_both_operands_of_each_product() -> None:
    model = quantized(mlp_blocks())

    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert len(products) == 2 * NUM_BLOCKS
    for node in products:
        for name in node.input:
            assert producer_of(model, name).op_type == "DequantizeLinear"


def test_weights_are_stored_as_int8_with_a_scale_per_output_channel() -> None:
    model = quantized(mlp_blocks())

    weights = weights_of(model)
    stored = [w for w in weights.values() if w.dtype == np.int8 and w.ndim == 2]
    assert len(stored) == 2 * NUM_BLOCKS
    assert not any(w.dtype == np.float32 and w.ndim == 2 for w in weights.values())
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and weights.get(node.input[0]) is not None:
            assert len(weights[node.input[1]]) == weights[node.input[0]].shape[1]
            assert node.attribute[0].i == 1


def test_zero_points_are_zero() -> None:
    model = quantized(mlp_blocks())

    weights = weights_of(model)
    pairs = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in pairs:
        assert weights[node.input[2]].dtype == np.int8
        assert not weights[node.input[2]].any()


def test_norms_activations_and_residuals_stay_as_they_were() -> None:
    before, after = operators_of(mlp_blocks()), operators_of(quantized(mlp_blocks()))

    added = ["DequantizeLinear"] * 4 * NUM_BLOCKS + ["QuantizeLinear"] * 2 * NUM_BLOCKS
    assert sorted(before + added) == after


def test_int8_is_close_to_float() -> None:
    model = mlp_blocks()

    got = run(quantized(model), INPUTS)["tokens"]

    assert 1e-5 < relative_error(got, run(model, INPUTS)["tokens"]) < 0.02


def test_values_beyond_the_range_are_clipped_to_it() -> None:
    node = helper.make_node("MatMul", ["tokens_in", "weight"], ["tokens"])
    square = [WIDTH, WIDTH]
    weights = {"weight": np.eye(WIDTH, dtype=np.float32)}
    model = model_of([node], {"tokens_in": square}, {"tokens": square}, weights)
    given = np.full(square, 100, np.float32)

    got = run(quantized(model, amax=2.0), {"tokens_in": given})["tokens"]

    np.testing.assert_allclose(got, 2.0, rtol=1e-3)


def test_one_activation_is_quantised_once_for_all_its_readers() -> None:
    nodes = [helper.make_node("MatMul", ["x", f"w{k}"], [f"tokens_{k}"]) for k in range(3)]
    square = [WIDTH, WIDTH]
    weights = {f"w{k}": np.eye(WIDTH, dtype=np.float32) for k in range(3)}
    outputs = {f"tokens_{k}": square for k in range(3)}

    model = quantized(model_of(nodes, {"x": square}, outputs, weights))

    assert operators_of(model).count("QuantizeLinear") == 1


def test_a_weight_that_two_layers_share_is_stored_once() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "fc.weight"], ["middle"]),
        helper.make_node("MatMul", ["middle", "fc.weight"], ["tokens"]),
    ]
    square = [WIDTH, WIDTH]
    weights = {"fc.weight": np.eye(WIDTH, dtype=np.float32)}

    model = quantized(model_of(nodes, {"x": square}, {"tokens": square}, weights))

    assert sum(w.dtype == np.int8 and w.ndim == 2 for w in weights_of(model).values()) == 1


def test_a_transposed_gemm_has_its_channels_in_rows() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(32, WIDTH)) * np.logspace(-3, 0, 32)[:, None]).astype(np.float32)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["tokens"], transB=1)
    weights = {"w": weight, "b": np.zeros(32, np.float32)}
    model = model_of([node], {"x": [8, WIDTH]}, {"tokens": [8, 32]}, weights)
    given = {"x": rng.normal(size=(8, WIDTH)).astype(np.float32)}

    got, expected = (run(m, given)["tokens"] for m in (quantized(model), model))

    for channel in range(32):  # the small ones too: each has its own scale
        assert relative_error(got[:, channel], expected[:, channel]) < 0.1


def test_scales_are_float16_numbers_of_at_least_its_smallest_normal() -> None:
    amax = np.array([0, 1e-9, 1.0, 3.3, 1e4])

    scales = scale_of(amax)

    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))
    assert scales.min() == np.finfo(np.float16).tiny
    np.testing.assert_allclose(scales[2:], amax[2:] / 127, rtol=1e-3)


def test_a_quantised_weight_is_off_by_half_a_step_at_most() -> None:
    weight = np.random.default_rng(0).normal(size=(16, 8, 3, 3)).astype(np.float32)

    values, scales = quantized_weight(weight, channel_axis=0)

    steps = weight / scales[:, None, None, None]
    assert values.dtype == np.int8
    assert np.abs(values - steps).max() <= 0.5 + 127 * 1e-3  # and the rounding of the scale
    assert np.abs(values).max() == 127


def test_both_twins_have_the_same_int8_numbers(shipped_bundle: Bundle) -> None:
    model = onnx.load(shipped_bundle.graph_path(shipped_bundle.segments[2]))
    full = quantized(model)

    half = to_fp16(full)

    full_weights, half_weights = weights_of(full), weights_of(half)
    int8 = {name for name, w in full_weights.items() if w.dtype == np.int8}
    assert len(int8) == 19
    for name in int8:
        np.testing.assert_array_equal(half_weights[name], full_weights[name])
    scales = [n for n in full_weights if n.endswith("_scale")]
    assert len(scales) == 18
    for name in scales:
        assert half_weights[name].dtype == np.float16
        np.testing.assert_array_equal(half_weights[name].astype(np.float32), full_weights[name])


def test_the_fp16_twin_puts_no_cast_between_int8_and_its_product(shipped_bundle: Bundle) -> None:
    model = onnx.load(shipped_bundle.graph_path(shipped_bundle.segments[2]))

    twin = to_fp16(quantized(model))

    types = types_of(twin)
    pairs = [n for n in twin.graph.node if n.op_type == "DequantizeLinear"]
    assert len(pairs) == 18
    for node in pairs:
        readers = [n for n in twin.graph.node if node.output[0] in n.input]
        assert {n.op_type for n in readers} <= {"Conv", "MatMul"}
        assert types[node.output[0]] == TensorProto.FLOAT16
    for node in twin.graph.node:
        if node.op_type == "QuantizeLinear":
            assert types[node.input[0]] == types[node.input[1]] == TensorProto.FLOAT16


def test_the_argument_is_not_written_to() -> None:
    model = mlp_blocks()
    before = model.SerializeToString()

    quantized(model)

    assert model.SerializeToString() == before


def test_a_missing_range_is_named() -> None:
    model = mlp_blocks()
    layers = [layer for layer in find_layers(model) if not layer.reason]

    with pytest.raises(KeyError, match="normed_0"):
        insert_qdq(model, layers, {})


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    quantized(mlp_blocks())

    assert capfd.readouterr() == ("", "")
