"""Give ONNX Runtime's CPU provider channels in multiples of sixteen; an exact rewrite.

Its blocked layout takes no others in poolings, and in depthwise convolutions no odd ones: one of 58
channels runs group by group, seven times as slowly as one of 64, with a reorder before and behind.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from edgetrack.quantize.layers import GraphIndex
from edgetrack.quantize.plain import plain_copy

if TYPE_CHECKING:
    import onnx

__all__ = ["pad_channels"]

_BLOCK = 16  # of AVX-512; 8 of AVX2
_DEPTHWISE_BLOCK = 4
_CHANNELWISE = ("LeakyRelu", "Relu")
_POOLINGS = ("AveragePool", "MaxPool")


def pad_channels(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Pad channels with zeros to a multiple of sixteen, where depthwise or pooling nodes pass them.

    Only where a convolution writes those channels and only convolutions read them in the end, so
    that nothing else sees the padding.

    Args:
        model: A graph; not written to.
    """
    padded = plain_copy(model)
    finder = _Finder(padded.graph)
    changed: set[str] = set()
    for node in padded.graph.node:
        passage = finder.passage_from(node)
        if passage is not None:
            _pad(finder.index, passage)
            changed |= passage.tensors
    known = [value for value in padded.graph.value_info if value.name not in changed]
    del padded.graph.value_info[:]
    padded.graph.value_info.extend(known)
    return padded


class _Passage:
    """Nodes between which the same channels pass.

    Attributes:
        writer: The convolution that writes them.
        depthwise: Depthwise convolutions that pass them on.
        readers: Convolutions that read them.
        tensors: What holds them.
        num_channels: How many they are.
    """

    def __init__(self, writer: Any, num_channels: int) -> None:
        self.writer, self.num_channels = writer, num_channels
        self.depthwise: list[Any] = []
        self.readers: list[Any] = []
        self.tensors: set[str] = set()


class _Finder:
    def __init__(self, graph: "onnx.GraphProto") -> None:
        self.index = GraphIndex(graph)
        self._nodes = graph.node
        self._written = {value.name for value in graph.output}

    def passage_from(self, writer: Any) -> _Passage | None:
        """The passage that begins at a convolution, if padding it pays and shows nowhere."""
        if not self._is_dense(writer):
            return None
        num_channels = self.index.weights[writer.input[1]].dims[0]
        passage = _Passage(writer, num_channels)
        pays = False
        waiting = [writer.output[0]]
        while waiting and num_channels % _BLOCK:
            name = waiting.pop()
            passage.tensors.add(name)
            if name in self._written:
                return None
            for reader in (self._nodes[i] for i in self.index.readers.get(name, [])):
                is_depthwise = self._is_depthwise(reader, num_channels)
                if is_depthwise:
                    passage.depthwise.append(reader)
                elif self._is_dense(reader) and reader.input[0] == name:
                    passage.readers.append(reader)
                    continue
                elif reader.op_type not in (*_CHANNELWISE, *_POOLINGS):
                    return None
                is_odd = is_depthwise and num_channels % _DEPTHWISE_BLOCK != 0
                pays = pays or is_odd or reader.op_type in _POOLINGS
                waiting.append(reader.output[0])
        return passage if pays else None

    def _is_dense(self, node: Any) -> bool:
        return node.op_type == "Conv" and _group(node) == 1 and self._has_own_weights(node)

    def _is_depthwise(self, node: Any, num_channels: int) -> bool:
        if node.op_type != "Conv" or not self._has_own_weights(node):
            return False
        return _group(node) == num_channels == int(self.index.weights[node.input[1]].dims[0])

    def _has_own_weights(self, node: Any) -> bool:
        """Whether all parameters are constants that this node alone reads."""
        index = self.index
        return all(n in index.weights and len(index.readers[n]) == 1 for n in node.input[1:])


def _group(node: Any) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)


def _pad(index: GraphIndex, passage: _Passage) -> None:
    from onnx import numpy_helper

    count = -passage.num_channels % _BLOCK

    def pad(name: str, axis: int) -> None:
        values = numpy_helper.to_array(index.weights[name])
        widths = [(0, count if a == axis else 0) for a in range(values.ndim)]
        index.weights[name].CopyFrom(numpy_helper.from_array(np.pad(values, widths), name))

    for node in (passage.writer, *passage.depthwise):
        for name in node.input[1:]:
            pad(name, 0)
    for node in passage.readers:
        pad(node.input[1], 1)
    for node in passage.depthwise:
        for attribute in node.attribute:
            if attribute.name == "group":
                attribute.i += count
