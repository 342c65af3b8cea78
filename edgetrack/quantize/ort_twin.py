"""The FP32-typed twin of a Q/DQ graph, in the forms that ONNX Runtime's CPU provider runs fast.

The INT8 numbers are those of the Q/DQ graph; what differs is how the rest is put:

- A linear layer and its bias become one ``MatMulIntegerToFloat``. Left to ONNX Runtime, the bias is
  a kernel of its own, or is merged before INT8 is seen, and INT8 is lost. Activations are uint8
  with zero point 128, the same numbers: its kernels for x86 take no signed ones.
- Such a layer in front of attention becomes one ``QAttention`` with it, which puts the heads where
  they are read.
- A convolution also writes INT8, since there is no kernel that writes float. Behind a ReLU that is
  uint8 from 0 with the same step, so that the rounding does the ReLU's work.
- Weights of float layers are stored as FP16, large ones as INT8, and unfolded to float when a
  session starts. A deep stem in INT8 weights would cost as much as all INT8 layers together.

``ort_attention`` and ``ort_padding`` are rewrites that have nothing to do with INT8. TensorRT would
refuse the INT32 biases; its twin is ``fp16.to_fp16`` of the Q/DQ graph.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from edgetrack.backends.ort import PRECISION_PROPERTY
from edgetrack.quantize.ort_attention import fuse_attention
from edgetrack.quantize.ort_padding import pad_channels
from edgetrack.quantize.plain import import_graphsurgeon
from edgetrack.quantize.qdq import INT8_MAX, scale_of

if TYPE_CHECKING:
    import onnx

__all__ = ["to_ort_twin"]

_MIN_STORED_ELEMENTS = 1024
# The larger a layer, the more bytes FP16 costs, and the less the rounding of one layer counts.
_MAX_FP16_ELEMENTS = 40_000
_LAYERS = ("Conv", "Gemm", "MatMul")
_DOMAIN = "com.microsoft"
_LINEAR, _ATTENTION, _LINEAR_ATTENTION = "MatMulIntegerToFloat", "MultiHeadAttention", "QAttention"


def to_ort_twin(quantized: "onnx.ModelProto", ranges: Mapping[str, float]) -> "onnx.ModelProto":
    """Rewrite a Q/DQ graph for ONNX Runtime's CPU provider.

    Args:
        quantized: From ``qdq.insert_qdq``; not written to.
        ranges: Activation → the largest magnitude that INT8 shall represent, outputs of the
            quantised convolutions and of the ReLUs behind them included.

    Returns:
        A float32 graph with the same inputs and outputs.

    Raises:
        KeyError: The output of a quantised convolution has no range.
        BackendUnavailableError: onnx or onnx-graphsurgeon is not installed.
    """
    gs = import_graphsurgeon()
    import onnx

    graph = gs.import_onnx(pad_channels(fuse_attention(quantized)))
    rewriter = _Rewriter(gs, graph, ranges)
    for node in list(graph.nodes):
        if node.op in ("Gemm", "MatMul") and _is_quantized(node):
            rewriter.merge_linear(node)
        elif node.op == "Conv" and _is_quantized(node):
            rewriter.quantize_bias(node)
    for node in list(graph.nodes):
        if node.op == _ATTENTION:
            rewriter.merge_attention(node)
        elif node.op == "Conv" and _is_quantized(node):
            rewriter.write_int8(node)
    for node in list(graph.nodes):
        if node.op in _LAYERS:
            rewriter.store_small(node)
    graph.cleanup().toposort()
    graph.import_domains = _with_domain(graph.import_domains)
    twin = gs.export_onnx(graph)
    twin.ir_version = quantized.ir_version
    onnx.helper.set_model_props(twin, {PRECISION_PROPERTY: "int8"})
    return cast("onnx.ModelProto", twin)


class _Rewriter:
    """Rewrites nodes of one graph in place."""

    def __init__(self, gs: Any, graph: Any, ranges: Mapping[str, float]) -> None:
        self._gs, self._graph, self._ranges = gs, graph, ranges
        self._done: dict[str, Any] = {}

    def merge_linear(self, node: Any) -> None:
        """Make one node of a linear layer's Q/DQ, product and bias."""
        steps, scale, zero = self._unsigned(node.inputs[0].inputs[0])
        weight, weight_scale, weight_zero = node.inputs[1].inputs[0].inputs
        if node.attrs.get("transB", 0):
            weight = self._gs.Constant(f"{weight.name}_transposed", weight.values.T.copy())
        bias, output = self._bias_of(node)
        operands = [steps, weight, scale, weight_scale, zero, weight_zero]
        operands += [] if bias is None else [bias]
        merged = self._gs.Node(_LINEAR, node.name, {}, operands, [], domain=_DOMAIN)
        for writer in list(output.inputs):
            writer.outputs.clear()
        merged.outputs = [output]
        self._graph.nodes.append(merged)

    def _bias_of(self, node: Any) -> tuple[Any, Any]:
        """The bias of a linear layer, its own or the one added next, and what holds the sum."""
        output = node.outputs[0]
        if node.op == "Gemm":
            return (node.inputs[2] if len(node.inputs) > 2 else None), output
        width = node.inputs[1].inputs[0].inputs[0].shape[-1]
        if [reader.op for reader in output.outputs] == ["Add"]:
            for tensor in output.outputs[0].inputs:
                if isinstance(tensor, self._gs.Constant) and tuple(tensor.shape) == (width,):
                    return tensor, output.outputs[0].outputs[0]
        return None, output

    def merge_attention(self, node: Any) -> None:
        """Make one node of attention and of the INT8 projection that it alone reads."""
        split = node.inputs[0].inputs[0]
        packed = split.inputs[0]
        is_handed_on = any(output is packed for output in self._graph.outputs)
        is_alone = [reader.op for reader in packed.outputs] == ["Split"] and not is_handed_on
        if not is_alone or [writer.op for writer in packed.inputs] != [_LINEAR]:
            return
        projection = packed.inputs[0]
        steps, weight, scale, weight_scale, zero, weight_zero, *bias = projection.inputs
        if not bias:
            width = weight.shape[-1]
            bias = [self._gs.Constant(f"{node.name}_bias", np.zeros(width, np.float32))]
        mask = self._gs.Variable.empty()
        operands = [steps, weight, *bias, scale, weight_scale, mask, zero, weight_zero]
        attrs = {"num_heads": node.attrs["num_heads"]}
        merged = self._gs.Node(_LINEAR_ATTENTION, node.name, attrs, operands, [], domain=_DOMAIN)
        output = node.outputs[0]
        node.outputs.clear()
        merged.outputs = [output]
        self._graph.nodes.append(merged)

    def _unsigned(self, dequantize: Any) -> tuple[Any, Any, Any]:
        """The steps, scale and zero point of an activation's Q/DQ, as uint8."""
        steps, scale, _ = dequantize.inputs
        if steps.name not in self._done:
            source = steps.inputs[0].inputs[0]
            zero = self._gs.Constant(f"{steps.name}_middle", np.array(128, np.uint8))
            unsigned = self._variable(f"{steps.name}_unsigned")
            self._done[steps.name] = self._append("QuantizeLinear", [source, scale, zero], unsigned)
        quantize = self._done[steps.name].inputs[0]
        return self._done[steps.name], quantize.inputs[1], quantize.inputs[2]

    def quantize_bias(self, node: Any) -> None:
        """Give the bias as INT32, whose step is that of the products that it is added to."""
        if len(node.inputs) < 3 or not isinstance(node.inputs[2], self._gs.Constant):
            return
        bias = node.inputs[2]
        scales = (
            node.inputs[0].inputs[0].inputs[1].values * node.inputs[1].inputs[0].inputs[1].values
        )
        name = f"{node.name}_bias"
        operands = [
            self._gs.Constant(f"{name}_int32", np.rint(bias.values / scales).astype(np.int32)),
            self._gs.Constant(f"{name}_scale", scales.astype(np.float32)),
            self._gs.Constant(f"{name}_zero", np.zeros(len(scales), np.int32)),
        ]
        node.inputs[2] = self._append(
            "DequantizeLinear", operands, self._variable(f"{name}_dequantized"), axis=0
        )

    def write_int8(self, node: Any) -> None:
        """Put Q/DQ behind a convolution, in the place of a ReLU if one follows."""
        output = node.outputs[0]
        relu = output.outputs[0] if [r.op for r in output.outputs] == ["Relu"] else None
        result = output if relu is None else relu.outputs[0]
        zero = np.zeros((), np.int8 if relu is None else np.uint8)
        plain = self._variable(f"{result.name}_float")
        node.outputs = [plain]
        scale = self._gs.Constant(f"{result.name}_step", scale_of(self._ranges[result.name]))
        operands = [scale, self._gs.Constant(f"{result.name}_step_zero", zero)]
        steps = self._append(
            "QuantizeLinear", [plain, *operands], self._variable(f"{result.name}_steps")
        )
        if relu is not None:
            relu.outputs.clear()
        # What quantises the result for the next layer reads these very steps.
        after = [reader for reader in result.outputs if reader.op == "QuantizeLinear"]
        self._append("DequantizeLinear", [steps, *operands], result)
        for quantize in after:
            for dequantize in list(quantize.outputs[0].outputs):
                dequantize.inputs = [steps, *operands]

    def store_small(self, node: Any) -> None:
        """Store a float weight as FP16, or a large one as INT8 with a scale per output channel."""
        weight = node.inputs[1]
        if not isinstance(weight, self._gs.Constant) or weight.dtype != np.float32:
            return
        if weight.values.size < _MIN_STORED_ELEMENTS:
            return
        is_transposed = node.op == "Conv" or node.attrs.get("transB", 0)
        axis = 0 if is_transposed else weight.values.ndim - 1
        key = f"{weight.name}_{axis}"
        if key not in self._done:
            is_half = weight.values.size <= _MAX_FP16_ELEMENTS and _fits_fp16(weight.values)
            self._done[key] = (
                self._cast(key, weight.values.astype(np.float16))
                if is_half
                else self._unfolded(key, weight.values, axis)
            )
        node.inputs[1] = self._done[key]

    def _unfolded(self, name: str, weight: npt.NDArray[np.float32], axis: int) -> Any:
        """Cast and multiply, not DequantizeLinear: that would be run again for every frame."""
        others = tuple(a for a in range(weight.ndim) if a != axis)
        largest = np.abs(weight).max(others, keepdims=True)
        scales = np.where(largest > 0, largest / INT8_MAX, 1).astype(np.float32)
        values = np.rint(weight / scales).astype(np.int8)
        per_channel = self._gs.Constant(f"{name}_scale", scales)
        operands = [self._cast(name, values), per_channel]
        return self._append("Mul", operands, self._variable(f"{name}_float"))

    def _cast(self, name: str, values: npt.NDArray[Any]) -> Any:
        stored = self._gs.Constant(f"{name}_stored", values)
        return self._append("Cast", [stored], self._variable(f"{name}_cast"), to=np.float32)

    def _variable(self, name: str) -> Any:
        return self._gs.Variable(name)

    def _append(self, op: str, inputs: list[Any], output: Any, **attributes: Any) -> Any:
        node = self._gs.Node(op, f"{output.name}/{op}", attributes, inputs, [output])
        self._graph.nodes.append(node)
        return output


def _fits_fp16(values: npt.NDArray[np.float32]) -> bool:
    return bool(np.abs(values).max() <= np.finfo(np.float16).max)


def _is_quantized(node: Any) -> bool:
    """Whether a node multiplies an activation with a weight, both behind DQ."""
    writers = [writer for tensor in node.inputs[:2] for writer in tensor.inputs]
    if [writer.op for writer in writers] != ["DequantizeLinear", "DequantizeLinear"]:
        return False
    steps = writers[1].inputs[0]
    return not steps.inputs  # a constant: else this is a product of two activations


def _with_domain(opsets: Any) -> Any:
    import onnx

    kept = [opset for opset in opsets or [] if opset.domain != _DOMAIN]
    return [*kept, onnx.helper.make_opsetid(_DOMAIN, 1)]
