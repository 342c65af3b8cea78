"""Videos, cameras and streams through OpenCV, and which way to open each."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from edgetrack.errors import SourceEndedError, SourceError, package_missing
from edgetrack.frames.gstreamer import (
    APPSINK,
    Camera,
    csi_pipeline,
    missing_element,
    rtsp_pipeline,
    shown,
    v4l2_pipelines,
)
from edgetrack.frames.live import Frame, LiveReader

try:
    import cv2
except ImportError as error:
    raise package_missing("cv2", error) from error

__all__ = [
    "Origin",
    "VideoReader",
    "open_camera",
    "open_csi",
    "open_pipeline",
    "open_stream",
    "open_v4l2",
]

# Containers without an exact frame count (WebM, TS) give duration times rate, which can be
# a few frames too many, and more where the sound outlasts the pictures.
MISSING_FRAMES_ALLOWED = 2
MISSING_FRACTION_ALLOWED = 0.05
# From 100 on, OpenCV takes a camera number for a number plus the code of a video interface.
LAST_CAMERA = 99
# Argus starts, or a stream sends its next key frame, within this time.
OPEN_TIMEOUT_S = 20.0
# OpenCV before it refuses to open a pipeline with timeouts.
FIRST_WITH_GSTREAMER_TIMEOUTS = (4, 8)

_VIDEO_HINT = (
    "it is empty, no video, or cut off (an mp4 without its end has no index); re-encode it"
)
_CAMERA_HINT = "check that it is plugged in and readable, and that no other program uses it"
_CSI_HINT = (
    "check its cable and its sensor id, that no other program uses it, and that the Jetson's "
    "camera service runs: sudo systemctl restart nvargus-daemon"
)
_STREAM_HINT = (
    "check the address, the name and password in it, the network, and that it is streaming"
)
_PIPELINE_HINT = "check the pipeline with gst-launch-1.0"
_ELEMENT_HINT = (
    "check its name, and run: sudo apt install gstreamer1.0-plugins-good gstreamer1.0-plugins-bad "
    "gstreamer1.0-libav"
)
_JETSON_ELEMENT_HINT = (
    "it comes with JetPack (package nvidia-l4t-gstreamer); a container needs --runtime nvidia"
)
_BGR_HINT = f"end the pipeline in: videoconvert ! video/x-raw,format=BGR ! {APPSINK}"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What messages say of a source, and how long to wait for its frames."""

    name: str
    hint: str
    timeout_s: float
    is_camera: bool = False


class VideoReader:
    """A video file, camera or stream through ``cv2.VideoCapture``."""

    def __init__(
        self, source: str | int, *, api: int = cv2.CAP_ANY, origin: Origin | None = None
    ) -> None:
        self._name = str(source) if origin is None else origin.name
        self._is_camera = origin is not None and origin.is_camera
        self._capture = cv2.VideoCapture(source, api, _timeouts(api, origin))
        if not self._capture.isOpened():
            hint = _VIDEO_HINT if origin is None else origin.hint
            raise SourceError(f"{self._name}: expected to open it, got a refusal; {hint}")
        fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        count = float(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.fps: float | None = fps if math.isfinite(fps) and fps > 0 else None
        self.num_frames = int(count) if not self._is_camera and 0 < count < 1e12 else None
        self._num_read = 0
        self._position_ms = 0.0

    def ask_for(self, camera: Camera) -> None:
        """Ask a V4L2 camera for its pictures; it takes what comes nearest."""
        if camera.format != "raw":
            self._capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG"))
        self._capture.set(cv2.CAP_PROP_FRAME_WIDTH, camera.width_px)
        self._capture.set(cv2.CAP_PROP_FRAME_HEIGHT, camera.height_px)
        self._capture.set(cv2.CAP_PROP_FPS, camera.fps)

    def read(self) -> Frame | None:
        """The next frame; ``None`` at the end.

        Raises:
            SourceError: It is not BGR, or ``SourceEndedError`` at an end that was not announced.
        """
        is_read, frame = self._capture.read()
        if not is_read:
            self._check_end()
            return None
        if frame.ndim != 3 or frame.shape[2] != 3:
            raise SourceError(
                f"{self._name}: expected frames (H, W, 3), got {frame.shape}; {_BGR_HINT}"
            )
        self._num_read += 1
        if self.num_frames is not None:
            self._position_ms = float(self._capture.get(cv2.CAP_PROP_POS_MSEC))
        return np.asarray(frame, np.uint8)

    def close(self) -> None:
        """Release the source."""
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


def open_camera(number: int | str, timeout_s: float) -> LiveReader:
    """A camera by its number; OpenCV crashes at some that cannot be one."""
    digits = str(number).lstrip("0") or "0"
    if isinstance(number, bool) or not digits.isdecimal() or len(digits) > len(str(LAST_CAMERA)):
        raise SourceError(
            f"camera {number}: expected a camera number from 0 to {LAST_CAMERA}, got {number}; "
            "list the cameras with: ls /dev/video*"
        )
    return open_v4l2(Camera(kind="v4l2", device=digits), f"camera {number}", timeout_s)


def open_v4l2(camera: Camera, name: str, timeout_s: float) -> LiveReader:
    """A V4L2 camera: through GStreamer where OpenCV has it, else or failing that by OpenCV."""
    origin = Origin(name=name, hint=_CAMERA_HINT, timeout_s=timeout_s, is_camera=True)
    is_number = camera.device.isdecimal()
    device = Path(f"/dev/video{camera.device}" if is_number else camera.device).resolve()
    if sys.platform == "linux" and not device.is_char_device():
        raise SourceError(f"{name}: expected a camera at {device}, got none; {_CAMERA_HINT}")
    number = str(device).removeprefix("/dev/video")
    if not number.isdecimal() or len(number) > len(str(LAST_CAMERA)):
        raise SourceError(
            f"{name}: expected a video, a folder of pictures or a camera (/dev/video*), got "
            "another device; check the path"
        )
    openings = _through_gstreamer(
        v4l2_pipelines(camera, device=str(device), is_jetson=_is_jetson()), origin
    )

    def open_plain() -> VideoReader:
        api = cv2.CAP_V4L2 if _has(cv2.CAP_V4L2) else cv2.CAP_ANY
        reader = VideoReader(int(number), api=api, origin=origin)
        reader.ask_for(camera)
        return reader

    return _live(origin, [*openings, open_plain])


def open_csi(camera: Camera, name: str, timeout_s: float) -> LiveReader:
    """A CSI camera of a Jetson; only GStreamer has a way to it."""
    origin = Origin(name=name, hint=_CSI_HINT, timeout_s=timeout_s, is_camera=True)
    _check_gstreamer(name)
    return _live(origin, _through_gstreamer([csi_pipeline(camera)], origin))


def open_pipeline(pipeline: str, timeout_s: float) -> LiveReader:
    """A pipeline as a person wrote it."""
    origin = Origin(name=shown(pipeline), hint=_PIPELINE_HINT, timeout_s=timeout_s)
    if "appsink" not in pipeline:
        raise SourceError(
            f"{origin.name}: expected a pipeline that ends in appsink, got another; {_BGR_HINT}"
        )
    _check_gstreamer(origin.name)
    return _live(origin, _through_gstreamer([pipeline], origin))


def open_stream(address: str, timeout_s: float) -> LiveReader:
    """A stream's URL: RTSP through GStreamer where OpenCV has it, all else through FFmpeg."""
    origin = Origin(name=shown(address), hint=_STREAM_HINT, timeout_s=timeout_s)
    openings: list[Callable[[], VideoReader]] = []
    if address.startswith(("rtsp://", "rtsps://")):
        pipeline, address = rtsp_pipeline(address, is_jetson=_is_jetson())
        openings += _through_gstreamer([pipeline], origin)
    api = cv2.CAP_FFMPEG if _has(cv2.CAP_FFMPEG) else cv2.CAP_ANY
    return _live(origin, [*openings, partial(VideoReader, address, api=api, origin=origin)])


def _through_gstreamer(pipelines: Sequence[str], origin: Origin) -> list[Callable[[], VideoReader]]:
    if not _has(cv2.CAP_GSTREAMER):
        return []
    return [partial(_open_gstreamer, p, origin) for p in pipelines]


def _open_gstreamer(pipeline: str, origin: Origin) -> VideoReader:
    missing = missing_element(pipeline)
    if missing is not None:
        hint = _JETSON_ELEMENT_HINT if missing.startswith("nv") else _ELEMENT_HINT
        raise SourceError(
            f"{origin.name}: expected GStreamer to have the element {missing}, got none; {hint}"
        )
    return VideoReader(pipeline, api=cv2.CAP_GSTREAMER, origin=origin)


def _live(origin: Origin, openings: Sequence[Callable[[], VideoReader]]) -> LiveReader:
    return LiveReader(
        origin.name,
        openings,
        hint=origin.hint,
        timeout_s=origin.timeout_s,
        open_timeout_s=OPEN_TIMEOUT_S,
    )


def _check_gstreamer(name: str) -> None:
    if not _has(cv2.CAP_GSTREAMER):
        raise SourceError(
            f"{name}: expected an OpenCV with GStreamer, got {cv2.__version__} without it; "
            "edgetrack doctor says which OpenCV is used; on a Jetson use the system's own, in a "
            "venv made with --system-site-packages and without an opencv wheel"
        )


def _has(api: int) -> bool:
    return bool(cv2.videoio_registry.hasBackend(api))


def _is_jetson() -> bool:
    return Path("/etc/nv_tegra_release").is_file()


def _timeouts(api: int, origin: Origin | None) -> list[int]:
    """Parameters under which a thread that hangs in OpenCV comes back, where OpenCV has them."""
    version = tuple(int(n) for n in cv2.__version__.split(".")[:2])
    has_them = api == cv2.CAP_FFMPEG or (
        api == cv2.CAP_GSTREAMER and version >= FIRST_WITH_GSTREAMER_TIMEOUTS
    )
    if origin is None or not has_them:
        return []
    # Later than the waits of LiveReader, which say what to check.
    opening_ms, reading_ms = (round(1000 * (1 + t)) for t in (OPEN_TIMEOUT_S, origin.timeout_s))
    return [
        *(cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, opening_ms),
        *(cv2.CAP_PROP_READ_TIMEOUT_MSEC, reading_ms),
    ]
