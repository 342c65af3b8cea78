"""Pseudo-tracks: where a tracker follows something and finds its way back, believe it.

Forward-backward consistency (Kalal, Mikolajczyk and Matas, "Forward-backward error: automatic
detection of tracking failures", ICPR 2010), on boxes instead of points. A tracker that has left
its target has no reason to come back to the very box it started from.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt

from edgetrack.boxes import clip_xywh, iou_xywh
from edgetrack.data.pseudo_tracks import PseudoTrack

if TYPE_CHECKING:
    from edgetrack.evaluate.protocols import SingleObjectTracker

__all__ = ["PseudoTrackSettings", "find_pseudo_tracks", "textured_boxes", "track_and_return"]

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

_FRAMES_PER_START = 16
_TRACKS_PER_START = 3
_MAX_BORDER_SHARE = 0.5
_STATIC_SIDES = 0.25
_PATCH_PX = 24
_MAX_CORNERS, _CORNER_QUALITY, _CORNER_DISTANCE_PX = 400, 0.01, 4
_MIN_CORNERS = 6
_NUM_CANDIDATES = 128
_MAX_START_IOU = 0.3
_SURROUND = 1.5


@dataclass(frozen=True, kw_only=True)
class PseudoTrackSettings:
    """How tracks are found, and which are kept.

    Attributes:
        per_clip: Tracks of one clip, at most.
        seed: Decides the start frames and the textured boxes; together with the clip's name.
        max_frames: Updates forward from a start box, at most.
        min_frames: Frames of a track, the start frame included, at least.
        min_iou: Overlap of the ways there and back in every frame of a track.
        min_return_iou: Overlap of the box that came back with the start box.
        min_likeness: Correlation of what the box shows in a frame and in the next one, in
            [-1, 1]. It finds what both ways agree on wrongly: after a cut, something else in the
            same place. Truth of labelled clips lies below 0.2 in 0.6 % of the steps.
        max_area_ratio: Largest over smallest area of a track's boxes.
        max_static_share: Share of a clip's tracks whose centre stays within a quarter of its
            side (the root of its area) from where it started.
        max_duplicate_iou: Mean overlap of two tracks in the frames that they share.

    Raises:
        ValueError: A number is out of its range.
    """

    per_clip: int = 24
    seed: int = 0
    max_frames: int = 64
    min_frames: int = 8
    min_iou: float = 0.6
    min_return_iou: float = 0.7
    min_likeness: float = 0.2
    max_area_ratio: float = 4.0
    max_static_share: float = 1 / 3
    max_duplicate_iou: float = 0.5

    def __post_init__(self) -> None:
        if self.per_clip < 1 or self.seed < 0:
            raise ValueError(
                "settings: expected per_clip of at least 1 and a seed of at least 0, got "
                f"{self.per_clip} and {self.seed}"
            )
        if not 2 <= self.min_frames <= self.max_frames + 1:
            raise ValueError(
                f"settings: expected min_frames from 2 to max_frames + 1 = {self.max_frames + 1}, "
                f"got {self.min_frames}"
            )
        shares = (self.min_iou, self.min_return_iou, self.max_static_share, self.max_duplicate_iou)
        if not all(0 <= v <= 1 for v in shares) or self.max_static_share == 1:
            raise ValueError(
                f"settings: expected overlaps in [0, 1] and a share below 1, got {shares}"
            )
        if not -1 <= self.min_likeness <= 1:
            raise ValueError(
                f"settings: expected min_likeness in [-1, 1], got {self.min_likeness!r}"
            )
        if not self.max_area_ratio >= 1:
            raise ValueError(
                f"settings: expected max_area_ratio of at least 1, got {self.max_area_ratio!r}"
            )


def track_and_return(
    tracker: "SingleObjectTracker",
    frames: Sequence[UInt8Array],
    bbox_xywh: npt.NDArray[np.floating],
    *,
    first: int,
    settings: PseudoTrackSettings,
) -> tuple[Float32Array, float] | None:
    """Follow a box forward, then back from where it got to; keep what both ways agree on.

    The way forward ends where the box shows something else than in the frame before. The way back
    starts afresh from the last box, and ends where it parts from the way there. Then
    the track is cut to three quarters of its length and tried again, until a way back leads to
    the start or the shortest track has failed. So what is returned is not the longest prefix
    that comes back, but at least three quarters of it wherever shorter ones come back too; an
    exact search would take up to ``max_frames`` ways back instead of nine.

    Args:
        tracker: Anything with ``init`` and ``update``.
        frames: Frames ``(H, W, 3)``, uint8, BGR, of the whole clip.
        bbox_xywh: The start box ``(4,)``, pixels.
        first: Index of its frame.
        settings: How far to go, and what counts as agreement.

    Returns:
        Boxes xywh ``(T, 4)``, float32, pixels, the start box in row 0, and the mean IoU of both
        ways; ``None`` where nothing long enough came back. What the tracker raises passes through.

    Raises:
        ValueError: ``first`` is no frame, or ``update`` returned no box.
    """
    if not 0 <= first < len(frames):
        raise ValueError(f"first: expected a frame from 0 to {len(frames) - 1}, got {first}")
    last = min(first + settings.max_frames, len(frames) - 1)
    if last - first + 1 < settings.min_frames:
        return None
    there: list[Float32Array] = []
    before = None
    for index, bbox in enumerate(_follow(tracker, frames, range(first, last + 1), bbox_xywh)):
        patch = _patch(frames[first + index], bbox)
        if before is not None and _likeness(before, patch) < settings.min_likeness:
            break
        there.append(bbox)
        before = patch
    end, least = len(there) - 1, settings.min_frames - 1
    if end < least:
        return None
    while True:
        way_back = range(first + end, first - 1, -1)
        overlaps: list[float] = []
        for back in _follow(tracker, frames, way_back, there[end]):
            is_start = len(overlaps) == end
            overlap = float(iou_xywh(there[end - len(overlaps)], back))
            if not overlap >= (settings.min_return_iou if is_start else settings.min_iou):
                break
            overlaps.append(overlap)
        else:
            return np.stack(there[: end + 1]), float(np.mean(overlaps))
        if end == least:
            return None
        end = max(end * 3 // 4, least)


def find_pseudo_tracks(
    tracker: "SingleObjectTracker",
    frames: Sequence[UInt8Array],
    detected: Callable[[int, UInt8Array], Float32Array],
    *,
    clip: str,
    bundle: str,
    settings: PseudoTrackSettings,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[PseudoTrack]:
    """Find tracks in a clip that nobody labelled.

    Starts from several frames, from the detections in each and from textured boxes elsewhere. A
    track is dropped if it touches the border in most frames, changes its area too much, or
    repeats another; of those that hardly move, some are kept.

    Args:
        tracker: Anything with ``init`` and ``update``.
        frames: Frames ``(H, W, 3)``, uint8, BGR.
        detected: Gives, for a frame's index and the frame, boxes xywh ``(N, 4)`` to start from,
            the best first.
        clip: Name of the clip.
        bundle: Name and digest of what tracks.
        settings: How many, and which.
        on_progress: Called after each start frame with the numbers done and to do.

    Returns:
        The tracks by first frame; the same for the same arguments, and at most
        ``settings.per_clip``.

    Raises:
        ValueError: ``update`` returned no box. What the tracker raises passes through.
    """
    rng = np.random.default_rng((settings.seed, zlib.crc32(clip.encode())))
    starts = _start_frames(len(frames), settings, rng)
    moving: list[PseudoTrack] = []
    static: list[PseudoTrack] = []
    max_static = int(settings.per_clip * settings.max_static_share)
    for num_done, first in enumerate(starts):
        room = settings.per_clip - len(moving) - len(static)
        quota = math.ceil(room / (len(starts) - num_done))
        for bbox_xywh in _start_boxes(frames[first], detected(first, frames[first]), quota, rng):
            known = moving + static
            if len(known) - (settings.per_clip - room) >= quota:
                break
            if _is_on_a_track(bbox_xywh, first, known, settings):
                continue
            found = track_and_return(tracker, frames, bbox_xywh, first=first, settings=settings)
            if found is None or not _is_plausible(found[0], frames[first], settings):
                continue
            track = PseudoTrack(
                clip=clip, first=first, boxes_xywh=found[0], agreement=found[1], bundle=bundle
            )
            if any(_shared_iou(track, other) > settings.max_duplicate_iou for other in known):
                continue
            if not _is_static(track.boxes_xywh):
                moving.append(track)
            elif len(static) < max_static:
                static.append(track)
        if on_progress:
            on_progress(num_done + 1, len(starts))
    share = settings.max_static_share
    kept = moving + static[: int(len(moving) * share / (1 - share) + 1e-9)]
    return sorted(kept, key=lambda track: track.first)


def textured_boxes(
    image: UInt8Array, taken_xywh: Float32Array, *, count: int, rng: np.random.Generator
) -> Float32Array:
    """Boxes that are rich in corners, richer than what surrounds them.

    Args:
        image: ``(H, W, 3)``, uint8, BGR.
        taken_xywh: Boxes ``(N, 4)`` to stay away from.
        count: How many, at most.
        rng: Draws the boxes among which the best are chosen.

    Returns:
        Boxes xywh ``(M, 4)``, float32, pixels, inside the frame, the best first; M may be 0.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    found = cv2.goodFeaturesToTrack(grey, _MAX_CORNERS, _CORNER_QUALITY, _CORNER_DISTANCE_PX)
    corners = np.asarray(() if found is None else found, np.float32).reshape(-1, 2)
    boxes = _random_boxes(image.shape[1], image.shape[0], rng)
    surrounds = boxes.copy()
    surrounds[:, :2] -= boxes[:, 2:] * (_SURROUND - 1) / 2
    surrounds[:, 2:] *= _SURROUND
    inside = _count_inside(corners, boxes)
    around = _count_inside(corners, surrounds) - inside
    # so many standard deviations of a count more corners than the surround's density predicts
    contrast = (inside - around / (_SURROUND**2 - 1)) / np.sqrt(inside + around + 1)
    chosen: list[Float32Array] = []
    taken = list(taken_xywh)
    for index in np.argsort(-contrast, kind="stable"):
        if len(chosen) == count:
            break
        if inside[index] < _MIN_CORNERS or contrast[index] <= 0:
            continue
        if all(iou_xywh(boxes[index], other) <= _MAX_START_IOU for other in taken):
            chosen.append(boxes[index])
            taken.append(boxes[index])
    return np.array(chosen, np.float32).reshape(-1, 4)


def _follow(
    tracker: "SingleObjectTracker",
    frames: Sequence[UInt8Array],
    indices: Sequence[int],
    bbox_xywh: npt.NDArray[np.floating],
) -> Iterator[Float32Array]:
    """Boxes ``(4,)`` in the frames of these indices, each tracked when asked for."""
    x, y, w, h = (float(v) for v in bbox_xywh)
    tracker.init(frames[indices[0]], (x, y, w, h))
    yield np.array([x, y, w, h], np.float32)
    for index in indices[1:]:
        result = tracker.update(frames[index])
        try:
            yield np.array(getattr(result, "bbox", result), np.float32).reshape(4)
        except (TypeError, ValueError):
            raise ValueError(
                "update: expected four numbers x, y, w, h or an object with .bbox in frame "
                f"{index}, got {result!r}"
            ) from None


def _patch(image: UInt8Array, bbox_xywh: Float32Array) -> Float32Array | None:
    """What a box shows: grey ``(_PATCH_PX, _PATCH_PX)`` of mean 0 and norm 1.

    ``None`` where it is outside the frame or too flat to tell.
    """
    height, width = image.shape[:2]
    x, y, w, h = clip_xywh(bbox_xywh, width_px=width, height_px=height).round().astype(int)
    if min(w, h) < 1:
        return None
    inside = cv2.cvtColor(np.ascontiguousarray(image[y : y + h, x : x + w]), cv2.COLOR_BGR2GRAY)
    small = cv2.resize(inside, (_PATCH_PX, _PATCH_PX), interpolation=cv2.INTER_AREA)
    patch = np.asarray(small, np.float32) - np.float32(small.mean())
    norm = float(np.linalg.norm(patch))
    return patch / np.float32(norm) if norm > _PATCH_PX else None  # a deviation of one grey level


def _likeness(a: Float32Array | None, b: Float32Array | None) -> float:
    return 1.0 if a is None or b is None else float((a * b).sum())


def _start_frames(
    num_frames: int, settings: PseudoTrackSettings, rng: np.random.Generator
) -> list[int]:
    """One frame, drawn by chance, in each of several equal parts of the clip."""
    num_possible = num_frames - settings.min_frames + 1
    if num_possible < 1:
        return []
    wanted = math.ceil(num_possible / _FRAMES_PER_START)
    count = max(1, min(wanted, settings.per_clip // _TRACKS_PER_START))
    edges = np.linspace(0, num_possible, count + 1).astype(int)
    return [int(rng.integers(a, b)) for a, b in itertools.pairwise(edges)]


def _start_boxes(
    image: UInt8Array, detected_xywh: Float32Array, quota: int, rng: np.random.Generator
) -> Iterable[Float32Array]:
    """The best detections, then textured boxes elsewhere; twice as many as may be kept."""
    boxes = textured_boxes(image, detected_xywh, count=quota, rng=rng)
    return [*detected_xywh[:quota], *boxes]


def _random_boxes(width: int, height: int, rng: np.random.Generator) -> Float32Array:
    """Boxes xywh ``(_NUM_CANDIDATES, 4)`` that lie inside the frame."""
    n, short = _NUM_CANDIDATES, min(width, height)
    sides = short * np.exp(rng.uniform(math.log(0.1), math.log(0.45), n))
    aspects = np.exp(rng.normal(0, 0.25, n))
    w, h = np.minimum(sides * aspects, 0.8 * width), np.minimum(sides / aspects, 0.8 * height)
    margin = 0.02 * short
    x = margin + rng.random(n) * (width - w - 2 * margin)
    y = margin + rng.random(n) * (height - h - 2 * margin)
    return np.stack([x, y, w, h], 1).astype(np.float32)


def _count_inside(corners: Float32Array, boxes: Float32Array) -> npt.NDArray[np.int64]:
    """Corners ``(M, 2)`` inside each of the boxes xywh ``(N, 4)``: ``(N,)``."""
    low, high = boxes[:, None, :2], boxes[:, None, :2] + boxes[:, None, 2:]
    return np.asarray(((corners >= low) & (corners < high)).all(2).sum(1), np.int64)


def _is_plausible(boxes: Float32Array, image: UInt8Array, settings: PseudoTrackSettings) -> bool:
    """Whether a track is mostly clear of the border, and of about one size."""
    height, width = image.shape[:2]
    high = boxes[:, :2] + boxes[:, 2:]
    touches = (boxes[:, :2] <= 1).any(1) | (high >= np.array([width, height]) - 1).any(1)
    areas = boxes[:, 2:].prod(1)
    is_steady = areas.max() <= settings.max_area_ratio * areas.min()
    return bool(touches.mean() <= _MAX_BORDER_SHARE and is_steady)


def _is_static(boxes: Float32Array) -> bool:
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    side = math.sqrt(float(boxes[0, 2:].prod()))
    return bool(np.linalg.norm(centres - centres[0], axis=1).max() < _STATIC_SIDES * side)


def _is_on_a_track(
    bbox_xywh: Float32Array,
    index: int,
    tracks: Iterable[PseudoTrack],
    settings: PseudoTrackSettings,
) -> bool:
    """Whether a track already has this box in this frame."""
    rows = [t.boxes_xywh[index - t.first] for t in tracks
            if t.first <= index < t.first + len(t.boxes_xywh)]  # fmt: skip
    return any(iou_xywh(bbox_xywh, row) > settings.max_duplicate_iou for row in rows)


def _shared_iou(a: PseudoTrack, b: PseudoTrack) -> float:
    """Mean overlap in the frames that two tracks share; 0 where they share none."""
    first = max(a.first, b.first)
    last = min(a.first + len(a.boxes_xywh), b.first + len(b.boxes_xywh))
    if first >= last:
        return 0.0
    shared = [t.boxes_xywh[first - t.first : last - t.first] for t in (a, b)]
    return float(iou_xywh(*shared).mean())
