"""What the CUDA driver says of this machine, asked without any CUDA package."""

import ctypes
from dataclasses import dataclass
from typing import Any

__all__ = ["CudaDevice", "cuda_driver_version", "find_cuda_device"]


@dataclass(frozen=True, kw_only=True)
class CudaDevice:
    """The first CUDA device: its name, and its compute capability such as ``sm_87``."""

    name: str
    arch: str


def find_cuda_device() -> CudaDevice | None:
    """Ask the driver for the first device; ``None`` without a driver or a device."""
    driver, device = _cuda_driver(), ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    return CudaDevice(name=name.value.decode(), arch=f"sm_{''.join(capability)}")


def cuda_driver_version() -> str | None:
    """The newest CUDA that the driver supports, such as ``12.6``; ``None`` without a driver."""
    driver, version = _cuda_driver(), ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _cuda_driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
