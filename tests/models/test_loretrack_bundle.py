"""A LoReTrack outside torch: its graphs, its closed loop, its engines."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded import record_inputs
from small_models import PRIOR, randomise_norms
from tolerances import BETWEEN_BACKENDS

from edgetrack.backends import get_backend
from edgetrack.backends.trt.layer_table import read_layer_table
from edgetrack.build import build
from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.export import export_bundle
from edgetrack.models.loretrack import LoReTrackTiny
from edgetrack.models.registry import create_model
from edgetrack.models.segmented import SegmentedModel
from edgetrack.parity import compare, open_runner
from edgetrack.quantize.calibrate import MIN_CROPS, calibrate
from edgetrack.tracker import Tracker


def export(model: SegmentedModel, folder: Path) -> Bundle:
    return export_bundle(
        model,
        folder,
        name="loretrack-small",
        operating_points={"balanced": ()},
        operating_point="balanced",
        provenance={},
        licence="random weights",
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    model = LoReTrackTiny(dataclasses.replace(PRIOR, exit_after=(2,)))
    randomise_norms(model)
    return export(model, tmp_path_factory.mktemp("loretrack") / "bundle")


def test_every_graph_says_the_same_on_onnx_runtime(bundle: Bundle) -> None:
    crops = record_inputs(bundle.crops, num_frames=2)
    with_torch = open_runner(bundle, get_backend("eager"), engines=None)
    with_ort = open_runner(bundle, get_backend("onnxruntime"), engines=None)

    report = compare(bundle, with_torch, with_ort, crops)

    limits = BETWEEN_BACKENDS["float32"]
    assert {t.graph for t in report.tensors} == {"template", "segment_0"}
    for tensor in report.tensors:
        limit = limits.get(tensor.tensor, limits["tokens"])
        assert tensor.max_abs <= limit, (tensor.graph, tensor.tensor)


def test_a_bundle_with_one_exit_tracks(bundle: Bundle) -> None:
    frames = list(render_clip(num_frames=4, width=240, height=180, seed=3))

    with Tracker(bundle, backend="onnxruntime") as tracker:
        tracker.init(frames[0][0], frames[0][1].tolist())
        results = [tracker.update(frame) for frame, _ in frames[1:]]

    assert [result.exit_index for result in results] == [0, 0, 0]
    assert all(np.isfinite(result.bbox).all() for result in results)


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensorrt_builds_every_graph_of_tiny(precision: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx, which builds without a GPU")
    bundle = export(create_model("loretrack-tiny"), tmp_path / "bundle")
    if precision == "int8":
        recorded = record_inputs(bundle.crops, num_frames=MIN_CROPS)
        crops = [(f"clip/{k:06d}", inputs) for k, inputs in enumerate(recorded)]
        calibrate(bundle, crops, method="max").write(tmp_path / "calibration")

    engines = build(
        bundle,
        backend="tensorrt-rtx",
        precision=precision,
        calibration=tmp_path / "calibration" if precision == "int8" else None,
        output=tmp_path / "engines",
    )

    assert set(engines.graphs) == {graph.name for graph in bundle.graphs}
    for name, graph in engines.graphs.items():
        rows = read_layer_table(engines.path / graph.file)
        products = {row.precision for row in rows if row.is_product}
        # INT8 pays for no layer of the template graph: each is too small.
        assert ("Int8" in products) == (precision == "int8" and name != "template"), name
        assert "Float" not in products, name
        assert sum(row.is_attention for row in rows) == (6 if name == "segment_0" else 0)
