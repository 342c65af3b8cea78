"""Augmentation of training crops: how much, and the changes of light, sharpness and noise.

``Changes.draw`` decides in NumPy, ``Changes.apply`` does it in torch, for a batch and on its
device. Every change is elementwise arithmetic per crop, so a crop's bytes do not depend on what
else is in the batch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from edgetrack.train import jpeg

__all__ = ["Augmentation", "Changes"]

BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Rng = np.random.Generator

_NUM_NOISES = 1 << 20
_LOW_RESOLUTIONS = np.linspace(0.2, 0.7, 11)  # few, because crops of one size are shrunk together
_BLUR_REACH_PX = 4
_MOTION_REACH_PX = 8
_MIDDLE_GREY = 110


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
        far_gap_rate: Pairs of labelled clips whose frames are any distance apart.
        flip_rate: Pairs of which both crops are mirrored.
        single_flip_rate: Pairs of which the search region alone is mirrored.
        run_time_rate: Unrotated pairs whose search region is a window that the tracker could cut.
        template_jitter_rate: Templates whose window is not quite that of the box.
        template_jitter_std: Of that jitter, in sides and in the log of the scale.
        border_fill_rate: Search regions that show another picture outside the frame, not black.
        distractor_rate: Pairs with one or two pasted distractors; 0 leaves them out of pasted
            scenes too, which have up to three.
        occluder_rate: Pairs whose target is partly hidden.
        grey_rate: Pairs in grey.
        light_strength: Factor on the changes of brightness, contrast and colour.
        low_resolution_rate: Crops that are shrunk and enlarged again.
        blur_rate: Search regions with a Gaussian blur.
        motion_blur_rate: Search regions with a motion blur.
        noise_rate: Crops with Gaussian noise.
        jpeg_rate: Crops that were compressed.
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
    far_gap_rate: float = 0.3
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
    jpeg_rate: float = 0.15

    @classmethod
    def none(cls) -> "Augmentation":
        """Every augmentation off: the target is centred and unchanged."""
        return cls(**dict.fromkeys(cls.__dataclass_fields__, 0.0))

    def draw_angles_rad(self, rng: Rng, is_video: BoolArray) -> Float64Array:
        """Draw rotations ``(N,)`` for search regions; most often 0.

        Args:
            rng: Source of randomness.
            is_video: ``(N,)``: the pair is two frames of a clip.
        """
        count = len(is_video)
        u, normal = rng.random(count), rng.standard_normal(count)
        spin = rng.uniform(-np.pi, np.pi, count)
        of_video = np.where(u < self.video_rotation_rate, normal * self.video_rotation_std_rad, 0)
        of_still = np.clip(normal * self.rotation_std_rad, -1.2, 1.2)
        of_still = np.where(u < self.rotation_rate, of_still, spin)
        of_still = np.where(u < self.rotation_rate + self.spin_rate, of_still, 0)
        return np.where(is_video, of_video, of_still)


@dataclass(frozen=True)
class Changes:
    """Changes of N crops; 0 leaves a crop as it is.

    Attributes:
        is_grey: ``(N,)``, bool.
        gain: ``(N, 3)``, float32, factors on red, green and blue.
        bias: ``(N, 3)``, float32, grey levels, added after that.
        low_resolution: ``(N,)``, float32: the side to shrink to, as a fraction of the crop's.
        blur_px: ``(N,)``, float32: standard deviation of a Gaussian blur.
        motion: ``(N, 2K + 1)``, float32: weight of the pixel k - K along a motion.
        motion_offset_px: ``(N, 2K + 1)``, int64: where that pixel is, across.
        is_steep: ``(N,)``, bool: the motion runs along y, not x.
        noise: ``(N,)``, float32: standard deviation, grey levels.
        noise_at: ``(N,)``, int64: which noise.
        jpeg_quality: ``(N,)``, float32.
    """

    is_grey: BoolArray
    gain: Float32Array
    bias: Float32Array
    low_resolution: Float32Array
    blur_px: Float32Array
    motion: Float32Array
    motion_offset_px: Int64Array
    is_steep: BoolArray
    noise: Float32Array
    noise_at: Int64Array
    jpeg_quality: Float32Array

    @classmethod
    def draw(cls, rng: Rng, how: Augmentation, *, is_grey: BoolArray, is_strong: bool) -> "Changes":
        """Draw changes.

        Args:
            rng: Source of randomness.
            how: How much.
            is_grey: ``(N,)``: the crop loses its colours.
            is_strong: For search regions: stronger, and with blur.
        """
        n = len(is_grey)
        strength = how.light_strength
        brightness = np.exp(rng.standard_normal(n) * strength * (0.18 if is_strong else 0.1))
        contrast = np.exp(rng.standard_normal(n) * strength * 0.15)
        cast = np.exp(rng.standard_normal((n, 3)) * strength * 0.08)
        has_cast = ~is_grey & (rng.random(n) < 0.5)
        factor = brightness[:, None] * np.where(has_cast[:, None], cast, 1)
        sharpness = float(is_strong)
        motion, offset_px = _draw_motion(rng, n)
        has_motion = rng.random(n) < how.motion_blur_rate * sharpness
        return cls(
            is_grey=is_grey,
            gain=(contrast[:, None] * factor).astype(np.float32),
            bias=(_MIDDLE_GREY * (1 - contrast)[:, None] * factor).astype(np.float32),
            low_resolution=_some(rng, how.low_resolution_rate, rng.choice(_LOW_RESOLUTIONS, n)),
            blur_px=_some(rng, how.blur_rate * sharpness, rng.uniform(0.5, 1.5, n)),
            motion=motion * has_motion[:, None],
            motion_offset_px=offset_px,
            is_steep=rng.random(n) < 0.3,
            noise=_some(rng, how.noise_rate, rng.uniform(2, 9, n)),
            noise_at=rng.integers(_NUM_NOISES, size=n),
            jpeg_quality=_some(rng, how.jpeg_rate, rng.uniform(20, 85, n).round()),
        )

    def apply(self, crops: Tensor) -> Tensor:
        """Change crops.

        Args:
            crops: ``(N, 3, S, S)``, float32, RGB in [0, 255]; its memory may be used.

        Returns:
            The same shape and range.
        """
        device = crops.device

        def to(values: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)

        def change(where: BoolArray, changed: Callable[[Tensor, Int64Array], Tensor]) -> None:
            if where.any():
                rows = np.flatnonzero(where)
                index = to(rows)
                crops.index_copy_(0, index, changed(crops.index_select(0, index), rows))

        change(self.is_grey, lambda x, rows: _grey(x))
        if (self.gain != 1).any() or self.bias.any():
            crops = crops.mul_(to(self.gain)[..., None, None]).add_(to(self.bias)[..., None, None])
            crops.clamp_(0, 255)
        for part in np.unique(self.low_resolution[self.low_resolution > 0]):
            small_px = max(8, int(crops.shape[-1] * part))
            change(self.low_resolution == part, lambda x, rows, s=small_px: _coarse(x, s))  # type: ignore[misc]  # mypy infers no default
        change(self.blur_px > 0, lambda x, rows: _blur(x, to(_gaussians(self.blur_px[rows]))))
        for is_steep in (False, True):
            change(
                (self.motion.any(1)) & (self.is_steep == is_steep),
                lambda x, rows, s=is_steep: _move(  # type: ignore[misc]  # as above
                    x, to(self.motion[rows]), to(self.motion_offset_px[rows]), is_steep=s
                ),
            )
        change(
            self.noise > 0,
            lambda x, rows: _add_noise(x, to(self.noise[rows]), to(self.noise_at[rows])),
        )
        change(
            self.jpeg_quality > 0,
            lambda x, rows: jpeg.compress(x, to(self.jpeg_quality[rows])),
        )
        return crops


def _some(rng: Rng, rate: float, values: Float64Array) -> Float32Array:
    """The values, all but a share ``rate`` of them 0."""
    return np.where(rng.random(len(values)) < rate, values, 0).astype(np.float32)


def _draw_motion(rng: Rng, count: int) -> tuple[Float32Array, Int64Array]:
    """Straight motions of 3 to 17 pixels: weights and offsets across, ``(count, 2K + 1)``."""
    length = rng.integers(3, 2 * _MOTION_REACH_PX + 2, size=(count, 1))
    ends = np.floor(rng.random((count, 2)) * length)
    k = np.arange(2 * _MOTION_REACH_PX + 1) - _MOTION_REACH_PX + length // 2
    line = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * k / (length - 1)
    is_used = (k >= 0) & (k < length)
    offset_px = np.where(is_used, np.rint(line) - length // 2, 0)
    return (is_used / length).astype(np.float32), offset_px.astype(np.int64)


def _grey(crops: Tensor) -> Tensor:
    r, g, b = crops.unbind(1)
    return (0.299 * r + 0.587 * g + 0.114 * b)[:, None].expand_as(crops)


def _coarse(crops: Tensor, small_px: int) -> Tensor:
    """Shrink to ``small_px`` and enlarge again."""
    size = crops.shape[-2:]
    small = F.adaptive_avg_pool2d(crops, small_px)
    return F.interpolate(small, size=size, mode="bilinear", align_corners=False)


def _gaussians(std_px: Float32Array) -> Float32Array:
    """Right halves ``(N, K + 1)`` of Gaussian kernels."""
    k = np.arange(_BLUR_REACH_PX + 1)
    weights = np.exp(-0.5 * (k / std_px[:, None].astype(float)) ** 2)
    total = 2 * weights.sum(1, keepdims=True) - weights[:, :1]
    return np.asarray(weights / total, np.float32)


def _blur(crops: Tensor, weights: Tensor) -> Tensor:
    """Convolve along x and y with symmetric kernels, given by their right halves ``(N, K + 1)``."""
    K = _BLUR_REACH_PX
    weights = weights[:, :, None, None, None]
    for dim in (2, 3):
        size = crops.shape[dim]
        padded = F.pad(crops, (0, 0, K, K) if dim == 2 else (K, K, 0, 0), mode="reflect")
        crops = crops * weights[:, 0]
        for k in range(1, K + 1):
            both = padded.narrow(dim, K - k, size) + padded.narrow(dim, K + k, size)
            crops += both.mul_(weights[:, k])
    return crops


def _move(crops: Tensor, weights: Tensor, offset_px: Tensor, *, is_steep: bool) -> Tensor:
    """Average along a line: pixel k of ``(N, 2K + 1)`` is ``k - K`` along and offset across."""
    K = _MOTION_REACH_PX
    crops = crops.transpose(2, 3) if is_steep else crops
    N, _, H, W = crops.shape
    padded = F.pad(crops, (K, K, K, K), mode="reflect").transpose(1, 2).contiguous()
    flat = padded.view(N * (H + 2 * K), 3, W + 2 * K)
    rows = torch.arange(H, device=crops.device) + K
    starts = torch.arange(N, device=crops.device)[:, None] * (H + 2 * K)
    moved = crops.new_zeros(N, H, 3, W)
    for k in range(2 * K + 1):
        source = (starts + rows + offset_px[:, k, None]).view(-1)
        shifted = flat[:, :, k : k + W].index_select(0, source).view(N, H, 3, W)
        moved += shifted.mul_(weights[:, k, None, None, None])
    moved = moved.transpose(1, 2)
    return moved.transpose(2, 3) if is_steep else moved


@functools.lru_cache(maxsize=4)
def _noises(size: int, device: torch.device) -> Tensor:
    """Normal noise ``(size,)``; the same on every device."""
    noises = np.random.default_rng(0).standard_normal(size, np.float32)
    return torch.from_numpy(noises).to(device)


def _add_noise(crops: Tensor, std: Tensor, noise_at: Tensor) -> Tensor:
    """Add a piece of a fixed, long noise to each crop, so that it depends on that crop alone."""
    count = crops[0].numel()
    noises = _noises(_NUM_NOISES + count, crops.device)
    index = noise_at[:, None] + torch.arange(count, device=crops.device)
    noise = noises[index].view_as(crops)
    return (crops + noise * std[:, None, None, None]).clamp_(0, 255)
