"""Render crops from an image store: views of pictures, cutouts on top, changes of light.

All arithmetic is elementwise float32, so a crop's bytes do not depend on the batch around it.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgetrack.train.augment import Changes
from edgetrack.train.image_store import ImageStore
from edgetrack.train.views import Layers, Views, inverse_of, rows_of

__all__ = ["Scene", "render"]

BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

_HALF_SCALE = 0.5
_MARGIN_PX = 0.02  # float32 may put a point this far from where float64 does
_CHUNK_CROPS = {"cpu": 32, "cuda": 256}


@dataclass(frozen=True)
class Scene:
    """What N crops show, from the bottom up.

    Attributes:
        border: What shows outside the picture of ``view``; black without one, whatever the light.
        view: The picture.
        layers: Cutouts.
        changes: What is done to the pixels.
    """

    border: Views
    view: Views
    layers: Layers
    changes: Changes


def render(scene: Scene, stores: tuple[ImageStore, ...], *, size_px: int) -> Tensor:
    """Render crops.

    Args:
        scene: N crops. Image ``i`` of store ``s`` is number ``i`` plus the sizes of the stores
            before it.
        stores: All on one device.
        size_px: Side of the crops.

    Returns:
        ``(N, size_px, size_px, 3)``, uint8, RGB, on that device.
    """
    device = stores[0].pixels.device
    num_crops = len(scene.view.image)
    out = torch.empty(num_crops, size_px, size_px, 3, dtype=torch.uint8, device=device)
    step = _CHUNK_CROPS.get(device.type, 64)
    entries = np.concatenate([store.entries for store in stores])
    for first in range(0, num_crops, step):
        part = rows_of(scene, slice(first, first + step))
        crops = _Canvas(len(part.view.image), stores, entries, size_px).render(part)
        out[first : first + step] = crops.add_(0.5).permute(0, 2, 3, 1)
    return out


class _Canvas:
    """Crops ``(N, 3, S, S)``, float32, that are being painted."""

    def __init__(
        self, num_crops: int, stores: tuple[ImageStore, ...], entries: Int64Array, size_px: int
    ) -> None:
        self.stores, self.entries, self.size_px = stores, entries, size_px
        self.device = stores[0].pixels.device
        self.pixels = torch.zeros(num_crops, 3, size_px, size_px, device=self.device)
        self._bounds = np.cumsum([len(store.entries) for store in stores])

    def render(self, scene: Scene) -> Tensor:
        entry, inverse, _ = self._sources(scene.view)
        is_shown = (scene.border.image >= 0) & ~self._is_inside(entry, inverse)
        border = replace(scene.border, image=np.where(is_shown, scene.border.image, -1))
        self._paint(border, over_black=np.ones(len(is_shown), bool))
        padded = self._paint(scene.view, over_black=~is_shown)
        for level in range(scene.layers.image.shape[1]):
            self._paste(scene.layers.image[:, level], scene.layers.matrix[:, level])
        crops = scene.changes.apply(self.pixels)
        for rows, inside in padded:  # no light changes the black that the tracker pads with
            crops.index_copy_(0, rows, crops.index_select(0, rows).mul_(inside))
        return crops

    def _paint(self, views: Views, *, over_black: BoolArray) -> list[tuple[Tensor, Tensor]]:
        """Paint pictures.

        Returns:
            Rows ``(n,)`` and masks ``(n, 1, S, S)`` of crops that are black outside their picture.
        """
        padded = []
        entry, inverse, store = self._sources(views)
        is_aligned = (inverse[:, 0, 1] == 0) & (inverse[:, 1, 0] == 0)
        needs_mask = ~self._is_inside(entry, inverse)
        key = store * 8 + is_aligned * 4 + needs_mask * 2 + over_black
        for group in np.unique(key[views.image >= 0]):
            chosen = np.flatnonzero((key == group) & (views.image >= 0))
            rows = self._to(chosen)
            sampler = _Sampler(
                self._to(entry[chosen]),
                self._to(inverse[chosen].astype(np.float32)),
                size_px=self.size_px,
                is_aligned=bool(group & 4),
            )
            rgb = sampler.sample(self.stores[group // 8].pixels)
            if group & 2 and group & 1:
                padded.append((rows, sampler.mask()))
            elif group & 2:
                below = self.pixels.index_select(0, rows)
                rgb += below.mul_(1 - sampler.opacity())
            self.pixels.index_copy_(0, rows, rgb)
        return padded

    def _paste(self, image: Int64Array, matrix: Float64Array) -> None:
        """Paste at most one cutout on each crop."""
        rows = np.flatnonzero(image >= 0)
        if not len(rows):
            return
        views = Views(image[rows], matrix[rows], np.ones(len(rows), bool))
        entry, inverse, _ = self._sources(views)
        low, high = self._bounds_of(entry, inverse)
        width, height = (high - low).T
        area = width * height
        if not area.sum():
            return
        first = np.cumsum(area) - area
        params = self._to(np.stack([rows, first, width, *low.T, *entry.T], 1))
        layer = torch.repeat_interleave(self._to(area), output_size=int(area.sum()))
        row, start, columns, left, top, offset, h, w = params[layer].unbind(1)
        a, b, c, d, e, f = self._to(inverse.reshape(-1, 6).astype(np.float32))[layer].unbind(1)
        place = torch.arange(len(layer), device=self.device) - start
        i = place // columns
        j = place - i * columns + left
        i = i + top
        x, y = j + 0.5, i + 0.5
        u, v = a * x + b * y + c, d * x + e * y + f
        rgba = _interpolated(self.stores[0].pixels, (offset, h, w), u, v, channels=4)
        index = (row * 3 * self.size_px + i) * self.size_px + j
        flat = self.pixels.view(-1)
        transparency = 1 - rgba[3] / 255
        for channel in range(3):
            at = index + channel * self.size_px**2
            flat[at] = flat[at] * transparency + rgba[channel]

    def _sources(self, views: Views) -> tuple[Int64Array, Float64Array, Int64Array]:
        """Entries ``(n, 3)`` of the right level, crop → level matrices, and store numbers."""
        matrix, entry = views.matrix, self.entries[views.image]
        scale = np.hypot(matrix[:, :, 0], matrix[:, :, 1]).max(1)
        is_half = views.is_smooth & (scale < _HALF_SCALE) & (entry[:, 1, 1:].min(1) > 1)
        store = np.searchsorted(self._bounds, views.image, side="right")
        level = is_half.astype(np.int64)
        inverse = inverse_of(matrix) / (1 + level)[:, None, None]
        return entry[np.arange(len(entry)), level], inverse, store

    def _is_inside(self, entry: Int64Array, inverse: Float64Array) -> BoolArray:
        """Whether all that the crops need lies inside the pictures."""
        ends = np.array([0.5, self.size_px - 0.5])
        corners = np.stack([*np.meshgrid(ends, ends), np.ones((2, 2))], -1).reshape(4, 3)
        points = (inverse[:, None] * corners[:, None]).sum(-1) - 0.5
        low, high = points.min(1), points.max(1)
        limit = entry[:, :0:-1] - 1
        return np.asarray((low > _MARGIN_PX).all(1) & (high < limit - _MARGIN_PX).all(1))

    def _bounds_of(self, entry: Int64Array, inverse: Float64Array) -> tuple[Int64Array, Int64Array]:
        """First and last column and row ``(n, 2)`` of crops that show some of their pictures."""
        forward = inverse_of(inverse)
        unit = np.array([[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]])
        size = entry[:, :0:-1] + 1  # half a pixel more on each side: there it fades out
        corners = np.concatenate([unit[:, :2] * size[:, None] - 0.5, np.ones((len(size), 4, 1))], 2)
        points = (forward[:, None] * corners[:, :, None]).sum(-1)
        low = np.clip(np.floor(points.min(1)), 0, self.size_px).astype(np.int64)
        high = np.clip(np.ceil(points.max(1)), 0, self.size_px).astype(np.int64)
        return low, np.maximum(high, low)

    def _to(self, values: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)


class _Sampler:
    """Bilinear views of n pictures, each a whole crop."""

    def __init__(self, entry: Tensor, inverse: Tensor, *, size_px: int, is_aligned: bool) -> None:
        centre = torch.arange(size_px, device=entry.device) + 0.5
        x, y = centre, centre[:, None]
        (a, b, c), (d, e, f) = (row.unbind(1) for row in inverse[..., None, None].unbind(1))
        # The coordinates (n, H, W) of unrotated views vary along one axis each.
        self.u = a * x + c if is_aligned else a * x + b * y + c
        self.v = e * y + f if is_aligned else d * x + e * y + f
        self.offset, self.height, self.width = entry[..., None, None].unbind(1)

    def sample(self, pixels: Tensor) -> Tensor:
        """Colours ``(n, 3, S, S)``, 0 outside."""
        entry = self.offset, self.height, self.width
        return _interpolated(pixels, entry, self.u, self.v, channels=3)

    def opacity(self) -> Tensor:
        """Share ``(n, 1, S, S)`` of a pixel that is the picture's."""
        _, left, right = _taps(self.u, self.width)
        _, upper, lower = _taps(self.v, self.height)
        return ((left + right) * (upper + lower))[:, None]

    def mask(self) -> Tensor:
        """1 ``(n, 1, S, S)`` where a pixel's centre is inside the picture, else 0."""
        is_in_x = (self.u > 0) & (self.u < self.width)
        return (is_in_x & (self.v > 0) & (self.v < self.height)).float()[:, None]


def _interpolated(
    pixels: Tensor, entry: tuple[Tensor, Tensor, Tensor], u: Tensor, v: Tensor, *, channels: int
) -> Tensor:
    """Interpolate between the pixels of pictures; those outside are transparent black.

    Args:
        pixels: ``(P,)``, int32.
        entry: First pixels, heights and widths of the pictures, int64.
        u: Coordinates along x, picture pixels; all these broadcast to ``(N, H, W)`` or ``(M,)``.
        v: The same along y.
        channels: 3, or 4 with alpha.

    Returns:
        ``(N, C, H, W)`` or ``(C, M)``, in [0, 255].
    """
    offset, height, width = entry
    column, *across = _taps(u, width)
    row, *down = _taps(v, height)
    if u.ndim == 3:
        across, down = [w[:, None] for w in across], [w[:, None] for w in down]
    index = offset + row * width + column
    lines = []
    for weight in down:
        left = _pixels_at(pixels, index, channels=channels).mul_(across[0])
        right = _pixels_at(pixels[1:], index, channels=channels).mul_(across[1])
        lines.append(left.add_(right).mul_(weight))
        index = index + width
    return lines[0].add_(lines[1])


def _taps(u: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where to interpolate along an axis.

    Args:
        u: Coordinates, pixels.
        size: Pixels along the axis, int64, at least 2.

    Returns:
        The first of two neighbouring pixels, always one of the picture's, int64; and the weights
        of both, which sum to less than 1 where a pixel outside has a share, too.
    """
    u = u - 0.5
    first = torch.minimum(torch.floor(u), (size - 2).float()).clamp_(min=0)
    distance = u - first
    weights = (1 - distance.abs()).clamp_(min=0), (1 - (distance - 1).abs_()).clamp_(min=0)
    return first.long(), *weights


def _pixels_at(pixels: Tensor, index: Tensor, *, channels: int) -> Tensor:
    """Pixels at ``(N, H, W)`` or ``(M,)`` → float32 ``(N, C, H, W)`` or ``(C, M)``."""
    found = pixels.index_select(0, index.view(-1)).view(torch.uint8)
    found = found.view(*index.shape, 4)[..., :channels].movedim(-1, -3 if index.ndim == 3 else 0)
    return torch.empty(found.shape, device=pixels.device).copy_(found)
