"""One-stream trunks that families share: from pixels to tokens, and the blocks over them."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgetrack.models.layers import (
    BatchNorm2d,
    Block,
    ConvNormAct,
    Normalise,
    PatchEmbed,
    ShuffleStem,
    box_coverage,
)
from edgetrack.models.units import Gate, Side, Units, channels_between

__all__ = ["MAP_CHANNELS", "Backbone", "CorrelationMaps", "CorrelationPrior"]

MAP_CHANNELS = 64


class Backbone(nn.Module):
    """Stem, positions, blocks and norm; ``patch`` trunks have OSTrack's parameter names.

    Args:
        stem: ``patch`` (16 px patches) or ``shuffle`` (ShuffleNetV2 to stride 16).
        template_size_px: Side of the template crop.
        search_size_px: Side of the search region.
        dim: Token width.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of an MLP over ``dim``.
        depth: Number of blocks.
        drop_path: Largest probability of dropping a residual branch in training.
    """

    def __init__(
        self,
        *,
        stem: str,
        template_size_px: int,
        search_size_px: int,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        depth: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.template_grid = template_size_px // 16
        self.search_grid = search_size_px // 16
        self.normalise = Normalise()
        if stem == "patch":
            self.patch_embed = PatchEmbed(dim, 16)
        else:
            self.stem = ShuffleStem()
            self.to_tokens = nn.Sequential(
                nn.Conv2d(ShuffleStem.channels[1], dim, 1, bias=False), BatchNorm2d(dim)
            )
        self.pos_embed_z = nn.Parameter(torch.zeros(1, self.template_grid**2, dim))
        self.pos_embed_x = nn.Parameter(torch.zeros(1, self.search_grid**2, dim))
        nn.init.trunc_normal_(self.pos_embed_z, std=0.02)
        nn.init.trunc_normal_(self.pos_embed_x, std=0.02)
        drops = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio=mlp_ratio, drop_path=drop) for drop in drops
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def embed(self, image: Tensor) -> Tensor:
        """Pixels ``(B, H, W, 3)`` → tokens ``(B, N, dim)`` without positions: ``patch`` trunks."""
        tokens: Tensor = self.patch_embed(self.normalise(image))
        return tokens

    def fine(self, image: Tensor) -> Tensor:
        """Pixels ``(B, H, W, 3)`` → features at stride 8: ``shuffle`` trunks."""
        return self.stem.fine(self.normalise(image))

    def coarse(self, fine: Tensor) -> Tensor:
        """Features at stride 8 → tokens ``(B, N, dim)`` without positions: ``shuffle`` trunks."""
        tokens: Tensor = self.to_tokens(self.stem.coarse(fine))
        return tokens.flatten(2).transpose(1, 2)

    def stem_requires_grad(self, is_trained: bool) -> None:
        """Freeze a ``shuffle`` stem, or let it learn; a ``patch`` trunk has none to freeze."""
        if hasattr(self, "stem"):
            self.stem.requires_grad_(is_trained)


class CorrelationMaps(nn.Module):
    """Cosine similarity of every template cell with every search cell, as an input to the trunk.

    In no paper. Cells are at stride 8; a template cell counts by how much of it the target's box
    covers. Without it a small trunk needs many times the samples to learn to match.
    """

    def __init__(self, in_channels: int, *, dim: int, template_grid: int) -> None:
        super().__init__()
        self.template_grid = template_grid
        cells = template_grid**2
        self.project = nn.Conv2d(in_channels, dim, 1)
        self.mix = nn.Sequential(BatchNorm2d(cells), ConvNormAct(cells, MAP_CHANNELS))

    def kernel(self, template_features: Tensor, template_bbox_cxcywh: Tensor) -> Tensor:
        """Template cells as correlation kernels ``(B, cells, dim)``."""
        unit = nn.functional.normalize(self.project(template_features).flatten(2), dim=1)
        cover = box_coverage(template_bbox_cxcywh, grid=self.template_grid)
        return unit.transpose(1, 2) * (0.25 + 0.75 * cover)[..., None]

    def maps(self, search_features: Tensor, kernel: Tensor) -> Tensor:
        """Mixed correlation maps ``(B, 64, H, W)`` at stride 8."""
        B, _, H, W = search_features.shape
        unit = nn.functional.normalize(self.project(search_features).flatten(2), dim=1)
        maps: Tensor = self.mix((kernel @ unit).reshape(B, -1, H, W))
        return maps

    def map_units(self, readers: Mapping[str, int]) -> Units:
        """The channels of the maps, as a model lists them that holds this as ``correlation``.

        Args:
            readers: Path of a convolution that reads them → channels that it reads before them.
        """
        units = channels_between(self, "mix.1", ()).under("correlation")
        read_by = tuple(Side(path, offset=offset) for path, offset in readers.items())
        gates = (Gate("correlation.mix", is_output=True),)
        return dataclasses.replace(units, read_by=read_by, gates=gates)


class CorrelationPrior(CorrelationMaps):
    """Correlation maps that also join the tokens of a one-stream trunk."""

    def __init__(self, in_channels: int, *, dim: int, template_grid: int, token_dim: int) -> None:
        super().__init__(in_channels, dim=dim, template_grid=template_grid)
        self.to_tokens = nn.Conv2d(MAP_CHANNELS, token_dim, 3, 2, 1)
