"""OTB, the Object Tracking Benchmark: 100 short sequences.

Data set: "Object tracking benchmark", TPAMI 2015. The layout, as it unpacks::

    <root>/Basketball/img/0001.jpg …
    <root>/Basketball/groundtruth_rect.txt      x,y,w,h per frame, the first pixel is 1,1
    <root>/Jogging/groundtruth_rect.1.txt       two objects: Jogging.1 and Jogging.2
    <root>/Jogging/groundtruth_rect.2.txt

Numbers are separated by commas, tabs or spaces, even in one file. Empty truth files are passed
over: Human4 has one. Five sequences have truth for a part of their frames, as the authors' pages
and the GOT-10k toolkit say; ``_LABELLED`` holds the parts. A row of zeros, at the end of two
sequences, says that the object is absent (NaN).

OTB is a test set without splits: ``train`` and ``test`` both name all of it. Trackers that were
trained on it must not be compared on it.
"""

from pathlib import Path

import numpy as np

from edgetrack.data.folder import Clip
from edgetrack.data.lazy import LazyImages, list_frames
from edgetrack.data.truth import (
    OnProgress,
    check_split,
    combine,
    read_each,
    read_numbers,
    refuse_layout,
)

__all__ = ["read_otb"]

_LABELLED = {  # numbers of the first and last frame
    "david": (300, 770),
    "diving": (1, 215),
    "football1": (1, 74),
    "freeman3": (1, 460),
    "freeman4": (1, 283),
}
_ORIGIN = np.array([1, 1, 0, 0], np.float32)


def read_otb(
    root: Path, *, split: str = "train", on_progress: OnProgress | None = None
) -> tuple[Clip, ...]:
    """Read OTB; pictures stay on disk until they are used.

    Args:
        root: The folder that holds the sequences.
        split: ``train`` or ``test``, which are the same.
        on_progress: Called with the numbers of sequences done and to do.

    Returns:
        One clip per object, sorted by sequence.

    Raises:
        DataError: The root, split or a sequence is missing or malformed.
    """
    check_split("otb", split, known=["train", "test"])
    folders = sorted({truth.parent for truth in root.glob("*/groundtruth_rect*.txt")})
    if not folders:
        raise refuse_layout(root, "sequences with img/ and groundtruth_rect.txt")
    return read_each(folders, _read_sequence, on_progress)


def _read_sequence(folder: Path) -> list[Clip]:
    truths = sorted(folder.glob("groundtruth_rect*.txt"))
    truths = [truth for truth in truths if truth.stat().st_size > 0] or truths[:1]
    frames = list_frames(folder / "img")
    clips = []
    for number, truth in enumerate(truths, start=1):
        name = folder.name if len(truths) == 1 else f"{folder.name}.{number}"
        boxes = read_numbers(truth) - _ORIGIN
        images = frames if len(boxes) == len(frames) else _labelled(folder.name, frames)
        clips.append(combine(name, images, boxes, truth=truth))
    return clips


def _labelled(name: str, frames: LazyImages) -> LazyImages:
    """The frames of a sequence that have truth, where it is known that not all do."""
    if name.lower() not in _LABELLED:
        return frames
    first, last = _LABELLED[name.lower()]
    numbers = [int(frames.path(index).stem) for index in range(len(frames))]
    start, stop = np.searchsorted(numbers, [first, last + 1])
    return frames[int(start) : int(stop)]
