"""The budget for a latency, found by timing narrow models in turns on the machine at hand.

Machines are never quiet: a time that is compared with a target is a median over rounds, in which
all models that are compared have a turn each. Every comparison adds rounds, and the budget that is
chosen was compared twice at least, so that one that was fast enough by luck is found out.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["FoundBudget", "Timing", "budget_for"]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long an update took, in rounds that other models took part in.

    Attributes:
        rounds_ms: The median of each round's updates.
    """

    rounds_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds_ms)

    @property
    def spread_ms(self) -> tuple[float, float]:
        """The quartiles: what half of the rounds lie between."""
        if len(self.rounds_ms) == 1:
            return self.rounds_ms[0], self.rounds_ms[0]
        low, _, high = statistics.quantiles(self.rounds_ms, n=4, method="inclusive")
        return low, high

    def __str__(self) -> str:
        """As messages have it."""
        low, high = self.spread_ms
        rounds = len(self.rounds_ms)
        return f"{self.median_ms:.2f} ms (half of {rounds} rounds: {low:.2f} to {high:.2f})"


@dataclass(frozen=True, kw_only=True)
class FoundBudget:
    """The largest budget that kept a target.

    Attributes:
        budget: Share of the units.
        timings: Budget → its time over all rounds, the smallest budget first; the model itself
            under 1.
    """

    budget: float
    timings: Mapping[float, Timing]


def budget_for(
    target_ms: float,
    time_together: Callable[[Sequence[float]], Sequence[Timing]],
    *,
    smallest: float = 0.01,
    slack: float = 0.05,
    tolerance: float = 0.05,
    max_steps: int = 10,
) -> FoundBudget:
    """The largest budget whose measured time is within a target.

    Between a budget that is fast enough and one that is not, the next is where the time would be
    just below the target if it grew evenly, and not in the outer tenths.

    Args:
        target_ms: Milliseconds to reach.
        time_together: Budgets → how long each takes on this machine, timed in turns.
        smallest: Budget below which nothing is tried.
        slack: Stop at a budget whose time is below the target by less than this share of it...
        tolerance: ...or when the next one that is too slow is this close, as a share of it.
        max_steps: Compare so often, at most.

    Raises:
        ValueError: The target is no time, or even the smallest budget takes longer.
    """
    if not target_ms > 0:
        raise ValueError(f"target_ms: expected above 0, got {target_ms:g}")
    rounds: dict[float, tuple[float, ...]] = {smallest: (), 1.0: ()}
    compared: Counter[float] = Counter()

    def run(budgets: Sequence[float]) -> dict[float, Timing]:
        compared.update(budgets)
        for budget, timing in zip(budgets, time_together(budgets), strict=True):
            rounds[budget] = (*rounds.get(budget, ()), *timing.rounds_ms)
        return {budget: Timing(rounds_ms=rounds[budget]) for budget in sorted(rounds)}

    def largest_within() -> float:
        fast = (budget for budget, timing in timings.items() if timing.median_ms <= target_ms)
        return max(fast, default=smallest)

    def next_above(budget: float) -> float:
        return min((b for b in timings if b > budget), default=smallest)

    timings = run([smallest, 1.0])
    for _ in range(max_steps):
        low = largest_within()
        high, low_ms = next_above(low), timings[low].median_ms
        if low == 1.0 or low_ms >= (1 - slack) * target_ms or high - low <= tolerance * high:
            if compared[low] > 1:
                break
            timings = run(sorted([low, high]))
            continue
        high_ms = timings[high].median_ms
        share = ((1 - slack / 2) * target_ms - low_ms) / (high_ms - low_ms)
        middle = low + (high - low) * min(max(share, 0.1), 0.9)
        # Its neighbours run too, so that none is timed on an emptier machine than another.
        timings = run([low, middle, high])
    while compared[found := largest_within()] < 2:
        timings = run(sorted([found, next_above(found)]))
    if timings[found].median_ms > target_ms:
        raise ValueError(
            f"target_ms: expected at least what the smallest budget {smallest:g} takes here, "
            f"{timings[smallest]} (dense: {timings[1.0]}), got {target_ms:g}; stop at earlier "
            "exits, or start from a smaller model"
        )
    return FoundBudget(budget=found, timings=timings)
