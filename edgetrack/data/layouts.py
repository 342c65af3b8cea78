"""The published data sets that can be read, by name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgetrack.data.coco import read_coco
from edgetrack.data.folder import Clip
from edgetrack.data.got10k import read_got10k
from edgetrack.data.lasot import read_lasot
from edgetrack.data.lazy import LazyImages
from edgetrack.data.otb import read_otb
from edgetrack.data.sequences import Sequence
from edgetrack.data.trackingnet import read_trackingnet
from edgetrack.data.truth import OnProgress
from edgetrack.data.vot import read_vot
from edgetrack.errors import DataError

__all__ = ["FOLDER", "LAYOUTS", "parse_source", "read_layout", "read_layout_sequences"]

FOLDER = "folder"  # what parse_source calls a training folder of data.folder

_READERS: dict[str, Callable[..., tuple[Clip, ...]]] = {
    "coco": read_coco,
    "got10k": read_got10k,
    "lasot": read_lasot,
    "otb": read_otb,
    "trackingnet": read_trackingnet,
    "vot": read_vot,
}
LAYOUTS = tuple(sorted(_READERS))


def read_layout(
    name: str, root: Path, *, on_progress: OnProgress | None = None
) -> tuple[Clip, ...]:
    """Read a data set in its published layout; pictures stay on disk until they are used.

    Args:
        name: One of ``LAYOUTS``, or ``<layout>:<split>`` for another split than ``train``; the
            module of that name says how the folders must look, and which splits there are.
        root: The folder that the data set was unpacked into.
        on_progress: Called with the numbers of sequences done and to do; for ``coco`` of bytes.

    Returns:
        Clips; boxes are float32, in pixels from 0, and NaN where the object is absent.

    Raises:
        DataError: The layout or split is unknown, or the data set is missing or malformed.
    """
    layout, _, split = name.partition(":")
    if layout not in _READERS:
        raise DataError(
            f"layout: expected {', '.join(LAYOUTS)}, got {layout!r}; choose one of them"
        )
    return _READERS[layout](root, split=split or "train", on_progress=on_progress)


def read_layout_sequences(name: str, root: Path) -> list[Sequence]:
    """Read videos in a published layout to track and score on, from their first box on.

    Args:
        name: As in ``read_layout``.
        root: The folder that the data set was unpacked into.

    Raises:
        DataError: As ``read_layout``, or there is no video in which a box is followed by another.
    """
    sequences = []
    for clip in read_layout(name, root):
        labelled = np.flatnonzero(np.isfinite(clip.boxes_xywh).all(1))
        if len(labelled) > 1 and isinstance(clip.images, LazyImages):
            first = int(labelled[0])
            paths = tuple(clip.images.path(k) for k in range(first, len(clip.images)))
            boxes = clip.boxes_xywh[first:].astype(np.float64)
            sequences.append(Sequence(name=clip.name, frame_paths=paths, boxes_xywh=boxes))
    if not sequences:
        raise DataError(
            f"{root}: expected videos with boxes in the layout {name}, got none; name a set of "
            "videos"
        )
    return sequences


def parse_source(text: str) -> tuple[str, Path]:
    """Split a source of training data, as the command line takes it, into layout and root.

    Args:
        text: ``<layout>=<root>`` or ``<layout>:<split>=<root>``, or the path of a training folder
            (see ``data.folder``). A folder with ``=`` in its name is written ``folder=<root>`` or
            with a ``/`` before it.

    Returns:
        What ``read_layout`` takes, or ``FOLDER``; and the root; ``~`` is the home.

    Raises:
        DataError: The layout is unknown, or the root is empty.

    Example:
        >>> parse_source("coco=/datasets/coco")[0], parse_source("data/train")[0]
        ('coco', 'folder')
    """
    name, equals, root = text.partition("=")
    if not equals or "/" in name:
        name, root = FOLDER, text
    if name.partition(":")[0] not in (*LAYOUTS, FOLDER) or not root:
        raise DataError(
            f"source: expected a training folder or LAYOUT=ROOT with {', '.join(LAYOUTS)}, got "
            f"{text!r}; write for example got10k=/datasets/GOT-10k"
        )
    return name, Path(root).expanduser()
