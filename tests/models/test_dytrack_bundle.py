"""A DyTrack outside torch: its graphs, its runtime, its engines."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

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
from numpy.testing import assert_allclose, assert_array_equal
from recorded import record_inputs
from small_models import DYTRACK_PATCH, DYTRACK_PRIOR, make_dytrack
from tolerances import BETWEEN_BACKENDS, FROM_TWIN

from edgetrack.backends import get_backend
from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.models.dytrack import DyTrack, DyTrackConfig
from edgetrack.models.registry import create_model
from edgetrack.parity import ask_exits, compare, open_runner
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.tracker import Tracker

UInt8Array = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[DyTrackConfig], Bundle]:
    """Bundles of random models, exported once each."""
    made: dict[DyTrackConfig, Bundle] = {}

    def bundle_of(config: DyTrackConfig) -> Bundle:
        if config not in made:
            folder = tmp_path_factory.mktemp("d") / "bundle"
            made[config] = export_untrained(make_dytrack(config), folder)
        return made[config]

    return bundle_of


@pytest.fixture(scope="module", params=[DYTRACK_PATCH, DYTRACK_PRIOR], ids=["patch", "prior"])
def bundle(request: pytest.FixtureRequest, bundles: Callable[[DyTrackConfig], Bundle]) -> Bundle:
    return bundles(request.param)


@pytest.fixture(scope="module")
def clip() -> list[tuple[UInt8Array, npt.NDArray[np.float32]]]:
    return list(render_clip(num_frames=8, width=240, height=180, seed=3))


def test_every_exit_has_a_head_and_only_heads_write_boxes(bundle: Bundle) -> None:
    writers = {g.name for g in bundle.graphs for t in g.outputs if t.name == "bbox_cxcywh"}

    assert writers == {head.name for head in bundle.heads}
    assert len(bundle.heads) == bundle.num_exits
    assert set(bundle.operating_points) == {"fast", "medium", "base"}
    assert bundle.criterion == "score"


def test_no_graph_holds_what_only_training_reads(bundle: Bundle) -> None:
    graphs = [onnx.load(bundle.graph_path(graph)).graph for graph in bundle.graphs]
    names = [weights.name for graph in graphs for weights in graph.initializer]

    assert any("branches.0.decisioner" in name for name in names)
    assert not any("adaptors" in name for name in names)


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
    assert report.exit_agreement == 1.0


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_only_the_head_of_the_exit_taken_is_run(
    bundles: Callable[[DyTrackConfig], Bundle],
    clip: list[tuple[UInt8Array, npt.NDArray[np.float32]]],
    taken: int,
) -> None:
    bundle = bundles(DYTRACK_PATCH)
    policy = ExitPolicy.fixed(taken, num_exits=3)

    with Tracker(bundle, backend="onnxruntime", exit_policy=policy) as tracker:
        tracker.init(clip[0][0], clip[0][1].tolist())
        result = tracker.update(clip[1][0])
        spent = tracker.stage_ms

    assert result.exit_index == taken
    ran = {name for name, ms in spent.items() if np.isfinite(ms) and name.startswith("head")}
    assert ran == {f"head_{taken}"}


@dataclass(frozen=True)
class _Asking(ExitPolicy):
    """The same policy, but the box of every exit is read, which runs every head."""

    read_bbox: Callable[[], npt.NDArray[np.float32]] = field(kw_only=True)
    boxes: list[npt.NDArray[np.float32]] = field(default_factory=list, kw_only=True)

    def should_exit(self, exit_index: int, uncertainty: float, score: float) -> bool:
        self.boxes.append(self.read_bbox())
        return super().should_exit(exit_index, uncertainty, score)


def test_skipping_heads_changes_no_box(
    bundle: Bundle, clip: list[tuple[UInt8Array, npt.NDArray[np.float32]]]
) -> None:
    never = ExitPolicy.always_last(num_exits=bundle.num_exits)
    tracks: list[list[tuple[float, ...]]] = []
    num_read = 0
    for is_asking in (False, True):
        with Tracker(bundle, backend="onnxruntime", exit_policy=never) as tracker:
            if is_asking:
                asking = _Asking(never.thresholds, read_bbox=tracker.read_answer)
                tracker.exit_policy = asking
            tracker.init(clip[0][0], clip[0][1].tolist())
            tracks.append([tracker.update(frame).bbox for frame, _ in clip[1:]])
            if is_asking:
                num_read = len(asking.boxes)

    assert num_read == bundle.num_exits * (len(clip) - 1)
    assert_array_equal(tracks[0], tracks[1])


def test_a_higher_wanted_iou_means_deeper_exits_and_more_products(bundle: Bundle) -> None:
    crops = record_inputs(bundle.crops, num_frames=12)
    runner = open_runner(bundle, get_backend("onnxruntime"), engines=None)
    answers = ask_exits(bundle, runner, crops)
    heads = np.array([head.macs for head in bundle.heads])
    macs = np.cumsum([segment.macs for segment in bundle.segments]) + heads
    early = answers.score[:, :-1]

    depths, products = [], []
    for wanted in np.quantile(early, [0.1, 0.3, 0.5, 0.7, 0.9]):
        thresholds = (1 - wanted,) * (bundle.num_exits - 1)
        taken = answers.exits_taken(ExitPolicy(tuple(float(t) for t in thresholds)))
        depths.append(taken.mean())
        products.append(macs[taken].mean())

    assert all(a <= b for a, b in itertools.pairwise(depths))
    assert all(a <= b for a, b in itertools.pairwise(products))
    assert depths[0] < depths[-1]


def test_the_answers_are_those_that_they_were() -> None:
    """Weights and pixels come from formulas, so that no generator of numbers matters."""
    model = DyTrack(DYTRACK_PRIOR).eval()
    for index, tensor in enumerate(model.state_dict().values()):
        if tensor.is_floating_point():
            steps = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
            wave = torch.sin(steps * 0.7 + index)
            scale = (2.0 / max(tensor[0].numel(), 1)) ** 0.5 if tensor.ndim > 1 else 0.1
            offset = 1.0 if tensor.ndim == 1 and tensor.mean() == 1 else 0.0
            tensor.copy_(wave * scale + offset)

    def image(side: int) -> torch.Tensor:
        steps = torch.arange(side * side * 3, dtype=torch.int64)
        return ((steps * 37 + steps // 11 * 5) % 256).to(torch.uint8).reshape(1, side, side, 3)

    with torch.no_grad():
        answers = model(image(32), torch.tensor([[0.5, 0.5, 0.5, 0.4]]), image(64))

    found = [[*a["bbox_cxcywh"][0].tolist(), a["score"].item()] for a in answers]
    assert_allclose(found, GOLDEN, atol=FROM_TWIN["float32"], rtol=1e-4)


# cx, cy, w, h, score of each exit
GOLDEN = [
    [0.510024, 0.447137, 0.603530, 0.480435, 0.583219],
    [0.517946, 0.511308, 0.615703, 0.423240, 0.842894],
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    return export_untrained(
        create_model("dytrack-tiny"), tmp_path_factory.mktemp("tiny") / "bundle"
    )


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensorrt_builds_every_graph_of_tiny(tiny: Bundle, precision: str) -> None:
    tables = compile_with_rtx(tiny, precision=precision)

    for name, rows in tables.items():
        if name.startswith("segment"):
            assert ("Int8" in precisions_of_products(rows)) == (precision == "int8"), name
        assert "Float" not in precisions_of_products(rows), name
        num_blocks = {"segment_0": 1, "segment_1": 1, "segment_2": 2}.get(name, 0)
        assert num_attentions(rows) == num_blocks, name
