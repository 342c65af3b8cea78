"""An engine of TensorRT or TensorRT-RTX at work on a CUDA GPU.

It runs in the primary context, which must be current where an engine is loaded, bound, enqueued and
closed. It allocates nothing but its weights and what a run must keep: scratch memory is the
caller's, one block for all engines that run one after another, and every tensor has one address.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetrack.backends.trt.errors import make_log, make_recorder, run_error
from edgetrack.bundle import GraphSpec
from edgetrack.errors import EdgeTrackError, EngineError, EngineMismatchError

__all__ = ["TensorRTEngine"]

_NUMPY_NAMES: Mapping[str, str] = {
    "BOOL": "bool",
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
}


class TensorRTEngine:
    """One plan in one execution context; made by ``TensorRTBackend.load``.

    Attributes:
        dtypes: Tensor name → NumPy's name of the type that the plan reads or writes.
        scratch_bytes: Memory that it needs while it runs.
    """

    def __init__(self, trt: Any, engine_path: Path, graph: GraphSpec, *, backend: str) -> None:
        self._path, self._backend = engine_path, backend
        self._log = make_log(trt)
        self._recorder = make_recorder(trt, self._log)
        self._runtime, self._engine = self._deserialise(trt, engine_path.read_bytes())
        self._check_tensors(trt, graph)
        self.dtypes: Mapping[str, str] = {
            name: _NUMPY_NAMES[self._engine.get_tensor_dtype(name).name] for name in self._names()
        }
        self.scratch_bytes = int(self._engine.device_memory_size_v2)
        self._context = self._engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._context is None:
            raise self._failed("make a context to run it in")

    def bind_device(self, addresses: Mapping[str, int], *, scratch: int, stream: int) -> None:
        """Read and write device memory at these addresses from now on, and run once.

        Args:
            addresses: Tensor name → device address; other names are ignored. The memory must
                outlive the engine, and be 256-byte aligned.
            scratch: Device address of at least ``scratch_bytes``, 256-byte aligned; engines that
                never run at the same time may share it.
            stream: Where it is run once: TensorRT sets up what a capture may not, at the first run.

        Raises:
            ValueError: A tensor has no address.
            EngineError: TensorRT refused an address, or the engine is closed.
        """
        context = self._opened()
        if missing := [name for name in self.dtypes if name not in addresses]:
            raise ValueError(
                f"{self._path.name}: expected addresses of all tensors, got none of {missing}; "
                "allocate buffers for the whole bundle"
            )
        # It returns nothing; where it is refused, the run below says so.
        context.set_device_memory(scratch, self.scratch_bytes)
        for name in self.dtypes:
            if not context.set_tensor_address(name, addresses[name]):
                raise self._failed(f"use {name!r} at {addresses[name]:#x}")
        self.enqueue_on(stream)
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(stream):
            self._log.keep("the engine is not stream capturable")
            raise self._failed("run it where a stream captures")

    def enqueue_on(self, stream: int) -> None:
        """Run once, in stream order; the stream may be capturing a graph.

        Raises:
            EngineError: TensorRT refused; the message holds its own last words.
        """
        if not self._opened().execute_async_v3(stream):
            raise self._failed("enqueue a run")

    def close(self) -> None:
        """Free its memory; calling it twice is fine. Nothing of it may be running."""
        self._context = None
        self._engine = None
        self._runtime = None

    def _deserialise(self, trt: Any, plan: bytes) -> tuple[Any, Any]:
        try:
            runtime = trt.Runtime(self._log)
        except TypeError as error:  # what the bindings make of a runtime that TensorRT refuses
            self._log.keep(str(error))
            raise self._failed("make a runtime") from error
        runtime.error_recorder = self._recorder
        if hasattr(runtime, "get_engine_validity"):  # TensorRT-RTX: before any memory is taken
            self._check_validity(trt, runtime, plan)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._failed("read the engine")
        return runtime, engine

    def _check_validity(self, trt: Any, runtime: Any, plan: bytes) -> None:
        """Refuse what TensorRT-RTX knows not to run here; without a diagnosis it cannot say."""
        validity, diagnosis = runtime.get_engine_validity(plan)
        found = [
            name
            for name, flag in trt.EngineInvalidityDiagnostics.__members__.items()
            if int(diagnosis) & int(flag)
        ]
        if validity == trt.EngineValidity.INVALID and found:
            self._log.keep(" ".join(found))
            raise self._failed("run the engine here")

    def _check_tensors(self, trt: Any, graph: GraphSpec) -> None:
        """Refuse an engine whose tensors are not those of the graph."""
        expected = {t.name: (trt.TensorIOMode.INPUT, t.shape) for t in graph.inputs}
        expected |= {t.name: (trt.TensorIOMode.OUTPUT, t.shape) for t in graph.outputs}
        got = {
            name: (self._engine.get_tensor_mode(name), tuple(self._engine.get_tensor_shape(name)))
            for name in self._names()
        }
        if got != expected:
            names = sorted(n for n in expected | got if expected.get(n) != got.get(n))
            raise EngineMismatchError(
                f"{self._path}: expected the tensors of {graph.name}, got other names or shapes "
                f"of {names}; run: edgetrack build --backend {self._backend} --force"
            )

    def _names(self) -> list[str]:
        return [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]

    def _opened(self) -> Any:
        if self._context is None:
            raise EngineError(f"{self._path}: expected an open engine, got a closed one; load it")
        return self._context

    def _failed(self, wanted: str) -> EdgeTrackError:
        return run_error(
            self._path,
            expected=f"{self._backend} to {wanted}",
            messages=self._log.take(),
            backend=self._backend,
        )
