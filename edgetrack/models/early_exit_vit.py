"""Early-exit ViT tracker with General Distribution heads.

Paper: "Efficient early exit single object tracking via general distribution", Y. Feng, D. Yuan,
J. Song, H. Liu, Y. Yang, T. Zhang; Neurocomputing 661 (2026) 131888,
doi 10.1016/j.neucom.2025.131888. Only its abstract is public: it states a one-stream trunk with
several heads, box edges as General Distributions, their entropy as the exit criterion, Bypass
Branch Modules that strengthen shallow heads, and a two-stage training that keeps the final head's
performance. All else here is a reconstruction:

- the layers after which it exits, 4 / 8 / 12 for the ``base`` trunk (OSTrack-256: Ye et al.,
  ECCV 2022, arXiv 2203.11991, without candidate elimination);
- the inside of a bypass branch (see ``heads.BypassBranch``) and of the heads (GFL's, with
  OSTrack's tower widths), and 17 bins per edge;
- a LayerNorm per exit; the final exit uses the trunk's own;
- the mean of the four edges' normalised entropies as the uncertainty.

The ``tiny`` variant differs further, to learn from little data and run on two CPU cores: a
ShuffleNetV2 stem instead of a patch embedding, an explicit correlation of template and search
cells as an input, an embedding of where the target's box covers the template, heads on a grid
twice as fine as the tokens', one tower per head, and bins of 1/26 of the search region. Depth earns
its place by design: the first exit comes before any block and before the coarser half of the stem,
on correlation maps and fine features alone, at a quarter of the cost; the second sees tokens alone;
the last sees both.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgetrack.bundle import CropSpec
from edgetrack.models.general_distribution import GeneralDistributionModel
from edgetrack.models.heads import (
    BypassBranch,
    GeneralDistributionHead,
    hann_window,
    search_grid,
)
from edgetrack.models.layers import (
    BatchNorm2d,
    Block,
    ConvNormAct,
    PatchEmbed,
    ShuffleStem,
    box_coverage,
    normalise,
)
from edgetrack.models.segmented import State

__all__ = ["CONFIGS", "EarlyExitViT", "EarlyExitViTConfig", "create"]


@dataclass(frozen=True, kw_only=True)
class EarlyExitViTConfig:
    """Architecture of an ``EarlyExitViT``; the defaults are OSTrack-256's trunk.

    Attributes:
        template_size_px: Side of the template crop.
        template_factor: Its window over the root of the target's area.
        search_size_px: Side of the search region.
        search_factor: Its window over the root of the target's area.
        stem: ``patch`` (16 px patches) or ``shuffle`` (ShuffleNetV2 to stride 16).
        correlation_dim: Width of the stride-8 features that are correlated; 0 turns the explicit
            correlation and the box embedding off (``shuffle`` only).
        dim: Token width.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of an MLP over ``dim``.
        exit_after: Number of blocks before each exit; the last is the depth. The first may be 0
            with ``correlation_dim``: a ``FineExit``.
        bypass_dim: Width of the bypass branches.
        bypass_heads: Attention heads in a bypass branch.
        head_channels: Widths of the final head's convolutions.
        shallow_head_channels: Widths of the shallow heads' convolutions.
        fine_exit_depth: Separable convolutions of an exit before any block.
        num_towers: Towers per head, 1 or 2.
        head_upsample: Head cells per token along a side.
        num_bins: Bins per edge.
        bin_size: Width of a bin as a share of the search region.
        drop_path: Largest probability of dropping a residual branch in training.
    """

    template_size_px: int = 128
    template_factor: float = 2.0
    search_size_px: int = 256
    search_factor: float = 4.0
    stem: str = "patch"
    correlation_dim: int = 0
    dim: int = 768
    num_heads: int = 12
    mlp_ratio: float = 4.0
    exit_after: tuple[int, ...] = (4, 8, 12)
    bypass_dim: int = 256
    bypass_heads: int = 4
    head_channels: tuple[int, ...] = (256, 128, 64, 32)
    shallow_head_channels: tuple[int, ...] = (128, 64, 32)
    fine_exit_depth: int = 2
    num_towers: int = 2
    head_upsample: int = 1
    num_bins: int = 17
    bin_size: float = 1 / 16
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if self.stem not in ("patch", "shuffle"):
            raise ValueError(f"stem: expected 'patch' or 'shuffle', got {self.stem!r}")
        for name in ("template_size_px", "search_size_px"):
            if getattr(self, name) % 16:
                raise ValueError(f"{name}: expected a multiple of 16, got {getattr(self, name)}")
        is_rising = list(self.exit_after) == sorted({*self.exit_after})
        lowest = 0 if self.correlation_dim else 1
        if not is_rising or not self.exit_after or self.exit_after[0] < lowest:
            raise ValueError(
                f"exit_after: expected rising block counts from {lowest}, got {self.exit_after}"
            )
        for width, heads in (("dim", "num_heads"), ("bypass_dim", "bypass_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{width}: expected a multiple of {heads}={getattr(self, heads)}, got "
                    f"{getattr(self, width)}"
                )
        if self.correlation_dim and self.stem != "shuffle":
            raise ValueError("correlation_dim: expected 0 with stem 'patch'")
        if self.correlation_dim and self.head_upsample > 2:
            raise ValueError(
                "head_upsample: expected 1 or 2 with correlation_dim, whose features are at "
                f"stride 8, got {self.head_upsample}"
            )


CONFIGS: dict[str, EarlyExitViTConfig] = {
    "base": EarlyExitViTConfig(),
    "tiny": EarlyExitViTConfig(
        template_size_px=64,
        search_size_px=128,
        stem="shuffle",
        correlation_dim=64,
        dim=160,
        num_heads=5,
        mlp_ratio=3.0,
        exit_after=(0, 3, 6),
        bypass_dim=96,
        bypass_heads=3,
        head_channels=(64,),
        shallow_head_channels=(48,),
        num_towers=1,
        head_upsample=2,
        bin_size=1 / 26,
        drop_path=0.0,
    ),
}


def create(config: str | Mapping[str, Any]) -> "EarlyExitViT":
    """Make a model from the name of a variant or from a configuration as JSON holds it.

    Raises:
        ValueError: The configuration has an unknown key.
    """
    if isinstance(config, str):
        return EarlyExitViT(CONFIGS[config])
    known = {f.name for f in dataclasses.fields(EarlyExitViTConfig)}
    if unknown := sorted(set(config) - known):
        raise ValueError(f"early_exit_vit: expected keys among {sorted(known)}, got {unknown}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    return EarlyExitViT(EarlyExitViTConfig(**values))


class Backbone(nn.Module):
    """The one-stream trunk; ``patch`` trunks have OSTrack's parameter names.

    Args:
        config: The architecture.
    """

    def __init__(self, config: EarlyExitViTConfig) -> None:
        super().__init__()
        self.template_grid = config.template_size_px // 16
        self.search_grid = config.search_size_px // 16
        dim, depth = config.dim, config.exit_after[-1]
        if config.stem == "patch":
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
        drops = torch.linspace(0, config.drop_path, depth).tolist()
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, mlp_ratio=config.mlp_ratio, drop_path=drop)
            for drop in drops
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def embed(self, image: Tensor) -> Tensor:
        """Pixels ``(B, H, W, 3)`` → tokens ``(B, N, dim)`` without positions: ``patch`` trunks."""
        tokens: Tensor = self.patch_embed(normalise(image))
        return tokens

    def fine(self, image: Tensor) -> Tensor:
        """Pixels ``(B, H, W, 3)`` → features at stride 8: ``shuffle`` trunks."""
        return self.stem.fine(normalise(image))

    def coarse(self, fine: Tensor) -> Tensor:
        """Features at stride 8 → tokens ``(B, N, dim)`` without positions: ``shuffle`` trunks."""
        tokens: Tensor = self.to_tokens(self.stem.coarse(fine))
        return tokens.flatten(2).transpose(1, 2)

    def stem_requires_grad(self, is_trained: bool) -> None:
        """Freeze a ``shuffle`` stem, or let it learn; a ``patch`` trunk has none to freeze."""
        if hasattr(self, "stem"):
            self.stem.requires_grad_(is_trained)


class CorrelationPrior(nn.Module):
    """Cosine similarity of every template cell with every search cell, as an input to the trunk.

    Not in the paper. Cells are at stride 8; a template cell counts by how much of it the target's
    box covers. Without it a small trunk needs many times the samples to learn to match.
    """

    def __init__(self, in_channels: int, *, dim: int, template_grid: int, token_dim: int) -> None:
        super().__init__()
        self.template_grid = template_grid
        cells = template_grid**2
        self.project = nn.Conv2d(in_channels, dim, 1)
        self.mix = nn.Sequential(BatchNorm2d(cells), ConvNormAct(cells, 64))
        self.to_tokens = nn.Conv2d(64, token_dim, 3, 2, 1)

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


class ExitPath(nn.Module):
    """From trunk tokens to the maps of one exit: norm, bypass branch, finer grid, head."""

    def __init__(self, config: EarlyExitViTConfig, *, is_final: bool, skip_channels: int) -> None:
        super().__init__()
        self.grid = config.search_size_px // 16
        width = config.dim if is_final else config.bypass_dim
        channels = config.head_channels if is_final else config.shallow_head_channels
        self.norm = None if is_final else nn.LayerNorm(config.dim, eps=1e-6)
        self.bypass = (
            None
            if is_final
            else BypassBranch(config.dim, dim=width, num_heads=config.bypass_heads, grid=self.grid)
        )
        self.refine: nn.Module | None = None
        self.skip: nn.Module | None = None
        if config.head_upsample > 1:
            factor = config.head_upsample
            self.refine = nn.Sequential(
                nn.Conv2d(width, channels[0] * factor**2, 1), nn.PixelShuffle(factor)
            )
            width = channels[0]
            if skip_channels:
                self.skip = nn.Conv2d(skip_channels, width, 1)
        self.head = GeneralDistributionHead(
            (width, *channels), num_bins=config.num_bins, num_towers=config.num_towers
        )

    def forward(self, tokens: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens ``(B, N, dim)`` → score logits ``(B, HW)``, edge logits ``(B, HW, 4, K)``."""
        if self.norm is not None:
            tokens = self.norm(tokens)
        features = (
            search_grid(tokens, grid=self.grid) if self.bypass is None else self.bypass(tokens)
        )
        if self.refine is not None:
            features = self.refine(features)
            if self.skip is not None and skip is not None:
                features = features + self.skip(skip)
            features = nn.functional.relu(features)
        maps: tuple[Tensor, Tensor] = self.head(features)
        return maps


class FineExit(nn.Module):
    """An exit before any block: separable convolutions over fine features and correlation maps.

    Not in the paper, whose first exit comes after some blocks of a far larger trunk. The maps hold
    what template and search region have in common, so a few cheap convolutions can decide.
    """

    def __init__(self, in_channels: int, config: EarlyExitViTConfig) -> None:
        super().__init__()
        width = config.bypass_dim
        self.reduce = ConvNormAct(in_channels, width, kernel=1)
        self.mix = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 5, 1, 2, groups=width, bias=False),
                BatchNorm2d(width),
                ConvNormAct(width, width, kernel=1),
            )
            for _ in range(config.fine_exit_depth)
        )
        self.head = GeneralDistributionHead(
            (width, *config.shallow_head_channels),
            num_bins=config.num_bins,
            num_towers=config.num_towers,
        )

    def forward(self, fine_features: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(B, C, H, W)`` → score logits ``(B, HW)``, edge logits ``(B, HW, 4, K)``."""
        features = self.reduce(fine_features)
        for mix in self.mix:
            features = features + mix(features)
        maps: tuple[Tensor, Tensor] = self.head(features)
        return maps


class EarlyExitViT(GeneralDistributionModel):
    """One-stream ViT tracker that may stop after any of its segments.

    Args:
        config: The architecture.
    """

    family = "early_exit_vit"
    paper = (
        "Efficient early exit single object tracking via general distribution, "
        "Neurocomputing 661 (2026) 131888, doi 10.1016/j.neucom.2025.131888"
    )

    def __init__(self, config: EarlyExitViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_exits = len(config.exit_after)
        self.crops = CropSpec(
            template_size_px=config.template_size_px,
            template_factor=config.template_factor,
            search_size_px=config.search_size_px,
            search_factor=config.search_factor,
        )
        if config.stem == "patch":
            self.pretrained = ("backbone.",)
        self.backbone = Backbone(config)
        self.correlation: CorrelationPrior | None = None
        skip_channels = 0
        if config.correlation_dim:
            self.correlation = CorrelationPrior(
                ShuffleStem.channels[0],
                dim=config.correlation_dim,
                template_grid=config.template_size_px // 8,
                token_dim=config.dim,
            )
            self.box_embed = nn.Parameter(torch.randn(2, config.dim) * 0.02)
            skip_channels = ShuffleStem.channels[0] + 64
        last = self.num_exits - 1
        self.exits = nn.ModuleList(
            FineExit(skip_channels, config)
            if depth == 0
            else ExitPath(
                config,
                is_final=index == last,
                skip_channels=skip_channels if index == last else 0,
            )
            for index, depth in enumerate(config.exit_after)
        )
        window = hann_window(config.search_size_px // 16 * config.head_upsample)
        self.register_buffer("window", window, persistent=False)
        self.bin_size = config.bin_size

    @property
    def config_dict(self) -> dict[str, Any]:
        """The configuration, as JSON can hold it."""
        return dataclasses.asdict(self.config)

    def embed_template(self, template: Tensor, template_bbox_cxcywh: Tensor) -> State:
        """Template tokens, and correlation kernels where the variant has them."""
        if self.correlation is None:
            tokens = self._tokens(template) + self.backbone.pos_embed_z
            return {"template_tokens": tokens}
        fine = self.backbone.fine(template)
        cover = box_coverage(template_bbox_cxcywh, grid=self.backbone.template_grid)[..., None]
        tokens = self.backbone.coarse(fine) + self.backbone.pos_embed_z
        tokens = tokens + cover * self.box_embed[0] + (1 - cover) * self.box_embed[1]
        kernel = self.correlation.kernel(fine, template_bbox_cxcywh)
        return {"template_tokens": tokens, "correlation_kernel": kernel}

    def segment_inputs(self, index: int) -> tuple[str, ...]:
        """Names of the tensors that a segment reads."""
        last = self.num_exits - 1
        names: tuple[str, ...] = ("search_region",) if index == 0 else ()
        if index == self._first_with_blocks:
            names += ("template_tokens",)
        elif index > 0:
            names += (f"tokens_{index - 1}",)
        if self.correlation is not None and index == 0:
            names += ("correlation_kernel",)
        elif self.correlation is not None and index in (self._first_with_blocks, last):
            names += ("fine_features",)
        return names

    def run_trunk(self, index: int, state: Mapping[str, Tensor]) -> State:
        """The trunk's part of a segment: ``tokens_<index>``, and segment 0's ``fine_features``."""
        written: State = {}
        if index == 0 and self.correlation is not None:
            fine = self.backbone.fine(state["search_region"])
            maps = self.correlation.maps(fine, state["correlation_kernel"])
            written["fine_features"] = torch.cat([fine, maps], 1)
        if index < self._first_with_blocks:
            return written
        begin = 0 if index == 0 else self.config.exit_after[index - 1]
        tokens = (
            self._embed_search({**state, **written}) if begin == 0 else state[f"tokens_{index - 1}"]
        )
        for block in self.backbone.blocks[begin : self.config.exit_after[index]]:
            tokens = block(tokens)
        return written | {f"tokens_{index}": tokens}

    def exit_logits(self, index: int, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Maps of one exit from what the trunk wrote.

        Returns:
            Score logits ``(B, HW)`` and edge logits ``(B, HW, 4, K)``.
        """
        logits: tuple[Tensor, Tensor]
        if index < self._first_with_blocks:
            logits = self.exits[index](state["fine_features"])
            return logits
        tokens = state[f"tokens_{index}"]
        if index == self.num_exits - 1:
            tokens = self.backbone.norm(tokens)
        logits = self.exits[index](tokens, state.get("fine_features"))
        return logits

    def stem_requires_grad(self, is_trained: bool) -> None:
        """Freeze a ``shuffle`` stem, or let it learn; a ``patch`` trunk has none to freeze."""
        self.backbone.stem_requires_grad(is_trained)

    @property
    def _first_with_blocks(self) -> int:
        """The first segment with blocks: 1 after a ``FineExit``, else 0."""
        return int(self.config.exit_after[0] == 0)

    def _tokens(self, image: Tensor) -> Tensor:
        if self.config.stem == "patch":
            return self.backbone.embed(image)
        return self.backbone.coarse(self.backbone.fine(image))

    def _embed_search(self, state: Mapping[str, Tensor]) -> Tensor:
        """Template and search tokens ``(B, N, dim)`` with their positions."""
        if self.correlation is None:
            tokens = self._tokens(state["search_region"])
        else:
            features = state["fine_features"]
            width = ShuffleStem.channels[0]
            fine, maps = features[:, :width], features[:, width:]
            tokens = self.backbone.coarse(fine)
            tokens = tokens + self.correlation.to_tokens(maps).flatten(2).transpose(1, 2)
        tokens = tokens + self.backbone.pos_embed_x
        return torch.cat([state["template_tokens"], tokens], 1)
