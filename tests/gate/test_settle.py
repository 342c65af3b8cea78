"""The gate over engines that are there: which are timed, which stay, what is written."""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from edgetrack.backends.engine import EngineSet
from edgetrack.backends.ort import PRECISION_PROPERTY, OnnxRuntimeBackend
from edgetrack.build import build
from edgetrack.bundle import Bundle, GraphSpec
from edgetrack.data.target_clips import render_target_clips
from edgetrack.errors import DeviceError, DeviceMemoryError
from edgetrack.gate import Evidence, gather, settle
from edgetrack.quantize.cache import load_cache


class SlowInt8(OnnxRuntimeBackend):
    """ONNX Runtime, where INT8 takes 5 ms longer in one segment."""

    def load(self, engine_path: Path, graph: GraphSpec) -> Any:
        engine = super().load(engine_path, graph)
        if graph.name == "segment_1" and PRECISION_PROPERTY.encode() in engine_path.read_bytes():
            enqueue = engine.enqueue
            engine.enqueue = lambda: (time.sleep(0.005), enqueue())  # type: ignore[method-assign]
        return engine


class Absent(OnnxRuntimeBackend):
    """A backend that builds for a device which is not here."""

    def load(self, engine_path: Path, graph: GraphSpec) -> Any:
        raise DeviceError("CUDA: expected a device, got none; plug one in")


class Full(OnnxRuntimeBackend):
    """A backend whose device is there, but has no room just now."""

    def load(self, engine_path: Path, graph: GraphSpec) -> Any:
        raise DeviceMemoryError("CUDA: expected 5 MB free, got 1 MB; close other programs")


@pytest.fixture(scope="module")
def engines(shipped_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float engines, and INT8 engines of all graphs."""
    folder = tmp_path_factory.mktemp("engines")
    build(
        shipped_bundle,
        backend="onnxruntime",
        precision="int8",
        calibration=shipped_bundle.path / "calibration",
        is_strict=True,
        output=folder,
    )
    return folder


@pytest.fixture(scope="module")
def evidence(shipped_bundle: Bundle) -> Evidence:
    clips = render_target_clips(num_clips=2, num_frames=17, first_seed=7)
    return gather(shipped_bundle, clips)


@pytest.fixture
def sets(engines: Path, tmp_path: Path) -> dict[str, EngineSet]:
    shutil.copytree(engines, tmp_path / "engines")
    folders = [path for path in (tmp_path / "engines").iterdir() if path.is_dir()]
    found = [EngineSet.read(path) for path in folders]
    return {engines.key.precision: engines for engines in found}


def settled(
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    sets: dict[str, EngineSet],
    evidence: Evidence,
    *,
    is_strict: bool = False,
) -> EngineSet:
    return settle(
        bundle,
        backend,
        dataclasses.replace(sets["int8"], operating_points={}, gate={}),
        cache=load_cache(bundle, bundle.path / "calibration"),
        evidence=evidence,
        is_strict=is_strict,
        build_floats=lambda: sets["fp32"],
        on_step=lambda phase, fraction: None,
    )


def test_a_segment_that_is_slower_in_int8_stays_in_float(
    shipped_bundle: Bundle, sets: dict[str, EngineSet], evidence: Evidence
) -> None:
    kept = settled(shipped_bundle, SlowInt8(), sets, evidence)

    found = kept.gate["graphs"]["segment_1"]
    assert found["int8_ms"] > max(found["float_ms"], 5)  # it sleeps for 5 ms
    assert found["reason"].startswith("INT8 is not faster (")
    assert kept.gate["graphs"].keys() == {graph.name for graph in shipped_bundle.graphs}
    assert kept.graphs["segment_1"] == sets["fp32"].graphs["segment_1"]
    assert kept.gate["graphs"]["segment_2"]["precision"] == "int8"
    file = kept.path / kept.graphs["segment_1"].file
    assert PRECISION_PROPERTY.encode() not in file.read_bytes()
    assert kept.gate["update_ms"]["chosen"] < kept.gate["update_ms"]["float"] + 4


def test_strict_keeps_a_slower_segment(
    shipped_bundle: Bundle, sets: dict[str, EngineSet], evidence: Evidence
) -> None:
    kept = settled(shipped_bundle, SlowInt8(), sets, evidence, is_strict=True)

    assert kept.graphs == sets["int8"].graphs
    assert kept.gate["graphs"]["segment_1"]["int8_ms"] > 4


def test_engines_that_do_not_run_here_are_asked_in_onnx_runtime(
    shipped_bundle: Bundle, sets: dict[str, EngineSet], evidence: Evidence
) -> None:
    kept = settled(shipped_bundle, Absent(), {"int8": sets["int8"]}, evidence)

    assert kept.graphs == sets["int8"].graphs
    assert kept.gate["not_measured"].startswith("CUDA: expected a device, got none")
    assert "engines do not run here (CUDA: expected a device, got none)" in kept.gate["sentence"]
    assert min(kept.gate["agreement"]["box_iou"]) > 0.97
    assert kept.operating_points.keys() == shipped_bundle.operating_points.keys()
    assert kept.gate["update_ms"] == {}


def test_a_full_device_ends_the_build_and_is_not_taken_for_none(
    shipped_bundle: Bundle, sets: dict[str, EngineSet], evidence: Evidence
) -> None:
    with pytest.raises(DeviceMemoryError, match="expected 5 MB free"):
        settled(shipped_bundle, Full(), sets, evidence)


def test_nothing_but_engines_is_left_in_their_folder(
    shipped_bundle: Bundle, sets: dict[str, EngineSet], evidence: Evidence
) -> None:
    before = sorted(sets["int8"].path.iterdir())

    for backend in (SlowInt8(), Absent()):
        settled(shipped_bundle, backend, sets, evidence)

    assert sorted(sets["int8"].path.iterdir()) == before
