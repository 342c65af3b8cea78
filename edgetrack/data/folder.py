"""A folder of labelled pictures and clips, decoded into memory for training.

The layout; each part may be missing, but not all of them::

    images_with_masks/<set>/{manifest.jsonl,img/,mask/}     objects with boxes, 8-bit object ids
    images_with_boxes/<set>/{manifest.jsonl,img/}           objects with boxes
    backgrounds/<set>/{manifest.jsonl,img/[,boxes.jsonl]}   photos, perhaps with detections
    videos/<clip>/{img/[,mask/][,groundtruth.txt]}          one x,y,w,h row per frame, or NaN
    videos/boxes.jsonl                                      detections in clips without truth

A manifest line holds ``img``, perhaps ``mask``, and ``objects``: a list of ``{id, box, area}``. A
line of ``boxes.jsonl`` holds ``img`` and ``boxes``: a list of ``[x, y, w, h, score, class]``.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edgetrack.boxes import iou_xywh
from edgetrack.errors import DataError

__all__ = [
    "Clip",
    "Cutout",
    "Picture",
    "TrainingPack",
    "folder_digest",
    "is_sure",
    "read_detections",
    "read_training_pack",
]

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

_MIN_SCORE = 0.5
_MIN_SIDE_PX = 10
_MIN_TRACK_FRAMES = 5
_MIN_CUTOUT_PX, _MAX_CUTOUT_PX = 14, 160
_NONE = np.empty((0, 6), np.float32)
_MASK_STEP = 8  # neighbouring frames give nearly the same cutout


@dataclass(frozen=True)
class Picture:
    """A picture and the objects in it that are worth tracking.

    Attributes:
        image: ``(H, W, 3)``, uint8, BGR.
        boxes_xywh: ``(N, 4)``, float32, pixels; N may be 0.
    """

    image: UInt8Array
    boxes_xywh: Float32Array


@dataclass(frozen=True)
class Clip:
    """One object in consecutive frames.

    Attributes:
        name: Name of the clip.
        images: T frames ``(H, W, 3)``, uint8, BGR; clips of one video share them.
        boxes_xywh: ``(T, 4)``, float32, pixels; NaN where the object is absent or not labelled.
    """

    name: str
    images: Sequence[UInt8Array]
    boxes_xywh: Float32Array


@dataclass(frozen=True)
class Cutout:
    """An object without its surroundings.

    Attributes:
        bgra: ``(h, w, 4)``, uint8; alpha is the mask, and touches all four edges.
        kind: The set it comes from; cutouts of one kind look alike.
    """

    bgra: UInt8Array
    kind: str


@dataclass(frozen=True, kw_only=True)
class TrainingPack:
    """What a training folder holds, decoded.

    Attributes:
        pictures: Set → labelled pictures.
        clips: ``video`` (labelled), ``fod`` (labelled, small still objects) and ``tracks``
            (detections that were linked) → clips; a missing group is an empty tuple.
        cutouts: Objects to paste.
        backgrounds: Images ``(H, W, 3)``, uint8, BGR that nobody labelled.
    """

    pictures: Mapping[str, tuple[Picture, ...]]
    clips: Mapping[str, tuple[Clip, ...]]
    cutouts: tuple[Cutout, ...]
    backgrounds: tuple[UInt8Array, ...]


def read_training_pack(
    root: Path,
    *,
    leave_out: Collection[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> TrainingPack:
    """Decode a training folder; the layout is at the top of this module.

    Args:
        root: The folder.
        leave_out: Names of sets and clips that are not read.
        on_progress: Called with the numbers of sets and clips done and to do.

    Raises:
        DataError: Nothing to train on is there, or a file is missing or malformed.
    """
    folders = [p.parent for p in sorted(root.glob("*/*/manifest.jsonl"))]
    folders += [p.parent for p in sorted(root.glob("videos/*/img"))]
    folders = [folder for folder in folders if folder.name not in leave_out]
    detections = read_detections(root / "videos" / "boxes.jsonl")
    found = _Found()
    for num_done, folder in enumerate(folders, start=1):
        if folder.parent.name != "videos":
            found.add_set(folder)
        elif (folder / "groundtruth.txt").is_file():
            found.add_clip(folder)
        else:
            found.add_video(folder, detections)
        if on_progress:
            on_progress(num_done, len(folders))
    if not found.pictures and not any(found.clips.values()):
        raise DataError(
            f"{root}: expected a training folder (images_with_masks, images_with_boxes, videos or "
            f"backgrounds inside), got {'no data' if root.is_dir() else 'nothing'}; check the path"
        )
    return TrainingPack(
        pictures=found.pictures,
        clips={group: tuple(members) for group, members in found.clips.items()},
        cutouts=tuple(found.cutouts),
        backgrounds=tuple(found.backgrounds),
    )


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and sizes of all files, as in the provenance of a training run."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    lines = [f"{p.relative_to(folder).as_posix()} {p.stat().st_size}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Found:
    """A training pack that grows folder by folder."""

    def __init__(self) -> None:
        self.pictures: dict[str, tuple[Picture, ...]] = {}
        self.clips: dict[str, list[Clip]] = {"video": [], "fod": [], "tracks": []}
        self.cutouts: list[Cutout] = []
        self.backgrounds: list[UInt8Array] = []

    def add_set(self, folder: Path) -> None:
        """Add a set of pictures and its cutouts."""
        detections = read_detections(folder / "boxes.jsonl")
        pictures = []
        for line in _read_lines(folder / "manifest.jsonl"):
            row = _parse_row(line, folder / "manifest.jsonl")
            pictures.append(self._picture(folder, row, detections.get(row.image, _NONE)))
        if pictures:
            self.pictures[folder.name] = tuple(pictures)
        if folder.parent.name == "backgrounds":
            self.backgrounds += [p.image for p in pictures]

    def add_clip(self, folder: Path) -> None:
        """Add a clip with truth and its cutouts."""
        images = tuple(_read_image(f) for f in _files(folder / "img"))
        boxes = _read_truth(folder / "groundtruth.txt", num_frames=len(images))
        if images:
            group = "fod" if folder.name.startswith("fod_") else "video"
            self.clips[group].append(Clip(folder.name, images, boxes))
        if (folder / "mask").is_dir():
            masks = _files(folder / "mask")
            for image, file, bbox in list(zip(images, masks, boxes, strict=False))[::_MASK_STEP]:
                if np.isfinite(bbox).all():
                    self.cutouts += _cut_out(image, _read_mask(file, image) > 0, bbox, "video")

    def add_video(self, folder: Path, detections: Mapping[str, Float32Array]) -> None:
        """Add a video without truth, and the tracks that its detections make."""
        files = _files(folder / "img")
        images = tuple(_read_image(f) for f in files)
        found = [detections.get(f"{folder.name}/img/{f.name}", _NONE) for f in files]
        self.clips["tracks"] += _link(found, folder.name, images)
        self.backgrounds += images[::2]

    def _picture(self, folder: Path, row: "_Row", detections: Float32Array) -> Picture:
        image = _read_image(folder / row.image)
        objects = [o for o in row.objects if _is_worth_tracking(o, image)]
        boxes = [o.bbox_xywh for o in objects] + [d[:4] for d in detections if is_sure(d, image)]
        if objects and row.mask:
            mask = _read_mask(folder / row.mask, image)
            for o in objects:
                self.cutouts += _cut_out(image, mask == o.mask_id, o.bbox_xywh, folder.name)
        return Picture(image, np.asarray(boxes, np.float32).reshape(-1, 4))


@dataclass(frozen=True)
class _Object:
    """An object of a manifest; ``num_border_pixels`` is known of segmented regions alone."""

    bbox_xywh: Float32Array
    area: float
    mask_id: int
    num_border_pixels: int | None


@dataclass(frozen=True)
class _Row:
    """A line of a manifest."""

    image: str
    mask: str
    objects: list[_Object]


def _parse_row(row: Any, path: Path) -> _Row:
    try:
        objects = []
        for found in row.get("objects", ()):
            bbox = np.asarray(found["box"], np.float32).reshape(4)
            area = float(found.get("area", bbox[2] * bbox[3]))
            objects.append(_Object(bbox, area, found.get("id", -1), found.get("border_pixels")))
        return _Row(os.fspath(row["img"]), os.fspath(row.get("mask", "")), objects)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: expected lines with img, perhaps mask, and objects with a box of four "
            f"numbers, got {str(row)[:80]} ({error!r}); repair or remove the line"
        ) from error


def _read_truth(path: Path, *, num_frames: int) -> Float32Array:
    """Boxes xywh ``(T, 4)`` of a clip."""
    try:
        rows = [line.replace(",", " ").split() for line in path.read_text().splitlines() if line]
        boxes = np.asarray(rows, np.float32).reshape(len(rows), 4)
    except ValueError as error:
        raise DataError(f"{path}: expected rows x,y,w,h, got {error}; repair the file") from error
    if len(boxes) != num_frames:
        raise DataError(
            f"{path}: expected one row for each of {num_frames} frames, got {len(boxes)}; "
            "write NaN,NaN,NaN,NaN where the object is absent"
        )
    return boxes


def _link(detections: list[Float32Array], name: str, images: tuple[UInt8Array, ...]) -> list[Clip]:
    """Link detections ``(N, 6)`` of consecutive frames into tracks by class and overlap."""
    finished: list[dict[int, Float32Array]] = []
    alive: list[dict[int, Float32Array]] = []
    for index, found in enumerate(detections):
        free = [d for d in found if is_sure(d, images[index])]
        continued = []
        for track in alive:
            last = track[index - 1]
            overlaps = [float(iou_xywh(last[:4], d[:4])) * (d[5] == last[5]) for d in free]
            if overlaps and max(overlaps) > 0.5:
                track[index] = free.pop(int(np.argmax(overlaps)))
                continued.append(track)
            else:
                finished.append(track)
        alive = continued + [{index: d} for d in free]
    clips: list[Clip] = []
    for track in finished + alive:
        if len(track) >= _MIN_TRACK_FRAMES:
            boxes = np.full((len(images), 4), np.nan, np.float32)
            for index, detection in track.items():
                boxes[index] = detection[:4]
            clips.append(Clip(f"{name}#{len(clips)}", images, boxes))
    return clips


def _is_worth_tracking(found: _Object, image: UInt8Array) -> bool:
    """Whether an object is neither tiny nor most of the picture."""
    w, h = found.bbox_xywh[2:].tolist()
    share = w * h / (image.shape[0] * image.shape[1])
    if min(w, h) < _MIN_SIDE_PX or found.area < 150:
        return False
    if found.num_border_pixels is None:
        return bool(share <= 0.6)
    # a region of a segmentation: many are sky, road or wall
    is_compact = found.area >= max(500, 0.3 * w * h)
    return bool(found.num_border_pixels <= 10 and is_compact and share <= 0.35)


def is_sure(detection: Float32Array, image: UInt8Array) -> bool:
    """Whether a detection ``(6,)`` in a picture ``(H, W, 3)`` is worth tracking."""
    _, _, w, h, score = detection[:5]
    area = image.shape[0] * image.shape[1]
    return bool(score >= _MIN_SCORE and min(w, h) >= _MIN_SIDE_PX and w * h <= 0.9 * area)


def _cut_out(
    image: UInt8Array, mask: npt.NDArray[np.bool_], bbox_xywh: Any, kind: str
) -> list[Cutout]:
    """The object in a box, tight around its mask: a list of one, or of none if it is too small."""
    x, y, w, h = (max(round(float(v)), 0) for v in bbox_xywh)
    inside = mask[y : y + h, x : x + w]
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if min(len(rows), len(columns)) < _MIN_CUTOUT_PX or w * h <= 900:
        return []
    tight = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if inside[tight].mean() < 0.25:
        return []
    alpha = inside[tight].astype(np.uint8) * 255
    bgra = np.dstack([image[y : y + h, x : x + w][tight], alpha])
    scale = _MAX_CUTOUT_PX / max(alpha.shape)
    if scale < 1:
        bgra = np.asarray(cv2.resize(bgra, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
    return [Cutout(np.ascontiguousarray(bgra, np.uint8), kind)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{path}: expected one JSON object per line, got: {error}") from error


def read_detections(path: Path) -> dict[str, Float32Array]:
    """Picture name → detections ``(N, 6)``: x, y, w, h, score, class."""
    if not path.is_file():
        return {}
    try:
        return {
            row["img"]: np.asarray(row["boxes"], np.float32).reshape(len(row["boxes"]), 6)
            for row in _read_lines(path)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: expected lines with img and boxes of six numbers, got {error!r}"
        ) from error


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_file())


def _read_image(path: Path) -> UInt8Array:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"{path}: expected a picture, got a file that does not decode, or none")
    return np.asarray(image, np.uint8)


def _read_mask(path: Path, image: UInt8Array) -> UInt8Array:
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if mask is None or mask.shape != image.shape[:2]:
        got = "a file that does not decode, or none" if mask is None else f"shape {mask.shape}"
        raise DataError(f"{path}: expected a mask of shape {image.shape[:2]}, got {got}")
    return np.asarray(mask, np.uint8)
