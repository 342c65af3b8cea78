"""What is left of a pruned model is an ordinary bundle: it answers, tracks and compiles."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from compiled import compile_with_rtx, export_untrained, precisions_of_products
from recorded import record_inputs
from small_families import FAMILIES, make_cnn
from small_models import PRIOR, make_model
from tolerances import BETWEEN_BACKENDS

from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.models.early_exit_vit import CONFIGS
from edgetrack.models.pruning import Gates
from edgetrack.models.registry import load_model
from edgetrack.models.segmented import SegmentedModel
from edgetrack.models.units import find_units
from edgetrack.quantize.ort_attention import fuse_attention
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.tracker import Tracker
from edgetrack.train.prune import Pruned, magnitude_scores, prune

pytestmark = pytest.mark.slow
EXACTNESS = 1e-5


def pruned_to(model: SegmentedModel, budget: float) -> Pruned:
    return prune(model, magnitude_scores(model), budget)


def run_graphs(bundle: Bundle, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """What every graph of a bundle writes, on ONNX Runtime, in their order."""
    state, written = dict(inputs), []
    for graph in bundle.graphs:
        session = onnxruntime.InferenceSession(bundle.graph_path(graph))
        outputs = session.run(None, {spec.name: state[spec.name] for spec in graph.inputs})
        names = [spec.name for spec in graph.outputs]
        written.append(dict(zip(names, outputs, strict=True)))
        state |= written[-1]
    return written


@pytest.mark.parametrize("family", ["early_exit_vit", "early_exit_vit, prior", "siamese_cnn"])
def test_the_exported_pruned_model_answers_as_the_exported_masked_one(
    family: str, tmp_path: Path
) -> None:
    model = FAMILIES[family]()
    pruned = pruned_to(model, 0.25)
    masked = copy.deepcopy(model)
    Gates(masked, find_units(masked)).close_all_but(pruned.kept)
    inputs = record_inputs(model.crops, num_frames=1)[0]

    narrow = run_graphs(export_untrained(pruned.model, tmp_path / "narrow"), inputs)
    wide = run_graphs(export_untrained(masked, tmp_path / "wide"), inputs)

    for one, other in zip(narrow, wide, strict=True):
        for name in one.keys() & {"bbox_cxcywh", "score", "uncertainty"}:
            assert np.abs(one[name] - other[name]).max() < EXACTNESS


@pytest.fixture(scope="module", params=["hybrid", "cnn", "dense cnn"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A hybrid and a CNN of which 1 % of the units are left, and a CNN as it is."""
    model = make_model(CONFIGS["tiny"]) if request.param == "hybrid" else make_cnn()
    left = model if request.param == "dense cnn" else pruned_to(model, 0.01).model
    return export_untrained(left, tmp_path_factory.mktemp("pruned") / "bundle")


def test_a_bundle_loads_and_its_graphs_answer_as_the_model(bundle: Bundle) -> None:
    model = load_model(Bundle.load(bundle.path))
    inputs = record_inputs(model.crops, num_frames=1)[0]
    with torch.no_grad():
        answers = model(**{k: torch.from_numpy(v) for k, v in inputs.items()})

    _, *segments = run_graphs(bundle, inputs)

    for answer, written in zip(answers, segments, strict=True):
        for name, value in answer.items():
            difference = np.abs(value.numpy() - written[name]).max()
            assert difference < BETWEEN_BACKENDS["float32"][name]


def test_a_bundle_tracks_at_every_exit(bundle: Bundle) -> None:
    frames = list(render_clip(num_frames=8, seed=3))
    policies = [ExitPolicy.fixed(k, num_exits=3) for k in range(3)] + [None]

    for policy in policies:
        with Tracker(bundle, backend="onnxruntime", exit_policy=policy) as tracker:
            tracker.init(*frames[0])
            results = [tracker.update(frame) for frame, _ in frames[1:]]
        assert np.isfinite([r.bbox for r in results]).all()


@pytest.mark.rtx
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensorrt_rtx_builds_it(bundle: Bundle, precision: str) -> None:
    tables = compile_with_rtx(bundle, precision=precision)

    for name, rows in tables.items():
        assert "Float" not in precisions_of_products(rows), name


def test_narrow_attention_is_still_one_node_on_a_cpu(tmp_path: Path) -> None:
    bundle = export_untrained(pruned_to(make_model(PRIOR), 0.5).model, tmp_path)

    fused = fuse_attention(onnx.load(bundle.graph_path(bundle.segments[1])))

    assert [n.op_type for n in fused.graph.node].count("MultiHeadAttention") == 3  # bypass too
