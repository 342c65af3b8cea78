"""Families on a one-stream trunk that is cut by exits: template and search region as one row.

``patch`` trunks are OSTrack's (Ye et al., ECCV 2022, arXiv 2203.11991, without candidate
elimination), with its parameter names. ``shuffle`` trunks learn from little data and run on two CPU
cores: a ShuffleNetV2 stem instead of a patch embedding, an explicit correlation of template and
search cells as an input, and an embedding of where the target's box covers the template.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from edgetrack.bundle import CropSpec
from edgetrack.models.layers import ShuffleStem, box_coverage
from edgetrack.models.segmented import SegmentedModel, State
from edgetrack.models.trunk import Backbone, CorrelationPrior

__all__ = ["TINY_TRUNK", "OneStreamModel", "TrunkConfig"]

# The trunk of the bundle that ships, but for its depth; ``tiny`` variants start from its weights.
TINY_TRUNK: Mapping[str, Any] = MappingProxyType(
    {
        "template_size_px": 80,
        "search_size_px": 160,
        "stem": "shuffle",
        "correlation_dim": 64,
        "dim": 160,
        "num_heads": 5,
        "mlp_ratio": 3.0,
        "head_upsample": 2,
        "drop_path": 0.0,
    }
)


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """Architecture of a trunk and where it is cut; the defaults are OSTrack-256's trunk.

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
            with ``correlation_dim``: an exit before any block.
        head_upsample: Head cells per token along a side.
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
    exit_after: tuple[int, ...] = (12,)
    head_upsample: int = 1
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
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim: expected a multiple of num_heads={self.num_heads}, got {self.dim}"
            )
        if self.correlation_dim and self.stem != "shuffle":
            raise ValueError("correlation_dim: expected 0 with stem 'patch'")
        if self.correlation_dim and self.head_upsample > 2:
            raise ValueError(
                "head_upsample: expected 1 or 2 with correlation_dim, whose features are at "
                f"stride 8, got {self.head_upsample}"
            )

    @property
    def search_grid(self) -> int:
        """Search tokens per side."""
        return self.search_size_px // 16

    @property
    def fine_channels(self) -> int:
        """Width of the tensor ``fine_features``; 0 for a trunk that writes none."""
        return ShuffleStem.channels[0] + 64 if self.correlation_dim else 0


class OneStreamModel(SegmentedModel):
    """A family on this trunk: a subclass adds what its exits are.

    Args:
        config: The architecture.
    """

    config: TrunkConfig

    def __init__(self, config: TrunkConfig) -> None:
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
        self.backbone = Backbone(
            stem=config.stem,
            template_size_px=config.template_size_px,
            search_size_px=config.search_size_px,
            dim=config.dim,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            depth=config.exit_after[-1],
            drop_path=config.drop_path,
        )
        self.correlation: CorrelationPrior | None = None
        if config.correlation_dim:
            self.correlation = CorrelationPrior(
                ShuffleStem.channels[0],
                dim=config.correlation_dim,
                template_grid=config.template_size_px // 8,
                token_dim=config.dim,
            )
            self.box_embed = nn.Parameter(torch.randn(2, config.dim) * 0.02)

    def stem_requires_grad(self, is_trained: bool) -> None:
        """Freeze a ``shuffle`` stem, or let it learn; a ``patch`` trunk has none to freeze."""
        self.backbone.stem_requires_grad(is_trained)

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

    def run_trunk(self, index: int, state: Mapping[str, Tensor]) -> State:
        """The trunk's part of a segment: ``tokens_<index>``, and segment 0's ``fine_features``."""
        written = self._fine_features(state) if index == 0 else {}
        if index < self._first_with_blocks:
            return written
        begin = 0 if index == 0 else self.config.exit_after[index - 1]
        tokens = (
            self._embed_search({**state, **written}) if begin == 0 else state[f"tokens_{index - 1}"]
        )
        for block in self.backbone.blocks[begin : self.config.exit_after[index]]:
            tokens = block(tokens)
        return written | {f"tokens_{index}": tokens}

    @property
    def _first_with_blocks(self) -> int:
        """The first segment with blocks: 1 after a ``FineExit``, else 0."""
        return int(self.config.exit_after[0] == 0)

    def _tokens(self, image: Tensor) -> Tensor:
        if self.config.stem == "patch":
            return self.backbone.embed(image)
        return self.backbone.coarse(self.backbone.fine(image))

    def _fine_features(self, state: Mapping[str, Tensor]) -> State:
        """Features and correlation maps at stride 8, where the variant has them."""
        if self.correlation is None:
            return {}
        fine = self.backbone.fine(state["search_region"])
        maps = self.correlation.maps(fine, state["correlation_kernel"])
        return {"fine_features": torch.cat([fine, maps], 1)}

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
