"""Which layers suffer from INT8: each is quantised alone, and the worst are kept in float.

The loss of a quantised chain is what a tracker would notice, on the same crops: how far its boxes
are from the float chain's (1 - IoU) plus how far its uncertainties are, the mean over crops and
exits.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgetrack.boxes import cxcywh_to_xywh, iou_xywh
from edgetrack.bundle import Bundle
from edgetrack.errors import CalibrationError
from edgetrack.quantize.cache import CalibrationCache
from edgetrack.quantize.calibrate import Crops, GraphRun, chain_states, smoothed_graphs
from edgetrack.quantize.int8 import planned_layers
from edgetrack.quantize.layers import Layer
from edgetrack.quantize.qdq import insert_qdq

if TYPE_CHECKING:
    import onnx

__all__ = ["keep_worst_in_float", "rank_layers"]

Float64Array = npt.NDArray[np.float64]


def rank_layers(
    bundle: Bundle,
    cache: CalibrationCache,
    crops: Crops,
    *,
    on_progress: Callable[[float], None] | None = None,
) -> CalibrationCache:
    """Measure the loss that quantising each layer alone causes.

    Args:
        bundle: The float32 bundle.
        cache: Its calibration cache.
        crops: As for ``calibrate``; some 30 are enough.
        on_progress: Called with the fraction of the layers done.

    Returns:
        The cache with ``losses``, the worst layer first.

    Raises:
        CalibrationError: The cache is of another bundle or lacks a tensor, or there are no crops.
    """
    chain = _Chain(bundle, cache, list(crops))
    losses = {}
    for number, (name, layer) in enumerate(chain.layers.items(), start=1):
        losses[name] = float(f"{chain.loss({name: layer}):.6g}")
        if on_progress is not None:
            on_progress(number / len(chain.layers))
    worst_first = sorted(losses, key=lambda name: (-losses[name], name))
    return dataclasses.replace(cache, losses={name: losses[name] for name in worst_first})


def keep_worst_in_float(
    bundle: Bundle, cache: CalibrationCache, crops: Crops, *, max_loss: float
) -> CalibrationCache:
    """Keep as many of the worst layers in float as it takes for the whole chain's loss to hold.

    Args:
        bundle: The float32 bundle.
        cache: Its calibration cache, from ``rank_layers``.
        crops: As for ``rank_layers``.
        max_loss: The loss that the quantised chain may have.

    Returns:
        The cache with ``float_layers``; what it kept before is asked again.

    Raises:
        CalibrationError: The cache is of another bundle or lacks a tensor, a layer is not ranked,
            or there are no crops.
        ValueError: ``max_loss`` is negative.
    """
    if not max_loss >= 0:
        raise ValueError(f"max_loss: expected a number from 0 on, got {max_loss!r}")
    chain = _Chain(bundle, cache, list(crops))
    if unranked := sorted(chain.layers.keys() - cache.losses.keys()):
        raise CalibrationError(
            f"calibration cache of {cache.model}: expected a loss of {unranked[0]}, got none; "
            "rank its layers first"
        )
    quantized = dict(chain.layers)
    kept = []
    for name in cache.losses:
        if chain.loss(quantized) <= max_loss:
            break
        kept.append(name)
        quantized.pop(name, None)
    return dataclasses.replace(cache, float_layers=tuple(kept))


class _Chain:
    """The chain of a bundle's graphs, with some layers quantised, against the float chain.

    Attributes:
        layers: ``<graph>/<layer>`` → a layer that INT8 pays for.
    """

    def __init__(self, bundle: Bundle, cache: CalibrationCache, crops: Crops) -> None:
        cache = dataclasses.replace(cache, float_layers=())
        self._bundle, self._cache, self._crops = bundle, cache, crops
        self._models = smoothed_graphs(bundle, cache)
        self._float = {name: GraphRun(model) for name, model in self._models.items()}
        self.layers: dict[str, Layer] = {
            f"{graph}/{layer.name}": layer
            for graph, model in self._models.items()
            for layer in planned_layers(model, graph, cache)
            if not layer.reason
        }
        self._expected = self._answers(self._float)

    def loss(self, layers: Mapping[str, Layer]) -> float:
        """What quantising these layers costs, and no others."""
        runs = dict(self._float)
        for graph, model in self._models.items():
            own = [layer for name, layer in layers.items() if name.startswith(f"{graph}/")]
            if own:
                runs[graph] = GraphRun(self._quantized(graph, model, own))
        boxes, uncertainty = self._answers(runs)
        expected_boxes, expected_uncertainty = self._expected
        away = 1 - iou_xywh(cxcywh_to_xywh(boxes), cxcywh_to_xywh(expected_boxes))
        return float((away + np.abs(uncertainty - expected_uncertainty)).mean())

    def _quantized(
        self, graph: str, model: "onnx.ModelProto", layers: list[Layer]
    ) -> "onnx.ModelProto":
        tensors = [tensor for layer in layers for tensor in layer.inputs]
        return insert_qdq(model, layers, self._cache.ranges_of(graph, tensors))

    def _answers(self, runs: Mapping[str, GraphRun]) -> tuple[Float64Array, Float64Array]:
        """Boxes ``(N, 4)`` cxcywh and uncertainties ``(N,)`` of all exits on all crops."""
        boxes, uncertainty = [], []
        answering = {graph.name for graph in self._bundle.heads or self._bundle.segments}
        for _, graph, state in chain_states(self._bundle, runs, self._crops):
            if graph in answering:
                boxes.append(state["bbox_cxcywh"][0].astype(np.float64))
                uncertainty.append(float(state["uncertainty"][0]))
        if not boxes:
            raise CalibrationError("rank_layers: expected crops, got none; give more frames")
        return np.stack(boxes), np.array(uncertainty)
