"""Put explicit Q/DQ around the layers that INT8 pays for; everything else stays in float.

Symmetric, zero points 0: one scale per activation from the calibration cache, one per output
channel of a weight, which is stored as INT8. A DQ stands directly before its product: TensorRT
refuses, on some devices, one that a reshape separates from it. LayerNorm, softmax, GELU, residuals,
what graphs hand on, the last layers of heads and the decoding are never quantised.

From this one graph come two typed twins with the same scales: FP32 around the Q/DQ for ONNX
Runtime (``ort_twin``), FP16 around it for TensorRT (``fp16.to_fp16``).
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgetrack.quantize.layers import Layer
from edgetrack.quantize.plain import import_graphsurgeon, plain_copy

if TYPE_CHECKING:
    import onnx

__all__ = ["INT8_MAX", "insert_qdq", "quantized_weight", "scale_of"]

INT8_MAX = 127
_FP16_TINY = np.float32(np.finfo(np.float16).tiny)


def insert_qdq(
    model: "onnx.ModelProto", layers: Iterable[Layer], ranges: Mapping[str, float]
) -> "onnx.ModelProto":
    """Quantise layers of a float32 graph; its inputs and outputs stay as they are.

    Args:
        model: A float32 graph without control flow; not written to.
        layers: The layers to quantise, from ``layers.find_layers`` of this graph.
        ranges: Activation → the largest magnitude that INT8 shall represent.

    Returns:
        The graph with Q/DQ nodes, still float32 elsewhere.

    Raises:
        KeyError: An activation of the layers has no range.
        ValueError: The graph holds control flow.
        BackendUnavailableError: onnx or onnx-graphsurgeon is not installed.
    """
    gs = import_graphsurgeon()
    import onnx

    graph = gs.import_onnx(plain_copy(model))
    inserter = _Inserter(gs, graph, ranges)
    for layer in layers:
        inserter.quantize(layer)
    graph.cleanup().toposort()
    quantized = gs.export_onnx(graph)
    quantized.ir_version = model.ir_version
    return onnx.shape_inference.infer_shapes(quantized, check_type=True, strict_mode=True)


def scale_of(amax: float | npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The step of INT8 for magnitudes up to ``amax``: a float16 number, so that both twins have it.

    A scale of zero is refused by TensorRT; the smallest is FP16's smallest normal number.
    """
    steps = np.maximum(np.asarray(amax, np.float32) / INT8_MAX, _FP16_TINY)
    return np.asarray(steps.astype(np.float16).astype(np.float32))


def quantized_weight(
    weight: npt.NDArray[np.float32], *, channel_axis: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round a weight to INT8 with one scale per output channel.

    Returns:
        The INT8 weight, and its scales ``(channels,)``.
    """
    others = tuple(axis for axis in range(weight.ndim) if axis != channel_axis)
    scales = scale_of(np.abs(weight).max(others))
    steps = weight / np.expand_dims(scales, others)
    return np.clip(np.rint(steps), -INT8_MAX, INT8_MAX).astype(np.int8), scales


class _Inserter:
    """Quantises layers of one graph, each activation and each weight once."""

    def __init__(self, gs: Any, graph: Any, ranges: Mapping[str, float]) -> None:
        self._gs, self._graph, self._ranges = gs, graph, ranges
        self._nodes = {node.outputs[0].name: node for node in graph.nodes}
        self._tensors = graph.tensors()
        self._zero = gs.Constant("int8_zero", np.zeros((), np.int8))
        self._done: dict[str, Any] = {}

    def quantize(self, layer: Layer) -> None:
        node = self._nodes[layer.output]
        inputs = list(node.inputs)
        for slot, name in enumerate(layer.inputs):
            inputs[slot] = self._activation(name)
        if layer.weight:
            inputs[1] = self._weight(layer)
        node.inputs = inputs

    def _activation(self, name: str) -> Any:
        if name not in self._done:
            scale = self._gs.Constant(f"{name}_scale", scale_of(self._ranges[name]))
            steps = self._gs.Variable(f"{name}_int8")
            operands = [self._tensors[name], scale, self._zero]
            self._append("QuantizeLinear", operands, steps, name)
            self._done[name] = self._dequantized(name, [steps, scale, self._zero])
        return self._done[name]

    def _weight(self, layer: Layer) -> Any:
        name = f"{layer.weight}_{layer.channel_axis}"
        if name not in self._done:
            values, scales = quantized_weight(
                self._tensors[layer.weight].values, channel_axis=layer.channel_axis
            )
            operands = [
                self._gs.Constant(f"{name}_int8", values),
                self._gs.Constant(f"{name}_scale", scales),
                self._gs.Constant(f"{name}_zero", np.zeros(len(scales), np.int8)),
            ]
            self._done[name] = self._dequantized(name, operands, axis=layer.channel_axis)
        return self._done[name]

    def _dequantized(self, name: str, operands: list[Any], **attributes: int) -> Any:
        output = self._gs.Variable(f"{name}_dequantized")
        self._append("DequantizeLinear", operands, output, name, **attributes)
        return output

    def _append(
        self, op: str, inputs: list[Any], output: Any, name: str, **attributes: int
    ) -> None:
        node = self._gs.Node(op, f"{name}/{op}", attributes, inputs, [output])
        self._graph.nodes.append(node)
