"""How fast a tracker is on this machine: per exit, overall, and where the time and energy go.

One update is timed as a user sees it: crop, segments, decisions, mapping back. Reading frames is
not counted. Every exit is timed by forcing it, the operating point by tracking freely; both on the
same frames, in the same run. Energy has passes of its own, because reading sensors takes time.
"""

import contextlib
import math
import resource
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.errors import EdgeTrackError
from edgetrack.power import (
    MachineState,
    Nvml,
    PowerSampler,
    find_rails,
    read_machine_state,
    total_mw,
    total_rails,
)
from edgetrack.runtime.loop import EXIT_DECISIONS
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.tracker import Tracker

__all__ = ["BenchReport", "Energy", "EnergyPerFrame", "Gpu", "Percentiles", "Timing", "bench"]

Frame = npt.NDArray[np.uint8]
OnPass = Callable[[str], None]


@dataclass(frozen=True)
class Percentiles:
    """Latencies in milliseconds.

    Attributes:
        p50: Median.
        p90: Nine in ten are faster.
        p99: Ninety-nine in a hundred are.
        mean: Mean.
        count: Updates that were timed.
    """

    p50: float
    p90: float
    p99: float
    mean: float
    count: int

    @classmethod
    def of(cls, latencies_ms: Sequence[float]) -> "Percentiles":
        """Percentiles of at least one latency."""
        p50, p90, p99 = (float(v) for v in np.percentile(latencies_ms, (50, 90, 99)))
        return cls(p50, p90, p99, float(np.mean(latencies_ms)), len(latencies_ms))


@dataclass(frozen=True)
class Timing:
    """One tracker's times.

    Attributes:
        overall: At the tracker's own exit policy.
        fps: Updates over the seconds spent in them, at that policy.
        exit_histogram: Frames per exit, at that policy.
        exits: When exit ``k`` is forced, for each ``k``.
        stages_ms: Median time per stage of an update at full depth; ``rest`` is what is left.
        submit: The call alone that hands in a frame, at the tracker's own exit policy: how long the
            host is busy. Not comparable with an update.
    """

    overall: Percentiles
    fps: float
    exit_histogram: tuple[int, ...]
    exits: tuple[Percentiles, ...]
    stages_ms: dict[str, float]
    submit: Percentiles


@dataclass(frozen=True)
class Gpu:
    """What there is to say of a GPU only.

    Attributes:
        exit_decision: Who decides in the tracker that was given.
        memory_bytes: Device memory of its buffers and frames, engines not counted.
        ways: Times by who decides (``device``, ``flag``, ``host``), that tracker's own among them.
        unlike: Ways that took other exits than that tracker, so that their operating point cannot
            be compared with its own.
        unavailable: Why the other ways do not work here.
    """

    exit_decision: str
    memory_bytes: int
    ways: dict[str, Timing]
    unlike: tuple[str, ...]
    unavailable: dict[str, str]


@dataclass(frozen=True)
class EnergyPerFrame:
    """Millijoules per update; ``None`` where they could not be measured.

    Attributes:
        total_mj: Of the board, see ``Energy.total_rails``.
        above_idle_mj: The same without what it draws when nothing runs.
        rails_mj: By supply rail.
        num_frames: Updates in the measurement.
    """

    total_mj: float | None
    above_idle_mj: float | None
    rails_mj: dict[str, float | None]
    num_frames: int


@dataclass(frozen=True)
class Energy:
    """Energy of updates back to back.

    Attributes:
        total_rails: The rails that make up the total; empty if this machine's are not known.
        idle_mw: Power of the board while the tracker waits.
        exits: When exit ``k`` is forced, for each ``k``.
        overall: At the tracker's own exit policy.
    """

    total_rails: tuple[str, ...]
    idle_mw: float | None
    exits: tuple[EnergyPerFrame, ...]
    overall: EnergyPerFrame


@dataclass(frozen=True)
class BenchReport(Timing):
    """What ``bench`` measured; what this machine does not have is ``None``.

    Attributes:
        peak_memory_mb: Largest resident memory of this process.
        setup: Bundle, backend, precision, frame size, warm-up and count.
        before: Clocks, temperatures and power before the first pass.
        after: The same after the last.
        gpu: On a GPU only.
        energy: Where it was asked for.
    """

    peak_memory_mb: float
    setup: dict[str, Any]
    before: MachineState | None
    after: MachineState | None
    gpu: Gpu | None
    energy: Energy | None

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON takes it: an infinite threshold is the text ``inf``."""
        content = asdict(self)
        if self.gpu is None:
            del content["submit"]
        thresholds = [t if math.isfinite(t) else str(t) for t in self.setup["thresholds"]]
        content["setup"] = {**self.setup, "thresholds": thresholds}
        return {key: value for key, value in content.items() if value is not None}


def bench(
    tracker: Tracker,
    frames: Sequence[Frame],
    bbox: Sequence[float],
    *,
    num_warm_up: int = 20,
    on_pass: OnPass | None = None,
    open_deciding: Callable[[str], Tracker] | None = None,
    energy_s: float = 0.0,
    nvml: Nvml | None = None,
    root: Path = Path("/"),
) -> BenchReport:
    """Time a tracker on frames.

    Args:
        tracker: An open tracker; its exit policy is as before afterwards.
        frames: At least two, ``(H, W, 3)`` uint8 BGR, in memory.
        bbox: The target in the first: x, y, w, h in pixels.
        num_warm_up: Updates before each pass that are not counted.
        on_pass: Called with the name of each pass as it starts.
        open_deciding: Opens another such tracker for an ``exit_decision``; on a GPU the ways to
            decide are then timed side by side.
        energy_s: Seconds to measure energy at each exit; 0 measures none.
        nvml: Adds what a GPU on a card says of itself.
        root: Of the file system with this machine's sensors.

    Raises:
        ValueError: There are fewer than two frames.
    """
    if len(frames) < 2:
        raise ValueError(f"bench: expected at least 2 frames, got {len(frames)}")
    report = on_pass or (lambda name: None)
    clip = _Clip(frames, bbox, num_warm_up)
    before = read_machine_state(root, nvml=nvml)
    timing = _time(tracker, clip, report)
    gpu = _ways(tracker, timing, clip, open_deciding, report) if tracker.gpu_memory_bytes else None
    energy = _energy(tracker, clip, energy_s, root, nvml, report) if energy_s else None
    after = read_machine_state(root, nvml=nvml)
    return BenchReport(
        **{f.name: getattr(timing, f.name) for f in fields(timing)},
        peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        setup={
            "bundle": tracker.bundle.name,
            "backend": tracker.backend,
            "precision": tracker.precision,
            "engines": "built" if tracker.engines_path else "in memory",
            "frame": f"{frames[0].shape[1]}x{frames[0].shape[0]}",
            "criterion": tracker.exit_policy.criterion,
            "thresholds": list(tracker.exit_policy.thresholds),
            "num_warm_up": num_warm_up,
            "batch": 1,
            "timed": _timed(tracker),
        },
        before=before if before.is_known else None,
        after=after if after.is_known else None,
        gpu=gpu,
        energy=energy,
    )


def _timed(tracker: Tracker) -> str:
    """What a latency includes; a device updates what it carries after it gave the answer."""
    heads = ["heads"] if tracker.bundle.heads else []
    update = ["update"] if tracker.bundle.update is not None and not _is_on_gpu(tracker) else []
    return ", ".join(["crop", "segments", *heads, "decisions", "mapping back", *update])


def _is_on_gpu(tracker: Tracker) -> bool:
    return tracker.gpu_memory_bytes > 0


@dataclass(frozen=True)
class _Clip:
    """What every pass runs on."""

    frames: Sequence[Frame]
    bbox: Sequence[float]
    num_warm_up: int

    def warm_up(self, tracker: Tracker) -> None:
        tracker.init(self.frames[0], self.bbox)
        for frame in self.frames[1 : self.num_warm_up + 1]:
            tracker.update(frame)


class _Pass:
    """One pass over the frames: latencies, exits, stage times."""

    def __init__(self, tracker: Tracker, clip: _Clip) -> None:
        clip.warm_up(tracker)
        tracker.init(clip.frames[0], clip.bbox)
        self.latencies_ms: list[float] = []
        self.submits_ms: list[float] = []
        self.exits: list[int] = []
        self._stages: list[dict[str, float]] = []
        for frame in clip.frames[1:]:
            started = time.perf_counter()
            pending = tracker.update_async(frame)
            self.submits_ms.append((time.perf_counter() - started) * 1e3)
            result = pending.result()
            self.latencies_ms.append(result.latency_ms)
            self.exits.append(result.exit_index)
            stages = tracker.stage_ms
            behind_ms = stages.get("update", 0.0) if _is_on_gpu(tracker) else 0.0
            rest_ms = result.latency_ms - (sum(stages.values()) - behind_ms)
            self._stages.append({**stages, "rest": rest_ms})

    def stages_ms(self) -> dict[str, float]:
        """Median per stage."""
        names = self._stages[0]
        return {n: statistics.median(s[n] for s in self._stages) for n in names}


def _policies(tracker: Tracker) -> Generator[str, None, None]:
    """Force one exit after another, then restore the tracker's own policy; names each."""
    own_policy, num_exits = tracker.exit_policy, tracker.bundle.num_exits
    try:
        for index in range(num_exits):
            tracker.exit_policy = ExitPolicy.fixed(index, num_exits=num_exits)
            yield f"exit {index}"
    finally:
        tracker.exit_policy = own_policy
    yield "operating point"


def _time(tracker: Tracker, clip: _Clip, report: OnPass, *, suffix: str = "") -> Timing:
    passes = []
    with contextlib.closing(_policies(tracker)) as policies:
        for name in policies:
            report(f"timing {name}{suffix}")
            passes.append(_Pass(tracker, clip))
    *forced, free = passes
    return Timing(
        overall=Percentiles.of(free.latencies_ms),
        fps=len(free.latencies_ms) / (sum(free.latencies_ms) / 1e3),
        exit_histogram=tuple(np.bincount(free.exits, minlength=len(forced)).tolist()),
        exits=tuple(Percentiles.of(p.latencies_ms) for p in forced),
        stages_ms=forced[-1].stages_ms(),
        submit=Percentiles.of(free.submits_ms),
    )


def _ways(
    tracker: Tracker,
    timing: Timing,
    clip: _Clip,
    open_deciding: Callable[[str], Tracker] | None,
    report: OnPass,
) -> Gpu:
    """The ways to decide side by side; one more tracker is open at a time."""
    own = tracker.exit_decision
    ways, unavailable = {own: timing}, {}
    for way in EXIT_DECISIONS:
        if way in (own, "auto") or open_deciding is None:
            continue
        try:
            with open_deciding(way) as other:
                ways[way] = _time(other, clip, report, suffix=f", {way} decides")
        except (EdgeTrackError, TypeError) as error:  # no such nodes, no memory, a Python policy
            unavailable[way] = str(error)
    return Gpu(
        exit_decision=own,
        memory_bytes=tracker.gpu_memory_bytes,
        ways={way: ways[way] for way in EXIT_DECISIONS if way in ways},
        unlike=tuple(w for w, t in ways.items() if t.exit_histogram != timing.exit_histogram),
        unavailable=unavailable,
    )


def _energy(
    tracker: Tracker,
    clip: _Clip,
    seconds: float,
    root: Path,
    nvml: Nvml | None,
    report: OnPass,
) -> Energy:
    """Energy of updates back to back, at each exit and at the operating point."""
    rails = find_rails(root)

    def read_power_mw() -> dict[str, float | None]:
        values = {rail.name: rail.read_mw() for rail in rails}
        return {**nvml.read_power_mw(), **values} if nvml else values

    if not read_power_mw():
        nothing = EnergyPerFrame(None, None, {}, 0)
        return Energy((), None, (nothing,) * tracker.bundle.num_exits, nothing)
    read_energy_mj = nvml.read_energy_mj if nvml else None
    with PowerSampler(read_power_mw, read_energy_mj=read_energy_mj) as sampler:
        report("power when idle")
        start = sampler.mark()
        time.sleep(seconds)
        idle_mw = sampler.mean_mw(start, sampler.mark())
        rows = []
        with contextlib.closing(_policies(tracker)) as policies:
            for name in policies:
                report(f"energy {name}")
                rows.append(_energy_per_frame(tracker, clip, seconds, sampler, idle_mw))
    return Energy(
        total_rails=total_rails(idle_mw),
        idle_mw=total_mw(idle_mw),
        exits=tuple(rows[:-1]),
        overall=rows[-1],
    )


def _energy_per_frame(
    tracker: Tracker,
    clip: _Clip,
    seconds: float,
    sampler: PowerSampler,
    idle_mw: Mapping[str, float | None],
) -> EnergyPerFrame:
    """Go through the clip again and again for some seconds; what ``init`` takes is left out."""
    clip.warm_up(tracker)
    spans, num_frames, ends_at = [], 0, time.perf_counter() + seconds
    while time.perf_counter() < ends_at:
        tracker.init(clip.frames[0], clip.bbox)
        start = sampler.mark()
        for frame in clip.frames[1:]:
            tracker.update(frame)
        spans.append((start, sampler.mark()))
        num_frames += len(clip.frames) - 1

    def per_frame(idle_mw: Mapping[str, float | None] | None) -> dict[str, float | None]:
        energies = [sampler.energy_mj(*span, idle_mw=idle_mw) for span in spans]
        rails = {rail: [e.get(rail) for e in energies] for rail in energies[0]}
        known = {rail: [v for v in values if v is not None] for rail, values in rails.items()}
        return {
            rail: sum(known[rail]) / num_frames if len(known[rail]) == len(values) else None
            for rail, values in rails.items()
        }

    rails_mj = per_frame(None)
    return EnergyPerFrame(
        total_mj=total_mw(rails_mj),
        above_idle_mj=total_mw(per_frame(idle_mw)),
        rails_mj=rails_mj,
        num_frames=num_frames,
    )
