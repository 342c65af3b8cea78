import dataclasses
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from edgetrack.data.sequences import Sequence
from edgetrack.evaluate.metrics import score_boxes
from edgetrack.evaluate.protocols import evaluate_sequence

TRUTH = np.array(
    [[10.0, 10, 20, 10], [12, 10, 20, 10], [np.nan] * 4, [16, 10, 20, 10], [18, 10, 20, 10]]
)


@dataclasses.dataclass
class Answer:
    bbox: tuple[float, ...]
    score: float = 0.5
    uncertainty: float = 0.25
    exit_index: int = 0


class Scripted:
    """A tracker that answers from a list and notes what it was shown."""

    def __init__(self, answers: list[Any], *, seconds: float = 0.0) -> None:
        self.answers, self.seconds, self.seen = answers, seconds, []

    def init(self, frame: np.ndarray, bbox: tuple[float, ...]) -> None:
        self.seen = [int(frame[0, 0, 0])]
        self.start = bbox
        self.left = iter(self.answers)

    def update(self, frame: np.ndarray) -> Any:
        time.sleep(self.seconds)
        self.seen.append(int(frame[0, 0, 0]))
        return next(self.left)


@pytest.fixture
def sequence(tmp_path: Path) -> Sequence:
    paths = []
    for index in range(len(TRUTH)):
        paths.append(tmp_path / f"{index}.png")
        assert cv2.imwrite(str(paths[-1]), np.full((30, 40, 3), index * 10, np.uint8))
    return Sequence("clip", tuple(paths), TRUTH)


def still() -> Scripted:
    return Scripted([tuple(TRUTH[0].tolist())] * 4)


def test_the_tracker_starts_from_the_truth_and_sees_each_frame_once(sequence: Sequence) -> None:
    tracker = still()

    evaluate_sequence(tracker, sequence)

    assert tracker.start == (10, 10, 20, 10)
    assert tracker.seen == [0, 10, 20, 30, 40]


def test_ope_scores_neither_the_first_frame_nor_absent_ones(sequence: Sequence) -> None:
    result = evaluate_sequence(still(), sequence)

    assert result.metrics == score_boxes(np.tile(TRUTH[0], (3, 1)), TRUTH[[1, 3, 4]])
    assert_array_equal(np.isnan(result.overlaps), [True, False, True, False, False])


def test_otb_counts_the_first_frame_as_the_truth(sequence: Sequence) -> None:
    result = evaluate_sequence(still(), sequence, protocol="otb")

    assert result.metrics == score_boxes(np.tile(TRUTH[0], (4, 1)), TRUTH[[0, 1, 3, 4]])
    assert result.metrics.ao > evaluate_sequence(still(), sequence).metrics.ao


def test_rows_hold_what_the_tracker_said(sequence: Sequence) -> None:
    answers = [Answer((k, 2, 3, 4), 0.1 * k, 0.2 * k, k % 3) for k in range(1, 5)]

    result = evaluate_sequence(Scripted(answers), sequence)

    first, *rows = result.rows
    assert (first.frame_index, first.x, first.w, first.score, first.exit_index) == (
        *(0, 10.0, 20.0, None, None),
    )
    for k, row in enumerate(rows, 1):
        assert (row.frame_index, row.x, row.y, row.w, row.h) == (k, k, 2, 3, 4)
        assert (row.score, row.uncertainty, row.exit_index) == (0.1 * k, 0.2 * k, k % 3)
    assert result.exit_histogram == (1, 2, 1)


@pytest.mark.parametrize("kind", [tuple, list, np.array], ids=["tuple", "list", "array"])
def test_a_bare_box_is_an_answer_too(sequence: Sequence, kind: Any) -> None:
    result = evaluate_sequence(Scripted([kind([1, 2, 3, 4])] * 4), sequence)

    assert (result.rows[1].x, result.rows[1].h, result.rows[1].exit_index) == (1.0, 4.0, None)
    assert result.exit_histogram == ()


def test_fps_is_frames_over_seconds_of_update_alone(sequence: Sequence) -> None:
    result = evaluate_sequence(Scripted(still().answers, seconds=0.01), sequence)

    assert 0.04 <= result.seconds < 0.2
    assert result.fps == pytest.approx(4 / result.seconds)


@pytest.mark.parametrize(
    "bad", [(np.nan, 10, 20, 10), (np.inf, 10, 20, 10), (-np.inf, 10, np.inf, 10)]
)
def test_a_box_that_is_not_finite_is_missed_and_kept(
    sequence: Sequence, bad: tuple[float, ...]
) -> None:
    answers = [bad, *(tuple(b) for b in TRUTH[2:])]

    result = evaluate_sequence(Scripted(answers), sequence)

    assert result.metrics.sr_50 == pytest.approx(2 / 3)
    assert result.overlaps[1] == 0
    assert not np.isfinite(result.rows[1].x)


@pytest.mark.parametrize("answer", [None, (1, 2, 3), (True, (1, 2, 3, 4)), "box"])
def test_an_answer_without_a_box_is_refused(sequence: Sequence, answer: Any) -> None:
    with pytest.raises(ValueError, match=r"update: expected four numbers .* in frame 1, got"):
        evaluate_sequence(Scripted([answer]), sequence)


def test_an_unknown_protocol_is_refused_before_anything_runs(sequence: Sequence) -> None:
    tracker = still()

    with pytest.raises(ValueError, match="protocol: expected one of ope, otb, got 'vot'"):
        evaluate_sequence(tracker, sequence, protocol="vot")  # type: ignore[arg-type]
    assert tracker.seen == []
