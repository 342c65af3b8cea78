"""TensorRT 10.3 to 11.x and TensorRT-RTX: one path that compiles graphs to engines.

Precision lives in the graph (``quantize`` casts it): every network is strongly typed, and the
builder's precision flags and calibrators, gone in TensorRT 11, are not used. Attributes of the
bindings are tested, never version numbers, and the integers behind enumerations are not kept:
they differ between versions.
"""

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from edgetrack.backends import import_package, installed_version
from edgetrack.backends.cuda import find_cuda_device
from edgetrack.backends.engine import Engine, EngineKey
from edgetrack.backends.layer_table import layer_table, make_log, write_layer_table
from edgetrack.bundle import GraphSpec
from edgetrack.errors import BackendUnavailableError, EngineBuildError, EngineError

__all__ = [
    "REQUIRED_API",
    "Flavour",
    "TensorRTBackend",
    "configure",
    "hint_for",
    "make_monitor",
    "network_flags",
]

Flavour = Literal["tensorrt", "tensorrt-rtx"]
StepReport = Callable[[str, float], None]

# An Orin Nano shares 8 GB between CPU and GPU, and the builder takes what it may.
WORKSPACE_BYTES = 512 << 20

# What this module uses of the bindings; tested against every TensorRT that is supported.
REQUIRED_API: Mapping[str, str] = {
    "Builder": "build_serialized_network create_builder_config create_network",
    "BuilderFlag": "TF32",
    "DataType": "HALF",
    "IBuilderConfig": "clear_flag create_timing_cache get_timing_cache max_aux_streams "
    "profiling_verbosity progress_monitor set_memory_pool_limit set_timing_cache",
    "ILogger": "log",
    "INetworkDefinition": "get_input get_output num_inputs num_outputs",
    "IProgressMonitor": "phase_finish phase_start step_complete",
    "ITensor": "dtype name",
    "ITimingCache": "serialize",
    "Logger": "ERROR INTERNAL_ERROR",
    "MemoryPoolType": "WORKSPACE",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "OnnxParser": "get_error num_errors parse",
    "ParserError": "desc node_name node_operator",
    "ProfilingVerbosity": "DETAILED",
}

_HINTS: Mapping[str, str] = {
    "Could not find any implementation": "memory may be short: close other programs, build again",
    "utOfMemory": "memory is short: close other programs, build again",
    "out of memory": "memory is short: close other programs, build again",
    "Version tag does not match": "another TensorRT wrote it, run: edgetrack build --force",
    "safeVersionRead": "another TensorRT wrote it, run: edgetrack build --force",
    "CUDA initialization failure": "see what the driver says: edgetrack doctor",
}


class TensorRTBackend:
    """Compile graphs with TensorRT, or with TensorRT-RTX, which needs no GPU for it.

    Args:
        flavour: ``tensorrt`` builds for the GPU at hand; ``tensorrt-rtx`` for any from Ampere on.
    """

    precisions: tuple[str, ...] = ("fp32", "fp16")
    engine_suffix = ".plan"

    def __init__(self, flavour: Flavour = "tensorrt") -> None:
        self.name: str = flavour
        self._timings = b""

    def key(self, *, model: str, bundle_digest: str, precision: str) -> EngineKey:
        """The key of engines that are built here.

        Raises:
            ValueError: There is no such precision.
            BackendUnavailableError: The package, or for ``tensorrt`` a GPU, is missing.
        """
        self._check_precision(precision)
        version = self._version()
        device = find_cuda_device()
        if device is None and self.name == "tensorrt":
            raise BackendUnavailableError(
                "backend 'tensorrt': expected a CUDA GPU, for which it tunes its engines, got "
                "none; use --backend onnxruntime, or tensorrt-rtx to compile without a GPU"
            )
        return EngineKey(
            model=model,
            bundle_digest=bundle_digest,
            precision=precision,
            backend=self.name,
            backend_version=version,
            device=device.name if device else "none",
            arch=device.arch if device else "portable",
            options={"workspace_bytes": WORKSPACE_BYTES},
        )

    def compile(
        self,
        onnx_path: Path,
        engine_path: Path,
        *,
        precision: str,
        on_step: StepReport | None = None,
    ) -> None:
        """Compile one graph, and write its layer table beside the engine.

        Args:
            onnx_path: A graph that is cast to ``precision`` already.
            engine_path: Where the engine goes.
            precision: What the graph is expected to be in.
            on_step: Called in this thread with the phase's name and the fraction done.

        Raises:
            EngineBuildError: TensorRT refused the graph, or it is in another precision.
            BackendUnavailableError: The package is not installed.
        """
        self._check_precision(precision)
        trt = import_package(self.name)
        log = make_log(trt)
        try:
            builder = trt.Builder(log)
        except TypeError as error:  # what the bindings make of a builder that TensorRT refuses
            raise self._failed(onnx_path, "a builder", [*log.errors, str(error)]) from error
        network = builder.create_network(network_flags(trt))
        parser = trt.OnnxParser(network, log)
        content = onnx_path.read_bytes()  # network and parser point into it until the end
        if not parser.parse(content):
            found = (parser.get_error(i) for i in range(parser.num_errors))
            errors = [f"{e.node_operator()} {e.node_name()!r}: {e.desc()}" for e in found]
            raise self._failed(onnx_path, "a graph that it reads", errors or log.errors)
        _check_types(trt, network, onnx_path, precision)
        config = builder.create_builder_config()
        configure(trt, config)
        plan = self._build(trt, builder, network, config, on_step)
        if plan is None:
            raise self._failed(onnx_path, "an engine", log.errors)
        engine_path.write_bytes(plan)
        write_layer_table(engine_path, layer_table(log.tables))

    def load(self, engine_path: Path, graph: GraphSpec) -> Engine:
        """Refuse: TensorRT engines are built here, not run.

        Raises:
            EngineError: Always.
        """
        raise EngineError(
            f"{engine_path}: expected a backend that runs engines, got {self.name!r}, which only "
            "builds them in this version; use --backend onnxruntime"
        )

    def load_onnx(self, onnx_path: Path, graph: GraphSpec) -> Engine:
        """Refuse, as ``load`` does."""
        return self.load(onnx_path, graph)

    def _check_precision(self, precision: str) -> None:
        if precision not in self.precisions:
            what = "INT8 cannot be built yet, use" if precision == "int8" else "use"
            raise ValueError(
                f"precision: expected one of {self.precisions} on {self.name}, got "
                f"{precision!r}; {what} fp16"
            )

    def _failed(self, onnx_path: Path, expected: str, errors: list[str]) -> EngineBuildError:
        text = " | ".join(errors) or "no reason given"
        return EngineBuildError(
            f"{onnx_path}: expected {expected} from {self.name} {self._version()}, got: {text}; "
            f"{hint_for(text)}"
        )

    def _version(self) -> str:
        return installed_version(self.name) or str(import_package(self.name).__version__)

    def _build(
        self, trt: Any, builder: Any, network: Any, config: Any, on_step: StepReport | None
    ) -> Any:
        """Build in a thread: in TensorRT's callbacks Ctrl-C and exceptions would be swallowed."""
        is_rtx = hasattr(trt, "IRuntimeCache")
        if not is_rtx:  # TensorRT-RTX ignores the cache, but would look for a GPU
            config.set_timing_cache(config.create_timing_cache(self._timings), False)
        steps: queue.SimpleQueue[tuple[str, float] | None] = queue.SimpleQueue()
        cancelled = threading.Event()
        config.progress_monitor = make_monitor(trt, steps.put, cancelled)
        with ThreadPoolExecutor(1) as pool:
            building = pool.submit(builder.build_serialized_network, network, config)
            building.add_done_callback(lambda _: steps.put(None))
            try:
                while (step := steps.get()) is not None:
                    if on_step is not None:
                        on_step(*step)
            finally:
                cancelled.set()
        if on_step is not None:
            on_step("engine built", 1.0)
        if not is_rtx:
            self._timings = bytes(config.get_timing_cache().serialize())
        return building.result()


def network_flags(trt: Any) -> int:
    """Flags of a strongly typed network, for ``Builder.create_network``."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def configure(trt: Any, config: Any) -> None:
    """Set what all engines share: one stream, full layer names, no TF32, capped scratch."""
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.clear_flag(trt.BuilderFlag.TF32)
    config.max_aux_streams = 0  # more would fork inside the frame's CUDA graph
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def make_monitor(
    trt: Any, report: Callable[[tuple[str, float]], None], cancelled: threading.Event
) -> Any:
    """A progress monitor that reports (phase, fraction of the build), and can cancel it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the bindings are untyped
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, list[int]] = {}
            self._fraction = 0.0

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            self._phases[name] = [0, max(num_steps, 1)]

        def step_complete(self, name: str, step: int) -> bool:
            self._phases[name][0] = step + 1
            fraction = 0.0
            for done, total in reversed(self._phases.values()):
                fraction = (done + fraction) / total
            self._fraction = max(self._fraction, min(fraction, 1.0))
            report((name, self._fraction))
            return not cancelled.is_set()

        def phase_finish(self, name: str) -> None:
            self._phases.pop(name, None)

    return Monitor()


def hint_for(message: str) -> str:
    """What to do about an error of TensorRT, whose own text seldom says it."""
    for known, hint in _HINTS.items():
        if known in message:
            return hint
    return "use --backend onnxruntime, or report it with the output of: edgetrack doctor"


def _check_types(trt: Any, network: Any, onnx_path: Path, precision: str) -> None:
    """A graph in another precision would build silently, to an engine with a wrong name."""
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    halves = [t.name for t in tensors if t.dtype == trt.DataType.HALF]
    if bool(halves) != (precision == "fp16"):
        raise EngineBuildError(
            f"{onnx_path}: expected a graph cast to {precision}, got float16 tensors {halves}; "
            "run: edgetrack build"
        )
