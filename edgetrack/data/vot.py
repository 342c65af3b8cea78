"""VOT: the sequences of the Visual Object Tracking challenges, 2013 and later.

The layout, as the toolkits of the challenges unpack it; ``sequences/`` is there in the workspaces
of the newer one::

    <root>/[sequences/]list.txt                 names of the sequences
    <root>/[sequences/]ants1/
        groundtruth.txt                         one region per frame
        color/00000001.jpg …                    or 00000001.jpg … beside groundtruth.txt

A region is one of these, pixels counted from 0:

* ``x,y,w,h``: a box.
* ``x1,y1,…,xn,yn``, n of at least 3: a polygon. Its box has the polygon's area and the proportions
  of the box around it, and sits at the mean of the corners: the rule of the field, from SiamFC on,
  but for its one pixel more in width and height.
* ``mX,Y,W,H,n0,n1,…``: a mask, from 2020 on. Rows of the window X, Y, W, H one after the other, as
  lengths of runs, of background first. Its box is the tight one.
* NaNs, a single number, a polygon without area or a mask without pixels: the object is absent.

VOT is a test set without splits: ``train`` and ``test`` both name all of it. Trackers that were
trained on it must not be compared on it.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgetrack.data.folder import Clip
from edgetrack.data.lazy import list_frames
from edgetrack.data.truth import (
    Float32Array,
    OnProgress,
    check_split,
    combine,
    read_each,
    read_names,
    read_text,
    refuse_layout,
)
from edgetrack.errors import DataError

__all__ = ["read_vot"]

_ABSENT = np.full(4, np.nan, np.float32)
_SHOWN_CHARS = 60


def read_vot(
    root: Path, *, split: str = "train", on_progress: OnProgress | None = None
) -> tuple[Clip, ...]:
    """Read VOT; pictures stay on disk until they are used.

    Args:
        root: The folder that holds list.txt and the sequences, or the workspace above it.
        split: ``train`` or ``test``, which are the same.
        on_progress: Called with the numbers of sequences done and to do.

    Returns:
        One clip per sequence, in the order of ``list.txt``, or sorted by name without it.

    Raises:
        DataError: The root, split or a sequence is missing or malformed.
    """
    check_split("vot", split, known=["train", "test"])
    folder = root / "sequences" if (root / "sequences").is_dir() else root
    if (folder / "list.txt").is_file():
        folders = [folder / name for name in read_names(folder / "list.txt")]
    else:
        folders = sorted(truth.parent for truth in folder.glob("*/groundtruth.txt"))
    if not folders:
        raise refuse_layout(root, "list.txt and sequences with groundtruth.txt")
    return read_each(folders, lambda sequence: [_read_sequence(sequence)], on_progress)


def _read_sequence(folder: Path) -> Clip:
    truth = folder / "groundtruth.txt"
    lines = read_text(truth, "one region per frame").rstrip().splitlines()
    boxes = [_parse_region(line.strip(), f"{truth}:{n}") for n, line in enumerate(lines, start=1)]
    frames = list_frames(folder / "color" if (folder / "color").is_dir() else folder)
    return combine(folder.name, frames, np.reshape(boxes, (-1, 4)).astype(np.float32), truth=truth)


def _parse_region(line: str, where: str) -> Float32Array:
    """The box xywh ``(4,)`` of a region; NaN where there is none."""
    try:
        if line.startswith("m"):
            return _mask_bbox([int(field) for field in line[1:].split(",")])
        numbers = np.array([float(field) for field in line.split(",")])
        if np.isinf(numbers).any():
            raise ValueError("infinite numbers")
        if len(numbers) == 1:
            return _ABSENT
        if len(numbers) == 4:
            return numbers.astype(np.float32)
        if len(numbers) >= 6 and len(numbers) % 2 == 0:
            return _polygon_bbox(numbers.reshape(-1, 2))
        raise ValueError(f"{len(numbers)} numbers")
    except ValueError as error:
        raise DataError(
            f"{where}: expected a box of four numbers, a polygon of six or more, or a mask "
            f"mX,Y,W,H,runs, got {line[:_SHOWN_CHARS]!r} ({error}); unpack the sequence again"
        ) from error


def _polygon_bbox(corners: npt.NDArray[np.float64]) -> Float32Array:
    """The box xywh ``(4,)`` that stands for a polygon ``(N, 2)``."""
    if np.isnan(corners).any():
        return _ABSENT
    x, y = corners.T
    area = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
    around = np.ptp(corners, axis=0)
    if area == 0 or around.min() == 0:
        return _ABSENT
    size = around * np.sqrt(area / around.prod())
    return np.concatenate([corners.mean(0) - size / 2, size]).astype(np.float32)


def _mask_bbox(numbers: list[int]) -> Float32Array:
    """The tight box xywh ``(4,)`` of a mask: its window x, y, w, h, then lengths of runs."""
    if len(numbers) < 4 or min(numbers[2:]) < 0:
        raise ValueError("a window and runs of positive length are missing")
    x, y, width, height = numbers[:4]
    ends = np.cumsum(numbers[4:], dtype=np.int64)
    if len(ends) and ends[-1] > width * height:
        raise ValueError(f"runs of {ends[-1]} pixels in a window of {width} x {height}")
    starts, ends = ends[:-1:2], ends[1::2]
    starts, last = starts[ends > starts], ends[ends > starts] - 1
    if len(starts) == 0:
        return _ABSENT
    # a run that goes on in the next row reaches both sides of the window
    wraps = last // width > starts // width
    left = int(np.where(wraps, 0, starts % width).min())
    right = int(np.where(wraps, width - 1, last % width).max())
    top, bottom = int(starts[0] // width), int(last[-1] // width)
    return np.array([x + left, y + top, right - left + 1, bottom - top + 1], np.float32)
