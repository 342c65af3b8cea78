"""A CUDA device's primary context, through PyCUDA: memory, streams, events and kernels in it.

The primary context is the one that torch, TensorRT and the CUDA runtime use, so all of them see
each other's memory. Who shares it is in ``primary``, what is made in it in ``memory`` and
``streams``; graphs are in ``graphs``.
"""

import ctypes
import os
from contextlib import AbstractContextManager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.backends.cuda.driver import (
    OLDEST_DRIVER,
    count_cuda_devices,
    cuda_driver_version,
    driver_version,
    find_cuda_device,
    was_started_before_fork,
)
from edgetrack.backends.cuda.memory import DeviceMemory, MappedMemory, Resource
from edgetrack.backends.cuda.primary import ContextEntry, PrimaryContext, share_primary
from edgetrack.backends.cuda.streams import Event, Module, Stream
from edgetrack.errors import (
    BackendUnavailableError,
    DeviceError,
    DeviceMemoryError,
    package_missing,
)

__all__ = ["CudaContext"]

_STREAM_NON_BLOCKING = 1
_Byte = ctypes.c_ubyte * 1


class CudaContext:
    """A share of a device's primary context, and all that was made through it.

    Threads may use one together: a call makes it current for its own thread. Daemon threads must
    not be inside one when the interpreter ends. What is still open then is closed.

    Attributes:
        device: The device.
        handle: The driver's ``CUcontext``.
        open_resources: What was made and not closed yet, oldest first.
    """

    def __init__(self, primary: PrimaryContext) -> None:
        self.device = primary.device
        self.handle = primary.handle
        self.open_resources: dict[Resource, bool] = {}
        self._is_closed = False
        self._primary = primary
        self._pycuda = primary.pycuda
        self._entry = ContextEntry(self, primary)
        primary.shares[self] = True

    @classmethod
    def open(cls, ordinal: int = 0) -> "CudaContext":
        """Retain the primary context of a device.

        Args:
            ordinal: Its number among the devices that this process sees, from 0.

        Raises:
            BackendUnavailableError: There is no driver, or none of CUDA 12.4 or newer, or PyCUDA
                is not installed.
            DeviceError: There is no such device, or the process was forked from one that used
                CUDA.
        """
        return cls(share_primary(ordinal, _retain))

    def __enter__(self) -> "CudaContext":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def was_forked(self) -> bool:
        """Whether this process was forked from the one that opened it."""
        return self._primary.pid != os.getpid()

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._is_closed

    @property
    def free_bytes(self) -> int:
        """Free device memory; on a Jetson without what the system would give back from caches."""
        with self.current():
            return int(self._pycuda.mem_get_info()[0])

    def current(self) -> AbstractContextManager[None]:
        """Make the context current for this thread, inside a ``with`` block.

        Blocks may be nested, which costs no call of the driver. PyCUDA's errors come out of it as
        ``DeviceError``.

        Raises:
            DeviceError: It was closed, or the process was forked since.
        """
        return self._entry

    def allocate(self, num_bytes: int, *, what: str) -> DeviceMemory:
        """Allocate memory of the device, not initialised.

        Args:
            num_bytes: At least 1.
            what: What it is for, in messages.

        Raises:
            DeviceMemoryError: There is too little.
        """
        _check_size(num_bytes, what)
        with self.current():
            try:
                held = self._pycuda.mem_alloc(num_bytes)
            except self._pycuda.MemoryError as error:
                raise self._out_of_memory(num_bytes, what, "device") from error
            return DeviceMemory(self, held, num_bytes=num_bytes, what=what)

    def allocate_mapped(self, num_bytes: int, *, what: str) -> MappedMemory:
        """Allocate pinned host memory that the device reads and writes in place, zero at first.

        Args:
            num_bytes: At least 1.
            what: What it is for, in messages.

        Raises:
            DeviceMemoryError: There is too little.
        """
        _check_size(num_bytes, what)
        with self.current():
            flags = self._pycuda.host_alloc_flags.DEVICEMAP
            try:
                held = self._pycuda.pagelocked_empty(num_bytes, np.uint8, mem_flags=flags)
            except self._pycuda.MemoryError as error:
                raise self._out_of_memory(num_bytes, what, "pinned host") from error
            return MappedMemory(self, held, what=what)

    def stream(self) -> Stream:
        """Make a stream that does not wait for the default stream."""
        with self.current():
            return Stream(self, self._pycuda.Stream(_STREAM_NON_BLOCKING))

    def event(self, *, with_timing: bool = True) -> Event:
        """Make an event; without timing it is cheaper, and cannot be measured by."""
        with self.current():
            return Event(self, with_timing=with_timing)

    def module(self, image: bytes) -> Module:
        """Load kernels: PTX text or a cubin.

        Raises:
            DeviceError: The driver cannot load or compile them for this device.
        """
        with self.current():
            return Module(self, self._pycuda.module_from_buffer(image))

    def copy_to_device(self, address: int, source: npt.NDArray[Any], stream: Stream) -> None:
        """Copy an array to the device, in stream order.

        Args:
            address: Where to, ``source.nbytes`` bytes.
            source: C-contiguous. Where it is pinned, it must not change until the copy is done.
            stream: What the copy is ordered by.

        Raises:
            ValueError: The array is not contiguous.
        """
        _check_contiguous(source)
        with self.current():
            self._pycuda.memcpy_htod_async(address, source, stream.held)

    def copy_from_device(self, out: npt.NDArray[Any], address: int, stream: Stream) -> None:
        """Copy from the device into a C-contiguous array, and wait until it is there.

        Raises:
            ValueError: The array is not contiguous.
        """
        _check_contiguous(out)
        with self.current():
            self._pycuda.memcpy_dtoh_async(out, address, stream.held)
            stream.synchronize()

    def copy_on_device(self, target: int, source: int, num_bytes: int, stream: Stream) -> None:
        """Copy between device addresses, mapped memory's among them, in stream order."""
        with self.current():
            self._pycuda.memcpy_dtod_async(target, source, num_bytes, stream.held)

    def copy_rows(
        self,
        *,
        address: int,
        pitch_bytes: int,
        source: int,
        source_pitch_bytes: int,
        width_bytes: int,
        num_rows: int,
        stream: Stream,
    ) -> None:
        """Copy a rectangle from the host to the device, in stream order.

        Args:
            address: Device address of its first row.
            pitch_bytes: From one row to the next, on the device.
            source: Host address of its first row; where it is pinned, it must not change until
                the copy is done.
            source_pitch_bytes: From one row to the next, on the host.
            width_bytes: Bytes of each row to copy.
            num_rows: Rows to copy.
            stream: What the copy is ordered by.
        """
        copy = self._pycuda.Memcpy2D()
        copy.set_src_host(_Byte.from_address(source))
        copy.src_pitch = source_pitch_bytes
        copy.set_dst_device(address)
        copy.dst_pitch = pitch_bytes
        copy.width_in_bytes = width_bytes
        copy.height = num_rows
        with self.current():
            copy(stream.held)

    def set_bytes(self, address: int, value: int, num_bytes: int, stream: Stream) -> None:
        """Set device memory to a byte value, 0 to 255, in stream order."""
        with self.current():
            self._pycuda.memset_d8_async(address, value, num_bytes, stream.held)

    def close(self) -> None:
        """Free what is still open, and give up this share; calling it twice is fine.

        In a forked child it frees nothing: all of it is the parent's.
        """
        if not self._primary.shares.pop(self, False):  # atomic: of two threads, one goes on
            return
        if self.was_forked:
            self._is_closed = True
            return
        failures = []
        try:
            with self.current():
                for resource in reversed(list(self.open_resources)):
                    try:
                        resource.close()
                    except DeviceError as error:
                        failures.append(error)
        finally:
            self._is_closed = True
            for resource in list(self.open_resources):
                resource.abandon()
            self._primary.leave()
        if failures:
            raise failures[0]

    def refusal(self) -> DeviceError | None:
        """Why it cannot be made current; ``None`` if it can."""
        if self.was_forked:
            return _fork_error()
        if self._is_closed:
            return DeviceError(
                "CUDA context: expected it open, got it closed; open one: CudaContext.open()"
            )
        return None

    def _out_of_memory(self, num_bytes: int, what: str, kind: str) -> DeviceMemoryError:
        free, shared = "less", ", which the CPU shares" if self.device.is_integrated else ""
        if kind == "device" or self.device.is_integrated:
            with suppress(self._pycuda.Error):
                free_bytes, total_bytes = self._pycuda.mem_get_info()
                free = f"{free_bytes} bytes free of {total_bytes / 2**20:.0f} MiB{shared}"
        return DeviceMemoryError(
            f"{what}: expected {num_bytes} bytes ({num_bytes / 2**20:.1f} MiB) of {kind} memory "
            f"({self.device.name}), got {free}; run fewer trackers at once, choose a bundle with "
            "fewer or smaller segments, or stop other programs that use the memory"
        )


def _retain(ordinal: int) -> PrimaryContext:
    """Retain the primary context of a device for this process."""
    _check_driver()
    if was_started_before_fork():
        raise _fork_error()
    device = find_cuda_device(ordinal)
    if device is None:
        count = count_cuda_devices()
        raise DeviceError(
            f"CUDA device: expected the number of one of the {count} devices that this process "
            f"sees, counted from 0, got {ordinal}; CUDA_VISIBLE_DEVICES hides devices, and a "
            "container needs --runtime nvidia or --gpus all"
        )
    try:
        import pycuda.driver
    except ImportError as error:
        if "undefined symbol" in str(error):
            raise BackendUnavailableError(
                f"PyCUDA: expected one for CUDA {device.driver} or older, got: {error}; compile it "
                "anew with a toolkit that is no newer than the driver: pip install "
                "--force-reinstall --no-cache-dir --no-deps --no-binary :all: pycuda"
            ) from error
        raise package_missing("pycuda", error) from error
    return PrimaryContext(device, pycuda.driver)


def _check_driver() -> None:
    version = driver_version()
    if version is None:
        raise BackendUnavailableError(
            "CUDA: expected NVIDIA's driver, got none (no libcuda.so.1); install it, or use "
            "--backend onnxruntime; a container needs --runtime nvidia or --gpus all"
        )
    if version < OLDEST_DRIVER:
        raise BackendUnavailableError(
            f"CUDA: expected a driver for CUDA 12.4 or newer, got one for {cuda_driver_version()}; "
            "update the driver, on a Jetson to JetPack 6.1 or newer"
        )


def _fork_error() -> DeviceError:
    return DeviceError(
        "CUDA context: expected the process that first used CUDA, got one forked from it, where "
        "CUDA cannot work; start workers with multiprocessing's 'spawn' method, and open it there"
    )


def _check_size(num_bytes: int, what: str) -> None:
    if num_bytes < 1:
        raise ValueError(f"{what}: expected at least 1 byte, got {num_bytes}")


def _check_contiguous(array: npt.NDArray[Any]) -> None:
    if not array.flags.c_contiguous:
        raise ValueError(
            f"copy: expected a C-contiguous array, got strides {array.strides} for shape "
            f"{array.shape}; use np.ascontiguousarray, or copy_rows"
        )
