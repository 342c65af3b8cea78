"""SmoothQuant: move outlier channels from activations into weights, at no cost at run time.

Method: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", ICML 2023, arXiv 2211.10438, equation 4. A LayerNorm's output is divided per
channel by what the rows of the linear layers behind it are multiplied with; both are folded into
the parameters, so that the graph computes the same. Differs from the paper: the factors' geometric
mean is 1, so that activations keep their size in FP16.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgetrack.quantize.layers import GraphIndex
from edgetrack.quantize.plain import plain_copy

if TYPE_CHECKING:
    import onnx

__all__ = ["fold_smoothing", "smoothable_tensors", "smoothing_factors"]

_FACTOR_LIMIT = 1e3

Float32Array = npt.NDArray[np.float32]
ChannelMaxima = Mapping[str, Sequence[float] | npt.NDArray[Any]]


def smoothable_tensors(model: "onnx.ModelProto") -> tuple[str, ...]:
    """Outputs of LayerNorms that only linear layers read: those that can be smoothed."""
    return tuple(_pairs(model))


def smoothing_factors(
    model: "onnx.ModelProto", channel_maxima: ChannelMaxima, *, strength: float
) -> dict[str, Float32Array]:
    """What each channel is divided by, for each smoothable tensor.

    Args:
        model: A float32 graph.
        channel_maxima: Smoothable tensor → the largest magnitude of each channel.
        strength: 0 leaves the activations, 1 makes all their channels equally large.

    Raises:
        KeyError: A smoothable tensor has no maxima.
    """
    from onnx import numpy_helper

    weights = {i.name: i for i in model.graph.initializer}
    factors = {}
    for tensor, (_, linears) in _pairs(model).items():
        rows = [np.abs(numpy_helper.to_array(weights[n.input[1]])) for n in linears]
        row_maxima = np.max([r.max(1) for r in rows], axis=0)
        factors[tensor] = _factors(np.asarray(channel_maxima[tensor]), row_maxima, strength)
    return factors


def fold_smoothing(
    model: "onnx.ModelProto", factors: Mapping[str, Float32Array]
) -> "onnx.ModelProto":
    """Divide the channels of LayerNorms' outputs, and multiply the weights' rows.

    Parameters that several nodes share (exporters merge equal ones, such as all gammas of 1) are
    given to each node on its own first.

    Args:
        model: A float32 graph; not written to.
        factors: Smoothable tensor → factors, from ``smoothing_factors``.

    Returns:
        A graph that computes the same, up to rounding, but for the smoothed tensors.
    """
    from onnx import numpy_helper

    smoothed = plain_copy(model)
    pairs = _pairs(smoothed).values()
    edited = {name for norm, _ in pairs for name in norm.input[1:]}
    _unshare(smoothed.graph, edited | {node.input[1] for _, linears in pairs for node in linears})
    weights = {i.name: i for i in smoothed.graph.initializer}

    def scale(name: str, by: Float32Array) -> None:
        scaled = (numpy_helper.to_array(weights[name]) * by).astype(np.float32)
        weights[name].CopyFrom(numpy_helper.from_array(scaled, name))

    for tensor, (norm, linears) in _pairs(smoothed).items():
        if tensor not in factors:
            continue
        for name in norm.input[1:]:
            scale(name, np.reciprocal(factors[tensor]))
        for node in linears:
            scale(node.input[1], factors[tensor][:, None])
    return smoothed


def _factors(channel_maxima: npt.NDArray[Any], row_maxima: Any, strength: float) -> Float32Array:
    # A channel that is never active would get a factor of 0.
    floor = 1e-5
    activations = np.maximum(channel_maxima, max(channel_maxima.max() * floor, floor))
    weights = np.maximum(row_maxima, max(row_maxima.max() * floor, floor))
    factors = activations**strength / weights ** (1 - strength)
    factors /= np.exp(np.log(factors).mean())
    return np.asarray(np.clip(factors, 1 / _FACTOR_LIMIT, _FACTOR_LIMIT), np.float32)


def _pairs(model: "onnx.ModelProto") -> dict[str, tuple[Any, list[Any]]]:
    """LayerNorm's output → that LayerNorm and the linear layers that read it."""
    graph = model.graph
    index = GraphIndex(graph)
    written = {value.name for value in graph.output}
    pairs = {}
    for node in graph.node:
        if node.op_type != "LayerNormalization" or node.output[0] in written:
            continue
        linears = [graph.node[i] for i in index.readers.get(node.output[0], [])]
        has_weights = all(name in index.weights for name in node.input[1:])
        if has_weights and linears and all(_is_linear(n, node, index) for n in linears):
            pairs[node.output[0]] = (node, linears)
    return pairs


def _is_linear(node: Any, norm: Any, index: GraphIndex) -> bool:
    """Whether a node multiplies the norm's output with a matrix, one row per channel."""
    if node.op_type != "MatMul" or node.input[0] != norm.output[0]:
        return False
    weight = index.weights.get(node.input[1])
    channels = list(index.weights[norm.input[1]].dims)
    return weight is not None and len(weight.dims) == 2 and [weight.dims[0]] == channels


def _unshare(graph: "onnx.GraphProto", names: set[str]) -> None:
    """Give every reader of these initialisers its own."""
    weights = {i.name: i for i in graph.initializer}
    num_readers = dict.fromkeys(names, 0)
    for node in graph.node:
        for slot, name in enumerate(node.input):
            if name not in num_readers:
                continue
            num_readers[name] += 1
            if num_readers[name] > 1:
                node.input[slot] = f"{name}/{num_readers[name]}"
                graph.initializer.add().CopyFrom(weights[name])
                graph.initializer[-1].name = node.input[slot]
