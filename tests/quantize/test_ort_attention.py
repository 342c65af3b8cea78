from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_models import model_of, operators_of, run
from tolerances import FROM_TWIN

from edgetrack.bundle import Bundle
from edgetrack.quantize.ort_attention import fuse_attention

NUM_TOKENS, NUM_HEADS, HEAD = 12, 3, 8
WIDTH = NUM_HEADS * HEAD


def attention(*, scale: float = HEAD**-0.5, order: str = "qkv") -> onnx.ModelProto:
    """Self-attention as an exporter might write it, from a packed projection."""
    parts = {name: f"part_{order.index(name)}" for name in "qkv"}
    split = ["part_0", "part_1", "part_2"]
    nodes = [
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
        helper.make_node("Add", ["packed_in", "zero"], ["packed"]),
    ]
    nodes.insert(0, nodes.pop())
    weights: dict[str, Any] = {
        "heads_shape": np.array([1, NUM_TOKENS, 3, NUM_HEADS, HEAD]),
        "first_axis": np.array([0]),
        "rows_shape": np.array([1, NUM_TOKENS, WIDTH]),
        "scale": np.float32(scale),
        "zero": np.zeros(1, np.float32),
    }
    shapes = {"packed_in": [1, NUM_TOKENS, 3 * WIDTH]}
    return model_of(nodes, shapes, {"tokens": [1, NUM_TOKENS, WIDTH]}, weights)


def inputs() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"packed_in": rng.normal(size=(1, NUM_TOKENS, 3 * WIDTH)).astype(np.float32)}


def test_attention_becomes_one_node_that_computes_the_same() -> None:
    model = attention()

    fused = fuse_attention(model)

    assert operators_of(fused) == ["Add", "Identity", "MultiHeadAttention", "Split"]
    np.testing.assert_allclose(
        run(fused, inputs())["tokens"], run(model, inputs())["tokens"], atol=FROM_TWIN["float32"]
    )


def test_every_attention_of_the_bundle_is_found(shipped_bundle: Bundle) -> None:
    counts = {}
    for graph in shipped_bundle.graphs:
        fused = fuse_attention(onnx.load(shipped_bundle.graph_path(graph)))
        counts[graph.name] = operators_of(fused).count("MultiHeadAttention")

    assert counts == {"template": 0, "segment_0": 0, "segment_1": 4, "segment_2": 3}


@pytest.mark.parametrize("other", [{"scale": 1.0}, {"order": "kqv"}, {"order": "vqk"}])
def test_what_is_almost_attention_is_left_alone(other: dict[str, Any]) -> None:
    model = attention(**other)

    left = fuse_attention(model)

    assert operators_of(left) == operators_of(model)
    np.testing.assert_array_equal(run(left, inputs())["tokens"], run(model, inputs())["tokens"])


def test_attention_whose_weights_are_handed_on_is_left_alone() -> None:
    model = attention()
    probs = helper.make_tensor_value_info(
        "probs", onnx.TensorProto.FLOAT, [1, NUM_HEADS, NUM_TOKENS, NUM_TOKENS]
    )
    model.graph.output.append(probs)

    assert "Softmax" in operators_of(fuse_attention(model))


def test_the_argument_is_not_written_to() -> None:
    model = attention()
    before = model.SerializeToString()

    fuse_attention(model)

    assert model.SerializeToString() == before
