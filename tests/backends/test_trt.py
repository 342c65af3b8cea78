import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from toy_bundle import write_toy_bundle

from edgetrack.backends.cuda import find_cuda_device
from edgetrack.backends.layer_table import read_layer_table
from edgetrack.backends.trt import TensorRTBackend, hint_for
from edgetrack.bundle import Bundle
from edgetrack.errors import BackendUnavailableError, EngineBuildError, EngineError
from edgetrack.quantize.fp16 import cast_file_to_fp16, to_fp16

IS_RTX_INSTALLED = importlib.util.find_spec("tensorrt_rtx") is not None
WIDTH, HEADS, TOKENS = 128, 2, 80


def needs_rtx(test: Any) -> Any:
    reason = 'needs tensorrt_rtx: pip install "edgetrack[tensorrt-rtx]"'
    return pytest.mark.rtx(pytest.mark.skipif(not IS_RTX_INSTALLED, reason=reason)(test))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("toy"))


def cast_segment(bundle: Bundle, index: int, folder: Path) -> Path:
    path = folder / "cast.onnx"
    cast_file_to_fp16(bundle.graph_path(bundle.segments[index]), path)
    return path


def attention_block() -> onnx.ModelProto:
    """A pre-norm attention block in FP32, as torch exports it."""
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "gamma": np.ones(WIDTH, np.float32),
        "qkv": rng.normal(scale=0.1, size=(WIDTH, 3 * WIDTH)).astype(np.float32),
        "proj": rng.normal(scale=0.1, size=(WIDTH, WIDTH)).astype(np.float32),
        "scale": np.float32((WIDTH // HEADS) ** -0.5),
        "split": np.array([1, TOKENS, 3, HEADS, WIDTH // HEADS]),
        "merge": np.array([1, TOKENS, WIDTH]),
        "leading": np.array([0]),
    }
    parts = ["q5", "k5", "v5"]
    nodes = [
        helper.make_node("LayerNormalization", ["tokens_in", "gamma"], ["normed"]),
        helper.make_node("MatMul", ["normed", "qkv"], ["mixed"]),
        helper.make_node("Reshape", ["mixed", "split"], ["heads"]),
        helper.make_node("Transpose", ["heads"], ["leading_qkv"], perm=[2, 0, 3, 1, 4]),
        helper.make_node("Split", ["leading_qkv"], parts, axis=0, num_outputs=3),
        *(helper.make_node("Squeeze", [p, "leading"], [p[0]]) for p in parts),
        helper.make_node("Transpose", ["k"], ["k_t"], perm=[0, 1, 3, 2]),
        helper.make_node("Mul", ["q", "scale"], ["q_scaled"]),
        helper.make_node("MatMul", ["q_scaled", "k_t"], ["products"]),
        helper.make_node("Softmax", ["products"], ["attention"], axis=-1),
        helper.make_node("MatMul", ["attention", "v"], ["attended"]),
        helper.make_node("Transpose", ["attended"], ["rows"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["rows", "merge"], ["joined"]),
        helper.make_node("MatMul", ["joined", "proj"], ["projected"]),
        helper.make_node("Add", ["tokens_in", "projected"], ["tokens"]),
    ]
    shape = [1, TOKENS, WIDTH]
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("tokens_in", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(v, n) for n, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_graph_compiles_without_a_gpu(bundle: Bundle, tmp_path: Path, precision: str) -> None:
    backend = TensorRTBackend("tensorrt-rtx")

    for graph in bundle.graphs:
        source, engine = bundle.graph_path(graph), tmp_path / f"{graph.name}.plan"
        if precision == "fp16":
            cast_file_to_fp16(source, tmp_path / "cast.onnx")
            source = tmp_path / "cast.onnx"
        backend.compile(source, engine, precision=precision)

        assert engine.stat().st_size > 0
        assert read_layer_table(engine)


@needs_rtx
def test_attention_is_fused_and_every_product_is_fp16(tmp_path: Path) -> None:
    onnx.save(to_fp16(attention_block()), tmp_path / "block.onnx")
    engine = tmp_path / "block.plan"

    TensorRTBackend("tensorrt-rtx").compile(tmp_path / "block.onnx", engine, precision="fp16")

    rows = read_layer_table(engine)
    assert sum("_mha_" in row.name for row in rows) == 1
    assert {row.precision for row in rows} == {"Half"}


@needs_rtx
def test_progress_rises_to_one(bundle: Bundle, tmp_path: Path) -> None:
    steps: list[tuple[str, float]] = []

    TensorRTBackend("tensorrt-rtx").compile(
        cast_segment(bundle, 0, tmp_path),
        tmp_path / "s.plan",
        precision="fp16",
        on_step=lambda phase, fraction: steps.append((phase, fraction)),
    )

    fractions = [fraction for _, fraction in steps]
    assert len(steps) > 10
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


@needs_rtx
def test_ctrl_c_ends_a_build(bundle: Bundle, tmp_path: Path) -> None:
    def interrupt(phase: str, fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TensorRTBackend("tensorrt-rtx").compile(
            cast_segment(bundle, 0, tmp_path),
            tmp_path / "s.plan",
            precision="fp16",
            on_step=interrupt,
        )

    assert not (tmp_path / "s.plan").exists()


@needs_rtx
def test_a_graph_in_another_precision_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    backend, graph = TensorRTBackend("tensorrt-rtx"), bundle.segments[0]

    with pytest.raises(EngineBuildError, match=r"expected a graph cast to fp16, got .*\[\]"):
        backend.compile(bundle.graph_path(graph), tmp_path / "s.plan", precision="fp16")
    with pytest.raises(EngineBuildError, match=r"cast to fp32, got .*'template_tokens'"):
        backend.compile(cast_segment(bundle, 0, tmp_path), tmp_path / "s.plan", precision="fp32")


@needs_rtx
def test_what_the_parser_says_is_in_the_error(tmp_path: Path) -> None:
    block = attention_block()
    block.graph.node[1].op_type, block.graph.node[1].name = "Frobnicate", "frob_1"
    block.graph.node[1].domain = "elsewhere"
    onnx.save(block, tmp_path / "odd.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    backend = TensorRTBackend("tensorrt-rtx")

    with pytest.raises(EngineBuildError, match=r"odd\.onnx: .*Frobnicate 'frob_1': .*lugin"):
        backend.compile(tmp_path / "odd.onnx", tmp_path / "s.plan", precision="fp32")
    with pytest.raises(EngineBuildError, match=r"junk\.onnx: expected a graph that it reads"):
        backend.compile(tmp_path / "junk.onnx", tmp_path / "s.plan", precision="fp32")


@needs_rtx
def test_key_without_a_driver_is_of_a_portable_engine() -> None:
    if find_cuda_device() is not None:
        pytest.skip("needs a machine without a CUDA device")

    key = TensorRTBackend("tensorrt-rtx").key(model="toy", bundle_digest="0", precision="fp16")

    assert (key.device, key.arch) == ("none", "portable")
    assert key.folder_name.startswith(f"toy-fp16-tensorrt-rtx{key.backend_version}-portable-")


def test_int8_is_refused_with_the_reason(tmp_path: Path) -> None:
    backend = TensorRTBackend("tensorrt-rtx")

    with pytest.raises(ValueError, match=r"^precision: .* got 'int8'; INT8 cannot be built yet"):
        backend.key(model="toy", bundle_digest="0", precision="int8")
    with pytest.raises(ValueError, match=r"^precision: .* got 'int8'; INT8 cannot be built yet"):
        backend.compile(tmp_path / "g.onnx", tmp_path / "g.plan", precision="int8")


def test_engines_are_not_run_yet(bundle: Bundle) -> None:
    backend = TensorRTBackend("tensorrt-rtx")

    with pytest.raises(EngineError, match=r"only builds them.*use --backend onnxruntime$"):
        backend.load(Path("segment_0.plan"), bundle.segments[0])
    with pytest.raises(EngineError, match=r"only builds them.*use --backend onnxruntime$"):
        backend.load_onnx(bundle.graph_path(bundle.segments[0]), bundle.segments[0])


def test_tensorrt_that_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("needs a machine without tensorrt")
    backend = TensorRTBackend("tensorrt")

    with pytest.raises(BackendUnavailableError, match="expected the package tensorrt, got"):
        backend.compile(tmp_path / "g.onnx", tmp_path / "g.plan", precision="fp16")


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("Error Code 10: Could not find any implementation for node {fc1}.", "memory"),
        ("Error Code 2: OutOfMemory (no further information)", "memory"),
        ("Version tag does not match. Note: Current Version: 239", "edgetrack build --force"),
        ("safeVersionRead == safeSerializationVersion failed", "edgetrack build --force"),
        ("CUDA initialization failure with error: 35", "edgetrack doctor"),
        ("something else", "edgetrack doctor"),
    ],
)
def test_known_errors_have_a_hint(message: str, hint: str) -> None:
    assert hint in hint_for(message)
