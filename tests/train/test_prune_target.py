"""The search for a budget, on machines whose clocks are functions."""

import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from edgetrack.train.prune_target import Timing, budget_for

Together = Callable[[Sequence[float]], list[Timing]]


def clock(ms_of: Callable[[float], float], *, tried: list[list[float]] | None = None) -> Together:
    """A machine on which a budget takes a time."""

    def time_together(budgets: Sequence[float]) -> list[Timing]:
        if tried is not None:
            tried.append(list(budgets))
        return [Timing(rounds_ms=(ms_of(budget),)) for budget in budgets]

    return time_together


def line(budget: float) -> float:
    return 2.0 + 10.0 * budget


def test_the_budget_is_the_largest_that_keeps_the_time() -> None:
    tried: list[list[float]] = []

    def bent(budget: float) -> float:
        return 2.0 + 10.0 * budget**2

    found = budget_for(6.2, clock(bent, tried=tried), slack=0.0)

    assert found.budget == pytest.approx(0.42**0.5, abs=0.015)
    assert found.timings[found.budget].median_ms <= 6.2
    assert len(tried) <= 9


def test_the_search_stops_at_a_budget_just_within_the_time() -> None:
    tried: list[list[float]] = []

    found = budget_for(7.0, clock(line, tried=tried))

    # 2.5 % below the target, where a line through the extremes says
    assert found.budget == pytest.approx(0.4825)
    assert tried == [[0.01, 1.0], [0.01, found.budget, 1.0], [found.budget, 1.0]]


def test_a_model_that_is_fast_enough_stays_whole() -> None:
    tried: list[list[float]] = []

    found = budget_for(20.0, clock(line, tried=tried))

    assert found.budget == 1.0
    assert tried == [[0.01, 1.0], [0.01, 1.0]]


def test_a_budget_that_was_fast_by_luck_is_found_out() -> None:
    """The first time that a budget is timed, it takes a fifth less than it does later."""
    seen: set[float] = set()

    def ms_of(budget: float) -> float:
        is_lucky = 0.01 < budget < 1.0 and budget not in seen
        seen.add(budget)
        return line(budget) * (0.8 if is_lucky else 1.0)

    found = budget_for(7.0, clock(ms_of))

    # Lucky once, 0.675 would do; lucky once of two times, 0.578.
    assert found.budget < 0.6
    assert found.timings[found.budget].median_ms <= 7.0


@pytest.mark.parametrize("target_ms", [2.15, 7.0, 12.5])
@pytest.mark.parametrize("seed", range(20))
def test_what_is_chosen_was_compared_twice_at_least(seed: int, target_ms: float) -> None:
    noise = random.Random(seed)
    compared: Counter[float] = Counter()

    def time_together(budgets: Sequence[float]) -> list[Timing]:
        compared.update(budgets)
        return [Timing(rounds_ms=(line(b) * (1 + noise.uniform(-0.1, 0.2)),)) for b in budgets]

    try:
        found = budget_for(target_ms, time_together, max_steps=4)
    except ValueError as error:
        assert "expected at least what the smallest" in str(error)  # noqa: PT017
        assert target_ms == 2.15
        assert compared[0.01] >= 2
    else:
        assert compared[found.budget] >= 2
        assert found.timings[found.budget].median_ms <= target_ms


@pytest.mark.parametrize("seed", range(20))
def test_noise_does_not_lead_astray(seed: int) -> None:
    """Every round is up to a third slower than the machine could be; its turns are short."""
    noise = random.Random(seed)

    def time_together(budgets: Sequence[float]) -> list[Timing]:
        rounds = [[line(b) * (1 + noise.random() / 3) for b in budgets] for _ in range(7)]
        return [Timing(rounds_ms=times) for times in zip(*rounds, strict=True)]

    found = budget_for(7.0, time_together)

    # A budget of 0.25 takes 4.5 ms when the machine is quiet, and 0.5 takes 7 ms.
    assert 0.25 < found.budget < 0.5
    assert found.timings[found.budget].median_ms <= 7.0


def test_a_timing_says_its_median_and_its_spread() -> None:
    timing = Timing(rounds_ms=(3.0, 1.0, 500.0, 2.0, 4.0))

    assert str(timing) == "3.00 ms (half of 5 rounds: 2.00 to 4.00)"
    assert Timing(rounds_ms=(3.0,)).spread_ms == (3.0, 3.0)


@pytest.mark.parametrize(
    ("target_ms", "message"),
    [
        (
            1.0,
            r"^target_ms: expected at least what the smallest budget 0.01 takes here, 2.10 ms "
            r".*\(dense: 12.00 ms .*got 1; stop at earlier exits",
        ),
        (0.0, "^target_ms: expected above 0, got 0"),
        (float("nan"), "^target_ms: expected above 0, got nan"),
    ],
)
def test_a_time_that_cannot_be_met_is_refused(target_ms: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        budget_for(target_ms, clock(line))
