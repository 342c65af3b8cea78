"""Pictures on disk that look like a sequence of arrays, and are decoded when they are asked for."""

import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from edgetrack.errors import DataError, package_missing

try:
    import cv2
except ImportError as error:
    raise package_missing("cv2", error) from error

__all__ = ["LazyImages", "list_frames"]

UInt8Array = npt.NDArray[np.uint8]

_SUFFIXES = (".jpg", ".jpeg", ".png")
# labels count the pixels as they are stored, whatever a camera noted about holding it sideways
_FLAGS = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION


class LazyImages(Sequence[UInt8Array]):
    """Pictures ``(H, W, 3)``, uint8, BGR, that stay on disk.

    An item is decoded each time it is asked for; a slice is another ``LazyImages`` and decodes
    nothing. The length costs no look at the disk, and a name a few bytes: the 14 million frames of
    TrackingNet take 150 MB. Copies for other processes are as small.

    Args:
        folder: Where the pictures lie.
        names: Their paths inside it, in order.
    """

    __slots__ = ("_folder", "_names")

    def __init__(self, folder: str | os.PathLike[str], names: Iterable[str]) -> None:
        self._folder = os.fspath(folder)
        self._names = np.array([os.fsencode(name) for name in names], np.bytes_)

    @property
    def folder(self) -> Path:
        """Where the pictures lie."""
        return Path(self._folder)

    def path(self, index: int) -> Path:
        """The file of one picture."""
        return self.folder / os.fsdecode(self._names[index])

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"LazyImages({self._folder!r}, {len(self)} pictures)"

    @overload
    def __getitem__(self, index: int) -> UInt8Array: ...

    @overload
    def __getitem__(self, index: slice) -> "LazyImages": ...

    def __getitem__(self, index: int | slice) -> "UInt8Array | LazyImages":
        """Decode a picture, or take a part of the sequence.

        Raises:
            DataError: The file is missing, or does not decode.
            IndexError: There is no such picture.
        """
        if isinstance(index, slice):
            part = LazyImages(self._folder, ())
            part._names = self._names[index]
            return part
        path = self.path(operator.index(index))
        image = cv2.imread(os.fspath(path), _FLAGS)
        if image is None:
            got = "a file that does not decode" if path.is_file() else "no such file"
            raise DataError(
                f"{path}: expected a picture, got {got}; unpack this part of the data set again"
            )
        return np.asarray(image, np.uint8)


def list_frames(folder: Path) -> LazyImages:
    """The frames in a folder, in the order of the numbers that name them: 2.jpg before 10.jpg.

    Args:
        folder: Holds ``.jpg`` or ``.png`` files; others, and hidden ones, are passed over.

    Raises:
        DataError: The folder is missing, or a picture in it is not named by a number.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".")]
        names = [name for name in names if name.lower().endswith(_SUFFIXES)]
        return LazyImages(folder, sorted(names, key=lambda n: int(n.rpartition(".")[0])))
    except OSError as error:
        raise DataError(
            f"{folder}: expected a folder of frames, got {error.strerror or error}; unpack the "
            "sequence again"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{folder}: expected pictures named by their number such as 00000001.jpg, got: "
            f"{error}; move other pictures out of the folder"
        ) from error
