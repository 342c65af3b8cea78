"""The contract that a tracker family meets to be trained, exported and run.

A family subclasses ``SegmentedModel`` and writes ``embed_template`` and ``run_segment``. Tensors
travel by name, in the bundle's flat name space (see ``edgetrack.bundle``). The eager forward is
the composition of exactly the functions that are exported.

Two things a family may have besides. Every runtime carries them without knowing the family:

- *Heads* (``has_heads``): where the decision to stop needs less than the box, ``run_segment``
  gives ``score`` and ``uncertainty``, and ``run_head`` gives the box, at the exit taken alone.
- *State* (``update_inputs``, ``carried``): ``run_update`` sees the target as it is in this frame
  and writes what the next frame reads. With ``carried = {"bank": "next_bank"}`` it reads ``bank``
  and writes ``next_bank``, which the next frame reads as ``bank``; ``embed_template`` writes the
  first ``bank``. Segments, heads and the update may all read it, as it was before the update.
  Counters and indices are whole numbers: other tensors are FP16 in FP16 builds. All shapes are
  fixed, so what a tracker remembers has a bound.

What does not fit together is refused when the bundle is written, with the names.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
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
        config_class: Type of ``config``, a dataclass.
        config: The family's configuration.
        widths: Sets of units that were narrowed (see ``models.units``) → what is left of each.
        crops: Crop sizes and factors.
        num_exits: Number of segments.
        has_heads: Whether the box is ``run_head``'s.
        update_inputs: Names of the tensors that ``run_update`` reads, in the order of its exported
            graph: ``template``, ``template_bbox_cxcywh``, carried tensors, and whatever is written
            in every frame, whichever exit was taken. Empty: there is no state.
        carried: Tensor that the next frame reads → tensor that ``run_update`` wrote.
        operating_points: Those of a bundle before they are calibrated: name → the threshold of
            every exit. The first is the default.
        criterion: What those thresholds are compared with, unless the bundle is exported with
            another (see ``runtime.policies``).
        rules: Those of a bundle, unless it is exported with others: how answers become the target's
            state (see ``runtime.target``). Empty where none were tuned on the family's scores.
        pretrained: Prefixes of the parameters that start from published weights, and so learn at a
            lower rate.
    """

    family: ClassVar[str]
    paper: ClassVar[str]
    config_class: ClassVar[type]
    config: Any
    widths: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    crops: CropSpec
    num_exits: int
    has_heads: bool = False
    update_inputs: tuple[str, ...] = ()
    carried: Mapping[str, str] = MappingProxyType({})
    operating_points: ClassVar[Mapping[str, float]] = MappingProxyType({"balanced": 0.3})
    criterion: ClassVar[str] = "entropy"
    rules: ClassVar[Mapping[str, float]] = MappingProxyType({})
    pretrained: tuple[str, ...] = ("backbone.stem.",)

    @property
    def config_dict(self) -> dict[str, Any]:
        """The configuration, as JSON can hold it; ``registry.create_model`` takes it back."""
        config = dataclasses.asdict(self.config)
        return config | {"widths": dict(self.widths)} if self.widths else config

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
            What later segments and heads read, and the answer: ``score`` and ``uncertainty``
            ``(B,)``, and ``bbox_cxcywh`` ``(B, 4)`` if there are no heads.
        """
        raise NotImplementedError

    def head_inputs(self, index: int) -> tuple[str, ...]:
        """Names of the tensors that a head reads, in the order of its exported graph."""
        raise NotImplementedError

    def run_head(self, index: int, state: Mapping[str, Tensor]) -> State:
        """Run the head of the exit that was taken; only if ``has_heads``.

        Args:
            index: Exit, from 0.
            state: Holds at least ``head_inputs(index)``, none of it of later segments or other
                heads; not written to.

        Returns:
            ``bbox_cxcywh`` ``(B, 4)``, and what ``run_update`` reads of every head.
        """
        raise NotImplementedError

    def run_update(self, state: Mapping[str, Tensor]) -> State:
        """Turn this frame into what the next one reads; only if ``update_inputs``.

        It runs after every frame but those whose box or score is not finite, whether or not the
        target is lost: ``score`` may tell it to keep what there was.

        Args:
            state: Holds at least ``update_inputs``; ``template`` and ``template_bbox_cxcywh`` are
                of this frame, at the box that the tracker settled on. Not written to.

        Returns:
            The values of ``carried``, by name, of the shape and dtype of its keys.
        """
        raise NotImplementedError

    def forward(
        self, template: Tensor, template_bbox_cxcywh: Tensor, search_region: Tensor
    ) -> Sequence[State]:
        """The answers of all exits in one frame, shallow to deep: segments, each with its head."""
        state = self.embed_template(template, template_bbox_cxcywh)
        state["search_region"] = search_region
        answers: list[State] = []
        for index in range(self.num_exits):
            written = self.run_segment(index, state)
            state |= written
            if self.has_heads:
                written = written | self.run_head(index, state)
            answers.append({k: written[k] for k in ("bbox_cxcywh", "score", "uncertainty")})
        return answers
