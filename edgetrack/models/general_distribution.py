"""Trackers whose exits are General Distribution heads: what they and their training share."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from edgetrack.models.heads import decode_answer
from edgetrack.models.segmented import SegmentedModel, State

__all__ = ["GeneralDistributionModel"]


class GeneralDistributionModel(SegmentedModel):
    """A family whose segments are a trunk's part and an exit with ``heads.decode_answer``.

    A subclass writes ``run_trunk`` and ``exit_logits`` in the place of ``run_segment``.

    Attributes:
        exits: One module per exit; no parameter of the trunk is in it.
        bin_size: Width of a bin as a share of the search region.
        window: Weights of the head's cells ``(H * W,)``.
    """

    exits: nn.ModuleList
    bin_size: float
    window: Tensor
    # What helps on the development set (see benchmarks/results/rules-*.json).
    rules = MappingProxyType(
        {
            "unsure_score": 0.4,
            "patience": 3.0,
            "search_growth": 1.4,
            "lost_after": 10.0,
            "found_score": 0.6,
        }
    )

    def run_trunk(self, index: int, state: Mapping[str, Tensor]) -> State:
        """The trunk's part of a segment: what exits and later segments read."""
        raise NotImplementedError

    def exit_logits(self, index: int, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Maps of one exit from what the trunk wrote.

        Returns:
            Score logits ``(B, HW)`` and edge logits ``(B, HW, 4, K)``.
        """
        raise NotImplementedError

    def run_segment(self, index: int, state: Mapping[str, Tensor]) -> State:
        """Run the trunk's part of one segment and its exit."""
        written = self.run_trunk(index, state)
        cls_logits, edge_logits = self.exit_logits(index, {**state, **written})
        answer = decode_answer(cls_logits, edge_logits, window=self.window, bin_size=self.bin_size)
        if index == self.num_exits - 1:
            return answer
        return written | answer

    def stem_requires_grad(self, is_trained: bool) -> None:
        """Freeze a pretrained stem, or let it learn; a family without one does nothing."""
