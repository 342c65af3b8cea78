import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx_models import (
    attention,
    mlp_blocks,
    model_of,
    operators_of,
    relative_error,
    run,
    tokens,
    weights_of,
)
from tolerances import FROM_TWIN

from edgetrack.backends.ort import OnnxRuntimeBackend
from edgetrack.bundle import ANSWER_NAMES, Bundle
from edgetrack.quantize.cache import CalibrationCache
from edgetrack.quantize.calibrate import GraphRun, chain_states
from edgetrack.quantize.int8 import quantize_bundle, write_int8_graphs
from edgetrack.quantize.layers import Layer, find_layers
from edgetrack.quantize.ort_twin import to_ort_twin
from edgetrack.quantize.qdq import insert_qdq
from edgetrack.runtime.buffers import allocate
from edgetrack.runtime.chain import Chain
from edgetrack.runtime.policies import ExitPolicy

NamedCrops = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def twins(shipped_bundle: Bundle, cache: CalibrationCache) -> dict[str, onnx.ModelProto]:
    return quantize_bundle(shipped_bundle, cache, runtime="onnxruntime")


def int8_layers(model: onnx.ModelProto) -> list[Layer]:
    return [layer for layer in find_layers(model) if not layer.reason]


def optimised(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return Counter(operators_of(onnx.load(folder / "optimised.onnx")))


def quantized_blocks() -> onnx.ModelProto:
    model = mlp_blocks()
    layers = [layer for layer in find_layers(model) if not layer.reason]
    return insert_qdq(model, layers, {name: 6.0 for layer in layers for name in layer.inputs})


def test_the_twin_has_the_numbers_of_the_qdq_graph() -> None:
    quantized = quantized_blocks()
    inputs = {"tokens_in": tokens(0)}

    twin = to_ort_twin(quantized, {})

    expected = run(quantized, inputs)["tokens"]
    np.testing.assert_allclose(run(twin, inputs)["tokens"], expected, atol=1e-4)


def test_a_linear_layer_and_its_bias_are_one_kernel() -> None:
    twin = to_ort_twin(quantized_blocks(), {})

    operators = Counter(operators_of(twin))
    assert operators["MatMulIntegerToFloat"] == 6
    assert operators["MatMul"] == operators["DequantizeLinear"] == 0
    assert operators["Add"] == 3  # the residuals


@pytest.mark.parametrize("has_bias", [True, False])
def test_attention_and_its_projection_are_one_node_with_the_same_numbers(has_bias: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(32, 72), scale=0.2).astype(np.float32)
    bias = rng.normal(size=72).astype(np.float32) if has_bias else None
    model = attention(projection=weight, bias=bias)
    quantized = insert_qdq(model, int8_layers(model), {"tokens_in": 4.0})
    given = {"tokens_in": rng.normal(size=(1, 12, 32)).astype(np.float32)}

    twin = to_ort_twin(quantized, {})

    assert operators_of(twin) == ["Identity", "QAttention", "QuantizeLinear"]
    got, expected = run(twin, given)["tokens"], run(quantized, given)["tokens"]
    np.testing.assert_allclose(got, expected, atol=FROM_TWIN["float32"])


def test_a_projection_that_is_also_read_elsewhere_stays_beside_attention() -> None:
    model = attention(projection=np.eye(32, 72, dtype=np.float32))
    model.graph.output.append(helper.make_tensor_value_info("packed", 1, [1, 12, 72]))
    quantized = insert_qdq(model, int8_layers(model), {"tokens_in": 4.0})

    twin = to_ort_twin(quantized, {})

    assert {"MatMulIntegerToFloat", "MultiHeadAttention"} < set(operators_of(twin))


def test_each_quantised_layer_runs_in_int8(
    twins: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    found = {name: optimised(model, tmp_path) for name, model in twins.items()}

    linear = {name: count["MatMulIntegerToFloat"] for name, count in found.items()}
    conv = {name: count["QLinearConv"] for name, count in found.items()}
    attention = {name: count["QAttention"] for name, count in found.items()}
    assert linear == {"template": 0, "segment_0": 0, "segment_1": 10, "segment_2": 6}
    assert conv == {"template": 0, "segment_0": 1, "segment_1": 0, "segment_2": 1}
    assert attention == {"template": 0, "segment_0": 0, "segment_1": 3, "segment_2": 2}


def test_inputs_and_outputs_stay(twins: dict[str, onnx.ModelProto], shipped_bundle: Bundle) -> None:
    for graph in shipped_bundle.graphs:
        model = twins[graph.name].graph
        for specs, values in ((graph.inputs, model.input), (graph.outputs, model.output)):
            found = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
            assert found == {spec.name: list(spec.shape) for spec in specs}


def test_answers_are_close_to_those_of_the_bundle(
    twins: dict[str, onnx.ModelProto], shipped_bundle: Bundle, crops: NamedCrops
) -> None:
    floats = {
        g.name: GraphRun(onnx.load(shipped_bundle.graph_path(g))) for g in shipped_bundle.graphs
    }
    int8 = {name: GraphRun(model) for name, model in twins.items()}
    worst = dict.fromkeys(ANSWER_NAMES, 0.0)

    expected = chain_states(shipped_bundle, floats, crops)
    got = chain_states(shipped_bundle, int8, crops)
    for (_, graph, exact), (_, _, rounded) in zip(expected, got, strict=True):
        if graph != "template":
            for name in ANSWER_NAMES:
                away = float(np.abs(exact[name] - rounded[name]).max())
                worst[name] = max(worst[name], away)

    assert 0 < worst["bbox_cxcywh"] < 0.02
    assert 0 < worst["score"] < 0.05
    assert 0 < worst["uncertainty"] < 0.03


def test_weights_of_float_layers_are_stored_as_fp16_and_large_ones_as_int8(
    twins: dict[str, onnx.ModelProto],
) -> None:
    stored = weights_of(twins["segment_1"])
    large = stored["model.correlation.to_tokens.weight_0_stored"]
    small = stored["model.backbone.to_tokens.0.weight_0_stored"]

    assert (large.size, large.dtype.name) == (92_160, "int8")
    assert (small.size, small.dtype.name) == (37_120, "float16")
    read_by_layers = {
        node.input[1] for m in twins.values() for node in m.graph.node if node.op_type == "Conv"
    }
    as_floats = [
        weight.size
        for model in twins.values()
        for name, weight in weights_of(model).items()
        if name in read_by_layers
    ]
    assert max(as_floats) < 1024


def test_a_weight_beyond_fp16_is_stored_as_int8() -> None:
    weight = np.full((32, 32, 1, 1), 7.0e4, np.float32)
    node = helper.make_node("Conv", ["x", "conv.weight"], ["map"])
    model = model_of([node], {"x": [1, 32, 4, 4]}, {"map": [1, 32, 4, 4]}, {"conv.weight": weight})
    given = {"x": np.ones((1, 32, 4, 4), np.float32)}

    twin = to_ort_twin(model, {})

    np.testing.assert_allclose(run(twin, given)["map"], run(model, given)["map"], rtol=1e-6)
    assert weights_of(twin)["conv.weight_0_stored"].dtype == np.int8


def test_int8_engines_are_a_third_of_the_size(
    shipped_bundle: Bundle, cache: CalibrationCache, tmp_path: Path
) -> None:
    backend = OnnxRuntimeBackend()
    files = write_int8_graphs(shipped_bundle, cache, tmp_path, runtime="onnxruntime")
    sizes = dict.fromkeys(["fp32", "int8"], 0)
    for graph in shipped_bundle.graphs:
        sources = {"fp32": shipped_bundle.graph_path(graph), "int8": files[graph.name]}
        for precision, source in sources.items():
            engine = tmp_path / f"{graph.name}.{precision}"
            backend.compile(source, engine, precision=precision)
            sizes[precision] += engine.stat().st_size

    assert sizes["int8"] <= 0.35 * sizes["fp32"]


def test_compiled_int8_engines_track_like_float_ones(
    shipped_bundle: Bundle, cache: CalibrationCache, crops: NamedCrops, tmp_path: Path
) -> None:
    backend = OnnxRuntimeBackend()
    files = write_int8_graphs(shipped_bundle, cache, tmp_path, runtime="onnxruntime")
    engines: dict[str, list[Any]] = {"fp32": [], "int8": []}
    for graph in shipped_bundle.graphs:
        backend.compile(files[graph.name], tmp_path / graph.file, precision="int8")
        engines["int8"].append(backend.load(tmp_path / graph.file, graph))
        engines["fp32"].append(backend.load_onnx(shipped_bundle.graph_path(graph), graph))
    last = ExitPolicy.always_last(num_exits=shipped_bundle.num_exits)
    boxes = {}

    for precision, loaded in engines.items():
        chain = Chain(shipped_bundle, loaded)
        for name, values in crops[-1][1].items():
            chain.buffers[name][...] = values
        chain.run_template()
        chain.run(last)
        boxes[precision] = chain.buffers["bbox_cxcywh"].copy()

    assert allocate(shipped_bundle).keys() >= set(ANSWER_NAMES)
    np.testing.assert_allclose(boxes["int8"], boxes["fp32"], atol=0.02)
    assert not np.array_equal(boxes["int8"], boxes["fp32"])


def test_a_relu_behind_a_convolution_is_done_by_the_rounding(
    twins: dict[str, onnx.ModelProto], shipped_bundle: Bundle
) -> None:
    before = operators_of(onnx.load(shipped_bundle.graph_path(shipped_bundle.segments[0])))

    twin = twins["segment_0"]

    assert before.count("Relu") - operators_of(twin).count("Relu") == 1
    unsigned = [w for w in weights_of(twin).values() if w.dtype == np.uint8 and w.ndim == 0]
    assert 0 in unsigned


def test_layers_that_the_cache_keeps_are_float(
    shipped_bundle: Bundle, cache: CalibrationCache
) -> None:
    kept = dataclasses.replace(
        cache, float_layers=("segment_2/backbone.blocks.3.attn.qkv", "segment_2/none")
    )

    twin = quantize_bundle(shipped_bundle, kept, runtime="onnxruntime")["segment_2"]

    found = Counter(operators_of(twin))
    assert (found["MatMulIntegerToFloat"], found["QAttention"]) == (6, 1)
    assert found["MultiHeadAttention"] == 1


def test_layers_that_saw_only_zeros_are_float(
    shipped_bundle: Bundle, cache: CalibrationCache
) -> None:
    ranges = {graph: dict(of_graph) for graph, of_graph in cache.ranges.items()}
    ranges["segment_2"]["layer_norm"] = 0.0

    quantized = quantize_bundle(shipped_bundle, dataclasses.replace(cache, ranges=ranges))

    assert operators_of(quantized["segment_2"]).count("QuantizeLinear") == 8


def test_quantised_attention_still_runs(
    shipped_bundle: Bundle, cache: CalibrationCache, crops: NamedCrops
) -> None:
    models = quantize_bundle(shipped_bundle, cache, runtime="onnxruntime", with_attention=True)

    runs = {name: GraphRun(model) for name, model in models.items()}
    states = [state for _, _, state in chain_states(shipped_bundle, runs, crops[:1])]

    assert operators_of(models["segment_2"]).count("MultiHeadAttention") == 0
    assert np.isfinite(states[-1]["bbox_cxcywh"]).all()


def test_the_argument_is_not_written_to() -> None:
    quantized = quantized_blocks()
    before = quantized.SerializeToString()

    to_ort_twin(quantized, {})

    assert quantized.SerializeToString() == before


def test_a_linear_layer_without_bias_and_a_transposed_one() -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "first.weight"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "second.weight", "second.bias"], ["tokens"], transB=1),
    ]
    weights = {
        "first.weight": rng.normal(size=(32, 48)).astype(np.float32),
        "second.weight": rng.normal(size=(24, 48)).astype(np.float32),
        "second.bias": rng.normal(size=24).astype(np.float32),
    }
    model = model_of(nodes, {"x": [8, 32]}, {"tokens": [8, 24]}, weights)
    layers = find_layers(model)
    quantized = insert_qdq(model, layers, {"x": 4.0, "active": 20.0})
    given = {"x": rng.normal(size=(8, 32)).astype(np.float32)}

    twin = to_ort_twin(quantized, {})

    got = run(twin, given)["tokens"]
    assert operators_of(twin).count("MatMulIntegerToFloat") == 2
    np.testing.assert_allclose(got, run(quantized, given)["tokens"], rtol=1e-4, atol=1e-3)
    assert relative_error(got, run(model, given)["tokens"]) < 0.05
