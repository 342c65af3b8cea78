import errno
import importlib
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from toy_bundle import SCORES, plain_search_region, write_toy_bundle

from edgetrack.backends import get_backend, import_package, list_backends, ort
from edgetrack.backends.ort import PRECISION_PROPERTY, OnnxRuntimeBackend, cpu_name
from edgetrack.bundle import Bundle, GraphSpec
from edgetrack.errors import BackendUnavailableError, EngineBuildError, EngineError

UNCERTAINTIES = (0.2, 0.6, 0.8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("toy"))


def buffers_of(bundle: Bundle) -> dict[str, Any]:
    tensors = [t for g in bundle.graphs for t in (*g.inputs, *g.outputs)]
    buffers = {t.name: np.zeros(t.shape, t.dtype) for t in tensors}
    buffers["search_region"][...] = plain_search_region(UNCERTAINTIES)
    return buffers


def run_all(bundle: Bundle, load: Any) -> list[dict[str, Any]]:
    buffers = buffers_of(bundle)
    written = []
    for graph in bundle.graphs:
        engine = load(graph)
        engine.bind(buffers)
        engine.enqueue()
        written.append({t.name: buffers[t.name].copy() for t in graph.outputs})
    return written


def test_graphs_run_straight_from_the_bundle(bundle: Bundle) -> None:
    backend = OnnxRuntimeBackend()

    written = run_all(bundle, lambda g: backend.load_onnx(bundle.graph_path(g), g))

    for answer, score, uncertainty in zip(written[1:], SCORES, UNCERTAINTIES, strict=True):
        assert answer["score"] == pytest.approx(score)
        assert answer["uncertainty"] == pytest.approx(uncertainty, abs=1e-5)
        np.testing.assert_allclose(answer["bbox_cxcywh"], [[0.5, 0.5, 0.25, 0.25]], atol=1e-6)


def test_compiled_engines_answer_as_the_bundle_does(bundle: Bundle, tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend()

    def compiled(graph: GraphSpec) -> Any:
        path = tmp_path / f"{graph.name}{backend.engine_suffix}"
        backend.compile(bundle.graph_path(graph), path, precision="fp32")
        return backend.load(path, graph)

    engines = run_all(bundle, compiled)
    direct = run_all(bundle, lambda g: backend.load_onnx(bundle.graph_path(g), g))

    for got, expected in zip(engines, direct, strict=True):
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])


def test_compile_reports_its_steps(bundle: Bundle, tmp_path: Path) -> None:
    steps: list[float] = []

    OnnxRuntimeBackend().compile(
        bundle.graph_path(bundle.template),
        tmp_path / "t.onnx",
        precision="fp32",
        on_step=lambda phase, fraction: steps.append(fraction),
    )

    assert steps[0] == 0
    assert steps[-1] == 1


def test_compile_prints_nothing(
    bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    graph = bundle.segments[0]

    OnnxRuntimeBackend().compile(bundle.graph_path(graph), tmp_path / "s.onnx", precision="fp32")

    assert capfd.readouterr() == ("", "")


def test_runs_allocate_nothing(bundle: Bundle) -> None:
    engine = OnnxRuntimeBackend().load_onnx(
        bundle.graph_path(bundle.segments[0]), bundle.segments[0]
    )
    engine.bind(buffers_of(bundle))

    tracemalloc.start()
    for _ in range(500):  # Python's own free lists fill up
        engine.enqueue()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(500):
        engine.enqueue()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert after - before < 500


def test_outputs_follow_inputs_written_in_place(bundle: Bundle) -> None:
    buffers = buffers_of(bundle)
    graph = bundle.segments[0]
    engine = OnnxRuntimeBackend().load_onnx(bundle.graph_path(graph), graph)
    engine.bind(buffers)
    engine.enqueue()

    buffers["search_region"][...] = plain_search_region((0.9, 0.1, 0.1))
    engine.enqueue()

    assert buffers["uncertainty"] == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (np.zeros((1, 64, 64, 3), np.float32), "uint8 .* got float32"),
        (np.zeros((1, 32, 32, 3), np.uint8), r"\(1, 64, 64, 3\), got uint8 \(1, 32, 32, 3\)"),
        (np.zeros((1, 64, 64, 6), np.uint8)[..., ::2], "got not C-contiguous uint8"),
        (None, "expected a buffer 'search_region'"),
    ],
)
def test_bind_refuses_a_buffer_that_does_not_fit(
    bundle: Bundle, replacement: Any, message: str
) -> None:
    graph = bundle.segments[0]
    engine = OnnxRuntimeBackend().load_onnx(bundle.graph_path(graph), graph)
    buffers = buffers_of(bundle)
    del buffers["search_region"]
    if replacement is not None:
        buffers["search_region"] = replacement

    with pytest.raises(ValueError, match=f"^segment_0: .*{message}"):
        engine.bind(buffers)


def test_bind_refuses_a_read_only_output(bundle: Bundle) -> None:
    graph = bundle.segments[2]
    engine = OnnxRuntimeBackend().load_onnx(bundle.graph_path(graph), graph)
    buffers = buffers_of(bundle)
    buffers["score"].flags.writeable = False

    with pytest.raises(ValueError, match=r"'score'.*got read-only float32"):
        engine.bind(buffers)


def test_engine_states_what_is_missing(bundle: Bundle) -> None:
    graph = bundle.segments[2]
    engine = OnnxRuntimeBackend().load_onnx(bundle.graph_path(graph), graph)

    with pytest.raises(EngineError, match=r"expected bind\(\) before enqueue\(\)"):
        engine.enqueue()
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="got a closed one"):
        engine.bind(buffers_of(bundle))


def test_a_graph_that_is_not_the_manifests_is_refused(bundle: Bundle) -> None:
    path = bundle.graph_path(bundle.segments[1])

    with pytest.raises(EngineError, match=r"segment_2: expected inputs \['tokens_1'\], got"):
        OnnxRuntimeBackend().load_onnx(path, bundle.segments[2])


def test_a_file_that_is_no_graph_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"junk")
    backend = OnnxRuntimeBackend()

    with pytest.raises(EngineBuildError, match=r"junk\.onnx: expected a graph"):
        backend.load_onnx(junk, bundle.template)
    with pytest.raises(EngineBuildError, match=r"junk\.onnx: expected a graph"):
        backend.compile(junk, tmp_path / "engine.onnx", precision="fp32")
    with pytest.raises(EngineError, match="run: edgetrack build --force"):
        backend.load(junk, bundle.template)


def test_other_precisions_are_refused_with_the_reason(bundle: Bundle, tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend()
    source = bundle.graph_path(bundle.template)

    with pytest.raises(ValueError, match=r"^precision: expected one of \('fp32', 'int8'\).*slower"):
        backend.key(model="toy", bundle_digest="0", precision="fp16")
    with pytest.raises(ValueError, match=r"^precision: expected one of \('fp32', 'int8'\).*slower"):
        backend.compile(source, tmp_path / "t.onnx", precision="fp16")


def test_a_graph_in_another_precision_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend()
    source = bundle.graph_path(bundle.template)
    quantized = onnx.load(source)
    onnx.helper.set_model_props(quantized, {PRECISION_PROPERTY: "int8"})
    onnx.save(quantized, tmp_path / "int8.onnx")

    with pytest.raises(EngineBuildError, match="expected a graph in int8, got one in fp32; run"):
        backend.compile(source, tmp_path / "engine.onnx", precision="int8")
    with pytest.raises(EngineBuildError, match="expected a graph in fp32, got one in int8; run"):
        backend.compile(tmp_path / "int8.onnx", tmp_path / "engine.onnx", precision="fp32")

    assert not (tmp_path / "engine.onnx").exists()


def test_an_int8_engine_is_the_quantised_graph_itself(bundle: Bundle, tmp_path: Path) -> None:
    quantized = onnx.load(bundle.graph_path(bundle.template))
    onnx.helper.set_model_props(quantized, {PRECISION_PROPERTY: "int8"})
    onnx.save(quantized, tmp_path / "int8.onnx")

    OnnxRuntimeBackend().compile(tmp_path / "int8.onnx", tmp_path / "engine.onnx", precision="int8")

    assert (tmp_path / "engine.onnx").read_bytes() == (tmp_path / "int8.onnx").read_bytes()


def test_key_names_compiler_and_cpu() -> None:
    import onnxruntime

    key = OnnxRuntimeBackend().key(model="toy", bundle_digest="0", precision="fp32")

    assert key.backend_version == onnxruntime.__version__
    assert key.device == cpu_name()
    assert key.folder_name.startswith(f"toy-fp32-onnxruntime{onnxruntime.__version__}-")


def test_threads_must_be_positive() -> None:
    with pytest.raises(ValueError, match="num_threads: expected at least 1, got 0"):
        OnnxRuntimeBackend(0)


def test_a_full_disk_is_an_os_error(bundle: Bundle, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from edgetrack.backends.ort import *\n"
        "room, source = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "(room / 'filler').write_bytes(bytes(60 << 10))\n"
        "try: OnnxRuntimeBackend().compile(source, room / 'e.onnx', precision='fp32')\n"
        "except OSError as error: sys.exit(error.errno)\n"
    )
    mount = 'mount -t tmpfs -o size=64k none "$1" && exec "$2" -c "$3" "$1" "$4"'
    arguments = [tmp_path, sys.executable, script, bundle.graph_path(bundle.segments[0])]
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs none "$1"', "sh", tmp_path], check=False
        ).returncode
    ):
        pytest.skip("needs unshare and user namespaces, to mount a small file system")

    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount, "sh", *arguments], check=False)

    assert done.returncode == errno.ENOSPC


def test_auto_is_onnxruntime() -> None:
    assert get_backend("auto").name == "onnxruntime"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match=r"expected one of auto, .*got 'openvino'"):
        get_backend("openvino")


def test_a_backend_that_is_not_installed_says_how_to_get_it() -> None:
    missing = [b for b in list_backends() if not b.is_installed]
    if not missing:
        pytest.skip("needs a machine without one of the backends")

    with pytest.raises(BackendUnavailableError, match=r"expected the package .*run: "):
        get_backend(missing[0].name)


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_ctrl_c_in_an_import_stays_one_when_the_package_hides_it(
    monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    def interrupted(name: str) -> None:
        error = ImportError("initialization failed")
        setattr(error, link, KeyboardInterrupt())
        raise error

    monkeypatch.setattr(importlib, "import_module", interrupted)

    with pytest.raises(KeyboardInterrupt):
        import_package("onnxruntime")


def test_numpy_is_imported_before_a_package_that_hides_ctrl_c_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imported: list[str] = []
    monkeypatch.setattr(importlib, "import_module", imported.append)

    import_package("onnxruntime")

    assert imported == ["numpy", "onnxruntime"]


def test_a_library_that_is_missing_says_how_to_get_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> None:
        raise ImportError("libgomp.so.1: cannot open")

    monkeypatch.setattr(importlib, "import_module", broken)

    with pytest.raises(BackendUnavailableError, match=r"got libgomp.*pip install onnxruntime"):
        import_package("onnxruntime")


def test_ctrl_c_while_a_graph_is_read_is_passed_on(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        monkeypatch.setattr(ort, "refusals", lambda: pytest.fail("imported after the error"))
        raise KeyboardInterrupt

    monkeypatch.setattr(OnnxRuntimeBackend, "_session", interrupted)
    path = bundle.graph_path(bundle.template)

    with pytest.raises(KeyboardInterrupt):
        OnnxRuntimeBackend().compile(path, tmp_path / "t.onnx", precision="fp32")


def test_installed_backends_are_listed_with_their_version() -> None:
    listed = {b.name: b for b in list_backends()}

    assert listed["onnxruntime"].is_installed
    assert listed["onnxruntime"].version
