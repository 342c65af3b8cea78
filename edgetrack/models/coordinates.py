"""Boxes as words: four coordinates, each a softmax over bins that reach beyond the crop.

Pix2Seq's idea (Chen et al., ICLR 2022, arXiv 2109.10852) as ARTrack and FARTrack use it: one
vocabulary of coordinate bins and a few special words, whose embeddings are both what command tokens
start from and what hidden states are compared with.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "CoordinateVocabulary",
    "decode_coordinates",
    "expected_corners",
    "quantise_corners",
]

NUM_SPECIAL_WORDS = 5
NUM_COMMANDS = 4
_LOW, _RANGE = -0.5, 2.0  # bins cover [-0.5, 1.5] of the search region
_SCORE_REACH = 1 / 32
_MIN_SIDE = 1e-3


class CoordinateVocabulary(nn.Module):
    """Embeddings of coordinate bins and special words, and the head that they make.

    Args:
        num_bins: Coordinate bins; the four commands x1, y1, x2, y2 are the words behind them.
        dim: Token width.
    """

    def __init__(self, num_bins: int, dim: int) -> None:
        super().__init__()
        self.num_bins = num_bins
        self.word_embeddings = nn.Parameter(torch.empty(num_bins + NUM_SPECIAL_WORDS, dim))
        self.position_embeddings = nn.Parameter(torch.empty(NUM_COMMANDS, dim))
        self.output_bias = nn.Parameter(torch.zeros(num_bins + NUM_SPECIAL_WORDS))
        nn.init.trunc_normal_(self.word_embeddings, std=0.02)
        nn.init.trunc_normal_(self.position_embeddings, std=0.02)

    def commands(self) -> Tensor:
        """The command tokens ``(4, dim)``."""
        words = self.word_embeddings[self.num_bins : self.num_bins + NUM_COMMANDS]
        return words + self.position_embeddings

    def words_of(self, corners: Tensor) -> Tensor:
        """Embeddings ``(..., 4, dim)`` of corner boxes ``(..., 4)``, normalised to the crop."""
        return F.embedding(quantise_corners(corners, self.num_bins), self.word_embeddings)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states ``(B, 4, dim)`` → logits of all words ``(B, 4, num_bins + 5)``."""
        return F.linear(hidden, self.word_embeddings, self.output_bias)


def quantise_corners(corners: Tensor, num_bins: int) -> Tensor:
    """The bins of coordinates, clamped to the first and the last that FARTrack's code can reach.

    Args:
        corners: Coordinates ``(...)`` as shares of the search region.
        num_bins: Over all of [-0.5, 1.5].

    Returns:
        int64, of the same shape.
    """
    steps = num_bins / _RANGE - 1
    return ((corners - _LOW) * steps).clamp(0.0, _RANGE * steps).long()


def expected_corners(logits: Tensor, num_bins: int) -> Tensor:
    """The expectation of each coordinate, ``(B, 4)``, from logits ``(B, 4, words)``."""
    probs = logits[..., :num_bins].float().softmax(-1)
    return (probs * _values(num_bins, logits.device)).sum(-1)


def decode_coordinates(logits: Tensor, num_bins: int) -> dict[str, Tensor]:
    """Turn logits into an answer: each coordinate is the mean of its likeliest bin and expectation.

    Args:
        logits: ``(B, 4, words)``, order x1, y1, x2, y2; special words are left out.
        num_bins: Coordinate bins.

    Returns:
        ``bbox_cxcywh`` ``(B, 4)`` normalised to the search region; ``uncertainty`` ``(B,)``: the
        mean of the four entropies over their maximum; ``score`` ``(B,)``: the mean probability
        that a coordinate is within 1/32 of the search region of the answer. The paper has neither.
    """
    log_probs = logits[..., :num_bins].float().log_softmax(-1)
    probs = log_probs.exp()
    values = _values(num_bins, logits.device)
    peak = (log_probs.argmax(-1).float() + 0.5) / (num_bins / _RANGE - 1) + _LOW
    corners = (peak + (probs * values).sum(-1)) / 2
    is_near = (values - corners[..., None]).abs() <= _SCORE_REACH
    x1, y1, x2, y2 = corners.unbind(-1)
    bbox = torch.stack(
        [
            (x1 + x2) / 2,
            (y1 + y2) / 2,
            (x2 - x1).clamp(min=_MIN_SIDE),
            (y2 - y1).clamp(min=_MIN_SIDE),
        ],
        -1,
    )
    entropy = -(probs * log_probs).sum(-1) / math.log(num_bins)
    score = (probs * is_near.float()).sum(-1)
    return {"bbox_cxcywh": bbox, "score": score.mean(-1), "uncertainty": entropy.mean(-1)}


def _values(num_bins: int, device: torch.device) -> Tensor:
    return torch.arange(num_bins, device=device, dtype=torch.float32) * (_RANGE / num_bins) + _LOW
