"""The CUDA layer on the emulated device: memory, streams, kernels, and who holds what when."""

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pycuda.driver
import pytest
from emulator.hooks import EmulatedDriver

from edgetrack.backends.cuda import (
    CudaContext,
    DeviceMemory,
    Event,
    Module,
    Stream,
    find_cuda_device,
)
from edgetrack.errors import DeviceError, DeviceMemoryError, EdgeTrackError
from edgetrack.runtime.device_state import DECISION, TARGET, read_ptx

DRIVER = EmulatedDriver()
ONE = (1, 1, 1)
INVALID_VALUE, OUT_OF_MEMORY, INVALID_HANDLE = 1, 2, 400
NON_BLOCKING = 1


def live() -> tuple[int, int]:
    """Bytes and handles that are not given back."""
    return DRIVER.live_bytes, DRIVER.live_handles()


def current_handle() -> int:
    """The driver's current context of this thread; 0 without one."""
    handle = ctypes.c_void_p()
    assert DRIVER.library.cuCtxGetCurrent(ctypes.byref(handle)) == 0
    return handle.value or 0


def calls(run: Callable[[], object]) -> list[str]:
    """The driver calls that ``run`` makes, in order."""
    DRIVER.clear_calls()
    run()
    return DRIVER.calls()


class Writer:
    """A kernel that writes ``2 * value`` to a word."""

    def __init__(self, context: CudaContext, module: Module, value: int) -> None:
        memory = context.allocate_mapped(DECISION.itemsize + TARGET.itemsize, what="its arguments")
        self._state = memory.array[DECISION.itemsize :].view(TARGET)
        self._state["frame_index"] = value - 1
        decision = np.uint64(memory.address)
        state = np.uint64(memory.address + DECISION.itemsize)
        self.arguments = (state, state, decision, state, np.int32(0))
        self.kernel = module.function("edgetrack_gate_flag")

    def write(self, stream: Stream, address: int) -> None:
        self.kernel.launch(stream, ONE, ONE, *self.arguments, np.uint64(address))


def run_script(
    script: str, *, before: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    header = (
        "from edgetrack.backends.cuda import *\nfrom edgetrack.errors import *\nimport os, sys\n"
    )
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(before) + header + textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    pycuda.driver.init()
    before, was_current = live(), current_handle()
    yield
    DRIVER.reset()
    assert live() == before
    assert current_handle() == was_current
    assert pycuda.driver.Context.get_current() is None


@pytest.fixture
def context() -> Iterator[CudaContext]:
    with CudaContext.open() as opened:
        yield opened


@pytest.fixture
def module(context: CudaContext) -> Module:
    return context.module(read_ptx())


class TestMemory:
    def test_a_context_knows_its_device(self, context: CudaContext) -> None:
        assert context.device == find_cuda_device(0)
        assert 0 < context.free_bytes <= context.device.memory_bytes

    @pytest.mark.parametrize("call", ["cuDeviceGetAttribute", "cuDeviceTotalMem_v2", "cuInit"])
    def test_a_device_that_cannot_be_described_is_none(self, call: str) -> None:
        DRIVER.fail(call, INVALID_VALUE)

        assert find_cuda_device() is None
        assert find_cuda_device() is not None

    def test_bytes_go_to_the_device_and_come_back(self, context: CudaContext) -> None:
        stream, sent = context.stream(), np.arange(1000, dtype=np.float32).reshape(10, 100)
        memory = context.allocate(sent.nbytes, what="numbers")
        came = np.zeros_like(sent)
        DRIVER.configure(latency_us=3000)

        context.copy_to_device(memory.address, sent, stream)
        context.copy_from_device(came, memory.address, stream)

        np.testing.assert_array_equal(came, sent)
        assert (memory.num_bytes, memory.address % 256) == (4000, 0)

    def test_what_was_copied_into_pinned_memory_is_there(self, context: CudaContext) -> None:
        stream, memory = context.stream(), context.allocate(64, what="bytes")
        pinned = context.allocate_mapped(64, what="what comes back")
        DRIVER.configure(latency_us=20_000)

        context.set_bytes(memory.address, 5, 64, stream)
        context.copy_from_device(pinned.array, memory.address, stream)

        assert pinned.array.tolist() == [5] * 64

    def test_bytes_are_set(self, context: CudaContext) -> None:
        stream, memory = context.stream(), context.allocate(64, what="bytes")
        came = np.zeros(64, np.uint8)

        context.set_bytes(memory.address, 0, 64, stream)
        context.set_bytes(memory.address + 8, 255, 16, stream)
        context.copy_from_device(came, memory.address, stream)

        assert came.tolist() == [0] * 8 + [255] * 16 + [0] * 40

    def test_rows_are_copied_with_either_pitch(self, context: CudaContext) -> None:
        stream, picture = context.stream(), np.arange(80, dtype=np.uint8).reshape(8, 10)
        memory, came = context.allocate(6 * 32, what="rows"), np.zeros((6, 32), np.uint8)
        context.set_bytes(memory.address, 99, 6 * 32, stream)

        context.copy_rows(
            address=memory.address + 32 + 3,
            pitch_bytes=32,
            source=picture.ctypes.data + 2 * 10 + 4,
            source_pitch_bytes=10,
            width_bytes=5,
            num_rows=4,
            stream=stream,
        )
        context.copy_from_device(came, memory.address, stream)

        expected = np.full((6, 32), 99, np.uint8)
        expected[1:5, 3:8] = picture[2:6, 4:9]
        np.testing.assert_array_equal(came, expected)

    def test_mapped_memory_is_zero_and_seen_by_both(
        self, context: CudaContext, module: Module
    ) -> None:
        stream, mapped = context.stream(), context.allocate_mapped(64, what="words")
        assert mapped.array.tolist() == [0] * 64

        Writer(context, module, 0x01020304).write(stream, mapped.address + 4)
        stream.synchronize()

        assert mapped.array[:12].tolist() == [0] * 4 + [8, 6, 4, 2] + [0] * 4
        assert mapped.num_bytes == 64

    def test_only_contiguous_arrays_are_copied(self, context: CudaContext) -> None:
        stream, memory = context.stream(), context.allocate(64, what="bytes")
        turned = np.zeros((4, 8), np.uint8).T

        with pytest.raises(ValueError, match=r"C-contiguous array, got strides \(1, 8\)"):
            context.copy_to_device(memory.address, turned, stream)
        with pytest.raises(ValueError, match="C-contiguous"):
            context.copy_from_device(turned, memory.address, stream)

    @pytest.mark.parametrize("num_bytes", [0, -1])
    def test_nothing_is_not_allocated(self, context: CudaContext, num_bytes: int) -> None:
        with pytest.raises(ValueError, match=f"scratch: expected at least 1 byte, got {num_bytes}"):
            context.allocate(num_bytes, what="scratch")

    def test_too_little_memory_says_what_for_and_how_much(self, context: CudaContext) -> None:
        kept = context.allocate(6 << 20, what="most of it")
        DRIVER.configure(memory_bytes=8 << 20)

        with pytest.raises(DeviceMemoryError) as raised:
            context.allocate(4 << 20, what="the scratch of the engines")

        told = str(raised.value)
        assert told.startswith(
            "the scratch of the engines: expected 4194304 bytes (4.0 MiB) of dev"
        )
        assert f"{context.free_bytes} bytes free of 8 MiB" in told
        assert "run fewer trackers" in told
        kept.close()
        context.allocate(4 << 20, what="what was freed")

    @pytest.mark.parametrize(
        ("is_integrated", "words"),
        [(1, "got 1048576 bytes free of 1 MiB, which the CPU shares;"), (0, "got less;")],
    )
    def test_too_little_pinned_memory_says_whose(self, is_integrated: int, words: str) -> None:
        DRIVER.configure(integrated=is_integrated)
        with CudaContext.open() as context:
            DRIVER.configure(memory_bytes=1 << 20)
            for _ in range(1 - is_integrated):
                DRIVER.fail("cuMemHostAlloc", OUT_OF_MEMORY)

            with pytest.raises(DeviceMemoryError, match=r"^frames: .* of pinned host") as raised:
                context.allocate_mapped(4 << 20, what="frames")

        assert words in str(raised.value)

    def test_freed_memory_is_not_written(self, context: CudaContext) -> None:
        stream, memory = context.stream(), context.allocate(64, what="bytes")
        address = memory.address
        memory.close()

        with pytest.raises(
            DeviceError, match="cuMemcpyHtoDAsync: expected success, got CUDA_ERROR"
        ):
            context.copy_to_device(address, np.zeros(64, np.uint8), stream)


class TestClosing:
    def test_what_is_closed_refuses_by_name(self, context: CudaContext, module: Module) -> None:
        memory = context.allocate(8, what="the token buffers")
        mapped = context.allocate_mapped(8, what="the results")
        stream, event = context.stream(), context.event()
        writer = Writer(context, module, 1)
        for one in (memory, mapped, stream, event, module):
            one.close()
            one.close()
            assert one.is_closed

        with pytest.raises(
            DeviceError, match=r"the token buffers: expected it open, got it closed"
        ):
            _ = memory.address
        with pytest.raises(DeviceError, match="the results: expected it open"):
            _ = mapped.array
        for use in (stream.synchronize, lambda: stream.handle, lambda: event.record(stream)):
            with pytest.raises(DeviceError, match="stream: expected it open"):
                use()
        with pytest.raises(DeviceError, match="event: expected it open"):
            event.synchronize()
        with pytest.raises(DeviceError, match="module of kernels: expected it open"):
            module.function("edgetrack_probe")
        with pytest.raises(DeviceError, match="edgetrack_gate_flag: expected its module open"):
            writer.write(context.stream(), 8)

    def test_closing_the_context_closes_all_in_it(self) -> None:
        context = CudaContext.open()
        memory, stream = context.allocate(1 << 20, what="bytes"), context.stream()
        context.allocate_mapped(4096, what="more")
        context.module(read_ptx()).function("edgetrack_probe")
        context.event()
        stream.wait_for(1)

        context.close()
        context.close()

        assert memory.is_closed
        assert stream.is_closed
        assert live() == (0, 0)
        with pytest.raises(DeviceError, match=r"got it closed; open one: CudaContext.open\(\)"):
            context.allocate(8, what="bytes")

    def test_a_context_may_be_closed_inside_its_own_block(self) -> None:
        context = CudaContext.open()

        with context.current():
            context.allocate(64, what="bytes")
            context.close()
            assert current_handle() == context.handle

        assert current_handle() == 0
        assert live() == (0, 0)

    def test_a_context_may_be_closed_by_another_thread(self) -> None:
        context = CudaContext.open()
        context.allocate(64, what="bytes")
        context.stream()

        with ThreadPoolExecutor(1) as pool:
            pool.submit(context.close).result()

        assert live() == (0, 0)

    def test_only_one_of_many_threads_closes(self) -> None:
        for _ in range(20):
            context, start = CudaContext.open(), threading.Barrier(8)
            memories = [context.allocate(64, what="bytes") for _ in range(20)]
            for _ in range(20):
                context.event()

            def close(context: CudaContext, start: threading.Barrier, memories: list[DeviceMemory]):
                start.wait()
                for memory in memories:
                    memory.close()
                context.close()

            with ThreadPoolExecutor(8) as pool:
                closing = [pool.submit(close, context, start, memories) for _ in range(8)]
                assert [future.exception() for future in closing] == [None] * 8
            assert live() == (0, 0)

    def test_what_others_hold_outlives_a_context(self) -> None:
        first, second = CudaContext.open(), CudaContext.open()
        mine, theirs = first.allocate(64, what="mine"), second.allocate(64, what="theirs")
        assert first.handle == second.handle

        first.close()

        assert mine.is_closed
        assert not theirs.is_closed
        second.set_bytes(theirs.address, 1, 64, second.stream())
        assert DRIVER.live_handles("context") == 1
        second.close()
        assert DRIVER.live_handles("context") == 0

    def test_a_primary_context_that_the_application_holds_stays(self) -> None:
        handle, address = ctypes.c_void_p(), ctypes.c_void_p()
        assert DRIVER.library.cuDevicePrimaryCtxRetain(ctypes.byref(handle), 0) == 0
        assert DRIVER.library.cuCtxSetCurrent(handle) == 0
        assert DRIVER.library.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(64)) == 0

        with CudaContext.open() as context:
            assert context.handle == handle.value
            context.allocate(64, what="bytes")

        assert current_handle() == handle.value
        assert DRIVER.library.cuMemsetD8_v2(address, 7, ctypes.c_size_t(64)) == 0
        assert DRIVER.library.cuMemFree_v2(address) == 0
        assert DRIVER.library.cuCtxSetCurrent(None) == 0
        assert DRIVER.library.cuDevicePrimaryCtxRelease_v2(0) == 0


class TestThreads:
    def test_nested_blocks_cost_no_driver_call(self, context: CudaContext) -> None:
        def nested() -> None:
            with context.current(), context.current(), context.current():
                pass

        assert calls(nested) == ["cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"]

    def test_what_is_called_in_a_block_is_all_that_is_called(
        self, context: CudaContext, module: Module
    ) -> None:
        stream, event = context.stream(), context.event()
        word, writer = context.allocate(4, what="a word"), Writer(context, module, 1)

        with context.current():
            made = calls(lambda: (writer.write(stream, word.address), event.record(stream)))

        assert made == ["cuLaunchKernel", "cuEventRecord"]

    def test_threads_work_side_by_side(self, context: CudaContext, module: Module) -> None:
        words = context.allocate_mapped(4 * 8, what="a word for each thread")
        start = threading.Barrier(8)

        def work(number: int) -> int:
            start.wait()
            with context.current():
                stream, writer = context.stream(), Writer(context, module, number)
                memory = context.allocate(4, what="a word")
                for _ in range(20):
                    writer.write(stream, words.address + 4 * number)
                    writer.write(stream, memory.address)
                stream.synchronize()
                memory.close()
                stream.close()
            return current_handle()

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(8))) == [0] * 8

        assert words.array.view(np.uint32).tolist() == [2 * k for k in range(8)]

    def test_a_block_in_another_thread_keeps_the_context(self) -> None:
        context, is_inside, may_go = CudaContext.open(), threading.Event(), threading.Event()

        def stay() -> int:
            with context.current():
                is_inside.set()
                may_go.wait()
                return DRIVER.live_handles("context")

        with ThreadPoolExecutor(1) as pool:
            staying = pool.submit(stay)
            is_inside.wait()
            context.close()
            may_go.set()
            assert staying.result() == 1

        assert live() == (0, 0)

    def test_errors_of_the_application_own_pycuda_calls_come_out_as_ours(
        self, context: CudaContext
    ) -> None:
        failed = pytest.raises(DeviceError, match="cuMemcpyDtoD: expected success, got CUDA_ERROR")
        with failed, context.current(), context.current():
            pycuda.driver.memcpy_dtod(8, 16, 4)
        with pytest.raises(ZeroDivisionError), context.current():
            _ = 1 / 0

    @pytest.mark.parametrize("is_primary", [True, False])
    def test_the_application_own_context_is_current_again(self, is_primary: bool) -> None:
        done = run_script(
            f"""
            import ctypes
            import pycuda.driver
            pycuda.driver.init()
            device = pycuda.driver.Device(0)
            own = device.retain_primary_context() if {is_primary} else device.make_context()
            if {is_primary}:
                own.push()
            def current():
                handle = ctypes.c_void_p()
                assert ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(handle)) == 0
                return handle.value
            memory = pycuda.driver.mem_alloc(64)
            with CudaContext.open() as context:
                assert (context.handle == own.handle) == {is_primary}
                with context.current():
                    assert current() == context.handle
                assert current() == own.handle
            assert current() == own.handle
            assert pycuda.driver.Context.get_current() == own
            pycuda.driver.memset_d8(memory, 1, 64)
            memory.free()
            own.pop()
            print(current())
            """
        )

        assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr

    def test_two_devices_are_kept_apart(self) -> None:
        done = run_script(
            """
            first, second = CudaContext.open(0), CudaContext.open(1)
            assert first.handle != second.handle
            a, b = first.stream(), second.stream()
            with first.current():
                memory = first.allocate(64, what="on the first")
                with second.current():
                    other = second.allocate(64, what="on the second")
                    with first.current():
                        first.set_bytes(memory.address, 1, 64, a)
                        a.synchronize()
                    second.set_bytes(other.address, 1, 64, b)
                    b.synchronize()
                first.set_bytes(memory.address, 1, 64, a)
            first.close()
            second.close()
            print(second.device.ordinal)
            """,
            EMULATED_DEVICES="2",
        )

        assert (done.stdout, done.stderr) == ("1\n", "")


class TestProcesses:
    def test_a_process_ends_well_whatever_is_open(self) -> None:
        done = run_script(
            """
            import threading
            context = CudaContext.open()
            def stay():
                with context.current():
                    yield
            kept = stay()
            next(kept)
            memory, stream = context.allocate(64, what="bytes"), context.stream()
            event, mapped = context.event(), context.allocate_mapped(64, what="more")
            thread = threading.Thread(target=lambda: context.allocate(64, what="in a thread"))
            thread.start()
            thread.join()
            print("end")
            """,
            before="""
            import atexit, ctypes
            def last():  # what is registered first is called last
                driver = ctypes.CDLL("libcuda.so.1")
                flags, active = ctypes.c_uint(), ctypes.c_int()
                driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active))
                print("context", active.value, "bytes", driver.emulator_live_bytes())
            atexit.register(last)
            """,
        )

        assert (done.returncode, done.stdout, done.stderr) == (0, "end\ncontext 1 bytes 0\n", "")

    @pytest.mark.parametrize("block", ["context.current()", "open(os.devnull)"])
    def test_a_forked_child_is_refused_and_ends_well(self, block: str) -> None:
        done = run_script(
            f"""
            context = CudaContext.open()
            memory, stream = context.allocate(64, what="bytes"), context.stream()
            mapped, event = context.allocate_mapped(64, what="more"), context.event()
            with {block}:
                child = os.fork()
                if child == 0:
                    for call in (CudaContext.open, lambda: context.allocate(8, what="bytes"),
                                 stream.synchronize, lambda: context.current().__enter__()):
                        try:
                            call()
                            print("not refused")
                        except DeviceError as error:
                            assert "forked" in str(error), error
                    memory.close()
                    context.close()
                    del event
                    sys.exit(7)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            context.set_bytes(memory.address, 1, 64, stream)
            stream.synchronize()
            context.close()
            """
        )

        assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
        assert "ERROR" not in done.stderr

    def test_a_process_survives_a_kernel_that_went_wrong(self) -> None:
        done = run_script(
            """
            import numpy as np
            from edgetrack.runtime.device_state import read_ptx
            context = CudaContext.open()
            stream, memory = context.stream(), context.allocate(64, what="bytes")
            probe = context.module(read_ptx()).function("edgetrack_probe")
            wrong = memory.address
            memory.close()
            probe.launch(stream, (1, 1, 1), (1, 1, 1), np.uint64(wrong), np.uint32(1), np.uint64(1))
            try:
                stream.synchronize()
            except DeviceError as error:
                print(error)
            """
        )

        assert done.returncode == 0, done.stderr
        assert "cuStreamSynchronize: expected success, got CUDA_ERROR_" in done.stdout
        assert "restart the process" in done.stdout


class TestStreamsAndEvents:
    def test_a_stream_is_done_when_its_work_is(self, context: CudaContext) -> None:
        stream, memory = context.stream(), context.allocate(64, what="bytes")
        assert stream.is_done
        DRIVER.configure(latency_us=100_000)

        context.set_bytes(memory.address, 1, 64, stream)

        assert not stream.is_done
        stream.synchronize()
        assert stream.is_done

    def test_a_stream_does_not_wait_for_the_default_stream(self, context: CudaContext) -> None:
        flags = ctypes.c_uint()
        handle = ctypes.c_void_p(context.stream().handle)

        with context.current():
            assert DRIVER.library.cuStreamGetFlags(handle, ctypes.byref(flags)) == 0

        assert flags.value == NON_BLOCKING

    def test_a_stream_that_waited_for_another_leaves_nothing(self, context: CudaContext) -> None:
        stream = context.stream()
        stream.wait_for(1)
        stream.wait_for(1)
        assert len(context.open_resources) == 2

        stream.close()

        assert not context.open_resources

    def test_events_measure_the_time_between_them(self, context: CudaContext) -> None:
        stream, memory = context.stream(), context.allocate(64, what="bytes")
        start, end = context.event(), context.event()
        assert start.is_done
        DRIVER.configure(latency_us=20_000)

        start.record(stream)
        context.set_bytes(memory.address, 1, 64, stream)
        end.record(stream)

        assert not end.is_done
        with pytest.raises(DeviceError, match=r"got CUDA_ERROR_NOT_READY; wait for it first"):
            end.elapsed_ms(start)
        end.synchronize()
        assert end.is_done
        assert 15 < end.elapsed_ms(start) < 2000

    def test_an_event_without_timing_does_not_measure(self, context: CudaContext) -> None:
        with pytest.raises(ValueError, match="with_timing=True"):
            context.event().elapsed_ms(context.event(with_timing=False))

    @pytest.mark.parametrize(("with_timing", "code"), [(True, 0), (False, INVALID_HANDLE)])
    def test_only_events_with_timing_keep_the_time(
        self, context: CudaContext, with_timing: bool, code: int
    ) -> None:
        event, stream = context.event(with_timing=with_timing), context.stream()
        event.record(stream)
        event.synchronize()
        handle, elapsed_ms = ctypes.c_void_p(event.handle), ctypes.c_float()

        with context.current():
            measure = DRIVER.library.cuEventElapsedTime
            assert measure(ctypes.byref(elapsed_ms), handle, handle) == code

    @pytest.mark.parametrize(
        "order",
        [
            lambda event, first, second: (event.record(first), second.wait(event)),
            lambda event, first, second: (event.record_on(first.handle), second.wait(event)),
            lambda event, first, second: second.wait_for(first.handle),
        ],
    )
    def test_a_stream_waits_for_another(
        self, context: CudaContext, order: Callable[[Event, Stream, Stream], object]
    ) -> None:
        first, second, event = context.stream(), context.stream(), context.event()
        word = context.allocate_mapped(4, what="a word")
        DRIVER.configure(latency_us=50_000)

        context.set_bytes(word.address, 1, 4, first)
        order(event, first, second)
        DRIVER.configure(latency_us=0)
        context.set_bytes(word.address, 2, 4, second)
        second.synchronize()
        first.synchronize()

        assert word.array.tolist() == [2] * 4


class TestKernels:
    def test_a_kernel_has_one_signature(self, context: CudaContext, module: Module) -> None:
        stream, writer = context.stream(), Writer(context, module, 1)
        word = context.allocate(4, what="a word")
        *others, _ = writer.arguments
        address = np.uint64(word.address)

        with pytest.raises(TypeError, match="edgetrack_gate_flag, argument 4: expected a NumPy"):
            writer.kernel.launch(stream, ONE, ONE, *others, 0, address)  # type: ignore[arg-type]
        writer.write(stream, word.address)
        with pytest.raises(TypeError, match=r"int32, uint64\), got \(uint64, .*, int64, uint64\)"):
            writer.kernel.launch(stream, ONE, ONE, *others, np.int64(0), address)

    def test_arguments_that_do_not_fit_the_kernel_are_refused(
        self, context: CudaContext, module: Module
    ) -> None:
        probe = module.function("edgetrack_probe")

        with pytest.raises(DeviceError, match=r"cuLaunchKernel.*kernel's signature"):
            probe.launch(context.stream(), ONE, ONE, np.uint64(0))

    def test_what_cannot_be_loaded_says_so(self, context: CudaContext) -> None:
        module = context.module(read_ptx())

        with pytest.raises(DeviceError, match=r"cuModuleGetFunction.*NOT_FOUND.*check the name"):
            module.function("no_such_kernel")
        with pytest.raises(DeviceError, match=r"cuModuleLoadDataEx: expected success, got CUDA_"):
            context.module(b"no kernels here")


def use_everything() -> None:
    """One call of everything, all of it closed or left to the context."""
    with CudaContext.open() as context:
        with context.current():
            stream, event = context.stream(), context.event()
            memory = context.allocate(64, what="bytes")
            mapped = context.allocate_mapped(64, what="more")
            writer = Writer(context, context.module(read_ptx()), 1)
            writer.write(stream, memory.address)
            event.record(stream)
            stream.wait_for(stream.handle)
            context.set_bytes(memory.address, 1, 8, stream)
            context.copy_to_device(memory.address, np.zeros(8, np.uint8), stream)
            context.copy_from_device(mapped.array, memory.address, stream)
            event.synchronize()
            event.elapsed_ms(event)
            _ = stream.is_done, event.is_done, context.free_bytes
            memory.close()
            stream.close()
        context.allocate(64, what="outside of the block")


def all_calls() -> list[tuple[str, int]]:
    """Each driver call of ``use_everything`` with its number among those of its name."""
    seen: dict[str, int] = {}
    numbered = []
    for name in calls(use_everything):
        seen[name] = seen.get(name, 0) + 1
        numbered.append((name, seen[name]))
    return numbered


# What frees: where it fails, nobody else can do it.
FREEING = {"cuMemFree_v2", "cuMemFreeHost", "cuStreamDestroy_v2", "cuEventDestroy_v2",
           "cuModuleUnload", "cuDevicePrimaryCtxRelease_v2"}  # fmt: skip
# Calls whose failure does not show: the version among what a device is described by; what gives
# a context back, which is tried again or done without.
FORGIVEN = {
    ("cuDriverGetVersion", 2),
    ("cuDeviceGet", 3),
    ("cuDevicePrimaryCtxRetain", 2),
    ("cuCtxPushCurrent_v2", 4),
    *(("cuCtxPopCurrent_v2", nth) for nth in (1, 2, 3, 4)),
}


def test_a_failure_of_any_call_leaves_nothing_behind() -> None:
    numbered = [(name, nth) for name, nth in all_calls() if name not in FREEING]
    assert len(numbered) > 40
    silent = set()
    for name, nth in numbered:
        DRIVER.fail(name, INVALID_VALUE, nth=nth)
        try:
            use_everything()
            silent.add((name, nth))
        except EdgeTrackError:
            pass
        DRIVER.reset()
        assert (live(), current_handle()) == ((0, 0), 0), (name, nth)
        assert pycuda.driver.Context.get_current() is None, (name, nth)
    assert silent == FORGIVEN


def test_a_context_that_cannot_be_left_is_lost_and_the_process_ends_well() -> None:
    done = run_script(
        """
        from emulator.hooks import EmulatedDriver
        context = CudaContext.open()
        memory, stream = context.allocate(64, what="bytes"), context.stream()
        failing = EmulatedDriver()
        try:
            with context.current():
                failing.configure(latency_us=0)
                pop = failing.library.cuCtxPopCurrent_v2
                pop(None)  # so that PyCUDA's own fails, again and again
        except DeviceError as error:
            print(error)
        try:
            context.allocate(8, what="bytes")
        except DeviceError as error:
            print(error)
        """,
        PYTHONPATH=os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parents[1])]),
    )

    assert done.returncode == 0, done.stderr
    left, used = done.stdout.splitlines()
    assert left.startswith("cuCtxPopCurrent: expected success, got CUDA_ERROR_INVALID_CONTEXT")
    assert "got one that was lost; restart the process" in used
