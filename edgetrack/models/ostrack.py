"""OSTrack: one-stream ViT tracker with a CENTER head, with and without candidate elimination.

Paper: "Joint Feature Learning and Relation Modeling for Tracking: A One-Stream Framework", B. Ye,
H. Chang, B. Ma, S. Shan, X. Chen; ECCV 2022, arXiv 2203.11991. Parameter names, numbers, crop
geometry and decoding are those of the released code (github.com/botaoye/OSTrack, MIT), so that
published weights load unchanged and answer the same. It has one exit: the manifest's ``score`` is
the score map at the cell that wins under the window, and ``uncertainty`` is 1 - ``score``.

Differs from the released code in what does not change an answer: the template is embedded once and
not in every frame; normalisation lies inside the graph; candidates are ranked by the one row of
attention that ranks them, computed beside the fused product.

The sizes 192, 128 and 96 are LoReTrack's (see ``loretrack``); any multiple of 16 goes.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgetrack.models.heads import CenterHead, CenterMaps, decode_center, hann_window, search_grid
from edgetrack.models.layers import Block
from edgetrack.models.one_stream import OneStreamModel, TrunkConfig
from edgetrack.models.segmented import State

__all__ = ["CONFIGS", "OSTrack", "OSTrackConfig"]


@dataclass(frozen=True, kw_only=True)
class OSTrackConfig(TrunkConfig):
    """Architecture of an ``OSTrack``; the defaults are those of OSTrack-256.

    Attributes:
        eliminate_at: Blocks, from 0, in which candidates are eliminated; ``()`` is none.
        keep_rate: Share of the search tokens that each of them keeps.
        head_channels: Widths of the head's convolutions.
    """

    eliminate_at: tuple[int, ...] = ()
    keep_rate: float = 0.7
    head_channels: tuple[int, ...] = (256, 128, 64, 32)

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        super().__post_init__()
        if self.stem != "patch" or len(self.exit_after) != 1 or self.head_upsample != 1:
            raise ValueError(
                "ostrack: expected the stem 'patch', one exit and a head on the tokens' grid, got "
                f"{self.stem!r}, exit_after {self.exit_after}, head_upsample {self.head_upsample}"
            )
        depth = self.exit_after[0]
        if list(self.eliminate_at) != sorted({*self.eliminate_at} & {*range(depth)}):
            raise ValueError(
                f"eliminate_at: expected rising blocks from 0 to {depth - 1}, got "
                f"{self.eliminate_at}"
            )
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate: expected above 0 and up to 1, got {self.keep_rate}")


_OSTRACK_384 = OSTrackConfig(template_size_px=192, search_size_px=384, search_factor=5.0)
_ELIMINATE_AT = (3, 6, 9)
CONFIGS: dict[str, OSTrackConfig] = {
    "256": OSTrackConfig(),
    "256-ce": OSTrackConfig(eliminate_at=_ELIMINATE_AT),
    "384": _OSTRACK_384,
    "384-ce": dataclasses.replace(_OSTRACK_384, eliminate_at=_ELIMINATE_AT),
}


class OSTrack(OneStreamModel):
    """One-stream ViT tracker with one exit.

    Args:
        config: The architecture.
    """

    family = "ostrack"
    paper = (
        "Joint Feature Learning and Relation Modeling for Tracking: A One-Stream Framework, "
        "ECCV 2022, arXiv 2203.11991"
    )
    config_class = OSTrackConfig
    config: OSTrackConfig

    def __init__(self, config: OSTrackConfig) -> None:
        super().__init__(config)
        self.crops = dataclasses.replace(self.crops, geometry="ostrack")
        self.box_head = CenterHead((config.dim, *config.head_channels))
        window = hann_window(config.search_grid)
        self.register_buffer("window", window, persistent=False)
        self.window: Tensor

    def segment_inputs(self, index: int) -> tuple[str, ...]:
        """Names of the tensors that the one segment reads."""
        return ("search_region", "template_tokens")

    def run_trunk(self, index: int, state: Mapping[str, Tensor]) -> State:
        """All blocks.

        Returns:
            ``tokens_0``, template and search tokens before the last norm; and, where candidates are
            eliminated, ``places`` ``(B, n)``: the cell of each search token that is left.
        """
        if not self.config.eliminate_at:
            return super().run_trunk(index, state)
        tokens = self._embed_search(state)
        cells = torch.arange(self.config.search_grid**2, device=tokens.device)
        places = cells.expand(tokens.shape[0], -1)
        for number, block in enumerate(self.backbone.blocks):
            if number in self.config.eliminate_at:
                assert isinstance(block, Block)
                tokens, kept = self._eliminate(block, tokens)
                places = places.gather(1, kept)
            else:
                tokens = block(tokens)
        return {"tokens_0": tokens, "places": places}

    def center_maps(self, state: Mapping[str, Tensor]) -> CenterMaps:
        """Score, offset and size maps from what the trunk wrote."""
        grid = self.config.search_grid
        tokens = self.backbone.norm(state["tokens_0"])
        if self.config.eliminate_at:
            search = tokens[:, self.backbone.template_grid**2 :]
            places = state["places"][..., None].expand_as(search)
            cells = search.new_zeros(search.shape[0], grid**2, search.shape[2])
            tokens = cells.scatter(1, places, search)
        maps: CenterMaps = self.box_head(search_grid(tokens, grid=grid))
        return maps

    def run_segment(self, index: int, state: Mapping[str, Tensor]) -> State:
        """Run the trunk and the head."""
        maps = self.center_maps(self.run_trunk(index, state))
        answer = decode_center(maps, window=self.window)
        return answer | {"uncertainty": 1 - answer["score"]}

    def _eliminate(self, block: Block, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run a block that keeps the search tokens which the template's middle attends to most.

        They are chosen between attention and MLP, by the mean over heads of one row of the softmax:
        that of the template token left of and above the middle.

        Returns:
            The tokens that are left, and the indices of those among the search tokens.
        """
        grid = self.backbone.template_grid
        middle = (grid - 1) // 2 * (grid + 1)
        q, k, v = block.attn.heads(block.norm1(tokens))
        tokens = tokens + block.drop(block.attn.mix(q, k, v))
        row = (q[:, :, middle : middle + 1] @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        rank = row.softmax(-1)[:, :, 0, grid**2 :].mean(1)
        kept = rank.topk(math.ceil(self.config.keep_rate * rank.shape[1]), dim=1).indices
        search = tokens[:, grid**2 :]
        search = search.gather(1, kept[..., None].expand(-1, -1, search.shape[2]))
        tokens = torch.cat([tokens[:, : grid**2], search], 1)
        return tokens + block.drop(block.mlp(block.norm2(tokens))), kept
