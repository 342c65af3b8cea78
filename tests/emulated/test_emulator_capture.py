"""The emulated stream capture: who may do what while a stream records."""

import ctypes
import threading
from collections.abc import Callable

import numpy as np
import pytest
from driver import GLOBAL, NON_BLOCKING, RELAXED, THREAD_LOCAL, Driver

BLOCKING = 0
NULL_STREAM = 0


def end_code(driver: Driver, stream: int) -> str:
    """How a capture ends; its graph is destroyed."""
    graph = (ctypes.c_uint64 * 1)()
    code = driver.code("cuStreamEndCapture", stream, graph)
    assert bool(graph[0]) == (code == "SUCCESS")
    if graph[0]:
        driver.do("cuGraphDestroy", graph[0])
    return code


def in_a_thread(driver: Driver, function: Callable[[], object]) -> None:
    """Run in a thread of its own, in the same context."""
    context = driver.make("cuCtxGetCurrent")

    def run() -> None:
        driver.do("cuCtxPushCurrent_v2", context)
        function()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


class TestBegin:
    def test_what_is_captured_does_not_run(self, driver: Driver) -> None:
        ran, stream = list[int](), driver.stream()
        driver.begin(stream)
        driver.emulated.enqueue(stream, lambda: ran.append(1))

        executable = driver.exec(driver.end(stream))

        driver.sync(stream)
        assert ran == []
        driver.launch(executable, stream)
        assert ran == [1]

    def test_a_stream_captures_once_at_a_time(self, driver: Driver) -> None:
        stream = driver.stream()
        driver.begin(stream)

        assert driver.code("cuStreamBeginCapture_v2", stream, THREAD_LOCAL) == "ILLEGAL_STATE"
        assert end_code(driver, stream) == "SUCCESS"

    def test_a_stream_that_captures_can_not_fill_a_body_too(self, driver: Driver) -> None:
        stream, graph = driver.stream(), driver.graph()
        driver.begin(stream)

        begun = driver.code("cuStreamBeginCaptureToGraph", stream, graph, None, None, 0, 1)

        assert begun == "ILLEGAL_STATE"

    def test_the_null_stream_can_not_be_captured(self, driver: Driver) -> None:
        assert driver.code("cuStreamBeginCapture_v2", NULL_STREAM, 1) == (
            "STREAM_CAPTURE_UNSUPPORTED"
        )

    def test_unknown_modes_are_refused(self, driver: Driver) -> None:
        assert driver.code("cuStreamBeginCapture_v2", driver.stream(), 3) == "INVALID_VALUE"


class TestEnd:
    def test_only_what_began_ends(self, driver: Driver) -> None:
        assert end_code(driver, driver.stream()) == "ILLEGAL_STATE"

    @pytest.mark.parametrize(
        ("mode", "error"),
        [(THREAD_LOCAL, "STREAM_CAPTURE_WRONG_THREAD"), (RELAXED, "SUCCESS")],
    )
    def test_the_thread_that_began_ends(self, driver: Driver, mode: int, error: str) -> None:
        stream, codes = driver.stream(), list[str]()
        driver.begin(stream, mode)

        in_a_thread(driver, lambda: codes.append(end_code(driver, stream)))

        assert codes == [error]

    def test_a_closed_stream_ends_its_capture(self, driver: Driver) -> None:
        stream = driver.stream()
        driver.begin(stream)

        driver.do("cuStreamDestroy_v2", stream)

        assert driver.emulated.live_handles("graph") == 0
        assert len(driver.pinned()) == 64  # no capture is under way


class TestForks:
    def fork(self, driver: Driver) -> tuple[int, int, int]:
        """A capture that a second stream joined, and an event."""
        origin, other, event = driver.stream(), driver.stream(), driver.event()
        driver.begin(origin)
        driver.do("cuEventRecord", event, origin)
        driver.do("cuStreamWaitEvent", other, event, 0)
        return origin, other, event

    def test_a_fork_must_be_joined(self, driver: Driver) -> None:
        origin, other, _ = self.fork(driver)
        driver.emulated.enqueue(other, lambda: None)
        assert driver.emulated.live_handles("graph") == 1

        assert end_code(driver, origin) == "STREAM_CAPTURE_UNJOINED"
        assert driver.emulated.live_handles("graph") == 0

    def test_a_fork_that_is_joined_is_part_of_the_graph(self, driver: Driver) -> None:
        origin, other, event = self.fork(driver)
        ran: list[str] = []
        driver.emulated.enqueue(other, lambda: ran.append("other"))
        driver.do("cuEventRecord", event, other)
        driver.do("cuStreamWaitEvent", origin, event, 0)
        driver.emulated.enqueue(origin, lambda: ran.append("origin"))

        driver.launch(driver.exec(driver.end(origin)), origin)

        assert ran == ["other", "origin"]

    def test_only_the_origin_ends_the_capture(self, driver: Driver) -> None:
        _, other, _ = self.fork(driver)
        assert end_code(driver, other) == "STREAM_CAPTURE_UNMATCHED"

    def test_two_captures_do_not_merge(self, driver: Driver) -> None:
        origin, _, event = self.fork(driver)
        second = driver.stream()
        driver.begin(second)

        assert driver.code("cuStreamWaitEvent", second, event, 0) == "STREAM_CAPTURE_MERGE"
        assert end_code(driver, second) == "STREAM_CAPTURE_INVALIDATED"
        assert end_code(driver, origin) == "STREAM_CAPTURE_INVALIDATED"

    def test_a_capture_waits_for_nothing_outside(self, driver: Driver) -> None:
        outside, stream, event = driver.stream(), driver.stream(), driver.event()
        driver.do("cuEventRecord", event, outside)
        driver.begin(stream)

        assert driver.code("cuStreamWaitEvent", stream, event, 0) == "STREAM_CAPTURE_ISOLATION"
        assert end_code(driver, stream) == "STREAM_CAPTURE_INVALIDATED"

    def test_an_event_of_a_capture_is_never_reached(self, driver: Driver) -> None:
        origin, other, event = self.fork(driver)
        assert driver.code("cuStreamQuery", other) == "STREAM_CAPTURE_UNSUPPORTED"
        end_code(driver, origin)

        assert driver.code("cuEventQuery", event) == "CAPTURED_EVENT"
        assert driver.code("cuEventSynchronize", event) == "CAPTURED_EVENT"
        assert driver.code("cuStreamWaitEvent", other, event, 0) == "CAPTURED_EVENT"


UNSAFE_CALLS: dict[str, Callable[[Driver, int], str]] = {
    "allocate": lambda d, _: d.code("cuMemAlloc_v2", (ctypes.c_uint64 * 1)(), 64),
    "free": lambda d, address: d.code("cuMemFree_v2", address),
    "pin": lambda d, _: d.code("cuMemHostAlloc", (ctypes.c_uint64 * 1)(), 64, 0),
    "copy": lambda d, address: d.code("cuMemcpyHtoD_v2", address, np.zeros(4, np.uint8), 4),
    "wait for another stream": lambda d, _: d.code("cuStreamSynchronize", NULL_STREAM),
    "wait for the device": lambda d, _: d.code("cuCtxSynchronize"),
    "ask for an event": lambda d, _: d.code("cuEventQuery", d.event()),
}


class TestUnsafeCalls:
    @pytest.mark.parametrize("name", ["cuStreamSynchronize", "cuStreamQuery"])
    def test_a_capture_can_not_be_waited_for(self, driver: Driver, name: str) -> None:
        stream = driver.stream()
        driver.begin(stream, RELAXED)

        assert driver.code("cuCtxSynchronize") == "STREAM_CAPTURE_UNSUPPORTED"
        assert driver.code(name, stream) == "STREAM_CAPTURE_UNSUPPORTED"
        recorded = driver.code("cuMemsetD8Async", driver.memory(), 0, 4, stream)
        assert recorded == "STREAM_CAPTURE_INVALIDATED"
        assert end_code(driver, stream) == "STREAM_CAPTURE_INVALIDATED"

    @pytest.mark.parametrize("what", UNSAFE_CALLS)
    def test_unsafe_calls_spoil_a_capture(self, driver: Driver, what: str) -> None:
        stream, address = driver.stream(), driver.memory()
        driver.begin(stream)

        assert UNSAFE_CALLS[what](driver, address) == "STREAM_CAPTURE_UNSUPPORTED"
        assert end_code(driver, stream) == "STREAM_CAPTURE_INVALIDATED"
        if what != "free":
            assert UNSAFE_CALLS[what](driver, address) == "SUCCESS"

    @pytest.mark.parametrize(
        ("mode", "error"),
        [(GLOBAL, "STREAM_CAPTURE_UNSUPPORTED"), (THREAD_LOCAL, "SUCCESS"), (RELAXED, "SUCCESS")],
    )
    def test_other_threads_are_held_up_by_a_global_capture_only(self, driver, mode, error) -> None:
        stream, codes = driver.stream(), list[str]()
        driver.begin(stream, mode)

        in_a_thread(driver, lambda: codes.append(UNSAFE_CALLS["allocate"](driver, 0)))

        assert codes == [error]

    @pytest.mark.parametrize(
        ("flags", "error"), [(BLOCKING, "STREAM_CAPTURE_IMPLICIT"), (NON_BLOCKING, "SUCCESS")]
    )
    def test_the_null_stream_waits_for_no_capture(self, driver, flags: int, error: str) -> None:
        stream, address = driver.stream(flags), driver.memory()
        driver.begin(stream)

        assert driver.code("cuMemsetD8Async", address, 0, 4, NULL_STREAM) == error
        ended = "SUCCESS" if error == "SUCCESS" else "STREAM_CAPTURE_INVALIDATED"
        assert end_code(driver, stream) == ended


class TestQueries:
    def test_the_array_of_dependencies_is_lent_until_the_next_operation(self, driver) -> None:
        stream, address = driver.stream(), driver.memory()
        driver.begin(stream)
        driver.do("cuMemsetD8Async", address, 0, 4, stream)
        first = driver.graph_of(stream)[1]
        status, lent = (ctypes.c_uint64 * 1)(), (ctypes.c_uint64 * 1)()
        driver.do("cuStreamGetCaptureInfo_v2", stream, status, None, None, lent, None)
        array = ctypes.cast(lent[0], ctypes.POINTER(ctypes.c_uint64))
        assert [array[0]] == first

        driver.do("cuMemsetD8Async", address, 0, 4, stream)

        assert array[0] == 0xDEADDEADDEADDEAD
        assert driver.graph_of(stream)[1] != first

    def test_dependencies_are_nodes_of_the_graph(self, driver: Driver) -> None:
        stream, other = driver.stream(), (ctypes.c_uint64 * 1)(12345)
        call = "cuStreamUpdateCaptureDependencies_v2"
        assert driver.code(call, stream, None, None, 0, 1) == "ILLEGAL_STATE"
        driver.begin(stream)

        assert driver.code(call, stream, other, None, 1, 1) == "INVALID_VALUE"
        assert driver.code(call, stream, None, None, 0, 1) == "SUCCESS"

    def test_a_graph_is_not_destroyed_while_it_is_captured_into(self, driver: Driver) -> None:
        stream = driver.stream()
        driver.begin(stream)

        assert driver.code("cuGraphDestroy", driver.graph_of(stream)[0]) == "INVALID_VALUE"
        made = driver.code(
            "cuGraphInstantiateWithFlags", (ctypes.c_uint64 * 1)(), driver.graph_of(stream)[0], 0
        )
        assert made == "ILLEGAL_STATE"
