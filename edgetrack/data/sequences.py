"""Labelled sequences: frames on disk, one box per frame.

The layout is a folder per sequence::

    <root>/<sequence>/img/000001.jpg …
    <root>/<sequence>/groundtruth.txt

with one row ``x,y,w,h`` per frame in ``groundtruth.txt``: top-left corner and size in pixels,
separated by commas, spaces or tabs. A row of NaN, or of four zeros, says that the target is
absent.
"""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgetrack.errors import DataError
from edgetrack.frames import image_paths, read_image

__all__ = [
    "IMAGE_FOLDER",
    "TRUTH_NAME",
    "Sequence",
    "read_sequence",
    "read_sequences",
    "read_truth",
]

IMAGE_FOLDER = "img"
TRUTH_NAME = "groundtruth.txt"


@dataclass(frozen=True)
class Sequence:
    """Frames and truth of one target; the truth of the first frame is always there.

    Attributes:
        name: Its name, unique in its set.
        frame_paths: One picture per frame, in order.
        boxes_xywh: Truth ``(T, 4)`` float64; rows of NaN where the target is absent.
    """

    name: str
    frame_paths: tuple[Path, ...]
    boxes_xywh: npt.NDArray[np.float64]

    def frames(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Read the frames one by one, ``(H, W, 3)`` uint8 BGR.

        Raises:
            SourceError: A picture cannot be read.
        """
        return map(read_image, self.frame_paths)

    def backwards(self) -> "Sequence":
        """The same frames from the last one that shows the target to the first.

        A second way to lose the same target: where one loss moves a mean over few sequences by
        more than what is compared, track both ways.
        """
        last = int(np.flatnonzero(np.isfinite(self.boxes_xywh).all(1))[-1])
        return dataclasses.replace(
            self,
            frame_paths=self.frame_paths[last::-1],
            boxes_xywh=self.boxes_xywh[last::-1].copy(),
        )


def read_sequences(root: str | os.PathLike[str]) -> list[Sequence]:
    """Read all sequences under a folder, sorted by name.

    Args:
        root: The folder that holds a folder per sequence.

    Raises:
        DataError: It holds no sequence, or one of them is malformed.
    """
    root = Path(root)
    folders = {p.parent for name in (TRUTH_NAME, IMAGE_FOLDER) for p in root.glob(f"*/{name}")}
    if not folders:
        got = "none" if root.is_dir() else "no such folder"
        raise DataError(
            f"{root}: expected folders that hold {TRUTH_NAME} and {IMAGE_FOLDER}/, got {got}; "
            "name the folder above the sequences"
        )
    return [read_sequence(folder) for folder in sorted(folders)]


def read_sequence(folder: str | os.PathLike[str]) -> Sequence:
    """Read one sequence; its name is the folder's.

    Raises:
        DataError: The truth is missing or malformed, or does not fit the pictures; the message
            names file and line.
    """
    folder = Path(folder)
    truth_path = folder / TRUTH_NAME
    boxes = read_truth(truth_path)
    paths = image_paths(folder / IMAGE_FOLDER) if (folder / IMAGE_FOLDER).is_dir() else []
    if len(paths) != len(boxes):
        raise DataError(
            f"{truth_path}: expected one row for each of the {len(paths)} pictures in "
            f"{IMAGE_FOLDER}/, got {len(boxes)}; add or remove rows or pictures"
        )
    if len(boxes) < 2 or np.isnan(boxes[0]).any():
        got = f"{len(boxes)} rows" if len(boxes) < 2 else "an absent target in line 1"
        raise DataError(
            f"{truth_path}: expected at least two rows, the first with a box to start from, "
            f"got {got}; cut the frames before the target is seen"
        )
    return Sequence(folder.name, tuple(paths), boxes)


def read_truth(path: Path) -> npt.NDArray[np.float64]:
    """Read a truth file: boxes ``(T, 4)`` xywh, rows of NaN where the target is absent.

    Raises:
        DataError: It cannot be read, or a row is malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected rows x,y,w,h, got: {error}; restore the file") from error
    while lines and not lines[-1].strip():
        lines.pop()
    return np.array([_parse_row(line, f"{path}:{n}") for n, line in enumerate(lines, 1)])


def _parse_row(line: str, where: str) -> list[float]:
    try:
        row = [float(field) for field in line.replace(",", " ").split()]
    except ValueError:
        row = []
    if len(row) != 4 or np.isinf(row).any():
        raise DataError(
            f"{where}: expected four numbers x,y,w,h, got {line.strip()!r}; "
            "write NaN,NaN,NaN,NaN where the target is absent"
        )
    if np.isnan(row).any() or row == [0, 0, 0, 0]:
        return [np.nan] * 4
    if min(row[2:]) <= 0:
        raise DataError(
            f"{where}: expected a positive width and height, got {row[2]:g} x {row[3]:g}; rows "
            "are x,y,w,h, not two corners: write NaN,NaN,NaN,NaN where the target is absent"
        )
    return row
