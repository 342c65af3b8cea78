"""Gates on the units of a model, and the exact removal of units.

Gates: "Vision Transformer Slimming", Chavan et al., CVPR 2022, arXiv 2201.00814. Channels:
"Learning Efficient Convolutional Networks through Network Slimming", Liu et al., ICCV 2017, arXiv
1708.06519. Both on trackers: "On Designing Light-Weight Object Trackers Through Network Pruning:
Use CNNs or Transformers?", Aggarwal et al., ICASSP 2023, arXiv 2211.13769.

A model whose gates are 0 or 1 and the narrow model without the units of gate 0 give the same
answers: ``Gates`` multiply where the units are, ``remove_units`` cuts them out.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from edgetrack.models.registry import create_model
from edgetrack.models.segmented import SegmentedModel
from edgetrack.models.units import Gate, Units, cut, find_units

__all__ = ["Gates", "gates_of", "remove_units", "without_gates"]

_NAME = "gates"


class Gates(nn.Module):
    """Factors on units, 1 at first, which join a model as its submodule ``gates``.

    They travel with the model: its copies, state and parameters hold them.

    Args:
        model: Gets the gates, and hooks that multiply.
        units: What to gate.
        speed: How many times faster than a weight a gate learns.

    Raises:
        ValueError: The model has gates already.
    """

    def __init__(self, model: nn.Module, units: Iterable[Units], *, speed: float = 1.0) -> None:
        super().__init__()
        if hasattr(model, _NAME):
            raise ValueError("gates: expected a model without any, got one with gates")
        self.units, self.speed = tuple(units), speed
        device = next(model.parameters()).device
        self.steps = nn.ParameterList(torch.zeros(u.shape, device=device) for u in self.units)
        for index, gated in enumerate(self.units):
            for gate in gated.gates:
                module = model.get_submodule(gate.path)
                multiply = _Multiply(self, index, gate, is_linear=isinstance(module, nn.Linear))
                if gate.is_output:
                    module.register_forward_hook(multiply.output)
                else:
                    module.register_forward_pre_hook(multiply.input)
        model.add_module(_NAME, self)

    def values(self, index: int) -> Tensor:
        """The factors of one set of units, of their shape."""
        factors: Tensor = 1 + self.speed * self.steps[index]
        return factors

    @torch.no_grad()
    def close_all_but(self, kept: Mapping[str, Tensor]) -> None:
        """Set the gates of some units to 1, and those of the others of their sets to 0.

        Args:
            kept: Name of a set → numbers of the units that stay open.
        """
        for units, steps in zip(self.units, self.steps, strict=True):
            if units.name in kept:
                values = torch.zeros(units.count, device=steps.device)
                values[kept[units.name].flatten()] = 1
                steps.copy_((values.reshape(units.shape) - 1) / self.speed)


class _Multiply:
    """Hooks that multiply what a module reads or writes; they are copied with their gates."""

    def __init__(self, gates: Gates, index: int, gate: Gate, *, is_linear: bool) -> None:
        self.gates, self.index, self.gate, self.is_linear = gates, index, gate, is_linear

    def input(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._multiplied(args[0]), *args[1:])

    def output(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._multiplied(output)

    def _multiplied(self, tensor: Tensor) -> Tensor:
        values = self.gates.values(self.index).flatten().repeat(self.gate.copies)
        return tensor * (values if self.is_linear else values[:, None, None]).to(tensor.dtype)


def gates_of(model: nn.Module) -> Gates:
    """The gates of a model that has some."""
    gates = model.get_submodule(_NAME)
    assert isinstance(gates, Gates)
    return gates


def without_gates(model: SegmentedModel) -> SegmentedModel:
    """The same model as if it never had gates, in eval mode; weights are not scaled by them."""
    plain = create_model(model.family, model.config_dict)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(f"{_NAME}.")}
    plain.load_state_dict(state)
    return plain.eval()


def remove_units(model: SegmentedModel, kept: Mapping[str, Tensor]) -> SegmentedModel:
    """The narrow model that is left when units are cut out; it answers as with closed gates.

    Args:
        model: A model without gates; not written to.
        kept: Name of a set → numbers of the units that stay, at least one; ``(heads, dimensions)``
            for attention. Sets that are not named stay whole.

    Returns:
        A model in eval mode, whose configuration describes it.

    Raises:
        ValueError: There is no such set of units, or nothing of one is kept.
    """
    wide = copy.deepcopy(model).cpu()
    known = {units.name: units for units in find_units(wide)}
    if unknown := sorted(set(kept) - set(known)):
        raise ValueError(f"pruning: expected names among {sorted(known)}, got {unknown}")
    widths = dict(model.widths)
    for name, numbers in kept.items():
        if numbers.numel() == 0:
            raise ValueError(f"pruning: expected at least one unit of {name} to stay, got none")
        if tuple(numbers.shape) != known[name].shape:
            cut(wide, known[name], numbers.cpu())
            widths[name] = tuple(numbers.shape)
    narrow = create_model(model.family, {**model.config_dict, "widths": widths})
    narrow.load_state_dict(wide.state_dict())
    return narrow.eval()
