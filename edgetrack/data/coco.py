"""COCO 2017: pictures of everyday things; each labelled object is a clip of one frame.

Data set: "Microsoft COCO: common objects in context", ECCV 2014, arXiv:1405.0312. The layout, as
it unpacks; the folders of pictures may also lie in ``images/``::

    <root>/annotations/instances_train2017.json  instances_val2017.json
    <root>/train2017/000000000009.jpg …
    <root>/val2017/000000000139.jpg …

Left out are crowds (``iscrowd``), and objects whose box is thinner than ``MIN_SIDE_PX``, or not a
box. The 450 MB of JSON, mostly outlines that are not needed, are read object by object: all of it
at once would take gigabytes.
"""

import json
import math
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from edgetrack.data.folder import Clip
from edgetrack.data.lazy import LazyImages
from edgetrack.data.truth import OnProgress, check_split, refuse_layout
from edgetrack.errors import DataError

__all__ = ["MIN_SIDE_PX", "read_coco"]

MIN_SIDE_PX = 10

_SPLITS = ("train", "val")
_CHUNK_CHARS = 1 << 20
_MAX_ITEM_CHARS = 1 << 24
_SPACE = re.compile(r"[ \t\n\r]*")


def read_coco(
    root: Path, *, split: str = "train", on_progress: OnProgress | None = None
) -> tuple[Clip, ...]:
    """Read COCO; pictures stay on disk until they are used.

    Args:
        root: The folder above ``annotations/``.
        split: ``train`` or ``val``.
        on_progress: Called with the numbers of bytes of annotations done and to do.

    Returns:
        One clip per object, in the order of the annotations; its name is ``<picture>#<id>``, and
        the objects of one picture share their ``images``.

    Raises:
        DataError: The root, split, annotations or a picture are missing or malformed.
    """
    check_split("coco", split, known=_SPLITS)
    path = root / "annotations" / f"instances_{split}2017.json"
    folders = [root / f"{split}2017", root / "images" / f"{split}2017"]
    folder = next((f for f in folders if f.is_dir()), None)
    if not path.is_file() or folder is None:
        raise refuse_layout(root, f"annotations/{path.name} and pictures in {split}2017/")
    found = _Objects(path)
    try:
        with path.open(encoding="utf-8") as file:
            for key, item in _JsonItems(file, on_progress):
                found.add(key, item)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: expected JSON, got: {error}; unpack the annotations again"
        ) from error
    return found.clips(folder)


class _Objects:
    """Objects and the names of their pictures, packed: a million of them take 32 MB."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._picture_names: dict[int, str] = {}
        self._ids, self._picture_ids, self._boxes = array("q"), array("q"), array("f")

    def add(self, key: str, item: Any) -> None:
        """Take what is needed from an item of a list of the annotations."""
        try:
            if key == "images":
                self._picture_names[item["id"]] = os.fspath(item["file_name"])
            elif key == "annotations" and not item.get("iscrowd", 0):
                x, y, w, h = map(float, item["bbox"])
                if math.isfinite(x + y + w + h) and min(w, h) >= MIN_SIDE_PX:
                    self._ids.append(item["id"])
                    self._picture_ids.append(item["image_id"])
                    self._boxes.extend((x, y, w, h))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self._path}: expected images with id and file_name, and annotations with id, "
                f"image_id and bbox, got {str(item)[:80]} ({error!r}); unpack the annotations again"
            ) from error

    def clips(self, folder: Path) -> tuple[Clip, ...]:
        """One clip per object, with pictures from a folder."""
        if not self._ids:
            raise DataError(
                f"{self._path}: expected objects of {MIN_SIDE_PX} px and more, got none; use the "
                "annotations of instances"
            )
        with os.scandir(folder) as entries:
            present = {entry.name for entry in entries}
        pictures: dict[int, LazyImages] = {}
        for picture_id in self._picture_ids:
            if picture_id not in pictures:
                pictures[picture_id] = self._picture(picture_id, folder, present)
        boxes = np.array(self._boxes, np.float32).reshape(-1, 1, 4)
        return tuple(
            Clip(f"{pictures[picture_id].path(0).stem}#{object_id}", pictures[picture_id], bbox)
            for object_id, picture_id, bbox in zip(self._ids, self._picture_ids, boxes, strict=True)
        )

    def _picture(self, picture_id: int, folder: Path, present: set[str]) -> LazyImages:
        name = self._picture_names.get(picture_id)
        if name is None:
            raise DataError(
                f"{self._path}: expected a picture for each annotation, got image_id {picture_id} "
                "that is not in images; unpack the annotations again"
            )
        if name not in present:
            raise DataError(
                f"{folder / name}: expected a picture that {self._path.name} labels, got no such "
                "file; unpack the pictures again"
            )
        return LazyImages(folder, [name])


class _JsonItems:
    """The items of the lists in a JSON object, as ``(key, item)``; one item is in memory at a time.

    Values that are not lists are passed over.
    """

    def __init__(self, file: TextIO, on_progress: OnProgress | None) -> None:
        self._file = file
        self._on_progress = on_progress
        self._num_bytes = os.fstat(file.fileno()).st_size
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._pos = "", 0

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        self._take("{")
        while True:
            key = self._value()
            self._take(":")
            if self._peek() == "[":
                self._take("[")
                while self._peek() != "]":
                    yield key, self._value()
                    if self._peek() != "]":
                        self._take(",")
                self._take("]")
            else:
                self._value()
            if self._peek() != ",":
                break
            self._take(",")
        self._take("}")
        self._peek()  # reads what may follow, so that progress ends at all bytes

    def _peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._pos)
            assert match is not None
            self._pos = match.end()
            if self._pos < len(self._text) or not self._fill():
                return self._text[self._pos : self._pos + 1]

    def _take(self, character: str) -> None:
        if self._peek() != character:
            got = repr(self._peek()) if self._peek() else "its end"
            raise ValueError(f"{got} in the place of {character!r}")
        self._pos += 1

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decode(self._text, self._pos)
            except json.JSONDecodeError:
                if len(self._text) - self._pos > _MAX_ITEM_CHARS or not self._fill():
                    raise
                continue
            # a number that touches the end of what was read may go on
            if end < len(self._text) or not self._fill():
                self._pos = end
                return value

    def _fill(self) -> bool:
        """Read on, more each time an item turns out to be longer; whether there was more."""
        rest = self._text[self._pos :]
        more = self._file.read(max(_CHUNK_CHARS, len(rest)))
        self._text, self._pos = rest + more, 0
        if self._on_progress:
            self._on_progress(self._file.buffer.tell(), self._num_bytes)
        return bool(more)
