"""Frames from a video, a folder of pictures, a camera or a stream; frames to a video.

A frame is BGR, uint8, ``(H, W, 3)``, as OpenCV gives it. All frames of one source have one size.
OpenCV's FFmpeg reader scales the later frames of a video to the size of its first one.
Files give every frame, in the caller's time; cameras and streams give the newest (``live.py``).
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from edgetrack.errors import FrameSizeError, SourceError
from edgetrack.frames.capture import (
    VideoReader,
    open_camera,
    open_csi,
    open_pipeline,
    open_stream,
    open_v4l2,
)
from edgetrack.frames.gstreamer import Camera, parse_camera, shown
from edgetrack.frames.live import Frame, LiveReader
from edgetrack.frames.pictures import IMAGE_SUFFIXES, FolderReader, image_paths, read_image
from edgetrack.frames.sink import VideoSink

__all__ = ["FrameSource", "VideoSink", "image_paths", "read_frames", "read_image"]

Source = str | bytes | os.PathLike[str] | int


def read_frames(source: Source, *, timeout_s: float = 5.0) -> "FrameSource":
    """Open a source and iterate over its frames.

    Args:
        source: A video file, a folder of pictures (sorted naturally: 2 before 10), a camera
            number from 0 to 99 (``0`` or ``"0"``) or its path, ``csi://…``, ``v4l2://…`` or
            ``rtsp://…`` as ``edgetrack.gstreamer`` reads them, another stream's URL, or a
            GStreamer pipeline that ends in ``appsink``, with or without ``gst:`` before it.
        timeout_s: Longest wait for a frame of a camera or stream; its first may take 20 s.

    Returns:
        An iterator of frames, ``(H, W, 3)`` uint8 BGR, each its own memory; also a context
        manager with ``fps``, ``num_frames``, ``size``, ``is_live`` and ``num_dropped``.

    Raises:
        SourceError: The source is missing or cannot be read. While iterating: a camera or stream
            gave no frame in time, ``SourceEndedError`` after the last frame of a video that is
            cut off or of a camera, ``FrameSizeError`` when frames change size.
        ValueError: ``timeout_s`` is not positive.
    """
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise ValueError(f"timeout_s: expected a positive number, got {timeout_s!r}")
    return FrameSource(source, timeout_s=timeout_s)


class FrameSource:
    """An open source: iterator of frames and context manager.

    It is opened, and its first frame decoded, at construction. It closes itself at its end.
    A live source gives the newest frame and drops those that came before it in the meantime.

    Attributes:
        fps: Frames per second as the source declares it; ``None`` when unknown.
        num_frames: Frames as the source declares it; ``None`` when unknown, as for a camera.
        size: Width and height in pixels.
        is_live: Frames come in the source's time, not in the caller's.
    """

    def __init__(self, source: Source, *, timeout_s: float) -> None:
        self._name = str(source) if isinstance(source, int) else shown(os.fsdecode(source))
        self._reader = _open(source, timeout_s)
        self._first: Frame | None = None
        self._next_index = 0
        self._is_closed = False
        try:
            if isinstance(self._reader, LiveReader):
                # It stays in its slot: when it is asked for, there may be a newer one.
                first = self._reader.peek()
            else:
                first = self._first = self._reader.read()
            if first is None:
                raise SourceError(
                    f"{self._name}: expected at least one frame, got none; it may be damaged or "
                    "in a codec that this OpenCV cannot decode, try to re-encode it"
                )
        except BaseException:
            self.close()
            raise
        self.fps = self._reader.fps
        self.num_frames = self._reader.num_frames
        self.size = (first.shape[1], first.shape[0])
        self.is_live = isinstance(self._reader, LiveReader) and self.num_frames is None

    @property
    def num_dropped(self) -> int:
        """Frames of a live source that were replaced by newer ones before they were asked for."""
        return self._reader.num_dropped if isinstance(self._reader, LiveReader) else 0

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


def _open(source: Source, timeout_s: float) -> FolderReader | VideoReader | LiveReader:
    if isinstance(source, int):
        return open_camera(source, timeout_s)
    text = os.fsdecode(source)
    if text.removeprefix("-").isdecimal():
        return open_camera(text, timeout_s)
    # A pipeline may hold an address, but does not start with one.
    if text.startswith("gst:") or (" ! " in text and "://" not in text.partition(" ")[0]):
        return open_pipeline(text.removeprefix("gst:").strip(), timeout_s)
    if text.startswith("csi://"):
        return open_csi(parse_camera(text), text, timeout_s)
    if text.startswith("v4l2://"):
        return open_v4l2(parse_camera(text), text, timeout_s)
    if text.startswith("file:"):
        return VideoReader(text)
    return open_stream(text, timeout_s) if "://" in text else _open_path(text, timeout_s)


def _open_path(text: str, timeout_s: float) -> FolderReader | VideoReader | LiveReader:
    if not text:
        raise SourceError(
            "source: expected a video file, a folder of pictures, a camera number, a URL or a "
            "GStreamer pipeline, got an empty text; name one"
        )
    path = Path(text)
    if path.is_dir():
        return FolderReader(path)
    if not path.exists():
        raise SourceError(
            f"{text}: expected a video file, a folder of pictures, a camera number, a URL or a "
            "GStreamer pipeline, got no such file or folder; check the path"
        )
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise SourceError(
            f"{text}: expected a video or a folder of pictures, got one picture; name its folder"
        )
    if path.is_char_device():
        return open_v4l2(Camera(kind="v4l2", device=text), text, timeout_s)
    return VideoReader(text)
