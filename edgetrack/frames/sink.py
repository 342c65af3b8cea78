"""Frames to a video file."""

import contextlib
import math
import os
from pathlib import Path

import numpy as np

from edgetrack.errors import SourceError, package_missing
from edgetrack.frames.live import Frame

try:
    import cv2
except ImportError as error:
    raise package_missing("cv2", error) from error

__all__ = ["VideoSink"]


class VideoSink:
    """Write frames to an mp4 file (MPEG-4 part 2); a context manager.

    The file appears under its name when the sink closes, after an exception too: the frames
    that were written until then are playable. Without any frame there is no file.

    Args:
        path: Where to write; ends in ``.mp4``. An existing file is replaced at the end.
        fps: Frames per second.
        size: Width and height in pixels; an odd last column or row is cut by the codec.

    Raises:
        SourceError: The file cannot be written.
        ValueError: The name does not end in ``.mp4``, or ``fps`` is not positive.
    """

    def __init__(self, path: str | os.PathLike[str], *, fps: float, size: tuple[int, int]) -> None:
        self.path = Path(path)
        self.size = size
        if not os.fspath(path):
            raise ValueError("path: expected a name that ends in .mp4, got an empty one; name it")
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"{path}: expected a name that ends in .mp4; rename it")
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps: expected a positive number, got {fps!r}")
        self._partial = self.path.with_name(f".{self.path.stem}.partial.mp4")
        self._num_written = 0
        self._is_closed = False
        fourcc = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(self._partial), fourcc, fps, size)
        if not self._writer.isOpened():
            self._partial.unlink(missing_ok=True)
            raise SourceError(
                f"{path}: expected to open a video of {size[0]}x{size[1]} for writing, got a "
                "refusal; check that its folder exists, may be written and has room"
            )

    def write(self, frame: Frame) -> None:
        """Append one frame, ``(H, W, 3)`` uint8 BGR.

        Raises:
            ValueError: Another shape or type; OpenCV would drop it in silence.
        """
        expected = (self.size[1], self.size[0], 3)
        if frame.shape != expected or frame.dtype != np.uint8:
            raise ValueError(
                f"{self.path}: expected frames {expected} uint8, got {frame.shape} {frame.dtype}; "
                "resize or convert them"
            )
        self._writer.write(frame)
        self._num_written += 1

    def close(self) -> None:
        """Finish the file and give it its name; calling it twice is fine.

        Raises:
            SourceError: Not all frames reached the disk; an existing file is left as it was.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._writer.release()
        if self._num_written == 0:
            self._partial.unlink(missing_ok=True)
            return
        written = cv2.VideoCapture(str(self._partial))
        num_stored = int(written.get(cv2.CAP_PROP_FRAME_COUNT)) if written.isOpened() else 0
        written.release()
        if num_stored != self._num_written:
            self._partial.unlink(missing_ok=True)
            raise SourceError(
                f"{self.path}: expected {self._num_written} frames on the disk, got {num_stored}; "
                "is it full?"
            )
        self._partial.replace(self.path)

    def __enter__(self) -> "VideoSink":
        return self

    def __exit__(self, exc_type: object, *exc_info: object) -> None:
        # The exception on its way matters more than one while closing.
        with contextlib.suppress(SourceError) if exc_type else contextlib.nullcontext():
            self.close()
