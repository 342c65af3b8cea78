"""Boxes: conversions, checks, clipping, overlap.

Formats: ``xywh`` top-left corner and size, ``xyxy`` two corners, ``cxcywh`` centre and size.
Pixels have their origin at the top-left corner of the frame. Arrays are ``(..., 4)``.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = [
    "as_bbox_xywh",
    "clip_xywh",
    "cxcywh_to_xywh",
    "iou_xywh",
    "xywh_to_cxcywh",
    "xywh_to_xyxy",
    "xyxy_to_xywh",
]

Boxes = npt.NDArray[np.floating]


def xywh_to_cxcywh(boxes_xywh: Boxes) -> Boxes:
    """Turn corner-and-size boxes ``(..., 4)`` into centre-and-size boxes."""
    return np.concatenate([boxes_xywh[..., :2] + boxes_xywh[..., 2:] / 2, boxes_xywh[..., 2:]], -1)


def cxcywh_to_xywh(boxes_cxcywh: Boxes) -> Boxes:
    """Turn centre-and-size boxes ``(..., 4)`` into corner-and-size boxes."""
    sizes = boxes_cxcywh[..., 2:]
    return np.concatenate([boxes_cxcywh[..., :2] - sizes / 2, sizes], -1)


def xywh_to_xyxy(boxes_xywh: Boxes) -> Boxes:
    """Turn corner-and-size boxes ``(..., 4)`` into two-corner boxes."""
    return np.concatenate([boxes_xywh[..., :2], boxes_xywh[..., :2] + boxes_xywh[..., 2:]], -1)


def xyxy_to_xywh(boxes_xyxy: Boxes) -> Boxes:
    """Turn two-corner boxes ``(..., 4)`` into corner-and-size boxes."""
    return np.concatenate([boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]], -1)


def iou_xywh(a: Boxes, b: Boxes) -> Boxes:
    """Intersection over union of boxes ``(..., 4)`` that broadcast against each other.

    Returns:
        Overlaps ``(...)`` in [0, 1]; NaN where either box has a NaN; 0 where both are empty.
    """
    left_top = np.maximum(a[..., :2], b[..., :2])
    right_bottom = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    intersection = np.clip(right_bottom - left_top, 0, None).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - intersection
    # (x + w) - x can round to more than w: without the clip, equal boxes may overlap by over 1.
    return np.asarray(np.clip(intersection / np.where(union == 0, 1, union), 0, 1))


def clip_xywh(
    boxes_xywh: Boxes,
    *,
    width_px: float,
    height_px: float,
    margin_px: float = 0.0,
    min_side_px: float = 0.0,
) -> Boxes:
    """Clip boxes ``(..., 4)`` to a frame.

    A box that leaves the frame keeps a strip inside it, ``margin_px`` wide or as wide as the box
    where that is less. Sizes are at least ``min_side_px``, which is at most ``margin_px``: equal to
    it, this is OSTrack's ``clip_box``.
    """
    # Both axes at once, without np.clip: this runs once per tracked frame.
    boxes = np.asarray(boxes_xywh)
    low, size = boxes[..., :2], boxes[..., 2:]
    frame = np.array([width_px, height_px], boxes.dtype)
    least = np.minimum(np.maximum(size, min_side_px), margin_px)
    high = np.minimum(np.maximum(low + size, least), frame)
    low = np.minimum(np.maximum(low, 0), frame - least)
    return np.concatenate([low, np.maximum(high - low, least)], -1)


def as_bbox_xywh(
    bbox: Sequence[float] | Boxes, *, width_px: int, height_px: int
) -> npt.NDArray[np.float32]:
    """Check a box that a user gave for a frame.

    Args:
        bbox: Four numbers x, y, w, h in pixels.
        width_px: Width of the frame.
        height_px: Height of the frame.

    Returns:
        The box ``(4,)``, float32, a copy unchanged in value (it may stick out of the frame).

    Raises:
        ValueError: It does not hold four finite numbers, its width or height is not positive or
            over twice the frame's, or it lies outside the frame.
    """
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            box = np.array(bbox, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"bbox: expected four numbers x, y, w, h, got {bbox!r}") from None
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(
            "bbox: expected four finite numbers x, y, w, h (float32), got "
            f"{np.asarray(bbox).tolist()!r}"
        )
    x, y, w, h = box.tolist()
    if w <= 0 or h <= 0:
        raise ValueError(f"bbox: expected a positive width and height in pixels, got {w:g} x {h:g}")
    if w > 2 * width_px or h > 2 * height_px:  # a crop around it might not fit into memory
        raise ValueError(
            f"bbox: expected a box at most twice as large as the {width_px}x{height_px} frame, "
            f"got {w:g} x {h:g}; w and h are a width and a height in pixels"
        )
    if x >= width_px or y >= height_px or x + w <= 0 or y + h <= 0:
        raise ValueError(
            f"bbox: expected a box that overlaps the {width_px}x{height_px} frame, "
            f"got x={x:g} y={y:g} w={w:g} h={h:g}; x and y are the top-left corner in pixels"
        )
    return box
