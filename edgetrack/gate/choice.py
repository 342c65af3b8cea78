"""Which graphs run in INT8: those that are faster for it, as long as the answers stay the same."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.bundle import Bundle
from edgetrack.gate.thresholds import exit_agreement, fit_operating_points
from edgetrack.parity import EngineRunner, ExitAnswers, ask_exits

__all__ = ["MIN_BOX_IOU", "MIN_EXIT_AGREEMENT", "Agreement", "Choice", "OnStep", "choose"]

OnStep = Callable[[str, float], None]
Arrays = Mapping[str, npt.NDArray[Any]]

# The budget: below either of them INT8 does harm.
MIN_BOX_IOU = 0.97
MIN_EXIT_AGREEMENT = 0.95


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far a chain says what the float chain says.

    Attributes:
        box_iou: IoU of the boxes at each exit, mean over crops.
        exits: Operating point → share of the crops that take the same exit, by thresholds that were
            fitted to other crops.
        exits_unfitted: The same by the bundle's own thresholds.
    """

    box_iou: tuple[float, ...]
    exits: Mapping[str, float]
    exits_unfitted: Mapping[str, float]

    @property
    def mean_box_iou(self) -> float:
        """Mean over exits."""
        return float(np.mean(self.box_iou))

    @property
    def worst_exits(self) -> float:
        """Of the operating point that suffers most; 1 where there is none."""
        return min(self.exits.values(), default=1.0)

    @property
    def excess(self) -> float:
        """By how much it is over the budget; 0 if it is within."""
        box = max(MIN_BOX_IOU - self.mean_box_iou, 0.0)
        return box + max(MIN_EXIT_AGREEMENT - self.worst_exits, 0.0)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What runs in which precision.

    Attributes:
        float_graphs: Graph that stays in float → why.
        operating_points: Thresholds for these engines, by operating point.
        agreement: Of these engines with float ones.
    """

    float_graphs: Mapping[str, str]
    operating_points: Mapping[str, tuple[float, ...]]
    agreement: Agreement


def choose(
    bundle: Bundle,
    crops: Sequence[Arrays],
    *,
    reference: EngineRunner,
    quantized: EngineRunner,
    ruled_out: Mapping[str, str],
    is_fixed: bool = False,
    on_step: OnStep,
) -> Choice:
    """Choose graphs for INT8, and thresholds for what was chosen.

    While boxes or exits depart by more than the budget, the graph goes back to float without which
    they depart least.

    Args:
        bundle: What the engines were built from.
        crops: What to compare on.
        reference: Float engines.
        quantized: INT8 engines.
        ruled_out: Graph that stays in float whatever it says → why.
        is_fixed: Keep INT8 in all other graphs, whatever they say.
        on_step: Called with what is being done and its fraction.

    Raises:
        ValueError: There are no crops.
    """
    exact = ask_exits(bundle, reference, _reported(crops, "asking the float engines", on_step))

    def ask(in_float: Collection[str], what: str) -> ExitAnswers:
        runner = _Mixed(bundle, reference, quantized, in_float)
        return ask_exits(bundle, runner, _reported(crops, what, on_step))

    kept = dict(ruled_out)
    said = ask(kept, "asking the INT8 engines")
    agreement = _agreement(bundle, exact, said)
    while agreement.excess > 0 and not is_fixed:
        tried = {}
        for graph in bundle.graphs:
            if graph.name not in kept:
                answers = ask([*kept, graph.name], f"asking without INT8 in {graph.name}")
                tried[graph.name] = answers, _agreement(bundle, exact, answers)
        if not tried:
            break
        best = min(tried, key=lambda n: (tried[n][1].excess, -tried[n][1].mean_box_iou))
        before, (said, agreement) = agreement, tried[best]
        kept[best] = f"INT8 costs too much there ({_difference(before, agreement)})"
    return Choice(
        float_graphs={
            graph.name: kept[graph.name] for graph in bundle.graphs if graph.name in kept
        },
        operating_points=fit_operating_points(bundle, exact, said),
        agreement=agreement,
    )


def _agreement(bundle: Bundle, exact: ExitAnswers, said: ExitAnswers) -> Agreement:
    return Agreement(
        box_iou=tuple(said.box_iou(exact).mean(0).tolist()),
        exits=exit_agreement(bundle, exact, said),
        exits_unfitted=exit_agreement(bundle, exact, said, bundle.operating_points),
    )


def _difference(before: Agreement, after: Agreement) -> str:
    return (
        f"with it boxes overlap by {before.mean_box_iou:.3f} and exits agree on "
        f"{before.worst_exits:.1%}, without it by {after.mean_box_iou:.3f} and on "
        f"{after.worst_exits:.1%}"
    )


def _reported(crops: Sequence[Arrays], what: str, on_step: OnStep) -> Iterator[Arrays]:
    for index, crop in enumerate(crops):
        on_step(what, index / len(crops))
        yield crop


class _Mixed:
    """Float engines for some graphs, INT8 engines for the others; both stay open."""

    def __init__(
        self,
        bundle: Bundle,
        reference: EngineRunner,
        quantized: EngineRunner,
        in_float: Collection[str],
    ) -> None:
        names = [graph.name for graph in bundle.graphs]
        self._runners = [reference if name in in_float else quantized for name in names]

    def run(self, index: int, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        return self._runners[index].run(index, inputs)

    def close(self) -> None:
        """Leave the engines to their owner."""
