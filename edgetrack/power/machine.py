"""The state of the machine as a whole, and what the whole board draws."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetrack.power.nvml import CARD_RAIL, Nvml
from edgetrack.power.sysfs import (
    ROOT,
    Clock,
    Known,
    PowerMode,
    read_clocks,
    read_power_mode,
    read_power_mw,
    read_temperatures_c,
)

__all__ = ["MachineState", "read_machine_state", "total_mw", "total_rails"]

# What a board draws, by the rails that it measures; VDDQ_VDD2_1V8AO of an AGX Orin hangs behind
# VIN_SYS_5V0. Orin Nano, NX and older modules; Thor's whole kit; Nano; AGX Orin; Thor; AGX Xavier.
_TOTALS = (
    ("VDD_IN",),
    ("VIN",),
    ("POM_5V_IN",),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
    (CARD_RAIL,),
)


@dataclass(frozen=True, kw_only=True)
class MachineState:
    """What decides how fast this machine is now; unknown values are ``None``.

    Attributes:
        power_mode: Of a Jetson.
        clocks: ``cpu``, ``gpu`` (or the names of its parts), ``emc`` or ``memory``.
        temperatures_c: By thermal zone.
        power_mw: By supply rail, at one moment.
    """

    power_mode: PowerMode | None
    clocks: Mapping[str, Clock]
    temperatures_c: Mapping[str, Known]
    power_mw: Mapping[str, Known]

    @property
    def is_known(self) -> bool:
        """Whether there is anything to say."""
        known = (*self.temperatures_c.values(), *self.power_mw.values())
        return bool(self.power_mode or self.clocks) or any(v is not None for v in known)

    @property
    def moving_clocks(self) -> tuple[str, ...]:
        """Clocks that follow the load, so that times depend on what ran before."""
        return tuple(name for name, clock in self.clocks.items() if clock.is_fixed is False)

    def as_dict(self) -> dict[str, Any]:
        """The state as JSON takes it."""
        return dataclasses.asdict(self)


def total_rails(names: Iterable[str]) -> tuple[str, ...]:
    """The rails whose sum is what the whole board draws; empty if it is not known for these.

    Example:
        >>> total_rails(["VDD_CPU_GPU_CV", "VDD_IN", "VDD_SOC"])
        ('VDD_IN',)
    """
    there = set(names)
    return next((rails for rails in _TOTALS if there.issuperset(rails)), ())


def total_mw(values: Mapping[str, Known]) -> Known:
    """The sum over ``total_rails``, of power or of energy; ``None`` if one of them is unknown."""
    rails = total_rails(values)
    known = [v for v in (values[rail] for rail in rails) if v is not None]
    return sum(known) if rails and len(known) == len(rails) else None


def read_machine_state(root: Path = ROOT, *, nvml: Nvml | None = None) -> MachineState:
    """All that is known of this machine.

    Args:
        root: Of the file system.
        nvml: Adds what the files do not say.
    """
    return MachineState(
        power_mode=read_power_mode(root),
        clocks={**(nvml.read_clocks() if nvml else {}), **read_clocks(root)},
        temperatures_c={
            **(nvml.read_temperatures_c() if nvml else {}),
            **read_temperatures_c(root),
        },
        power_mw={**(nvml.read_power_mw() if nvml else {}), **read_power_mw(root)},
    )
