"""The author's torch model itself, from the bundle's trainable weights.

``eager`` is the reference: on the CPU, in FP32. ``torch-cuda`` is for CUDA machines without
TensorRT: each graph is captured once, with FP16 products, and joins the frame's own CUDA graph.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from edgetrack.backends.cuda import find_cuda_device
from edgetrack.backends.cuda.graphs import add_child_graph, is_capturing
from edgetrack.backends.engine import Buffers, DeviceEngine, Engine, EngineKey
from edgetrack.bundle import ANSWER_NAMES, Bundle, GraphSpec
from edgetrack.errors import BackendUnavailableError, EngineError
from edgetrack.models.registry import load_model
from edgetrack.models.segmented import SegmentedModel

__all__ = ["EagerBackend", "TorchCudaBackend"]

# Torch chooses algorithms and allocates workspaces in its first runs, which cannot be captured.
_NUM_WARM_UP_RUNS = 3
_FP32_NAMES = frozenset({*ANSWER_NAMES, "template_bbox_cxcywh"})


class EagerBackend:
    """Run a bundle's ``weights.safetensors`` in torch, on the CPU, in FP32; it builds nothing."""

    name = "eager"
    runs_on: Literal["cpu", "cuda"] = "cpu"
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

    Raises:
        BackendUnavailableError: There is no such device, or torch was built without CUDA.
    """

    name = "torch-cuda"
    runs_on: Literal["cpu", "cuda"] = "cuda"
    precisions: tuple[str, ...] = ("fp16", "fp32")
    engine_suffix = ""

    def __init__(self, device: int = 0) -> None:
        if not torch.cuda.is_available() or device >= torch.cuda.device_count():
            raise BackendUnavailableError(
                f"backend 'torch-cuda': expected CUDA device {device}, got "
                f"{torch.cuda.device_count()} in torch {torch.__version__}; install a CUDA build "
                "of torch, or use --backend onnxruntime"
            )
        self._device = torch.device("cuda", device)
        self._precision = "fp16"
        self._models: dict[Path, SegmentedModel] = {}

    def key(self, *, model: str, bundle_digest: str, precision: str) -> EngineKey:
        """The key that engines would have; graphs are loaded in this precision from now on."""
        if precision not in self.precisions:
            raise ValueError(
                f"precision: expected one of {self.precisions} for backend {self.name!r}, got "
                f"{precision!r}"
            )
        self._precision = precision
        found = find_cuda_device(self._device.index)
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
        """The model's own function for a graph of the bundle in ``onnx_path``'s folder."""
        folder = onnx_path.parent
        if folder not in self._models:
            model = load_model(Bundle.load(folder, verify=False)).to(self._device)
            self._models[folder] = _with_half_products(model) if self._is_half else model
        return _TorchCudaEngine(self._models[folder], graph, self._device, is_half=self._is_half)

    @property
    def _is_half(self) -> bool:
        return self._precision == "fp16"


class _TorchCudaEngine:
    """One graph of the model, captured over fixed device memory."""

    def __init__(
        self, model: SegmentedModel, graph: GraphSpec, device: torch.device, *, is_half: bool
    ) -> None:
        self.dtypes: Mapping[str, str] = {
            spec.name: "float16" if is_half and _is_token(spec.name, spec.dtype) else spec.dtype
            for spec in (*graph.inputs, *graph.outputs)
        }
        self.scratch_bytes = 0  # torch keeps its own
        self._model, self._graph, self._device, self._is_half = model, graph, device, is_half
        self._captured: torch.cuda.CUDAGraph | None = None

    def bind_device(self, addresses: Mapping[str, int], *, scratch: int, stream: int) -> None:
        """Capture a run over these addresses."""
        specs = (*self._graph.inputs, *self._graph.outputs)
        tensors = {
            spec.name: torch.as_tensor(
                _Memory(addresses[spec.name], spec.shape, self.dtypes[spec.name]),
                device=self._device,
            )
            for spec in specs
        }
        with torch.cuda.device(self._device), torch.inference_mode():
            run = partial(self._run, tensors)
            side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # stub gap
            with torch.cuda.stream(side):
                for _ in range(_NUM_WARM_UP_RUNS):
                    run()
            side.synchronize()
            captured = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(captured, stream=side, capture_error_mode="thread_local"):
                run()
            captured.instantiate()
        self._captured = captured

    def enqueue_on(self, stream: int) -> None:
        """Run once; in a stream that captures, the run becomes a child of the graph.

        Raises:
            EngineError: Nothing is bound, or the engine is closed.
        """
        if self._captured is None:
            raise EngineError(f"{self._graph.name}: expected bind_device() before a run, got none")
        if is_capturing(stream):
            add_child_graph(stream, self._captured.raw_cuda_graph())
            return
        make_stream: Any = torch.cuda.ExternalStream
        own = make_stream(stream, device=self._device)
        with torch.cuda.stream(own):
            self._captured.replay()

    def close(self) -> None:
        """Free the graph and its memory; calling it twice is fine."""
        self._captured = None

    def _run(self, tensors: dict[str, Tensor]) -> None:
        with torch.autocast("cuda", torch.float16, enabled=self._is_half):
            _run(self._model, self._graph, tensors)


class _Memory:
    """Device memory that torch wraps without a copy."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
        typestr = {"uint8": "|u1", "float16": "<f2", "float32": "<f4", "int32": "<i4"}.get(dtype)
        if typestr is None:
            raise EngineError(f"tensor: expected a type that torch shares, got {dtype}")
        self.__cuda_array_interface__: Mapping[str, Any] = {
            "shape": shape,
            "typestr": typestr,
            "data": (address, False),
            "version": 2,
        }


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
    if graph.name == "template":
        written = model.embed_template(tensors["template"], _template_box(tensors))
    else:
        written = model.run_segment(int(graph.name.split("_")[1]), tensors)
    for name, value in written.items():
        tensors[name].copy_(value)


def _template_box(state: dict[str, Tensor]) -> Tensor:
    """The template's box; families that ignore it have no buffer for it."""
    box = state.get("template_bbox_cxcywh")
    return torch.full((1, 4), 0.5, device=state["template"].device) if box is None else box
