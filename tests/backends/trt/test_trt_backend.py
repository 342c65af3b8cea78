import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from toy_bundle import write_toy_bundle

from edgetrack.backends.cuda.driver import find_cuda_device
from edgetrack.backends.trt import TensorRTBackend
from edgetrack.backends.trt.builder import (
    BuildJob,
    compile_graph,
    configure,
    read_timings,
    write_timings,
)
from edgetrack.backends.trt.layer_table import read_layer_table
from edgetrack.bundle import Bundle
from edgetrack.errors import (
    BackendUnavailableError,
    EngineBuildError,
    EngineMismatchError,
    EngineNotFoundError,
)
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
def test_the_key_of_tensorrt_rtx_is_of_a_portable_engine() -> None:
    key = TensorRTBackend("tensorrt-rtx").key(model="toy", bundle_digest="0", precision="fp16")

    assert (key.device, key.arch) == ("any", "portable")
    assert key.folder_name.startswith(f"toy-fp16-tensorrt-rtx{key.backend_version}-portable-")


def test_another_precision_is_refused(tmp_path: Path) -> None:
    backend = TensorRTBackend("tensorrt-rtx")

    with pytest.raises(ValueError, match=r"^precision: expected one of .* got 'fp8'; use fp16"):
        backend.key(model="toy", bundle_digest="0", precision="fp8")
    with pytest.raises(ValueError, match=r"^precision: expected one of .* got 'fp8'; use fp16"):
        backend.compile(tmp_path / "g.onnx", tmp_path / "g.plan", precision="fp8")


@needs_rtx
def test_engines_are_not_compiled_at_load(bundle: Bundle) -> None:
    graph = bundle.segments[0]
    build = rf"run: edgetrack build {bundle.path} --backend tensorrt-rtx$"

    with pytest.raises(EngineNotFoundError, match=build):
        TensorRTBackend("tensorrt-rtx").load_onnx(bundle.graph_path(graph), graph)


@pytest.fixture(scope="module")
def plan(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    engine = tmp_path_factory.mktemp("plan") / "s.plan"
    source = bundle.graph_path(bundle.segments[0])
    TensorRTBackend("tensorrt-rtx").compile(source, engine, precision="fp32")
    return engine.read_bytes()


@needs_rtx
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda plan: b"", "MALFORMED_ENGINE"),
        (lambda plan: b"garbage" * 99, "MALFORMED_ENGINE"),
        (lambda plan: plan[:40], "MALFORMED_ENGINE"),
        (lambda plan: plan[: len(plan) // 2], "Serialization assertion plan.header.size == "),
        (lambda plan: plan[:64] + b"none" + plan[68:], "No engine found in plan"),
    ],
)
def test_a_damaged_engine_is_refused_with_the_command_to_run(
    bundle: Bundle, plan: bytes, tmp_path: Path, damage: Any, said: str
) -> None:
    engine = tmp_path / "s.plan"
    engine.write_bytes(damage(plan))

    with pytest.raises(EngineMismatchError) as caught:
        TensorRTBackend("tensorrt-rtx").load(engine, bundle.segments[0])

    assert str(caught.value).startswith(f"{engine}: expected tensorrt-rtx to ")
    assert said in str(caught.value)
    rebuild = "the file is damaged, or not an engine, run: edgetrack build --backend tensorrt-rtx "
    assert str(caught.value).endswith(rebuild + "--force")


@needs_rtx
def test_an_engine_of_another_format_is_said_to_be_of_another_version(
    bundle: Bundle, plan: bytes, tmp_path: Path
) -> None:
    engine = tmp_path / "s.plan"
    engine.write_bytes(plan[:88] + bytes([plan[88] ^ 1]) + plan[89:])

    with pytest.raises(EngineMismatchError, match=r"another TensorRT wrote it, run: edgetrack bu"):
        TensorRTBackend("tensorrt-rtx").load(engine, bundle.segments[0])


@needs_rtx
def test_loading_without_a_driver_says_that_there_is_none(
    bundle: Bundle, plan: bytes, tmp_path: Path
) -> None:
    if find_cuda_device() is not None:
        pytest.skip("needs a machine without a CUDA device")
    (tmp_path / "s.plan").write_bytes(plan)

    with pytest.raises(BackendUnavailableError, match=r"s\.plan: .*there is no NVIDIA driver, or"):
        TensorRTBackend("tensorrt-rtx").load(tmp_path / "s.plan", bundle.segments[0])


@needs_rtx
def test_engines_are_built_to_be_captured() -> None:
    import tensorrt_rtx as trt

    config = trt.Builder(trt.Logger()).create_builder_config()
    configure(trt, config, free_bytes=900 << 20)

    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert config.max_aux_streams == 0
    # TensorRT takes no other size of this pool than a power of two, and keeps silent about it.
    assert config.get_memory_pool_limit(trt.MemoryPoolType.TACTIC_DRAM) == 512 << 20
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 450 << 20


@needs_rtx
def test_a_failed_write_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    engine = tmp_path / "s.plan"
    engine.mkdir()  # what a file cannot take the place of

    with pytest.raises(IsADirectoryError):
        TensorRTBackend("tensorrt-rtx").compile(
            bundle.graph_path(bundle.segments[0]), engine, precision="fp32"
        )

    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.layers.json", "s.plan"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: b"x" + content[1:],
        lambda content: content + b"x",
    ],
)
def test_damaged_timings_count_as_none(tmp_path: Path, damage: Any) -> None:
    file = tmp_path / "timings.cache"
    write_timings(file, b"timings of tactics")
    assert read_timings(file) == b"timings of tactics"

    file.write_bytes(damage(file.read_bytes()))

    assert read_timings(file) == b""


@needs_rtx
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the timing cache, in TensorRT-RTX
def test_a_build_keeps_its_timings_and_replaces_damaged_ones(
    bundle: Bundle, tmp_path: Path
) -> None:
    # TensorRT-RTX makes no use of them, but takes and gives them as TensorRT does.
    job = BuildJob(
        backend="tensorrt-rtx",
        onnx_path=bundle.graph_path(bundle.segments[0]),
        engine_path=tmp_path / "s.plan",
        precision="fp32",
        timings_path=tmp_path / "timings.cache",
    )
    assert job.timings_path is not None
    compile_graph(job, lambda *step: None)
    first = read_timings(job.timings_path)

    job.timings_path.write_bytes(b"damaged")
    compile_graph(job, lambda *step: None)

    assert read_timings(job.timings_path)[:4] == first[:4] == b"ptrt"


def test_timings_that_are_not_there_or_cannot_be_written_are_none(tmp_path: Path) -> None:
    write_timings(tmp_path / "none" / "timings.cache", b"timings")

    assert read_timings(tmp_path / "none" / "timings.cache") == b""
    assert list(tmp_path.iterdir()) == []


def test_tensorrt_that_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("needs a machine without tensorrt")
    backend = TensorRTBackend("tensorrt")

    with pytest.raises(BackendUnavailableError, match="expected the package tensorrt, got"):
        backend.compile(tmp_path / "g.onnx", tmp_path / "g.plan", precision="fp16")
