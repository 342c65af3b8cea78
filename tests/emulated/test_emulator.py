"""The emulated driver is as strict as a driver, or stricter: contexts, memory, modules."""

import ctypes
import os
import subprocess
import sys
from threading import Thread

import numpy as np
import pytest
from driver import DEVICEMAP, NON_BLOCKING, Driver

from edgetrack.runtime.device_state import read_ptx

SCRIPT = """
import ctypes
driver = ctypes.CDLL("libcuda.so.1")
value = ctypes.c_int()
print(driver.cuDeviceGetCount(ctypes.byref(value)), driver.cuInit(0), end=" ")
driver.cuDeviceGetCount(ctypes.byref(value)); print(value.value, end=" ")
driver.cuDriverGetVersion(ctypes.byref(value)); print(value.value, end=" ")
for attribute in (75, 76, 18):
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
    print(value.value, end=" ")
"""


def ask_a_process(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def bytes_at(address: int, count: int) -> list[int]:
    return list((ctypes.c_uint8 * count).from_address(address))


class TestDevices:
    def test_the_environment_describes_the_device(self) -> None:
        answer = ask_a_process(
            EMULATED_CUDA_VERSION="12040",
            EMULATED_ARCH="89",
            EMULATED_INTEGRATED="0",
            EMULATED_DEVICES="2",
        )

        not_initialised = "3"
        assert answer == [not_initialised, "0", "2", "12040", "8", "9", "0"]

    def test_a_machine_may_have_no_device(self) -> None:
        no_device = "100"
        assert ask_a_process(EMULATED_DEVICES="0")[1] == no_device

    def test_unknown_ordinals_are_refused(self, driver: Driver) -> None:
        device = (ctypes.c_int * 1)()
        assert driver.code("cuDeviceGet", device, 1) == "INVALID_DEVICE"
        driver.emulated.configure(devices=2)
        assert driver.code("cuDeviceGet", device, 1) == "SUCCESS"

    def test_a_forked_child_has_no_driver(self, driver: Driver) -> None:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, driver.code("cuCtxSynchronize").encode())
            os._exit(0)
        os.waitpid(child, 0)

        assert os.read(reading, 100) == b"NOT_INITIALIZED"

    def test_only_known_errors_have_names(self, driver: Driver) -> None:
        name = ctypes.c_char_p(b"unchanged")
        library = driver.emulated.library

        assert library.cuGetErrorName(12345, ctypes.byref(name)) == 1
        assert name.value is None
        texts = set()
        for code in (1, 2, 201, 400, 700, 900, 908):
            assert library.cuGetErrorString(code, ctypes.byref(name)) == 0
            texts.add(name.value)
        assert len(texts) == 7


KINDS = ("context", "event", "exec", "module", "stream")
CALLS_IN_A_CONTEXT = {
    "cuMemAlloc_v2": (None, 64),
    "cuMemHostAlloc": (None, 64, 0),
    "cuMemcpyHtoD_v2": (0, None, 0),
    "cuStreamCreate": (None, 0),
    "cuStreamSynchronize": (0,),
    "cuEventCreate": (None, 0),
    "cuModuleLoadData": (None, None),
    "cuLaunchKernel": (0, 1, 1, 1, 1, 1, 1, 0, 0, None, None),
    "cuGraphInstantiateWithFlags": (None, 0, 0),
    "cuGraphLaunch": (0, 0),
    "cuCtxSynchronize": (),
}


class TestContexts:
    @pytest.mark.parametrize("name", CALLS_IN_A_CONTEXT)
    def test_calls_need_a_current_context(self, driver: Driver, name: str) -> None:
        codes: list[str] = []
        thread = Thread(target=lambda: codes.append(driver.code(name, *CALLS_IN_A_CONTEXT[name])))
        thread.start()
        thread.join()

        assert codes == ["INVALID_CONTEXT"]

    def test_a_released_context_takes_all_it_held_with_it(self, driver: Driver) -> None:
        stream, address = driver.stream(), driver.memory()
        driver.function(b"edgetrack_probe")
        driver.event()
        empty_exec(driver)

        driver.do("cuDevicePrimaryCtxReset_v2", 0)

        assert driver.code("cuStreamSynchronize", stream) == "CONTEXT_IS_DESTROYED"
        assert driver.emulated.live_bytes == 0
        assert [driver.emulated.live_handles(kind) for kind in KINDS] == [0] * len(KINDS)
        fresh = driver.make("cuDevicePrimaryCtxRetain", 0)
        driver.do("cuCtxSetCurrent", fresh)
        assert driver.code("cuStreamSynchronize", stream) == "INVALID_HANDLE"
        assert driver.code("cuMemFree_v2", address) == "INVALID_VALUE"

    def test_the_primary_context_lives_until_its_last_release(self, driver: Driver) -> None:
        again = driver.make("cuDevicePrimaryCtxRetain", 0)

        assert driver.make("cuCtxGetCurrent") == again
        assert driver.emulated.live_handles("context") == 2
        driver.do("cuDevicePrimaryCtxRelease_v2", 0)
        assert driver.code("cuCtxSynchronize") == "SUCCESS"

    def test_after_a_failed_kernel_every_call_fails(self, driver: Driver) -> None:
        stream, word = driver.stream(), driver.memory()
        probe = driver.function(b"edgetrack_probe")
        of_a_graph_that_does_not_run = driver.condition(driver.graph())

        launch_probe(driver, probe, stream, word, handle=of_a_graph_that_does_not_run)

        assert driver.code("cuStreamSynchronize", stream) == "ILLEGAL_ADDRESS"
        assert driver.code("cuMemAlloc_v2", (ctypes.c_uint64 * 1)(), 64) == "ILLEGAL_ADDRESS"


def empty_exec(driver: Driver) -> int:
    graph = driver.make("cuGraphCreate", 0)
    executable = driver.exec(graph)
    driver.do("cuGraphDestroy", graph)
    return executable


class TestHandles:
    @pytest.mark.parametrize(
        ("name", "make", "error"),
        [
            ("cuStreamSynchronize", Driver.stream, "INVALID_HANDLE"),
            ("cuEventSynchronize", Driver.event, "INVALID_HANDLE"),
            ("cuModuleUnload", lambda d: d.make("cuModuleLoadData", read_ptx()), "INVALID_HANDLE"),
            ("cuGraphDestroy", lambda d: d.make("cuGraphCreate", 0), "INVALID_VALUE"),
        ],
    )
    def test_a_handle_cut_to_32_bits_is_unknown(self, driver, name, make, error) -> None:
        handle = make(driver)

        assert handle > 2**32
        assert driver.code(name, handle & 0xFFFFFFFF) == error
        assert driver.code(name, handle) == "SUCCESS"

    @pytest.mark.parametrize(
        ("close", "make", "error"),
        [
            ("cuStreamDestroy_v2", Driver.stream, "INVALID_HANDLE"),
            ("cuEventDestroy_v2", Driver.event, "INVALID_HANDLE"),
            ("cuModuleUnload", lambda d: d.make("cuModuleLoadData", read_ptx()), "INVALID_HANDLE"),
            ("cuGraphDestroy", lambda d: d.make("cuGraphCreate", 0), "INVALID_VALUE"),
            ("cuMemFree_v2", Driver.memory, "INVALID_VALUE"),
            ("cuGraphExecDestroy", empty_exec, "INVALID_VALUE"),
        ],
    )
    def test_what_was_closed_is_unknown(self, driver, close, make, error) -> None:
        handle = make(driver)
        driver.do(close, handle)

        assert driver.code(close, handle) == error

    def test_a_function_ends_with_its_module(self, driver: Driver) -> None:
        module = driver.make("cuModuleLoadData", read_ptx())
        function = driver.make("cuModuleGetFunction", module, b"edgetrack_probe")
        driver.do("cuModuleUnload", module)

        launched = driver.code("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, 0, None, None)

        assert launched == "INVALID_HANDLE"


class TestMemory:
    def test_fresh_memory_is_not_zero(self, driver: Driver) -> None:
        assert bytes_at(driver.memory(4), 4) == [0xCD] * 4
        assert driver.pinned(4).tolist() == [0xCD] * 4

    def test_copies_stay_inside_an_allocation(self, driver: Driver) -> None:
        address, host = driver.memory(64), np.zeros(65, np.uint8)

        assert driver.code("cuMemcpyHtoD_v2", address, host, 64) == "SUCCESS"
        assert driver.code("cuMemcpyHtoD_v2", address, host, 65) == "INVALID_VALUE"
        assert driver.code("cuMemcpyDtoH_v2", host, address + 1, 64) == "INVALID_VALUE"
        assert driver.code("cuMemsetD8_v2", address + 60, 0, 5) == "INVALID_VALUE"
        assert driver.code("cuMemFree_v2", address + 8) == "INVALID_VALUE"
        assert driver.code("cuMemFreeHost", address) == "INVALID_VALUE"

    def test_pageable_memory_is_no_device_memory(self, driver: Driver) -> None:
        address, host = driver.memory(64), np.zeros(64, np.uint8)

        assert driver.code("cuMemcpyDtoD_v2", address, host, 64) == "INVALID_VALUE"
        assert driver.code("cuMemcpyDtoH_v2", address, address, 64) == "INVALID_VALUE"

    def test_only_mapped_memory_has_a_device_address(self, driver: Driver) -> None:
        plain = driver.make("cuMemHostAlloc", 64, 0)
        mapped = driver.make("cuMemHostAlloc", 64, DEVICEMAP)
        found = (ctypes.c_uint64 * 1)()

        refused = driver.code("cuMemHostGetDevicePointer_v2", found, plain, 0)

        assert refused == "INVALID_VALUE"
        assert driver.make("cuMemHostGetDevicePointer_v2", mapped, 0) == mapped

    def test_rows_are_copied_by_their_pitch(self, driver: Driver) -> None:
        source, address, stream = np.arange(40, dtype=np.uint8), driver.memory(12), driver.stream()

        assert driver.code("cuMemcpy2DAsync_v2", rows(source, address, pitch=3), stream) == (
            "INVALID_VALUE"
        )
        driver.do("cuMemcpy2DAsync_v2", rows(source, address, pitch=10), stream)
        driver.sync(stream)

        assert bytes_at(address, 12) == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]

    def test_a_write_behind_an_allocation_is_found(self, driver: Driver) -> None:
        address = driver.memory(60)
        (ctypes.c_uint8 * 61).from_address(address)[60] = 1

        assert driver.code("cuMemFree_v2", address) == "ILLEGAL_ADDRESS"

    def test_memory_ends(self, driver: Driver) -> None:
        driver.emulated.configure(memory_bytes=1000)
        found = (ctypes.c_uint64 * 1)()
        first = driver.memory(600)

        assert driver.code("cuMemAlloc_v2", found, 500) == "OUT_OF_MEMORY"
        assert free_bytes(driver) == 400
        driver.do("cuMemFree_v2", first)
        assert driver.code("cuMemAlloc_v2", found, 500) == "SUCCESS"
        assert driver.emulated.live_bytes == 500

    @pytest.mark.parametrize(
        ("is_integrated", "free", "error"), [(1, 400, "OUT_OF_MEMORY"), (0, 1000, "SUCCESS")]
    )
    def test_pinned_memory_counts_where_memory_is_shared(
        self, driver: Driver, is_integrated: int, free: int, error: str
    ) -> None:
        driver.emulated.configure(memory_bytes=1000, integrated=is_integrated)
        driver.pinned(600)

        assert free_bytes(driver) == free
        assert driver.emulated.live_bytes == 600
        assert driver.code("cuMemHostAlloc", (ctypes.c_uint64 * 1)(), 1001, 0) == error

    def test_registered_memory_is_registered_once(self, driver: Driver) -> None:
        host = np.zeros(64, np.uint8)

        driver.do("cuMemHostRegister_v2", host, 64, DEVICEMAP)
        again = driver.code("cuMemHostRegister_v2", host, 64, DEVICEMAP)
        driver.do("cuMemHostUnregister", host)

        assert again == "HOST_MEMORY_ALREADY_REGISTERED"
        assert driver.code("cuMemHostUnregister", host) == "HOST_MEMORY_NOT_REGISTERED"


def free_bytes(driver: Driver) -> int:
    total = (ctypes.c_uint64 * 1)()
    return driver.make("cuMemGetInfo_v2", total)


def rows(source: np.ndarray, address: int, *, pitch: int) -> np.ndarray:
    """``CUDA_MEMCPY2D``: three rows of four bytes, from host memory to packed device memory."""
    copy = np.zeros(16, np.uint64)
    host, device = 1, 2
    copy[2], copy[3], copy[6] = host, source.ctypes.data, pitch
    copy[9], copy[11], copy[13] = device, address, 4
    copy[14], copy[15] = 4, 3
    return copy


def launch_probe(driver: Driver, probe: int, stream: int, word: int, *, handle: int) -> None:
    values = (ctypes.c_uint64 * 3)(word, 7, handle)
    params = (ctypes.c_uint64 * 3)(*(ctypes.addressof(values) + 8 * k for k in range(3)))
    driver.do("cuLaunchKernel", probe, 1, 1, 1, 1, 1, 1, 0, stream, params, None)


def pack(*, size: int) -> ctypes.Array:
    """``extra`` of a launch: a buffer of zeros of this size, in bytes."""
    pack.kept = np.zeros(64, np.uint8), ctypes.c_size_t(size)  # the driver reads them in the call
    buffer, count = pack.kept
    return (ctypes.c_uint64 * 5)(1, buffer.ctypes.data, 2, ctypes.addressof(count), 0)


class TestModules:
    @pytest.mark.parametrize(
        ("image", "error"),
        [
            (b"no image at all", "INVALID_IMAGE"),
            (b"\x7fELF a cubin", "NO_BINARY_FOR_GPU"),
            (b".version 8.6\n.target sm_75", "UNSUPPORTED_PTX_VERSION"),
            (b".version 8.5\n.target sm_90", "INVALID_PTX"),
        ],
    )
    def test_images_that_this_device_can_not_run(self, driver, image: bytes, error: str) -> None:
        assert driver.code("cuModuleLoadData", (ctypes.c_uint64 * 1)(), image) == error

    def test_a_newer_driver_reads_newer_ptx(self, driver: Driver) -> None:
        driver.emulated.configure(version=13000)
        driver.make("cuModuleLoadData", b".version 9.0\n.target sm_75")

    def test_an_unknown_kernel_is_not_found(self, driver: Driver) -> None:
        module = driver.make("cuModuleLoadData", read_ptx())
        found = (ctypes.c_uint64 * 1)()

        assert driver.code("cuModuleGetFunction", found, module, b"edgetrack_pro") == "NOT_FOUND"

    def test_the_ptx_must_have_its_twin_s_parameters(self, driver: Driver) -> None:
        module = driver.make(
            "cuModuleLoadData",
            b".version 8.5\n.target sm_75\n.visible .entry edgetrack_probe(.param .u64 a)",
        )
        found = (ctypes.c_uint64 * 1)()

        wrong = driver.code("cuModuleGetFunction", found, module, b"edgetrack_probe")

        assert wrong == "INVALID_IMAGE"

    @pytest.mark.parametrize(
        ("shape", "error"),
        [
            ((1, 1, 1, 1024, 1, 1), "SUCCESS"),
            ((0, 1, 1, 1, 1, 1), "INVALID_VALUE"),
            ((1, 1, 1, 64, 17, 1), "INVALID_VALUE"),
            ((1, 1, 1, 1, 1, 65), "INVALID_VALUE"),
        ],
    )
    def test_the_shape_of_a_launch(self, driver, shape, error) -> None:
        crop = driver.function(b"edgetrack_crop")
        extra = pack(size=28)

        assert driver.code("cuLaunchKernel", crop, *shape, 0, 0, None, extra) == error

    def test_the_arguments_of_a_launch_have_the_kernel_s_size(self, driver: Driver) -> None:
        probe = driver.function(b"edgetrack_probe")  # an address, 32 bits, and a handle: 24 bytes
        shape = (1, 1, 1, 1, 1, 1)

        for size in (20, 28):
            extra = pack(size=size)
            refused = driver.code("cuLaunchKernel", probe, *shape, 0, 0, None, extra)
            assert refused == "INVALID_VALUE"
        assert driver.code("cuLaunchKernel", probe, *shape, 0, 0, None, None) == "INVALID_VALUE"

    @pytest.mark.parametrize("where", ["pageable", "freed"])
    def test_a_kernel_takes_addresses_of_the_device_only(self, driver, where: str) -> None:
        stream, probe = driver.stream(), driver.function(b"edgetrack_probe")
        freed, word = driver.memory(), ctypes.c_uint32(1)
        driver.do("cuMemFree_v2", freed)

        address = {"pageable": ctypes.addressof(word), "freed": freed}[where]
        launch_probe(driver, probe, stream, address, handle=0)

        assert driver.code("cuStreamSynchronize", stream) == "ILLEGAL_ADDRESS"
        assert word.value == 1  # the kernel did not run

    def test_a_bad_address_inside_a_kernel_is_not_the_end_of_the_process(self, driver) -> None:
        stream, crop = driver.stream(), driver.function(b"edgetrack_crop")
        extra = pack(size=28)  # null addresses
        pack.kept[0][24:28].view(np.int32)[0] = 4

        driver.do("cuLaunchKernel", crop, 1, 1, 1, 4, 4, 1, 0, stream, None, extra)

        assert driver.code("cuStreamSynchronize", stream) == "ILLEGAL_ADDRESS"


class TestHooks:
    def test_calls_are_logged_in_order(self, driver: Driver) -> None:
        driver.emulated.clear_calls()
        driver.memory()
        driver.stream(NON_BLOCKING)

        assert driver.emulated.calls() == ["cuMemAlloc_v2", "cuStreamCreate"]

    def test_the_nth_call_fails_and_does_nothing(self, driver: Driver) -> None:
        out_of_memory = 2
        driver.emulated.fail("cuMemAlloc_v2", out_of_memory, nth=2)
        found = (ctypes.c_uint64 * 1)()

        codes = [driver.code("cuMemAlloc_v2", found, 64) for _ in range(3)]

        assert codes == ["SUCCESS", "OUT_OF_MEMORY", "SUCCESS"]
        assert driver.emulated.live_bytes == 128

    def test_calls_that_are_not_emulated_say_so(self, driver: Driver) -> None:
        assert driver.code("cuTexRefCreate") == "NOT_SUPPORTED"
