"""Whole frames on the emulated device: every kernel, copy, graph and decision is executed."""

import ctypes
import dataclasses
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cpu_segments import EmulatedBackend
from emulator.hooks import EmulatedDriver
from tolerances import BETWEEN_LOOPS

from edgetrack.backends.cuda import CudaContext
from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.errors import DeviceError, DeviceMemoryError, EdgeTrackError, FrameSizeError
from edgetrack.runtime.frame_source import GpuFrame
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules
from edgetrack.tracker import Tracker, TrackResult

Frame = npt.NDArray[np.uint8]
DECISIONS = ("device", "flag", "host")
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
def clip() -> list[tuple[Frame, npt.NDArray[Any]]]:
    return list(render_clip(num_frames=40, width=320, height=240, seed=3))


@pytest.fixture(autouse=True)
def nothing_leaks(emulated: EmulatedDriver) -> Iterator[None]:
    before = emulated.live_bytes, emulated.live_handles()
    yield
    emulated.reset()
    assert (emulated.live_bytes, emulated.live_handles()) == before


def without_time(results: list[TrackResult]) -> list[TrackResult]:
    return [dataclasses.replace(result, latency_ms=0.0) for result in results]


def follow(tracker: Tracker, clip: list[tuple[Frame, npt.NDArray[Any]]]) -> list[TrackResult]:
    tracker.init(clip[0][0], clip[0][1])
    return without_time([tracker.update(frame) for frame, _ in clip[1:]])


def opened(bundle: Bundle, decision: str = "device", **options: Any) -> Tracker:
    return Tracker(bundle, backend=EmulatedBackend(), exit_decision=decision, **options)


class OnDevice:
    """A frame in device memory, as other packages offer it."""

    def __init__(self, context: CudaContext, frame: Frame, *, pad_bytes: int = 0) -> None:
        height, *inner = frame.shape
        row_bytes = int(np.prod(inner))
        pitch = row_bytes + pad_bytes
        with context.current():
            self.memory = context.allocate(height * pitch, what="a frame")
            stream = context.stream()
            rows = np.full((height, pitch), 77, np.uint8)
            rows[:, :row_bytes] = frame.reshape(height, row_bytes)
            context.copy_to_device(self.memory.address, rows, stream)
            stream.synchronize()
            stream.close()
        strides = (pitch, 1) if len(inner) == 1 else (pitch, inner[1], 1)
        self.__cuda_array_interface__ = {
            "shape": frame.shape,
            "typestr": "|u1",
            "data": (self.memory.address, False),
            "strides": strides,
            "version": 3,
            "stream": None,
        }


@pytest.fixture
def context() -> Iterator[CudaContext]:
    context = CudaContext.open()
    yield context
    context.close()


@pytest.mark.parametrize("rules", [None, ALL_RULES], ids=["own rules", "all rules"])
def test_all_ways_to_decide_agree_bit_for_bit_and_with_the_cpu(
    shipped_bundle: Bundle, clip: list[Any], rules: TargetRules | None
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
    shipped_bundle: Bundle, clip: list[Any], decision: str
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
    shipped_bundle: Bundle, clip: list[Any], decision: str
) -> None:
    with opened(shipped_bundle, decision) as tracker:
        tracker.init(*clip[0])
        for number, (frame, _) in enumerate(clip[1:13]):
            tracker.exit_policy = ExitPolicy.fixed(number % 3, num_exits=3)
            assert tracker.update(frame).exit_index == number % 3


def test_thresholds_hold_for_the_frames_that_were_handed_in_with_them(
    shipped_bundle: Bundle, clip: list[Any]
) -> None:
    with opened(shipped_bundle) as tracker:
        tracker.init(*clip[0])
        pending = []
        for number, (frame, _) in enumerate(clip[1:13]):
            tracker.exit_policy = ExitPolicy.fixed(number % 3, num_exits=3)
            pending.append(tracker.update_async(frame))

        assert [p.result().exit_index for p in pending] == [n % 3 for n in range(12)]


def test_frames_handed_in_ahead_give_the_same_results(
    shipped_bundle: Bundle, clip: list[Any]
) -> None:
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
    shipped_bundle: Bundle, clip: list[Any]
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
    shipped_bundle: Bundle, clip: list[Any], context: CudaContext, pad_bytes: int
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


class ThroughDlpack:
    """What offers DLPack alone; NumPy makes the capsule, over the same memory."""

    def __init__(self, frame: OnDevice, shape: tuple[int, ...]) -> None:
        self.streams: list[int] = []
        memory = (ctypes.c_uint8 * int(np.prod(shape))).from_address(frame.memory.address)
        self._array = np.frombuffer(memory, np.uint8).reshape(shape)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, *, stream: int) -> Any:
        self.streams.append(stream)
        return self._array.__dlpack__()


def test_frames_of_other_packages_are_taken_as_they_are(
    shipped_bundle: Bundle, clip: list[Any], context: CudaContext
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
    shipped_bundle: Bundle, clip: list[Any], context: CudaContext, emulated: EmulatedDriver
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


def test_nv12_is_followed(shipped_bundle: Bundle, clip: list[Any], context: CudaContext) -> None:
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


def test_two_trackers_in_two_threads(shipped_bundle: Bundle, clip: list[Any]) -> None:
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


@pytest.mark.parametrize("decision", ["device", "flag"])
def test_a_failed_launch_leaves_the_tracker_usable(
    shipped_bundle: Bundle, clip: list[Any], emulated: EmulatedDriver, decision: str
) -> None:
    with opened(shipped_bundle, decision) as tracker:
        expected = follow(tracker, clip)
        tracker.init(*clip[0])
        first = tracker.update(clip[1][0])
        emulated.fail("cuGraphLaunch", 700)
        with pytest.raises(DeviceError, match="cuGraphLaunch"):
            tracker.update(clip[2][0])
        assert tracker.bbox == first.bbox
        after = without_time([tracker.update(frame) for frame, _ in clip[2:]])

    assert after == expected[1:]


@pytest.mark.parametrize(
    "call",
    [
        "cuMemHostAlloc",
        "cuModuleLoadDataEx",
        "cuModuleGetFunction",
        "cuStreamCreate",
        "cuStreamBeginCapture_v2",
        "cuGraphInstantiateWithFlags",
        "cuEventCreate",
    ],
)
def test_a_refusal_while_opening_frees_what_was_made(
    toy: Bundle, emulated: EmulatedDriver, call: str
) -> None:
    emulated.fail(call, 2)

    with pytest.raises(DeviceError, match="expected"):
        opened(toy, "device")


def test_too_little_memory_says_how_much_is_needed(toy: Bundle, emulated: EmulatedDriver) -> None:
    emulated.configure(memory_bytes=1 << 20)
    with opened(toy) as tracker:
        with pytest.raises(DeviceMemoryError, match=r"frames of 640x480: expected \d+ bytes"):
            tracker.init(np.zeros((480, 640, 3), np.uint8), (10, 10, 20, 20))
        tracker.init(np.zeros((48, 64, 3), np.uint8), (10, 10, 20, 20))
    emulated.configure(memory_bytes=4096)
    with pytest.raises(DeviceMemoryError, match="the buffers of toy: expected"):
        opened(toy)


def test_without_conditional_nodes_the_host_reads_flags(
    toy: Bundle, emulated: EmulatedDriver
) -> None:
    emulated.fail("cuGraphConditionalHandleCreate", 801)
    with opened(toy, "auto") as tracker:
        assert tracker.exit_decision == "flag"
    with opened(toy, "auto") as tracker:
        assert tracker.exit_decision == "device"


def test_the_host_waits_for_what_it_reads(
    shipped_bundle: Bundle, clip: list[Any], emulated: EmulatedDriver
) -> None:
    with opened(shipped_bundle) as tracker:
        expected = follow(tracker, clip[:8])
    emulated.configure(latency_us=2000)
    for decision in DECISIONS:
        with opened(shipped_bundle, decision) as tracker:
            assert follow(tracker, clip[:8]) == expected, decision


def test_an_integrated_gpu_reads_frames_in_place(
    shipped_bundle: Bundle, clip: list[Any], emulated: EmulatedDriver
) -> None:
    emulated.configure(integrated=0)
    with opened(shipped_bundle) as tracker:
        expected, on_discrete = follow(tracker, clip), tracker.gpu_memory_bytes
        assert [call for call in emulated.calls() if "Memcpy2D" in call]
    emulated.configure(integrated=1)
    with opened(shipped_bundle) as tracker:
        tracker.init(*clip[0])
        emulated.clear_calls()
        found = without_time([tracker.update(frame) for frame, _ in clip[1:]])
        copies = [call for call in emulated.calls() if "Memcpy" in call]
        assert tracker.gpu_memory_bytes < on_discrete

    assert found == expected
    assert not [call for call in copies if "2D" in call]


def test_a_frame_on_the_device_costs_one_launch_and_no_copy(
    shipped_bundle: Bundle, clip: list[Any], context: CudaContext, emulated: EmulatedDriver
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


def test_a_policy_in_python_needs_the_host(toy: Bundle) -> None:
    class Own(ExitPolicy):
        def should_exit(self, exit_index: int, uncertainty: float, score: float) -> bool:
            return exit_index == 1

    own = Own((0.0, 0.0))
    frame = np.zeros((120, 160, 3), np.uint8)
    with opened(toy, "auto", exit_policy=own) as tracker:
        assert tracker.exit_decision == "host"
        tracker.init(frame, (40, 40, 20, 20))
        assert tracker.update(frame).exit_index == 1
    with opened(toy, "device") as tracker, pytest.raises(TypeError, match="exit_decision='host'"):
        tracker.exit_policy = own


def test_stages_are_timed_where_the_host_decides(toy: Bundle) -> None:
    frame = np.zeros((120, 160, 3), np.uint8)
    policy = ExitPolicy.fixed(1, num_exits=3)
    with opened(toy, "host", exit_policy=policy) as tracker:
        tracker.init(frame, (40, 40, 20, 20))
        tracker.update(frame)
        assert list(tracker.stage_ms) == ["crop", "segment_0", "segment_1"]
        assert all(ms > 0 for ms in tracker.stage_ms.values())
        assert tracker.gpu_memory_bytes > 0


def test_what_is_no_frame_is_refused(toy: Bundle, context: CudaContext) -> None:
    class Elsewhere:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 7)

        def __dlpack__(self, **_: Any) -> Any:
            raise AssertionError("not asked for")

    image = OnDevice(context, np.zeros((64, 64, 3), np.uint8))
    wrong_type = OnDevice(context, np.zeros((64, 64, 3), np.uint8))
    wrong_type.__cuda_array_interface__["typestr"] = "<f4"
    on_host = OnDevice(context, np.zeros((64, 64, 3), np.uint8))
    pageable = np.zeros((64, 64, 3), np.uint8)
    on_host.__cuda_array_interface__["data"] = (pageable.ctypes.data, False)
    planar = OnDevice(context, np.zeros((64, 64, 3), np.uint8))
    planar.__cuda_array_interface__["strides"] = (64, 1, 4096)
    with opened(toy) as tracker:
        for frame, error, message in (
            (np.zeros((8, 8, 3)), TypeError, "expected a uint8 array"),
            (Elsewhere(), TypeError, "expected memory of CUDA device 0"),
            (wrong_type, TypeError, "expected uint8"),
            (on_host, TypeError, "got memory that no CUDA driver allocated"),
            (planar, ValueError, "rows of adjoining pixels"),
            (GpuFrame(image, format="gray8"), ValueError, "expected a format among"),
            (GpuFrame(image, format="bgr8", chroma=image), ValueError, "expected none"),
        ):
            with pytest.raises(error, match=message):
                tracker.init(frame, (10, 10, 20, 20))
    for frame in (image, wrong_type, on_host, planar):
        frame.memory.close()


def test_a_forked_child_is_told(toy: Bundle) -> None:
    frame = np.zeros((120, 160, 3), np.uint8)
    with opened(toy) as tracker:
        tracker.init(frame, (40, 40, 20, 20))
        child = os.fork()
        if not child:
            try:
                tracker.update(frame)
            except EdgeTrackError as error:
                os._exit(0 if "fork" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        tracker.update(frame)
