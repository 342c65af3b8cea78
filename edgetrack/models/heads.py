"""Exit heads and their decoding, and bypass branches.

General Distribution: "Generalized Focal Loss", Li et al., NeurIPS 2020, arXiv 2006.04388. An edge
is the expectation of a softmax over ``K`` bins of distance from the cell's centre; the entropy
of that softmax says how sure the head is of the edge.

CENTER: OSTrack (Ye et al., ECCV 2022, arXiv 2203.11991). A cell says how likely it is the target's
centre, how far off the centre is, and the box's size.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgetrack.models.layers import BatchNorm2d, Block, ConvNormAct
from edgetrack.models.units import Units, channels_between

__all__ = [
    "BypassBranch",
    "CenterHead",
    "CenterMaps",
    "GeneralDistributionHead",
    "center_boxes",
    "decode_answer",
    "decode_center",
    "edge_distances",
    "edge_entropy",
    "hann_window",
]


def edge_distances(edge_logits: Tensor, *, bin_size: float) -> Tensor:
    """Expected distance of each edge from the cell's centre.

    Args:
        edge_logits: ``(..., 4, K)``, order left, top, right, bottom.
        bin_size: Width of a bin as a share of the search region.

    Returns:
        Distances ``(..., 4)`` as shares of the search region.
    """
    bins = torch.arange(edge_logits.shape[-1], device=edge_logits.device, dtype=edge_logits.dtype)
    return (edge_logits.softmax(-1) * bins).sum(-1) * bin_size


def edge_entropy(edge_logits: Tensor) -> Tensor:
    """Entropy of each edge distribution over its maximum, ``ln K``.

    Args:
        edge_logits: ``(..., 4, K)``.

    Returns:
        Normalised entropies ``(..., 4)`` in [0, 1].
    """
    log_probs = edge_logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1) / math.log(edge_logits.shape[-1])


def hann_window(size: int) -> Tensor:
    """OSTrack's window ``(size * size,)``: the outer product of two Hann windows without zeros."""
    steps = torch.arange(1, size + 1, dtype=torch.float32)
    profile = 0.5 * (1 - torch.cos(2 * math.pi * steps / (size + 1)))
    return torch.outer(profile, profile).flatten()


def decode_answer(
    cls_logits: Tensor, edge_logits: Tensor, *, window: Tensor, bin_size: float
) -> dict[str, Tensor]:
    """Turn a head's maps into one answer per sample.

    Args:
        cls_logits: Joint score logits ``(B, H * W)``.
        edge_logits: Edge logits ``(B, H * W, 4, K)``.
        window: Weights of the cells ``(H * W,)``.
        bin_size: Width of a bin as a share of the search region.

    Returns:
        ``bbox_cxcywh`` ``(B, 4)`` normalised to the search region, ``score`` ``(B,)`` in [0, 1],
        ``uncertainty`` ``(B,)``: the mean normalised entropy of the four edges at the winning cell.
    """
    grid = math.isqrt(window.shape[0])
    score_map = cls_logits.float().sigmoid()
    cell = (score_map * window).argmax(1, keepdim=True)
    score = score_map.gather(1, cell).squeeze(1)
    flat = edge_logits.flatten(2)
    at_cell = flat.gather(1, cell[..., None].expand(-1, -1, flat.shape[2])).float()
    edges = at_cell.reshape(-1, 4, edge_logits.shape[-1])
    left, top, right, bottom = edge_distances(edges, bin_size=bin_size).unbind(-1)
    row = torch.div(cell.squeeze(1), grid, rounding_mode="floor")
    cx = (cell.squeeze(1) - row * grid + 0.5) / grid
    cy = (row + 0.5) / grid
    bbox = torch.stack(
        [cx + (right - left) / 2, cy + (bottom - top) / 2, left + right, top + bottom], -1
    )
    return {"bbox_cxcywh": bbox, "score": score, "uncertainty": edge_entropy(edges).mean(-1)}


class GeneralDistributionHead(nn.Module):
    """Joint score and edge distributions for every cell of a feature map.

    Args:
        channels: Input width, then the width of each convolution of a tower.
        num_bins: ``K``, bins per edge.
        num_towers: 2 gives score and edges a tower each, 1 lets them share it.
    """

    def __init__(self, channels: tuple[int, ...], *, num_bins: int, num_towers: int = 2) -> None:
        super().__init__()
        self.num_bins = num_bins
        self.towers = nn.ModuleList(
            nn.Sequential(*(ConvNormAct(i, o) for i, o in itertools.pairwise(channels)))
            for _ in range(num_towers)
        )
        self.cls = nn.Conv2d(channels[-1], 1, 1)
        self.edges = nn.Conv2d(channels[-1], 4 * num_bins, 1)
        for conv in (self.cls, self.edges):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # bias is on by default
        nn.init.constant_(self.cls.bias, -4.6)  # type: ignore[arg-type]  # prior 0.01

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of a feature map ``(B, C, H, W)``.

        Returns:
            Score logits ``(B, H * W)`` and edge logits ``(B, H * W, 4, K)``.
        """
        outs = [tower(features) for tower in self.towers]
        cls_logits = self.cls(outs[0]).flatten(1)
        edges = self.edges(outs[-1]).flatten(2).transpose(1, 2)
        return cls_logits, edges.reshape(edges.shape[0], -1, 4, self.num_bins)

    def prunable_units(self) -> tuple[Units, ...]:
        """The channels behind each convolution of each tower."""
        found = []
        last = [["cls", "edges"]] if len(self.towers) == 1 else [["cls"], ["edges"]]
        for number, tower in enumerate(self.towers):
            assert isinstance(tower, nn.Sequential)
            paths = [f"towers.{number}.{index}" for index in range(len(tower))]
            readers = [*([f"{path}.0"] for path in paths[1:]), last[number]]
            found += [channels_between(self, *pair) for pair in zip(paths, readers, strict=True)]
        return tuple(found)

    @property
    def first_convolutions(self) -> tuple[str, ...]:
        """Paths of the convolutions that read the input."""
        return tuple(f"towers.{number}.0.0" for number in range(len(self.towers)))


class CenterMaps(NamedTuple):
    """What a CENTER head says, cell by cell.

    Attributes:
        score: ``(B, H * W)`` in (0, 1).
        offset: From the cell's corner to the box's centre, in cells, ``(B, H * W, 2)``, x before y.
        size: Of the box, as shares of the search region, ``(B, H * W, 2)``, width before height.
    """

    score: Tensor
    offset: Tensor
    size: Tensor


class CenterHead(nn.Module):
    """OSTrack's head, with its parameter names: a tower each for score, offset and size.

    The published head has the ``channels`` ``(768, 256, 128, 64, 32)``.

    Args:
        channels: Input width, then the width of each 3 x 3 convolution of a tower.
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.depth = len(channels) - 1
        for tower, width in (("ctr", 1), ("offset", 2), ("size", 2)):
            for index, (i, o) in enumerate(itertools.pairwise(channels), 1):
                # A bias before the batch norm does nothing, but published weights have one.
                layers = (nn.Conv2d(i, o, 3, 1, 1), BatchNorm2d(o), nn.ReLU(inplace=True))
                self.add_module(f"conv{index}_{tower}", nn.Sequential(*layers))
            self.add_module(f"conv{self.depth + 1}_{tower}", nn.Conv2d(channels[-1], width, 1))
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        score = self.get_submodule(f"conv{self.depth + 1}_ctr")
        nn.init.constant_(score.bias, -2.19)  # type: ignore[arg-type]  # prior 0.1, as in CenterNet

    def forward(self, features: Tensor) -> CenterMaps:
        """Maps of a feature map ``(B, C, H, W)``; score and size are kept 1e-4 off 0 and 1."""
        score = self._tower("ctr", features).squeeze(-1).sigmoid().clamp(1e-4, 1 - 1e-4)
        size = self._tower("size", features).sigmoid().clamp(1e-4, 1 - 1e-4)
        return CenterMaps(score, self._tower("offset", features), size)

    def _tower(self, name: str, features: Tensor) -> Tensor:
        for index in range(1, self.depth + 2):
            features = self.get_submodule(f"conv{index}_{name}")(features)
        # bfloat16 cannot tell 1 - 1e-4 from 1, and the loss takes the logarithm of what is left.
        return features.float().flatten(2).transpose(1, 2)

    def prunable_units(self) -> tuple[Units, ...]:
        """The channels behind each 3 x 3 convolution of each tower."""
        found = []
        for tower in ("ctr", "offset", "size"):
            for index in range(1, self.depth + 1):
                follower = f"conv{index + 1}_{tower}"
                reader = follower if index == self.depth else f"{follower}.0"
                found.append(channels_between(self, f"conv{index}_{tower}", (reader,)))
        return tuple(found)


def center_boxes(maps: CenterMaps) -> Tensor:
    """The box that each cell stands for.

    Returns:
        Boxes ``(B, H * W, 4)``, cxcywh, normalised to the search region.
    """
    grid = math.isqrt(maps.score.shape[1])
    steps = torch.arange(grid, device=maps.score.device, dtype=maps.score.dtype)
    corners = torch.stack([steps.repeat(grid), steps.repeat_interleave(grid)], -1)
    return torch.cat([(corners + maps.offset) / grid, maps.size], -1)


def decode_center(maps: CenterMaps, *, window: Tensor) -> dict[str, Tensor]:
    """Turn a CENTER head's maps into one box and one score per sample.

    Args:
        maps: Of the head.
        window: Weights of the cells ``(H * W,)``; they choose the cell and do not change its score.

    Returns:
        ``bbox_cxcywh`` ``(B, 4)`` normalised to the search region, ``score`` ``(B,)`` in (0, 1).
    """
    grid = math.isqrt(window.shape[0])
    cell = (maps.score * window).argmax(1, keepdim=True)
    score = maps.score.gather(1, cell).squeeze(1)
    at_cell = torch.cat([maps.offset, maps.size], -1)
    at_cell = at_cell.gather(1, cell[..., None].expand(-1, -1, 4)).squeeze(1)
    row = torch.div(cell, grid, rounding_mode="floor")
    corner = torch.cat([cell - row * grid, row], 1)
    centre = (corner + at_cell[:, :2]) / grid
    return {"bbox_cxcywh": torch.cat([centre, at_cell[:, 2:]], 1), "score": score}


class BypassBranch(nn.Module):
    """A side branch that strengthens a shallow head and never writes back to the trunk.

    Reconstruction: the paper names Bypass Branch Modules but not their inside. Here: a linear
    layer to a smaller width, one transformer block over template and search tokens, then a
    depthwise convolution on the search grid with a residual.

    Args:
        in_dim: Width of the trunk.
        dim: Width of the branch.
        num_heads: Attention heads.
        grid: Search tokens per side.
    """

    def __init__(self, in_dim: int, *, dim: int, num_heads: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.reduce = nn.Linear(in_dim, dim)
        self.block = Block(dim, num_heads, mlp_ratio=2.0)
        self.mix = nn.Sequential(
            nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, bias=False), BatchNorm2d(dim), nn.GELU()
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(B, N, in_dim)``, search tokens last → features ``(B, dim, grid, grid)``."""
        tokens = self.block(self.reduce(tokens))
        features = search_grid(tokens, grid=self.grid)
        out: Tensor = features + self.mix(features)
        return out


def search_grid(tokens: Tensor, *, grid: int) -> Tensor:
    """The last ``grid * grid`` tokens ``(B, N, C)`` as a map ``(B, C, grid, grid)``."""
    search = tokens[:, -grid * grid :]
    return search.transpose(1, 2).reshape(search.shape[0], search.shape[2], grid, grid)
