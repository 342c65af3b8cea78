import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from edgetrack.backends.ort import OnnxRuntimeBackend
from edgetrack.bundle import Bundle, GraphSpec
from edgetrack.data.target_clips import TargetClip, render_target_clips
from edgetrack.gate.timing import time_trackers
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.tracker import Tracker


class Sleepy(OnnxRuntimeBackend):
    """ONNX Runtime, where one segment takes 10 ms longer."""

    def load_onnx(self, onnx_path: Path, graph: GraphSpec) -> Any:
        engine = super().load_onnx(onnx_path, graph)
        if graph.name == "segment_1":
            enqueue = engine.enqueue
            engine.enqueue = lambda: (time.sleep(0.01), enqueue())  # type: ignore[method-assign]
        return engine


@pytest.fixture(scope="module")
def clips() -> list[TargetClip]:
    return render_target_clips(num_clips=2, num_frames=5, first_seed=0)


def open_tracker(bundle: Bundle, tmp_path: Path, backend: OnnxRuntimeBackend) -> Tracker:
    policy = ExitPolicy.always_last(num_exits=bundle.num_exits)
    return Tracker(bundle, backend=backend, exit_policy=policy, engines=tmp_path)


def test_the_segment_that_takes_longer_is_named(
    toy: Bundle, tmp_path: Path, clips: list[TargetClip]
) -> None:
    with (
        open_tracker(toy, tmp_path, OnnxRuntimeBackend()) as quick,
        open_tracker(toy, tmp_path, Sleepy()) as slow,
    ):
        times = time_trackers({"quick": quick, "slow": slow}, clips)

    assert times["slow"].stage_ms["segment_1"] > 10 > times["quick"].stage_ms["segment_1"]
    assert times["slow"].stage_ms["segment_0"] < 10
    assert times["slow"].update_ms > 10 > times["quick"].update_ms


def test_clips_of_one_frame_are_refused(
    toy: Bundle, tmp_path: Path, clips: list[TargetClip]
) -> None:
    one = TargetClip("one", clips[0].bbox, lambda: itertools.islice(clips[0].frames(), 1))

    with (
        open_tracker(toy, tmp_path, OnnxRuntimeBackend()) as tracker,
        pytest.raises(ValueError, match="at least two frames, got none"),
    ):
        time_trackers({"one": tracker}, [one])


def test_a_long_clip_is_read_as_far_as_is_needed(
    toy: Bundle, tmp_path: Path, clips: list[TargetClip]
) -> None:
    read = 0

    def endless() -> Any:
        nonlocal read
        for frame in itertools.cycle(list(clips[0].frames())):
            read += 1
            yield frame

    with open_tracker(toy, tmp_path, OnnxRuntimeBackend()) as tracker:
        time_trackers({"one": tracker}, [TargetClip("endless", clips[0].bbox, endless)])

    assert read < 200
