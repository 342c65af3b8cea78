"""What Linux and Jetson's own tools say in files: power mode, clocks, temperatures, power by rail.

Every reader takes the root of the file system, so that a recorded one can be read elsewhere.
"""

import math
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ROOT",
    "Clock",
    "Known",
    "PowerMode",
    "Rail",
    "find_rails",
    "parse_power_mode",
    "read_clocks",
    "read_power_mode",
    "read_power_mw",
    "read_temperatures_c",
]

ROOT = Path("/")
Known = float | None

_COLDEST_C = -100.0  # Orin says -256 °C of a unit that is switched off


@dataclass(frozen=True, kw_only=True)
class PowerMode:
    """The mode that ``nvpmodel`` put a Jetson into.

    Attributes:
        index: Its number on this board; ``None`` if unknown.
        name: Such as ``15W`` or ``MAXN_SUPER``; ``None`` if unknown.
    """

    index: int | None
    name: str | None


@dataclass(frozen=True, kw_only=True)
class Clock:
    """One clock and the limits that it may move between.

    Attributes:
        now_mhz: Its rate; 0 while its unit is switched off.
        lowest_mhz: The lowest rate that is allowed.
        highest_mhz: The highest.
        is_fixed: The two are one, as after ``jetson_clocks``: it does not follow the load.
    """

    now_mhz: Known
    lowest_mhz: Known
    highest_mhz: Known
    is_fixed: bool | None


@dataclass(frozen=True, kw_only=True)
class Rail:
    """One supply rail: its power is the product of the files over ``per_mw``."""

    name: str
    files: tuple[Path, ...]
    per_mw: float

    def read_mw(self) -> Known:
        """Its power; ``None`` where a file is missing, no number, or below zero."""
        factors = [_number(file) for file in self.files]
        if any(f is None or f < 0 for f in factors):
            return None
        return math.prod(f for f in factors if f is not None) / self.per_mw


def parse_power_mode(answer: str) -> PowerMode | None:
    r"""Read what ``nvpmodel -q`` prints.

    Example:
        >>> parse_power_mode("NV Power Mode: MAXN_SUPER\n2\n")
        PowerMode(index=2, name='MAXN_SUPER')
    """
    found = re.search(r"NV Power Mode:[ \t]*(\S*)[ \t]*(?:\n(\d+)\b)?", answer)
    if found is None or not any(found.groups()):
        return None
    name, index = found.groups()
    return PowerMode(index=int(index) if index else None, name=name or None)


def read_power_mode(root: Path = ROOT) -> PowerMode | None:
    """The power mode of a Jetson; ``None`` on other machines.

    ``nvpmodel`` keeps the mode that was set in one file and the names in another; where none was
    set, the program knows, and then the configuration's default.
    """
    configuration = _text(root / "etc/nvpmodel.conf")
    models = re.findall(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", configuration, re.M)
    names = {int(index): name for index, name in models}
    found = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    if found is None and (asked := parse_power_mode(_query(root / "usr/sbin/nvpmodel"))):
        return asked
    found = found or re.search(r"^<\s*PM_CONFIG\s+DEFAULT=(\d+)", configuration, re.M)
    if found is None:
        return None
    return PowerMode(index=int(found[1]), name=names.get(int(found[1])))


def read_clocks(root: Path = ROOT) -> dict[str, Clock]:
    """Clocks of the CPU, of a Jetson's GPU, and of its memory (whose rate root alone may read)."""
    clocks = {}
    policies = _glob(root, "sys/devices/system/cpu/cpufreq/policy*")
    if cores := [_clock(p / "scaling_{}_freq", per_mhz=1e3) for p in policies]:
        clocks["cpu"] = _together(cores)
    units = [
        node
        for node in _glob(root, "sys/class/devfreq/*")
        if re.search(r"gpu|\.g[a-z]\d+b$", node.name)  # 17000000.gpu, 17000000.ga10b, gpu-gpc-0
    ]
    for node in units:
        name = "gpu" if len(units) == 1 else node.name
        clocks[name] = _clock(node / "{}_freq", per_mhz=1e6)
    memory = _memory_clock(root)
    if (memory.now_mhz, memory.highest_mhz) != (None, None):
        clocks["emc"] = memory
    return clocks


def read_temperatures_c(root: Path = ROOT) -> dict[str, Known]:
    """Temperatures by thermal zone; zones of units that are switched off are unknown."""
    temperatures: dict[str, Known] = {}
    for zone in _glob(root, "sys/class/thermal/thermal_zone*"):
        name, value = _text(zone / "type").strip() or zone.name, _number(zone / "temp")
        celsius = None if value is None or value / 1e3 < _COLDEST_C else value / 1e3
        before = temperatures.get(name)
        known = [t for t in (before, celsius) if t is not None]
        temperatures[name] = max(known, default=None)
    return temperatures


def find_rails(root: Path = ROOT) -> tuple[Rail, ...]:
    """Supply rails that this machine measures; find them once, read them often."""
    rails: dict[str, Rail] = {}
    for chip in _glob(root, "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*"):
        for label in _glob(chip, "in[123]_label"):
            channel = label.name[2]
            files = (chip / f"in{channel}_input", chip / f"curr{channel}_input")
            _add(rails, label, files, per_mw=1e3)  # millivolts times milliamperes
    for chip in _glob(root, "sys/bus/i2c/drivers/ina3221x/*/iio:device*"):  # before JetPack 5
        for label in _glob(chip, "rail_name_*"):
            power = chip / f"in_power{label.name.removeprefix('rail_name_')}_input"
            _add(rails, label, (power,), per_mw=1.0)
    for chip in _glob(root, "sys/bus/i2c/drivers/ina238/*/hwmon/hwmon*"):  # Thor's input
        _add(rails, chip / "label", (chip / "power1_input",), per_mw=1e3, default="VIN")
    return tuple(rails.values())


def read_power_mw(root: Path = ROOT) -> dict[str, Known]:
    """Power by supply rail, now."""
    return {rail.name: rail.read_mw() for rail in find_rails(root)}


def _clock(pattern: Path, *, per_mhz: float) -> Clock:
    """A clock whose three files are named alike: ``{}`` is ``cur``, ``min`` and ``max``."""
    now, lowest, highest = (
        None if value is None or value < 0 else value / per_mhz
        for value in (_number(Path(str(pattern).format(k))) for k in ("cur", "min", "max"))
    )
    is_fixed = None if lowest is None or highest is None else lowest == highest
    return Clock(now_mhz=now, lowest_mhz=lowest, highest_mhz=highest, is_fixed=is_fixed)


def _together(clocks: list[Clock]) -> Clock:
    """Clusters of cores as one clock: the fastest now, between the widest limits."""
    fixed = {clock.is_fixed for clock in clocks}
    return Clock(
        now_mhz=max((c.now_mhz for c in clocks if c.now_mhz is not None), default=None),
        lowest_mhz=min((c.lowest_mhz for c in clocks if c.lowest_mhz is not None), default=None),
        highest_mhz=max((c.highest_mhz for c in clocks if c.highest_mhz is not None), default=None),
        is_fixed=False if False in fixed else None if None in fixed else True,
    )


def _memory_clock(root: Path) -> Clock:
    """A Jetson's memory clock; its cap is for everyone to read, its rate for root."""
    cap = _number(root / "sys/kernel/nvpmodel_clk_cap/emc")
    folder = root / "sys/kernel/debug/bpmp/debug/clk/emc"
    now, lowest, highest, locked = (
        _number(folder / name) for name in ("rate", "min_rate", "max_rate", "mrq_rate_locked")
    )
    highest = cap if cap is not None and cap > 0 else highest
    return Clock(
        now_mhz=None if now is None else now / 1e6,
        lowest_mhz=None if lowest is None else lowest / 1e6,
        highest_mhz=None if highest is None else highest / 1e6,
        is_fixed=None if locked is None else bool(locked),
    )


def _add(
    rails: dict[str, Rail],
    label: Path,
    files: tuple[Path, ...],
    *,
    per_mw: float,
    default: str = "",
) -> None:
    """Keep a rail under its label, if something is connected to it."""
    name = _text(label).strip() or default
    if name not in ("", "NC") and name not in rails:
        rails[name] = Rail(name=name, files=files, per_mw=per_mw)


def _query(program: Path) -> str:
    """What ``nvpmodel -q`` prints; nothing where it is not there, refuses, or hangs."""
    try:
        done = subprocess.run(
            [str(program), "-q"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _glob(folder: Path, pattern: str) -> list[Path]:
    """Paths in the order of their numbers; none where the folder may not be looked into."""
    try:
        return sorted(folder.glob(pattern), key=lambda p: (len(p.name), str(p)))
    except OSError:
        return []


def _text(file: Path) -> str:
    """A file's text, 64 KiB at most; empty where it cannot be read.

    Sensors of units that sleep answer ``EAGAIN``, which Python's own files turn into ``None``.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(descriptor, 1 << 16).decode("utf-8", "replace")
        finally:
            os.close(descriptor)
    except OSError:
        return ""


def _number(file: Path) -> Known:
    try:
        value = float(_text(file))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
