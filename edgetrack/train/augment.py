"""Augmentation of training crops: geometry, light, blur, occluders, distractors.

Coordinates are continuous: the centre of pixel ``i`` lies at ``i + 0.5``, so a box maps exactly.
Everything random takes a ``numpy.random.Generator``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edgetrack.crops import CropWindow

__all__ = [
    "Augmentation",
    "View",
    "add_distractors",
    "add_occluder",
    "change_light",
    "paste",
    "rotate_cutout",
]

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Rng = np.random.Generator

_HALF_SCALE = 0.5


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How much of each augmentation; 0 turns one off. ``*_rate`` are probabilities.

    Attributes:
        scale_std: Standard deviation of the log of the target's size in the search region.
        offset_sides: Largest distance of the target from the centre along x and y, in target
            sides (roots of the box area).
        near_offset_sides: The same for the 30 % of pairs whose target moved little.
        aspect_std: Of the log of the root of the change of aspect, in still pictures.
        video_aspect_std: The same between two frames of a clip.
        rotation_std_rad: Of the in-plane rotation, in those still pictures that are rotated.
        rotation_rate: Still pictures that are rotated.
        spin_rate: Still pictures that are rotated by any angle.
        video_rotation_std_rad: Of the rotation in those pairs of frames that are rotated.
        video_rotation_rate: Pairs of frames that are rotated.
        flip_rate: Pairs of which both crops are mirrored.
        single_flip_rate: Pairs of which the search region alone is mirrored.
        run_time_rate: Unrotated pairs whose search region is a window that the tracker could cut.
        template_jitter_rate: Templates whose window is not quite that of the box.
        template_jitter_std: Of that jitter, in sides and in the log of the scale.
        border_fill_rate: Search regions that show another picture outside the frame, not black.
        distractor_rate: Pairs with one or two pasted distractors.
        occluder_rate: Pairs whose target is partly hidden.
        grey_rate: Pairs in grey.
        light_strength: Factor on the changes of brightness, contrast and colour.
        low_resolution_rate: Crops that are shrunk and enlarged again.
        blur_rate: Search regions with a Gaussian blur.
        motion_blur_rate: Search regions with a motion blur.
        noise_rate: Crops with Gaussian noise.
    """

    scale_std: float = 0.25
    offset_sides: float = 1.5
    near_offset_sides: float = 0.8
    aspect_std: float = 0.12
    video_aspect_std: float = 0.06
    rotation_std_rad: float = 0.4
    rotation_rate: float = 0.4
    spin_rate: float = 0.08
    video_rotation_std_rad: float = 0.22
    video_rotation_rate: float = 0.25
    flip_rate: float = 0.5
    single_flip_rate: float = 0.07
    run_time_rate: float = 0.5
    template_jitter_rate: float = 0.5
    template_jitter_std: float = 0.05
    border_fill_rate: float = 0.4
    distractor_rate: float = 0.3
    occluder_rate: float = 0.2
    grey_rate: float = 0.15
    light_strength: float = 1.0
    low_resolution_rate: float = 0.35
    blur_rate: float = 0.1
    motion_blur_rate: float = 0.25
    noise_rate: float = 0.2

    @classmethod
    def none(cls) -> "Augmentation":
        """Every augmentation off: the target is centred and unchanged."""
        return cls(**dict.fromkeys(cls.__dataclass_fields__, 0.0))

    def angle_rad(self, rng: Rng, *, is_video: bool) -> float:
        """Draw a rotation for a search region; most often 0."""
        u = rng.random()
        if is_video:
            rotate = u < self.video_rotation_rate
            return float(rng.normal(0, self.video_rotation_std_rad)) if rotate else 0.0
        if u < self.rotation_rate:
            return float(np.clip(rng.normal(0, self.rotation_std_rad), -1.2, 1.2))
        return (
            float(rng.uniform(-math.pi, math.pi))
            if u < self.rotation_rate + self.spin_rate
            else 0.0
        )


@dataclass(frozen=True)
class View:
    """An affine map from a picture to a square crop.

    Attributes:
        matrix: ``(2, 3)``, float64, picture pixels → crop pixels.
        size_px: Side of the crop.
    """

    matrix: Float64Array
    size_px: int

    @classmethod
    def of_window(cls, window: CropWindow, *, size_px: int) -> "View":
        """What the tracker sees of a window."""
        scale = size_px / window.side_px
        matrix = [[scale, 0, -window.left_px * scale], [0, scale, -window.top_px * scale]]
        return cls(np.array(matrix), size_px)

    @classmethod
    def placing(
        cls,
        point_px: tuple[float, float],
        *,
        at_px: tuple[float, float],
        scale_xy: tuple[float, float],
        angle_rad: float = 0.0,
        size_px: int,
    ) -> "View":
        """The view that shows a point of the picture at a point of the crop."""
        cos, sin = math.cos(angle_rad), math.sin(angle_rad)
        sx, sy = scale_xy
        a, b, c, d = sx * cos, -sx * sin, sy * sin, sy * cos
        x, y = point_px
        tx, ty = at_px[0] - a * x - b * y, at_px[1] - c * x - d * y
        return cls(np.array([[a, b, tx], [c, d, ty]]), size_px)

    def mirrored(self) -> "View":
        """The same view with left and right exchanged."""
        matrix = self.matrix * [[-1], [1]]
        matrix[0, 2] += self.size_px
        return View(matrix, self.size_px)

    def to_crop(self, bbox_xywh: npt.NDArray[np.floating]) -> Float32Array:
        """Picture pixels, xywh ``(4,)`` → cxcywh normalised to the crop.

        Under a rotation the box bounds the ellipse in the box, which fits most objects better
        than a bound on its corners.
        """
        x, y, w, h = (float(v) for v in bbox_xywh)
        (a, b, tx), (c, d, ty) = self.matrix.tolist()
        cx, cy = x + w / 2, y + h / 2
        centre_x, centre_y = a * cx + b * cy + tx, c * cx + d * cy + ty
        box = [centre_x, centre_y, math.hypot(a * w, b * h), math.hypot(c * w, d * h)]
        return np.array(box, np.float32) / np.float32(self.size_px)

    def cut(
        self, image: UInt8Array, *, smooth: bool = False, border: UInt8Array | None = None
    ) -> UInt8Array:
        """Cut the crop from a picture, with bilinear sampling.

        Args:
            image: ``(H, W, 3)``, uint8.
            smooth: Sample the picture at half its size if the crop is less than half as fine.
                Off, the crop aliases as the tracker's own crops do.
            border: ``(size_px, size_px, 3)``, uint8: what shows outside the picture; ``None`` is
                black.

        Returns:
            ``(size_px, size_px, 3)``, uint8.
        """
        matrix = self.matrix.copy()
        if smooth and max(np.hypot(*matrix[:, :2])) < _HALF_SCALE and min(image.shape[:2]) > 1:
            height, width = image.shape[:2]
            half = cv2.resize(image, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
            image = np.asarray(half, np.uint8)
            matrix[:, 0] *= width / (width // 2)
            matrix[:, 1] *= height / (height // 2)
        matrix[:, 2] += matrix[:, :2].sum(1) / 2 - 0.5  # to OpenCV's centres at whole numbers
        size = (self.size_px, self.size_px)
        if border is None:
            return np.asarray(cv2.warpAffine(image, matrix, size), np.uint8)
        filled = border.copy()
        cv2.warpAffine(image, matrix, size, dst=filled, borderMode=cv2.BORDER_TRANSPARENT)
        return filled

    def inside(self, image: UInt8Array) -> UInt8Array:
        """Where the crop shows a picture: ``(size_px, size_px)``, 1 inside, else 0."""
        height, width = image.shape[:2]
        corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]])
        corners_px = np.clip(corners @ self.matrix.T - 0.5, -(2**15), 2**15)
        mask = np.zeros((self.size_px, self.size_px), np.uint8)
        cv2.fillConvexPoly(mask, np.rint(corners_px).astype(np.int32), 1)
        return mask


def rotate_cutout(bgra: UInt8Array, angle_rad: float) -> UInt8Array:
    """Rotate a cutout ``(h, w, 4)``; the result is tight around its mask again."""
    height, width = bgra.shape[:2]
    cos, sin = math.cos(angle_rad), math.sin(angle_rad)
    new_width = int(width * abs(cos) + height * abs(sin)) + 2
    new_height = int(width * abs(sin) + height * abs(cos)) + 2
    matrix = np.array([[cos, -sin, 0.0], [sin, cos, 0.0]])
    matrix[:, 2] = [(new_width - 1) / 2, (new_height - 1) / 2]
    matrix[:, 2] -= matrix[:, :2] @ [(width - 1) / 2, (height - 1) / 2]
    rotated = np.asarray(cv2.warpAffine(bgra, matrix, (new_width, new_height)), np.uint8)
    mask = rotated[..., 3] > 100
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if min(len(rows), len(columns)) < 4:
        return bgra
    return rotated[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def paste(crop: UInt8Array, bgra: UInt8Array, bbox_xywh: npt.NDArray[np.floating]) -> None:
    """Paste a cutout so that it fills a box; what lies outside the crop is lost.

    Args:
        crop: Written: ``(S, S, 3)``, uint8.
        bgra: ``(h, w, 4)``, uint8.
        bbox_xywh: Crop pixels.
    """
    x, y, w, h = (float(v) for v in bbox_xywh)
    left, top = max(math.floor(x), 0), max(math.floor(y), 0)
    right, bottom = min(math.ceil(x + w), crop.shape[1]), min(math.ceil(y + h), crop.shape[0])
    if right - left < 2 or bottom - top < 2:
        return
    if max(w / bgra.shape[1], h / bgra.shape[0]) < _HALF_SCALE:
        bgra = np.asarray(cv2.resize(bgra, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    sx, sy = w / bgra.shape[1], h / bgra.shape[0]
    matrix = np.array([[sx, 0, x - left + sx / 2 - 0.5], [0, sy, y - top + sy / 2 - 0.5]])
    size = (right - left, bottom - top)
    layer = cv2.warpAffine(bgra, matrix, size)
    alpha = layer[..., 3:].astype(np.float32) / 255
    under = crop[top:bottom, left:right]
    under[...] = under + (layer[..., :3].astype(np.float32) - under) * alpha


def add_distractors(
    crop: UInt8Array,
    bbox_xywh: npt.NDArray[np.floating],
    *,
    count: int,
    draw_cutout: Callable[[], UInt8Array],
    rng: Rng,
) -> None:
    """Paste objects of the target's size beside it.

    Args:
        crop: Written: ``(S, S, 3)``, uint8.
        bbox_xywh: The target, crop pixels.
        count: How many; one that finds no place is left out.
        draw_cutout: Gives ``(h, w, 4)``, uint8.
        rng: Source of randomness.
    """
    x, y, w, h = (float(v) for v in bbox_xywh)
    for _ in range(count):
        bgra = draw_cutout()
        side = math.sqrt(w * h) * math.exp(rng.normal(0, 0.3))
        aspect = math.sqrt(bgra.shape[1] / bgra.shape[0])
        own_w, own_h = side * aspect, side / aspect
        for _ in range(3):
            cx, cy = rng.random(2).tolist()
            cx, cy = cx * crop.shape[1], cy * crop.shape[0]
            is_beside = abs(cx - x - w / 2) > 0.45 * (own_w + w)
            if is_beside or abs(cy - y - h / 2) > 0.45 * (own_h + h):
                bgra = bgra[:, ::-1] if rng.random() < 0.5 else bgra
                paste(crop, bgra, np.array([cx - own_w / 2, cy - own_h / 2, own_w, own_h]))
                break


def add_occluder(
    crop: UInt8Array,
    bbox_xywh: npt.NDArray[np.floating],
    *,
    bgra: UInt8Array,
    rng: Rng,
) -> None:
    """Paste an object over a part of the target's border.

    Args:
        crop: Written: ``(S, S, 3)``, uint8.
        bbox_xywh: The target, crop pixels.
        bgra: ``(h, w, 4)``, uint8.
        rng: Source of randomness.
    """
    x, y, w, h = (float(v) for v in bbox_xywh)
    own_w, own_h = w * rng.uniform(0.3, 0.8), h * rng.uniform(0.3, 0.8)
    angle = rng.uniform(0, 2 * math.pi)
    cx, cy = x + w / 2 * (1 + math.cos(angle)), y + h / 2 * (1 + math.sin(angle))
    paste(crop, bgra, np.array([cx - own_w / 2, cy - own_h / 2, own_w, own_h]))


def change_light(
    crop: UInt8Array, augmentation: Augmentation, *, is_grey: bool, is_strong: bool, rng: Rng
) -> UInt8Array:
    """Change contrast, brightness and colour, then resolution, blur and noise.

    Args:
        crop: ``(S, S, 3)``, uint8, BGR.
        augmentation: How much.
        is_grey: Drop the colours first.
        is_strong: For search regions: stronger, and with blur.
        rng: Source of randomness.

    Returns:
        ``(S, S, 3)``, uint8, BGR.
    """
    pixels: npt.NDArray[Any] = crop
    if is_grey:
        pixels = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    if augmentation.light_strength:
        pixels = cv2.LUT(pixels, _light_table(augmentation, is_grey, is_strong, rng))
    if rng.random() < augmentation.low_resolution_rate:
        size = pixels.shape[0]
        small = max(8, int(size * rng.uniform(0.2, 0.7)))
        pixels = cv2.resize(pixels, (small, small), interpolation=cv2.INTER_AREA)
        pixels = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)
    if is_strong and rng.random() < augmentation.blur_rate:
        pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.5, 1.5))
    if is_strong and rng.random() < augmentation.motion_blur_rate:
        pixels = cv2.filter2D(pixels, -1, _motion_kernel(rng))
    if rng.random() < augmentation.noise_rate:
        noise = rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(2, 9))
        pixels = np.clip(pixels + noise, 0, 255)
    return np.asarray(pixels, np.uint8)


def _light_table(
    augmentation: Augmentation, is_grey: bool, is_strong: bool, rng: Rng
) -> UInt8Array:
    """Look-up table ``(256, 1, 3)`` of a change of contrast, brightness and colour."""
    strength = augmentation.light_strength
    brightness = math.exp(rng.normal(0, strength * (0.18 if is_strong else 0.1)))
    contrast = math.exp(rng.normal(0, strength * 0.15))
    values = (np.arange(256.0) - 110) * contrast + 110
    has_cast = not is_grey and rng.random() < 0.5
    cast = np.exp(rng.normal(0, strength * 0.08, 3)) if has_cast else np.ones(3)
    table = np.clip(values[:, None] * brightness * cast, 0, 255)
    return np.asarray(table.astype(np.uint8)[:, None])


def _motion_kernel(rng: Rng) -> Float32Array:
    """Kernel of a straight motion of 3 to 9 pixels."""
    size = int(rng.integers(3, 10))
    kernel = np.zeros((size, size), np.float32)
    if rng.random() < 0.7:
        first, last = rng.integers(size, size=2).tolist()
        cv2.line(kernel, (0, first), (size - 1, last), 1.0)
    else:
        kernel[:, size // 2] = 1
    return np.asarray(kernel / kernel.sum(), np.float32)
