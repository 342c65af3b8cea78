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

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from edgetrack.models.general_distribution import GeneralDistributionModel
from edgetrack.models.heads import (
    BypassBranch,
    GeneralDistributionHead,
    hann_window,
    search_grid,
)
from edgetrack.models.layers import BatchNorm2d, ConvNormAct, ShuffleStem
from edgetrack.models.one_stream import TINY_TRUNK, OneStreamModel, TrunkConfig
from edgetrack.models.units import Gate, Side, Units, num_outputs

__all__ = ["CONFIGS", "EarlyExitViT", "EarlyExitViTConfig"]


@dataclass(frozen=True, kw_only=True)
class EarlyExitViTConfig(TrunkConfig):
    """Architecture of an ``EarlyExitViT``; the defaults are OSTrack-256's trunk.

    Attributes:
        exit_after: See ``TrunkConfig``; an exit before any block is a ``FineExit``.
        bypass_dim: Width of the bypass branches.
        bypass_heads: Attention heads in a bypass branch.
        head_channels: Widths of the final head's convolutions.
        shallow_head_channels: Widths of the shallow heads' convolutions.
        fine_exit_depth: Separable convolutions of an exit before any block.
        num_towers: Towers per head, 1 or 2.
        num_bins: Bins per edge.
        bin_size: Width of a bin as a share of the search region.
    """

    exit_after: tuple[int, ...] = (4, 8, 12)
    bypass_dim: int = 256
    bypass_heads: int = 4
    head_channels: tuple[int, ...] = (256, 128, 64, 32)
    shallow_head_channels: tuple[int, ...] = (128, 64, 32)
    fine_exit_depth: int = 2
    num_towers: int = 2
    num_bins: int = 17
    bin_size: float = 1 / 16

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        super().__post_init__()
        if self.bypass_dim % self.bypass_heads:
            raise ValueError(
                f"bypass_dim: expected a multiple of bypass_heads={self.bypass_heads}, got "
                f"{self.bypass_dim}"
            )


CONFIGS: dict[str, EarlyExitViTConfig] = {
    "base": EarlyExitViTConfig(),
    "tiny": EarlyExitViTConfig(
        **TINY_TRUNK,
        exit_after=(0, 2, 4),
        bypass_dim=96,
        bypass_heads=3,
        head_channels=(64,),
        shallow_head_channels=(48,),
        num_towers=1,
        bin_size=1 / 26,
    ),
}


class ExitPath(nn.Module):
    """From trunk tokens to the maps of one exit: norm, bypass branch, finer grid, head."""

    def __init__(self, config: EarlyExitViTConfig, *, is_final: bool, skip_channels: int) -> None:
        super().__init__()
        self.grid = config.search_grid
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

    def prunable_units(self) -> tuple[Units, ...]:
        """The channels that the finer grid and the skip write for the head."""
        if not isinstance(self.refine, nn.Sequential):
            return ()
        first, shuffle = self.refine
        assert isinstance(first, nn.Conv2d)
        assert isinstance(shuffle, nn.PixelShuffle)
        spread = shuffle.upscale_factor**2
        readers = tuple(f"head.{path}" for path in self.head.first_convolutions)
        skip = () if self.skip is None else (Side("skip"),)
        units = Units(
            name="refine",
            kind="gated",
            shape=(first.out_channels // spread,),
            written_by=(Side("refine.0", spread=spread), *skip),
            read_by=tuple(map(Side, readers)),
            gates=tuple(map(Gate, readers)),
        )
        return (units,)


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

    def prunable_units(self) -> tuple[Units, ...]:
        """The channels of the features, which all convolutions but the head's add to."""
        mixes = [f"mix.{index}" for index in range(len(self.mix))]
        # A channel that is 0 leaves a depthwise convolution's batch norm as its shift.
        points = [f"{mix}.2.0" for mix in mixes]
        readers = [*points, *(f"head.{path}" for path in self.head.first_convolutions)]
        inner = [path for mix in mixes for path in (f"{mix}.0", f"{mix}.1")]
        outer = [path for layer in ("reduce", *(f"{m}.2" for m in mixes))
                 for path in (f"{layer}.0", f"{layer}.1")]  # fmt: skip
        units = Units(
            name="features",
            kind="channels",
            shape=(num_outputs(self.reduce[0]),),
            written_by=tuple(map(Side, (*inner, *outer))),
            read_by=tuple(map(Side, readers)),
            gates=(*(Gate(p, is_output=True) for p in ("reduce", *mixes)), *map(Gate, points)),
            scales=tuple(path for path in outer if path.endswith(".1")),
        )
        return (units,)


class EarlyExitViT(OneStreamModel, GeneralDistributionModel):
    """One-stream ViT tracker that may stop after any of its segments.

    Args:
        config: The architecture.
    """

    family = "early_exit_vit"
    paper = (
        "Efficient early exit single object tracking via general distribution, "
        "Neurocomputing 661 (2026) 131888, doi 10.1016/j.neucom.2025.131888"
    )

    config_class = EarlyExitViTConfig
    config: EarlyExitViTConfig

    def __init__(self, config: EarlyExitViTConfig) -> None:
        super().__init__(config)
        skip_channels = config.fine_channels
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
        window = hann_window(config.search_grid * config.head_upsample)
        self.register_buffer("window", window, persistent=False)
        self.bin_size = config.bin_size

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

    def prunable_units(self) -> tuple[Units, ...]:
        """The channels of the correlation maps; modules list their own."""
        if self.correlation is None:
            return ()
        readers = {"correlation.to_tokens": 0}
        for index, path in enumerate(self.exits):
            if isinstance(path, FineExit):
                readers[f"exits.{index}.reduce.0"] = ShuffleStem.channels[0]
            elif path.skip is not None:
                readers[f"exits.{index}.skip"] = ShuffleStem.channels[0]
        return (self.correlation.map_units(readers),)
