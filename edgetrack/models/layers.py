"""Layers that several tracker families share: normalisation, transformer blocks, stems.

Parameter names follow timm and OSTrack, so that published trunks load without renaming.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrack.models.units import Gate, Side, Units

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BatchNorm2d",
    "Block",
    "ConvNormAct",
    "Normalise",
    "PatchEmbed",
    "ShuffleStem",
    "box_coverage",
]

# RGB, 0..255
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class Normalise(nn.Module):
    """ImageNet's mean and standard deviation taken out of pixels.

    They are buffers, because numbers that are copied from host memory in every run cannot be
    captured in a CUDA graph.
    """

    def __init__(self) -> None:
        super().__init__()
        scale = 1.0 / torch.tensor(IMAGENET_STD)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.mean: Tensor
        self.scale: Tensor

    def forward(self, image: Tensor) -> Tensor:
        """Turn uint8 RGB ``(B, H, W, 3)`` into normalised float ``(B, 3, H, W)``."""
        # The cast comes first: TensorRT takes a uint8 input only into a cast. Channels come before
        # the arithmetic: CPUs broadcast over the last axis of three slowly.
        return (image.float().permute(0, 3, 1, 2) - self.mean) * self.scale


def box_coverage(bbox_cxcywh: Tensor, *, grid: int) -> Tensor:
    """How much of each grid cell a box covers.

    Args:
        bbox_cxcywh: Boxes ``(B, 4)``, normalised to the crop.
        grid: Cells per side.

    Returns:
        Shares ``(B, grid * grid)`` in [0, 1], row by row.
    """
    left = torch.arange(grid, device=bbox_cxcywh.device, dtype=bbox_cxcywh.dtype) / grid
    cell = 1.0 / grid

    def along(centre: Tensor, size: Tensor) -> Tensor:
        begin, end = (centre - size / 2)[:, None], (centre + size / 2)[:, None]
        overlap = torch.minimum(end, left + cell) - torch.maximum(begin, left)
        return overlap.clamp(min=0.0) * grid

    cx, cy, w, h = bbox_cxcywh.unbind(-1)
    return (along(cy, h)[:, :, None] * along(cx, w)[:, None, :]).flatten(1)


class Attention(nn.Module):
    """Multi-head self-attention with one joint projection of q, k and v."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(B, N, dim)`` → tokens of the same shape."""
        return self.mix(*self.heads(tokens))

    def heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``(B, N, dim)`` → q, k and v, each ``(B, heads, N, dim / heads)``."""
        B, N, _ = tokens.shape
        head_dim = self.qkv.out_features // (3 * self.num_heads)
        qkv = self.qkv(tokens).reshape(B, N, 3, self.num_heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Values weighed by how keys fit queries, joined over the heads: ``(B, N, dim)``."""
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out

    def prunable_units(self) -> tuple[Units, ...]:
        """The dimensions of each head, shared by query, key and value."""
        units = Units(
            name="",
            kind="attention",
            shape=(self.num_heads, self.qkv.out_features // (3 * self.num_heads)),
            written_by=(Side("qkv", copies=3),),
            read_by=(Side("proj"),),
            gates=(Gate("qkv", is_output=True, copies=3),),
        )
        return (units,)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return out

    def prunable_units(self) -> tuple[Units, ...]:
        """The hidden units, gated behind the GELU."""
        units = Units(
            name="",
            kind="mlp",
            shape=(self.fc1.out_features,),
            written_by=(Side("fc1"),),
            read_by=(Side("fc2"),),
            gates=(Gate("fc2"),),
        )
        return (units,)


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        dim: Token width.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        drop_path: Probability of dropping a residual branch of a sample in training
            (Huang et al., ECCV 2016, arXiv 1603.09382).
    """

    def __init__(
        self, dim: int, num_heads: int, *, mlp_ratio: float, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(B, N, dim)`` → tokens of the same shape."""
        tokens = tokens + self.drop(self.attn(self.norm1(tokens)))
        return tokens + self.drop(self.mlp(self.norm2(tokens)))

    def drop(self, branch: Tensor) -> Tensor:
        """A residual branch ``(B, N, dim)``, dropped for some samples in training."""
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = 1.0 - self.drop_path
        mask = torch.rand(branch.shape[0], 1, 1, device=branch.device) < keep
        return branch * mask.to(branch.dtype) / keep


class PatchEmbed(nn.Module):
    """A strided convolution from pixels to tokens ``(B, N, dim)``."""

    def __init__(self, dim: int, patch_px: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_px, patch_px)

    def forward(self, image: Tensor) -> Tensor:
        """Pixels ``(B, 3, H, W)`` → tokens ``(B, N, dim)``."""
        tokens: Tensor = self.proj(image).flatten(2).transpose(1, 2)
        return tokens


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the global batch, on any device, where several processes train together.

    The processes' batches must be of one size. torch's own ``SyncBatchNorm`` needs a GPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(B, C, H, W)`` → features of the same shape."""
        if not self.training or not _is_shared():
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        axes = (0, 2, 3)
        wide = x.double()
        sums = torch.stack([wide.sum(axes), wide.square().sum(axes)])
        count = x.numel() // x.shape[1] * dist.get_world_size()
        total: Tensor = _SumOverProcesses.apply(sums)  # type: ignore[no-untyped-call]
        mean, mean_square = (total / count).unbind(0)
        variance = mean_square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean.float(), self.momentum)
            unbiased = variance * (count / max(count - 1, 1))
            self.running_var.lerp_(unbiased.float(), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps).float()
        shift = self.bias - mean.float() * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def _is_shared() -> bool:
    """Whether several processes train together; a Jetson's torch may lack that part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class ConvNormAct(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
            BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class _ShuffleUnit(nn.Module):
    """Unit of ShuffleNetV2; with stride 2 both branches see the whole input."""

    def __init__(self, in_channels: int, half: int, *, stride: int) -> None:
        super().__init__()
        wide = in_channels if stride == 2 else half
        self.stride = stride
        if stride == 2:
            self.branch1 = nn.ModuleDict(
                {
                    "dw": nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels),
                    "pw": nn.Conv2d(in_channels, half, 1),
                }
            )
        self.branch2 = nn.ModuleDict(
            {
                "pw1": nn.Conv2d(wide, half, 1),
                "dw": nn.Conv2d(half, half, 3, stride, 1, groups=half),
                "pw2": nn.Conv2d(half, half, 1),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            keep = _leaky(self.branch1["pw"](self.branch1["dw"](x)))
        else:
            keep, x = x.chunk(2, 1)
        branch = self.branch2
        new = _leaky(branch["pw2"](branch["dw"](_leaky(branch["pw1"](x)))))
        B, C, H, W = new.shape
        return torch.stack([keep, new], 2).reshape(B, 2 * C, H, W)

    def prunable_units(self) -> tuple[Units, ...]:
        """The channels inside the second branch; those that are shuffled must stay as many."""
        first = self.branch2["pw1"]
        assert isinstance(first, nn.Conv2d)
        # A channel that is 0 leaves the depthwise convolution as its bias: the gate comes after.
        units = Units(
            name="branch2",
            kind="gated",
            shape=(first.out_channels,),
            written_by=(Side("branch2.pw1"), Side("branch2.dw")),
            read_by=(Side("branch2.pw2"),),
            gates=(Gate("branch2.pw2"),),
        )
        return (units,)


class ShuffleStem(nn.Module):
    """ShuffleNetV2 1.0x to stride 16 (Ma et al., ECCV 2018, arXiv 1807.11164).

    Batch norm is folded into the convolutions and the activation is LeakyReLU(0.1), as in the
    published NanoDet weights that it can start from.
    """

    channels = (116, 232)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"conv": nn.Conv2d(3, 24, 3, 2, 1)})
        self.stage2 = self._stage(24, 116, 4)
        self.stage3 = self._stage(116, 232, 8)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
        half = out_channels // 2
        rest = [_ShuffleUnit(out_channels, half, stride=1) for _ in range(depth - 1)]
        return nn.Sequential(_ShuffleUnit(in_channels, half, stride=2), *rest)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels ``(B, 3, H, W)`` → features at stride 8 and at stride 16."""
        fine = self.fine(image)
        return fine, self.coarse(fine)

    def fine(self, image: Tensor) -> Tensor:
        """Pixels ``(B, 3, H, W)`` → features at stride 8, ``(B, 116, H/8, W/8)``."""
        x = F.max_pool2d(_leaky(self.stem["conv"](image)), 3, 2, 1)
        out: Tensor = self.stage2(x)
        return out

    def coarse(self, fine: Tensor) -> Tensor:
        """Features at stride 8 → features at stride 16, ``(B, 232, H/16, W/16)``."""
        out: Tensor = self.stage3(fine)
        return out

    def prunable_units(self) -> tuple[Units, ...]:
        """The channels of the first convolution; each unit lists its own."""
        first, readers = self.stem["conv"], ("stage2.0.branch1.pw", "stage2.0.branch2.pw1")
        assert isinstance(first, nn.Conv2d)
        units = Units(
            name="stem.conv",
            kind="gated",
            shape=(first.out_channels,),
            written_by=(Side("stem.conv"), Side("stage2.0.branch1.dw")),
            read_by=tuple(map(Side, readers)),
            gates=tuple(map(Gate, readers)),
        )
        return (units,)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)
