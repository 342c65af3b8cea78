"""Which nodes of a graph are layers, where decoding begins, and which layers INT8 pays for.

Read off the graph alone, for any family: a layer multiplies with weights; what lies between the
last layers and the answer decodes. ``Layer.reason`` says why a layer is not INT8.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgetrack.bundle import ANSWER_NAMES

if TYPE_CHECKING:
    import onnx

__all__ = ["FP32_NAMES", "GraphIndex", "Layer", "find_layers"]

FP32_NAMES = frozenset({*ANSWER_NAMES, "template_bbox_cxcywh"})
_LAYERS = frozenset(
    {
        "Attention",
        "BatchNormalization",
        "Conv",
        "ConvTranspose",
        "Einsum",
        "Gemm",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "MatMul",
    }
)
# A product with at most this many columns decodes (an expectation over bins); wider is a layer.
_MAX_DECODED_COLUMNS = 4
_MIN_CHANNELS = 16
# Below these, converting its input and output costs a convolution as much as INT8 gives, measured
# one by one on ONNX Runtime: 3x3 convolutions of 64 channels gain 4 % of a segment, 1x1 nothing.
_MIN_CONV_MACS = 2_000_000
_MIN_CONV_MACS_PER_ELEMENT = 250
_PARAMETER_ENDINGS = (".weight_bias", ".weight", ".bias")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One product of a graph that INT8 kernels exist for.

    Attributes:
        name: Its parameters' name, such as ``blocks.3.attn.qkv``, else its node's.
        kind: ``linear``, ``conv`` or ``attention`` (a product of two activations).
        inputs: The activations that it multiplies; two for ``attention``.
        output: What it writes.
        weight: Its weight; empty for ``attention``.
        channel_axis: Axis of the weight's output channels.
        reason: Why it stays in float; empty if INT8 pays.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    output: str
    weight: str = ""
    channel_axis: int = 0
    reason: str = ""


class GraphIndex:
    """Who writes and who reads each tensor of a graph.

    Args:
        graph: Without control flow; not written to, and not to be written to meanwhile.

    Attributes:
        weights: Initialisers by name.
        producers: Tensor name → index of the node that writes it.
        readers: Tensor name → indices of the nodes that read it.
    """

    def __init__(self, graph: "onnx.GraphProto") -> None:
        self.weights: Mapping[str, Any] = {i.name: i for i in graph.initializer}
        self.producers = {o: i for i, n in enumerate(graph.node) for o in n.output}
        self.readers: dict[str, list[int]] = {}
        self._nodes = graph.node
        for index, node in enumerate(graph.node):
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(index)

    def is_layer(self, node: "onnx.NodeProto") -> bool:
        """Whether a node is a layer, rather than a step of decoding."""
        weight = self.weights.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type in ("Gemm", "MatMul") and weight is not None:
            return len(weight.dims) > 1 and min(weight.dims) > _MAX_DECODED_COLUMNS
        return node.op_type in _LAYERS

    def split_at_last_layers(self) -> tuple[set[int], set[int]]:
        """Indices of the nodes between the last layers and the answer, and of those layers."""
        decoding: set[int] = set()
        last: set[int] = set()
        waiting: list[str] = list(ANSWER_NAMES)
        while waiting:
            index = self.producers.get(waiting.pop())
            if index is None or index in decoding:
                continue
            node = self._nodes[index]
            if not self.is_layer(node) or set(node.output) & FP32_NAMES:
                decoding.add(index)
                waiting.extend(node.input)
            else:
                last.add(index)
        return decoding, last


def find_layers(model: "onnx.ModelProto", *, with_attention: bool = False) -> tuple[Layer, ...]:
    """All products of a float graph, in its order, each with the reason if it stays in float.

    Args:
        model: A float32 graph without control flow; not written to.
        with_attention: Quantise the two products of each attention as well.
    """
    return _Finder(model, with_attention=with_attention).find()


class _Finder:
    """Looks at the products of one graph."""

    def __init__(self, model: "onnx.ModelProto", *, with_attention: bool) -> None:
        import onnx

        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self._nodes = inferred.node
        self._index = GraphIndex(inferred)
        self._with_attention = with_attention
        values = (*inferred.input, *inferred.output, *inferred.value_info)
        self._shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        self._decoding, self._last = self._index.split_at_last_layers()
        self._handed_on_names = {value.name for value in inferred.output} - FP32_NAMES

    def find(self) -> tuple[Layer, ...]:
        layers = []
        num_named: dict[str, int] = {}
        for index, node in enumerate(self._nodes):
            if index in self._decoding or node.op_type not in ("Conv", "Gemm", "MatMul"):
                continue
            layer = (
                self._conv(index, node) if node.op_type == "Conv" else self._product(index, node)
            )
            count = num_named[layer.name] = num_named.get(layer.name, 0) + 1
            if count > 1:  # two layers share their weights
                layer = dataclasses.replace(layer, name=f"{layer.name}#{count}")
            layers.append(layer)
        return tuple(layers)

    def _conv(self, index: int, node: "onnx.NodeProto") -> Layer:
        attributes = {a.name: a for a in node.attribute}
        weight = self._index.weights.get(node.input[1])
        return Layer(
            name=self._name(node),
            kind="conv",
            inputs=(node.input[0],),
            output=node.output[0],
            weight=node.input[1],
            reason=self._reason(index, weight, lambda dims: _conv_reason(dims, attributes))
            or self._too_small(node, weight)
            or self._handed_on(node),
        )

    def _product(self, index: int, node: "onnx.NodeProto") -> Layer:
        weight = self._index.weights.get(node.input[1])
        if weight is None and not any(name in self._index.weights for name in node.input):
            return self._attention(node)
        is_transposed = any(a.name == "transB" and a.i for a in node.attribute)
        return Layer(
            name=self._name(node),
            kind="linear",
            inputs=(node.input[0],),
            output=node.output[0],
            weight=node.input[1],
            channel_axis=0 if is_transposed else 1,
            reason=self._reason(index, weight, lambda dims: _linear_reason(dims, node)),
        )

    def _attention(self, node: "onnx.NodeProto") -> Layer:
        reason = "a product of two activations"
        if self._is_beside_softmax(node):
            reason = "" if self._with_attention else "attention stays fused in float"
        return Layer(
            name=node.name or node.output[0],
            kind="attention",
            inputs=tuple(node.input[:2]),
            output=node.output[0],
            reason=reason,
        )

    def _is_beside_softmax(self, node: "onnx.NodeProto") -> bool:
        around = [self._index.producers.get(name) for name in node.input[:2]]
        around += self._index.readers.get(node.output[0], [])
        return any(i is not None and self._nodes[i].op_type == "Softmax" for i in around)

    def _reason(self, index: int, weight: Any, of_its_kind: Any) -> str:
        if weight is None:
            return "its weight is computed"
        if index in self._last:
            return "a last layer of a head"
        return str(of_its_kind(list(weight.dims)))

    def _too_small(self, node: "onnx.NodeProto", weight: Any) -> str:
        """Why INT8 does not pay for a convolution that has INT8 kernels."""
        if weight is None:
            return ""
        written = self._shapes.get(node.output[0], [])
        read = self._shapes.get(node.input[0], [])
        num_elements = math.prod(written) + math.prod(read)
        macs = math.prod(written) * math.prod(weight.dims[1:])
        if macs < _MIN_CONV_MACS or macs < _MIN_CONV_MACS_PER_ELEMENT * num_elements:
            return "too few products for what it reads and writes"
        return ""

    def _handed_on(self, node: "onnx.NodeProto") -> str:
        """Why a convolution stays in float whose result leaves the graph without a layer behind.

        ONNX Runtime has no INT8 convolution that writes float, and what graphs hand on is float.
        """
        waiting, seen = list(node.output), set(node.output)
        while waiting:
            name = waiting.pop()
            if name in self._handed_on_names:
                return "its result is handed to the next graph"
            for reader in (self._nodes[i] for i in self._index.readers.get(name, [])):
                if not self._index.is_layer(reader):
                    waiting.extend(set(reader.output) - seen)
                    seen.update(reader.output)
        return ""

    def _name(self, node: "onnx.NodeProto") -> str:
        """The name of a node's parameters: of its weight, its bias, or the bias added next."""
        names = list(node.input[1:])
        for reader in self._index.readers.get(node.output[0], []):
            if self._nodes[reader].op_type == "Add":
                names.extend(self._nodes[reader].input)
        for ending in _PARAMETER_ENDINGS:
            for name in names:
                if name in self._index.weights and name.endswith(ending):
                    return str(name).removesuffix(ending).removeprefix("model.")
        return node.name or str(node.output[0])


def _conv_reason(dims: list[int], attributes: Mapping[str, Any]) -> str:
    if "group" in attributes and attributes["group"].i != 1:
        return "a depthwise or grouped convolution"
    if min(dims[:2]) < _MIN_CHANNELS:
        return f"fewer than {_MIN_CHANNELS} channels"
    return ""


def _linear_reason(dims: list[int], node: "onnx.NodeProto") -> str:
    if len(dims) != 2:
        return "its weight is no matrix"
    if min(dims) < _MIN_CHANNELS:
        return f"fewer than {_MIN_CHANNELS} channels"
    attributes = {a.name: a for a in node.attribute}
    is_scaled = any(n in attributes and attributes[n].f != 1 for n in ("alpha", "beta"))
    if is_scaled or ("transA" in attributes and attributes["transA"].i):
        return "a scaled or transposed product"
    return ""
