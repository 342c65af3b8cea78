"""FARTrack: coordinates as words, several templates, and templates that lose tokens once.

Paper: "FARTrack: Fast Autoregressive Visual Tracking with High Performance", ICLR 2026,
arXiv 2602.03214. A plain ViT sees up to five templates, the search region and four command tokens;
what the commands become is compared with a vocabulary of coordinate bins. One head serves every
depth, so one training gives trackers of 15, 10 and 6 layers. Templates enter a bank frame by frame;
a quarter of a template's tokens is dropped when it enters, and never comes back. No window, no
penalty, no score.

The network follows the released variant, whose code feeds no trajectory; ``num_trajectory`` adds
the paper's trajectory tokens, the last boxes as words in the coordinates of the search region. (It
takes the next region to be centred on the answer, which is the tracker's plain rule.) Released
weights load: see ``published.load_fartrack``. Their crops are OSTrack's.

Differs from the paper:

- Tokens are gathered: 385 instead of 445. The released code masks them, which saves nothing.
- Which tokens stay is decided before a template is used for the first time. The paper takes the
  attention of the central search token, summed over all layers of a frame in which the template
  already took part. Here a stand-in for the next frame's central search token (the patch in the
  template's centre, where the next search region will be centred too, in the place of the central
  search token) is run with the template's tokens alone through the first ``selection_layers``
  layers. A reconstruction; it keeps attention fused and the number of tokens fixed.
- The first template and the newest lose tokens like all others.
- The bank is bounded: see ``template_bank``. ``min_update_score`` can keep doubtful templates out
  of it; the paper lets all in.
- ``score`` and ``uncertainty`` are ours (see ``coordinates.decode_coordinates``), and so are exits
  at several depths of one model, the ``exits`` variant: the paper runs each depth as a tracker of
  its own.

The ``micro`` variant is not the paper's network: it learns from little data and runs on two CPU
cores. It shares stem, correlation prior, widths and depth with ``early_exit_vit-tiny``, whose
weights it can start from; its crops are 64 and 128 px and its bins half as many per pixel.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgetrack.models.coordinates import CoordinateVocabulary, decode_coordinates
from edgetrack.models.layers import Block
from edgetrack.models.one_stream import OneStreamModel, TrunkConfig
from edgetrack.models.segmented import State
from edgetrack.models.template_bank import (
    choose_templates,
    enter_template,
    first_clock,
    first_history,
)

__all__ = ["CONFIGS", "FARTrack", "FARTrackConfig"]


@dataclass(frozen=True, kw_only=True)
class FARTrackConfig(TrunkConfig):
    """Architecture of a ``FARTrack``; the defaults are the paper's Tiny.

    Attributes:
        num_templates: Templates that a frame sees.
        retention: Share of a template's tokens that stays, in (0, 1].
        selection_layers: Layers whose attention decides which; at most those before the first
            exit, so that all depths of one training agree.
        history_places: Templates that the bank holds; even.
        num_bins: Coordinate bins over [-0.5, 1.5] of the search region.
        num_trajectory: Former boxes that are fed as tokens.
        min_update_score: A frame with a lower score adds no template; 0 is off.
        norm_eps: Of the blocks' norms. The released sparse weights were trained with 1e-5.
        geometry: ``CropSpec.geometry``; ``ostrack`` for published weights.
    """

    template_size_px: int = 112
    search_size_px: int = 224
    dim: int = 192
    num_heads: int = 3
    exit_after: tuple[int, ...] = (15,)
    num_templates: int = 5
    retention: float = 0.75
    selection_layers: int = 3
    history_places: int = 16
    num_bins: int = 600
    num_trajectory: int = 0
    min_update_score: float = 0.0
    norm_eps: float = 1e-6
    geometry: str = "edgetrack"

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        super().__post_init__()
        if self.exit_after[0] == 0:
            raise ValueError(
                f"exit_after: expected at least one block before an exit, got {self.exit_after}"
            )
        if self.num_templates < 1:
            raise ValueError(
                f"num_templates: expected at least 1 slot for templates, got {self.num_templates}"
            )
        if not 0 < self.retention <= 1:
            raise ValueError(f"retention: expected more than 0, up to 1, got {self.retention}")
        if self.selection_layers < 1:
            raise ValueError(f"selection_layers: expected at least 1, got {self.selection_layers}")
        if self.exit_after[0] < self.selection_layers:
            raise ValueError(
                f"exit_after: expected the first exit behind layer {self.selection_layers} or a "
                "later one (selection_layers: those before it choose template tokens), got "
                f"{self.exit_after}"
            )
        if self.history_places < 2 or self.history_places % 2:
            raise ValueError(
                f"history_places: expected an even number from 2 on, got {self.history_places}"
            )
        if self.num_bins < 4 or self.num_trajectory < 0 or not 0 <= self.min_update_score <= 1:
            raise ValueError(
                "expected num_bins >= 4, num_trajectory >= 0 and min_update_score in [0, 1], got "
                f"{self.num_bins}, {self.num_trajectory} and {self.min_update_score}"
            )

    @property
    def kept_tokens(self) -> int:
        """Tokens that stay of a template: 37 of 49 at 75 %."""
        cells = (self.template_size_px // 16) ** 2
        return cells - int((1 - self.retention) * cells)


CONFIGS: dict[str, FARTrackConfig] = {
    "tiny": FARTrackConfig(),
    "nano": FARTrackConfig(exit_after=(10,)),
    "pico": FARTrackConfig(exit_after=(6,)),
    "exits": FARTrackConfig(exit_after=(6, 10, 15)),
    "micro": FARTrackConfig(
        template_size_px=64,
        search_size_px=128,
        stem="shuffle",
        correlation_dim=64,
        dim=160,
        num_heads=5,
        mlp_ratio=3.0,
        exit_after=(2, 4, 6),
        selection_layers=2,
        num_bins=128,
        drop_path=0.0,
    ),
}


class FARTrack(OneStreamModel):
    """ViT tracker that reads its box from command tokens and renews its templates.

    Args:
        config: The architecture.
    """

    family = "fartrack"
    paper = (
        "FARTrack: Fast Autoregressive Visual Tracking with High Performance, ICLR 2026, "
        "arXiv 2602.03214"
    )
    config_class = FARTrackConfig
    config: FARTrackConfig

    def __init__(self, config: FARTrackConfig) -> None:
        super().__init__(config)
        self.crops = replace(self.crops, geometry=config.geometry)
        for block in self.backbone.blocks:
            assert isinstance(block, Block)
            block.norm1.eps = block.norm2.eps = config.norm_eps
        # One vector per slot of the bank, and one for the search region.
        self.identity = nn.Parameter(torch.zeros(config.num_templates + 1, config.dim))
        nn.init.trunc_normal_(self.identity, std=0.02)
        self.vocabulary = CoordinateVocabulary(config.num_bins, config.dim)
        self.update_inputs = ("template", "template_bbox_cxcywh", "bank", "bank_clock")
        names = ["template_tokens", "bank", "bank_clock"]
        if config.min_update_score:
            self.update_inputs += ("template_tokens", "score")
        if config.num_trajectory:
            positions = torch.empty(config.num_trajectory, 4, config.dim)
            self.trajectory_positions = nn.Parameter(nn.init.trunc_normal_(positions, std=0.02))
            self.update_inputs += ("trajectory", "bbox_cxcywh")
            names.append("trajectory")
        self.carried = {name: f"next_{name}" for name in names}

    def cut(self, **changes: Any) -> "FARTrack":
        """A variant with these weights: another depth or other exits, retention, bank or gate.

        Args:
            changes: Of the configuration; the depth can only shrink.

        Raises:
            ValueError: A change asks for weights that this model has not.
        """
        other = FARTrack(replace(self.config, **changes))
        ours = self.state_dict()
        shapes = {name: value.shape for name, value in other.state_dict().items()}
        if missing := [k for k, v in shapes.items() if k not in ours or ours[k].shape != v]:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"cut: expected a part of this model, got one that needs "
                f"{', '.join(missing[:3])}{more}"
            )
        other.load_state_dict({name: ours[name] for name in shapes})
        return other.train(self.training)

    def embed_template(self, template: Tensor, template_bbox_cxcywh: Tensor) -> State:
        """The first template: it fills all slots and all places of the bank."""
        state = super().embed_template(template, template_bbox_cxcywh)
        kept = self._sparse(state["template_tokens"])
        slots = kept[:, None].expand(-1, self.config.num_templates, -1, -1)
        state["template_tokens"] = self._in_slots(slots)
        state["bank"] = first_history(kept, self.config.history_places)
        state["bank_clock"] = first_clock(kept)
        if self.config.num_trajectory:
            state["trajectory"] = self._standing_still(template_bbox_cxcywh)
        return state

    def embed_templates(
        self, templates: Tensor, bboxes_cxcywh: Tensor, *, is_sparse: bool
    ) -> State:
        """What a frame reads if these templates are in the slots; for training.

        Args:
            templates: uint8 RGB ``(B, S, H, H, 3)``, oldest first.
            bboxes_cxcywh: The target in them, ``(B, S, 4)``.
            is_sparse: Drop tokens; without it all stay, as in the paper's first two stages.

        Raises:
            ValueError: There is not one template per slot.
        """
        count = self.config.num_templates
        if templates.shape[1] != count:
            raise ValueError(
                f"templates: expected one for each of {count} slots, got {templates.shape[1]}; "
                "set num_templates of the stage"
            )
        state = super().embed_template(templates.flatten(0, 1), bboxes_cxcywh.flatten(0, 1))
        tokens = state["template_tokens"]
        tokens = self._sparse(tokens) if is_sparse else tokens
        state["template_tokens"] = self._in_slots(tokens.reshape(-1, count, *tokens.shape[1:]))
        if "correlation_kernel" in state:  # of the first template alone
            state["correlation_kernel"] = state["correlation_kernel"][::count]
        if self.config.num_trajectory:
            state["trajectory"] = self._standing_still(bboxes_cxcywh[:, 0])
        return state

    def segment_inputs(self, index: int) -> tuple[str, ...]:
        """Names of the tensors that a segment reads."""
        if index > 0:
            return (f"tokens_{index - 1}",)
        names: tuple[str, ...] = ("search_region", "template_tokens")
        names += () if self.correlation is None else ("correlation_kernel",)
        return names + (("trajectory",) if self.config.num_trajectory else ())

    def run_segment(self, index: int, state: Mapping[str, Tensor]) -> State:
        """Run the blocks of one segment, and read the box."""
        tokens = self.run_trunk(index, state)[f"tokens_{index}"]
        answer = decode_coordinates(self._logits(tokens), self.config.num_bins)
        return answer if index == self.num_exits - 1 else {f"tokens_{index}": tokens, **answer}

    def logits_at(self, depths: Iterable[int], state: Mapping[str, Tensor]) -> list[Tensor]:
        """Logits ``(B, 4, words)`` after so many blocks each: every depth has the same head.

        Args:
            depths: Numbers of blocks, from 1.
            state: What ``segment_inputs(0)`` names.
        """
        wanted = set(depths)
        tokens = self._embed_search({**state, **self._fine_features(state)})
        found = []
        for depth, block in enumerate(self.backbone.blocks[: max(wanted)], 1):
            tokens = block(tokens)
            if depth in wanted:
                found.append(self._logits(tokens))
        return found

    def run_update(self, state: Mapping[str, Tensor]) -> State:
        """Take this frame's template into the bank, and fill the slots for the next frame."""
        embedded = super().embed_template(state["template"], state["template_bbox_cxcywh"])
        kept = self._sparse(embedded["template_tokens"])
        bank, clock = enter_template(state["bank"], state["bank_clock"], kept)
        chosen = choose_templates(bank, clock, kept, self.config.num_templates)
        written = {
            "next_template_tokens": self._in_slots(chosen),
            "next_bank": bank,
            "next_bank_clock": clock,
        }
        if self.config.min_update_score:
            is_sure = state["score"] >= self.config.min_update_score
            for name, value in written.items():
                mask = is_sure.reshape(-1, *(1 for _ in value.shape[1:]))
                written[name] = torch.where(mask, value, state[name.removeprefix("next_")])
        if self.config.num_trajectory:
            written["next_trajectory"] = self._next_trajectory(state)
        return written

    def kept_cells(self, template_tokens: Tensor) -> Tensor:
        """Which cells of a template stay.

        Args:
            template_tokens: ``(B, cells, dim)``, with positions.

        Returns:
            Indices ``(B, kept)``, int64, rising.
        """
        grid = self.backbone.template_grid
        middle = grid // 2 * grid + grid // 2
        centre = self.backbone.search_grid // 2 * (self.backbone.search_grid + 1)
        patch = template_tokens[:, middle] - self.backbone.pos_embed_z[:, middle]
        stand_in = patch + self.backbone.pos_embed_x[:, centre] + self.identity[-1]
        tokens = torch.cat([template_tokens + self.identity[-2], stand_in[:, None]], 1)
        attention = torch.zeros_like(template_tokens[..., 0])
        for number, block in enumerate(self.backbone.blocks[: self.config.selection_layers], 1):
            assert isinstance(block, Block)
            attention = attention + _attention_of_last(block, tokens)
            if number < self.config.selection_layers:
                tokens = _without_drop(block, tokens)
        kept = attention.topk(self.config.kept_tokens).indices
        # As floats, because engines sort those: cells are few.
        rising = kept.to(tokens.dtype).topk(kept.shape[1], largest=False).values
        return rising.long()

    def _sparse(self, template_tokens: Tensor) -> Tensor:
        """The tokens ``(B, kept, dim)`` that stay of a template's."""
        if self.config.kept_tokens == template_tokens.shape[1]:
            return template_tokens
        with torch.no_grad():
            index = self.kept_cells(template_tokens)
        return template_tokens.gather(1, index[..., None].expand(-1, -1, template_tokens.shape[2]))

    def _in_slots(self, templates: Tensor) -> Tensor:
        """Templates ``(B, S, N, dim)`` → ``(B, S * N, dim)``, each marked with its slot."""
        return (templates + self.identity[:-1, None]).flatten(1, 2)

    def _embed_search(self, state: Mapping[str, Tensor]) -> Tensor:
        """The whole row: templates, search region, trajectory, commands."""
        row = super()._embed_search(state)
        num_template_tokens = state["template_tokens"].shape[1]
        parts = [row[:, :num_template_tokens], row[:, num_template_tokens:] + self.identity[-1]]
        if self.config.num_trajectory:
            x, y, w, h = state["trajectory"].unbind(-1)
            corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
            words = self.vocabulary.words_of(corners) + self.trajectory_positions
            parts.append(words.flatten(1, 2))
        commands = self.vocabulary.commands()
        parts.append(commands.expand(row.shape[0], *commands.shape))
        return torch.cat(parts, 1)

    def _logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.vocabulary(self.backbone.norm(tokens[:, -4:]))
        return logits

    def _standing_still(self, template_bbox_cxcywh: Tensor) -> Tensor:
        """The trajectory ``(B, N, 4)`` of a target that has not moved yet."""
        size = template_bbox_cxcywh[:, 2:] * (self.crops.template_factor / self.crops.search_factor)
        bbox = torch.cat([torch.full_like(size, 0.5), size], 1)
        return bbox[:, None].expand(-1, self.config.num_trajectory, -1).contiguous()

    def _next_trajectory(self, state: Mapping[str, Tensor]) -> Tensor:
        """The last boxes in the coordinates of a search region that is centred on the answer."""
        bbox = state["bbox_cxcywh"]
        boxes = torch.cat([state["trajectory"][:, 1:], bbox[:, None]], 1)
        side = (bbox[:, 2:].prod(1).sqrt() * self.crops.search_factor)[:, None, None]
        centres = (boxes[..., :2] - bbox[:, None, :2]) / side + 0.5
        return torch.cat([centres, boxes[..., 2:] / side], -1)


def _without_drop(block: Block, tokens: Tensor) -> Tensor:
    """What a block makes of tokens outside training: cells are chosen as the runtime does it."""
    tokens = tokens + block.attn(block.norm1(tokens))
    answer: Tensor = tokens + block.mlp(block.norm2(tokens))
    return answer


def _attention_of_last(block: Block, tokens: Tensor) -> Tensor:
    """What the last token attends to among the others, ``(B, N - 1)``: the mean over heads."""
    q, k, _ = block.attn.heads(block.norm1(tokens))
    logits: Tensor = q[:, :, -1:] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return logits.softmax(-1).mean(1)[:, 0, :-1]
