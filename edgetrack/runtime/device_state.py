"""The memory that the host shares with the kernels of ``kernels/frame.cu``, as NumPy dtypes.

Each dtype is a struct of the same name there, byte for byte; boxes are xywh in frame pixels. The
``pack_*`` functions turn what a host tracker holds into such a struct.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.bundle import CropSpec
from edgetrack.crops import CropWindow
from edgetrack.runtime.policies import CRITERIA, ExitPolicy
from edgetrack.runtime.target import TargetRules, TargetState

__all__ = [
    "DECISION",
    "FORMATS",
    "KERNEL_NAMES",
    "RESULT",
    "RING",
    "RULES",
    "SOURCE",
    "TARGET",
    "WINDOW",
    "pack_decision",
    "pack_rules",
    "pack_target",
    "read_ptx",
]

RING = 4
"""Frames in flight: frame n, from 1, has slot n % RING of ``SOURCE`` and ``RESULT``."""

FORMATS: Mapping[str, int] = MappingProxyType(
    {
        "bgr8": 0,
        "rgb8": 1,
        "gray8": 2,
        "bgra8": 3,
        "nv12-bt601": 4,  # limited range, as decoders give it
        "nv12-bt709": 5,
        "rgba8": 6,
    }
)
"""Pixel formats that the crop kernel reads, and the number that ``SOURCE`` holds for each."""

KERNEL_NAMES = (
    "edgetrack_crop",
    "edgetrack_gate",
    "edgetrack_gate_with_head",
    "edgetrack_gate_flag",
    "edgetrack_settle",
    "edgetrack_tell",
    "edgetrack_carry",
    "edgetrack_probe",
)

WINDOW = np.dtype([("left_px", "<i4"), ("top_px", "<i4"), ("side_px", "<i4")])

SOURCE = np.dtype(
    [
        ("pixels", "<u8"),
        ("chroma", "<u8"),
        ("width_px", "<i4"),
        ("height_px", "<i4"),
        ("pitch_bytes", "<i4"),
        ("chroma_pitch_bytes", "<i4"),
        ("format", "<i4"),
        ("padding", "<i4", (7,)),
    ]
)

_BBOX = [("x", "<f4"), ("y", "<f4"), ("w", "<f4"), ("h", "<f4")]

TARGET = np.dtype(
    [
        *_BBOX,
        ("num_unsure", "<i4"),
        ("is_lost", "<i4"),
        ("window", WINDOW),
        ("frame_index", "<i4"),
        ("exit_index", "<i4"),
        ("is_sane", "<i4"),
        ("corner_x_px", "<f4"),
        ("corner_y_px", "<f4"),
        ("padding", "<i4", (2,)),
    ]
)

RULES = np.dtype(
    [
        ("centre_smoothing", "<f8"),
        ("size_smoothing", "<f8"),
        ("max_size_change", "<f8"),
        ("unsure_score", "<f8"),
        ("search_growth", "<f8"),
        ("size_hold", "<f8"),
        ("found_score", "<f8"),
        ("look_around", "<f8"),
        ("search_factor", "<f8"),
        ("template_factor", "<f8"),
        ("patience", "<i4"),
        ("lost_after", "<i4"),
        ("width_px", "<i4"),
        ("height_px", "<i4"),
        ("is_ostrack", "<i4"),
        ("padding", "<i4"),
    ]
)

_MAX_THRESHOLDS = 8
DECISION = np.dtype(
    [
        ("weight", "<f8"),
        ("score_weight", "<f8"),
        ("thresholds", "<f8", (_MAX_THRESHOLDS,)),
        ("num_exits", "<i4"),
        ("padding", "<i4"),
    ]
)

RESULT = np.dtype(
    [
        *_BBOX,
        ("score", "<f4"),
        ("uncertainty", "<f4"),
        ("exit_index", "<i4"),
        ("is_lost", "<i4"),
        ("window", WINDOW),
        ("answer", "<f4", (4,)),
        ("sequence", "<u4"),
    ]
)

_NEVER = 2**30  # frames; more than a year at 30 per second
_PTX_PATH = Path(__file__).parent / "kernels" / "frame.ptx"


def pack_rules(
    rules: TargetRules, *, crops: CropSpec, frame_shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    """What ``edgetrack_settle`` needs beside the answer.

    Args:
        rules: How answers become the target's state.
        crops: The bundle's.
        frame_shape: ``(H, W, …)`` of all frames.

    Returns:
        ``RULES``, shape ``()``.
    """
    packed = np.zeros((), RULES)
    for field in dataclasses.fields(rules):
        value = getattr(rules, field.name)
        # Counts are compared with whole numbers, so a patience of 2.5 is one of 3.
        is_count = RULES[field.name].kind == "i"
        packed[field.name] = math.ceil(min(value, _NEVER)) if is_count else value
    packed["search_factor"], packed["template_factor"] = crops.search_factor, crops.template_factor
    packed["is_ostrack"] = crops.geometry == "ostrack"
    packed["height_px"], packed["width_px"] = frame_shape[:2]
    return packed


def pack_decision(policy: ExitPolicy, num_exits: int) -> npt.NDArray[Any]:
    """What the gate kernels compare with.

    Args:
        policy: When to stop early.
        num_exits: Exits of the bundle, at most 9.

    Returns:
        ``DECISION``, shape ``()``.

    Raises:
        TypeError: The policy decides by code of its own, which a device cannot run.
        ValueError: It has not one threshold per exit but the last, or there are too many exits.
    """
    if type(policy).should_exit is not ExitPolicy.should_exit:
        raise TypeError(
            "exit_policy: expected thresholds alone, got a should_exit of "
            f"{type(policy).__name__}; make the tracker with exit_decision='host'"
        )
    if len(policy.thresholds) != num_exits - 1:
        raise ValueError(
            f"exit_policy: expected {num_exits - 1} thresholds, got {len(policy.thresholds)}"
        )
    if num_exits - 1 > _MAX_THRESHOLDS:
        raise ValueError(
            f"num_exits: expected at most {_MAX_THRESHOLDS + 1} on a device, got {num_exits}; "
            "make the tracker with exit_decision='host'"
        )
    packed = np.zeros((), DECISION)
    packed["weight"], packed["score_weight"] = CRITERIA[policy.criterion]
    packed["thresholds"][: num_exits - 1] = policy.thresholds
    packed["num_exits"] = num_exits
    return packed


def pack_target(state: TargetState, window: CropWindow, frame_index: int) -> npt.NDArray[Any]:
    """A target between two frames.

    Args:
        state: Its box, and how sure the tracker is of it.
        window: Where to look in the next frame.
        frame_index: Frames settled so far.

    Returns:
        ``TARGET``, shape ``()``.
    """
    packed = np.zeros((), TARGET)
    packed["x"], packed["y"], packed["w"], packed["h"] = state.bbox_xywh
    packed["num_unsure"], packed["is_lost"] = state.num_unsure, state.is_lost
    packed["window"] = (window.left_px, window.top_px, window.side_px)
    packed["corner_x_px"] = window.left_px + window.shift_x_px
    packed["corner_y_px"] = window.top_px + window.shift_y_px
    packed["frame_index"] = frame_index
    return packed


def read_ptx() -> bytes:
    """The kernels as PTX, with the zero byte at its end by which a driver knows where it ends."""
    return _PTX_PATH.read_bytes() + b"\0"
