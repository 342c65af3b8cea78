"""One pass of a tracker over a sequence, and which of its frames are scored.

- ``ope``, the default: one pass from the first frame's truth; the first frame is not scored,
  absent frames are skipped.
- ``otb``: as the OTB and GOT-10k toolkits score OTB: the first box is replaced by the truth and
  counted, absent frames are skipped. On a few hundred frames it is some thousandths higher.

Absent frames are tracked like the others; a tracker is not told.
"""

import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgetrack.boxes import iou_xywh
from edgetrack.data.sequences import Sequence
from edgetrack.evaluate.metrics import Metrics, score_boxes

__all__ = ["PROTOCOLS", "FrameRow", "SequenceResult", "SingleObjectTracker", "evaluate_sequence"]

ProtocolName = Literal["ope", "otb"]
PROTOCOLS: tuple[ProtocolName, ...] = ("ope", "otb")


class SingleObjectTracker(Protocol):
    """Anything that can be scored: ``init`` once per sequence, then ``update`` per frame.

    Frames are ``(H, W, 3)`` uint8 BGR, boxes x, y, w, h in pixels.
    """

    def init(self, frame: Any, bbox: Any) -> object:
        """Start on a frame; ``bbox`` is a tuple of four floats."""

    def update(self, frame: Any) -> Any:
        """Follow into the next frame.

        Returns:
            Four numbers, or an object with ``bbox`` and, where it has them, ``score``,
            ``uncertainty`` and ``exit_index``.
        """


@dataclass(frozen=True)
class FrameRow:
    """What a tracker said about one frame.

    Attributes:
        frame_index: From 0; frame 0 holds the truth that the tracker was given.
        x: Left edge, pixels.
        y: Top edge, pixels.
        w: Width, pixels.
        h: Height, pixels.
        score: Confidence in [0, 1], where the tracker has one.
        exit_index: The exit that was taken, where the tracker has exits.
        uncertainty: What that exit was judged by, where it has one.
        latency_ms: Time of ``update``; none for frame 0.
    """

    frame_index: int
    x: float
    y: float
    w: float
    h: float
    score: float | None = None
    exit_index: int | None = None
    uncertainty: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class SequenceResult:
    """One pass over one sequence.

    Attributes:
        name: The sequence's name.
        protocol: How it is scored.
        rows: One row per frame, the first included.
        metrics: Over the scored frames.
        overlaps: IoU with the truth ``(T,)``, 0 for a box that holds a NaN; NaN where a frame is
            not scored.
    """

    name: str
    protocol: ProtocolName
    rows: tuple[FrameRow, ...]
    metrics: Metrics
    overlaps: npt.NDArray[np.float64]

    @classmethod
    def score(
        cls, rows: tuple[FrameRow, ...], sequence: Sequence, *, protocol: ProtocolName
    ) -> "SequenceResult":
        """Score rows, one per frame, against a sequence.

        Raises:
            ValueError: The protocol is unknown, or no frame is left to score.
        """
        is_scored = scored_frames(sequence.boxes_xywh, protocol=protocol)
        boxes = np.array([(r.x, r.y, r.w, r.h) for r in rows], np.float64)
        boxes[0] = sequence.boxes_xywh[0]
        boxes[~np.isfinite(boxes)] = np.nan
        metrics = score_boxes(boxes[is_scored], sequence.boxes_xywh[is_scored])
        overlaps = np.nan_to_num(iou_xywh(boxes, sequence.boxes_xywh)).astype(np.float64)
        overlaps[~is_scored] = np.nan
        return cls(sequence.name, protocol, rows, metrics, overlaps)

    @property
    def seconds(self) -> float:
        """Time spent in ``update``."""
        return sum(r.latency_ms for r in self.rows if r.latency_ms is not None) / 1000

    @property
    def fps(self) -> float:
        """Updates over the seconds spent in them; reading frames is not counted."""
        return (len(self.rows) - 1) / max(self.seconds, 1e-9)

    @property
    def exit_histogram(self) -> tuple[int, ...]:
        """Frames that stopped at each exit; empty for a tracker without exits."""
        exits = [r.exit_index for r in self.rows if r.exit_index is not None]
        return tuple(np.bincount(exits).tolist()) if exits else ()


def scored_frames(
    truth_xywh: npt.NDArray[np.float64], *, protocol: ProtocolName
) -> npt.NDArray[np.bool_]:
    """Which frames ``(T,)`` a protocol scores.

    Raises:
        ValueError: The protocol is unknown.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    is_scored = np.asarray(np.isfinite(truth_xywh).all(axis=1))
    is_scored[0] = protocol == "otb"
    return is_scored


def evaluate_sequence(
    tracker: SingleObjectTracker, sequence: Sequence, *, protocol: ProtocolName = "ope"
) -> SequenceResult:
    """Run a tracker over a sequence once, from the first frame's truth, and score it.

    Only ``update`` is timed. What the tracker raises passes through.

    Raises:
        SourceError: A picture cannot be read.
        ValueError: The protocol is unknown, no frame is left to score, or ``update`` returned
            neither a box nor an object with one.
    """
    scored_frames(sequence.boxes_xywh, protocol=protocol)
    frames = sequence.frames()
    x, y, w, h = sequence.boxes_xywh[0].tolist()
    tracker.init(next(frames), (x, y, w, h))
    rows = [FrameRow(0, x, y, w, h)]
    for index, frame in enumerate(frames, 1):
        start = time.perf_counter()
        result = tracker.update(frame)
        seconds = time.perf_counter() - start
        rows.append(_row(index, result, latency_ms=seconds * 1000))
    return SequenceResult.score(tuple(rows), sequence, protocol=protocol)


def _row(index: int, result: Any, *, latency_ms: float) -> FrameRow:
    bbox = getattr(result, "bbox", result)
    try:
        x, y, w, h = (float(v) for v in bbox)
    except (TypeError, ValueError):
        raise ValueError(
            f"update: expected four numbers x, y, w, h or an object with .bbox in frame {index}, "
            f"got {result!r}"
        ) from None
    score, exit_index, uncertainty = (
        getattr(result, name, None) for name in ("score", "exit_index", "uncertainty")
    )
    return FrameRow(
        index,
        *(x, y, w, h),
        score=None if score is None else float(score),
        exit_index=None if exit_index is None else int(exit_index),
        uncertainty=None if uncertainty is None else float(uncertainty),
        latency_ms=latency_ms,
    )
