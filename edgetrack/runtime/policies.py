"""What decides to stop: thresholds on the uncertainty of each exit but the last.

Every policy is a tuple of thresholds, because that is all that a device needs to decide without
the host. Exit ``k`` is taken if ``uncertainty < threshold[k]``, strictly: 0 never stops, infinity
always does, and an uncertainty of NaN never does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ExitPolicy"]


@dataclass(frozen=True)
class ExitPolicy:
    """When to stop.

    Attributes:
        thresholds: One per exit but the last.
    """

    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse thresholds that mean nothing."""
        if any(math.isnan(t) or t < 0 for t in self.thresholds):
            raise ValueError(f"thresholds: expected numbers of at least 0, got {self.thresholds}")

    @classmethod
    def entropy(cls, thresholds: float | Sequence[float], *, num_exits: int) -> "ExitPolicy":
        """Stop where the uncertainty is below a threshold.

        Args:
            thresholds: One for all exits, or one per exit but the last.
            num_exits: Exits of the bundle.

        Raises:
            ValueError: The number of thresholds does not fit, or one is negative or NaN.
        """
        if isinstance(thresholds, (int, float)):
            return cls((float(thresholds),) * (num_exits - 1))
        if len(thresholds) != num_exits - 1:
            raise ValueError(
                f"thresholds: expected {num_exits - 1} (one per exit but the last), "
                f"got {len(thresholds)}"
            )
        return cls(tuple(float(t) for t in thresholds))

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

    def should_exit(self, exit_index: int, uncertainty: float) -> bool:
        """Whether to stop at an exit; the last one always stops."""
        return exit_index == len(self.thresholds) or uncertainty < self.thresholds[exit_index]
