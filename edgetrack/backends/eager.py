"""The author's torch model itself, from the bundle's trainable weights.

``eager`` is the reference: on the CPU, in FP32. ``torch-cuda`` is for CUDA machines without
TensorRT: each graph is captured once, with FP16 products, and joins the frame's own CUDA graph.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from edgetrack.backends.cuda import CudaContext, find_cuda_device
from edgetrack.backends.cuda.driver import describe_failure
from edgetrack.backends.cuda.graphs import (
    add_child_graph,
    is_capturing,
    without_garbage_collection,
)
from edgetrack.backends.engine import Buffers, DeviceEngine, Engine, EngineKey
from edgetrack.bundle import ANSWER_NAMES, Bundle, GraphSpec
from edgetrack.errors import (
    BackendUnavailableError,
    DeviceError,
    DeviceMemoryError,
    EngineError,
)
from edgetrack.models.registry import load_model
from edgetrack.models.segmented import SegmentedModel

__all__ = ["EagerBackend", "TorchCudaBackend", "torch_errors", "without_tf32"]

# Torch chooses algorithms and allocates workspaces in its first runs, which cannot be captured.
_NUM_WARM_UP_RUNS = 3
_TYPESTRS = {"uint8": "|u1", "float16": "<f2", "float32": "<f4", "int32": "<i4", "int64": "<i8"}
_FP32_NAMES = frozenset({*ANSWER_NAMES, "template_bbox_cxcywh"})


class EagerBackend:
    """Run a bundle's ``weights.safetensors`` in torch, on the CPU, in FP32; it builds nothing."""

    name = "eager"
    runs_on: Literal["cpu", "cuda"] = "cpu"
    device = 0
    precisions: tuple[str, ...] = ("fp32",)
    engine_suffix = ""

    def __init__(self) -> None:
        self._models: dict[Path, SegmentedModel] = {}

    def key(self, *, model: str, bundle_digest: str, precision: str) -> EngineKey:
        """The key that engines would have."""
        if precision != "fp32":
            raise ValueError(f"precision: expected 'fp32' for backend 'eager', got {precision!r}")
        return EngineKey(
            model=model,
            bundle_digest=bundle_digest,
            precision=precision,
            backend=self.name,
            backend_version=torch.__version__,
            device="cpu",
            arch="any",
        )

    def compile(
        self,
        onnx_path: Path,
        engine_path: Path,
        *,
        precision: str,
        on_step: Callable[[str, float], None] | None = None,
    ) -> None:
        """Refuse: eager runs the weights as they are.

        Raises:
            EngineError: Always.
        """
        raise EngineError("backend eager: expected nothing to build, got a build; track directly")

    def load(self, engine_path: Path, graph: GraphSpec) -> Engine:
        """Refuse, as ``compile`` does."""
        raise EngineError(f"{engine_path}: expected no engines for backend eager; track directly")

    def load_onnx(self, onnx_path: Path, graph: GraphSpec) -> Engine:
        """The model's own function for a graph of the bundle in ``onnx_path``'s folder."""
        folder = onnx_path.parent
        if folder not in self._models:
            self._models[folder] = load_model(Bundle.load(folder, verify=False))
        return _EagerEngine(self._models[folder], graph)


class _EagerEngine:
    """One graph, as a call into the model."""

    def __init__(self, model: SegmentedModel, graph: GraphSpec) -> None:
        self._model, self._graph = model, graph
        self._tensors: dict[str, Tensor] = {}

    def bind(self, buffers: Buffers) -> None:
        """Wrap the buffers; torch shares their memory."""
        self._tensors = {name: torch.from_numpy(array) for name, array in buffers.items()}

    @torch.inference_mode()
    def enqueue(self) -> None:
        """Run once over the bound buffers."""
        _run(self._model, self._graph, self._tensors)

    def close(self) -> None:
        """Nothing to free."""


class TorchCudaBackend:
    """Run a bundle's ``weights.safetensors`` in torch on a CUDA device; it builds nothing.

    Args:
        device: Number of the CUDA device.

    Attributes:
        device: The same.

    Raises:
        BackendUnavailableError: There is no such device, or torch was built without CUDA, or it is
            older than 2.8, which does not give out the graphs that it captures.
    """

    name = "torch-cuda"
    runs_on: Literal["cpu", "cuda"] = "cuda"
    precisions: tuple[str, ...] = ("fp16", "fp32")
    engine_suffix = ""

    def __init__(self, device: int = 0) -> None:
        if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
            raise BackendUnavailableError(
                f"backend 'torch-cuda': expected torch 2.8 or newer, got {torch.__version__}; "
                "install a newer CUDA build of torch, or use --backend onnxruntime"
            )
        if not torch.cuda.is_available() or device >= torch.cuda.device_count():
            raise BackendUnavailableError(
                f"backend 'torch-cuda': expected CUDA device {device}, got "
                f"{torch.cuda.device_count()} in torch {torch.__version__}; install a CUDA build "
                "of torch, or use --backend onnxruntime"
            )
        self.device = device
        self._precision = "fp16"
        self._models: dict[tuple[Path, bool], SegmentedModel] = {}

    def key(self, *, model: str, bundle_digest: str, precision: str) -> EngineKey:
        """The key that engines would have; graphs are loaded in this precision from now on."""
        if precision not in self.precisions:
            raise ValueError(
                f"precision: expected one of {self.precisions} for backend {self.name!r}, got "
                f"{precision!r}"
            )
        self._precision = precision
        found = find_cuda_device(self.device)
        return EngineKey(
            model=model,
            bundle_digest=bundle_digest,
            precision=precision,
            backend=self.name,
            backend_version=torch.__version__,
            device="unknown" if found is None else found.name,
            arch="unknown" if found is None else found.arch,
        )

    def compile(
        self,
        onnx_path: Path,
        engine_path: Path,
        *,
        precision: str,
        on_step: Callable[[str, float], None] | None = None,
    ) -> None:
        """Refuse: the weights are run as they are.

        Raises:
            EngineError: Always.
        """
        raise EngineError(
            f"backend {self.name}: expected nothing to build, got a build; track directly"
        )

    def load(self, engine_path: Path, graph: GraphSpec) -> DeviceEngine:
        """Refuse, as ``compile`` does."""
        raise EngineError(
            f"{engine_path}: expected no engines for backend {self.name}; track directly"
        )

    def load_onnx(self, onnx_path: Path, graph: GraphSpec) -> DeviceEngine:
        """The model's own function for a graph of the bundle in ``onnx_path``'s folder.

        Raises:
            DeviceError: The device failed, or has too little memory for the weights.
        """
        folder, is_half = onnx_path.parent, self._precision == "fp16"
        if (folder, is_half) not in self._models:
            model = load_model(Bundle.load(folder, verify=False))
            with torch_errors(f"{folder.name}: weights"):
                model = model.to(torch.device("cuda", self.device))
                self._models[folder, is_half] = _with_half_products(model) if is_half else model
        return _TorchCudaEngine(
            self._models[folder, is_half], graph, device=self.device, is_half=is_half
        )


class _TorchCudaEngine:
    """One graph of the model, captured over fixed device memory."""

    def __init__(
        self, model: SegmentedModel, graph: GraphSpec, *, device: int, is_half: bool
    ) -> None:
        self.dtypes: Mapping[str, str] = {
            spec.name: "float16" if is_half and _is_token(spec.name, spec.dtype) else spec.dtype
            for spec in (*graph.inputs, *graph.outputs)
        }
        self.scratch_bytes = 0  # torch keeps its own
        self._model, self._graph, self._is_half = model, graph, is_half
        self._device = torch.device("cuda", device)
        self._context: CudaContext | None = None
        self._captured: torch.cuda.CUDAGraph | None = None

    def bind_device(self, addresses: Mapping[str, int], *, scratch: int, stream: int) -> None:
        """Capture a run over these addresses.

        One thread of the process at a time: torch waits for the whole device before it captures,
        which spoils what another thread captures, and TF32 is off in all of torch meanwhile.

        Raises:
            DeviceError: The device failed, has too little memory, or is not that of an address.
        """
        self.close()
        try:
            with torch_errors(self._graph.name), torch.cuda.device(self._device):
                self._context = CudaContext.open(self._device.index)
                self._captured = self._capture(self._wrap(addresses), self._context)
        finally:
            if self._captured is None:
                self.close()

    def enqueue_on(self, stream: int) -> None:
        """Run once; in a stream that captures, the run becomes a child of the graph.

        Raises:
            EngineError: Nothing is bound, or the engine is closed.
            DeviceError: The device failed.
        """
        if self._captured is None:
            raise EngineError(f"{self._graph.name}: expected bind_device() before a run, got none")
        with torch_errors(self._graph.name):
            if is_capturing(stream):
                add_child_graph(stream, self._captured.raw_cuda_graph())
                return
            with torch.cuda.stream(_wrap_stream(stream, self._device)):
                self._captured.replay()

    def close(self) -> None:
        """Free the graph and its memory; calling it twice is fine."""
        self._captured = None
        context, self._context = self._context, None
        if context is not None:
            context.close()

    def _wrap(self, addresses: Mapping[str, int]) -> dict[str, Tensor]:
        """The graph's tensors, over memory that others own."""
        tensors = {}
        for spec in (*self._graph.inputs, *self._graph.outputs):
            address = addresses[spec.name]
            memory = _Memory(address, spec.shape, self.dtypes[spec.name])
            tensors[spec.name] = torch.as_tensor(memory, device=self._device)
            if tensors[spec.name].data_ptr() != address:  # torch copied it from elsewhere
                raise DeviceError(
                    f"{spec.name}: expected memory of CUDA device {self._device.index}, got "
                    f"address {address:#x} of another; give tracker and backend the same device"
                )
        return tensors

    def _capture(self, tensors: dict[str, Tensor], context: CudaContext) -> torch.cuda.CUDAGraph:
        """Warm up and capture a run, on a stream of this engine's own."""
        # Torch's own streams come round after 32, and what shares a stream shares the workspace of
        # cuBLAS, into which two trackers would write at once.
        side = _wrap_stream(context.stream().handle, self._device)
        captured = torch.cuda.CUDAGraph(keep_graph=True)
        run = partial(self._run, tensors)
        with torch.inference_mode(), without_tf32():
            with torch.cuda.stream(side):
                for _ in range(_NUM_WARM_UP_RUNS):
                    run()
            side.synchronize()
            with (
                without_garbage_collection(),
                torch.cuda.graph(captured, stream=side, capture_error_mode="thread_local"),
            ):
                run()
            captured.instantiate()
        return captured

    def _run(self, tensors: dict[str, Tensor]) -> None:
        with torch.autocast("cuda", torch.float16, enabled=self._is_half):
            _run(self._model, self._graph, tensors)


class _Memory:
    """Device memory that torch wraps without a copy."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
        typestr = _TYPESTRS.get(dtype)
        if typestr is None:
            raise EngineError(f"tensor: expected a type that torch shares, got {dtype}")
        self.__cuda_array_interface__: Mapping[str, Any] = {
            "shape": shape,
            "typestr": typestr,
            "data": (address, False),
            "version": 2,
        }


def _wrap_stream(handle: int, device: torch.device) -> Any:
    """A stream of the driver's as one of torch's, which does not free it."""
    make: Any = torch.cuda.ExternalStream
    return make(handle, device=device)


@contextmanager
def torch_errors(what: str) -> Iterator[None]:
    """Raise what torch says of the device as ``DeviceError``; its other errors pass.

    Args:
        what: What failed, in messages.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        is_memory = isinstance(error, torch.OutOfMemoryError)
        if is_memory or re.search("CUDA error: out of memory|_ALLOC_FAILED", text):
            needed = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
            free = re.search(r"of which ([\d.]+ \w+) is free", text)
            raise DeviceMemoryError(
                f"{what}: expected {needed[1] if needed else 'enough'} of device memory, got "
                f"{free[1] + ' free' if free else 'less'}; run fewer trackers at once, choose a "
                "bundle with fewer or smaller segments, or stop other programs that use the memory"
            ) from error
        # Libraries below torch fail with RuntimeError itself, as mistakes of the caller do.
        said = re.search(r"(?:CUDA|CUBLAS|CUDNN|cuDNN).*", text)
        if said is None and not isinstance(error, torch.AcceleratorError):
            raise
        got = said[0] if said else text.partition("\n")[0]
        raise describe_failure(what, got.removeprefix("CUDA error: ")) from error


@contextmanager
def without_tf32() -> Iterator[None]:
    """Keep TF32 off, so that FP32 has products of FP32, and put torch's own settings back."""
    matmul: Any = torch.backends.cuda.matmul
    conv: Any = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
    setting: tuple[str, Any] = ("fp32_precision", "ieee")
    if not hasattr(matmul, "fp32_precision"):  # before torch 2.9; since then they must not be mixed
        setting = ("allow_tf32", False)
    name, off = setting
    before = [(place, getattr(place, name)) for place in (matmul, conv)]
    try:
        for place, _ in before:
            setattr(place, name, off)
        yield
    finally:
        for place, value in before:
            setattr(place, name, value)


def _with_half_products(model: SegmentedModel) -> SegmentedModel:
    """A model whose large products have FP16 weights; autocast runs everything else as it must."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.half()
    return model


def _is_token(name: str, dtype: str) -> bool:
    """Whether a tensor is handed on between segments, as opposed to a crop or an answer."""
    return dtype == "float32" and name not in _FP32_NAMES


def _run(model: SegmentedModel, graph: GraphSpec, tensors: dict[str, Tensor]) -> None:
    """Run the function of one graph over its tensors."""
    kind, _, index = graph.name.partition("_")
    if kind == "template":
        written = model.embed_template(tensors["template"], _template_box(tensors))
    elif kind == "segment":
        written = model.run_segment(int(index), tensors)
    elif kind == "head":
        written = model.run_head(int(index), tensors)
    else:
        written = model.run_update(tensors)
    for name, value in written.items():
        tensors[name].copy_(value)


def _template_box(state: dict[str, Tensor]) -> Tensor:
    """The template's box; families that ignore it have no buffer for it."""
    box = state.get("template_bbox_cxcywh")
    return torch.full((1, 4), 0.5, device=state["template"].device) if box is None else box
