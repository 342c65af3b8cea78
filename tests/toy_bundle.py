"""A tiny real bundle whose answers a test can choose through the pixels; made without torch.

The search region is 64x64 pixels, cut into 8x8 tokens. Of every exit ``k``:

- ``uncertainty`` is the mean of colour channel ``k`` over 255: red for exit 0, green for exit 1,
  blue for exit 2 (see ``plain_search_region``);
- ``bbox_cxcywh`` is centred on the brightest spot (evenly lit: on the middle), 0.25 wide and high,
  which is the target's own size at a search factor of 4;
- ``score`` is 0.7, 0.8 and 0.9, so it tells which exit answered.

With heads, a graph of its own gives each exit's box.

With memory, ``age`` counts the frames since the template, and ``memory`` is a running mean of the
target's crops, the box in it and the answers; each is written by ``update``. ``score`` is larger by
a tenth of the mean of the memory, so a memory of other bits gives another score. A search region
without any light has a box that is no number.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
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


def _tokens(name: str, count: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=(1, count, WIDTH))


def _image(name: str, size_px: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="uint8", shape=(1, size_px, size_px, 3))


IMAGE = _image("search_region", SEARCH_PX)
TEMPLATE = [
    _image("template", TEMPLATE_PX),
    TensorSpec(name="template_bbox_cxcywh", dtype="float32", shape=(1, 4)),
]
ANSWER = [
    TensorSpec(name="bbox_cxcywh", dtype="float32", shape=(1, 4)),
    TensorSpec(name="score", dtype="float32", shape=(1,)),
    TensorSpec(name="uncertainty", dtype="float32", shape=(1,)),
]
MEMORY = [
    _tokens("memory", TEMPLATE_TOKENS),
    TensorSpec(name="age", dtype="float32", shape=(1,)),
]


def write_toy_bundle(
    folder: Path, *, name: str = "toy", heads: bool = False, memory: bool = False
) -> Bundle:
    """Write a bundle of a template graph and three segments into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = _Parts(folder, heads=heads, memory=memory)
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
        template=parts.template_graph(),
        segments=tuple(parts.segment_graph(k) for k in range(NUM_SEGMENTS)),
        operating_points={"fast": (0.9, 0.9), "balanced": (0.5, 0.5), "accurate": (0.1, 0.1)},
        operating_point="balanced",
        provenance={"data": "none"},
        licence="none",
        heads=tuple(parts.head_graph(k) for k in range(NUM_SEGMENTS) if heads),
        update=parts.update_graph() if memory else None,
        carried={"memory": "next_memory", "age": "next_age"} if memory else {},
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


@dataclass(frozen=True)
class _Parts:
    """Writes the graphs of one bundle."""

    folder: Path
    heads: bool
    memory: bool

    def template_graph(self) -> GraphSpec:
        outputs = [_tokens("template_tokens", TEMPLATE_TOKENS)]
        graph = _Graph("template", TEMPLATE, [*outputs, *(MEMORY if self.memory else [])])
        if self.memory:
            tokens = _template_tokens(graph, "memory")
            graph.node("Identity", [tokens], "template_tokens")
            age = graph.node("ReduceMean", ["zeros"], "age_in_a_row", keepdims=0)
            graph.node("Reshape", [age, graph.constant("one", [1], np.int64)], "age")
        else:
            _template_tokens(graph, "template_tokens")
        return graph.write(self.folder, macs=TEMPLATE_TOKENS * WIDTH * 3 * PATCH_PX**2)

    def segment_graph(self, index: int) -> GraphSpec:
        is_first, is_last = index == 0, index == NUM_SEGMENTS - 1
        inputs = (
            [IMAGE, _tokens("template_tokens", TEMPLATE_TOKENS)]
            if is_first
            else [_tokens(f"tokens_{index - 1}", TOKENS)]
        )
        before = inputs[-1].name
        inputs += MEMORY[:1] if self.memory else []
        written = [] if is_last and not self.heads else [_tokens(f"tokens_{index}", TOKENS)]
        answer = ANSWER[1:] if self.heads else ANSWER
        graph = _Graph(f"segment_{index}", inputs, [*written, *answer])
        macs = TOKENS * WIDTH * WIDTH
        if is_first:
            patches = graph.patches("search_region", SEARCH_PX)
            before = graph.node("Concat", ["template_tokens", patches], "joined", axis=1)
            macs += GRID**2 * WIDTH * 3 * PATCH_PX**2
        identity = graph.constant("identity", np.eye(WIDTH))
        tokens = graph.node("MatMul", [before, identity], f"tokens_{index}")
        mean = _search_tokens(graph, tokens)
        self._decide(graph, mean, index)
        if not self.heads:
            self._decode(graph, mean)
        return graph.write(self.folder, macs=macs)

    def head_graph(self, index: int) -> GraphSpec:
        graph = _Graph(f"head_{index}", [_tokens(f"tokens_{index}", TOKENS)], ANSWER[:1])
        identity = graph.constant("identity", np.eye(WIDTH))
        tokens = graph.node("MatMul", [f"tokens_{index}", identity], "adapted")
        self._decode(graph, _search_tokens(graph, tokens))
        return graph.write(self.folder, macs=TOKENS * WIDTH * WIDTH)

    def update_graph(self) -> GraphSpec:
        later = [dataclasses.replace(spec, name=f"next_{spec.name}") for spec in MEMORY]
        graph = _Graph("update", [*TEMPLATE, *MEMORY, *ANSWER[:2]], later)
        tokens = _template_tokens(graph, "now")
        graph.node("Concat", ["bbox_cxcywh", "zeros"], "answer_row", axis=1)
        graph.node("Reshape", ["answer_row", "row"], "answer_token")
        graph.node("Add", ["memory", tokens], "sum")
        graph.node("Add", ["sum", "answer_token"], "sum_of_three")
        graph.node("Mul", ["sum_of_three", graph.constant("third", 1 / 3)], "next_memory")
        graph.node("Mul", ["score", graph.constant("nothing", 0.0)], "no_score")
        graph.node("Add", ["age", graph.constant("one_frame", [1.0])], "older")
        graph.node("Add", ["older", "no_score"], "next_age")
        return graph.write(self.folder, macs=TEMPLATE_TOKENS * WIDTH * 3 * PATCH_PX**2)

    def _decide(self, graph: _Graph, mean: str, index: int) -> None:
        colour = graph.constant("colour", index, np.int64)
        graph.node("Gather", [mean, colour], "uncertainty", axis=1)
        empty_channel = graph.constant("empty_channel", 3, np.int64)
        graph.node("Gather", [mean, empty_channel], "zero", axis=1)
        exit_score = graph.constant("exit_score", [SCORES[index]])
        if not self.memory:
            graph.node("Add", ["zero", exit_score], "score")
            return
        graph.node("ReduceMean", ["memory"], "mean_memory", keepdims=0)
        graph.node("Mul", ["mean_memory", graph.constant("tenth", 0.1)], "share")
        graph.node("Add", ["zero", "share"], "shift")
        graph.node("Add", ["shift", exit_score], "score")

    def _decode(self, graph: _Graph, mean: str) -> None:
        contrast = graph.constant("contrast", [[20.0]] * 3 + [[0.0]] * (WIDTH - 3))
        graph.node("MatMul", ["search_tokens", contrast], "brightness")
        graph.node("Softmax", ["brightness"], "spot", axis=1)
        centres = (np.arange(GRID) + 0.5) / GRID
        places = np.stack(np.meshgrid(centres, centres), -1).reshape(1, GRID**2, 2)
        graph.node("Mul", ["spot", graph.constant("places", places)], "weighted_places")
        centre = graph.node("ReduceSum", ["weighted_places", "token_axis"], "centre", keepdims=0)
        if self.memory:
            light = graph.node("ReduceMax", [mean], "light", keepdims=1)
            one = graph.node("Div", [light, light], "one_if_lit")
            centre = graph.node("Mul", [centre, one], "centre_if_lit")
        size = graph.constant("size", [[0.25, 0.25]])
        graph.node("Concat", [centre, size], "bbox_cxcywh", axis=1)


def _template_tokens(graph: _Graph, name: str) -> str:
    """Tokens of a template, each with the box in it."""
    patches = graph.patches("template", TEMPLATE_PX)
    zeros = graph.constant("zeros", np.zeros((1, 4)))
    graph.node("Concat", [zeros, "template_bbox_cxcywh"], "box_row", axis=1)
    graph.node("Reshape", ["box_row", graph.constant("row", [1, 1, WIDTH], np.int64)], "box_token")
    return graph.node("Add", [patches, "box_token"], name)


def _search_tokens(graph: _Graph, tokens: str) -> str:
    """Cut out ``search_tokens``; gives the name of their mean."""
    bounds = [
        graph.constant("first", [TEMPLATE_TOKENS], np.int64),
        graph.constant("end", [TOKENS], np.int64),
        graph.constant("token_axis", [1], np.int64),
    ]
    graph.node("Slice", [tokens, *bounds], "search_tokens")
    return graph.node("ReduceMean", ["search_tokens", "token_axis"], "mean", keepdims=0)


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(spec.name, elem_type, spec.shape)
