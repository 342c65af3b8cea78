"""Early-exit single-object tracking for edge devices.

What needs OpenCV is resolved on first use, so that ``import edgetrack`` needs NumPy alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from edgetrack.build import build
from edgetrack.bundle import Bundle
from edgetrack.errors import EdgeTrackError
from edgetrack.runtime.frame_source import GpuFrame
from edgetrack.runtime.policies import ExitPolicy

if TYPE_CHECKING:
    from edgetrack.frames import read_frames
    from edgetrack.tracker import Tracker, TrackResult

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "EdgeTrackError",
    "ExitPolicy",
    "GpuFrame",
    "TrackResult",
    "Tracker",
    "build",
    "read_frames",
]

_HOMES = {
    "TrackResult": "edgetrack.tracker",
    "Tracker": "edgetrack.tracker",
    "read_frames": "edgetrack.frames",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgetrack' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
