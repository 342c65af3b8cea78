"""Cast a graph to FP16, all but the way from a head's logits to its answer.

The trunk and the tokens that graphs hand on become FP16. The decoding behind the last layer
(window, softmax, expectation, entropy) stays FP32, and so do operators whose result easily leaves
FP16's range. ``onnxruntime.transformers.float16`` is not used: it returns to FP16 behind every
node that it keeps in FP32, so a chain of decoding steps would be rounded at each link.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgetrack.errors import EngineBuildError
from edgetrack.quantize.layers import FP32_NAMES, GraphIndex
from edgetrack.quantize.plain import plain_copy, require_packages

if TYPE_CHECKING:
    import onnx

__all__ = ["cast_file_to_fp16", "to_fp16"]

_FP32_OPERATORS = frozenset(
    {
        # The result easily leaves FP16's range.
        "CumSum",
        "Exp",
        "LpNormalization",
        "Pow",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceSum",
        "ReduceSumSquare",
        # The result is float32 unless an attribute says otherwise.
        "ConstantOfShape",
        "EyeLike",
        "Range",
    }
)
_FP32_SLOTS = {"Resize": (1, 2)}
_HALF = np.finfo(np.float16)


def cast_file_to_fp16(source: Path, target: Path) -> None:
    """Read an ONNX file, cast it as ``to_fp16`` does, and write it to ``target``.

    Raises:
        BackendUnavailableError: The package onnx is not installed.
        EngineBuildError: The graph cannot be cast.
    """
    require_packages("onnx")
    import onnx

    try:
        model = to_fp16(onnx.load(source))
    except (ValueError, onnx.shape_inference.InferenceError) as error:
        raise EngineBuildError(f"{source}: {error}; export the bundle again") from error
    onnx.save(model, target)


def to_fp16(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Cast a float32 graph to FP16; names of tensors stay.

    The answer (``bbox_cxcywh``, ``score``, ``uncertainty``) and ``template_bbox_cxcywh`` stay
    float32, every other float input and output becomes float16, and uint8 inputs stay.
    Initialisers beyond FP16's range are clamped to it; none but zero becomes zero.

    Args:
        model: A float32 graph without control flow; not written to.

    Returns:
        The cast graph, with its types and shapes inferred anew.

    Raises:
        ValueError: The graph holds control flow, or float16 tensors already.
        BackendUnavailableError: The package onnx is not installed.
    """
    typed = plain_copy(model)
    import onnx

    _Caster(onnx, typed).cast()
    # Strict inference is the check that no operator reads two float types at once.
    return onnx.shape_inference.infer_shapes(typed, check_type=True, strict_mode=True)


class _Caster:
    """Decides in which type each node computes, then puts casts between the types."""

    def __init__(self, onnx: Any, model: "onnx.ModelProto") -> None:
        self._onnx = onnx
        self._fp16, self._fp32 = int(onnx.TensorProto.FLOAT16), int(onnx.TensorProto.FLOAT)
        self._graph = model.graph
        self._floats = self._float_tensors(model)
        self._weights = {i.name: i for i in self._graph.initializer if i.name in self._floats}
        self._index = GraphIndex(model.graph)
        decoding, _ = self._index.split_at_last_layers()
        self._fp32_nodes = decoding | {
            i for i, n in enumerate(self._graph.node) if n.op_type in _FP32_OPERATORS
        }
        self._follow_fp32_forward()
        self._types: dict[str, int] = {}
        self._copies: dict[tuple[str, int], str] = {}
        self._nodes: list[onnx.NodeProto] = []

    def cast(self) -> None:
        """Rewrite the graph in place."""
        self._cast_weights()
        for value in (*self._graph.input, *self._graph.output):
            if value.name in self._floats:
                elem_type = self._fp32 if value.name in FP32_NAMES else self._fp16
                value.type.tensor_type.elem_type = self._types[value.name] = elem_type
        for index, node in enumerate(self._graph.node):
            self._cast_node(node, self._fp32 if index in self._fp32_nodes else self._fp16)
        del self._graph.node[:], self._graph.value_info[:]
        self._graph.node.extend(self._nodes)

    def _float_tensors(self, model: "onnx.ModelProto") -> set[str]:
        graph = self._onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        types = {i.name: i.data_type for i in graph.initializer}
        for value in (*graph.input, *graph.output, *graph.value_info):
            types[value.name] = value.type.tensor_type.elem_type
        if halves := sorted(n for n, t in types.items() if t == self._fp16):
            raise ValueError(f"expected a float32 graph, got float16 tensors: {halves[:3]}")
        return {n for n, t in types.items() if t == self._fp32}

    def _follow_fp32_forward(self) -> None:
        """What reads nothing but FP32 stays FP32 up to the next layer; a norm divides in FP32."""
        fp32 = {v.name for v in self._graph.input if v.name in FP32_NAMES}
        for index, node in enumerate(self._graph.node):
            read = [n in fp32 for n in node.input if n in self._floats and n not in self._weights]
            stays = read and all(read) and not self._index.is_layer(node)
            if stays or (node.op_type == "Div" and any(read)):
                self._fp32_nodes.add(index)
            if index in self._fp32_nodes:
                fp32.update(node.output)

    def _cast_weights(self) -> None:
        """Round initialisers that FP16 nodes read; FP32 nodes get a copy with all digits."""
        readers: dict[str, set[int]] = {}
        for index, node in enumerate(self._graph.node):
            for slot, name in enumerate(node.input):
                is_fp32 = index in self._fp32_nodes or slot in _FP32_SLOTS.get(node.op_type, ())
                readers.setdefault(name, set()).add(self._fp32 if is_fp32 else self._fp16)
        for name, weight in self._weights.items():
            self._types[name] = self._fp32
            if self._fp16 not in readers.get(name, ()):
                continue
            if self._fp32 in readers[name]:
                copy = self._copies[name, self._fp32] = f"{name}_fp32"
                self._graph.initializer.add().CopyFrom(weight)
                self._graph.initializer[-1].name = copy
            rounded = _rounded(self._onnx.numpy_helper.to_array(weight))
            weight.CopyFrom(self._onnx.numpy_helper.from_array(rounded, name))
            self._types[name] = self._fp16

    def _cast_node(self, node: "onnx.NodeProto", compute: int) -> None:
        """Append a node that computes in the given type, and the casts that it needs."""
        if node.op_type == "Cast":
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == self._fp32:
                    attribute.i = compute
        else:
            for slot, name in enumerate(node.input):
                if name in self._floats:
                    is_fp32 = slot in _FP32_SLOTS.get(node.op_type, ())
                    node.input[slot] = self._as_type(name, self._fp32 if is_fp32 else compute)
        self._nodes.append(node)
        for slot, name in enumerate(node.output):
            if name in self._floats and self._types.setdefault(name, compute) != compute:
                node.output[slot] = self._copies[name, compute] = self._copy_name(name, compute)
                self._append_cast(node.output[slot], name, self._types[name])

    def _as_type(self, name: str, wanted: int) -> str:
        """The name of a tensor in the wanted type; its first reader casts it."""
        if self._types[name] == wanted:
            return name
        if (name, wanted) not in self._copies:
            self._copies[name, wanted] = self._copy_name(name, wanted)
            self._append_cast(name, self._copies[name, wanted], wanted)
        return self._copies[name, wanted]

    def _copy_name(self, name: str, elem_type: int) -> str:
        return f"{name}_fp32" if elem_type == self._fp32 else f"{name}_fp16"

    def _append_cast(self, source: str, target: str, elem_type: int) -> None:
        make_node = self._onnx.helper.make_node
        node = make_node("Cast", [source], [target], name=f"cast_to_{target}", to=elem_type)
        self._nodes.append(node)


def _rounded(array: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """Round to float16: finite values are clamped, infinities stay, none but zero becomes zero."""
    largest, smallest = float(_HALF.max), float(_HALF.smallest_subnormal)
    clamped = np.where(np.isinf(array), array, np.clip(array, -largest, largest))
    is_lost = (clamped != 0) & (np.abs(clamped) < smallest)
    return np.where(is_lost, np.copysign(smallest, clamped), clamped).astype(np.float16)
