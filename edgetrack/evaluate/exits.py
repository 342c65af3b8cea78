"""What every exit says on the same crops, and thresholds that are chosen from it.

A tracker follows each sequence with its last exit; on every crop all exits are asked. From those
records follow what a policy costs and what it is worth, without tracking again, and the operating
points of a bundle: ``accurate``, ``balanced``, ``fast``.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgetrack.boxes import iou_xywh
from edgetrack.bundle import Bundle
from edgetrack.data.sequences import Sequence as TrackingSequence
from edgetrack.evaluate.metrics import mean_metrics
from edgetrack.evaluate.protocols import evaluate_sequence
from edgetrack.runtime.policies import CRITERIA, ExitPolicy
from edgetrack.tracker import Tracker

__all__ = [
    "ExitRecords",
    "calibrate_exits",
    "choose_operating_points",
    "choose_presets",
    "exit_shares",
    "exits_taken",
    "record_exits",
    "score_exits",
]

Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

_MAX_LOSS = 0.002  # of mean IoU, that ``base`` may lose against always the last exit
_MAX_COST = {"balanced": 0.62, "fast": 0.50}  # shares of full depth's cost
_MIN_SHARE = 0.2
# A bundle whose operating points have these names has one threshold for all exits.
_PRESETS = ("base", "medium", "fast")
_NUM_QUANTILES = 41


@dataclass(frozen=True)
class ExitRecords:
    """What all exits said on N crops.

    Attributes:
        iou: IoU with the truth ``(N, exits)``.
        score: ``(N, exits)``.
        uncertainty: ``(N, exits)``.
        cost_ms: Median time of an update that stops at each exit, ``(exits,)``.
    """

    iou: Float64Array
    score: Float64Array
    uncertainty: Float64Array
    cost_ms: Float64Array

    def criterion(self, name: str) -> Float64Array:
        """What a policy compares with its thresholds, ``(N, exits)``; see ``policies.CRITERIA``."""
        weight, score_weight = CRITERIA[name]
        return weight * self.uncertainty + score_weight * (1 - self.score)


@dataclass(frozen=True)
class _Recorder(ExitPolicy):
    """Never stops early, and keeps what each exit said."""

    read_bbox: Callable[[], npt.NDArray[np.float32]] = field(kw_only=True)
    answers: list[tuple[npt.NDArray[np.float32], float, float]] = field(
        default_factory=list, kw_only=True
    )

    def should_exit(self, exit_index: int, uncertainty: float, score: float) -> bool:
        self.answers.append((self.read_bbox(), score, uncertainty))
        return super().should_exit(exit_index, uncertainty, score)


def record_exits(
    bundle: Bundle,
    sequences: Iterable[TrackingSequence],
    *,
    on_progress: Callable[[str], None] | None = None,
) -> ExitRecords:
    """Track with the last exit and ask all exits on every crop with truth.

    Args:
        bundle: What to ask.
        sequences: With truth.
        on_progress: Called with the name of each sequence before it is tracked.

    Raises:
        ValueError: No frame after a first one has truth.
    """
    rows: list[list[tuple[float, float, float]]] = []
    costs_ms: list[Float64Array] = []
    with Tracker(bundle, exit_policy=ExitPolicy.always_last(num_exits=bundle.num_exits)) as tracker:
        recorder = _Recorder(tracker.exit_policy.thresholds, read_bbox=tracker.read_answer)
        tracker.exit_policy = recorder
        for sequence in sequences:
            if on_progress is not None:
                on_progress(sequence.name)
            frames = sequence.frames()
            tracker.init(next(frames), sequence.boxes_xywh[0].tolist())
            for frame, truth in zip(frames, sequence.boxes_xywh[1:], strict=True):
                recorder.answers.clear()
                tracker.update(frame)
                costs_ms.append(_cost_ms(tracker.stage_ms, bundle.num_exits))
                if np.isfinite(truth).all():
                    rows.append([(float(iou_xywh(b, truth)), s, u) for b, s, u in recorder.answers])
    if not rows:
        raise ValueError("record_exits: expected frames with truth, got none")
    iou, score, uncertainty = np.moveaxis(np.array(rows, np.float64), -1, 0)
    return ExitRecords(iou, score, uncertainty, np.median(costs_ms, axis=0))


def _cost_ms(stage_ms: Mapping[str, float], num_exits: int) -> Float64Array:
    """Time of stopping at each exit, of a frame in which all segments, and heads if any, ran."""
    crop_ms, update_ms = stage_ms["crop"], stage_ms.get("update", 0.0)
    segments_ms = np.cumsum([stage_ms[f"segment_{k}"] for k in range(num_exits)])
    heads_ms = [stage_ms.get(f"head_{k}", 0.0) for k in range(num_exits)]
    return np.asarray(crop_ms + segments_ms + np.array(heads_ms) + update_ms)


def exits_taken(criterion: Float64Array, thresholds: Sequence[float] | Float64Array) -> IntArray:
    """The exit that each of N crops takes, ``(N,)``.

    Args:
        criterion: ``(N, exits)``.
        thresholds: One per exit but the last, or ``(..., exits - 1)`` that broadcasts with N.
    """
    stops = criterion[:, :-1] < np.asarray(thresholds)
    return np.asarray(np.where(stops.any(1), stops.argmax(1), criterion.shape[1] - 1))


def exit_shares(exits: IntArray, *, num_exits: int) -> Float64Array:
    """Share of the crops that each exit takes, ``(num_exits,)``."""
    return np.asarray(np.bincount(exits, minlength=num_exits) / len(exits))


def choose_operating_points(
    records: ExitRecords, *, cost: Sequence[float] | Float64Array, criterion: str = "entropy"
) -> Mapping[str, tuple[float, ...]]:
    """Thresholds of three operating points, from records of sequences kept out of training.

    ``accurate`` is the cheapest policy that loses no mean IoU against always the last exit;
    ``balanced`` is the best that costs at most 0.62 of full depth and lets every exit
    take at least 20 % of the crops; ``fast`` is the best that costs at most 0.50.

    Args:
        records: What all exits said.
        cost: Of running up to each exit, in any unit, rising.
        criterion: What the thresholds are compared with; see ``policies.CRITERIA``.
    """
    values = records.criterion(criterion)
    relative = np.asarray(cost, np.float64) / cost[-1]
    num_exits = values.shape[1]
    grid = [
        np.unique(np.quantile(values[:, k], np.linspace(0, 1, _NUM_QUANTILES)))
        for k in range(num_exits - 1)
    ]
    tried: list[_Tried] = []
    for thresholds in np.stack(np.meshgrid(*grid, indexing="ij"), -1).reshape(-1, num_exits - 1):
        exits = exits_taken(values, thresholds)
        shares = exit_shares(exits, num_exits=num_exits)
        loss = (records.iou[:, -1] - records.iou[np.arange(len(exits)), exits]).mean()
        tried.append(
            _Tried(
                tuple(float(t) for t in thresholds),
                cost=float(shares @ relative),
                loss=float(loss),
                min_share=float(shares.min()),
            )
        )
    cheapest = min(tried, key=lambda t: t.cost)
    exact = [t for t in tried if t.loss <= 0]
    points = {"accurate": min(exact, key=lambda t: t.cost)}
    for name, max_cost in _MAX_COST.items():
        allowed = [t for t in tried if t.cost <= max_cost]
        if name == "balanced":
            allowed = [t for t in allowed if t.min_share >= _MIN_SHARE] or allowed
        points[name] = min(allowed or [cheapest], key=lambda t: t.loss)
    return {name: t.thresholds for name, t in points.items()}


def choose_presets(
    records: ExitRecords, *, cost: Sequence[float] | Float64Array, criterion: str = "entropy"
) -> Mapping[str, tuple[float, ...]]:
    """One threshold for all exits per speed preset, as DyTrack has them.

    ``base`` is the cheapest that loses at most 0.002 of mean IoU against always the last exit;
    ``medium`` is the deepest that spends at most half of what lies between the first exit's cost
    and the last's, ``fast`` a quarter. None is shallower than the one after it.

    Args:
        records: What all exits said.
        cost: Of running up to each exit, in any unit, rising.
        criterion: What the thresholds are compared with; see ``policies.CRITERIA``.
    """
    values = records.criterion(criterion)
    first, last = float(cost[0]), float(cost[-1])
    count = values.shape[1] - 1
    tried = np.unique(np.quantile(values[:, :-1], np.linspace(0, 1, _NUM_QUANTILES**2)))
    tried = np.append(tried, np.nextafter(tried[-1], np.inf))  # of which all crops are below
    costs, losses = np.empty((2, len(tried)))
    for k, threshold in enumerate(tried):
        exits = exits_taken(values, np.full(count, threshold))
        costs[k] = np.mean(np.asarray(cost, np.float64)[exits])
        losses[k] = (records.iou[:, -1] - records.iou[np.arange(len(exits)), exits]).mean()
    # costs fall as thresholds rise, and the last one costs least
    medium, fast = (int((costs <= first + s * (last - first)).argmax()) for s in (0.5, 0.25))
    base = min(int(np.flatnonzero(losses <= _MAX_LOSS)[-1]), medium)
    ranks = zip(_PRESETS, (base, medium, fast), strict=True)
    return {name: (float(tried[rank]),) * count for name, rank in ranks}


def calibrate_exits(bundle: Bundle, sequences: Sequence[TrackingSequence]) -> Bundle:
    """Choose a bundle's operating points on sequences, and write them into its manifest.

    Each sequence is tracked forwards and backwards.

    Returns:
        The bundle with ``accurate``, ``balanced`` and ``fast``, or with the presets that it already
        names, and in its provenance on what they were chosen. Its default stays, unless no new
        point has that name; then it is ``balanced``.

    Raises:
        ValueError: No frame after a first one has truth.
    """
    both_ways = [way for s in sequences for way in (s, s.backwards())]
    records = record_exits(bundle, both_ways)
    # Products, not times: the same run gives the same thresholds on every machine.
    cost = np.array(bundle.exit_macs, np.float64)
    has_presets = set(bundle.operating_points) == set(_PRESETS)
    choose = choose_presets if has_presets else choose_operating_points
    points = choose(records, cost=cost, criterion=bundle.criterion)
    values = records.criterion(bundle.criterion)
    shares = {
        name: exit_shares(exits_taken(values, thresholds), num_exits=bundle.num_exits)
        for name, thresholds in points.items()
    }
    summary = {
        "sequences": [s.name for s in sequences],
        "num_frames": len(records.iou),
        "mean_iou_per_exit": records.iou.mean(0).round(4).tolist(),
        "shares": {name: share.round(3).tolist() for name, share in shares.items()},
    }
    provenance = {**bundle.provenance, "calibration": summary}
    default = bundle.operating_point if bundle.operating_point in points else "balanced"
    return dataclasses.replace(
        bundle, operating_points=points, operating_point=default, provenance=provenance
    ).write()


def score_exits(
    bundle: Bundle,
    sequences: Sequence[TrackingSequence],
    *,
    on_progress: Callable[[str], object] | None = None,
) -> Bundle:
    """Score every exit and operating point of a bundle, and write that into its manifest.

    Args:
        bundle: What to score.
        sequences: With truth.
        on_progress: Called with the name of each policy before it is scored.

    Returns:
        The bundle with the mean metrics in its provenance.
    """
    count = bundle.num_exits
    policies = {f"exit {k}": ExitPolicy.fixed(k, num_exits=count) for k in range(count)}
    for name, thresholds in bundle.operating_points.items():
        policies[name] = ExitPolicy(thresholds, bundle.criterion)
    metrics = {}
    for name, policy in policies.items():
        if on_progress is not None:
            on_progress(name)
        with Tracker(bundle, exit_policy=policy) as tracker:
            found = mean_metrics([evaluate_sequence(tracker, s).metrics for s in sequences])
        metrics[name] = {k: round(v, 4) for k, v in dataclasses.asdict(found).items()}
    scored = {"sequences": [s.name for s in sequences], "protocol": "ope", "metrics": metrics}
    provenance = {**bundle.provenance, "evaluation": scored}
    return dataclasses.replace(bundle, provenance=provenance).write()


@dataclass(frozen=True)
class _Tried:
    thresholds: tuple[float, ...]
    cost: float
    loss: float
    min_share: float
