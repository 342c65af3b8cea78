"""GOT-10k: 9,335 sequences to train on and 180 to validate with.

Data set: "GOT-10k: a large high-diversity benchmark for generic object tracking in the wild",
TPAMI 2021, arXiv:1810.11981. The layout, as it unpacks::

    <root>/train/list.txt                     names of the sequences
    <root>/train/GOT-10k_Train_000001/
        00000001.jpg …
        groundtruth.txt                       x,y,w,h per frame
        absence.label                         1 where the object is not in the frame
        cover.label                           share that is visible, in eighths: 0 to 8
        cut_by_image.label  meta_info.ini     not read
    <root>/val/…                              the same

A frame has no box (NaN) where ``absence`` is 1, where ``cover`` is 0, and where the box has no
area, as in some thirty sequences. The authors call the coordinates 1-based (toolkit issue 6), yet
many boxes start at 0; as in the code of the field, the numbers are taken as they stand.

The split ``vottrain`` leaves out 1,000 training sequences that the VOT challenges from 2019 on
forbid. Their list is not ours to ship: put ``got10k_vot_train_split.txt``, as published with
PyTracking, into the root. It holds the positions in ``train/list.txt``, from 0, of the sequences
to keep.
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

__all__ = ["read_got10k"]

_FOLDERS = {"train": "train", "val": "val", "vottrain": "train"}
_INDEX_NAME = "got10k_vot_train_split.txt"


def read_got10k(
    root: Path,
    *,
    split: str = "train",
    index_list: Path | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Clip, ...]:
    """Read GOT-10k; pictures stay on disk until they are used.

    Args:
        root: The folder above ``train/`` and ``val/``.
        split: ``train``, ``val``, or ``vottrain``: see the top of this module.
        index_list: File of positions in ``list.txt``, from 0, one a line: read these sequences
            only. By default all, and for ``vottrain`` the file in the root.
        on_progress: Called with the numbers of sequences done and to do.

    Returns:
        One clip per sequence, in the order of ``list.txt``, or of the index list.

    Raises:
        DataError: The root, split, a list or a sequence is missing or malformed.
    """
    check_split("got10k", split, known=_FOLDERS)
    folder = root / _FOLDERS[split]
    if not folder.is_dir():
        raise refuse_layout(root, f"{_FOLDERS[split]}/ with list.txt and a folder per sequence")
    names = read_names(folder / "list.txt")
    if not names:
        raise DataError(
            f"{folder / 'list.txt'}: expected names of sequences, got none; unpack it again"
        )
    if split == "vottrain" and index_list is None:
        index_list = root / _INDEX_NAME
    if index_list is not None:
        names = _choose(names, index_list)
    return read_each(names, lambda name: [_read_sequence(folder, name)], on_progress)


def _choose(names: list[str], index_list: Path) -> list[str]:
    """The names at the positions that a file lists."""
    if not index_list.is_file():
        raise DataError(
            f"{index_list}: expected the positions in list.txt of the sequences to keep, got no "
            f"such file; put {_INDEX_NAME} of PyTracking there, or choose split train"
        )
    lines = read_names(index_list)
    for line in lines:
        if not line.isdecimal() or int(line) >= len(names):
            raise DataError(
                f"{index_list}: expected positions from 0 to {len(names) - 1} in list.txt, got "
                f"{line!r}; use the list.txt and the index list as published"
            )
    return [names[int(line)] for line in lines]


def _read_sequence(folder: Path, name: str) -> Clip:
    sequence = folder / name
    if not sequence.is_dir():
        raise DataError(
            f"{sequence}: expected the sequence that {folder / 'list.txt'} names, got no such "
            "folder; unpack it, or take its name out of the list"
        )
    truth = sequence / "groundtruth.txt"
    clip = combine(name, list_frames(sequence), read_numbers(truth), truth=truth)
    is_absent = np.zeros(len(clip.images), bool)
    for label, absent_at in (("absence.label", 1), ("cover.label", 0)):
        if (sequence / label).is_file():
            flags = read_flags(sequence / label, num_frames=len(clip.images))
            is_absent |= flags == absent_at
    clip.boxes_xywh[is_absent] = np.nan
    return clip
