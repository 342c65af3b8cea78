"""How fast a tracker is on this machine: per exit, overall, and where the time goes.

One update is timed as a user sees it: crop, segments, decisions, mapping back. Reading frames is
not counted. Every exit is timed by forcing it, the operating point by tracking freely; both on the
same frames, in the same run.
"""

import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.runtime.policies import ExitPolicy
from edgetrack.tracker import Tracker

__all__ = ["BenchReport", "Percentiles", "bench"]

Frame = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Percentiles:
    """Latency of one update in milliseconds.

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
class BenchReport:
    """What ``bench`` measured.

    Attributes:
        overall: At the tracker's own exit policy.
        fps: Updates over the seconds spent in them, at that policy.
        exit_histogram: Frames per exit, at that policy.
        exits: When exit ``k`` is forced, for each ``k``.
        stages_ms: Median time per stage of an update at full depth; ``rest`` is what is left.
        peak_memory_mb: Largest resident memory of this process.
        setup: Bundle, backend, precision, frame size, warm-up and count.
    """

    overall: Percentiles
    fps: float
    exit_histogram: tuple[int, ...]
    exits: tuple[Percentiles, ...]
    stages_ms: dict[str, float]
    peak_memory_mb: float
    setup: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return asdict(self)


def bench(
    tracker: Tracker,
    frames: Sequence[Frame],
    bbox: Sequence[float],
    *,
    num_warm_up: int = 20,
    on_pass: Callable[[str], None] | None = None,
) -> BenchReport:
    """Time a tracker on frames.

    Args:
        tracker: An open tracker; its exit policy is as before afterwards.
        frames: At least two, ``(H, W, 3)`` uint8 BGR, in memory.
        bbox: The target in the first: x, y, w, h in pixels.
        num_warm_up: Updates before each pass that are not counted.
        on_pass: Called with the name of each pass as it starts.

    Raises:
        ValueError: There are fewer than two frames.
    """
    if len(frames) < 2:
        raise ValueError(f"bench: expected at least 2 frames, got {len(frames)}")
    report = on_pass or (lambda name: None)
    own_policy, num_exits = tracker.exit_policy, tracker.bundle.num_exits
    exits = []
    try:
        for index in range(num_exits):
            report(f"exit {index}")
            tracker.exit_policy = ExitPolicy.fixed(index, num_exits=num_exits)
            timed = _Pass(tracker, frames, bbox, num_warm_up=num_warm_up)
            exits.append(Percentiles.of(timed.latencies_ms))
        stages = timed.stages_ms()
    finally:
        tracker.exit_policy = own_policy
    report("operating point")
    free = _Pass(tracker, frames, bbox, num_warm_up=num_warm_up)
    seconds = sum(free.latencies_ms) / 1e3
    return BenchReport(
        overall=Percentiles.of(free.latencies_ms),
        fps=len(free.latencies_ms) / seconds,
        exit_histogram=tuple(np.bincount(free.exits, minlength=num_exits).tolist()),
        exits=tuple(exits),
        stages_ms=stages,
        peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        setup={
            "bundle": tracker.bundle.name,
            "backend": tracker.backend,
            "precision": tracker.precision,
            "engines": "built" if tracker.engines_path else "in memory",
            "frame": f"{frames[0].shape[1]}x{frames[0].shape[0]}",
            "thresholds": list(own_policy.thresholds),
            "num_warm_up": num_warm_up,
            "batch": 1,
            "timed": "crop, segments, decisions, mapping back",
        },
    )


class _Pass:
    """One pass over the frames: latencies, exits, stage times."""

    def __init__(
        self, tracker: Tracker, frames: Sequence[Frame], bbox: Sequence[float], *, num_warm_up: int
    ) -> None:
        tracker.init(frames[0], bbox)
        for frame in frames[1 : num_warm_up + 1]:
            tracker.update(frame)
        tracker.init(frames[0], bbox)
        self.latencies_ms: list[float] = []
        self.exits: list[int] = []
        self._stages: list[dict[str, float]] = []
        for frame in frames[1:]:
            result = tracker.update(frame)
            self.latencies_ms.append(result.latency_ms)
            self.exits.append(result.exit_index)
            stages = tracker.stage_ms
            self._stages.append({**stages, "rest": result.latency_ms - sum(stages.values())})

    def stages_ms(self) -> dict[str, float]:
        """Median per stage."""
        names = self._stages[0]
        return {n: statistics.median(s[n] for s in self._stages) for n in names}
