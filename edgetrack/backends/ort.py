"""ONNX Runtime on the CPU: builds and runs everywhere that edgetrack can be installed.

An FP32 engine is the graph after ONNX Runtime's optimisations for this CPU, saved; loading it skips
them. An INT8 engine is the quantised graph itself (``quantize.ort_twin``): optimised, it would hold
the weights of its float layers in FP32. Only the CPU provider is used: on NVIDIA devices the
TensorRT backends are the fast way.
"""

import errno
import functools
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgetrack.backends import import_package, installed_version
from edgetrack.backends.engine import Buffers, EngineKey
from edgetrack.bundle import GraphSpec, TensorSpec
from edgetrack.errors import EngineBuildError, EngineError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "PRECISION_PROPERTY",
    "OnnxRuntimeBackend",
    "OnnxRuntimeEngine",
    "cpu_name",
    "refusals",
]

# What a quantised graph says of itself in its metadata; a float graph says nothing.
PRECISION_PROPERTY = "edgetrack.precision"

_PROVIDERS = ["CPUExecutionProvider"]
_LOG_ERRORS_ONLY = 3
# Its kernel takes 80 us for 80 tokens of width 160, where Add and LayerNormalization take 15.
_DISABLED_OPTIMIZERS = ["SkipLayerNormFusion"]


class OnnxRuntimeBackend:
    """Compile and run graphs with ONNX Runtime's CPU provider.

    Args:
        num_threads: Threads of one graph; ``None`` is 1: for a small tracker a second thread gains
            a few percent and doubles the energy. Raise it for large models.
    """

    name = "onnxruntime"
    runs_on: Literal["cpu", "cuda"] = "cpu"
    device = 0
    precisions: tuple[str, ...] = ("fp32", "int8")
    engine_suffix = ".onnx"

    def __init__(self, num_threads: int | None = None) -> None:
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads: expected at least 1, got {num_threads}")
        self.num_threads = num_threads or 1

    def key(self, *, model: str, bundle_digest: str, precision: str) -> EngineKey:
        """The key of engines that are built here.

        Raises:
            ValueError: The precision is not one of ``precisions``; the message says what to use.
            BackendUnavailableError: ONNX Runtime is not installed.
        """
        _check_precision(precision)
        return EngineKey(
            model=model,
            bundle_digest=bundle_digest,
            precision=precision,
            backend=self.name,
            backend_version=installed_version(self.name)
            or str(import_package("onnxruntime").__version__),
            device=cpu_name(),
            arch=platform.machine(),
        )

    def compile(
        self,
        onnx_path: Path,
        engine_path: Path,
        *,
        precision: str,
        on_step: Callable[[str, float], None] | None = None,
    ) -> None:
        """Optimise a graph for this CPU and save it; keep an INT8 graph as it is.

        Args:
            onnx_path: The bundle's graph, or for ``int8`` its twin from ``quantize.int8``.
            engine_path: Where the engine goes.
            precision: What the graph is expected to be in.
            on_step: Called with what is done and its fraction.

        Raises:
            EngineBuildError: ONNX Runtime refused the graph, or it is in another precision.
            OSError: There is no room for the result (``errno.ENOSPC``).
        """
        _check_precision(precision)
        report = on_step or (lambda phase, fraction: None)
        report("optimising the graph", 0.0)
        refused = refusals()
        save_to = engine_path if precision == "fp32" else None
        try:
            session = self._session(onnx_path, save_to=save_to)
        except refused as error:
            if shutil.disk_usage(engine_path.parent).free < onnx_path.stat().st_size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(engine_path)) from error
            raise EngineBuildError(_refused(onnx_path, error)) from error
        found = session.get_modelmeta().custom_metadata_map.get(PRECISION_PROPERTY, "fp32")
        if found != precision:
            engine_path.unlink(missing_ok=True)
            raise EngineBuildError(
                f"{onnx_path}: expected a graph in {precision}, got one in {found}; "
                f"run: edgetrack build --precision {precision}"
            )
        if save_to is None:
            shutil.copyfile(onnx_path, engine_path)
        report("optimising the graph", 1.0)

    def load(self, engine_path: Path, graph: GraphSpec) -> "OnnxRuntimeEngine":
        """Load an engine that ``compile`` wrote.

        Raises:
            EngineError: The file is not such an engine, or not of this graph.
        """
        refused = refusals()
        try:
            session = self._session(engine_path)
        except refused as error:
            raise EngineError(
                f"{engine_path}: expected an engine of ONNX Runtime, got: {error}; "
                "run: edgetrack build --force"
            ) from error
        return OnnxRuntimeEngine(session, graph)

    def load_onnx(self, onnx_path: Path, graph: GraphSpec) -> "OnnxRuntimeEngine":
        """Optimise a graph in memory.

        Raises:
            EngineBuildError: ONNX Runtime refused the graph.
            EngineError: The file holds another graph.
        """
        refused = refusals()
        try:
            session = self._session(onnx_path)
        except refused as error:
            raise EngineBuildError(_refused(onnx_path, error)) from error
        return OnnxRuntimeEngine(session, graph)

    def _session(self, path: Path, *, save_to: Path | None = None) -> Any:
        ort = import_package("onnxruntime")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = self.num_threads
        options.inter_op_num_threads = 1
        # Each graph has its own pool; three spinning ones on 2 cores: 17 ms, not 7 (one thread: 9).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if _int8_overflows():
            options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = _LOG_ERRORS_ONLY
        if save_to is not None:
            options.optimized_model_filepath = str(save_to)
        return ort.InferenceSession(
            str(path),
            options,
            providers=_PROVIDERS,
            disabled_optimizers=_DISABLED_OPTIMIZERS,
        )


class OnnxRuntimeEngine:
    """One graph in one session, bound to NumPy buffers; made by ``OnnxRuntimeBackend``."""

    def __init__(self, session: Any, graph: GraphSpec) -> None:
        for kind, specs, found in (
            ("inputs", graph.inputs, session.get_inputs()),
            ("outputs", graph.outputs, session.get_outputs()),
        ):
            expected, got = sorted(s.name for s in specs), sorted(f.name for f in found)
            if expected != got:
                raise EngineError(
                    f"{graph.name}: expected {kind} {expected}, got {got}; export the bundle again"
                )
        self._graph = graph
        self._session = session
        self._binding: Any = None
        self._bound: list[npt.NDArray[Any]] = []

    def bind(self, buffers: Buffers) -> None:
        """Read inputs from and write outputs to ``buffers``, by name, from now on.

        Args:
            buffers: Name → C-contiguous array of the graph's dtype and shape; other names are
                ignored. The arrays must keep their addresses.

        Raises:
            ValueError: A buffer is missing or does not fit; what was bound before stays bound.
            EngineError: The engine is closed.
        """
        if self._session is None:
            raise EngineError(f"{self._graph.name}: expected an open engine, got a closed one")
        inputs = [_fitting(buffers, s, self._graph, is_written=False) for s in self._graph.inputs]
        outputs = [_fitting(buffers, s, self._graph, is_written=True) for s in self._graph.outputs]
        binding = self._session.io_binding()
        for spec, array in zip(self._graph.inputs, inputs, strict=True):
            binding.bind_input(spec.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for spec, array in zip(self._graph.outputs, outputs, strict=True):
            binding.bind_output(spec.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._binding, self._bound = binding, [*inputs, *outputs]

    def enqueue(self) -> None:
        """Run once over the bound buffers; the outputs are written when it returns.

        Raises:
            EngineError: Nothing is bound, or the engine is closed.
        """
        if self._binding is None:
            raise EngineError(f"{self._graph.name}: expected bind() before enqueue(), got none")
        self._session.run_with_iobinding(self._binding)

    def close(self) -> None:
        """Free the session; calling it twice is fine."""
        self._binding = self._session = None
        self._bound = []


def cpu_name() -> str:
    """Name of this CPU, such as ``AMD EPYC``; on Arm boards, which have none, of the board."""
    cpuinfo, board = Path("/proc/cpuinfo"), Path("/proc/device-tree/model")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            field, _, value = line.partition(":")
            if field.strip() == "model name" and value.strip():
                return value.strip()
    if board.is_file():
        return board.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    return platform.processor() or platform.machine()


@functools.cache
def _int8_overflows() -> bool:
    """Whether sums of INT8 products may overflow 16 bits: on x86 without VNNI.

    ONNX Runtime then has slower, exact kernels, and uses them wherever it is asked to.
    """
    if platform.machine() not in ("AMD64", "x86_64"):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.is_file() or "vnni" not in cpuinfo.read_text("utf-8", errors="replace")


@functools.cache
def refusals() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises at a graph it cannot load: they share no base of their own."""
    import_package("onnxruntime")
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NoSuchFile,
        state.NotImplemented,
        state.RuntimeException,
    )


def _refused(onnx_path: Path, error: Exception) -> str:
    return (
        f"{onnx_path}: expected a graph that ONNX Runtime {installed_version('onnxruntime')} runs, "
        f"got: {error}; update onnxruntime, or export the bundle again"
    )


def _check_precision(precision: str) -> None:
    if precision in OnnxRuntimeBackend.precisions:
        return
    reasons = {
        "fp16": "FP16 is slower than FP32 on ONNX Runtime's CPU provider; use fp32 or int8, or "
        "fp16 with --backend tensorrt",
    }
    raise ValueError(
        f"precision: expected one of {OnnxRuntimeBackend.precisions} on onnxruntime, got "
        f"{precision!r}; {reasons.get(precision, 'use fp32 or int8')}"
    )


def _fitting(
    buffers: Buffers, spec: TensorSpec, graph: GraphSpec, *, is_written: bool
) -> "npt.NDArray[Any]":
    """The buffer of a tensor, refused if ONNX Runtime would misread it."""
    array = buffers.get(spec.name)
    if array is None:
        raise ValueError(f"{graph.name}: expected a buffer {spec.name!r}, got {sorted(buffers)}")
    fits = array.dtype == spec.dtype and array.shape == spec.shape
    if not fits or not array.flags.c_contiguous or (is_written and not array.flags.writeable):
        traits = [
            *(["not C-contiguous"] if not array.flags.c_contiguous else []),
            *(["read-only"] if not array.flags.writeable else []),
        ]
        raise ValueError(
            f"{graph.name}: expected buffer {spec.name!r} as C-contiguous {spec.dtype} "
            f"{spec.shape}, got {' '.join([*traits, str(array.dtype)])} {array.shape}"
        )
    return array
