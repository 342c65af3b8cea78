"""Units: the inner widths of a model that may shrink, and what has to be cut where for one to go.

A unit is one dimension of an attention head (shared by query, key and value), one hidden unit of an
MLP, or one channel between two convolutions. A module that has some says so in a method
``prunable_units``; ``find_units`` collects them from a whole model. A family describes a narrowed
model in its configuration: ``widths``, from the name of a set of units to how many are left.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "Gate",
    "Side",
    "Units",
    "channels_between",
    "cut",
    "find_units",
    "narrow",
    "num_outputs",
    "read_widths",
]


@dataclass(frozen=True)
class Side:
    """Where units lie in a linear layer, a convolution or a batch norm.

    Attributes:
        path: The module's.
        copies: Times that all units are repeated along the axis: 3 for query, key, value.
        spread: Consecutive channels of one unit: those that a pixel shuffle spreads over space.
        offset: Channels before the first unit.
    """

    path: str
    copies: int = 1
    spread: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Gate:
    """Where a factor per unit has the effect of removing those whose factor is 0.

    Attributes:
        path: The module whose input or output is multiplied.
        is_output: Which of the two.
        copies: As in ``Side``.
    """

    path: str
    is_output: bool = False
    copies: int = 1


@dataclass(frozen=True, kw_only=True)
class Units:
    """One set of units that are rated side by side; each can go on its own.

    Attributes:
        name: In the model's configuration.
        kind: ``attention``, ``mlp``, ``channels`` (rated by the scales of batch norms) or
            ``gated`` (channels without one).
        shape: Heads and their dimension for attention, else the number of units.
        written_by: Modules that lose outputs; depthwise convolutions and batch norms are among
            them.
        read_by: Modules that lose inputs.
        gates: Places to multiply.
        scales: Batch norms whose scales rate the units.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    written_by: tuple[Side, ...]
    read_by: tuple[Side, ...]
    gates: tuple[Gate, ...]
    scales: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of units."""
        return math.prod(self.shape)

    def under(self, prefix: str) -> "Units":
        """The same, seen from a module that holds this one under a name."""
        if not prefix:
            return self

        def joined(path: str) -> str:
            return f"{prefix}.{path}" if path else prefix

        def moved(sides: tuple[Side, ...]) -> tuple[Side, ...]:
            return tuple(dataclasses.replace(s, path=joined(s.path)) for s in sides)

        return dataclasses.replace(
            self,
            name=joined(self.name),
            written_by=moved(self.written_by),
            read_by=moved(self.read_by),
            gates=tuple(dataclasses.replace(g, path=joined(g.path)) for g in self.gates),
            scales=tuple(map(joined, self.scales)),
        )


def channels_between(owner: nn.Module, writer: str, readers: Sequence[str]) -> Units:
    """The channels from a convolution with batch norm and ReLU to the convolutions that read them.

    Args:
        owner: The module that lists them.
        writer: Path of a ``layers.ConvNormAct``, or of a like sequence, in it: the units' name.
        readers: Paths of the convolutions.
    """
    return Units(
        name=writer,
        kind="channels",
        shape=(num_outputs(owner.get_submodule(f"{writer}.0")),),
        written_by=(Side(f"{writer}.0"), Side(f"{writer}.1")),
        read_by=tuple(map(Side, readers)),
        gates=tuple(map(Gate, readers)),
        scales=(f"{writer}.1",),
    )


def find_units(model: nn.Module) -> tuple[Units, ...]:
    """All units of a model, set by set, in the order of its modules."""
    found: list[Units] = []
    for path, module in model.named_modules():
        if callable(listed := getattr(module, "prunable_units", None)):
            found += [units.under(path) for units in listed()]
    return tuple(found)


def read_widths(values: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The ``widths`` of a configuration, as JSON holds them.

    Raises:
        ValueError: A width is not a list of whole numbers of at least 1.
    """
    widths = {}
    for name, value in values.items():
        if not isinstance(value, Sequence) or not value or not all(
            isinstance(v, int) and v >= 1 for v in value
        ):  # fmt: skip
            raise ValueError(f"widths: expected numbers of at least 1 for {name}, got {value}")
        widths[name] = tuple(value)
    return widths


def narrow(model: nn.Module, widths: Mapping[str, Sequence[int]]) -> None:
    """Make a fresh model as narrow as its configuration says.

    Args:
        model: Written; which of its random weights are kept does not matter.
        widths: Name of a set of units → heads and their dimension, or number of units.

    Raises:
        ValueError: There is no such set, or it has fewer units than that.
    """
    known = {units.name: units for units in find_units(model)}
    if unknown := sorted(set(widths) - set(known)):
        raise ValueError(f"widths: expected names among {sorted(known)}, got {unknown}")
    for name, width in widths.items():
        units = known[name]
        if len(width) != len(units.shape) or any(
            not 1 <= w <= s for w, s in zip(width, units.shape, strict=True)
        ):
            raise ValueError(
                f"widths: expected 1 to {list(units.shape)} for {name}, got {list(width)}"
            )
        places = torch.arange(units.count).reshape(units.shape)
        cut(model, units, places[tuple(slice(w) for w in width)])


@torch.no_grad()
def cut(model: nn.Module, units: Units, kept: Tensor) -> None:
    """Remove all units of a set but some, from every module that writes or reads them.

    Query rows are scaled so that attention's own scale, the root of the narrower head, divides
    products as the wide head's root did.

    Args:
        model: Written.
        units: The set.
        kept: Numbers of the units that stay: ``(units,)``, or ``(heads, dimensions)`` for
            attention, in ``[0, units.count)``.
    """
    if units.kind == "attention":
        (side,) = units.written_by
        joint, heads = model.get_submodule(side.path), units.shape[0]
        query = units.count
        factor = math.sqrt(kept.shape[1] / units.shape[1])
        for parameter in joint.parameters(recurse=False):
            parameter[:query] *= factor
        owner = model.get_submodule(units.name)
        assert owner.num_heads == heads
        owner.num_heads = kept.shape[0]  # type: ignore[assignment]  # a plain number, not a module
    flat = kept.flatten()
    for side in units.written_by:
        module = model.get_submodule(side.path)
        _keep_outputs(module, _places(side, units.count, flat, num_outputs(module)))
    for side in units.read_by:
        module = model.get_submodule(side.path)
        _keep_inputs(module, _places(side, units.count, flat, _num_inputs(module)))


def _places(side: Side, count: int, kept: Tensor, total: int) -> Tensor:
    """All places along an axis that stay: of the kept units, and before and after the units."""
    spread = (kept[:, None] * side.spread + torch.arange(side.spread)).flatten()
    block = count * side.spread
    own = [side.offset + copy * block + spread for copy in range(side.copies)]
    end = side.offset + side.copies * block
    return torch.cat([torch.arange(side.offset), *own, torch.arange(end, total)])


def num_outputs(module: nn.Module) -> int:
    """Width of what a linear layer, a convolution or a batch norm writes."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.out_channels if isinstance(module, nn.Conv2d) else _norm(module).num_features


def _num_inputs(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features
    assert isinstance(module, nn.Conv2d)
    return module.in_channels


def _keep_outputs(module: nn.Module, places: Tensor) -> None:
    _index(module, ("weight", "bias", "running_mean", "running_var"), 0, places)
    if isinstance(module, nn.Linear):
        module.out_features = len(places)
    elif isinstance(module, nn.Conv2d):
        if module.groups > 1:  # depthwise: a channel comes in where it goes out
            module.groups = module.in_channels = len(places)
        module.out_channels = len(places)
    else:
        _norm(module).num_features = len(places)


def _keep_inputs(module: nn.Module, places: Tensor) -> None:
    _index(module, ("weight",), 1, places)
    if isinstance(module, nn.Linear):
        module.in_features = len(places)
    elif isinstance(module, nn.Conv2d):
        module.in_channels = len(places)


def _index(module: nn.Module, names: Iterable[str], axis: int, places: Tensor) -> None:
    for name in names:
        value = getattr(module, name, None)
        if value is None:
            continue
        left = value.detach().index_select(axis, places.to(value.device)).contiguous()
        if isinstance(value, nn.Parameter):
            left = nn.Parameter(left, requires_grad=value.requires_grad)
        setattr(module, name, left)


def _norm(module: nn.Module) -> nn.BatchNorm2d:
    assert isinstance(module, nn.BatchNorm2d)
    return module
