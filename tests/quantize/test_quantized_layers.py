from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_models import mlp_blocks, model_of

from edgetrack.bundle import Bundle
from edgetrack.quantize.layers import Layer, find_layers


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def layers_of(model: onnx.ModelProto, **options: bool) -> dict[str, Layer]:
    return {layer.name: layer for layer in find_layers(model, **options)}


def conv_of(weight: Any, *, side: int = 32, group: int = 1) -> Layer:
    """The first of two convolutions, the last of which hands on."""
    channels = weight.shape[1] * group
    pads = [weight.shape[2] // 2] * 4
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["map"], group=group, pads=pads),
        helper.make_node("Conv", ["map", "last.weight"], ["tokens"]),
    ]
    model = model_of(
        nodes,
        {"x": [1, channels, side, side]},
        {"tokens": [1, 16, side, side]},
        {"conv.weight": weight, "last.weight": zeros(16, weight.shape[0], 1, 1)},
    )
    return find_layers(model)[0]


@pytest.fixture(scope="module")
def shipped_layers(shipped_bundle: Bundle) -> dict[str, dict[str, Layer]]:
    return {
        graph.name: layers_of(onnx.load(shipped_bundle.graph_path(graph)))
        for graph in shipped_bundle.graphs
    }


def test_every_linear_layer_of_a_transformer_is_int8(
    shipped_layers: dict[str, dict[str, Layer]],
) -> None:
    reasons = {
        name: layer.reason
        for layers in shipped_layers.values()
        for name, layer in layers.items()
        if layer.kind == "linear"
    }

    assert len(reasons) == 21  # four per block, five blocks, and a bypass's way in
    assert set(reasons.values()) == {""}


def test_layers_are_named_by_their_parameters(
    shipped_layers: dict[str, dict[str, Layer]],
) -> None:
    assert "backbone.blocks.3.attn.qkv" in shipped_layers["segment_2"]
    assert "exits.2.head.towers.0.0.0" in shipped_layers["segment_2"]


def test_last_layers_of_heads_stay_in_float(shipped_layers: dict[str, dict[str, Layer]]) -> None:
    for graph in ("segment_0", "segment_1", "segment_2"):
        last = [n for n, layer in shipped_layers[graph].items() if "last layer" in layer.reason]
        assert [name.split(".")[-1] for name in last] == ["cls", "edges"]


def test_pixels_and_depthwise_convolutions_stay_in_float(
    shipped_layers: dict[str, dict[str, Layer]],
) -> None:
    layers = shipped_layers["segment_0"]

    assert layers["backbone.stem.stem.conv"].reason == "fewer than 16 channels"
    depthwise = [layer for name, layer in layers.items() if name.endswith(".dw")]
    assert len(depthwise) == 5
    assert {layer.reason for layer in depthwise} == {"a depthwise or grouped convolution"}


def test_what_is_handed_on_stays_in_float(shipped_layers: dict[str, dict[str, Layer]]) -> None:
    layer = shipped_layers["segment_0"]["correlation.mix.1.0"]

    assert layer.reason == "its result is handed to the next graph"


def test_decoding_holds_no_layers(shipped_layers: dict[str, dict[str, Layer]]) -> None:
    assert [n for n, x in shipped_layers["segment_0"].items() if x.kind == "linear"] == []


@pytest.mark.parametrize("with_attention", [False, True])
def test_attention_is_quantised_only_if_asked_for(
    shipped_bundle: Bundle, with_attention: bool
) -> None:
    model = onnx.load(shipped_bundle.graph_path(shipped_bundle.segments[2]))

    attention = [
        layer
        for layer in find_layers(model, with_attention=with_attention)
        if layer.kind == "attention"
    ]

    assert len(attention) == 4  # two products in each of two blocks
    assert all(len(layer.inputs) == 2 for layer in attention)
    assert {layer.reason == "" for layer in attention} == {with_attention}


def test_a_correlation_is_no_attention(shipped_bundle: Bundle) -> None:
    model = onnx.load(shipped_bundle.graph_path(shipped_bundle.segments[0]))

    products = [x for x in find_layers(model, with_attention=True) if x.kind == "attention"]

    assert [x.reason for x in products] == ["a product of two activations"]


def test_dense_convolutions_are_int8_and_small_ones_are_not() -> None:
    assert conv_of(zeros(64, 64, 3, 3), side=16).reason == ""
    assert conv_of(zeros(512, 512, 1, 1), side=8).reason == ""
    small = "too few products for what it reads and writes"
    assert conv_of(zeros(64, 64, 3, 3), side=4).reason == small  # little work
    assert conv_of(zeros(256, 256, 1, 1), side=64).reason == small  # much to convert
    assert "grouped" in conv_of(zeros(64, 32, 3, 3), side=32, group=2).reason
    assert conv_of(zeros(8, 256, 3, 3)).reason == "fewer than 16 channels"


def linear_of(**attributes: Any) -> Layer:
    shape = [32, 64] if attributes.get("transB") else [64, 32]
    rows = [64, 8] if attributes.get("transA") else [8, 64]
    node = helper.make_node("Gemm", ["x", "fc.weight", "fc.bias"], ["tokens"], **attributes)
    weights = {"fc.weight": zeros(*shape), "fc.bias": zeros(32)}
    (layer,) = find_layers(model_of([node], {"x": rows}, {"tokens": [8, 32]}, weights))
    return layer


def test_a_gemm_is_a_linear_layer_unless_it_scales() -> None:
    assert linear_of() == Layer(
        name="fc", kind="linear", inputs=("x",), output="tokens", weight="fc.weight", channel_axis=1
    )
    assert linear_of(transB=1).channel_axis == 0
    assert linear_of(transB=1).reason == ""
    for attributes in ({"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}):
        assert linear_of(**attributes).reason == "a scaled or transposed product"


def test_layers_that_share_weights_have_names_of_their_own() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "fc.weight"], ["middle"]),
        helper.make_node("MatMul", ["middle", "fc.weight"], ["tokens"]),
    ]
    square = [32, 32]
    model = model_of(nodes, {"x": square}, {"tokens": square}, {"fc.weight": zeros(32, 32)})

    assert list(layers_of(model)) == ["fc", "fc#2"]


def test_a_computed_weight_and_a_batch_of_matrices_stay_in_float() -> None:
    nodes = [
        helper.make_node("Relu", ["weights_in"], ["weight"]),
        helper.make_node("Conv", ["x", "weight"], ["map"]),
        helper.make_node("MatMul", ["rows", "matrices"], ["tokens"]),
    ]
    model = model_of(
        nodes,
        {"x": [1, 32, 8, 8], "weights_in": [32, 32, 1, 1], "rows": [4, 32, 32]},
        {"map": [1, 32, 8, 8], "tokens": [4, 32, 32]},
        {"matrices": zeros(4, 32, 32)},
    )

    assert [layer.reason for layer in find_layers(model)] == [
        "its weight is computed",
        "its weight is no matrix",
    ]


def test_finding_layers_writes_to_nothing() -> None:
    model = mlp_blocks()
    before = model.SerializeToString()

    find_layers(model)

    assert model.SerializeToString() == before
