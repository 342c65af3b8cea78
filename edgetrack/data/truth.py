"""What the published layouts share: lists of names, truth files of numbers, one clip of both."""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from edgetrack.data.folder import Clip
from edgetrack.data.lazy import LazyImages
from edgetrack.errors import DataError

__all__ = [
    "OnProgress",
    "check_split",
    "combine",
    "read_each",
    "read_flags",
    "read_names",
    "read_numbers",
    "read_text",
    "refuse_layout",
]

OnProgress = Callable[[int, int], None]
Float32Array = npt.NDArray[np.float32]
_Item = TypeVar("_Item")

_SHOWN_CHARS = 60


def check_split(layout: str, split: str, *, known: Collection[str]) -> None:
    """Refuse a split that a layout does not have.

    Raises:
        DataError: The split is unknown.
    """
    if split not in known:
        raise DataError(
            f"{layout}: expected split {' or '.join(sorted(known))}, got {split!r}; choose one of "
            "them"
        )


def refuse_layout(root: Path, expected: str) -> DataError:
    """The error to raise where a root holds nothing of a layout.

    Args:
        root: Folder that was to hold the data set.
        expected: What it should hold, in words.
    """
    if not root.is_dir():
        got = "no such folder"
    else:
        got = "an empty folder" if next(root.iterdir(), None) is None else "none of them"
    return DataError(f"{root}: expected {expected}, got {got}; name the folder that holds them")


def read_each(
    items: Collection[_Item],
    read: Callable[[_Item], Iterable[Clip]],
    on_progress: OnProgress | None,
) -> tuple[Clip, ...]:
    """Read one sequence after the other, and report the numbers of those done and to do."""
    clips: list[Clip] = []
    for num_done, item in enumerate(items, start=1):
        clips += read(item)
        if on_progress:
            on_progress(num_done, len(items))
    return tuple(clips)


def combine(name: str, images: LazyImages, boxes_xywh: Float32Array, *, truth: Path) -> Clip:
    """One clip of frames and truth ``(T, 4)``, pixels from 0.

    Published sets hold some boxes without an area, mostly where the object is gone; the clip has
    NaN there.

    Raises:
        DataError: There is not one row per frame.
    """
    if len(images) != len(boxes_xywh):
        raise DataError(
            f"{name}: expected one row for each of the {len(images)} frames in {images.folder}, "
            f"got {len(boxes_xywh)} in {truth}; unpack the sequence again, or remove it"
        )
    boxes = boxes_xywh.copy()
    boxes[~(boxes[:, 2:] > 0).all(1) | np.isnan(boxes).any(1)] = np.nan
    return Clip(name, images, boxes)


def read_text(path: Path, expected: str) -> str:
    """The text of a small file.

    Raises:
        DataError: It cannot be read; the message says what was expected there.
    """
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: expected {expected}, got no such file; unpack this part of the data set again"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: expected {expected}, got: {error}; unpack this part of the data set again"
        ) from error


def read_names(path: Path) -> list[str]:
    """The lines of a list of sequences, without blank ones.

    Raises:
        DataError: The file cannot be read.
    """
    lines = read_text(path, "a list of sequences").splitlines()
    return [line.strip() for line in lines if line.strip()]


def read_numbers(path: Path) -> Float32Array:
    """The rows x, y, w, h ``(T, 4)`` of a truth file, as they stand.

    Numbers are separated by commas, tabs or spaces, and may be mixed.

    Raises:
        DataError: The file cannot be read, or a row is malformed; the message names its line.
    """
    rows = []
    for number, line in enumerate(read_text(path, "rows x,y,w,h").rstrip().splitlines(), start=1):
        try:
            x, y, w, h = map(float, line.replace(",", " ").split())
        except ValueError as error:
            raise _malformed(path, number, line) from error
        rows.append((x, y, w, h))
    numbers = np.array(rows, np.float32).reshape(-1, 4)
    is_wrong = np.isinf(numbers).any(1)
    if is_wrong.any():
        number = int(np.argmax(is_wrong))
        raise _malformed(path, number + 1, str(rows[number]))
    return numbers


def _malformed(path: Path, number: int, line: str) -> DataError:
    return DataError(
        f"{path}:{number}: expected four numbers x,y,w,h, got {line.strip()[:_SHOWN_CHARS]!r}; "
        "repair the row, with NaN,NaN,NaN,NaN where the object is absent"
    )


def read_flags(path: Path, *, num_frames: int) -> Float32Array:
    """One number per frame ``(T,)`` from a file of lines or of one line with commas.

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    fields = read_text(path, "a number per frame").replace(",", " ").split()
    try:
        flags = np.array([float(field) for field in fields], np.float32)
    except ValueError as error:
        raise DataError(
            f"{path}: expected a number per frame, got: {error}; repair the file, or remove it"
        ) from error
    if len(flags) != num_frames:
        raise DataError(
            f"{path}: expected a number for each of {num_frames} frames, got {len(flags)}; repair "
            "the file, or remove it"
        )
    return flags
