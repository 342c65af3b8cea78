from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_models import ATTENTION_WIDTH, NUM_ATTENDING, NUM_HEADS, attention, operators_of, run
from tolerances import FROM_TWIN

from edgetrack.bundle import Bundle
from edgetrack.quantize.ort_attention import fuse_attention


def inputs() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "packed_in": rng.normal(size=(1, NUM_ATTENDING, 3 * ATTENTION_WIDTH)).astype(np.float32)
    }


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

    assert counts == {"template": 0, "segment_0": 0, "segment_1": 3, "segment_2": 2}


@pytest.mark.parametrize("other", [{"scale": 1.0}, {"order": "kqv"}, {"order": "vqk"}])
def test_what_is_almost_attention_is_left_alone(other: dict[str, Any]) -> None:
    model = attention(**other)

    left = fuse_attention(model)

    assert operators_of(left) == operators_of(model)
    np.testing.assert_array_equal(run(left, inputs())["tokens"], run(model, inputs())["tokens"])


def test_attention_whose_weights_are_handed_on_is_left_alone() -> None:
    model = attention()
    probs = helper.make_tensor_value_info(
        "probs", onnx.TensorProto.FLOAT, [1, NUM_HEADS, NUM_ATTENDING, NUM_ATTENDING]
    )
    model.graph.output.append(probs)

    assert "Softmax" in operators_of(fuse_attention(model))


def test_the_argument_is_not_written_to() -> None:
    model = attention()
    before = model.SerializeToString()

    fuse_attention(model)

    assert model.SerializeToString() == before
