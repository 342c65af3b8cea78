"""A tiny real bundle whose answers a test can choose through the pixels; made without torch.

The search region is 64x64 pixels, cut into 8x8 tokens. Of every exit ``k``:

- ``uncertainty`` is the mean of colour channel ``k`` over 255: red for exit 0, green for exit 1,
  blue for exit 2 (see ``plain_search_region``);
- ``bbox_cxcywh`` is centred on the brightest spot (evenly lit: on the middle), 0.25 wide and high,
  which is the target's own size at a search factor of 4;
- ``score`` is 0.7, 0.8 and 0.9, so it tells which exit answered.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetrack.bundle import Bundle, CropSpec, GraphSpec, TensorSpec

SEARCH_PX, TEMPLATE_PX, PATCH_PX, WIDTH = 64, 32, 8, 8
GRID, TEMPLATE_TOKENS = SEARCH_PX // PATCH_PX, (TEMPLATE_PX // PATCH_PX) ** 2
TOKENS = TEMPLATE_TOKENS + GRID**2
SCORES = (0.7, 0.8, 0.9)
NUM_SEGMENTS = len(SCORES)


def write_toy_bundle(folder: Path, *, name: str = "toy") -> Bundle:
    """Write a bundle of a template graph and three segments into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    graphs = [_template_graph(folder), *(_segment_graph(folder, k) for k in range(NUM_SEGMENTS))]
    return Bundle(
        path=folder,
        name=name,
        family="toy",
        paper="none",
        config={},
        crops=CropSpec(
            template_size_px=TEMPLATE_PX,
            template_factor=2.0,
            search_size_px=SEARCH_PX,
            search_factor=4.0,
        ),
        template=graphs[0],
        segments=tuple(graphs[1:]),
        operating_points={"fast": (0.9, 0.9), "balanced": (0.5, 0.5), "accurate": (0.1, 0.1)},
        operating_point="balanced",
        provenance={"data": "none"},
        licence="none",
    ).write()


def plain_search_region(uncertainties: Sequence[float]) -> npt.NDArray[np.uint8]:
    """A search region ``(1, 64, 64, 3)`` at which exit ``k`` is ``uncertainties[k]`` unsure."""
    colour = np.round(np.asarray(uncertainties) * 255).astype(np.uint8)
    return np.tile(colour, (1, SEARCH_PX, SEARCH_PX, 1))


class _Graph:
    """Collects nodes and initialisers; writes the file."""

    def __init__(self, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]):
        self.name, self.inputs, self.outputs = name, tuple(inputs), tuple(outputs)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        name = f"{op}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def constant(self, name: str, value: Any, dtype: type = np.float32) -> str:
        self._constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def patches(self, image: str, size_px: int) -> str:
        """Tokens ``(1, N, 8)`` of an image: mean red, green and blue over 255, then zeros."""
        weight = np.zeros((WIDTH, 3, PATCH_PX, PATCH_PX))
        for channel in range(3):
            weight[channel, channel] = 1 / (255 * PATCH_PX**2)
        self.node("Cast", [image], "pixels", to=TensorProto.FLOAT)
        self.node("Transpose", ["pixels"], "planes", perm=[0, 3, 1, 2])
        embed = self.constant("embed", weight)
        self.node("Conv", ["planes", embed], "map", strides=[PATCH_PX, PATCH_PX])
        shape = self.constant("map_shape", [1, WIDTH, (size_px // PATCH_PX) ** 2], np.int64)
        self.node("Reshape", ["map", shape], "rows")
        return self.node("Transpose", ["rows"], "patch_tokens", perm=[0, 2, 1])

    def write(self, folder: Path, *, macs: int) -> GraphSpec:
        graph = helper.make_graph(
            self._nodes,
            self.name,
            [_value(s) for s in self.inputs],
            [_value(s) for s in self.outputs],
            self._constants,
        )
        opsets = [helper.make_opsetid("", 19)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, folder / f"{self.name}.onnx")
        return GraphSpec(
            name=self.name,
            file=f"{self.name}.onnx",
            inputs=self.inputs,
            outputs=self.outputs,
            macs=macs,
        )


def _template_graph(folder: Path) -> GraphSpec:
    graph = _Graph(
        "template",
        [
            TensorSpec(name="template", dtype="uint8", shape=(1, TEMPLATE_PX, TEMPLATE_PX, 3)),
            TensorSpec(name="template_bbox_cxcywh", dtype="float32", shape=(1, 4)),
        ],
        [_tokens("template_tokens", TEMPLATE_TOKENS)],
    )
    patches = graph.patches("template", TEMPLATE_PX)
    zeros = graph.constant("zeros", np.zeros((1, 4)))
    graph.node("Concat", [zeros, "template_bbox_cxcywh"], "box_row", axis=1)
    graph.node("Reshape", ["box_row", graph.constant("row", [1, 1, WIDTH], np.int64)], "box_token")
    graph.node("Add", [patches, "box_token"], "template_tokens")
    return graph.write(folder, macs=TEMPLATE_TOKENS * WIDTH * 3 * PATCH_PX**2)


def _segment_graph(folder: Path, index: int) -> GraphSpec:
    is_first, is_last = index == 0, index == NUM_SEGMENTS - 1
    answer = [
        TensorSpec(name="bbox_cxcywh", dtype="float32", shape=(1, 4)),
        TensorSpec(name="score", dtype="float32", shape=(1,)),
        TensorSpec(name="uncertainty", dtype="float32", shape=(1,)),
    ]
    image = TensorSpec(name="search_region", dtype="uint8", shape=(1, SEARCH_PX, SEARCH_PX, 3))
    inputs = (
        [image, _tokens("template_tokens", TEMPLATE_TOKENS)]
        if is_first
        else [_tokens(f"tokens_{index - 1}", TOKENS)]
    )
    written = [] if is_last else [_tokens(f"tokens_{index}", TOKENS)]
    graph = _Graph(f"segment_{index}", inputs, [*written, *answer])
    before = inputs[-1].name
    macs = TOKENS * WIDTH * WIDTH
    if is_first:
        patches = graph.patches("search_region", SEARCH_PX)
        before = graph.node("Concat", ["template_tokens", patches], "joined", axis=1)
        macs += GRID**2 * WIDTH * 3 * PATCH_PX**2
    identity = graph.constant("identity", np.eye(WIDTH))
    tokens = graph.node("MatMul", [before, identity], f"tokens_{index}")
    _exit_head(graph, tokens, index)
    return graph.write(folder, macs=macs)


def _exit_head(graph: _Graph, tokens: str, index: int) -> None:
    bounds = [
        graph.constant("first", [TEMPLATE_TOKENS], np.int64),
        graph.constant("end", [TOKENS], np.int64),
        graph.constant("token_axis", [1], np.int64),
    ]
    graph.node("Slice", [tokens, *bounds], "search_tokens")
    graph.node("ReduceMean", ["search_tokens", "token_axis"], "mean", keepdims=0)
    colour = graph.constant("colour", index, np.int64)
    graph.node("Gather", ["mean", colour], "uncertainty", axis=1)

    empty_channel = graph.constant("empty_channel", 3, np.int64)
    graph.node("Gather", ["mean", empty_channel], "zero", axis=1)
    graph.node("Add", ["zero", graph.constant("exit_score", [SCORES[index]])], "score")

    contrast = graph.constant("contrast", [[20.0]] * 3 + [[0.0]] * (WIDTH - 3))
    graph.node("MatMul", ["search_tokens", contrast], "brightness")
    graph.node("Softmax", ["brightness"], "spot", axis=1)
    centres = (np.arange(GRID) + 0.5) / GRID
    places = np.stack(np.meshgrid(centres, centres), -1).reshape(1, GRID**2, 2)
    graph.node("Mul", ["spot", graph.constant("places", places)], "weighted_places")
    graph.node("ReduceSum", ["weighted_places", "token_axis"], "centre", keepdims=0)
    size = graph.constant("size", [[0.25, 0.25]])
    graph.node("Concat", ["centre", size], "bbox_cxcywh", axis=1)


def _tokens(name: str, count: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=(1, count, WIDTH))


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(spec.name, elem_type, spec.shape)
