"""What a tracker hands a frame to: crop, segments, decisions and state, on the host or on a device.

``host_loop`` does all of it with NumPy and a CPU backend, ``device_loop`` on a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgetrack.runtime.policies import ExitPolicy

__all__ = ["EXIT_DECISIONS", "Loop", "PendingResult", "TrackResult", "checked_array"]

EXIT_DECISIONS = ("auto", "device", "flag", "host")


@dataclass(frozen=True)
class TrackResult:
    """Where the target is in one frame.

    Attributes:
        bbox: x, y, w, h in frame pixels, top-left origin; a guess while the target is lost.
        score: Confidence in [0, 1].
        is_lost: Whether the target counts as lost: unsure for some frames, and not found since.
        uncertainty: Of the exit that was taken, in [0, 1]: the normalised entropy of its box edges,
            or what else the family has (see its module).
        exit_index: The exit that was taken, from 0.
        latency_ms: From handing in the frame to taking its result, crop included.
    """

    bbox: tuple[float, float, float, float]
    score: float
    is_lost: bool
    uncertainty: float
    exit_index: int
    latency_ms: float


class PendingResult(Protocol):
    """An answer that may still be on its way."""

    @property
    def is_done(self) -> bool:
        """Whether ``result`` returns at once."""

    def result(self) -> TrackResult:
        """Wait for the answer; it may be asked for again, at any time, from any thread.

        Raises:
            DeviceError: The device failed; the tracker keeps its last box.
        """


class Loop(Protocol):
    """All that happens to frames between a tracker's arguments and its results."""

    @property
    def exit_decision(self) -> str:
        """Who decides to stop: ``host``, ``flag`` or ``device``."""

    @property
    def memory_bytes(self) -> int:
        """Device memory that it holds; 0 on a CPU."""

    @property
    def bbox(self) -> npt.NDArray[np.float32] | None:
        """The last box that is known, xywh, frame pixels, ``(4,)``; ``None`` before ``start``."""

    @property
    def stage_ms(self) -> Mapping[str, float]:
        """Time of each stage of the last frame, as far as it was measured."""

    def check(self, frame: Any) -> Any:
        """The frame as the loop takes it; what comes back has a ``shape`` ``(H, W, …)``.

        Raises:
            TypeError: It is not a frame, or lies on the wrong device.
            ValueError: It has a wrong shape.
        """

    def start(self, frame: Any, bbox_xywh: npt.NDArray[np.float32]) -> None:
        """Begin on a checked frame."""

    def submit(self, frame: Any, policy: ExitPolicy) -> PendingResult:
        """Take the next checked frame, of the same shape."""

    def read_answer(self) -> npt.NDArray[np.float32]:
        """The box that the last exit gave, before any rule: xywh, frame pixels, ``(4,)``."""

    def check_policy(self, policy: ExitPolicy) -> None:
        """Refuse a policy that this loop cannot decide by.

        Raises:
            TypeError: It decides in Python, where no Python runs.
        """

    def close(self) -> None:
        """Free everything; calling it twice is fine."""


def checked_array(frame: Any) -> npt.NDArray[np.uint8]:
    """A frame in host memory that can be cropped.

    Raises:
        TypeError: It is not a uint8 array.
        ValueError: Its shape is not ``(H, W)`` or ``(H, W, C)`` with 1, 3 or 4 channels.
    """
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
        if not isinstance(frame, np.ndarray):
            got, hint = type(frame).__name__, "pass frames as OpenCV or read_frames gives them"
        else:
            got, hint = f"dtype {frame.dtype}", "scale it to 0..255 and convert"
        raise TypeError(f"frame: expected a uint8 array, got {got}; {hint}")
    channels = frame.shape[2] if frame.ndim == 3 else 1
    if frame.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in frame.shape:
        raise ValueError(
            "frame: expected shape (H, W, 3) BGR, (H, W) or (H, W, 1) grey, or (H, W, 4) BGRA, "
            f"got {frame.shape}"
        )
    if min(frame.strides) < 0:
        return np.ascontiguousarray(frame)
    return frame
