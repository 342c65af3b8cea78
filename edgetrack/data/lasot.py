"""LaSOT: 1,400 long sequences of 70 categories, 280 of them for testing.

Data set: "LaSOT: a high-quality benchmark for large-scale single object tracking", CVPR 2019,
arXiv:1809.07845. The layout, as it unpacks; the folders of the categories may be left out::

    <root>/training_set.txt  testing_set.txt         names of the sequences, published with the set
    <root>/airplane/airplane-1/
        img/00000001.jpg …
        groundtruth.txt                              x,y,w,h per frame, the first pixel is 1,1
        full_occlusion.txt  out_of_view.txt          0 or 1 per frame, one line with commas
        nlp.txt                                      not read

A frame has no box (NaN) where the object is hidden or out of view, and where the box has no area,
as in seven sequences. Categories come one by one, so a list may name sequences that are not there.
One list is enough: what it does not name belongs to the other split.
"""

from pathlib import Path

import numpy as np

from edgetrack.data.folder import Clip
from edgetrack.data.lazy import list_frames
from edgetrack.data.truth import (
    OnProgress,
    check_split,
    combine,
    read_each,
    read_flags,
    read_names,
    read_numbers,
    refuse_layout,
)
from edgetrack.errors import DataError

__all__ = ["read_lasot"]

_LISTS = {"train": "training_set.txt", "test": "testing_set.txt"}
_ORIGIN = np.array([1, 1, 0, 0], np.float32)


def read_lasot(
    root: Path, *, split: str = "train", on_progress: OnProgress | None = None
) -> tuple[Clip, ...]:
    """Read LaSOT; pictures stay on disk until they are used.

    Args:
        root: The folder that holds the categories, or the sequences.
        split: ``train`` or ``test``.
        on_progress: Called with the numbers of sequences done and to do.

    Returns:
        One clip per sequence, sorted by category and number.

    Raises:
        DataError: The root, split, both lists or a sequence is missing or malformed.
    """
    check_split("lasot", split, known=_LISTS)
    found = [p.parent for pattern in ("*", "*/*") for p in root.glob(f"{pattern}/groundtruth.txt")]
    if not found:
        raise refuse_layout(root, "sequences such as airplane/airplane-1 with groundtruth.txt")
    names = _choose(root, {folder.name for folder in found}, split)
    folders = [folder for folder in sorted(found, key=_order) if folder.name in names]
    if not folders:
        raise DataError(
            f"{root}: expected sequences of split {split}, got none among {len(found)} folders; "
            f"unpack more of them, or correct {_LISTS[split]}"
        )
    return read_each(folders, lambda folder: [_read_sequence(folder)], on_progress)


def _choose(root: Path, names: set[str], split: str) -> set[str]:
    """The names that belong to a split."""
    lists = {of: root / name for of, name in _LISTS.items()}
    if lists[split].is_file():
        return names & set(read_names(lists[split]))
    (other,) = lists.keys() - {split}
    if lists[other].is_file():
        return names - set(read_names(lists[other]))
    raise DataError(
        f"{root}: expected {' or '.join(_LISTS.values())}, got neither; put the published list "
        "there, or else training would see test sequences: an empty testing_set.txt allows that"
    )


def _order(folder: Path) -> tuple[str, int, str]:
    """By category and number: car-2 before car-10."""
    category, _, number = folder.name.rpartition("-")
    return category, int(number) if number.isdecimal() else 0, str(folder)


def _read_sequence(folder: Path) -> Clip:
    truth = folder / "groundtruth.txt"
    boxes = read_numbers(truth) - _ORIGIN
    clip = combine(folder.name, list_frames(folder / "img"), boxes, truth=truth)
    for name in ("full_occlusion.txt", "out_of_view.txt"):
        if (folder / name).is_file():
            flags = read_flags(folder / name, num_frames=len(clip.images))
            clip.boxes_xywh[flags == 1] = np.nan
    return clip
