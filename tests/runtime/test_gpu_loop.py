"""Whole frames on a real GPU, with torch's kernels; ``tests/emulated`` does so without one."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tolerances import BETWEEN_DEVICES

from edgetrack.backends.cuda.driver import find_cuda_device
from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.runtime.frame_source import GpuFrame
from edgetrack.tracker import Tracker, TrackResult

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def clip() -> list[Any]:
    if find_cuda_device() is None or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and a CUDA build of torch")
    return list(render_clip(num_frames=60, width=640, height=480, seed=3))


def follow(tracker: Tracker, frames: list[Any], bbox: Any) -> list[TrackResult]:
    tracker.init(frames[0], bbox)
    pending = [tracker.update_async(frame) for frame in frames[1:]]
    return [dataclasses.replace(p.result(), latency_ms=0.0) for p in pending]


def test_all_ways_to_decide_agree_bit_for_bit(shipped_bundle: Bundle, clip: list[Any]) -> None:
    found = {}
    for decision in ("host", "flag", "device"):
        with Tracker(shipped_bundle, backend="torch-cuda", exit_decision=decision) as tracker:
            assert tracker.exit_decision == decision
            found[decision] = follow(tracker, [f for f, _ in clip], clip[0][1])

    assert found["flag"] == found["host"]
    assert found["device"] == found["host"]


@pytest.mark.parametrize("family", ["dytrack", "fartrack"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_all_ways_agree_on_heads_and_on_what_is_carried(
    tmp_path: Path, clip: list[Any], family: str, precision: str
) -> None:
    from family_bundles import export_family

    bundle = export_family(family, tmp_path / "bundle")
    frames, bbox = [frame for frame, _ in clip], clip[0][1]
    found = {}
    for decision in ("host", "flag", "device"):
        with Tracker(
            bundle, backend="torch-cuda", precision=precision, exit_decision=decision
        ) as tracker:
            assert tracker.exit_decision == decision
            found[decision] = follow(tracker, frames, bbox)

    assert found["device"] == found["flag"] == found["host"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_follows_as_the_cpu_does(
    shipped_bundle: Bundle, clip: list[Any], precision: str
) -> None:
    frames = [frame for frame, _ in clip]
    with Tracker(shipped_bundle, backend="eager") as tracker:
        expected = follow(tracker, frames, clip[0][1])
    with Tracker(shipped_bundle, backend="torch-cuda", precision=precision) as tracker:
        found = follow(tracker, frames, clip[0][1])

    difference = np.abs(np.array([r.bbox for r in found]) - [r.bbox for r in expected])
    assert difference.mean() < BETWEEN_DEVICES["mean_bbox_px"]


def test_frames_of_torch_are_taken_as_they_are(shipped_bundle: Bundle, clip: list[Any]) -> None:
    frames = [frame for frame, _ in clip]
    with Tracker(shipped_bundle, backend="torch-cuda") as tracker:
        expected = follow(tracker, frames, clip[0][1])
        there = [torch.from_numpy(frame).cuda() for frame in frames]
        assert follow(tracker, there, clip[0][1]) == expected
        rgb = [GpuFrame(t.flip(-1).contiguous(), format="rgb8") for t in there]
        assert follow(tracker, rgb, clip[0][1]) == expected
