"""Give ONNX Runtime's CPU provider attention as one node; an exact rewrite, in any precision.

What is replaced is checked on random numbers, not recognised by its nodes, so that another
exporter's forms work as well, and what is not attention is left as it is.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetrack.quantize.layers import GraphIndex
from edgetrack.quantize.plain import plain_copy

if TYPE_CHECKING:
    import onnx

__all__ = ["fuse_attention"]

_DOMAIN = "com.microsoft"
_TOLERANCE = 1e-4


def fuse_attention(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Replace self-attention by ``MultiHeadAttention``: one kernel instead of some fifteen.

    What is between one packed projection ``(1, N, 3C)``, in the order query, key, value, and the
    joined heads ``(1, N, C)`` is compared with attention in NumPy, and replaced if it is that.

    Args:
        model: A graph of float32 attention; not written to.
    """
    import onnx

    fused = plain_copy(model)
    inferred = onnx.shape_inference.infer_shapes(fused, data_prop=True).graph
    values = (*inferred.input, *inferred.output, *inferred.value_info)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    for softmax in [n for n in fused.graph.node if n.op_type == "Softmax"]:
        found = _attention_around(fused.graph, softmax, shapes)
        if found is not None:
            _replace(fused, *found)
    return fused


def _attention_around(
    graph: "onnx.GraphProto", softmax: Any, shapes: dict[str, list[int]]
) -> tuple[str, str, int, set[int]] | None:
    """Packed projection, joined heads, number of heads and nodes of an attention, if it is one."""
    heads_shape = shapes.get(softmax.input[0], [])
    if len(heads_shape) != 4 or heads_shape[2] != heads_shape[3]:
        return None
    _, num_heads, num_tokens, _ = heads_shape
    index = GraphIndex(graph)
    joined = _joined_heads(graph, index, softmax, shapes, num_tokens)
    if joined is None:
        return None
    width = shapes[joined][-1]
    packed, nodes = _closed_region(graph, index, joined, shapes, [1, num_tokens, 3 * width])
    if packed is None or not _is_attention(graph, packed, joined, nodes, num_heads, shapes):
        return None
    return packed, joined, num_heads, nodes


def _joined_heads(
    graph: "onnx.GraphProto",
    index: GraphIndex,
    softmax: Any,
    shapes: dict[str, list[int]],
    num_tokens: int,
) -> str | None:
    """The first tensor ``(1, N, C)`` behind the softmax, on the one path that leads there."""
    name = softmax.output[0]
    for _ in range(6):
        readers = index.readers.get(name, [])
        if len(readers) != 1:
            return None
        name = str(graph.node[readers[0]].output[0])
        shape = shapes.get(name, [])
        if len(shape) == 3 and shape[:2] == [1, num_tokens]:
            return name
    return None


def _closed_region(
    graph: "onnx.GraphProto",
    index: GraphIndex,
    joined: str,
    shapes: dict[str, list[int]],
    packed_shape: list[int],
) -> tuple[str | None, set[int]]:
    """The one tensor of a shape that ``joined`` is computed from, and the nodes between them."""
    nodes: set[int] = set()
    sources: set[str] = set()
    waiting = [joined]
    while waiting:
        name = waiting.pop()
        if name in index.weights or not name:
            continue
        if shapes.get(name) == packed_shape:
            sources.add(name)
            continue
        producer = index.producers.get(name)
        if producer is None:
            return None, set()
        if producer not in nodes:
            nodes.add(producer)
            waiting.extend(graph.node[producer].input)
    outside = {value.name for value in graph.output}
    for node in nodes:
        for name in graph.node[node].output:
            is_read_outside = not nodes.issuperset(index.readers.get(name, []))
            if name != joined and (is_read_outside or name in outside):
                return None, set()
    return (sources.pop(), nodes) if len(sources) == 1 else (None, set())


def _is_attention(
    graph: "onnx.GraphProto",
    packed: str,
    joined: str,
    nodes: set[int],
    num_heads: int,
    shapes: dict[str, list[int]],
) -> bool:
    """Whether nodes compute what attention in NumPy computes, on random numbers."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    used = {name for i in nodes for name in graph.node[i].input}
    part = onnx.helper.make_graph(
        [graph.node[i] for i in sorted(nodes)],
        "attention",
        [onnx.helper.make_tensor_value_info(packed, onnx.TensorProto.FLOAT, shapes[packed])],
        [onnx.helper.make_tensor_value_info(joined, onnx.TensorProto.FLOAT, shapes[joined])],
        [i for i in graph.initializer if i.name in used],
    )
    opsets = [onnx.helper.make_opsetid("", 20)]
    given = np.random.default_rng(0).normal(size=shapes[packed]).astype(np.float32)
    evaluator = ReferenceEvaluator(onnx.helper.make_model(part, opset_imports=opsets))
    outputs: Any = evaluator.run(None, {packed: given})
    got = outputs[0]
    expected = _attention(given, num_heads)
    return got.shape == expected.shape and bool(np.abs(got - expected).max() < _TOLERANCE)


def _attention(packed: Any, num_heads: int) -> Any:
    num_tokens, width = packed.shape[1], packed.shape[2] // 3
    split = packed.reshape(num_tokens, 3, num_heads, width // num_heads).transpose(1, 2, 0, 3)
    query, key, value = split.astype(np.float64)
    logits = query @ key.transpose(0, 2, 1) / math.sqrt(width // num_heads)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ value).transpose(1, 0, 2).reshape(1, num_tokens, width)


def _replace(
    model: "onnx.ModelProto", packed: str, joined: str, num_heads: int, nodes: set[int]
) -> None:
    import onnx

    parts = [f"{joined}_{part}" for part in ("query", "key", "value")]
    split = onnx.helper.make_node(
        "Split", [packed], parts, f"{joined}/Split", axis=2, num_outputs=3
    )
    attention = onnx.helper.make_node(
        "MultiHeadAttention",
        parts,
        [joined],
        f"{joined}/MultiHeadAttention",
        domain=_DOMAIN,
        num_heads=num_heads,
    )
    last = max(nodes)
    kept: list[Any] = []
    for i, node in enumerate(model.graph.node):
        if i == last:
            kept += [split, attention]
        elif i not in nodes:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    if not any(opset.domain == _DOMAIN for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
