"""A LoReTrack outside torch: its graphs, its closed loop, its engines."""

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
from recorded import record_inputs
from small_models import PRIOR, randomise_norms
from tolerances import BETWEEN_BACKENDS

from edgetrack.backends import get_backend
from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.models.loretrack import LoReTrackTiny
from edgetrack.models.registry import create_model
from edgetrack.parity import compare, open_runner
from edgetrack.tracker import Tracker


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    model = LoReTrackTiny(dataclasses.replace(PRIOR, exit_after=(2,)))
    randomise_norms(model)
    return export_untrained(model, tmp_path_factory.mktemp("loretrack") / "bundle")


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    return export_untrained(
        create_model("loretrack-tiny"), tmp_path_factory.mktemp("tiny") / "bundle"
    )


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensorrt_builds_every_graph_of_tiny(tiny: Bundle, precision: str) -> None:
    tables = compile_with_rtx(tiny, precision=precision)

    for name, rows in tables.items():
        # INT8 pays for no layer of the template graph: each is too small.
        is_int8 = precision == "int8" and name != "template"
        assert ("Int8" in precisions_of_products(rows)) == is_int8, name
        assert "Float" not in precisions_of_products(rows), name
        assert num_attentions(rows) == (4 if name == "segment_0" else 0), name
