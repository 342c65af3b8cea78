"""Segments that run on the emulated device: ONNX Runtime over device memory, in stream order."""

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from emulator.hooks import EmulatedDriver

from edgetrack.backends.engine import EngineKey
from edgetrack.backends.ort import OnnxRuntimeBackend, OnnxRuntimeEngine
from edgetrack.bundle import GraphSpec


class EmulatedSegment:
    """A ``DeviceEngine``: the emulator runs a host function where a GPU runs kernels.

    Attributes:
        num_runs: Times it ran.
    """

    scratch_bytes = 1024

    def __init__(self, engine: OnnxRuntimeEngine, graph: GraphSpec) -> None:
        self.num_runs = 0
        self.dtypes: Mapping[str, str] = {
            spec.name: spec.dtype for spec in (*graph.inputs, *graph.outputs)
        }
        self._engine, self._graph = engine, graph
        self._driver = EmulatedDriver()

    def bind_device(self, addresses: Mapping[str, int], *, scratch: int, stream: int) -> None:
        arrays = {}
        for spec in (*self._graph.inputs, *self._graph.outputs):
            size = int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
            memory = (ctypes.c_uint8 * size).from_address(addresses[spec.name])
            arrays[spec.name] = np.frombuffer(memory, spec.dtype).reshape(spec.shape)
        self._engine.bind(arrays)

    def enqueue_on(self, stream: int) -> None:
        self._driver.enqueue(stream, self._run)

    def close(self) -> None:
        self._engine.close()

    def _run(self) -> None:
        self.num_runs += 1
        self._engine.enqueue()


class EmulatedBackend:
    """A ``Backend`` whose engines run on the emulated device.

    Attributes:
        segments: All that it loaded, in order.
    """

    name = "emulated"
    runs_on: Literal["cpu", "cuda"] = "cuda"
    device = 0
    precisions: tuple[str, ...] = ("fp32",)
    engine_suffix = ".onnx"

    def __init__(self) -> None:
        self._cpu = OnnxRuntimeBackend(num_threads=1)
        self.segments: list[EmulatedSegment] = []

    def key(self, *, model: str, bundle_digest: str, precision: str) -> EngineKey:
        key = self._cpu.key(model=model, bundle_digest=bundle_digest, precision=precision)
        return EngineKey(**{**key.__dict__, "backend": self.name})

    def compile(self, onnx_path: Path, engine_path: Path, **options: Any) -> None:
        raise NotImplementedError

    def load(self, engine_path: Path, graph: GraphSpec) -> EmulatedSegment:
        raise NotImplementedError

    def load_onnx(self, onnx_path: Path, graph: GraphSpec) -> EmulatedSegment:
        segment = EmulatedSegment(self._cpu.load_onnx(onnx_path, graph), graph)
        self.segments.append(segment)
        return segment
