"""Template and search-region crops, and the map back to the frame.

The geometry is OSTrack's (Ye et al., ECCV 2022, arXiv 2203.11991): a square window of side
``ceil(sqrt(w * h) * factor)`` at whole pixels around the target, zeros outside the frame, and a
bilinear resize. Three differences: the map back uses the window that was really cut, where
OSTrack ignores the rounding of its corner (up to half a pixel); the frame's last column and row
are kept where the window reaches the right or bottom border, where OSTrack blanks them; and large
windows are sampled without a padded copy. A bundle whose manifest says ``geometry: ostrack`` gets
the crops that its weights were published with, all three included.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.errors import package_missing

try:
    import cv2
except ImportError as error:
    raise package_missing("cv2", error) from error

__all__ = ["CropWindow", "Cropper", "to_rgb"]

_OSTRACK = "ostrack"

# A padded copy of a larger window would cost more than the network: 100 MB for a target that fills
# a 1080p frame. Such a window is sampled straight from the frame, to 1/32 of a pixel.
_LARGE_SIDE_PX = 1024

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CropWindow:
    """A square window of the frame, in whole pixels; it may reach outside the frame.

    Attributes:
        left_px: Left edge.
        top_px: Top edge.
        side_px: Side, at least 1.
        shift_x_px: What maps between frame and crop add to the left edge: with OSTrack's geometry
            they take the edge before it was rounded.
        shift_y_px: The same of the top edge.
    """

    left_px: int
    top_px: int
    side_px: int
    shift_x_px: float = 0.0
    shift_y_px: float = 0.0

    @classmethod
    def around(
        cls, bbox_xywh: npt.NDArray[Any], *, factor: float, geometry: str = "edgetrack"
    ) -> "CropWindow":
        """The window around a box, ``factor`` times the root of its area wide.

        Args:
            bbox_xywh: Frame pixels, ``(4,)``.
            factor: Side over the root of the box's area.
            geometry: ``bundle.CropSpec.geometry``.
        """
        x, y, w, h = (float(v) for v in bbox_xywh)
        side = max(math.ceil(math.sqrt(w * h) * factor), 1)
        left, top = x + w / 2 - side / 2, y + h / 2 - side / 2
        if geometry == _OSTRACK:
            return cls(round(left), round(top), side, left - round(left), top - round(top))
        return cls(round(left), round(top), side)

    def is_inside(self, frame_shape: tuple[int, ...]) -> bool:
        """Whether a frame ``(H, W, …)`` holds the whole window."""
        right, bottom = self.left_px + self.side_px, self.top_px + self.side_px
        return (
            min(self.left_px, self.top_px) >= 0
            and right <= frame_shape[1]
            and bottom <= frame_shape[0]
        )

    def to_crop(self, bbox_xywh: npt.NDArray[Any]) -> Float32Array:
        """Frame pixels, xywh → cxcywh normalised to the crop; boxes ``(..., 4)``."""
        x, y, w, h = np.moveaxis(np.asarray(bbox_xywh, np.float32), -1, 0)
        centre_x, centre_y = x + w / 2 - self._corner_px[0], y + h / 2 - self._corner_px[1]
        boxes = np.stack([centre_x, centre_y, w, h], -1) / self.side_px
        return boxes.astype(np.float32)

    def to_frame(self, bbox_cxcywh: npt.NDArray[Any]) -> Float32Array:
        """Cxcywh normalised to the crop → frame pixels, xywh; boxes ``(..., 4)``."""
        boxes = np.asarray(bbox_cxcywh, np.float32) * np.float32(self.side_px)
        boxes[..., :2] -= boxes[..., 2:] / 2
        boxes[..., :2] += np.array(self._corner_px, np.float32)
        return boxes

    @property
    def _corner_px(self) -> tuple[float, float]:
        return self.left_px + self.shift_x_px, self.top_px + self.shift_y_px


class Cropper:
    """Cut square crops of one output size; memory is kept from crop to crop.

    Args:
        size_px: Side of the crops.
        geometry: ``bundle.CropSpec.geometry``.
    """

    def __init__(self, size_px: int, *, geometry: str = "edgetrack") -> None:
        self.size_px = size_px
        self._is_ostrack = geometry == _OSTRACK
        self._bgr = np.zeros((size_px, size_px, 3), np.uint8)
        self._padded = np.zeros(0, np.uint8)

    def crop(self, frame: UInt8Array, window: CropWindow, *, out: UInt8Array) -> None:
        """Cut one crop.

        Args:
            frame: uint8; ``(H, W, 3)`` BGR, ``(H, W)`` or ``(H, W, 1)`` grey, ``(H, W, 4)`` BGRA.
            window: What to cut.
            out: Written: ``(size_px, size_px, 3)``, uint8, RGB.
        """
        is_bgr = frame.ndim == 3 and frame.shape[2] == 3
        if self._is_ostrack:
            frame = frame[:-1, :-1]  # its padding is a pixel too wide: x2 - W + 1
        resized = self._resized(frame, window, dst=self._bgr if is_bgr else None)
        if is_bgr:
            cv2.cvtColor(resized, cv2.COLOR_BGR2RGB, dst=out)
        else:
            out[...] = to_rgb(resized)

    def _resized(
        self, frame: UInt8Array, window: CropWindow, *, dst: UInt8Array | None
    ) -> UInt8Array:
        size = (self.size_px, self.size_px)
        is_large = window.side_px > _LARGE_SIDE_PX and not self._is_ostrack
        if is_large and not window.is_inside(frame.shape):
            scale = window.side_px / self.size_px
            shift = (scale - 1) / 2
            matrix = np.array(
                [[scale, 0, window.left_px + shift], [0, scale, window.top_px + shift]]
            )
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            return np.asarray(cv2.warpAffine(frame, matrix, size, dst=dst, flags=flags), np.uint8)
        source = self._pixels(frame, window)
        return np.asarray(cv2.resize(source, size, dst=dst, interpolation=cv2.INTER_LINEAR))

    def _pixels(self, frame: UInt8Array, window: CropWindow) -> UInt8Array:
        """The window's pixels: a view of the frame, or a padded copy at the border."""
        height, width = frame.shape[:2]
        left, top, side = window.left_px, window.top_px, window.side_px
        x1, y1 = max(left, 0), max(top, 0)
        x2, y2 = min(left + side, width), min(top + side, height)
        if window.is_inside(frame.shape):
            return frame[y1:y2, x1:x2]
        shape = (side, side, *frame.shape[2:])
        count = math.prod(shape)
        if self._padded.size < count:
            self._padded = np.zeros(count, np.uint8)
        padded = self._padded[:count].reshape(shape)
        padded[...] = 0
        if x2 > x1 and y2 > y1:
            padded[y1 - top : y2 - top, x1 - left : x2 - left] = frame[y1:y2, x1:x2]
        return padded


def to_rgb(frame: UInt8Array) -> UInt8Array:
    """Turn a BGR, BGRA or grey frame into RGB, ``(H, W, 3)`` uint8."""
    channels = 1 if frame.ndim == 2 else frame.shape[2]
    code = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}[channels]
    return np.asarray(cv2.cvtColor(frame, code), np.uint8)
