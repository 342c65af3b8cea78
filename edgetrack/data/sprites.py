"""Sprites: random textured silhouettes that can be drawn at any pose.

Frame coordinates are continuous: pixel ``i`` covers ``[i, i + 1)``.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetrack.errors import package_missing

try:
    import cv2
except ImportError as error:
    raise package_missing("cv2", error) from error

__all__ = ["Pose", "Sprite", "random_outline", "random_texture"]

Frame = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

# cv2.fillPoly draws up to one pixel beyond an edge; this makes it a sixteenth.
MASK_OVERSAMPLING = 16
# A car seen from its side, bonnet to the right.
CAR_OUTLINE = np.array(
    [
        *[(0.0, 0.72), (0.0, 0.5), (0.06, 0.42), (0.2, 0.36), (0.3, 0.08), (0.38, 0.02)],
        *[(0.62, 0.02), (0.7, 0.08), (0.82, 0.38), (0.95, 0.44), (1.0, 0.54), (1.0, 0.72)],
        *[(0.9, 0.76), (0.86, 0.88), (0.78, 0.92), (0.7, 0.88), (0.66, 0.76), (0.36, 0.76)],
        *[(0.32, 0.88), (0.24, 0.92), (0.16, 0.88), (0.12, 0.76)],
    ]
) * (2.0, 1.0)


@dataclass(frozen=True)
class Pose:
    """Where a sprite is: centre in frame pixels, scale, angle (clockwise, as the y axis is down).

    Attributes:
        x_px: Centre, from the left edge of the frame.
        y_px: Centre, from its top edge.
        scale: 1 is the size at which the sprite was made.
        angle_rad: Rotation.
    """

    x_px: float
    y_px: float
    scale: float = 1.0
    angle_rad: float = 0.0


class Sprite:
    """A textured silhouette that can be drawn at any pose.

    Args:
        outline_px: Corners ``(P, 2)`` of the silhouette, relative to its centre, pixels.
        rng: Draws the texture.
    """

    def __init__(self, outline_px: Float64Array, *, rng: np.random.Generator) -> None:
        self.outline_px = outline_px
        self._half = math.ceil(float(np.abs(outline_px).max())) + 2
        side = 2 * self._half
        corners = (outline_px + self._half) * MASK_OVERSAMPLING - 0.5
        mask = np.zeros((side * MASK_OVERSAMPLING, side * MASK_OVERSAMPLING), np.uint8)
        cv2.fillPoly(mask, [np.round(corners * 256).astype(np.int32)], 255, shift=8)
        alpha = cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA)
        self._bgra = np.dstack([random_texture(rng, side, side, num_shapes=8), alpha])

    def bbox_at(self, pose: Pose) -> Float32Array:
        """The tight box ``(4,)`` of the silhouette at a pose, xywh, frame pixels."""
        corners = self.outline_px @ _rotation(pose).T + (pose.x_px, pose.y_px)
        low, high = corners.min(0), corners.max(0)
        return np.concatenate([low, high - low]).astype(np.float32)

    def draw(self, pose: Pose, *, blur_xy_px: tuple[float, float] = (0.0, 0.0), out: Frame) -> None:
        """Draw the sprite.

        Args:
            pose: Where.
            blur_xy_px: How far it moves while the shutter is open.
            out: Written: the frame ``(H, W, 3)``; what lies outside it is cut.
        """
        x, y, w, h = self.bbox_at(pose).tolist()
        margin = 2 + math.ceil(math.hypot(*blur_xy_px) / 2)
        left, top = max(math.floor(x) - margin, 0), max(math.floor(y) - margin, 0)
        right = min(math.ceil(x + w) + margin, out.shape[1])
        bottom = min(math.ceil(y + h) + margin, out.shape[0])
        if right <= left or bottom <= top:
            return
        rotation = _rotation(pose)
        # cv2 puts pixel centres at whole numbers, half a pixel off from ours, on both sides.
        origin = rotation @ np.full(2, 0.5 - self._half) + (pose.x_px - left, pose.y_px - top) - 0.5
        bgra = cv2.warpAffine(
            self._bgra, np.column_stack([rotation, origin]), (right - left, bottom - top)
        )
        if math.hypot(*blur_xy_px) > 1:
            bgra = cv2.filter2D(bgra, -1, _line_kernel(blur_xy_px))
        alpha = bgra[..., 3].astype(np.float32) / 255
        region = out[top:bottom, left:right]
        region[...] = cv2.blendLinear(np.ascontiguousarray(bgra[..., :3]), region, alpha, 1 - alpha)


def random_outline(rng: np.random.Generator) -> Float64Array:
    """Draw an ellipse, blob, polygon or car, centred, whose box has unit area; ``(P, 2)``."""
    kind = rng.integers(4)
    turn = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    if kind == 2:
        turn = np.linspace(0, 2 * np.pi, rng.integers(5, 9), endpoint=False)
        turn += rng.uniform(-0.25, 0.25, len(turn))
    radius = np.ones_like(turn)
    if kind == 1:
        for order in (2, 3, 4, 5):
            radius += rng.uniform(0.05, 0.18) * np.sin(order * turn + rng.uniform(0, 6.28))
    points = np.column_stack([np.cos(turn), np.sin(turn)]) * radius[:, None]
    points[:, 0] *= rng.uniform(0.55, 1.8)
    if kind == 3:
        points = CAR_OUTLINE.copy()
    low, high = points.min(0), points.max(0)
    return np.asarray((points - (low + high) / 2) / math.sqrt((high - low).prod()))


def random_texture(rng: np.random.Generator, width: int, height: int, *, num_shapes: int) -> Frame:
    """Draw rough noise in a few muted colours, with shapes strewn over it; ``(H, W, 3)`` BGR."""
    field: Float32Array = np.zeros((height, width), np.float32)
    for cells in (3, 8, 24, 72):
        grid = (rng.uniform(0, 1, (cells, cells)) / cells**0.6).astype(np.float32)
        cv2.add(field, cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), dst=field)
    levels = ((field - field.min()) * (255 / np.ptp(field))).astype(np.uint8)
    palette = cv2.resize(_muted_colours(rng, 5)[:, None], (1, 256))
    image = cv2.applyColorMap(levels, palette)
    side_px = math.sqrt(width * height)
    for colour in _muted_colours(rng, num_shapes).tolist():
        centre = (rng.uniform(0, 1, 2) * (width, height)).tolist()
        axes = (rng.uniform(0.02, 0.14, 2) * side_px).tolist()
        shape = (centre, axes, rng.uniform(0, 360))
        if rng.uniform() < 0.5:
            cv2.ellipse(image, shape, colour, -1, cv2.LINE_AA)
        else:
            cv2.fillConvexPoly(image, cv2.boxPoints(shape).astype(np.int32), colour, cv2.LINE_AA)
    return np.asarray(image, np.uint8)


def _muted_colours(rng: np.random.Generator, count: int) -> Frame:
    """Greys with a tint ``(count, 3)``: real scenes are seldom saturated."""
    grey = rng.uniform(20, 235, (count, 1))
    return np.clip(grey + rng.normal(0, 32, (count, 3)), 0, 255).astype(np.uint8)


def _rotation(pose: Pose) -> Float64Array:
    """Rotation and scale as a matrix ``(2, 2)``."""
    cos, sin = math.cos(pose.angle_rad) * pose.scale, math.sin(pose.angle_rad) * pose.scale
    return np.array([[cos, -sin], [sin, cos]])


def _line_kernel(blur_xy_px: tuple[float, float]) -> Float32Array:
    """A line of unit sum, centred, of the given extent."""
    half = math.ceil(max(map(abs, blur_xy_px)) / 2)
    kernel = np.zeros((2 * half + 1, 2 * half + 1), np.uint8)
    # In 1/256 pixels, as cv2.line takes them.
    end = np.round(np.array(blur_xy_px) / 2 * 256).astype(int)
    first, last = (half * 256 - end).tolist(), (half * 256 + end).tolist()
    cv2.line(kernel, first, last, 255, lineType=cv2.LINE_AA, shift=8)
    return np.asarray(kernel / kernel.sum(), np.float32)
