import dataclasses
import math

import numpy as np
import pytest

from edgetrack.bundle import Bundle
from edgetrack.gate.thresholds import exit_agreement, fit_operating_points, fit_threshold
from edgetrack.parity import ExitAnswers

RNG = np.random.default_rng(0)
ENTROPIES = RNG.uniform(0.2, 0.8, 200)
NOISE = RNG.normal(0, 0.01, 200)


def answers_of(*uncertainties: np.ndarray, score: float = 0.5) -> ExitAnswers:
    """Answers of exits that are as unsure as given, with one box."""
    uncertainty = np.stack(uncertainties, 1)
    boxes = np.full((*uncertainty.shape, 4), 0.5)
    return ExitAnswers(boxes, uncertainty, np.full(uncertainty.shape, score))


def shifted(answers: ExitAnswers, by: float) -> ExitAnswers:
    return ExitAnswers(answers.bbox_cxcywh, answers.uncertainty + by, answers.score)


def random_answers(count: int = 120) -> ExitAnswers:
    return answers_of(*np.random.default_rng(1).uniform(0, 1, (3, count)))


@pytest.mark.parametrize("by", [0.05, -0.05])
def test_a_threshold_follows_a_shift(by: float) -> None:
    assert fit_threshold(0.5, ENTROPIES, ENTROPIES + by + NOISE) == pytest.approx(
        0.5 + by, abs=0.005
    )


def test_a_shift_counts_as_it_is_near_the_threshold() -> None:
    quantized = ENTROPIES + np.where(ENTROPIES < 0.6, 0.05, -0.05)

    assert fit_threshold(0.3, ENTROPIES, quantized) == pytest.approx(0.35)
    assert fit_threshold(0.75, ENTROPIES, quantized) == pytest.approx(0.7)


def test_noise_alone_moves_no_threshold() -> None:
    noise = NOISE - np.median(NOISE)

    moved = [fit_threshold(t, ENTROPIES, ENTROPIES + noise) for t in (0.3, 0.5, 0.7)]

    assert sum(a != b for a, b in zip(moved, (0.3, 0.5, 0.7), strict=True)) == 0


@pytest.mark.parametrize("threshold", [0.0, math.inf])
def test_never_and_always_stay(threshold: float) -> None:
    assert fit_threshold(threshold, ENTROPIES, ENTROPIES + 0.1) == threshold


def test_a_few_crops_move_no_threshold() -> None:
    assert fit_threshold(0.5, ENTROPIES[:8], ENTROPIES[:8] + 0.1) == 0.5


def test_a_positive_threshold_is_never_moved_to_zero_which_never_stops() -> None:
    assert fit_threshold(0.22, ENTROPIES, ENTROPIES - 0.5) == 0.22


def test_a_shift_that_loses_agreement_is_not_followed() -> None:
    reference = np.concatenate([np.linspace(0.16, 0.169, 30), np.linspace(0.4, 1.0, 60)])
    # Most that lie near the threshold came down; the few others now lie between both thresholds.
    quantized = np.concatenate([np.full(18, 0.05), np.full(12, 0.13), reference[30:]])

    assert fit_threshold(0.17, reference, quantized) == 0.17


def test_crops_that_gave_no_number_do_not_count() -> None:
    quantized = ENTROPIES + 0.05
    quantized[::2] = np.nan

    assert fit_threshold(0.5, ENTROPIES, quantized) == pytest.approx(0.55)


def test_a_threshold_above_all_crops_moves_only_where_that_helps() -> None:
    assert fit_threshold(0.9, ENTROPIES, ENTROPIES - 0.05) == 0.9
    assert fit_threshold(0.81, ENTROPIES, ENTROPIES + 0.05) == pytest.approx(0.86)


def test_all_operating_points_follow(toy: Bundle) -> None:
    answers = random_answers(1000)

    points = fit_operating_points(toy, answers, shifted(answers, 0.05))

    assert points.keys() == toy.operating_points.keys()
    for name, thresholds in toy.operating_points.items():
        assert points[name] == pytest.approx([t + 0.05 for t in thresholds])


def test_fitted_thresholds_bring_the_exits_back(toy: Bundle) -> None:
    answers = random_answers()
    quantized = shifted(answers, 0.05)

    fitted = exit_agreement(toy, answers, quantized)
    unfitted = exit_agreement(toy, answers, quantized, toy.operating_points)

    assert fitted == dict.fromkeys(toy.operating_points, 1.0)
    assert all(share < 1 for share in unfitted.values())
    assert unfitted["balanced"] < 0.95


def test_agreement_is_counted_on_crops_that_were_not_fitted_to(toy: Bundle) -> None:
    answers = random_answers()
    by = np.repeat([0.05, -0.05], 60)[:, None]
    quantized = ExitAnswers(answers.bbox_cxcywh, answers.uncertainty + by, answers.score)

    fitted = exit_agreement(toy, answers, quantized)
    unfitted = exit_agreement(toy, answers, quantized, toy.operating_points)

    assert fitted["balanced"] < unfitted["balanced"]


def test_the_bundles_criterion_is_what_is_compared(toy: Bundle) -> None:
    bundle = dataclasses.replace(toy, criterion="score")
    uncertainty = np.zeros((200, 3))
    scores = np.tile(ENTROPIES[:, None], 3)
    boxes = np.full((200, 3, 4), 0.5)
    exact = ExitAnswers(boxes, uncertainty, scores)

    points = fit_operating_points(bundle, exact, ExitAnswers(boxes, uncertainty, scores - 0.05))

    assert points["balanced"] == pytest.approx([0.55, 0.55])
