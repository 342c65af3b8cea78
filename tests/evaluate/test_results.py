import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgetrack.data.sequences import Sequence
from edgetrack.errors import DataError
from edgetrack.evaluate.protocols import FrameRow
from edgetrack.evaluate.results import evaluate, read_rows, write_rows


class Drifting:
    """Drifts off by a pixel per frame; knows it, and stops earlier while it is right."""

    def __init__(self, *, fails_after: int = 10**9, num_exits: int = 2) -> None:
        self.num_updates, self.fails_after, self.num_exits = 0, fails_after, num_exits

    def init(self, frame: np.ndarray, bbox: tuple[float, ...]) -> None:
        self.bbox, self.age = bbox, 0

    def update(self, frame: np.ndarray) -> Any:
        if self.num_updates == self.fails_after:
            raise KeyboardInterrupt
        self.num_updates += 1
        self.age += 1
        x, y, w, h = self.bbox
        self.answer = Answer(
            (x + self.age / 4, y, w, h), self.age, min(self.age // 4, self.num_exits - 1)
        )
        return self.answer


class Answer:
    def __init__(self, bbox: tuple[float, ...], age: int, exit_index: int) -> None:
        self.bbox, self.exit_index = bbox, exit_index
        self.score, self.uncertainty = 1 / age, age / 7


@pytest.fixture
def sequences(tmp_path: Path) -> list[Sequence]:
    path = tmp_path / "frame.png"
    assert cv2.imwrite(str(path), np.zeros((60, 80, 3), np.uint8))
    truth = [np.tile([10.0 * k, 5, 20, 30], (1 + 4 * k, 1)) for k in range(1, 4)]
    return [Sequence(f"clip{k}", (path,) * len(t), t) for k, t in enumerate(truth, 1)]


def test_the_mean_is_over_sequences_and_the_speed_over_frames(sequences: list[Sequence]) -> None:
    result = evaluate(Drifting(), sequences)

    each = [s.metrics.success_auc for s in result.sequences]
    assert [s.name for s in result.sequences] == ["clip1", "clip2", "clip3"]
    assert len(set(each)) > 1
    assert result.mean.success_auc == pytest.approx(sum(each) / 3)
    assert result.fps == pytest.approx(24 / sum(s.seconds for s in result.sequences))


def test_exits_are_counted_over_all_sequences(sequences: list[Sequence]) -> None:
    result = evaluate(Drifting(num_exits=3), sequences)

    assert [s.exit_histogram for s in result.sequences] == [(3, 1), (3, 4, 1), (3, 4, 5)]
    assert result.exit_histogram == (9, 9, 6)


def test_rho_tells_per_exit_whether_uncertainty_orders_the_overlaps(
    sequences: list[Sequence],
) -> None:
    result = evaluate(Drifting(num_exits=2), sequences)

    assert result.uncertainty_rho == pytest.approx((-1, -1))


def test_the_summary_is_json_without_nan(sequences: list[Sequence]) -> None:
    result = evaluate(Drifting(num_exits=40), sequences[:1])

    summary = json.loads(json.dumps(result.as_dict(), allow_nan=False))

    assert summary["protocol"] == "ope"
    assert summary["sequences"][0]["num_frames"] == 5
    assert summary["sequences"][0]["num_scored"] == 4
    assert summary["mean"]["ao"] == pytest.approx(result.mean.ao)
    assert summary["exit_histogram"] == [3, 1]
    assert summary["uncertainty_rho"][1] is None


def test_a_finished_run_is_read_back_and_not_run_again(
    tmp_path: Path, sequences: list[Sequence]
) -> None:
    output = tmp_path / "deep" / "results"
    first = evaluate(Drifting(), sequences, output=output, fingerprint="a")
    again = Drifting()

    second = evaluate(again, sequences, output=output, fingerprint="a")

    assert again.num_updates == 0
    assert second.as_dict() == first.as_dict()
    assert sorted(p.name for p in output.iterdir()) == [
        f"clip{k}.{suffix}" for k in (1, 2, 3) for suffix in ("csv", "json")
    ]
    kept = json.loads((output / "clip2.json").read_text())
    assert kept["success_auc"] == first.sequences[1].metrics.success_auc


def test_an_interrupted_run_goes_on_where_it_stopped(
    tmp_path: Path, sequences: list[Sequence]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(Drifting(fails_after=6), sequences, output=tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"clip1.csv", "clip1.json"}
    tracker, seen = Drifting(), []

    result = evaluate(
        tracker, sequences, output=tmp_path / "out", on_sequence=lambda r: seen.append(r.name)
    )

    assert tracker.num_updates == 8 + 12
    assert seen == ["clip1", "clip2", "clip3"]
    assert result.mean == evaluate(Drifting(), sequences).mean


def spoil_fingerprint(options: dict[str, Any], sequence: Sequence, output: Path) -> None:
    options["fingerprint"] = "b"


def spoil_protocol(options: dict[str, Any], sequence: Sequence, output: Path) -> None:
    options["protocol"] = "otb"


def spoil_truth(options: dict[str, Any], sequence: Sequence, output: Path) -> None:
    sequence.boxes_xywh[3, 0] += 1


def cut_rows(options: dict[str, Any], sequence: Sequence, output: Path) -> None:
    path = output / "clip1.csv"
    path.write_text(path.read_text()[:-45])


def lose_a_row(options: dict[str, Any], sequence: Sequence, output: Path) -> None:
    path = output / "clip1.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


def cut_summary(options: dict[str, Any], sequence: Sequence, output: Path) -> None:
    (output / "clip1.json").write_text('{"key":')


def foreign_summary(options: dict[str, Any], sequence: Sequence, output: Path) -> None:
    (output / "clip1.json").write_text("[1]")


@pytest.mark.parametrize(
    "spoil",
    [
        *(spoil_fingerprint, spoil_protocol, spoil_truth),
        *(cut_rows, lose_a_row, cut_summary, foreign_summary),
    ],
)
def test_a_result_that_does_not_fit_is_run_again(
    tmp_path: Path, sequences: list[Sequence], spoil: Any
) -> None:
    options: dict[str, Any] = {"output": tmp_path / "out", "fingerprint": "a"}
    evaluate(Drifting(), sequences[:1], **options)
    spoil(options, sequences[0], tmp_path / "out")
    tracker = Drifting()

    evaluate(tracker, sequences[:1], **options)

    assert tracker.num_updates == 4


def test_no_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="sequences: expected at least one"):
        evaluate(Drifting(), [])


def test_rows_come_back_digit_for_digit(tmp_path: Path) -> None:
    rows = (
        FrameRow(0, 1.0, 2.0, 3.0, 4.0),
        FrameRow(1, 1 / 3, -0.1, 1e-9, 1e9, 0.1, 2, 0.30000000000000004, 1.5),
        FrameRow(2, math.inf, 0.0, 1.0, 1.0, None, 0, None, 2.0),
    )

    write_rows(tmp_path / "rows.csv", rows)

    assert read_rows(tmp_path / "rows.csv") == rows
    assert (tmp_path / "rows.csv").read_text().splitlines()[:2] == [
        "frame,x,y,w,h,score,exit,uncertainty,ms",
        "0,1.0,2.0,3.0,4.0,,,,",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"rows\.csv: expected columns frame,x"),
        ("a,b\n1,2\n", r"rows\.csv: .* got: columns a,b"),
        ("frame,x,y,w,h,score,exit,uncertainty,ms\n0,1,2,3,4,,,,\n1,2\n", r"rows\.csv:3: "),
        ("frame,x,y,w,h,score,exit,uncertainty,ms\n0,1,x,3,4,,,,\n", r"rows\.csv:2: .*'x'"),
        (None, r"rows\.csv: "),
    ],
)
def test_malformed_rows_are_named_with_their_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "rows.csv").write_text(content)

    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "rows.csv")
