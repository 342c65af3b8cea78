"""The search for units that a model can do without: gates and batch norm scales that cost.

Gates on transformers: ViT-Slim (arXiv 2201.00814); scales of batch norms: Network Slimming (arXiv
1708.06519); both as "On Designing Light-Weight Object Trackers Through Network Pruning" (arXiv
2211.13769) uses them. Prices are those of its released code for OSTrack-256. Differs from it: all
exits learn together; the channels of stems without batch norm have gates too; and a gate learns
faster than a weight, because our searches are a thousand times shorter.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgetrack.models.general_distribution import GeneralDistributionModel
from edgetrack.models.ostrack import OSTrack
from edgetrack.models.pruning import Gates
from edgetrack.models.segmented import SegmentedModel
from edgetrack.models.units import find_units
from edgetrack.train.objectives.center import CenterExit
from edgetrack.train.objectives.early_exit import run_trunk, task_loss
from edgetrack.train.objectives.objective import Objective

if TYPE_CHECKING:
    from edgetrack.train.recipes import Recipe

__all__ = ["AllExits", "Slimming"]

# Per unit. The released code has none for channels of trackers: the MLP's.
PRICES = {"attention": 1.5e-4, "mlp": 7.5e-5, "channels": 7.5e-5, "gated": 7.5e-5}
GATE_SPEED = 25.0


class AllExits(Objective):
    """Sum of the task losses of all exits; everything learns."""

    model: GeneralDistributionModel

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over the exits."""
        state = run_trunk(self.model, batch)
        losses: list[Tensor] = []
        log: dict[str, Tensor] = {}
        for index in range(self.model.num_exits):
            logits = self.model.exit_logits(index, state)
            loss, terms = task_loss(self.model, index, logits, batch, self.recipe)
            losses.append(loss)
            log |= terms
        return torch.stack(losses).sum(), log


class Slimming(Objective):
    """The task loss of all exits, and a price on every gate and on batch norm scales.

    Raises:
        ValueError: The model has no units, or its family no loss for all of its exits.
    """

    def __init__(
        self, model: SegmentedModel, recipe: "Recipe", teacher: SegmentedModel | None = None
    ) -> None:
        super().__init__(model, recipe, teacher)
        self.units = find_units(model)
        if not self.units:
            raise ValueError(f"slimming: expected a model with units to prune, got {model.family}")
        self.task = _task_of(model)(model, recipe, teacher)

    def prepare(self) -> None:
        """Everything learns, gates included, which join the model here."""
        self.task.prepare()
        self.gates = Gates(
            self.model, (u for u in self.units if u.kind != "channels"), speed=GATE_SPEED
        )

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Task loss and prices."""
        loss, log = self.task(batch)
        gates = [self.gates.values(index).abs() for index in range(len(self.gates.units))]
        price = sum(
            (PRICES[u.kind] * g.sum() for u, g in zip(self.gates.units, gates, strict=True)),
            start=torch.zeros((), device=loss.device),
        )
        for units in self.units:
            for path in units.scales:
                scale = self.model.get_parameter(f"{path}.weight")
                price = price + PRICES[units.kind] * scale.abs().sum()
        log["price"] = price.detach()
        if gates:
            log["gate"] = torch.cat([g.detach().flatten() for g in gates]).mean()
        return loss + price, log


def _task_of(model: SegmentedModel) -> type[Objective]:
    if isinstance(model, GeneralDistributionModel):
        return AllExits
    if isinstance(model, OSTrack):
        return CenterExit
    raise ValueError(
        f"slimming: expected a model with General Distribution or CENTER heads, got "
        f"{model.family}; prune it without data"
    )
