"""How long trackers take for the same frames, in turn: a busy machine disturbs all alike."""

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetrack.backends.engine import Backend, EngineSet
from edgetrack.bundle import Bundle
from edgetrack.data.target_clips import Frame, TargetClip
from edgetrack.gate.evidence import Evidence
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.tracker import Tracker

__all__ = ["Times", "time_stages", "time_trackers", "time_updates"]

_NUM_FRAMES = 48
_NUM_IN_TURN = 12
_NUM_PASSES = 3
# On a machine that does other things, most times hold a wait; none is shorter than the work.
_QUANTILE = 0.05


@dataclass(frozen=True)
class Times:
    """What one tracker took where nothing disturbed it.

    Attributes:
        stage_ms: Stage → time (see ``Tracker.stage_ms``).
        update_ms: Of an update, the mean over exits as often as they were taken.
    """

    stage_ms: Mapping[str, float]
    update_ms: float


@dataclass(frozen=True)
class _Update:
    exit_index: int
    latency_ms: float
    stage_ms: Mapping[str, float]


def time_trackers(trackers: Mapping[str, Tracker], clips: Sequence[TargetClip]) -> dict[str, Times]:
    """Track the same frames with all trackers, some frames with each in turn, three times over.

    In turn frame by frame, each would push the weights of the other out of the caches, which is not
    how it will run.

    Args:
        trackers: By a name each.
        clips: On what; some 50 frames of them are used.

    Raises:
        ValueError: No clip has a second frame.
    """
    taken: dict[str, list[_Update]] = {name: [] for name in trackers}
    for _ in range(_NUM_PASSES):
        for name, updates in _one_pass(trackers, clips).items():
            taken[name] += updates
    if not all(taken.values()):
        raise ValueError("gate: expected clips of at least two frames, got none")
    return {name: _summary(updates) for name, updates in taken.items()}


def _summary(updates: Sequence[_Update]) -> Times:
    stages = dict.fromkeys(stage for update in updates for stage in update.stage_ms)
    exits = {update.exit_index for update in updates}
    of_exits = [[u.latency_ms for u in updates if u.exit_index == k] for k in exits]
    return Times(
        stage_ms={
            stage: _undisturbed([u.stage_ms[stage] for u in updates if stage in u.stage_ms])
            for stage in stages
        },
        update_ms=sum(len(times) * _undisturbed(times) for times in of_exits) / len(updates),
    )


def _undisturbed(times_ms: Sequence[float]) -> float:
    return float(np.quantile(times_ms, _QUANTILE))


def time_stages(
    bundle: Bundle, backend: Backend, floats: EngineSet, quantized: EngineSet, evidence: Evidence
) -> dict[str, tuple[float, float]]:
    """Graph → its time in float and in INT8, in ms; of those that run in an update.

    At full depth, but for the heads of earlier exits, which only run where a frame stops there.
    """
    num_exits = bundle.num_exits
    policy = ExitPolicy.always_last(num_exits=num_exits)
    with contextlib.ExitStack() as opened:
        trackers = {
            name: opened.enter_context(
                _tracker(bundle, backend, engines, policy, "host", scratch=quantized.path)
            )
            for name, engines in (("float", floats), ("int8", quantized))
        }
        found = time_trackers(trackers, evidence.clips)
        stages = {name: dict(times.stage_ms) for name, times in found.items()}
        for k, head in enumerate(bundle.heads[:-1]):
            for tracker in trackers.values():
                tracker.exit_policy = ExitPolicy.fixed(k, num_exits=num_exits)
            for name, times in time_trackers(trackers, evidence.clips).items():
                if head.name in times.stage_ms:  # an entropy that is no number stops nowhere
                    stages[name][head.name] = times.stage_ms[head.name]
    in_float, in_int8 = stages["float"], stages["int8"]
    names = [graph.name for graph in bundle.graphs]
    return {n: (in_float[n], in_int8[n]) for n in names if n in in_float and n in in_int8}


def time_updates(
    bundle: Bundle,
    backend: Backend,
    *,
    floats: EngineSet,
    chosen: EngineSet,
    evidence: Evidence,
) -> dict[str, float]:
    """Mean time of an update at the default operating point, ``float`` and ``chosen``, in ms."""
    own = bundle.thresholds()
    fitted = chosen.operating_points.get(bundle.operating_point, own)
    with contextlib.ExitStack() as opened:
        trackers = {
            name: opened.enter_context(
                _tracker(bundle, backend, engines, policy, "auto", scratch=chosen.path)
            )
            for name, engines, policy in (
                ("float", floats, ExitPolicy(own, bundle.criterion)),
                ("chosen", chosen, ExitPolicy(fitted, bundle.criterion)),
            )
        }
        times = time_trackers(trackers, evidence.clips)
    return {name: found.update_ms for name, found in times.items()}


@contextlib.contextmanager
def _tracker(
    bundle: Bundle,
    backend: Backend,
    engines: EngineSet,
    policy: ExitPolicy,
    exit_decision: str,
    *,
    scratch: Path,
) -> Iterator[Tracker]:
    """A tracker over engines whose folder may not have got its name yet."""
    with tempfile.TemporaryDirectory(dir=scratch) as root:
        (Path(root) / engines.key.folder_name).symlink_to(engines.path.resolve())
        with Tracker(
            bundle,
            backend=backend,
            precision=engines.key.precision,
            exit_policy=policy,
            engines=root,
            exit_decision=exit_decision,
        ) as tracker:
            yield tracker


def _one_pass(
    trackers: Mapping[str, Tracker], clips: Sequence[TargetClip]
) -> dict[str, list[_Update]]:
    taken: dict[str, list[_Update]] = {name: [] for name in trackers}
    num_left = _NUM_FRAMES
    for clip in clips:
        frames = itertools.islice(clip.frames(), num_left + 1)
        first = next(frames)
        for tracker in trackers.values():
            tracker.init(first, clip.bbox)
        while chunk := list(itertools.islice(frames, _NUM_IN_TURN)):
            num_left -= len(chunk)
            for name, tracker in trackers.items():
                taken[name] += _updates(tracker, chunk)
        if num_left <= 0:
            break
    return taken


def _updates(tracker: Tracker, frames: Sequence[Frame]) -> list[_Update]:
    """Times of updates; the first of several warms the caches that another tracker has used."""
    rows = []
    for frame in frames:
        result = tracker.update(frame)
        rows.append(_Update(result.exit_index, result.latency_ms, dict(tracker.stage_ms)))
    return rows[1:] or rows
