"""Power sampled in the background, and the energy between two moments."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType

import numpy as np
import numpy.typing as npt

from edgetrack.power.sysfs import Known

__all__ = ["Mark", "PowerSampler"]


@dataclass(frozen=True)
class Mark:
    """A moment, and energy counters where there are any.

    Reading sensors takes milliseconds, so it has two ends: what it starts begins with the later
    one, what it ends is over with the earlier one.

    Attributes:
        began_s: When reading began, as ``time.perf_counter`` gives it.
        ended_s: When it ended.
        energy_mj: Counters by rail.
    """

    began_s: float
    ended_s: float
    energy_mj: Mapping[str, Known]


class PowerSampler:
    """Reads power in the background, and gives the energy between two marks.

    Args:
        read_power_mw: Power by rail, now.
        read_energy_mj: Energy counters by rail, where a device has them; they count instead of
            the samples.
        interval_ms: Time between samples, 10 to 100.

    Raises:
        ValueError: The interval is out of range.

    Example:
        >>> with PowerSampler(lambda: {"VDD_IN": 5000.0}) as sampler:
        ...     start = sampler.mark()
        ...     time.sleep(0.1)
        ...     end = sampler.mark()
        >>> round(sampler.mean_mw(start, end)["VDD_IN"])
        5000
    """

    def __init__(
        self,
        read_power_mw: Callable[[], Mapping[str, Known]],
        *,
        read_energy_mj: Callable[[], Mapping[str, Known]] | None = None,
        interval_ms: float = 20.0,
    ) -> None:
        if not 10 <= interval_ms <= 100:
            raise ValueError(f"interval_ms: expected 10 to 100, got {interval_ms}")
        self._read, self._read_energy = read_power_mw, read_energy_mj or dict
        self._interval_s = interval_ms / 1e3
        self._samples: list[tuple[float, Mapping[str, Known]]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power", daemon=True)

    def __enter__(self) -> "PowerSampler":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def mark(self) -> Mark:
        """Note this moment, with a sample of its own."""
        began_s = time.perf_counter()
        self._sample()
        counters = MappingProxyType(dict(self._read_energy()))
        return Mark(began_s, time.perf_counter(), counters)

    def energy_mj(
        self, start: Mark, end: Mark, *, idle_mw: Mapping[str, Known] | None = None
    ) -> dict[str, Known]:
        """Energy by rail between two marks: linear from sample to sample.

        Args:
            start: The earlier mark.
            end: The later one.
            idle_mw: Power to leave out, such as ``mean_mw`` of a time when nothing ran; rails that
                it does not know become unknown.

        Returns:
            Millijoules; ``None`` for a rail that was not read at least twice in between.
        """
        energies = {rail: self._integral(rail, start, end) for rail in self._rails()}
        for rail, before in start.energy_mj.items():
            after = end.energy_mj.get(rail)
            if before is not None and after is not None and after >= before:
                energies[rail] = after - before
        if idle_mw is None:
            return energies
        seconds = end.began_s - start.ended_s
        left = {rail: (energy, idle_mw.get(rail)) for rail, energy in energies.items()}
        return {
            rail: None if energy is None or idle is None else energy - idle * seconds
            for rail, (energy, idle) in left.items()
        }

    def mean_mw(self, start: Mark, end: Mark) -> dict[str, Known]:
        """Mean power by rail between two marks."""
        seconds = end.began_s - start.ended_s
        energies = self.energy_mj(start, end)
        return {r: None if e is None or seconds <= 0 else e / seconds for r, e in energies.items()}

    def _run(self) -> None:
        while not self._is_over.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        """Take one sample, dated to the middle of its reading."""
        began_s = time.perf_counter()
        values = dict(self._read())
        self._samples.append(((began_s + time.perf_counter()) / 2, values))

    def _rails(self) -> list[str]:
        return list(dict.fromkeys(rail for _, values in self._samples for rail in values))

    def _integral(self, rail: str, start: Mark, end: Mark) -> Known:
        pairs = [(t, v.get(rail)) for t, v in list(self._samples)]
        known = sorted((t, p) for t, p in pairs if p is not None)
        times: npt.NDArray[np.float64] = np.array([t for t, _ in known])
        power: npt.NDArray[np.float64] = np.array([p for _, p in known])
        within = (times >= start.began_s) & (times <= end.ended_s)
        if np.count_nonzero(within) < 2:
            return None
        inside = (times > start.ended_s) & (times < end.began_s)
        at = np.concatenate([[start.ended_s], times[inside], [end.began_s]])
        mw = np.interp(at, times, power)
        return float(np.sum(np.diff(at) * (mw[1:] + mw[:-1]) / 2))
