"""Memory, streams, events and kernels on the emulated device."""

import ctypes
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from cuda_bench import DRIVER, ONE, Writer, nothing_left

from edgetrack.backends.cuda import CudaContext, Event, Module, Stream, find_cuda_device
from edgetrack.errors import DeviceError, DeviceMemoryError
from edgetrack.runtime.device_state import read_ptx

INVALID_VALUE, OUT_OF_MEMORY, INVALID_HANDLE = 1, 2, 400
NON_BLOCKING = 1


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
