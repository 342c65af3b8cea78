"""Whole frames on the emulated device: every kernel, copy, graph and decision is executed."""

import dataclasses
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from cpu_segments import EmulatedBackend
from device_frames import (
    DECISIONS,
    Clip,
    OnDevice,
    ThroughDlpack,
    follow,
    make_clip,
    opened,
    without_time,
)
from emulator.hooks import EmulatedDriver
from tolerances import BETWEEN_LOOPS

from edgetrack.backends.cuda import CudaContext
from edgetrack.bundle import Bundle
from edgetrack.errors import FrameSizeError
from edgetrack.runtime.frame_source import GpuFrame
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules
from edgetrack.tracker import Tracker, TrackResult

ALL_RULES = TargetRules(
    centre_smoothing=0.1,
    size_smoothing=0.2,
    max_size_change=1.1,
    unsure_score=0.5,
    patience=2,
    search_growth=1.4,
    lost_after=4,
    found_score=0.6,
    look_around=0.3,
)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return make_clip()


@pytest.fixture(autouse=True)
def nothing_leaks(emulated: EmulatedDriver) -> Iterator[None]:
    before = emulated.live_bytes, emulated.live_handles()
    yield
    emulated.reset()
    assert (emulated.live_bytes, emulated.live_handles()) == before


@pytest.fixture
def context() -> Iterator[CudaContext]:
    context = CudaContext.open()
    yield context
    context.close()


@pytest.mark.parametrize("rules", [None, ALL_RULES], ids=["own rules", "all rules"])
def test_all_ways_to_decide_agree_bit_for_bit_and_with_the_cpu(
    shipped_bundle: Bundle, clip: Clip, rules: TargetRules | None
) -> None:
    found = {}
    for decision in DECISIONS:
        with opened(shipped_bundle, decision, rules=rules) as tracker:
            assert tracker.exit_decision == decision
            found[decision] = follow(tracker, clip)
    with Tracker(shipped_bundle, backend="onnxruntime", rules=rules) as tracker:
        on_cpu = follow(tracker, clip)

    assert found["device"] == found["host"]
    assert found["flag"] == found["host"]
    assert len({result.exit_index for result in on_cpu}) > 1, "a clip with several exits"
    assert [r.exit_index for r in found["host"]] == [r.exit_index for r in on_cpu]
    difference = np.array([r.bbox for r in found["host"]]) - [r.bbox for r in on_cpu]
    assert np.abs(difference).max() <= BETWEEN_LOOPS["bbox_px"]


@pytest.mark.parametrize("decision", DECISIONS)
def test_segments_behind_the_exit_do_not_run(
    shipped_bundle: Bundle, clip: Clip, decision: str
) -> None:
    backend = EmulatedBackend()
    for exit_index in range(3):
        policy = ExitPolicy.fixed(exit_index, num_exits=3)
        with Tracker(
            shipped_bundle, backend=backend, exit_decision=decision, exit_policy=policy
        ) as tracker:
            tracker.init(*clip[0])
            before = [segment.num_runs for segment in backend.segments[-3:]]
            for frame, _ in clip[1:6]:
                assert tracker.update(frame).exit_index == exit_index
            ran = [s.num_runs - b for s, b in zip(backend.segments[-3:], before, strict=True)]
        assert ran == [5 if k <= exit_index else 0 for k in range(3)]


@pytest.mark.parametrize("decision", DECISIONS)
def test_thresholds_change_from_frame_to_frame(
    shipped_bundle: Bundle, clip: Clip, decision: str
) -> None:
    with opened(shipped_bundle, decision) as tracker:
        tracker.init(*clip[0])
        for number, (frame, _) in enumerate(clip[1:13]):
            tracker.exit_policy = ExitPolicy.fixed(number % 3, num_exits=3)
            assert tracker.update(frame).exit_index == number % 3


def test_thresholds_hold_for_the_frames_that_were_handed_in_with_them(
    shipped_bundle: Bundle, clip: Clip
) -> None:
    with opened(shipped_bundle) as tracker:
        tracker.init(*clip[0])
        pending = []
        for number, (frame, _) in enumerate(clip[1:13]):
            tracker.exit_policy = ExitPolicy.fixed(number % 3, num_exits=3)
            pending.append(tracker.update_async(frame))

        assert [p.result().exit_index for p in pending] == [n % 3 for n in range(12)]


def test_frames_handed_in_ahead_give_the_same_results(shipped_bundle: Bundle, clip: Clip) -> None:
    with opened(shipped_bundle) as tracker:
        one_by_one = follow(tracker, clip)
        tracker.init(*clip[0])
        pending = [tracker.update_async(frame) for frame, _ in clip[1:]]
        backwards = [p.result() for p in reversed(pending)]
        again = [p.result() for p in pending]

    assert without_time(again) == one_by_one
    assert backwards[::-1] == again
    assert all(p.is_done for p in pending)


def test_a_host_frame_may_be_written_to_after_it_was_handed_in(
    shipped_bundle: Bundle, clip: Clip
) -> None:
    with opened(shipped_bundle) as tracker:
        expected = follow(tracker, clip)
        tracker.init(*clip[0])
        buffer, pending = np.empty_like(clip[0][0]), []
        for frame, _ in clip[1:]:
            buffer[...] = frame
            pending.append(tracker.update_async(buffer))
            buffer[...] = 255

        assert without_time([p.result() for p in pending]) == expected


@pytest.mark.parametrize("pad_bytes", [0, 37])
def test_frames_on_the_device_give_what_host_frames_give(
    shipped_bundle: Bundle, clip: Clip, context: CudaContext, pad_bytes: int
) -> None:
    frames = [OnDevice(context, frame, pad_bytes=pad_bytes) for frame, _ in clip]
    try:
        with opened(shipped_bundle) as tracker:
            expected = follow(tracker, clip)
            tracker.init(frames[0], clip[0][1])
            pending = [tracker.update_async(frame) for frame in frames[1:]]
            found = without_time([p.result() for p in pending])
            tracker.init(frames[0], clip[0][1])
            rgb = clip[1][0][..., ::-1].copy()
            frames.append(OnDevice(context, rgb, pad_bytes=pad_bytes))
            first = tracker.update(GpuFrame(frames[-1], format="rgb8"))
    finally:
        for frame in frames:
            frame.memory.close()

    assert found == expected
    assert dataclasses.replace(first, latency_ms=0.0) == expected[0]


def test_frames_of_other_packages_are_taken_as_they_are(
    shipped_bundle: Bundle, clip: Clip, context: CudaContext
) -> None:
    from pycuda import gpuarray

    (first, bbox), (second, _) = clip[:2]
    on_device = OnDevice(context, second)
    with opened(shipped_bundle) as tracker:
        tracker.init(first, bbox)
        expected = without_time([tracker.update(second)])
        with context.current():
            pycuda_frame = gpuarray.GPUArray(second.shape, np.uint8, gpudata=on_device.memory.held)
        offered = ThroughDlpack(on_device, second.shape)
        for frame in (pycuda_frame, offered):
            tracker.init(first, bbox)
            assert without_time([tracker.update(frame)]) == expected
        assert len(offered.streams) == 1, "DLPack was told which stream will read"
        assert offered.streams[0] != 0
    on_device.memory.close()


def test_a_frame_is_waited_for_on_the_stream_that_writes_it(
    shipped_bundle: Bundle, clip: Clip, context: CudaContext, emulated: EmulatedDriver
) -> None:
    (first, bbox), (second, _) = clip[:2]
    late = OnDevice(context, np.zeros_like(second))
    with opened(shipped_bundle) as tracker:
        tracker.init(first, bbox)
        expected = without_time([tracker.update(second)])
        tracker.init(first, bbox)
        with context.current():
            writer = context.stream()
            pinned = context.allocate_mapped(second.nbytes, what="a frame")
            pinned.array[:] = second.ravel()
        emulated.configure(latency_us=20_000)
        context.copy_to_device(late.memory.address, pinned.array, writer)
        late.__cuda_array_interface__["stream"] = writer.handle
        assert without_time([tracker.update(late)]) == expected
        writer.close()
    pinned.close()
    late.memory.close()


def test_nv12_is_followed(shipped_bundle: Bundle, clip: Clip, context: CudaContext) -> None:
    import cv2

    with opened(shipped_bundle) as tracker:
        expected = follow(tracker, clip)
        found = []
        for index, (frame, bbox) in enumerate(clip):
            height, width = frame.shape[:2]
            planar = cv2.cvtColor(frame, cv2.COLOR_BGR2YUV_I420)
            chroma = np.stack([p.ravel() for p in np.split(planar[height:], 2)], -1)
            luma = OnDevice(context, np.ascontiguousarray(planar[:height]), pad_bytes=16)
            uv = OnDevice(context, chroma.reshape(height // 2, width))
            nv12 = GpuFrame(luma, format="nv12-bt601", chroma=uv)
            if index == 0:
                tracker.init(nv12, bbox)
            else:
                found.append(tracker.update(nv12))
            luma.memory.close()
            uv.memory.close()

    difference = np.array([r.bbox for r in found]) - [r.bbox for r in expected]
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("shape", [(240, 320), (240, 320, 1), (240, 320, 4)])
def test_grey_and_four_channel_frames(toy: Bundle, shape: tuple[int, ...]) -> None:
    frame = np.full(shape, 40, np.uint8)
    frame[100:140, 140:180] = 255
    with opened(toy) as on_device, Tracker(toy, backend="onnxruntime") as on_cpu:
        for tracker in (on_device, on_cpu):
            tracker.init(frame, (140, 100, 40, 40))
        found, expected = on_device.update(frame), on_cpu.update(frame)

    assert found.bbox == pytest.approx(expected.bbox, abs=BETWEEN_LOOPS["bbox_px"])
    assert found.exit_index == expected.exit_index


def test_a_tracker_starts_again_on_frames_of_another_size(toy: Bundle) -> None:
    with opened(toy) as tracker:
        for height, width in ((240, 320), (480, 640), (120, 160)):
            frame = np.full((height, width, 3), 40, np.uint8)
            frame[40:80, 60:100] = 255
            tracker.init(frame, (60, 40, 40, 40))
            results = [tracker.update(frame) for _ in range(6)]
            assert results[-1].bbox[:2] == pytest.approx((60, 40), abs=12)
            with pytest.raises(FrameSizeError, match="expected shape"):
                tracker.update(frame[:-1])


def test_two_trackers_in_two_threads(shipped_bundle: Bundle, clip: Clip) -> None:
    with opened(shipped_bundle) as tracker:
        expected = follow(tracker, clip)
    trackers = [opened(shipped_bundle, decision) for decision in ("device", "flag")]
    found: dict[int, list[TrackResult]] = {}
    threads = [
        threading.Thread(target=lambda k=k, t=t: found.update({k: follow(t, clip)}))
        for k, t in enumerate(trackers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tracker in trackers:
        tracker.close()
        tracker.close()

    assert found == {0: expected, 1: expected}


def test_the_host_waits_for_what_it_reads(
    shipped_bundle: Bundle, clip: Clip, emulated: EmulatedDriver
) -> None:
    with opened(shipped_bundle) as tracker:
        expected = follow(tracker, clip[:8])
    emulated.configure(latency_us=2000)
    for decision in DECISIONS:
        with opened(shipped_bundle, decision) as tracker:
            assert follow(tracker, clip[:8]) == expected, decision


def test_an_integrated_gpu_reads_frames_in_place(
    shipped_bundle: Bundle, clip: Clip, emulated: EmulatedDriver
) -> None:
    emulated.configure(integrated=0)
    with opened(shipped_bundle) as tracker:
        expected = follow(tracker, clip)
        assert [call for call in emulated.calls() if "Memcpy2D" in call]
    emulated.configure(integrated=1)
    with opened(shipped_bundle) as tracker:
        tracker.init(*clip[0])
        emulated.clear_calls()
        found = without_time([tracker.update(frame) for frame, _ in clip[1:]])
        copies = [call for call in emulated.calls() if "Memcpy" in call]

    assert found == expected
    assert not [call for call in copies if "2D" in call]


def test_a_frame_on_the_device_costs_one_launch_and_no_copy(
    shipped_bundle: Bundle, clip: Clip, context: CudaContext, emulated: EmulatedDriver
) -> None:
    frames = [OnDevice(context, frame) for frame, _ in clip[:4]]
    with opened(shipped_bundle) as tracker:
        tracker.init(frames[0], clip[0][1])
        tracker.update(frames[1])
        emulated.clear_calls()
        pending = tracker.update_async(frames[2])
        calls = [c for c in emulated.calls() if not c.startswith("cuCtx")]
        pending.result()
    for frame in frames:
        frame.memory.close()

    assert calls == ["cuPointerGetAttribute", "cuGraphLaunch"]


def test_stages_are_timed_where_the_host_decides(toy: Bundle) -> None:
    frame = np.zeros((120, 160, 3), np.uint8)
    policy = ExitPolicy.fixed(1, num_exits=3)
    with opened(toy, "host", exit_policy=policy) as tracker:
        tracker.init(frame, (40, 40, 20, 20))
        tracker.update(frame)
        assert list(tracker.stage_ms) == ["crop", "segment_0", "segment_1"]
        assert all(ms > 0 for ms in tracker.stage_ms.values())
        assert tracker.gpu_memory_bytes > 0
