"""From a budget to the units that stay: how units are rated, chosen and laid out.

"On Designing Light-Weight Object Trackers Through Network Pruning: Use CNNs or Transformers?",
Aggarwal et al., ICASSP 2023, arXiv 2211.13769: one threshold for all layers, separate for attention
and MLPs, and one per layer at a budget of 1 %, where whole layers would vanish otherwise.

Differs from the paper, or is left open by it: a layer always keeps one unit; kept numbers are
rounded up to what compilers like; the heads of a layer stay alike, since ragged heads cannot be one
matrix product; heads and stems shrink too, where the authors leave them.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgetrack.errors import TrainingError
from edgetrack.models.pruning import gates_of, remove_units
from edgetrack.models.segmented import SegmentedModel
from edgetrack.models.units import Side, Units, cut, find_units

__all__ = [
    "HEAD_LAYOUTS",
    "PARTS",
    "Pruned",
    "Rounding",
    "check_budget",
    "choose_units",
    "lay_out",
    "learned_scores",
    "magnitude_scores",
    "num_parameters_left",
    "part_of",
    "prune",
]

PARTS = ("trunk", "head", "stem")
HEAD_LAYOUTS = ("uniform", "free")
LAYER_WISE_UP_TO = 0.01


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How chosen units become matrices.

    Attributes:
        heads: ``uniform``: each head of a layer keeps as many dimensions, its own best, and they
            are chosen in rows of one per head. ``free``: dimensions are chosen one by one, as in
            ViT-Slim; then heads without any go, and the others keep as many as the fullest, which
            is more than the budget says.
        multiple: Kept numbers are rounded up to a multiple of this, at most to what there was.
    """

    heads: str = "uniform"
    multiple: int = 8

    def __post_init__(self) -> None:
        """Refuse what is no layout."""
        if self.heads not in HEAD_LAYOUTS:
            raise ValueError(f"heads: expected one of {HEAD_LAYOUTS}, got {self.heads!r}")
        if self.multiple < 1:
            raise ValueError(f"multiple: expected at least 1, got {self.multiple}")


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A narrow model and what was cut.

    Attributes:
        model: In eval mode.
        kept: Set of units → numbers of those that stayed.
        floored: Sets that the budget had emptied, and that keep one unit all the same.
        share: Units that stayed over units that there were, rounding included.
    """

    model: SegmentedModel
    kept: Mapping[str, Tensor]
    floored: tuple[str, ...]
    share: float


def check_budget(budget: float) -> float:
    """The budget, if it is one.

    Raises:
        ValueError: It is not above 0 and at most 1.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget: expected above 0 and up to 1, got {budget:g}")
    return budget


def part_of(units: Units) -> str:
    """``stem``, ``trunk`` or ``head``: where a set of units lies, by its name."""
    if units.name.startswith("backbone.stem."):
        return "stem"
    return "trunk" if units.name.startswith("backbone.") else "head"


def learned_scores(model: SegmentedModel) -> dict[str, Tensor]:
    """What a search gave each unit: the size of its gate, or of its batch norms' scales.

    Args:
        model: With the gates of ``objectives.slimming``.

    Returns:
        Set of units → scores of the set's shape, at least 0.

    Raises:
        TrainingError: A score is not a finite number.
    """
    gates = gates_of(model)
    scores = {u.name: gates.values(i).detach().abs() for i, u in enumerate(gates.units)}
    for units in find_units(model):
        if units.scales:
            scales = [model.get_parameter(f"{path}.weight") for path in units.scales]
            scores[units.name] = torch.stack([s.detach().abs() for s in scales]).mean(0)
    for name, values in scores.items():
        if not values.isfinite().all():
            raise TrainingError(
                f"gates: expected finite numbers, got {int((~values.isfinite()).sum())} others in "
                f"{name}; delete the folder of the search, and search again"
            )
    return scores


@torch.no_grad()
def magnitude_scores(model: SegmentedModel) -> dict[str, Tensor]:
    """How much each unit's weights can do, without data: what writes it times what reads it.

    Norms of a unit's weights, over the root mean square of its set, so that sets compare.

    Raises:
        TrainingError: A weight is not a finite number.
    """
    scores = {}
    for units in find_units(model):
        # Behind a batch norm, what a convolution's weights amount to is the norm's scale.
        writers = [s for s in units.written_by if s.path in units.scales] or units.written_by
        written = torch.stack([_strength(model, s, units.count, axis=0) for s in writers]).sum(0)
        readers = [_strength(model, s, units.count, axis=1) for s in units.read_by]
        values = (written * torch.stack(readers).sum(0)).sqrt()
        if not values.isfinite().all():
            raise TrainingError(
                f"weights: expected finite numbers, got others at {units.name}; train the model "
                "again, or take another bundle"
            )
        scores[units.name] = (values / values.square().mean().sqrt()).reshape(units.shape)
    return scores


def choose_units(
    units: Sequence[Units], scores: Mapping[str, Tensor], budget: float, *, heads: str = "uniform"
) -> dict[str, Tensor]:
    """Which units a budget keeps, before anything is rounded.

    Args:
        units: Sets to choose from; each kind has a threshold of its own.
        scores: Of every set, of its shape.
        budget: Share to keep, above 0 and up to 1. Up to 0.01 every set keeps that share of its
            own; above, the best of all sets of a kind stay.
        heads: See ``Rounding``.

    Returns:
        Set → mask of its shape; a set may be empty.
    """
    check_budget(budget)
    chosen: dict[str, Tensor] = {}
    for kind in dict.fromkeys(u.kind for u in units):
        alike = [u for u in units if u.kind == kind]
        rows = [_rows(u, scores[u.name], heads) for u in alike]
        if budget <= LAYER_WISE_UP_TO:
            masks = [_best([row], budget)[0] for row in rows]
        else:
            masks = _best(rows, budget)
        for one, mask in zip(alike, masks, strict=True):
            chosen[one.name] = _mask(one, scores[one.name], mask, heads)
    return chosen


def lay_out(units: Units, scores: Tensor, mask: Tensor, rounding: Rounding) -> Tensor:
    """The numbers of the units that stay, rounded, so that they make a matrix.

    Args:
        units: The set.
        scores: Of the set's shape.
        mask: Of the set's shape: what was chosen.
        rounding: How.

    Returns:
        Numbers, rising, ``(units,)`` or ``(heads, dimensions)``; at least one.
    """
    per_head = scores.reshape(-1, units.shape[-1])
    wanted = mask.reshape(per_head.shape).sum(1)
    if not wanted.any():
        wanted[per_head.max(1).values.argmax()] = 1
    heads = wanted.nonzero().flatten() if units.kind == "attention" else torch.arange(1)
    most = int(wanted.max())
    width = min(math.ceil(most / rounding.multiple) * rounding.multiple, units.shape[-1])
    best = per_head[heads].sort(dim=1, descending=True, stable=True).indices[:, :width]
    numbers = best.sort(dim=1).values + heads[:, None] * units.shape[-1]
    return numbers if units.kind == "attention" else numbers.flatten()


def prune(
    model: SegmentedModel,
    scores: Mapping[str, Tensor],
    budget: float,
    *,
    rounding: Rounding | None = None,
    parts: Sequence[str] = PARTS,
) -> Pruned:
    """Keep a share of a model's units, and cut the others out.

    Args:
        model: Without gates; not written to.
        scores: Of all its units.
        budget: Share to keep of each kind.
        rounding: How chosen units become matrices.
        parts: What shrinks: ``trunk``, ``head``, ``stem``.

    Raises:
        ValueError: The budget is no share, a part is unknown, or there is nothing to cut.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"parts: expected some of {PARTS}, got {unknown}")
    rounding = Rounding() if rounding is None else rounding
    units = [u for u in find_units(model) if part_of(u) in parts]
    if not units:
        raise ValueError(f"parts: expected units in {tuple(parts)} of {model.family}, got none")
    chosen = choose_units(units, scores, budget, heads=rounding.heads)
    kept = {u.name: lay_out(u, scores[u.name], chosen[u.name], rounding) for u in units}
    return Pruned(
        model=remove_units(model, kept),
        kept=kept,
        floored=tuple(name for name, mask in chosen.items() if not mask.any()),
        share=sum(k.numel() for k in kept.values()) / sum(u.count for u in units),
    )


def num_parameters_left(model: SegmentedModel, chosen: Mapping[str, Tensor]) -> int:
    """Parameters that masks leave, ragged heads and empty sets included, as papers count them."""
    left = copy.deepcopy(model)
    for units in find_units(model):
        if units.name in chosen:
            numbers = chosen[units.name].flatten().nonzero().flatten()
            cut(left, units, numbers[None] if units.kind == "attention" else numbers)
    return sum(p.numel() for p in left.parameters())


def _rows(units: Units, scores: Tensor, heads: str) -> Tensor:
    """What is chosen as one: units, or the heads' best dimensions, second best and so on."""
    if units.kind == "attention" and heads == "uniform":
        return scores.sort(dim=1, descending=True).values.mean(0)
    return scores.flatten()


def _best(rows: Sequence[Tensor], budget: float) -> list[Tensor]:
    """Masks of the best of all rows; of equals, the first."""
    values = torch.cat(list(rows))
    count = len(values) - int((1 - budget) * len(values) + 1e-9)
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[values.sort(descending=True, stable=True).indices[:count]] = True
    return list(torch.split(mask, [len(r) for r in rows]))


def _mask(units: Units, scores: Tensor, mask: Tensor, heads: str) -> Tensor:
    if units.kind != "attention" or heads != "uniform":
        return mask.reshape(units.shape)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros(units.shape, dtype=torch.bool).scatter(1, order, mask.expand(units.shape))


def _strength(model: SegmentedModel, side: Side, count: int, *, axis: int) -> Tensor:
    """Sum of squares of each unit's weights in one module."""
    weight = model.get_parameter(f"{side.path}.weight")
    others = [d for d in range(weight.ndim) if d != axis]
    along = weight.square().sum(others) if others else weight.square()
    block = count * side.spread
    own = along[side.offset : side.offset + side.copies * block]
    return own.reshape(side.copies, count, side.spread).sum((0, 2))
