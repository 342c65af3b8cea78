from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_models import model_of, run, weights_of
from tolerances import FROM_TWIN

from edgetrack.bundle import Bundle
from edgetrack.quantize.ort_padding import pad_channels

SIDE = 8


def chain(
    channels: int, *, between: tuple[str, ...] = ("LeakyRelu", "Conv"), also: str | None = None
) -> onnx.ModelProto:
    """A convolution to ``channels``, what is between, and one back to 8."""
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "first.weight": rng.normal(size=(channels, 8, 1, 1)).astype(np.float32),
        "first.bias": rng.normal(size=channels).astype(np.float32),
        "last.weight": rng.normal(size=(8, channels, 1, 1)).astype(np.float32),
        "last.bias": rng.normal(size=8).astype(np.float32),
    }
    nodes = [helper.make_node("Conv", ["x", "first.weight", "first.bias"], ["passed_0"])]
    for k, operator in enumerate(between):
        inputs, attributes = [f"passed_{k}"], {}
        if operator == "Conv":
            weights[f"depthwise_{k}.weight"] = rng.normal(size=(channels, 1, 3, 3)).astype("f")
            weights[f"depthwise_{k}.bias"] = rng.normal(size=channels).astype(np.float32)
            inputs += [f"depthwise_{k}.weight", f"depthwise_{k}.bias"]
            attributes = {"group": channels, "pads": [1, 1, 1, 1]}
        elif operator == "MaxPool":
            attributes = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
        nodes.append(helper.make_node(operator, inputs, [f"passed_{k + 1}"], **attributes))
    last = f"passed_{len(between)}"
    nodes.append(helper.make_node("Conv", [last, "last.weight", "last.bias"], ["tokens"]))
    outputs = {"tokens": [1, 8, SIDE, SIDE]}
    if also is not None:
        outputs[also] = [1, channels, SIDE, SIDE]
    return model_of(nodes, {"x": [1, 8, SIDE, SIDE]}, outputs, weights)


def inputs() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {"x": rng.normal(size=(1, 8, SIDE, SIDE)).astype(np.float32)}


@pytest.mark.parametrize(
    ("channels", "between"),
    [
        (58, ("LeakyRelu", "Conv")),
        (58, ("Conv",)),
        (58, ("Relu", "Conv", "Conv")),
        (24, ("LeakyRelu", "MaxPool")),
        (24, ("MaxPool", "Conv")),
    ],
)
def test_odd_channels_are_padded_and_the_answer_stays(
    channels: int, between: tuple[str, ...]
) -> None:
    model = chain(channels, between=between)

    padded = pad_channels(model)

    sizes = {s for w in weights_of(padded).values() for s in w.shape}
    assert sizes <= {1, 3, 8, 32, 64}
    expected = run(model, inputs())["tokens"]
    np.testing.assert_allclose(
        run(padded, inputs())["tokens"], expected, atol=10 * FROM_TWIN["float32"]
    )


@pytest.mark.parametrize(
    ("channels", "between"),
    [
        (64, ("LeakyRelu", "Conv")),  # even
        (116, ("LeakyRelu", "Conv")),  # a multiple of four, which depthwise convolutions take
        (58, ("LeakyRelu",)),  # nothing between that is slow
        (58, ("Sigmoid", "Conv")),  # makes 0.5 of zeros
    ],
)
def test_other_channels_are_left_alone(channels: int, between: tuple[str, ...]) -> None:
    model = chain(channels, between=between)

    left = weights_of(pad_channels(model))

    assert {n: w.shape for n, w in left.items()} == {
        n: w.shape for n, w in weights_of(model).items()
    }


def test_channels_that_are_handed_on_are_left_alone() -> None:
    padded = pad_channels(chain(58, also="passed_1"))

    assert weights_of(padded)["first.weight"].shape[0] == 58


def test_the_stem_of_the_bundle_is_padded(shipped_bundle: Bundle) -> None:
    model = onnx.load(shipped_bundle.graph_path(shipped_bundle.segments[0]))

    padded = pad_channels(model)

    groups = [a.i for n in padded.graph.node for a in n.attribute if a.name == "group" and a.i > 1]
    assert sorted(groups) == [32, 64, 64, 64, 64, 96, 96]


def test_the_argument_is_not_written_to() -> None:
    model = chain(58)
    before = model.SerializeToString()

    pad_channels(model)

    assert model.SerializeToString() == before
