from pathlib import Path

import numpy as np
import pytest
from recorded import record_inputs

from edgetrack.backends import get_backend
from edgetrack.backends.eager import EagerBackend
from edgetrack.bundle import Bundle
from edgetrack.errors import CheckpointError, EngineError
from edgetrack.runtime.buffers import allocate
from edgetrack.tracker import Tracker


def test_it_is_found_by_its_name() -> None:
    assert isinstance(get_backend("eager"), EagerBackend)


def test_an_engine_writes_its_graphs_outputs_and_nothing_else(small_bundle: Bundle) -> None:
    backend, buffers = EagerBackend(), allocate(small_bundle)
    engines = [backend.load_onnx(small_bundle.graph_path(g), g) for g in small_bundle.graphs]
    for engine in engines:
        engine.bind(buffers)
    for name, value in record_inputs(small_bundle.crops, num_frames=1)[0].items():
        if name in buffers:
            buffers[name][...] = value

    for graph, engine in zip(small_bundle.graphs, engines, strict=True):
        before = {name: value.copy() for name, value in buffers.items()}
        engine.enqueue()
        changed = {n for n, value in buffers.items() if not np.array_equal(value, before[n])}
        assert changed == {spec.name for spec in graph.outputs}


def test_a_tracker_runs_on_it(small_bundle: Bundle) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    with Tracker(small_bundle, backend="eager") as tracker:
        tracker.init(frame, (60, 40, 30, 30))

        result = tracker.update(frame)

    assert np.isfinite(result.bbox).all()


def test_a_bundle_without_weights_is_refused(toy: Bundle) -> None:
    with pytest.raises(CheckpointError, match=r"expected weights\.safetensors, got none"):
        Tracker(toy, backend="eager")


def test_it_has_no_engines_to_build_or_load(toy: Bundle, tmp_path: Path) -> None:
    backend, path = EagerBackend(), toy.graph_path(toy.template)

    with pytest.raises(EngineError, match=r"^backend eager: expected nothing to build"):
        backend.compile(path, tmp_path / "engine", precision="fp32")
    with pytest.raises(EngineError, match="expected no engines for backend eager"):
        backend.load(path, toy.template)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_it_computes_in_fp32_alone(precision: str) -> None:
    with pytest.raises(ValueError, match=r"^precision: expected 'fp32' for backend 'eager'"):
        EagerBackend().key(model="m", bundle_digest="0", precision=precision)
