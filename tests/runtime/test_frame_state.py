"""Heads that run only where their exit is taken, and state that is carried from frame to frame."""

import dataclasses
import gc
import sys
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from toy_bundle import NUM_SEGMENTS, SCORES

from edgetrack.backends.engine import Engine
from edgetrack.backends.ort import OnnxRuntimeBackend
from edgetrack.bundle import Bundle
from edgetrack.crops import Cropper, CropWindow
from edgetrack.data.synthetic import render_clip
from edgetrack.runtime.host_loop import HostLoop
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules
from edgetrack.tracker import Tracker

Clip = list[tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]]


class CountedEngine:
    """An engine that counts its runs, and keeps what it was bound to."""

    def __init__(self, engine: Engine) -> None:
        self.num_runs = 0
        self._engine = engine

    def bind(self, buffers: Any) -> None:
        self.buffers = buffers
        self._engine.bind(buffers)

    def enqueue(self) -> None:
        self.num_runs += 1
        self._engine.enqueue()

    def close(self) -> None:
        self._engine.close()


class Rig:
    """A loop over engines that are counted."""

    def __init__(self, bundle: Bundle) -> None:
        backend = OnnxRuntimeBackend(num_threads=1)
        self.engines = {
            g.name: CountedEngine(backend.load_onnx(bundle.graph_path(g), g)) for g in bundle.graphs
        }
        self.loop = HostLoop(bundle, list(self.engines.values()), rules=TargetRules.off())

    def tensor(self, name: str) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = self.engines["template"].buffers[name].copy()
        return found

    def runs(self) -> dict[str, int]:
        return {name: engine.num_runs for name, engine in self.engines.items()}


@pytest.fixture(scope="module")
def clip() -> Clip:
    return list(render_clip(num_frames=12, width=160, height=120, seed=5))


@pytest.fixture
def rig(toy_with_memory: Bundle) -> Iterator[Rig]:
    rig = Rig(toy_with_memory)
    yield rig
    rig.loop.close()


def without_time(bundle: Bundle, clip: Clip, **options: Any) -> list[Any]:
    with Tracker(bundle, num_threads=1, **options) as tracker:
        tracker.init(*clip[0])
        return [dataclasses.replace(tracker.update(f), latency_ms=0) for f, _ in clip[1:]]


@pytest.mark.parametrize("exit_index", range(NUM_SEGMENTS))
def test_heads_of_other_exits_do_not_run(rig: Rig, clip: Clip, exit_index: int) -> None:
    rig.loop.start(*clip[0])
    before = rig.runs()

    rig.loop.submit(clip[1][0], ExitPolicy.fixed(exit_index, num_exits=NUM_SEGMENTS))

    ran = {name for name, count in rig.runs().items() if count > before[name]}
    segments = {f"segment_{k}" for k in range(exit_index + 1)}
    assert ran == segments | {f"head_{exit_index}", "update"}


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.6, 1.1])
def test_a_head_gives_the_box_that_its_segment_would(
    toy: Bundle, toy_with_heads: Bundle, clip: Clip, threshold: float
) -> None:
    policy = ExitPolicy.entropy(threshold, num_exits=NUM_SEGMENTS)

    assert without_time(toy_with_heads, clip, exit_policy=policy) == without_time(
        toy, clip, exit_policy=policy
    )


def test_a_policy_may_ask_for_the_box_of_each_exit(toy_with_heads: Bundle, clip: Clip) -> None:
    boxes = []

    class Asking(ExitPolicy):
        def should_exit(self, exit_index: int, uncertainty: float, score: float) -> bool:
            boxes.append(tracker.read_answer())
            return super().should_exit(exit_index, uncertainty, score)

    with Tracker(toy_with_heads, exit_policy=Asking((0.0, 0.0))) as tracker:
        tracker.init(*clip[0])
        result = tracker.update(clip[1][0])

        assert list(tracker.stage_ms) == [
            *("crop", "segment_0", "segment_1", "segment_2", "head_0", "head_1", "head_2"),
            "decide",
        ]
    assert len(boxes) == NUM_SEGMENTS
    np.testing.assert_allclose(boxes[-1], result.bbox)


def test_the_update_sees_the_target_where_it_was_found(rig: Rig, clip: Clip) -> None:
    crops = rig.loop._bundle.crops
    rig.loop.start(*clip[0])
    frame = clip[1][0]

    result = rig.loop.submit(frame, ExitPolicy.fixed(0, num_exits=NUM_SEGMENTS)).result()

    box = np.array(result.bbox, np.float32)
    window = CropWindow.around(box, factor=crops.template_factor)
    expected = np.empty((crops.template_size_px, crops.template_size_px, 3), np.uint8)
    Cropper(crops.template_size_px).crop(frame, window, out=expected)
    np.testing.assert_array_equal(rig.tensor("template")[0], expected)
    np.testing.assert_array_equal(rig.tensor("template_bbox_cxcywh")[0], window.to_crop(box))


def test_what_the_update_wrote_is_what_the_next_frame_reads(rig: Rig, clip: Clip) -> None:
    policy = ExitPolicy.fixed(1, num_exits=NUM_SEGMENTS)
    rig.loop.start(*clip[0])
    read = [rig.tensor("memory")]
    for number, (frame, _) in enumerate(clip[1:], start=1):
        result = rig.loop.submit(frame, policy).result()

        assert result.score == pytest.approx(SCORES[1] + 0.1 * read[-1].mean(), abs=1e-6)
        np.testing.assert_array_equal(rig.tensor("memory"), rig.tensor("next_memory"))
        assert rig.tensor("age") == number
        read.append(rig.tensor("memory"))
    assert len({memory.tobytes() for memory in read}) == len(clip)


def test_init_starts_the_state_anew(rig: Rig, clip: Clip) -> None:
    policy = ExitPolicy.fixed(0, num_exits=NUM_SEGMENTS)
    rig.loop.start(*clip[0])
    first = rig.tensor("memory")
    for frame, _ in clip[1:]:
        rig.loop.submit(frame, policy)

    rig.loop.start(*clip[0])

    np.testing.assert_array_equal(rig.tensor("memory"), first)
    assert rig.tensor("age") == 0


def test_a_frame_without_a_finite_answer_changes_no_state(rig: Rig, clip: Clip) -> None:
    policy = ExitPolicy.fixed(0, num_exits=NUM_SEGMENTS)
    rig.loop.start(*clip[0])
    rig.loop.submit(clip[1][0], policy)
    before, num_updates = rig.tensor("memory"), rig.runs()["update"]

    result = rig.loop.submit(np.zeros_like(clip[0][0]), policy).result()
    np.testing.assert_array_equal(rig.tensor("memory"), before)
    assert rig.runs()["update"] == num_updates
    rig.loop.submit(clip[2][0], policy)

    assert result.score == 0, "an answer that is no number"
    assert rig.tensor("age") == 2
    assert np.isfinite(rig.tensor("memory")).all()


def test_stages_tell_of_the_head_and_of_the_update(toy_with_memory: Bundle, clip: Clip) -> None:
    policy = ExitPolicy.fixed(1, num_exits=NUM_SEGMENTS)
    with Tracker(toy_with_memory, exit_policy=policy) as tracker:
        tracker.init(*clip[0])
        result = tracker.update(clip[1][0])

        stages = tracker.stage_ms

    assert list(stages) == ["crop", "segment_0", "segment_1", "head_1", "decide", "update"]
    assert all(ms > 0 for ms in stages.values())
    assert sum(stages.values()) <= result.latency_ms


def bytes_kept() -> int:
    """Bytes of Python objects, without what Python itself keeps to be faster."""
    sys._clear_type_cache()
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_memory_stays_flat_over_a_long_video(toy_with_memory: Bundle, clip: Clip) -> None:
    with Tracker(toy_with_memory, num_threads=1) as tracker:
        tracker.init(*clip[0])

        def track(num_frames: int) -> None:
            for number in range(num_frames):
                tracker.update(clip[number % len(clip)][0])

        track(200)
        tracemalloc.start()
        try:
            track(1000)
            before = bytes_kept()
            track(3000)
            after = bytes_kept()
        finally:
            tracemalloc.stop()

    assert after - before < 3000  # the smallest object has 16 bytes
