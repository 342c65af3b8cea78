from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from toy_bundle import plain_search_region, write_toy_bundle

from edgetrack.bundle import Bundle
from edgetrack.errors import EngineBuildError
from edgetrack.quantize.fp16 import FP32_NAMES, cast_file_to_fp16, to_fp16

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
NUM_BINS = 17


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("toy"))


def model_of(nodes: list[Any], inputs: dict[str, list[int]], outputs: dict[str, list[int]],
             weights: dict[str, Any]) -> onnx.ModelProto:  # fmt: skip
    """A model of float32 tensors."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(n, FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()],
    )
    opsets = [helper.make_opsetid("", 19)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def exit_head(weight: Any) -> onnx.ModelProto:
    """A layer to bins, and the expectation and entropy of their softmax."""
    bins = np.arange(NUM_BINS, dtype=np.float32).reshape(NUM_BINS, 1)
    nodes = [
        helper.make_node("MatMul", ["tokens", "weight"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probs"], axis=-1),
        helper.make_node("MatMul", ["probs", "bins"], ["bbox_cxcywh"]),
        helper.make_node("LogSoftmax", ["logits"], ["log_probs"], axis=-1),
        helper.make_node("Mul", ["probs", "log_probs"], ["terms"]),
        helper.make_node("ReduceSum", ["terms", "last_axis"], ["uncertainty"], keepdims=0),
    ]
    return model_of(
        nodes,
        {"tokens": [1, 4, 32]},
        {"bbox_cxcywh": [1, 4, 1], "uncertainty": [1, 4]},
        {"weight": weight, "bins": bins, "last_axis": np.array([-1])},
    )


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    return types | {i.name: i.data_type for i in graph.initializer}


def run(model: onnx.ModelProto, **inputs: Any) -> dict[str, Any]:
    """Run with ONNX's reference, which rounds at every cast; ONNX Runtime drops pairs of them."""
    session = ReferenceEvaluator(model)
    return dict(zip(session.output_names, session.run(None, inputs), strict=True))


def test_boundaries_become_fp16_but_for_pixels_and_answers(bundle: Bundle) -> None:
    for graph in bundle.graphs:
        types = types_of(to_fp16(onnx.load(bundle.graph_path(graph))))

        for tensor in (*graph.inputs, *graph.outputs):
            expected = FLOAT if tensor.name in FP32_NAMES else HALF
            expected = TensorProto.UINT8 if tensor.dtype == "uint8" else expected
            assert types[tensor.name] == expected, tensor.name


def test_tensor_names_stay(bundle: Bundle) -> None:
    for graph in bundle.graphs:
        model = onnx.load(bundle.graph_path(graph))
        before = types_of(onnx.shape_inference.infer_shapes(model))

        assert before.keys() <= types_of(to_fp16(model)).keys()


def test_the_argument_is_not_written_to(bundle: Bundle) -> None:
    model = onnx.load(bundle.graph_path(bundle.segments[0]))
    before = model.SerializeToString()

    to_fp16(model)

    assert model.SerializeToString() == before


def test_answers_agree_with_fp32(bundle: Bundle) -> None:
    model = onnx.load(bundle.graph_path(bundle.segments[0]))
    image = plain_search_region((0.2, 0.6, 0.8))
    image[:, 8:24, 32:48] = 255
    template = np.zeros((1, 16, 8))

    full = run(model, search_region=image, template_tokens=template.astype(np.float32))
    half = run(to_fp16(model), search_region=image, template_tokens=template.astype(np.float16))

    np.testing.assert_allclose(half["tokens_0"], full["tokens_0"], atol=1e-3)
    for name in ("bbox_cxcywh", "score", "uncertainty"):
        np.testing.assert_allclose(half[name], full[name], atol=1e-3)


def test_the_layer_is_fp16_and_the_decoding_behind_it_fp32() -> None:
    weight = np.random.default_rng(0).normal(size=(32, NUM_BINS)).astype(np.float32)

    types = types_of(to_fp16(exit_head(weight)))

    assert types["weight"] == types["logits"] == HALF
    fp32 = ("probs", "log_probs", "terms", "bins", "bbox_cxcywh", "uncertainty")
    assert {types[n] for n in fp32} == {FLOAT}


def test_decoding_is_rounded_nowhere_behind_the_layer() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(1, 4, 32)).astype(np.float16)
    model = to_fp16(exit_head(rng.normal(size=(32, NUM_BINS)).astype(np.float32)))
    watched = helper.make_tensor_value_info("logits", HALF, [1, 4, NUM_BINS])
    model.graph.output.append(watched)

    got = run(model, tokens=tokens)

    logits = got["logits"].astype(np.float64)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    expectation = (probs * np.arange(NUM_BINS)).sum(-1, keepdims=True)
    np.testing.assert_allclose(got["bbox_cxcywh"], expectation, rtol=1e-6)
    np.testing.assert_allclose(got["uncertainty"], (probs * np.log(probs)).sum(-1), rtol=1e-5)


def test_no_precision_is_lost_in_a_weight_that_both_types_read() -> None:
    shared = np.full((8, 8), 0.1, np.float32)
    nodes = [
        helper.make_node("MatMul", ["tokens_in", "shared"], ["tokens"]),
        helper.make_node("Add", ["template_bbox_cxcywh", "shared"], ["bbox_cxcywh"]),
    ]
    shape = [8, 8]
    model = model_of(
        nodes,
        {"tokens_in": shape, "template_bbox_cxcywh": shape},
        {"tokens": shape, "bbox_cxcywh": shape},
        {"shared": shared},
    )

    zeros = np.zeros(shape)
    got = run(
        to_fp16(model),
        tokens_in=zeros.astype(np.float16),
        template_bbox_cxcywh=zeros.astype(np.float32),
    )

    np.testing.assert_array_equal(got["bbox_cxcywh"], shared)


def test_weights_outside_the_range_are_clamped() -> None:
    weight = np.zeros((32, NUM_BINS), np.float32)
    weight[0, :5] = [1e9, -1e9, 1e-12, -1e-12, -np.inf]

    cast = to_fp16(exit_head(weight))

    stored = next(i for i in cast.graph.initializer if i.name == "weight")
    tiny = np.finfo(np.float16).smallest_subnormal
    expected = [65504, -65504, tiny, -tiny, -np.inf, 0]
    np.testing.assert_array_equal(numpy_helper.to_array(stored)[0, :6], np.float16(expected))


def test_a_norm_of_large_features_does_not_overflow() -> None:
    nodes = [
        helper.make_node("ReduceL2", ["tokens_in", "axis"], ["norm"], keepdims=1),
        helper.make_node("Div", ["tokens_in", "norm"], ["tokens"]),
    ]
    model = model_of(nodes, {"tokens_in": [1, 64]}, {"tokens": [1, 64]}, {"axis": np.array([1])})

    got = run(to_fp16(model), tokens_in=np.full((1, 64), 1000, np.float16))

    np.testing.assert_allclose(got["tokens"], 1 / 8, rtol=1e-3)


def test_a_norm_of_nothing_divides_to_zero() -> None:
    nodes = [
        helper.make_node("ReduceL2", ["tokens_in", "axis"], ["norm"], keepdims=1),
        helper.make_node("Max", ["norm", "epsilon"], ["divisor"]),
        helper.make_node("Div", ["tokens_in", "divisor"], ["tokens"]),
    ]
    weights = {"axis": np.array([1]), "epsilon": np.float32(1e-12)}
    model = model_of(nodes, {"tokens_in": [1, 64]}, {"tokens": [1, 64]}, weights)

    got = run(to_fp16(model), tokens_in=np.zeros((1, 64), np.float16))

    np.testing.assert_array_equal(got["tokens"], 0)


def test_what_reads_only_the_template_box_is_fp32() -> None:
    nodes = [
        helper.make_node("Mul", ["template_bbox_cxcywh", "size"], ["box_px"]),
        helper.make_node("Add", ["tokens_in", "box_px"], ["tokens"]),
    ]
    inputs = {"template_bbox_cxcywh": [1, 4], "tokens_in": [1, 4]}
    model = model_of(nodes, inputs, {"tokens": [1, 4]}, {"size": np.float32(384)})

    types = types_of(to_fp16(model))

    assert types["box_px"] == FLOAT
    assert types["tokens"] == HALF


def test_constant_nodes_are_cast() -> None:
    half = numpy_helper.from_array(np.float32(0.5))
    nodes = [
        helper.make_node("Constant", [], ["half"], value=half),
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Mul", ["tokens_in", "half"], ["halved"]),
        helper.make_node("Mul", ["halved", "two"], ["tokens"]),
    ]
    model = model_of(nodes, {"tokens_in": [4]}, {"tokens": [4]}, {})

    got = run(to_fp16(model), tokens_in=np.arange(4, dtype=np.float16))

    np.testing.assert_array_equal(got["tokens"], np.arange(4, dtype=np.float16))


def test_a_resize_keeps_its_scales_in_fp32() -> None:
    nodes = [helper.make_node("Resize", ["tokens_in", "", "scales"], ["tokens"], mode="nearest")]
    scales = np.array([1, 1, 2, 2], np.float32)
    shape = [1, 1, 2, 2]
    model = model_of(nodes, {"tokens_in": shape}, {"tokens": [1, 1, 4, 4]}, {"scales": scales})

    types = types_of(to_fp16(model))

    assert types["scales"] == FLOAT
    assert types["tokens"] == HALF


def test_control_flow_is_refused(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["tokens_in"], ["chosen"])],
        "branch",
        [],
        [helper.make_tensor_value_info("chosen", FLOAT, [4])],
    )
    nodes = [
        helper.make_node("If", ["yes"], ["tokens"], then_branch=branch, else_branch=branch),
    ]
    model = model_of(nodes, {"tokens_in": [4]}, {"tokens": [4]}, {"yes": np.array(True)})
    onnx.save(model, tmp_path / "if.onnx")

    with pytest.raises(ValueError, match=r"without control flow, got \['If'\]"):
        to_fp16(model)
    with pytest.raises(EngineBuildError, match=r"if\.onnx: expected a graph without control"):
        cast_file_to_fp16(tmp_path / "if.onnx", tmp_path / "cast.onnx")


def test_a_graph_in_fp16_is_refused(bundle: Bundle) -> None:
    cast = to_fp16(onnx.load(bundle.graph_path(bundle.segments[0])))

    with pytest.raises(ValueError, match="expected a float32 graph, got float16 tensors"):
        to_fp16(cast)
