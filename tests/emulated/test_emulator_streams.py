"""The emulated streams are asynchronous and in order; events and the null stream as a driver's."""

import ctypes
import threading
import time

import numpy as np
import pytest
from driver import NON_BLOCKING, Driver

BLOCKING = 0
NULL_STREAM = 0
DISABLE_TIMING = 2


class Gate:
    """Work that a stream does not finish before ``open``."""

    def __init__(self, driver: Driver, stream: int) -> None:
        self._opened = threading.Event()
        driver.emulated.enqueue(stream, lambda: self._opened.wait(10))

    def open(self) -> None:
        self._opened.set()


def read(address: int) -> int:
    return int(ctypes.c_uint32.from_address(address).value)


def elapsed_ms(driver: Driver, start: int, end: int) -> tuple[str, float]:
    span = (ctypes.c_float * 1)()
    return driver.code("cuEventElapsedTime", span, start, end), span[0]


class TestOrder:
    def test_the_host_sees_the_old_value_until_it_waits(self, driver: Driver) -> None:
        stream, word = driver.stream(), driver.memory(4)
        gate = Gate(driver, stream)
        driver.do("cuMemsetD32Async", word, 7, 1, stream)

        time.sleep(0.02)
        early = read(word), driver.code("cuStreamQuery", stream)
        gate.open()
        driver.sync(stream)

        assert early == (0xCDCDCDCD, "NOT_READY")
        assert (read(word), driver.code("cuStreamQuery", stream)) == (7, "SUCCESS")

    def test_latency_makes_a_missing_wait_show(self, driver: Driver) -> None:
        stream, word = driver.stream(), driver.memory(4)
        driver.emulated.configure(latency_us=200_000)

        driver.do("cuMemsetD32Async", word, 7, 1, stream)

        time.sleep(0.02)
        assert read(word) == 0xCDCDCDCD
        driver.sync(stream)
        assert read(word) == 7

    def test_streams_run_side_by_side(self, driver: Driver) -> None:
        first, second, word = driver.stream(), driver.stream(), driver.memory(4)
        gate = Gate(driver, first)

        driver.do("cuMemsetD32Async", word, 7, 1, second)
        driver.sync(second)

        assert read(word) == 7
        gate.open()

    def test_an_event_orders_two_streams(self, driver: Driver) -> None:
        first, second, word, event = driver.stream(), driver.stream(), driver.memory(4), None
        gate, event = Gate(driver, first), driver.event()
        driver.do("cuMemsetD32Async", word, 1, 1, first)
        driver.do("cuEventRecord", event, first)
        driver.do("cuStreamWaitEvent", second, event, 0)
        driver.do("cuMemsetD32Async", word, 2, 1, second)

        time.sleep(0.02)
        early = read(word)
        gate.open()
        driver.sync(second)

        assert (early, read(word)) == (0xCDCDCDCD, 2)

    @pytest.mark.parametrize(("flags", "waits"), [(BLOCKING, True), (NON_BLOCKING, False)])
    def test_the_null_stream_waits_for_blocking_streams(self, driver, flags, waits) -> None:
        stream, word = driver.stream(flags), driver.memory(4)
        gate = Gate(driver, stream)

        driver.do("cuMemsetD32_v2", word, 7, 1)
        time.sleep(0.05)
        early = read(word)
        gate.open()
        driver.sync(NULL_STREAM)

        assert (early == 0xCDCDCDCD) == waits
        assert read(word) == 7

    def test_a_closed_stream_finishes_its_work(self, driver: Driver) -> None:
        stream, word, event = driver.stream(), driver.memory(4), driver.event()
        gate = Gate(driver, stream)
        driver.do("cuMemsetD32Async", word, 7, 1, stream)
        driver.do("cuEventRecord", event, stream)

        driver.do("cuStreamDestroy_v2", stream)
        gate.open()
        driver.do("cuEventSynchronize", event)

        assert read(word) == 7

    def test_memory_freed_while_queued_work_uses_it_is_there_for_that_work(self, driver) -> None:
        stream, word, out = driver.stream(), driver.memory(4), driver.pinned(4)
        driver.do("cuMemsetD32_v2", word, 7, 1)
        driver.do("cuCtxSynchronize")
        gate = Gate(driver, stream)
        driver.do("cuMemcpyDtoHAsync_v2", out, word, 4, stream)

        driver.do("cuMemFree_v2", word)
        gate.open()
        driver.sync(stream)

        assert out.view(np.uint32)[0] == 7


class TestCopies:
    def test_pinned_memory_is_read_when_the_stream_gets_there(self, driver: Driver) -> None:
        stream, word, source = driver.stream(), driver.memory(4), driver.pinned(4)
        source[:] = 1
        gate = Gate(driver, stream)

        driver.do("cuMemcpyHtoDAsync_v2", word, source, 4, stream)
        source[:] = 2
        gate.open()
        driver.sync(stream)

        assert read(word) == 0x02020202

    def test_pageable_memory_is_read_at_the_call(self, driver: Driver) -> None:
        stream, word, source = driver.stream(), driver.memory(4), np.full(4, 1, np.uint8)
        gate = Gate(driver, stream)

        driver.do("cuMemcpyHtoDAsync_v2", word, source, 4, stream)
        source[:] = 2
        gate.open()
        driver.sync(stream)

        assert read(word) == 0x01010101

    def test_a_copy_to_pageable_memory_is_done_at_the_return(self, driver: Driver) -> None:
        stream, word, out = driver.stream(), driver.memory(4), np.zeros(4, np.uint8)
        driver.do("cuMemsetD32Async", word, 0x03030303, 1, stream)
        driver.emulated.configure(latency_us=20_000)

        driver.do("cuMemcpyDtoHAsync_v2", out, word, 4, stream)

        assert out.tolist() == [3] * 4

    def test_a_synchronous_copy_to_pinned_memory_waits(self, driver: Driver) -> None:
        word, out = driver.memory(4), driver.pinned(4)
        driver.do("cuMemsetD32_v2", word, 0x03030303, 1)
        driver.emulated.configure(latency_us=20_000)

        driver.do("cuMemcpyDtoH_v2", out, word, 4)

        assert out.tolist() == [3] * 4

    def test_other_streams_do_not_wait_for_a_synchronous_upload(self, driver: Driver) -> None:
        """As documented: it returns once pageable memory is read, not once it has arrived."""
        word, out, stream = driver.memory(4), driver.pinned(4), driver.stream(BLOCKING)
        gate = Gate(driver, stream)

        driver.do("cuMemcpyHtoD_v2", word, np.zeros(4, np.uint8), 4)
        other = driver.stream(NON_BLOCKING)
        driver.do("cuMemcpyDtoHAsync_v2", out, word, 4, other)
        driver.sync(other)
        gate.open()

        assert out.tolist() == [0xCD] * 4


class TestEvents:
    def test_elapsed_time_is_that_between_two_points_of_a_stream(self, driver: Driver) -> None:
        stream, start, end = driver.stream(), driver.event(), driver.event()
        driver.do("cuEventRecord", start, stream)
        driver.emulated.enqueue(stream, lambda: time.sleep(0.02))
        driver.do("cuEventRecord", end, stream)

        assert elapsed_ms(driver, start, end)[0] == "NOT_READY"
        assert driver.code("cuEventQuery", end) == "NOT_READY"
        driver.do("cuEventSynchronize", end)
        code, span_ms = elapsed_ms(driver, start, end)
        assert code == "SUCCESS"
        assert 19 < span_ms < 2000

    def test_an_event_that_was_never_recorded_has_no_time(self, driver: Driver) -> None:
        event = driver.event()

        assert driver.code("cuEventQuery", event) == "SUCCESS"
        assert elapsed_ms(driver, event, event)[0] == "INVALID_HANDLE"

    def test_an_event_without_timing_has_none(self, driver: Driver) -> None:
        stream, event = driver.stream(), driver.event(DISABLE_TIMING)
        driver.do("cuEventRecord", event, stream)
        driver.sync(stream)

        assert elapsed_ms(driver, event, event)[0] == "INVALID_HANDLE"


class TestHostFunctions:
    def test_host_functions_may_not_call_the_driver(self, driver: Driver) -> None:
        codes: list[str] = []
        stream = driver.stream()

        driver.emulated.enqueue(stream, lambda: codes.append(driver.code("cuCtxSynchronize")))
        driver.sync(stream)

        assert codes == ["NOT_PERMITTED"]

    def test_a_waiting_thread_does_not_hold_up_others(self, driver: Driver) -> None:
        """Calls release the lock of the emulator, and ctypes that of Python, while they wait."""
        stream, order = driver.stream(), list[str]()
        gate = Gate(driver, stream)
        context = driver.make("cuCtxGetCurrent")

        def wait() -> None:
            driver.do("cuCtxPushCurrent_v2", context)
            driver.sync(stream)
            order.append("waited")

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.02)
        driver.memory()
        order.append("allocated")
        gate.open()
        thread.join()

        assert order == ["allocated", "waited"]
