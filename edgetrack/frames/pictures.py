"""Pictures: one, or a folder of them in natural order."""

import os
import re
from pathlib import Path

import numpy as np

from edgetrack.errors import SourceError, package_missing
from edgetrack.frames.live import Frame

try:
    import cv2
except ImportError as error:
    raise package_missing("cv2", error) from error

__all__ = ["IMAGE_SUFFIXES", "FolderReader", "image_paths", "read_image"]

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


def read_image(path: str | os.PathLike[str]) -> Frame:
    """Read one picture as BGR, ``(H, W, 3)`` uint8.

    Raises:
        SourceError: The file is missing or not a picture.
    """
    image = cv2.imread(os.fspath(path), cv2.IMREAD_COLOR)
    if image is None:
        got = "a file that is none" if Path(path).is_file() else "no such file"
        raise SourceError(f"{path}: expected a readable picture, got {got}; replace or remove it")
    return np.asarray(image, np.uint8)


def image_paths(folder: Path) -> list[Path]:
    """The pictures in a folder, by suffix, hidden files left out, sorted naturally."""
    paths = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    return sorted((p for p in paths if not p.name.startswith(".")), key=_natural_key)


class FolderReader:
    """Pictures of a folder, in natural order."""

    fps: float | None = None

    def __init__(self, folder: Path) -> None:
        paths = image_paths(folder)
        if not paths:
            raise SourceError(
                f"{folder}: expected a folder with pictures ({', '.join(sorted(IMAGE_SUFFIXES))}), "
                "got none; name the folder in which the pictures lie"
            )
        self.num_frames: int | None = len(paths)
        self._paths = iter(paths)

    def read(self) -> Frame | None:
        """The next picture; ``None`` after the last one."""
        path = next(self._paths, None)
        return None if path is None else read_image(path)

    def close(self) -> None:
        """End here."""
        self._paths = iter(())


def _natural_key(path: Path) -> list[tuple[bool, int, str]]:
    """Sort key under which ``2.jpg`` comes before ``10.jpg``."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(not p[0].isdecimal(), int(p) if p[0].isdecimal() else 0, p) for p in parts]
