"""The CUDA driver, asked without any CUDA package: which device is there, what an error means."""

import ctypes
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from edgetrack.errors import DeviceError, DeviceMemoryError

__all__ = [
    "OLDEST_DRIVER",
    "CudaDevice",
    "call_driver",
    "count_cuda_devices",
    "cuda_driver_version",
    "describe_failure",
    "device_of",
    "driver_error",
    "driver_version",
    "find_cuda_device",
    "load_driver",
    "was_started_before_fork",
]

OLDEST_DRIVER = 12040  # CUDA 12.4, the first with conditional graph nodes

_POINTER_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_CAPTURE_HINT = (
    "while a stream captures, do not wait for it, allocate, or copy from memory that is not pinned"
)
_LOST_HINT = (
    "the device's context is lost, restart the process; compute-sanitizer names the kernel at fault"
)
_IMAGE_HINT = "the kernels were compiled for other devices or a newer driver: update the driver"
_HINTS: Mapping[str, str] = MappingProxyType(
    {
        "CUDA_ERROR_OUT_OF_MEMORY": "free device memory: stop other programs, or run fewer "
        "trackers at once",
        "CUDA_ERROR_NOT_INITIALIZED": "CUDA does not survive fork(): start worker processes with "
        "multiprocessing's 'spawn' method",
        "CUDA_ERROR_INVALID_CONTEXT": "make the calls inside `with context.current():`",
        "CUDA_ERROR_CONTEXT_IS_DESTROYED": "something reset the device while it was in use: open "
        "the context anew",
        "CUDA_ERROR_NOT_READY": "wait for it first: synchronize()",
        "CUDA_ERROR_NOT_FOUND": "check the name: what was loaded does not hold it",
        "CUDA_ERROR_NO_BINARY_FOR_GPU": _IMAGE_HINT,
        "CUDA_ERROR_INVALID_PTX": _IMAGE_HINT,
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": _IMAGE_HINT,
        "CUDA_ERROR_ILLEGAL_ADDRESS": _LOST_HINT,
        "CUDA_ERROR_MISALIGNED_ADDRESS": _LOST_HINT,
        "CUDA_ERROR_ILLEGAL_INSTRUCTION": _LOST_HINT,
        "CUDA_ERROR_LAUNCH_FAILED": _LOST_HINT,
        "CUDA_ERROR_LAUNCH_TIMEOUT": _LOST_HINT,
        "CUDA_ERROR_ASSERT": _LOST_HINT,
        "CUDA_ERROR_ECC_UNCORRECTABLE": "the device's memory has a fault: restart the machine",
        "CUDA_ERROR_SYSTEM_NOT_READY": "start NVIDIA's services, or restart the machine",
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the kernel module and the driver library differ: "
        "restart the machine after a driver update",
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": _CAPTURE_HINT,
        "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": _CAPTURE_HINT,
        "CUDA_ERROR_STREAM_CAPTURE_UNJOINED": "let the captured stream wait for every stream that "
        "was forked from it",
        "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT": "use streams of the context, never the default one",
        "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD": "end a capture on the thread that began it",
    }
)
_CALL_HINTS: Mapping[str, str] = MappingProxyType(
    {
        "cuGraphInstantiateWithFlags": "a graph may hold no copies from memory that is not pinned, "
        "and bodies no waits, host functions or allocations: check_body names them",
        "cuLaunchKernel": "check that the arguments have the types of the kernel's signature",
    }
)
_OTHER_HINT = "check the handles and sizes of the call; `edgetrack doctor` shows driver and device"

_started_in: int | None = None  # process that called cuInit


@dataclass(frozen=True, kw_only=True)
class CudaDevice:
    """One CUDA device, as the driver describes it.

    Attributes:
        name: Such as ``Orin``.
        arch: Its compute capability, such as ``sm_87``.
        ordinal: Its number among the devices that this process sees, from 0.
        num_multiprocessors: Its streaming multiprocessors.
        memory_bytes: All its memory; what it shares with the CPU where it is integrated.
        is_integrated: It shares memory with the CPU, as on a Jetson.
        driver: The newest CUDA that its driver supports, such as ``12.6``.
    """

    name: str
    arch: str
    ordinal: int
    num_multiprocessors: int
    memory_bytes: int
    is_integrated: bool
    driver: str


def find_cuda_device(ordinal: int = 0) -> CudaDevice | None:
    """Ask the driver for a device; ``None`` without a driver, or without that device."""
    driver, device = load_driver(), ctypes.c_int()
    if driver is None or not _start(driver) or driver.cuDeviceGet(ctypes.byref(device), ordinal):
        return None
    name, memory_bytes = ctypes.create_string_buffer(256), ctypes.c_size_t()
    try:
        call_driver("cuDeviceGetName", name, len(name), device)
        call_driver("cuDeviceTotalMem_v2", ctypes.byref(memory_bytes), device)
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR, MULTIPROCESSOR_COUNT, INTEGRATED
        numbers = [_attribute(device, number) for number in (75, 76, 16, 18)]
    except DeviceError:
        return None
    major, minor, num_multiprocessors, is_integrated = numbers
    return CudaDevice(
        name=name.value.decode(),
        arch=f"sm_{major}{minor}",
        ordinal=ordinal,
        num_multiprocessors=num_multiprocessors,
        memory_bytes=memory_bytes.value,
        is_integrated=bool(is_integrated),
        driver=cuda_driver_version() or "unknown",
    )


def count_cuda_devices() -> int:
    """How many devices this process sees; ``CUDA_VISIBLE_DEVICES`` hides some."""
    driver, count = load_driver(), ctypes.c_int()
    if driver is None or not _start(driver) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def device_of(address: int) -> int | None:
    """Number of the device that an address belongs to; ``None`` for what no driver allocated."""
    ordinal = ctypes.c_int()
    code = load_driver().cuPointerGetAttribute(
        ctypes.byref(ordinal), _POINTER_DEVICE_ORDINAL, ctypes.c_uint64(address)
    )
    return None if code else ordinal.value


def cuda_driver_version() -> str | None:
    """The newest CUDA that the driver supports, such as ``12.6``; ``None`` without a driver."""
    version = driver_version()
    return None if version is None else f"{version // 1000}.{version % 1000 // 10}"


def driver_version() -> int | None:
    """The same as a number to compare, such as 12060."""
    driver, version = load_driver(), ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value


def was_started_before_fork() -> bool:
    """Whether this process was forked from one that used CUDA already, which rules CUDA out."""
    return _started_in is not None and _started_in != os.getpid()


@functools.cache
def load_driver() -> Any:
    """The driver's library, whose calls return an error code; ``None`` without a driver.

    Pass handles and addresses as ``ctypes.c_void_p``: a plain integer is cut to 32 bits.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def call_driver(name: str, *args: Any) -> None:
    """Make a call of the driver.

    Raises:
        DeviceError: It failed, or this driver has no such call.
    """
    try:
        code = getattr(load_driver(), name)(*args)
    except AttributeError as error:
        raise DeviceError(
            f"{name}: expected a CUDA driver that has it, got {cuda_driver_version() or 'none'}; "
            "update the driver"
        ) from error
    if code:
        raise driver_error(name, code)


def driver_error(name: str, code: int) -> DeviceError:
    """The error to raise where the driver's call ``name`` gave ``code``."""
    return describe_failure(name, _text(code, "cuGetErrorName") or f"error {code}")


def describe_failure(name: str, error: str, *, detail: str = "") -> DeviceError:
    """The error to raise where the driver's call ``name`` failed.

    Args:
        name: The call.
        error: What the driver said: CUDA's name of the error, or its description.
        detail: More of what it said, such as a compiler's log.
    """
    known = _names_by_description().get(error, error)
    got = f"{known} ({detail})" if detail else known
    hint = _HINTS.get(known) or _CALL_HINTS.get(name, _OTHER_HINT)
    kind = DeviceMemoryError if known == "CUDA_ERROR_OUT_OF_MEMORY" else DeviceError
    return kind(f"{name}: expected success, got {got}; {hint}")


def _start(driver: Any) -> bool:
    global _started_in
    if driver.cuInit(0):
        return False
    if _started_in is None:
        _started_in = os.getpid()
    return True


def _attribute(device: ctypes.c_int, number: int) -> int:
    value = ctypes.c_int()
    call_driver("cuDeviceGetAttribute", ctypes.byref(value), number, device)
    return value.value


def _text(code: int, getter: str) -> str | None:
    """What the driver says of an error code; ``None`` if it does not know the code."""
    driver, text = load_driver(), ctypes.c_char_p()
    if driver is None or getattr(driver, getter)(code, ctypes.byref(text)) or text.value is None:
        return None
    return text.value.decode()


@functools.cache
def _names_by_description() -> Mapping[str, str]:
    """CUDA's name of each error by its description, which is all that PyCUDA passes on."""
    texts = [(_text(c, "cuGetErrorString"), _text(c, "cuGetErrorName")) for c in range(1, 1000)]
    return {description: name for description, name in texts if description and name}
