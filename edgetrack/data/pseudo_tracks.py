"""Videos that nobody labelled, and the tracks that a tracker found in them by itself.

Pseudo-tracks lie in a file of JSON lines. The first one is the header, every other one a track::

    {"format": 1, "bundle_digest": …, "settings": {…}, "date": …, "data_digest": …}
    {"clip": "street", "first": 12, "boxes": [[x, y, w, h], …], "agreement": 0.91, "bundle": …}

``boxes`` has a row in pixels for each frame from ``first`` on. Frames count from 0 through the
pictures in ``videos/<clip>/img`` of a training folder (see ``data.folder``), sorted by name.
"""

import datetime
import fnmatch
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.data.folder import Clip, is_sure, read_detections
from edgetrack.errors import DataError, SourceError, package_missing
from edgetrack.frames import image_paths, read_frames, read_image

try:
    import cv2
except ImportError as error:
    raise package_missing("cv2", error) from error

__all__ = [
    "PseudoTrack",
    "UnlabelledClip",
    "extract_frames",
    "read_pseudo_tracks",
    "read_unlabelled_clips",
    "write_pseudo_tracks",
]

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

_FORMAT = 1
_DECODED_FRAMES = 128  # of 512 x 288 pixels: 57 MB
_NO_DETECTIONS = np.empty((0, 6), np.float32)


@dataclass(frozen=True, kw_only=True)
class PseudoTrack:
    """One object in consecutive frames, as a tracker saw it.

    Attributes:
        clip: Name of the clip.
        first: Index of the first frame.
        boxes_xywh: ``(T, 4)``, float32, pixels; one row per frame from ``first`` on.
        agreement: Mean IoU, in [0, 1], of the boxes with those of the way back.
        bundle: Name and digest of what tracked.
    """

    clip: str
    first: int
    boxes_xywh: Float32Array
    agreement: float
    bundle: str


@dataclass(frozen=True)
class UnlabelledClip:
    """The frames of a video without truth.

    Attributes:
        name: Name of the clip.
        frame_paths: One picture per frame, in order.
        detections: For each frame ``(N, 6)``, float32: x, y, w, h, score, class; N may be 0.
    """

    name: str
    frame_paths: tuple[Path, ...]
    detections: tuple[Float32Array, ...]

    def frames(self) -> Sequence[UInt8Array]:
        """The frames ``(H, W, 3)``, uint8, BGR, decoded when asked for; the latest are kept.

        Raises:
            SourceError: On access: a picture cannot be read.
        """
        return _Frames(self.frame_paths)

    def start_boxes(self, index: int, image: UInt8Array) -> Float32Array:
        """Detections to start from in a frame: boxes xywh ``(N, 4)``, the surest first."""
        sure = [d for d in self.detections[index] if is_sure(d, image)]
        sure.sort(key=lambda d: -float(d[4]))
        return np.array([d[:4] for d in sure], np.float32).reshape(-1, 4)


class _Frames(Sequence[UInt8Array]):
    """Pictures that are decoded when asked for."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths
        self._read = functools.lru_cache(_DECODED_FRAMES)(read_image)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._read(path) for path in self._paths[index]]
        return self._read(self._paths[index])


def read_unlabelled_clips(root: Path, pattern: str = "*") -> tuple[UnlabelledClip, ...]:
    """The clips of a training folder that have no truth, sorted by name.

    Args:
        root: The folder; its clips lie in ``videos/<clip>/img``.
        pattern: Names to take, with ``*`` and ``?``.

    Raises:
        DataError: There is none, or ``videos/boxes.jsonl`` is malformed.
    """
    folders = sorted(path.parent for path in root.glob("videos/*/img"))
    named = [folder for folder in folders if fnmatch.fnmatchcase(folder.name, pattern)]
    unlabelled = [folder for folder in named if not (folder / "groundtruth.txt").is_file()]
    if not unlabelled:
        raise DataError(
            f"{root}: expected clips videos/<clip>/img without groundtruth.txt named {pattern!r}, "
            f"got {len(folders)} clips, {len(named)} of that name; check the folder and the names"
        )
    detections = read_detections(root / "videos" / "boxes.jsonl")
    clips = []
    for folder in unlabelled:
        paths = tuple(image_paths(folder / "img"))
        keys = [f"{folder.name}/img/{path.name}" for path in paths]
        found = tuple(detections.get(key, _NO_DETECTIONS) for key in keys)
        clips.append(UnlabelledClip(folder.name, paths, found))
    return tuple(clips)


def extract_frames(
    video: Path,
    folder: Path,
    *,
    long_side_px: int,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> None:
    """Write the frames of a video as ``000001.jpg`` and so on.

    Args:
        video: A video file.
        folder: Where to; it is made, and holds what was read until then after an exception.
        long_side_px: The longer side of the pictures, at most.
        on_progress: Called after each frame with the number done and, where the video declares
            it, the number to do.

    Raises:
        SourceError: The video cannot be read or is cut off, or a picture cannot be written.
    """
    folder.mkdir(parents=True)
    with read_frames(video) as frames:
        scale = min(1.0, long_side_px / max(frames.size))
        size = (max(1, round(frames.size[0] * scale)), max(1, round(frames.size[1] * scale)))
        for index, frame in enumerate(frames, 1):
            path = folder / f"{index:06d}.jpg"
            picture = cv2.resize(frame, size, interpolation=cv2.INTER_AREA) if scale < 1 else frame
            if not cv2.imwrite(str(path), picture):
                raise SourceError(f"{path}: expected to write a picture, got a refusal; make room")
            if on_progress:
                on_progress(index, frames.num_frames)


def write_pseudo_tracks(
    path: Path,
    tracks: Iterable[PseudoTrack],
    *,
    bundle_digest: str,
    settings: Mapping[str, Any],
    data_digest: str,
) -> None:
    """Write tracks, whole or not at all; an existing file is replaced at the end.

    Args:
        path: Where to.
        tracks: What was found.
        bundle_digest: Of the bundle that tracked.
        settings: How the tracks were found and chosen.
        data_digest: Of the folder that holds the clips (see ``folder_digest``).

    Raises:
        OSError: The file cannot be written.
    """
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    rows: list[dict[str, Any]] = [
        {
            "format": _FORMAT,
            "bundle_digest": bundle_digest,
            "settings": dict(settings),
            "date": today,
            "data_digest": data_digest,
        }
    ]
    rows += [
        {
            "clip": track.clip,
            "first": track.first,
            "boxes": [[round(v, 2) for v in bbox] for bbox in track.boxes_xywh.tolist()],
            "agreement": round(track.agreement, 4),
            "bundle": track.bundle,
        }
        for track in tracks
    ]
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_pseudo_tracks(path: Path, root: Path) -> tuple[Clip, ...]:
    """Read tracks and decode their frames.

    Args:
        path: The file; its layout is at the top of this module.
        root: The training folder that holds its clips.

    Returns:
        A clip per track, named ``<clip>#<number>``. Tracks of one video share decoded images.

    Raises:
        DataError: The file is missing or malformed, or names a clip or frames that the folder
            lacks; the message names the line.
        SourceError: A picture cannot be read.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: expected pseudo-tracks, got: {error}; run: edgetrack pseudolabel"
        ) from error
    _check_header(lines[0] if lines else "", where=f"{path}:1")
    folders = {folder.parent.name: folder for folder in root.glob("videos/*/img")}
    frame_paths: dict[str, list[Path]] = {}
    tracks = []
    for number, line in enumerate(lines[1:], 2):
        where = f"{path}:{number}"
        track = _parse_track(line, where)
        if track.clip not in folders:
            raise DataError(
                f"{where}: expected a clip in {root / 'videos'}, got {track.clip!r}; name the "
                "folder that the tracks were made from"
            )
        if track.clip not in frame_paths:
            frame_paths[track.clip] = image_paths(folders[track.clip])
        last, num_frames = track.first + len(track.boxes_xywh) - 1, len(frame_paths[track.clip])
        if last >= num_frames:
            raise DataError(
                f"{where}: expected frames below {num_frames} in {track.clip}, got {track.first} "
                f"to {last}; make the tracks again from this folder"
            )
        tracks.append(track)
    read = functools.cache(read_image)
    clips = []
    for number, track in enumerate(tracks):
        span = slice(track.first, track.first + len(track.boxes_xywh))
        images = tuple(read(frame) for frame in frame_paths[track.clip][span])
        clips.append(Clip(f"{track.clip}#{number}", images, track.boxes_xywh))
    return tuple(clips)


def _check_header(line: str, *, where: str) -> None:
    try:
        header = json.loads(line)
        found = header["format"]
    except (ValueError, TypeError, KeyError):
        found = None
    if found != _FORMAT:
        raise DataError(
            f"{where}: expected the header of pseudo-tracks of format {_FORMAT}, got "
            f"{line[:80]!r}; make them with: edgetrack pseudolabel"
        )


def _parse_track(line: str, where: str) -> PseudoTrack:
    try:
        row = json.loads(line)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            boxes = np.array(row["boxes"], np.float32).reshape(len(row["boxes"]), 4)
        track = PseudoTrack(
            clip=str(row["clip"]),
            first=int(row["first"]),
            boxes_xywh=boxes,
            agreement=float(row["agreement"]),
            bundle=str(row["bundle"]),
        )
        if not len(boxes) or not np.isfinite(boxes).all() or (boxes[:, 2:] <= 0).any():
            raise ValueError("boxes need finite numbers and a positive width and height")
        if track.first < 0:
            raise ValueError("first needs to be 0 or more")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{where}: expected a track with clip, first, boxes of x, y, w, h, agreement and "
            f"bundle, got {line[:80]!r} ({error!r}); repair or remove the line"
        ) from error
    return track
