"""What decides to stop: thresholds on a criterion at each exit but the last.

Every policy is a tuple of thresholds and two weights, because that is all that a device needs to
decide without the host. Exit ``k`` is taken if ``criterion < threshold[k]``, strictly: 0 never
stops, infinity always does, and a criterion of NaN never does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["CRITERIA", "ExitPolicy"]

# criterion = a * uncertainty + b * (1 - score); the uncertainty of General Distribution exits is
# the entropy of their edges.
CRITERIA: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"entropy": (1.0, 0.0), "score": (0.0, 1.0), "combined": (0.5, 0.5)}
)


@dataclass(frozen=True)
class ExitPolicy:
    """When to stop.

    Attributes:
        thresholds: One per exit but the last.
        criterion: What is compared with them: ``entropy`` (the exit's uncertainty), ``score``
            (one minus it), or ``combined`` (their mean).
    """

    thresholds: tuple[float, ...]
    criterion: str = "entropy"

    def __post_init__(self) -> None:
        """Refuse thresholds that mean nothing."""
        if any(math.isnan(t) or t < 0 for t in self.thresholds):
            raise ValueError(f"thresholds: expected numbers of at least 0, got {self.thresholds}")
        if self.criterion not in CRITERIA:
            raise ValueError(
                f"criterion: expected one of {sorted(CRITERIA)}, got {self.criterion!r}"
            )

    @classmethod
    def entropy(cls, thresholds: float | Sequence[float], *, num_exits: int) -> "ExitPolicy":
        """Stop where the uncertainty is below a threshold.

        Args:
            thresholds: One for all exits, or one per exit but the last.
            num_exits: Exits of the bundle.

        Raises:
            ValueError: The number of thresholds does not fit, or one is negative or NaN.
        """
        return cls.below(thresholds, criterion="entropy", num_exits=num_exits)

    @classmethod
    def below(
        cls, thresholds: float | Sequence[float], *, criterion: str, num_exits: int
    ) -> "ExitPolicy":
        """Stop where a criterion is below a threshold.

        Args:
            thresholds: One for all exits, or one per exit but the last.
            criterion: ``entropy``, ``score`` or ``combined``.
            num_exits: Exits of the bundle.

        Raises:
            ValueError: The number of thresholds does not fit, one is negative or NaN, or there is
                no such criterion.
        """
        if isinstance(thresholds, (int, float)):
            return cls((float(thresholds),) * (num_exits - 1), criterion)
        if len(thresholds) != num_exits - 1:
            raise ValueError(
                f"thresholds: expected {num_exits - 1} (one per exit but the last), "
                f"got {len(thresholds)}"
            )
        return cls(tuple(float(t) for t in thresholds), criterion)

    @classmethod
    def fixed(cls, exit_index: int, *, num_exits: int) -> "ExitPolicy":
        """Always stop at one exit.

        Raises:
            ValueError: There is no such exit.
        """
        if not 0 <= exit_index < num_exits:
            raise ValueError(f"exit_index: expected 0 to {num_exits - 1}, got {exit_index}")
        return cls(tuple(math.inf if k == exit_index else 0.0 for k in range(num_exits - 1)))

    @classmethod
    def always_last(cls, *, num_exits: int) -> "ExitPolicy":
        """Never stop early."""
        return cls((0.0,) * (num_exits - 1))

    def should_exit(self, exit_index: int, uncertainty: float, score: float) -> bool:
        """Whether to stop at an exit; the last one always stops."""
        if exit_index == len(self.thresholds):
            return True
        weight, score_weight = CRITERIA[self.criterion]
        return weight * uncertainty + score_weight * (1 - score) < self.thresholds[exit_index]
