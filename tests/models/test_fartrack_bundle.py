"""A FARTrack outside torch: its graphs, its state from frame to frame, its engines."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from compiled import (
    compile_with_rtx,
    export_untrained,
    num_attentions,
    precisions_of_products,
)
from numpy.testing import assert_allclose
from small_fartrack import FARTRACK_PATCH, FARTRACK_PRIOR, make_fartrack
from tolerances import BETWEEN_BACKENDS, BETWEEN_LOOPS

from edgetrack.backends import get_backend
from edgetrack.bundle import Bundle
from edgetrack.crops import Cropper, CropWindow
from edgetrack.data.synthetic import render_clip
from edgetrack.models.registry import create_model, load_model
from edgetrack.parity import compare, open_runner
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.recording import record_crops
from edgetrack.runtime.target import TargetRules, TargetState
from edgetrack.tracker import Tracker

UInt8Array = npt.NDArray[np.uint8]
# Random weights are never sure, so the gate is almost open.
SMALL = {
    "patch": dataclasses.replace(FARTRACK_PATCH, min_update_score=0.001),
    "prior": FARTRACK_PRIOR,
}


def recorded(
    bundle: Bundle, clip: list[tuple[UInt8Array, npt.NDArray[np.float32]]]
) -> list[dict[str, npt.NDArray[Any]]]:
    """What the graphs read at each frame but the first, what was carried into it included."""
    frames = (frame for frame, _ in clip)
    return [read for _, read in record_crops(bundle, frames, clip[0][1].tolist(), name="clip")]


@pytest.fixture(scope="module", params=SMALL.values(), ids=SMALL.keys())
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    # Seed 4 gives boxes of some width and height.
    folder = tmp_path_factory.mktemp("f") / "bundle"
    return export_untrained(make_fartrack(request.param, seed=4), folder)


@pytest.fixture(scope="module")
def clip() -> list[tuple[UInt8Array, npt.NDArray[np.float32]]]:
    return list(render_clip(num_frames=14, width=240, height=180, seed=3))


def test_the_bank_and_its_clock_are_carried(bundle: Bundle) -> None:
    assert bundle.update is not None
    written = {spec.name: spec for spec in bundle.update.outputs}
    first = {spec.name: spec for spec in bundle.template.outputs}

    assert {"template_tokens", "bank", "bank_clock"} <= set(bundle.carried)
    assert set(bundle.carried.values()) == set(written)
    assert first["bank_clock"].dtype == written["next_bank_clock"].dtype == "int32"


def test_frame_numbers_are_never_divided_as_floats(bundle: Bundle) -> None:
    """Floats cannot tell large numbers apart, and FP16 engines fail after 2,048 frames."""
    assert bundle.update is not None
    graph = onnx.load(bundle.graph_path(bundle.update)).graph
    reached, operators = {"bank_clock"}, []
    for node in graph.node:
        if set(node.input) & reached and node.op_type not in ("Where", "Equal", "GatherElements"):
            reached |= set(node.output)
            operators.append(node.op_type)
            if node.op_type == "Cast":
                to = next(a.i for a in node.attribute if a.name == "to")
                assert to not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)

    assert operators.count("Div") == 3


def test_every_graph_says_the_same_on_onnx_runtime(
    bundle: Bundle, clip: list[tuple[UInt8Array, npt.NDArray[np.float32]]]
) -> None:
    crops = recorded(bundle, clip)[:4]
    with_torch = open_runner(bundle, get_backend("eager"), engines=None)
    with_ort = open_runner(bundle, get_backend("onnxruntime"), engines=None)

    report = compare(bundle, with_torch, with_ort, crops)

    limits = BETWEEN_BACKENDS["float32"]
    assert {t.graph for t in report.tensors} == {graph.name for graph in bundle.graphs}
    for tensor in report.tensors:
        limit = limits.get(tensor.tensor, limits["tokens"])
        assert tensor.max_abs <= limit, (tensor.graph, tensor.tensor)


@pytest.mark.parametrize("backend", ["onnxruntime", "eager"])
def test_a_tracker_carries_the_templates_as_a_slow_loop_does(
    bundle: Bundle, clip: list[tuple[UInt8Array, npt.NDArray[np.float32]]], backend: str
) -> None:
    model = load_model(bundle)
    crops = bundle.crops
    bbox = np.asarray(clip[0][1], np.float32)
    target = TargetState(bbox, frame_shape=clip[0][0].shape, rules=TargetRules.off())

    def cut(frame: UInt8Array, window: CropWindow, size_px: int) -> torch.Tensor:
        pixels = np.empty((size_px, size_px, 3), np.uint8)
        Cropper(size_px).crop(frame, window, out=pixels)
        return torch.from_numpy(pixels)[None]

    def template(frame: UInt8Array) -> dict[str, torch.Tensor]:
        window = CropWindow.around(target.bbox_xywh, factor=crops.template_factor)
        inside = torch.from_numpy(window.to_crop(target.bbox_xywh))[None]
        pixels = cut(frame, window, crops.template_size_px)
        return {"template": pixels, "template_bbox_cxcywh": inside}

    expected, clocks = [], []
    with torch.inference_mode():
        state = model.embed_template(**template(clip[0][0]))
        for frame, _ in clip[1:]:
            window = target.search_window(crops.search_factor)
            state["search_region"] = cut(frame, window, crops.search_size_px)
            for index in range(model.num_exits):
                state |= model.run_segment(index, state)
            answer = window.to_frame(state["bbox_cxcywh"][0].numpy())
            target.settle(answer, float(state["score"]))
            expected.append(target.bbox_xywh.copy())
            written = model.run_update({**state, **template(frame)})
            state |= {name: written[source] for name, source in model.carried.items()}
            clocks.append(state["bank_clock"].tolist()[0])

    never = ExitPolicy.always_last(num_exits=bundle.num_exits)
    rules = TargetRules.off()
    with Tracker(bundle, backend=backend, exit_policy=never, rules=rules) as tracker:
        tracker.init(clip[0][0], clip[0][1].tolist())
        boxes = [tracker.update(frame).bbox for frame, _ in clip[1:]]

    assert clocks[-1][0] > 4  # templates entered, so the bank was thinned
    assert_allclose(boxes, np.stack(expected), atol=BETWEEN_LOOPS["bbox_px"])


def test_a_tracker_that_starts_again_forgets_its_templates(
    bundle: Bundle, clip: list[tuple[UInt8Array, npt.NDArray[np.float32]]]
) -> None:
    def run(tracker: Tracker) -> list[tuple[float, ...]]:
        tracker.init(clip[0][0], clip[0][1].tolist())
        return [tracker.update(frame).bbox for frame, _ in clip[1:]]

    with Tracker(bundle, backend="onnxruntime") as tracker:
        first, again = run(tracker), run(tracker)

    assert first == again


@pytest.fixture(scope="module", params=["micro", "exits"])
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    model = create_model(f"fartrack-{request.param}")
    return export_untrained(model, tmp_path_factory.mktemp("variant") / "bundle")


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensorrt_builds_every_graph(variant: Bundle, precision: str) -> None:
    tables = compile_with_rtx(variant, precision=precision)

    ends = variant.config["exit_after"]
    blocks = {f"segment_{k}": n for k, n in enumerate(np.diff((0, *ends)))}
    for name, rows in tables.items():
        assert "Float" not in precisions_of_products(rows), name
        if name in blocks:
            assert ("Int8" in precisions_of_products(rows)) == (precision == "int8"), name
            assert num_attentions(rows) == blocks[name], name
