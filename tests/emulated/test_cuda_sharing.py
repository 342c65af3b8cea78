"""Who holds a context when: shares, threads, forks, the end, and failures of any call."""

import ctypes
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pycuda.driver
import pytest
from cuda_bench import DRIVER, Writer, calls, current_handle, live, nothing_left, run_script

from edgetrack.backends.cuda import CudaContext, DeviceMemory, Module
from edgetrack.errors import DeviceError, EdgeTrackError
from edgetrack.runtime.device_state import read_ptx

INVALID_VALUE = 1


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def context() -> Iterator[CudaContext]:
    with CudaContext.open() as opened:
        yield opened


@pytest.fixture
def module(context: CudaContext) -> Module:
    return context.module(read_ptx())


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
