"""Small ONNX models to quantise, and ways to run them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

WIDTH, NUM_TOKENS, NUM_BLOCKS = 64, 48, 3
NUM_ATTENDING, NUM_HEADS, HEAD = 12, 3, 8
ATTENTION_WIDTH = NUM_HEADS * HEAD

Arrays = Mapping[str, npt.NDArray[Any]]


def model_of(
    nodes: Sequence[Any],
    inputs: Mapping[str, Sequence[int]],
    outputs: Mapping[str, Sequence[int]],
    weights: Mapping[str, Any],
) -> onnx.ModelProto:
    """A model of float32 tensors."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def mlp_blocks(*, outlier: float = 1.0, seed: int = 0) -> onnx.ModelProto:
    """Residual MLP blocks; ``outlier`` makes four channels of each LayerNorm as much larger.

    The rows of the layers behind are divided by as much, so that the model computes the same. All
    LayerNorms share one beta, as exporters leave it.
    """
    rng = np.random.default_rng(seed)
    beta = rng.normal(size=WIDTH, scale=0.1).astype(np.float32)
    weights: dict[str, Any] = {"beta": beta}
    nodes, last = [], "tokens_in"
    for k in range(NUM_BLOCKS):
        factors = np.ones(WIDTH, np.float32)
        factors[rng.choice(WIDTH, 4, replace=False)] = outlier
        up = rng.normal(size=(WIDTH, 4 * WIDTH), scale=(3 * WIDTH) ** -0.5)
        down = rng.normal(size=(4 * WIDTH, WIDTH), scale=(12 * WIDTH) ** -0.5)
        weights |= {
            f"blocks.{k}.gamma": rng.uniform(0.5, 1.5, WIDTH).astype(np.float32) * factors,
            f"blocks.{k}.up.weight": (up / factors[:, None]).astype(np.float32),
            f"blocks.{k}.up.bias": rng.normal(size=4 * WIDTH, scale=0.1).astype(np.float32),
            f"blocks.{k}.down.weight": down.astype(np.float32),
            f"blocks.{k}.down.bias": rng.normal(size=WIDTH, scale=0.1).astype(np.float32),
        }
        if outlier != 1:  # as large channels of a shared beta would no longer be shared
            weights[f"blocks.{k}.beta"] = beta * factors
        beta_name = f"blocks.{k}.beta" if outlier != 1 else "beta"
        is_last = k == NUM_BLOCKS - 1
        out = "tokens" if is_last else f"tokens_{k}"
        nodes += [
            helper.make_node(
                "LayerNormalization", [last, f"blocks.{k}.gamma", beta_name], [f"normed_{k}"]
            ),
            helper.make_node("MatMul", [f"normed_{k}", f"blocks.{k}.up.weight"], [f"wide_{k}"]),
            helper.make_node("Add", [f"wide_{k}", f"blocks.{k}.up.bias"], [f"biased_{k}"]),
            helper.make_node("Gelu", [f"biased_{k}"], [f"gelu_{k}"]),
            helper.make_node("MatMul", [f"gelu_{k}", f"blocks.{k}.down.weight"], [f"narrow_{k}"]),
            helper.make_node("Add", [f"narrow_{k}", f"blocks.{k}.down.bias"], [f"mlp_{k}"]),
            helper.make_node("Add", [last, f"mlp_{k}"], [out]),
        ]
        last = out
    shape = [1, NUM_TOKENS, WIDTH]
    return model_of(nodes, {"tokens_in": shape}, {"tokens": shape}, weights)


def attention(
    *,
    scale: float = HEAD**-0.5,
    order: str = "qkv",
    projection: npt.NDArray[np.float32] | None = None,
    bias: npt.NDArray[np.float32] | None = None,
) -> onnx.ModelProto:
    """Self-attention as an exporter might write it, from a packed projection.

    The projection is the sum ``packed_in`` + 0, or the product of ``tokens_in`` and ``projection``,
    plus ``bias``.
    """
    parts = {name: f"part_{order.index(name)}" for name in "qkv"}
    split = ["part_0", "part_1", "part_2"]
    if projection is None:
        nodes = [helper.make_node("Add", ["packed_in", "zero"], ["packed"])]
    elif bias is None:
        nodes = [helper.make_node("MatMul", ["tokens_in", "packed.weight"], ["packed"])]
    else:
        nodes = [
            helper.make_node("MatMul", ["tokens_in", "packed.weight"], ["product"]),
            helper.make_node("Add", ["product", "packed.bias"], ["packed"]),
        ]
    nodes += [
        helper.make_node("Reshape", ["packed", "heads_shape"], ["heads"]),
        helper.make_node("Transpose", ["heads"], ["ordered"], perm=[2, 0, 3, 1, 4]),
        helper.make_node("Split", ["ordered"], [f"{s}_5d" for s in split], axis=0, num_outputs=3),
        *[helper.make_node("Squeeze", [f"{s}_5d", "first_axis"], [s]) for s in split],
        helper.make_node("Transpose", [parts["k"]], ["key"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", [parts["q"], "key"], ["logits"]),
        helper.make_node("Mul", ["logits", "scale"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["probs"], axis=-1),
        helper.make_node("MatMul", ["probs", parts["v"]], ["context"]),
        helper.make_node("Transpose", ["context"], ["rows"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["rows", "rows_shape"], ["joined"]),
        helper.make_node("Identity", ["joined"], ["tokens"]),
    ]
    weights: dict[str, Any] = {
        "heads_shape": np.array([1, NUM_ATTENDING, 3, NUM_HEADS, HEAD]),
        "first_axis": np.array([0]),
        "rows_shape": np.array([1, NUM_ATTENDING, ATTENTION_WIDTH]),
        "scale": np.float32(scale),
        "zero": np.zeros(1, np.float32),
    }
    shapes = {"packed_in": [1, NUM_ATTENDING, 3 * ATTENTION_WIDTH]}
    if projection is not None:
        weights["packed.weight"] = projection
        shapes = {"tokens_in": [1, NUM_ATTENDING, len(projection)]}
    if bias is not None:
        weights["packed.bias"] = bias
    return model_of(nodes, shapes, {"tokens": [1, NUM_ATTENDING, ATTENTION_WIDTH]}, weights)


def tokens(seed: int) -> npt.NDArray[np.float32]:
    """Input of ``mlp_blocks``."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(1, NUM_TOKENS, WIDTH)).astype(np.float32)


def run(
    model: onnx.ModelProto, inputs: Arrays, *, watched: Sequence[str] = ()
) -> dict[str, npt.NDArray[Any]]:
    """Outputs of a model in ONNX Runtime, and activations from its inside."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    for name in watched:
        tapped.graph.output.append(helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        tapped.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def relative_error(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Mean absolute difference over the mean magnitude."""
    return float(np.abs(got - expected).mean() / np.abs(expected).mean())


def weights_of(model: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
    """Initialisers by name."""
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def operators_of(model: onnx.ModelProto) -> list[str]:
    """Names of all operators, sorted."""
    return sorted(node.op_type for node in model.graph.node)
