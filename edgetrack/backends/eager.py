"""The reference backend: the author's torch model itself, from the bundle's trainable weights."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from edgetrack.backends.engine import Buffers, Engine, EngineKey
from edgetrack.bundle import Bundle, GraphSpec
from edgetrack.errors import EngineError
from edgetrack.models.registry import load_model
from edgetrack.models.segmented import SegmentedModel

__all__ = ["EagerBackend"]


class EagerBackend:
    """Run a bundle's ``weights.safetensors`` in torch, on the CPU, in FP32; it builds nothing."""

    name = "eager"
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
        state = self._tensors
        if self._graph.name == "template":
            written = self._model.embed_template(state["template"], _template_box(state))
        else:
            written = self._model.run_segment(int(self._graph.name.split("_")[1]), state)
        for name, value in written.items():
            state[name].copy_(value)

    def close(self) -> None:
        """Nothing to free."""


def _template_box(state: dict[str, Tensor]) -> Tensor:
    """The template's box; families that ignore it have no buffer for it."""
    return state.get("template_bbox_cxcywh", torch.full((1, 4), 0.5))
