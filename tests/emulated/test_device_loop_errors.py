"""What goes wrong on the emulated device, and what a tracker is worth afterwards."""

import os
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from device_frames import Clip, OnDevice, follow, make_clip, opened, without_time
from emulator.hooks import EmulatedDriver

from edgetrack.backends.cuda import CudaContext
from edgetrack.bundle import Bundle
from edgetrack.errors import DeviceError, DeviceMemoryError, EdgeTrackError, TrackerStateError
from edgetrack.runtime.frame_source import GpuFrame
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.tracker import TrackResult


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


@pytest.mark.parametrize("decision", ["device", "flag"])
def test_a_failed_launch_leaves_the_tracker_usable(
    shipped_bundle: Bundle, clip: Clip, emulated: EmulatedDriver, decision: str
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


@pytest.mark.parametrize("decision", ["device", "flag"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_frame_that_fails_midway_leaves_no_trace(
    shipped_bundle: Bundle, clip: Clip, emulated: EmulatedDriver, decision: str, nth: int
) -> None:
    policies = [ExitPolicy.fixed(k, num_exits=3) for k in range(3)]
    for last in policies:
        with opened(shipped_bundle, decision, exit_policy=policies[2]) as tracker:
            tracker.init(*clip[0])
            first = tracker.update(clip[1][0])
            emulated.fail("cuGraphLaunch", 700, nth=nth)
            if decision == "flag" or nth == 1:
                with pytest.raises(DeviceError, match="cuGraphLaunch"):
                    tracker.update(clip[2][0])
            emulated.reset()
            assert tracker.bbox == first.bbox or nth > 1
            tracker.exit_policy = last
            found = tracker.update(clip[2][0])
            tracker.init(*clip[0])
            tracker.exit_policy = policies[2]
            tracker.update(clip[1][0])
            tracker.exit_policy = last
            if decision == "flag" or nth == 1:
                assert without_time([found]) == without_time([tracker.update(clip[2][0])])


def test_host_frames_may_follow_frames_on_the_device(
    toy: Bundle, context: CudaContext, emulated: EmulatedDriver
) -> None:
    def picture(height: int, width: int) -> Any:
        frame = np.full((height, width, 3), 40, np.uint8)
        frame[60:100, 80:120] = 255
        return frame

    wide, tall = picture(160, 320), picture(320, 160)
    there = OnDevice(context, tall)
    with opened(toy) as tracker:
        tracker.init(wide, (80, 60, 40, 40))
        tracker.update(wide)
        tracker.init(there, (80, 60, 40, 40))
        mixed = [tracker.update(frame) for frame in (tall, there, tall, tall)]
        tracker.init(tall, (80, 60, 40, 40))
        assert without_time(mixed) == without_time([tracker.update(tall) for _ in range(4)])
    there.memory.close()


def test_after_an_init_that_failed_init_is_asked_for(toy: Bundle, emulated: EmulatedDriver) -> None:
    small, large = np.zeros((48, 64, 3), np.uint8), np.zeros((480, 640, 3), np.uint8)
    with opened(toy) as tracker:
        tracker.init(small, (10, 10, 20, 20))
        emulated.configure(memory_bytes=1 << 20)
        with pytest.raises(DeviceMemoryError, match="frames of 640x480"):
            tracker.init(large, (10, 10, 20, 20))
        with pytest.raises(TrackerStateError, match="call init"):
            tracker.update(small)
        tracker.init(small, (10, 10, 20, 20))
        tracker.update(small)


def test_an_interrupt_while_waiting_loses_nothing(
    shipped_bundle: Bundle, clip: Clip, emulated: EmulatedDriver
) -> None:
    with opened(shipped_bundle) as tracker:
        expected = follow(tracker, clip[:4])
        tracker.init(*clip[0])
        emulated.configure(latency_us=100_000)
        pending = tracker.update_async(clip[1][0])
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            pending.result()
        assert not pending.is_done
        later = [pending.result(), *(tracker.update(frame) for frame, _ in clip[2:4])]

    assert without_time(later) == expected


def test_the_last_box_is_that_of_the_newest_frame(shipped_bundle: Bundle, clip: Clip) -> None:
    with opened(shipped_bundle) as tracker:
        tracker.init(*clip[0])
        pending = [tracker.update_async(frame) for frame, _ in clip[1:3]]
        newest = pending[1].result()
        pending[0].result()
        assert tracker.bbox == newest.bbox
        assert np.isfinite(tracker.read_answer()).all()


def test_a_frame_that_failed_on_the_device_keeps_its_error_to_itself(
    shipped_bundle: Bundle, clip: Clip, emulated: EmulatedDriver
) -> None:
    with opened(shipped_bundle) as tracker:
        expected = follow(tracker, clip[:3])
        tracker.init(*clip[0])
        before = tracker.update(clip[1][0])
        emulated.configure(latency_us=100_000)
        emulated.fail("cuStreamQuery", 700)  # what a device that is lost says
        broken = tracker.update_async(clip[2][0])
        for _ in range(2):
            with pytest.raises(DeviceError, match="cuStreamQuery"):
                broken.result()
        assert broken.is_done
        assert tracker.bbox == before.bbox
        with pytest.raises(DeviceError, match="call init"):
            tracker.update(clip[2][0])
        emulated.reset()
        assert follow(tracker, clip[:3]) == expected


def test_trackers_may_be_opened_in_several_threads(shipped_bundle: Bundle, clip: Clip) -> None:
    found: list[list[TrackResult]] = []

    def open_and_follow() -> None:
        with opened(shipped_bundle) as tracker:
            found.append(follow(tracker, clip[:6]))

    threads = [threading.Thread(target=open_and_follow) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 3
    assert found[0] == found[1] == found[2]


def test_one_thread_waits_while_another_hands_in(shipped_bundle: Bundle, clip: Clip) -> None:
    results: queue.Queue[Any] = queue.Queue()
    found: list[TrackResult] = []

    def consume() -> None:
        while (pending := results.get()) is not None:
            found.append(pending.result())

    with opened(shipped_bundle) as tracker:
        expected = follow(tracker, clip)
        tracker.init(*clip[0])
        consumer = threading.Thread(target=consume)
        consumer.start()
        for frame, _ in clip[1:]:
            results.put(tracker.update_async(frame))
        results.put(None)
        consumer.join()

    assert without_time(found) == expected


def test_a_graph_that_the_driver_refuses_falls_back_to_flags(
    toy: Bundle, emulated: EmulatedDriver
) -> None:
    for nth in (1, 2, 3):  # two trials of conditional nodes, then the frame's own graph
        emulated.reset()
        emulated.fail("cuGraphInstantiateWithFlags", 801, nth=nth)
        with opened(toy, "auto") as tracker:
            assert tracker.exit_decision == "flag", nth
        emulated.fail("cuGraphInstantiateWithFlags", 801, nth=nth)
        with pytest.raises(DeviceError, match="exit_decision='flag'"):
            opened(toy, "device")
