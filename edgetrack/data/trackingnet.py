"""TrackingNet: 30,132 sequences to train on, in twelve chunks.

Data set: "TrackingNet: a large-scale dataset and benchmark for object tracking in the wild", ECCV
2018, arXiv:1803.10794. The layout, as its development kit unpacks it; any of the chunks will do::

    <root>/TRAIN_0/                     … TRAIN_11
        frames/<sequence>/0.jpg  1.jpg  …  10.jpg    numbers without leading zeros
        anno/<sequence>.txt                          x,y,w,h per frame
        zips/                                        not read

One box in thirty was drawn by hand, the others come from a tracker. Boxes may leave the frame.
``TEST`` has truth for first frames only, and is no split here.
"""

from pathlib import Path

from edgetrack.data.folder import Clip
from edgetrack.data.lazy import list_frames
from edgetrack.data.truth import (
    OnProgress,
    check_split,
    combine,
    read_each,
    read_numbers,
    refuse_layout,
)

__all__ = ["read_trackingnet"]

_NUM_CHUNKS = 12


def read_trackingnet(
    root: Path, *, split: str = "train", on_progress: OnProgress | None = None
) -> tuple[Clip, ...]:
    """Read TrackingNet; pictures stay on disk until they are used.

    Args:
        root: The folder above ``TRAIN_0`` to ``TRAIN_11``, or above some of them.
        split: ``train``.
        on_progress: Called with the numbers of sequences done and to do.

    Returns:
        One clip per truth file, sorted by chunk and name.

    Raises:
        DataError: The root, split, frames or truth of a sequence are missing or malformed.
    """
    check_split("trackingnet", split, known=["train"])
    chunks = [root / f"TRAIN_{number}" for number in range(_NUM_CHUNKS)]
    truths = [truth for chunk in chunks for truth in sorted((chunk / "anno").glob("*.txt"))]
    if not truths:
        raise refuse_layout(root, "TRAIN_0 to TRAIN_11, or some of them, with anno/ and frames/")
    return read_each(truths, lambda truth: [_read_sequence(truth)], on_progress)


def _read_sequence(truth: Path) -> Clip:
    frames = list_frames(truth.parents[1] / "frames" / truth.stem)
    return combine(truth.stem, frames, read_numbers(truth), truth=truth)
