"""JPEG's loss of detail, in torch, for a batch.

Baseline JPEG (ITU-T T.81) without its entropy coding: YCbCr, chroma at half resolution, 8x8 DCT,
quantisation with the tables of annex K scaled as libjpeg does. Only elementwise arithmetic, so
that an image's result does not depend on what else is in the batch.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["compress"]

# Tables K.1 and K.2.
_LUMA = """
    16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56
    14 17 22 29 51 87 80 62  18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92
    49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
"""
_CHROMA = """
    17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99
    47 66 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99
    99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99
"""


def compress(pixels: Tensor, quality: Tensor) -> Tensor:
    """Lose what JPEG loses.

    Args:
        pixels: ``(N, 3, H, W)``, float32, RGB in [0, 255].
        quality: ``(N,)``, float32, 1 to 100.

    Returns:
        ``(N, 3, H, W)``, float32, RGB in [0, 255].
    """
    height, width = pixels.shape[2:]
    padded = F.pad(pixels, (0, -width % 16, 0, -height % 16), mode="replicate")
    r, g, b = padded.unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    chroma = torch.stack([(b - y) / 1.772, (r - y) / 1.402], 1)
    chroma = F.avg_pool2d(chroma, 2)
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    y = _quantised(y[:, None] - 128, _table(_LUMA, scale)) + 128
    chroma = _quantised(chroma, _table(_CHROMA, scale))
    chroma = F.interpolate(chroma, scale_factor=2.0, mode="bilinear", align_corners=False)
    y, cb, cr = y[:, 0], chroma[:, 0], chroma[:, 1]
    r, b = y + 1.402 * cr, y + 1.772 * cb
    g = y - (0.114 * 1.772 / 0.587) * cb - (0.299 * 1.402 / 0.587) * cr
    return torch.stack([r, g, b], 1)[:, :, :height, :width].clamp_(0, 255)


def _table(base: str, scale: Tensor) -> Tensor:
    """Quantisation steps ``(8, 8, N, 1, 1, 1)``."""
    steps = torch.tensor([float(v) for v in base.split()]).to(scale.device)
    steps = torch.floor((steps[:, None] * torch.floor(scale) + 50) / 100).clamp_(1, 255)
    return steps.view(8, 8, -1, 1, 1, 1)


def _quantised(planes: Tensor, steps: Tensor) -> Tensor:
    """Planes ``(N, C, H, W)`` after DCT, rounding to steps, and the way back."""
    N, C, H, W = planes.shape
    blocks = planes.view(N, C, H // 8, 8, W // 8, 8).permute(3, 5, 0, 1, 2, 4)
    coefficients = _dct(_dct(blocks).transpose(0, 1)).transpose(0, 1)
    coefficients = torch.round(coefficients / steps) * steps
    blocks = _inverse_dct(_inverse_dct(coefficients).transpose(0, 1)).transpose(0, 1)
    return blocks.permute(2, 3, 4, 0, 5, 1).reshape(N, C, H, W)


@functools.cache
def _cosines(device: torch.device) -> Tensor:
    """Orthonormal DCT-II, left half: weights ``(2, 4, 4, 1, 1, 1, 1, 1)``.

    Even and odd rows of the matrix; the right half mirrors the even ones and negates the odd.
    """
    rows = [
        [
            math.cos((2 * j + 1) * k * math.pi / 16) * (math.sqrt(1 / 8) if k == 0 else 0.5)
            for j in range(4)
        ]
        for k in (0, 2, 4, 6, 1, 3, 5, 7)
    ]
    return torch.tensor(rows).to(device).view(2, 4, 4, 1, 1, 1, 1, 1)


def _dct(t: Tensor) -> Tensor:
    """DCT of blocks ``(8, 8, N, C, H, W)`` along dimension 0."""
    even, odd = _cosines(t.device)
    back = t[4:].flip(0)
    low, high = _combined(even, t[:4] + back), _combined(odd, t[:4] - back)
    return torch.stack([low, high], 1).flatten(0, 1)


def _inverse_dct(t: Tensor) -> Tensor:
    """The inverse of ``_dct``."""
    even, odd = _cosines(t.device)
    low, high = _combined(even.transpose(0, 1), t[::2]), _combined(odd.transpose(0, 1), t[1::2])
    return torch.cat([low + high, (low - high).flip(0)])


def _combined(weights: Tensor, parts: Tensor) -> Tensor:
    """Sums ``(4, …)`` of four parts with weights ``(4, 4, …)``."""
    total = weights[:, 0] * parts[0]
    for j in range(1, 4):
        total += weights[:, j] * parts[j]
    return total
