"""DyTrack: a ViT tracker that decides from one token whether a frame needs more layers.

Paper: "Exploring Dynamic Transformer for Efficient Object Tracking", J. Zhu et al.; IEEE TNNLS
36(8), 2025, 15502, arXiv 2403.17651. No code was released. Known of it: a ViT-B trunk, terminating
branches after layers 2, 6 and 12, an IoU token whose three-layer MLP predicts the IoU of the frame,
a box head per branch, feature recycling from branch to branch, target-aware self-distillation from
the last layer. All else here is a reconstruction:

- the IoU token comes first in the row, has no position and is there from layer 1;
- feature recycling is a linear layer on a branch's own and its predecessor's features (IoU token
  and search tokens, each after its LayerNorm), added to its own; it starts at zero, which is a
  plain branch, and ``recycling=False`` leaves it out;
- the last branch has the trunk's LayerNorm, the others their own;
- box heads are OSTrack's CENTER heads;
- ``score`` is the predicted IoU and ``uncertainty`` is 1 - ``score``; a speed preset (``fast``,
  ``medium``, ``base``) is one threshold on it for all branches.

The decision needs the IoU token alone, so a segment ends before its box head, which is run at the
exit that was taken and nowhere else.

The ``tiny`` variant shares the trunk of ``early_exit_vit-tiny``, whose weights it can start from:
see ``one_stream``. Its branches are after layers 1, 3 and 6 of 6, its box heads on a grid twice as
fine as the tokens', with a skip from the stem's fine features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from edgetrack.models.general_distribution import GeneralDistributionModel
from edgetrack.models.heads import (
    CenterHead,
    CenterMaps,
    decode_center,
    hann_window,
    search_grid,
)
from edgetrack.models.one_stream import TINY_TRUNK, OneStreamModel, TrunkConfig
from edgetrack.models.segmented import State

__all__ = ["CONFIGS", "DyTrack", "DyTrackConfig"]


@dataclass(frozen=True, kw_only=True)
class DyTrackConfig(TrunkConfig):
    """Architecture of a ``DyTrack``; the defaults are OSTrack-256's trunk.

    Attributes:
        exit_after: Number of blocks before each branch; the last is the depth.
        head_channels: Widths of a box head's convolutions.
        recycling: Whether a branch reuses its predecessor's features.
    """

    exit_after: tuple[int, ...] = (2, 6, 12)
    head_channels: tuple[int, ...] = (256, 128, 64, 32)
    recycling: bool = True

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        super().__post_init__()
        if self.exit_after[0] == 0:
            raise ValueError(
                "exit_after: expected at least one block before the first branch, where the IoU "
                f"token gathers what it knows, got {self.exit_after}"
            )


CONFIGS: dict[str, DyTrackConfig] = {
    "base": DyTrackConfig(),
    "tiny": DyTrackConfig(
        **TINY_TRUNK,
        exit_after=(1, 2, 4),
        head_channels=(48, 32),
    ),
}


class BoxHead(nn.Module):
    """From a branch's search tokens to the maps of a CENTER head."""

    def __init__(self, config: DyTrackConfig) -> None:
        super().__init__()
        self.grid = config.search_grid
        width, factor = config.dim, config.head_upsample
        self.refine: nn.Module | None = None
        self.skip: nn.Module | None = None
        if factor > 1:
            width = config.head_channels[0]
            self.refine = nn.Sequential(
                nn.Conv2d(config.dim, width * factor**2, 1), nn.PixelShuffle(factor)
            )
            if config.fine_channels:
                self.skip = nn.Conv2d(config.fine_channels, width, 1)
        self.center = CenterHead((width, *config.head_channels))

    def forward(self, features: Tensor, fine_features: Tensor | None) -> CenterMaps:
        """Features ``(B, 1 + HW, dim)``, the IoU token first → maps."""
        grid = search_grid(features, grid=self.grid)
        if self.refine is not None:
            grid = self.refine(grid)
            if self.skip is not None and fine_features is not None:
                grid = grid + self.skip(fine_features)
            grid = nn.functional.relu(grid)
        maps: CenterMaps = self.center(grid)
        return maps


class Branch(nn.Module):
    """A terminating branch: its features, its decisioner, its box head."""

    def __init__(self, config: DyTrackConfig, *, is_first: bool, is_last: bool) -> None:
        super().__init__()
        dim = config.dim
        self.norm = None if is_last else nn.LayerNorm(dim, eps=1e-6)
        self.recycle: nn.Linear | None = None
        if config.recycling and not is_first:
            self.recycle = nn.Linear(2 * dim, dim)
            nn.init.zeros_(self.recycle.weight)
            nn.init.zeros_(self.recycle.bias)
        self.decisioner = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1)
        )
        self.head = BoxHead(config)

    def recycled(self, own: Tensor, before: Tensor) -> Tensor:
        """Features ``(B, 1 + HW, dim)`` with what the branch before found."""
        assert self.recycle is not None
        out: Tensor = own + self.recycle(torch.cat([own, before], -1))
        return out

    def iou_logit(self, features: Tensor) -> Tensor:
        """Predicted IoU ``(B,)``, before the sigmoid, from the IoU token alone."""
        logit: Tensor = self.decisioner(features[:, 0]).float()
        return logit.squeeze(1)


class DyTrack(OneStreamModel):
    """One-stream ViT tracker whose segments decide, and whose heads decode at the exit taken.

    Args:
        config: The architecture.
    """

    family = "dytrack"
    paper = (
        "Exploring Dynamic Transformer for Efficient Object Tracking, IEEE TNNLS 36(8), 2025, "
        "arXiv 2403.17651"
    )
    has_heads = True
    operating_points = MappingProxyType({"medium": 0.3, "fast": 0.5, "base": 0.15})
    criterion = "score"
    rules = GeneralDistributionModel.rules  # its published numbers were made with these
    config_class = DyTrackConfig
    config: DyTrackConfig

    def __init__(self, config: DyTrackConfig) -> None:
        super().__init__(config)
        self.pretrained = ("backbone.", "correlation.")
        last = self.num_exits - 1
        self.iou_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        nn.init.trunc_normal_(self.iou_token, std=0.02)
        self.branches = nn.ModuleList(
            Branch(config, is_first=index == 0, is_last=index == last)
            for index in range(self.num_exits)
        )
        # Between a branch's features and the last one's, in training alone: no graph holds them.
        self.adaptors = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(last))
        window = hann_window(config.search_grid * config.head_upsample)
        self.register_buffer("window", window, persistent=False)
        self.window: Tensor

    def embed_template(self, template: Tensor, template_bbox_cxcywh: Tensor) -> State:
        """The trunk's, with the IoU token before the template's."""
        written = super().embed_template(template, template_bbox_cxcywh)
        tokens = written["template_tokens"]
        iou_token = self.iou_token.expand(tokens.shape[0], -1, -1)
        return written | {"template_tokens": torch.cat([iou_token, tokens], 1)}

    def segment_inputs(self, index: int) -> tuple[str, ...]:
        """Names of the tensors that a segment reads."""
        if index == 0:
            prior = ("correlation_kernel",) if self.correlation is not None else ()
            return ("search_region", "template_tokens", *prior)
        before = (f"features_{index - 1}",) if self.config.recycling else ()
        return (f"tokens_{index - 1}", *before)

    def run_segment(self, index: int, state: Mapping[str, Tensor]) -> State:
        """Run the blocks of one segment and decide; ``features_<index>`` are for its head."""
        written = self.run_trunk(index, state)
        features = self.branch_features(index, {**state, **written})
        if index == self.num_exits - 1:
            del written[f"tokens_{index}"]
        score = self.branch(index).iou_logit(features).sigmoid()
        answer = {"score": score, "uncertainty": 1 - score}
        return written | {f"features_{index}": features} | answer

    def head_inputs(self, index: int) -> tuple[str, ...]:
        """Names of the tensors that a box head reads."""
        skip = ("fine_features",) if self.branch(index).head.skip is not None else ()
        return (f"features_{index}", *skip)

    def run_head(self, index: int, state: Mapping[str, Tensor]) -> State:
        """The box of one exit."""
        answer = decode_center(self.box_maps(index, state), window=self.window)
        return {"bbox_cxcywh": answer["bbox_cxcywh"]}

    def branch_features(self, index: int, state: Mapping[str, Tensor]) -> Tensor:
        """Features ``(B, 1 + HW, dim)`` of a branch, the IoU token first.

        Args:
            index: Branch.
            state: Holds ``tokens_<index>``, and the features of the branch before if it recycles.
        """
        branch, tokens = self.branch(index), state[f"tokens_{index}"]
        norm = self.backbone.norm if branch.norm is None else branch.norm
        count = self.config.search_grid**2
        own: Tensor = norm(torch.cat([tokens[:, :1], tokens[:, -count:]], 1))
        if branch.recycle is None:
            return own
        return branch.recycled(own, state[f"features_{index - 1}"])

    def box_maps(self, index: int, state: Mapping[str, Tensor]) -> CenterMaps:
        """Maps of one branch's box head."""
        head = self.branch(index).head
        maps: CenterMaps = head(state[f"features_{index}"], state.get("fine_features"))
        return maps

    def branch(self, index: int) -> Branch:
        """One of the branches."""
        branch = self.branches[index]
        assert isinstance(branch, Branch)
        return branch
