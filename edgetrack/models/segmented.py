"""The contract that a tracker family meets to be trained, exported and run.

A family subclasses ``SegmentedModel`` and writes ``embed_template`` and ``run_segment``. Tensors
travel by name, in the bundle's flat name space (see ``edgetrack.bundle``). The eager forward is
the composition of exactly the functions that are exported.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from edgetrack.bundle import CropSpec

__all__ = ["SegmentedModel", "State"]

State = dict[str, Tensor]


class SegmentedModel(nn.Module):
    """A tracker cut into segments, with an exit after each.

    Attributes:
        family: Name of the family: its module in ``edgetrack.models``.
        paper: Title, venue, identifier.
        crops: Crop sizes and factors.
        num_exits: Number of segments.
        pretrained: Prefixes of the parameters that start from published weights, and so learn at a
            lower rate.
    """

    family: ClassVar[str]
    paper: ClassVar[str]
    crops: CropSpec
    num_exits: int
    pretrained: tuple[str, ...] = ("backbone.stem.",)

    @property
    def config_dict(self) -> dict[str, Any]:
        """The configuration, as JSON can hold it; ``registry.create_model`` takes it back."""
        raise NotImplementedError

    def embed_template(self, template: Tensor, template_bbox_cxcywh: Tensor) -> State:
        """What is computed once per template.

        Args:
            template: uint8 RGB ``(B, S, S, 3)``.
            template_bbox_cxcywh: The target in it, ``(B, 4)``, normalised to the crop.

        Returns:
            Tensors that segments read, by name.
        """
        raise NotImplementedError

    def segment_inputs(self, index: int) -> tuple[str, ...]:
        """Names of the tensors that a segment reads, in the order of its exported graph."""
        raise NotImplementedError

    def run_segment(self, index: int, state: Mapping[str, Tensor]) -> State:
        """Run one segment and its exit.

        Args:
            index: Segment, from 0.
            state: Holds at least ``segment_inputs(index)``; not written to.

        Returns:
            What later segments read, and the answer: ``bbox_cxcywh`` ``(B, 4)``, ``score`` and
            ``uncertainty`` ``(B,)``.
        """
        raise NotImplementedError

    def forward(
        self, template: Tensor, template_bbox_cxcywh: Tensor, search_region: Tensor
    ) -> Sequence[State]:
        """The answers of all exits, shallow to deep: the composition of all segments."""
        state = self.embed_template(template, template_bbox_cxcywh)
        state["search_region"] = search_region
        answers: list[State] = []
        for index in range(self.num_exits):
            written = self.run_segment(index, state)
            state |= written
            answers.append({k: written[k] for k in ("bbox_cxcywh", "score", "uncertainty")})
        return answers
