import math
from collections.abc import Sequence

import numpy as np
import pytest

from edgetrack.runtime.policies import ExitPolicy


def exit_taken(policy: ExitPolicy, uncertainties: Sequence[float]) -> int:
    """Where a chain stops whose exits are this unsure."""
    return next(k for k, u in enumerate(uncertainties) if policy.should_exit(k, u, 0.5))


@pytest.mark.parametrize(
    ("uncertainties", "exit_index"),
    [
        ((0.2, 0.2, 0.2), 0),
        ((0.3, 0.2, 0.2), 1),  # equal is not below
        ((0.9, 0.49, 0.2), 1),
        ((0.9, 0.5, 0.9), 2),
        ((math.nan, 0.1, 0.1), 1),
        ((math.nan, math.nan, math.nan), 2),
    ],
)
def test_the_first_exit_below_its_threshold_is_taken(
    uncertainties: tuple[float, ...], exit_index: int
) -> None:
    assert exit_taken(ExitPolicy((0.3, 0.5)), uncertainties) == exit_index


@pytest.mark.parametrize("uncertainty", [0.0, 1e-30, 0.5, 1.0, math.nan])
def test_a_threshold_of_zero_never_stops_early(uncertainty: float) -> None:
    policy = ExitPolicy.entropy(0, num_exits=3)

    assert exit_taken(policy, [uncertainty] * 3) == 2


@pytest.mark.parametrize("uncertainty", [0.0, 0.5, 1.0])
def test_a_threshold_above_one_always_stops_at_once(uncertainty: float) -> None:
    policy = ExitPolicy.entropy(1.01, num_exits=3)

    assert exit_taken(policy, [uncertainty] * 3) == 0


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.01, math.inf])
def test_not_a_number_never_stops_early(threshold: float) -> None:
    policy = ExitPolicy.entropy(threshold, num_exits=4)

    assert exit_taken(policy, [math.nan] * 4) == 3


@pytest.mark.parametrize("exit_index", [0, 1, 2])
def test_a_fixed_exit_is_taken_however_unsure(exit_index: int) -> None:
    policy = ExitPolicy.fixed(exit_index, num_exits=3)

    for uncertainty in (0.0, 0.5, 1.0):
        assert exit_taken(policy, [uncertainty] * 3) == exit_index


def test_always_last_is_always_last() -> None:
    policy = ExitPolicy.always_last(num_exits=3)

    assert exit_taken(policy, [0.0, 0.0, 0.0]) == 2
    assert policy == ExitPolicy.fixed(2, num_exits=3) == ExitPolicy.entropy(0.0, num_exits=3)


def test_a_single_exit_is_always_taken() -> None:
    assert exit_taken(ExitPolicy(()), [math.nan]) == 0


def test_depth_falls_as_the_thresholds_rise() -> None:
    rng = np.random.default_rng(0)
    frames = rng.uniform(0, 1, (300, 4)).tolist()

    depths = [
        sum(exit_taken(ExitPolicy.entropy(t, num_exits=4), u) for u in frames) / len(frames)
        for t in np.linspace(0, 1.1, 23)
    ]

    assert depths == sorted(depths, reverse=True)
    assert (depths[0], depths[-1]) == (3, 0)


def test_thresholds_are_taken_one_by_one_or_for_all_exits() -> None:
    assert ExitPolicy.entropy([0.1, 0.2], num_exits=3).thresholds == (0.1, 0.2)
    assert ExitPolicy.entropy(0.4, num_exits=3).thresholds == (0.4, 0.4)


@pytest.mark.parametrize("thresholds", [[], [0.1], [0.1, 0.2, 0.3]])
def test_a_wrong_number_of_thresholds_is_refused(thresholds: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^thresholds: expected 2 \(one per exit but the last\)"):
        ExitPolicy.entropy(thresholds, num_exits=3)


@pytest.mark.parametrize("threshold", [-0.1, math.nan, -math.inf])
def test_thresholds_that_mean_nothing_are_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"^thresholds: expected numbers of at least 0"):
        ExitPolicy((0.5, threshold))


@pytest.mark.parametrize("exit_index", [-1, 3])
def test_an_exit_that_is_not_there_is_refused(exit_index: int) -> None:
    with pytest.raises(ValueError, match=f"^exit_index: expected 0 to 2, got {exit_index}"):
        ExitPolicy.fixed(exit_index, num_exits=3)


@pytest.mark.parametrize(
    ("criterion", "value"), [("entropy", 0.2), ("score", 0.4), ("combined", 0.3)]
)
def test_a_criterion_weighs_uncertainty_and_score(criterion: str, value: float) -> None:
    for threshold, is_taken in ((value + 0.01, True), (value - 0.01, False)):
        policy = ExitPolicy.below(threshold, criterion=criterion, num_exits=2)
        assert policy.should_exit(0, 0.2, 0.6) is is_taken


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(ValueError, match=r"criterion: expected one of .*entropy.* got 'luck'"):
        ExitPolicy((0.5,), "luck")
