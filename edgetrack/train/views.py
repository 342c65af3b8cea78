"""Affine maps from pictures to square crops, many at once, as NumPy arrays.

Coordinates are continuous: the centre of pixel ``i`` lies at ``i + 0.5``, so a box maps exactly.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = [
    "Layers",
    "Views",
    "apply_linear",
    "boxes_in_crop",
    "inverse_of",
    "mirrored",
    "place",
    "rows_of",
    "turns",
    "views_of_windows",
    "windows_around",
]

BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class Views:
    """What N crops show of a picture each.

    Attributes:
        image: ``(N,)``, int64: index of the picture; -1 shows nothing.
        matrix: ``(N, 2, 3)``, float64: picture pixels → crop pixels.
        is_smooth: ``(N,)``, bool: sample the picture at half its size where the crop is less than
            half as fine. Elsewhere a crop aliases as the tracker's own crops do.
    """

    image: Int64Array
    matrix: Float64Array
    is_smooth: BoolArray


@dataclass(frozen=True)
class Layers:
    """Up to L cutouts on each of N crops, the first one lowest.

    Attributes:
        image: ``(N, L)``, int64: index of the picture; -1 shows nothing.
        matrix: ``(N, L, 2, 3)``, float64: cutout pixels → crop pixels.
    """

    image: Int64Array
    matrix: Float64Array

    @classmethod
    def empty(cls, num_crops: int, num_layers: int) -> "Layers":
        """No cutout yet."""
        matrix = np.zeros((num_crops, num_layers, 2, 3))
        matrix[..., 0, 0] = matrix[..., 1, 1] = 1
        return cls(np.full((num_crops, num_layers), -1), matrix)


def rows_of(arrays: T, rows: Int64Array | slice) -> T:
    """Some rows of a dataclass of arrays, of such dataclasses and of tuples of them.

    Anything else is kept.
    """
    taken: dict[str, Any] = {}
    for field in dataclasses.fields(arrays):  # type: ignore[arg-type]  # a dataclass by contract
        value = getattr(arrays, field.name)
        if isinstance(value, np.ndarray):
            taken[field.name] = value[rows]
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            taken[field.name] = rows_of(value, rows)
        elif isinstance(value, tuple):
            taken[field.name] = tuple(rows_of(part, rows) for part in value)
    return dataclasses.replace(arrays, **taken)  # type: ignore[type-var]  # as above


def windows_around(centre: Float64Array, side: Float64Array) -> tuple[Float64Array, Float64Array]:
    """The windows that the tracker cuts (``crops.CropWindow.around``).

    Args:
        centre: ``(N, 2)``, picture pixels.
        side: ``(N,)``, picture pixels, before rounding up.

    Returns:
        Top-left corners ``(N, 2)`` and sides ``(N,)``, whole pixels.
    """
    side = np.maximum(np.ceil(side), 1)
    return np.rint(centre - side[:, None] / 2), side


def views_of_windows(corner: Float64Array, side: Float64Array, *, size_px: int) -> Float64Array:
    """Matrices ``(N, 2, 3)`` of the crops of windows, ``size_px`` wide."""
    scale = size_px / side
    matrix = np.zeros((len(side), 2, 3))
    matrix[:, 0, 0] = matrix[:, 1, 1] = scale
    matrix[:, :, 2] = -corner * scale[:, None]
    return matrix


def place(
    point: Float64Array, *, at: Float64Array, scale_xy: Float64Array, angle_rad: Float64Array
) -> Float64Array:
    """Matrices ``(N, 2, 3)`` that rotate, then scale, and show a point of the picture at ``at``."""
    linear = turns(angle_rad, scale_xy)
    return np.concatenate([linear, (at - apply_linear(linear, point))[:, :, None]], 2)


def turns(angle_rad: Float64Array, scale_xy: Float64Array) -> Float64Array:
    """Maps ``(N, 2, 2)`` that rotate, then scale by ``(N, 2)``."""
    cos, sin = np.cos(angle_rad), np.sin(angle_rad)
    return np.asarray(np.stack([cos, -sin, sin, cos], -1).reshape(-1, 2, 2) * scale_xy[:, :, None])


def mirrored(matrix: Float64Array, which: BoolArray, *, size_px: int) -> Float64Array:
    """The same views, some with left and right exchanged."""
    flipped = matrix.copy()
    flipped[which, 0] *= -1
    flipped[which, 0, 2] += size_px
    return flipped


def inverse_of(matrix: Float64Array) -> Float64Array:
    """Matrices ``(..., 2, 3)`` of the way back."""
    a, b, c, d = (matrix[..., i, j] for i in (0, 1) for j in (0, 1))
    adjugate = np.stack([np.stack([d, -b], -1), np.stack([-c, a], -1)], -2)
    linear = adjugate / (a * d - b * c)[..., None, None]
    return np.concatenate([linear, -apply_linear(linear, matrix[..., 2])[..., None]], -1)


def boxes_in_crop(matrix: Float64Array, bbox_xywh: Float64Array, *, size_px: int) -> Float32Array:
    """Picture pixels, xywh ``(N, 4)`` → cxcywh normalised to the crop.

    Under a rotation the box bounds the ellipse in the box, which fits most objects better than a
    bound on its corners.
    """
    half = bbox_xywh[:, 2:] / 2
    centre = apply_linear(matrix[:, :, :2], bbox_xywh[:, :2] + half) + matrix[:, :, 2]
    extent = np.hypot(matrix[:, :, 0] * half[:, :1], matrix[:, :, 1] * half[:, 1:]) * 2
    return np.asarray(np.concatenate([centre, extent], 1) / size_px, np.float32)


def apply_linear(linear: Float64Array, point: Float64Array) -> Float64Array:
    """``(..., 2, 2)`` on ``(..., 2)``; plain sums, so that the bits do not depend on a BLAS."""
    x, y = point[..., 0, None], point[..., 1, None]
    return np.asarray(linear[..., 0] * x + linear[..., 1] * y)
