"""An OSTrack outside torch: its graphs, its closed loop, its engines."""

import dataclasses

import numpy as np
import pytest
import torch
from compiled import (
    compile_with_rtx,
    export_untrained,
    num_attentions,
    precisions_of_products,
)
from numpy.testing import assert_allclose
from published_ostrack import (
    clip_box,
    map_box_back,
    ostrack_box,
    ostrack_maps,
    ostrack_state_dict,
    sample_target,
)
from recorded import record_inputs
from tolerances import BETWEEN_BACKENDS, FROM_TWIN

from edgetrack.backends import get_backend
from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.models.ostrack import OSTrack, OSTrackConfig
from edgetrack.models.published import PublishedCheckpoint, load_ostrack
from edgetrack.models.registry import load_model
from edgetrack.parity import compare, open_runner
from edgetrack.tracker import Tracker

WEIGHTS = ostrack_state_dict(dim=64, depth=10, template_tokens=16, search_tokens=64, head_dim=32)
WIDE = OSTrackConfig(
    template_size_px=64,
    search_size_px=128,
    dim=128,
    num_heads=2,
    exit_after=(4,),
    head_channels=(64, 48, 32, 32),
)


@pytest.fixture(scope="module", params=[False, True], ids=["all candidates", "eliminating"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = load_ostrack(PublishedCheckpoint(WEIGHTS), is_eliminating=request.param)
    return export_untrained(model, tmp_path_factory.mktemp("ostrack") / "bundle")


def test_the_manifest_asks_for_the_published_crops(bundle: Bundle) -> None:
    assert bundle.crops.geometry == "ostrack"
    assert bundle.num_exits == 1
    assert bundle.thresholds() == ()


def test_every_graph_says_the_same_on_onnx_runtime(bundle: Bundle) -> None:
    crops = record_inputs(bundle.crops, num_frames=2)
    with_torch = open_runner(bundle, get_backend("eager"), engines=None)
    with_ort = open_runner(bundle, get_backend("onnxruntime"), engines=None)

    report = compare(bundle, with_torch, with_ort, crops)

    limits = BETWEEN_BACKENDS["float32"]
    assert {t.graph for t in report.tensors} == {graph.name for graph in bundle.graphs}
    for tensor in report.tensors:
        limit = limits.get(tensor.tensor, limits["tokens"])
        assert tensor.max_abs <= limit, (tensor.graph, tensor.tensor)


def test_a_bundle_gives_its_weights_back(bundle: Bundle) -> None:
    model = load_model(bundle)

    assert all(torch.equal(value, WEIGHTS[name]) for name, value in model.state_dict().items())


def track_slowly(
    frames: list[np.ndarray], bbox: list[float], *, eliminate_at: tuple[int, ...]
) -> list[list[float]]:
    """OSTrack's closed loop, written out: RGB frames, plain Python numbers."""

    def crop(
        frame: np.ndarray, box: list[float], factor: float, size: int
    ) -> tuple[torch.Tensor, float]:
        pixels, resize_factor = sample_target(frame, box, factor=factor, size_px=size)
        return torch.from_numpy(np.ascontiguousarray(pixels[None])), resize_factor

    rgb = [np.ascontiguousarray(frame[..., ::-1]) for frame in frames]
    template, _ = crop(rgb[0], bbox, 2.0, 64)
    state, track = list(bbox), []
    for frame in rgb[1:]:
        search, resize_factor = crop(frame, state, 5.0, 128)
        maps = ostrack_maps(WEIGHTS, template, search, num_heads=1, eliminate_at=eliminate_at)
        box = ostrack_box(*(m[0] for m in maps))
        back = map_box_back(box, state, size_px=128, resize_factor=resize_factor)
        state = clip_box(back, height=frame.shape[0], width=frame.shape[1])
        track.append(state)
    return track


@pytest.mark.parametrize("start", [(60.0, 50.0, 40.0, 30.0), (205.5, 150.25, 30.0, 24.0)])
def test_the_closed_loop_is_the_published_one(
    bundle: Bundle, start: tuple[float, float, float, float]
) -> None:
    """Windows that leave the frame included: random weights drift to its border soon."""
    frames = [frame for frame, _ in render_clip(num_frames=8, width=240, height=180, seed=3)]

    with Tracker(bundle, backend="onnxruntime") as tracker:
        tracker.init(frames[0], start)
        track = [tracker.update(frame).bbox for frame in frames[1:]]

    eliminate_at = tuple(bundle.config["eliminate_at"])
    expected = track_slowly(frames, list(start), eliminate_at=eliminate_at)
    assert_allclose(track, expected, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("is_eliminating", [False, True])
def test_the_answers_are_those_that_they_were(is_eliminating: bool) -> None:
    """Weights and pixels come from formulas, so that no generator of numbers matters."""
    waves = {}
    for index, (name, tensor) in enumerate(WEIGHTS.items()):
        steps = torch.arange(max(tensor.numel(), 1), dtype=torch.float64).reshape(tensor.shape)
        wave = torch.sin(steps * 0.7 + index)
        scale = (2.0 / max(tensor[0].numel(), 1)) ** 0.5 if tensor.ndim > 1 else 0.1
        is_one = ".norm" in name or ".1." in name.removeprefix("backbone.blocks")
        is_positive = name.endswith(("running_var", "weight")) and tensor.ndim == 1 and is_one
        waves[name] = (wave * scale + is_positive).to(tensor.dtype)

    def image(side: int) -> torch.Tensor:
        steps = torch.arange(side * side * 3, dtype=torch.int64)
        return ((steps * 37 + steps // 11 * 5) % 256).to(torch.uint8).reshape(1, side, side, 3)

    model = load_ostrack(PublishedCheckpoint(waves), is_eliminating=is_eliminating)
    (answer,) = model(image(64), torch.tensor([[0.5, 0.5, 0.5, 0.4]]), image(128))

    found = [*answer["bbox_cxcywh"][0].tolist(), answer["score"].item()]
    assert_allclose(found, GOLDEN[is_eliminating], atol=FROM_TWIN["float32"], rtol=1e-4)


# cx, cy, w, h, score
GOLDEN = {
    False: [0.361527, 0.492831, 0.494298, 0.479969, 0.533380],
    True: [0.361041, 0.493679, 0.494298, 0.479969, 0.542051],
}


@pytest.fixture(scope="module", params=[(), (1, 2)], ids=["all candidates", "eliminating"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    config = dataclasses.replace(WIDE, eliminate_at=request.param)
    return export_untrained(OSTrack(config), tmp_path_factory.mktemp("wide") / "bundle")


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensorrt_builds_every_graph(wide: Bundle, precision: str) -> None:
    tables = compile_with_rtx(wide, precision=precision)

    rows = tables["segment_0"]
    assert ("Int8" in precisions_of_products(rows)) == (precision == "int8")
    assert "Float" not in precisions_of_products(rows)
    assert num_attentions(rows) == WIDE.exit_after[0]
