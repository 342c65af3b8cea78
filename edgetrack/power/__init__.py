"""Clocks, temperatures and power of this machine, and the energy between two moments.

A Jetson tells them through files, without root; a GPU on a card through NVML. What is missing,
forbidden or makes no sense is unknown: ``None``, never an exception.
"""

from edgetrack.power.machine import MachineState, read_machine_state, total_mw, total_rails
from edgetrack.power.nvml import Nvml
from edgetrack.power.sampler import Mark, PowerSampler
from edgetrack.power.sysfs import (
    Clock,
    PowerMode,
    Rail,
    find_rails,
    parse_power_mode,
    read_clocks,
    read_power_mode,
    read_power_mw,
    read_temperatures_c,
)

__all__ = [
    "Clock",
    "MachineState",
    "Mark",
    "Nvml",
    "PowerMode",
    "PowerSampler",
    "Rail",
    "find_rails",
    "parse_power_mode",
    "read_clocks",
    "read_machine_state",
    "read_power_mode",
    "read_power_mw",
    "read_temperatures_c",
    "total_mw",
    "total_rails",
]
