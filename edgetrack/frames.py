"""Frames from a video, a folder of pictures, a camera or a stream; frames to a video.

A frame is BGR, uint8, ``(H, W, 3)``, as OpenCV gives it. All frames of one source have one size.
OpenCV's FFmpeg reader scales the later frames of a video to the size of its first one.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgetrack.errors import FrameSizeError, SourceEndedError, SourceError, package_missing

try:
    import cv2
except ImportError as error:
    raise package_missing("cv2", error) from error

__all__ = ["FrameSource", "VideoSink", "image_paths", "read_frames", "read_image"]

Frame = npt.NDArray[np.uint8]
Source = str | bytes | os.PathLike[str] | int

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
# Containers without an exact frame count (WebM, TS) give duration times rate, which can be
# a few frames too many, and more where the sound outlasts the pictures.
MISSING_FRAMES_ALLOWED = 2
MISSING_FRACTION_ALLOWED = 0.05
# From 100 on, OpenCV takes a camera number for a number plus the code of a video interface.
LAST_CAMERA = 99
_CAMERA_DEVICE = re.compile(r"/dev/video\d+")
_CAMERA_HINT = "check that it is plugged in and readable, and that no other program uses it"
_GSTREAMER_HINT = (
    "check the pipeline with gst-launch-1.0, and with edgetrack doctor that OpenCV has GStreamer: "
    "on a Jetson use the system's own, in a venv made with --system-site-packages"
)
_STREAM_HINT = (
    "check the address, the name and password in it, the network, and that it is streaming"
)
_VIDEO_HINT = (
    "it is empty, no video, or cut off (an mp4 without its end has no index); re-encode it"
)


def read_frames(source: Source) -> "FrameSource":
    """Open a source and iterate over its frames.

    Args:
        source: A video file, a folder of pictures (sorted naturally: 2 before 10), a camera
            number from 0 to 99 (``0`` or ``"0"``), a stream's URL, or a GStreamer pipeline that
            ends in ``appsink``.

    Returns:
        An iterator of frames, ``(H, W, 3)`` uint8 BGR, each its own memory; also a context
        manager with ``fps``, ``num_frames`` and ``size``.

    Raises:
        SourceError: The source is missing or cannot be read. While iterating:
            ``SourceEndedError`` after the last frame of a video that is cut off,
            ``FrameSizeError`` when frames change size.
    """
    return FrameSource(source)


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


class FrameSource:
    """An open source: iterator of frames and context manager.

    It is opened, and its first frame decoded, at construction. It closes itself at its end.

    Attributes:
        fps: Frames per second as the source declares it; ``None`` when unknown.
        num_frames: Frames as the source declares it; ``None`` when unknown, as for a camera.
        size: Width and height in pixels.
    """

    def __init__(self, source: Source) -> None:
        self._name = str(source) if isinstance(source, int) else os.fsdecode(source)
        self._reader = _open(source)
        self.fps = self._reader.fps
        self.num_frames = self._reader.num_frames
        self._first = self._reader.read()
        if self._first is None:
            raise SourceError(
                f"{self._name}: expected at least one frame, got none; it may be damaged or in a "
                "codec that this OpenCV cannot decode, try to re-encode it"
            )
        self.size = (self._first.shape[1], self._first.shape[0])
        self._next_index = 0
        self._is_closed = False

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        if self._is_closed:
            raise StopIteration
        frame, self._first = self._first, None
        if frame is None:
            frame = self._read()
        if frame is None:
            self.close()
            raise StopIteration
        self._next_index += 1
        return frame

    def __enter__(self) -> "FrameSource":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the source; calling it twice is fine. Iteration ends."""
        self._is_closed = True
        self._first = None
        self._reader.close()

    def _read(self) -> Frame | None:
        try:
            frame = self._reader.read()
        except SourceError:
            self.close()
            raise
        if frame is not None and frame.shape[1::-1] != self.size:
            self.close()
            raise FrameSizeError(
                f"{self._name}: expected {self.size[0]}x{self.size[1]} pixels in frame "
                f"{self._next_index} as in frame 0, got {frame.shape[1]}x{frame.shape[0]}; "
                "split the source where its size changes, or scale it to one size"
            )
        return frame


class _FolderReader:
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
        path = next(self._paths, None)
        return None if path is None else read_image(path)

    def close(self) -> None:
        self._paths = iter(())


class _VideoReader:
    """A video file, camera or stream through ``cv2.VideoCapture``."""

    def __init__(
        self,
        source: str | int,
        *,
        api: int = cv2.CAP_ANY,
        hint: str = _VIDEO_HINT,
        is_camera: bool = False,
    ) -> None:
        self._name = f"camera {source}" if is_camera else str(source)
        self._is_camera = is_camera
        self._capture = cv2.VideoCapture(source, api)
        if not self._capture.isOpened():
            raise SourceError(f"{self._name}: expected to open it, got a refusal; {hint}")
        fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        count = float(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.fps: float | None = fps if math.isfinite(fps) and fps > 0 else None
        self.num_frames = int(count) if not is_camera and 0 < count < 1e12 else None
        self._num_read = 0
        self._position_ms = 0.0

    def read(self) -> Frame | None:
        is_read, frame = self._capture.read()
        if not is_read:
            self._check_end()
            return None
        self._num_read += 1
        self._position_ms = float(self._capture.get(cv2.CAP_PROP_POS_MSEC))
        return np.asarray(frame, np.uint8)

    def close(self) -> None:
        self._capture.release()

    def _check_end(self) -> None:
        """Tell an end that was announced from one that was not."""
        if self._is_camera:
            raise SourceEndedError(
                f"{self._name}: expected another frame after {self._num_read}, got none; "
                "check its cable, and that no other program uses it"
            )
        if self.num_frames is None or self._num_read == 0:
            return
        allowed = MISSING_FRAMES_ALLOWED + MISSING_FRACTION_ALLOWED * self.num_frames
        # A variable rate makes the declared count wrong, but not the time stamps.
        reached = self._num_read
        if self.fps is not None:
            reached = max(reached, round(self._position_ms / 1000 * self.fps) + 1)
        if self.num_frames - reached > allowed:
            raise SourceEndedError(
                f"{self._name}: expected {self.num_frames} frames as it declares, got "
                f"{self._num_read}; the file is cut off, copy or record it again"
            )


def _open(source: Source) -> _FolderReader | _VideoReader:
    if isinstance(source, int):
        return _camera(source)
    text = os.fsdecode(source)
    if text.removeprefix("-").isdecimal():
        return _camera(text)
    if "://" in text:
        is_file = text.startswith("file:")
        return _VideoReader(text, hint=_VIDEO_HINT if is_file else _STREAM_HINT)
    if " ! " in text:
        return _VideoReader(text, api=cv2.CAP_GSTREAMER, hint=_GSTREAMER_HINT)
    return _open_path(text)


def _camera(source: int | str) -> _VideoReader:
    """A camera by its number; OpenCV crashes at some that cannot be one."""
    digits = str(source).lstrip("0") or "0"
    if isinstance(source, bool) or not digits.isdecimal() or len(digits) > len(str(LAST_CAMERA)):
        raise SourceError(
            f"camera {source}: expected a camera number from 0 to {LAST_CAMERA}, got {source}; "
            "list the cameras with: ls /dev/video*"
        )
    return _VideoReader(int(digits), hint=_CAMERA_HINT, is_camera=True)


def _open_path(text: str) -> _FolderReader | _VideoReader:
    if not text:
        raise SourceError(
            "source: expected a video file, a folder of pictures, a camera number, a URL or a "
            "GStreamer pipeline, got an empty text; name one"
        )
    path = Path(text)
    if path.is_dir():
        return _FolderReader(path)
    if not path.exists():
        raise SourceError(
            f"{text}: expected a video file, a folder of pictures, a camera number, a URL or a "
            "GStreamer pipeline, got no such file or folder; check the path"
        )
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise SourceError(
            f"{text}: expected a video or a folder of pictures, got one picture; name its folder"
        )
    if not path.is_char_device():
        return _VideoReader(text)
    if not _CAMERA_DEVICE.fullmatch(str(path.resolve())):
        raise SourceError(
            f"{text}: expected a video, a folder of pictures or a camera (/dev/video*), got "
            "another device; check the path"
        )
    return _VideoReader(text, hint=_CAMERA_HINT, is_camera=True)


def _natural_key(path: Path) -> list[tuple[bool, int, str]]:
    """Sort key under which ``2.jpg`` comes before ``10.jpg``."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(not p[0].isdecimal(), int(p) if p[0].isdecimal() else 0, p) for p in parts]


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
