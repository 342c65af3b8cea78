"""TensorRT 10.3 to 11.x and TensorRT-RTX: compiles graphs to engines, and loads them on a GPU."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from edgetrack.backends import import_package, installed_version
from edgetrack.backends.cuda.driver import CudaDevice, find_cuda_device
from edgetrack.backends.engine import EngineKey
from edgetrack.backends.trt.builder import (
    WORKSPACE_BYTES,
    BuildJob,
    compile_graph,
    part_of,
)
from edgetrack.backends.trt.child import compile_in_child
from edgetrack.backends.trt.engine import TensorRTEngine
from edgetrack.bundle import GraphSpec
from edgetrack.errors import BackendUnavailableError, EngineNotFoundError

__all__ = ["REQUIRED_API", "Flavour", "TensorRTBackend"]

Flavour = Literal["tensorrt", "tensorrt-rtx"]

# What the backend uses of the bindings; tested against every TensorRT that is supported.
REQUIRED_API: Mapping[str, str] = {
    "Builder": "build_serialized_network create_builder_config create_network",
    "BuilderFlag": "TF32",
    "DataType": "BOOL FLOAT HALF INT32 INT64 INT8 UINT8",
    "ExecutionContextAllocationStrategy": "USER_MANAGED",
    "IBuilderConfig": "clear_flag create_timing_cache max_aux_streams profiling_verbosity "
    "progress_monitor set_flag set_memory_pool_limit set_timing_cache",
    "ICudaEngine": "create_execution_context device_memory_size_v2 get_tensor_dtype "
    "get_tensor_mode get_tensor_name get_tensor_shape num_io_tensors",
    "IErrorRecorder": "clear get_error_code get_error_desc has_overflowed num_errors report_error",
    "IExecutionContext": "execute_async_v3 set_device_memory set_tensor_address",
    "ILogger": "log",
    "INetworkDefinition": "get_input get_output num_inputs num_outputs",
    "IProgressMonitor": "phase_finish phase_start step_complete",
    "ITensor": "dtype name",
    "ITimingCache": "serialize",
    "Logger": "ERROR INTERNAL_ERROR WARNING",
    "MemoryPoolType": "TACTIC_DRAM WORKSPACE",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "OnnxParser": "get_error num_errors parse",
    "ParserError": "desc node_name node_operator",
    "ProfilingVerbosity": "DETAILED",
    "Runtime": "deserialize_cuda_engine error_recorder",
    "TensorIOMode": "INPUT OUTPUT",
}


class TensorRTBackend:
    """Compile and run graphs with TensorRT, or with TensorRT-RTX, which compiles without a GPU.

    Args:
        flavour: ``tensorrt`` builds for the GPU at hand; ``tensorrt-rtx`` for any from Ampere on.
        device: Number of the CUDA device.
    """

    runs_on: Literal["cpu", "cuda"] = "cuda"
    precisions: tuple[str, ...] = ("fp16", "fp32", "int8")
    engine_suffix = ".plan"

    def __init__(self, flavour: Flavour = "tensorrt", device: int = 0) -> None:
        self.name: str = flavour
        self.device = device

    def key(self, *, model: str, bundle_digest: str, precision: str) -> EngineKey:
        """The key of engines that are built here; those of TensorRT-RTX fit any GPU.

        Raises:
            ValueError: There is no such precision.
            BackendUnavailableError: The package, or for ``tensorrt`` a GPU, is missing.
        """
        self._check_precision(precision)
        version = self._version()
        name, arch = "any", "portable"
        if self.name == "tensorrt":
            device = find_cuda_device(self.device)
            if device is None:
                raise BackendUnavailableError(
                    f"backend 'tensorrt': expected a CUDA GPU with number {self.device}, for which "
                    "it tunes its engines, got none; use --backend onnxruntime, or tensorrt-rtx "
                    "to compile without a GPU"
                )
            name, arch = device.name, device.arch
        return EngineKey(
            model=model,
            bundle_digest=bundle_digest,
            precision=precision,
            backend=self.name,
            backend_version=version,
            device=name,
            arch=arch,
            options={"workspace_bytes": WORKSPACE_BYTES, "user_allocation": True},
        )

    def compile(
        self,
        onnx_path: Path,
        engine_path: Path,
        *,
        precision: str,
        on_step: Callable[[str, float], None] | None = None,
    ) -> None:
        """Compile one graph, and write its layer table beside the engine.

        Args:
            onnx_path: A graph that is cast to ``precision`` already.
            engine_path: Where the engine goes: a folder in the root of all engines, in which
                TensorRT's timings of tactics are kept from build to build.
            precision: What the graph is expected to be in.
            on_step: Called in this thread with the phase's name and the fraction done.

        Raises:
            EngineBuildError: TensorRT refused the graph or its precision, or memory ran out.
            BackendUnavailableError: The package or a driver that it needs is missing.
        """
        self._check_precision(precision)
        device = find_cuda_device(self.device)
        job = BuildJob(
            backend=self.name,
            onnx_path=onnx_path,
            engine_path=engine_path,
            precision=precision,
            device=self.device,
            timings_path=self._timings_path(engine_path, device),
        )
        report = on_step or (lambda phase, fraction: None)
        # TensorRT-RTX compiles on the CPU and keeps 160 MB, which only matters where CPU and GPU
        # share their memory; a process costs 0.25 s per graph, a third of what compiling it takes.
        takes_gpu_memory = self.name == "tensorrt" or (device is not None and device.is_integrated)
        try:
            (compile_in_child if takes_gpu_memory else compile_graph)(job, report)
        finally:
            part_of(engine_path).unlink(missing_ok=True)
        report("engine built", 1.0)

    def load(self, engine_path: Path, graph: GraphSpec) -> TensorRTEngine:
        """Load an engine that ``compile`` wrote, in the context that is current.

        Raises:
            EngineMismatchError: Another TensorRT wrote it, or for another GPU, or it is damaged.
            DeviceMemoryError: The GPU has no room for its weights.
            BackendUnavailableError: There is no driver, or none that this TensorRT can work with.
            EngineError: TensorRT refused it for another reason; the message holds its words.
        """
        return TensorRTEngine(import_package(self.name), engine_path, graph, backend=self.name)

    def load_onnx(self, onnx_path: Path, graph: GraphSpec) -> TensorRTEngine:
        """Refuse: TensorRT takes minutes to compile, which is done once, by ``build``.

        Raises:
            EngineNotFoundError: Always.
        """
        raise EngineNotFoundError(
            f"{onnx_path}: expected engines built by {self.name} {self._version()} for this "
            f"machine, got none; run: edgetrack build {onnx_path.parent} --backend {self.name}"
        )

    def _check_precision(self, precision: str) -> None:
        if precision not in self.precisions:
            raise ValueError(
                f"precision: expected one of {self.precisions} on {self.name}, got "
                f"{precision!r}; use fp16"
            )

    def _timings_path(self, engine_path: Path, device: CudaDevice | None) -> Path | None:
        """Where timings are kept; TensorRT-RTX takes none, but would look for a GPU."""
        if device is None or self.name != "tensorrt":
            return None
        name = f"timings-{device.name}-{device.arch}-{self.name}{self._version()}.cache"
        return engine_path.parent.parent / re.sub(r"[^\w.+-]", "_", name)

    def _version(self) -> str:
        return installed_version(self.name) or str(import_package(self.name).__version__)
