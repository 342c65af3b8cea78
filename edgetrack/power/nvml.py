"""A GPU on a card, as NVIDIA's management library sees it; asked through ctypes."""

import ctypes
from typing import Any

from edgetrack.backends.cuda.driver import find_cuda_device, load_driver
from edgetrack.power.sysfs import Clock, Known

__all__ = ["CARD_RAIL", "Nvml"]

CARD_RAIL = "GPU board"

_NVML = "libnvidia-ml.so.1"


class Nvml:
    """A GPU as NVIDIA's management library sees it; close it after use."""

    def __init__(self, library: Any, device: Any) -> None:
        self._library, self._device = library, device

    @classmethod
    def open(cls, ordinal: int = 0, *, library: str = _NVML) -> "Nvml | None":
        """Find a CUDA device; ``None`` without the library, or where it does not know the device.

        Args:
            ordinal: As CUDA counts, which is not how NVML does: it is found by its place on the
                bus.
            library: Name of the shared library.
        """
        try:
            nvml = ctypes.CDLL(library)
            if nvml.nvmlInit_v2():
                return None
            device = _find(nvml, ordinal)
        except (OSError, AttributeError):  # no such library, or one that is too old
            return None
        if device is None:
            nvml.nvmlShutdown()
            return None
        return cls(nvml, device)

    def read_clocks(self) -> dict[str, Clock]:
        """Clocks of the GPU and of its memory; NVML does not say whether they are locked."""
        clocks = {}
        for name, kind in (("gpu", 1), ("memory", 2)):  # NVML_CLOCK_SM, NVML_CLOCK_MEM
            now = self._ask("nvmlDeviceGetClockInfo", kind)
            highest = self._ask("nvmlDeviceGetMaxClockInfo", kind)
            if (now, highest) != (None, None):
                clocks[name] = Clock(
                    now_mhz=now, lowest_mhz=None, highest_mhz=highest, is_fixed=None
                )
        return clocks

    def read_temperatures_c(self) -> dict[str, Known]:
        """Temperature of the GPU, where NVML knows one."""
        celsius = self._ask("nvmlDeviceGetTemperature", 0)
        return {} if celsius is None else {"gpu": celsius}

    def read_power_mw(self) -> dict[str, Known]:
        """Power of the whole card, where NVML knows it."""
        power = self._ask("nvmlDeviceGetPowerUsage")
        return {} if power is None else {CARD_RAIL: power}

    def read_energy_mj(self) -> dict[str, Known]:
        """Energy of the whole card since the driver was loaded, where it counts it.

        Newer cards give power as the mean of the last second; the counter has no such lag.
        """
        energy = self._ask("nvmlDeviceGetTotalEnergyConsumption", into=ctypes.c_ulonglong)
        return {} if energy is None else {CARD_RAIL: energy}

    def close(self) -> None:
        """Leave NVML; calling it twice is fine."""
        if self._library is not None:
            self._library.nvmlShutdown()
            self._library = None

    def _ask(self, call: str, *args: int, into: type[Any] = ctypes.c_uint) -> Known:
        value = into()
        function = getattr(self._library, call, None)
        if function is None or function(self._device, *args, ctypes.byref(value)):
            return None
        return float(value.value)


def _find(nvml: Any, ordinal: int) -> Any:
    """The handle of a CUDA device; ``None`` if it cannot be told which one it is."""
    device, count, bus_id = ctypes.c_void_p(), ctypes.c_uint(), _pci_bus_id(ordinal)
    if bus_id and not nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id, ctypes.byref(device)):
        return device
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    if count.value != 1 or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
        return None
    return device


def _pci_bus_id(ordinal: int) -> bytes | None:
    """Where a CUDA device sits, such as ``0000:01:00.0``."""
    if find_cuda_device(ordinal) is None:
        return None
    driver, device, text = load_driver(), ctypes.c_int(), ctypes.create_string_buffer(64)
    driver.cuDeviceGet(ctypes.byref(device), ordinal)
    return None if driver.cuDeviceGetPCIBusId(text, len(text), device) else text.value
