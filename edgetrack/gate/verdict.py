"""What the gate measured, what it chose, and why: kept beside the engines, and printed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgetrack.gate.choice import MIN_BOX_IOU, MIN_EXIT_AGREEMENT, Agreement

__all__ = ["GraphVerdict", "Verdict"]


@dataclass(frozen=True, kw_only=True)
class GraphVerdict:
    """One graph in float and in INT8.

    Attributes:
        precision: What was chosen.
        reason: Why it is not INT8; empty if it is.
        float_ms: Time at full depth, of a head at its own exit; ``None`` where that is not known.
        int8_ms: The same.
        float_bytes: Size of the engine; ``None`` where none was built.
        int8_bytes: The same.
        num_int8_products: Convolutions and matrix products in INT8, in the INT8 engine.
        num_products: All of them: kernels where the compiler lists them, else layers of the graph.
        box_iou: IoU of this exit's boxes with the float chain's, as chosen; ``None`` for graphs
            that give none.
    """

    precision: str
    reason: str = ""
    float_ms: float | None = None
    int8_ms: float | None = None
    float_bytes: int | None = None
    int8_bytes: int
    num_int8_products: int
    num_products: int
    box_iou: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All that the gate found.

    Attributes:
        float_precision: What INT8 was compared with.
        is_strict: Whether INT8 was kept regardless.
        not_measured: Why nothing was timed; empty if it was.
        source: What clips it looked at.
        num_crops: How many crops of them.
        graphs: Graph → what was found of it.
        agreement: With the float engines.
        operating_point: The bundle's default.
        operating_points: Thresholds for these engines.
        update_ms: Mean time of an update at the default operating point, in float and as chosen.
    """

    float_precision: str
    is_strict: bool
    not_measured: str = ""
    source: str
    num_crops: int
    graphs: Mapping[str, GraphVerdict]
    agreement: Agreement
    operating_point: str
    operating_points: Mapping[str, tuple[float, ...]]
    update_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """What was chosen, and why."""
        return f"{self._choice()}: {'; '.join(self._grounds())}"

    def as_dict(self) -> dict[str, Any]:
        """The verdict as JSON takes it, without the thresholds, which have their own place."""
        content = {**asdict(self), "sentence": self.sentence}
        del content["operating_points"]
        return {name: _rounded(value) for name, value in content.items()}

    def _choice(self) -> str:
        in_float = [name for name, graph in self.graphs.items() if graph.reason]
        in_int8 = [name for name in self.graphs if name not in in_float]
        if not in_float:
            return "INT8 in all graphs" + (", as --strict asks" if self.is_strict else "")
        if not in_int8:
            return f"{self.float_precision} in all graphs"
        return f"INT8 in {', '.join(in_int8)}; {self.float_precision} in {', '.join(in_float)}"

    def _grounds(self) -> list[str]:
        grounds = [f"in {name} {g.reason}" for name, g in self.graphs.items() if g.reason]
        if self.not_measured:
            why, *_ = self.not_measured.split(";")
            grounds.append(f"not timed, since engines do not run here ({why})")
        if self.update_ms:
            float_ms, chosen_ms = self.update_ms["float"], self.update_ms["chosen"]
            grounds.append(
                f"an update at {self.operating_point} takes {chosen_ms:.2f} ms, in "
                f"{self.float_precision} {float_ms:.2f}"
            )
        found = self.agreement
        who, whose = "boxes overlap", self.float_precision
        if self.not_measured:
            who, whose = "on ONNX Runtime, by the same INT8 numbers, boxes overlap", "fp32"
        grounds.append(
            f"{who} by {found.mean_box_iou:.3f} with those of {whose} and exits agree on "
            f"{found.worst_exits:.1%} or more"
        )
        if found.excess > 0:
            grounds.append(
                f"less than the gate allows ({MIN_BOX_IOU:g} and {MIN_EXIT_AGREEMENT:.0%})"
            )
        return grounds


def _rounded(value: Any) -> Any:
    """Numbers with as many digits as were measured."""
    if isinstance(value, Mapping):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value
