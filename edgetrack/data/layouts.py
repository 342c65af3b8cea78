"""The published data sets that can be read, by name."""

from collections.abc import Callable
from pathlib import Path

from edgetrack.data.coco import read_coco
from edgetrack.data.folder import Clip
from edgetrack.data.got10k import read_got10k
from edgetrack.data.lasot import read_lasot
from edgetrack.data.otb import read_otb
from edgetrack.data.trackingnet import read_trackingnet
from edgetrack.data.truth import OnProgress
from edgetrack.data.vot import read_vot
from edgetrack.errors import DataError

__all__ = ["FOLDER", "LAYOUTS", "parse_source", "read_layout"]

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
    name: str, root: Path, *, split: str = "train", on_progress: OnProgress | None = None
) -> tuple[Clip, ...]:
    """Read a data set in its published layout; pictures stay on disk until they are used.

    Args:
        name: One of ``LAYOUTS``; the module of that name says how the folders must look.
        root: The folder that the data set was unpacked into.
        split: A split that the layout has; all of them have ``train``.
        on_progress: Called with the numbers of sequences done and to do; for ``coco`` of bytes.

    Returns:
        Clips; boxes are float32, in pixels from 0, and NaN where the object is absent.

    Raises:
        DataError: The layout or split is unknown, or the data set is missing or malformed.
    """
    if name not in _READERS:
        raise DataError(f"layout: expected {', '.join(LAYOUTS)}, got {name!r}; choose one of them")
    return _READERS[name](root, split=split, on_progress=on_progress)


def parse_source(text: str) -> tuple[str, Path]:
    """Split a source of training data, as the command line takes it, into layout and root.

    Args:
        text: ``<layout>=<root>``, or the path of a training folder (see ``data.folder``). A
            folder with ``=`` in its name is written ``folder=<root>`` or with a ``/`` before it.

    Returns:
        A name of ``LAYOUTS`` or ``FOLDER``, and the root; ``~`` is the home.

    Raises:
        DataError: The layout is unknown, or the root is empty.

    Example:
        >>> parse_source("coco=/datasets/coco")[0], parse_source("data/train")[0]
        ('coco', 'folder')
    """
    name, equals, root = text.partition("=")
    if not equals or "/" in name:
        name, root = FOLDER, text
    if name not in (*LAYOUTS, FOLDER) or not root:
        raise DataError(
            f"source: expected a training folder or LAYOUT=ROOT with {', '.join(LAYOUTS)}, got "
            f"{text!r}; write for example got10k=/datasets/GOT-10k"
        )
    return name, Path(root).expanduser()
