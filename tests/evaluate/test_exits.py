import dataclasses
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from toy_bundle import SCORES

from edgetrack.bundle import Bundle
from edgetrack.data.sequences import read_sequences
from edgetrack.data.synthetic import render_clip
from edgetrack.evaluate.exits import (
    ExitRecords,
    calibrate_exits,
    choose_operating_points,
    choose_presets,
    exits_taken,
    record_exits,
)

COST_MS = [2.0, 5.0, 10.0]


def records_of(*, gain: float, seed: int = 0, count: int = 2000) -> ExitRecords:
    """Frames of two kinds: on easy ones all exits agree, on hard ones deeper exits gain."""
    rng = np.random.default_rng(seed)
    hard = rng.random(count) < 0.4
    steps = np.array([0.0, 0.5, 1.0])
    iou = 0.8 - np.where(hard, gain, 0.0)[:, None] * (1 - steps)
    uncertainty = np.clip(
        0.3 + 0.3 * hard[:, None] * (1 - steps) + 0.03 * rng.standard_normal((count, 3)), 0.01, 1
    )
    return ExitRecords(iou, 1 - uncertainty / 2, uncertainty, np.array(COST_MS))


def outcome(
    records: ExitRecords, thresholds: tuple[float, ...]
) -> tuple[float, float, list[float]]:
    """Loss of IoU against the last exit, share of full cost, shares of the exits."""
    exits = exits_taken(records.uncertainty, thresholds)
    loss = (records.iou[:, -1] - records.iou[np.arange(len(exits)), exits]).mean()
    shares = np.bincount(exits, minlength=3) / len(exits)
    return float(loss), float(shares @ COST_MS / COST_MS[-1]), shares.tolist()


def write_clip(folder: Path) -> None:
    """A rendered clip of six frames as a sequence."""
    (folder / "img").mkdir(parents=True)
    boxes = []
    for index, (frame, bbox) in enumerate(render_clip(num_frames=6, width=160, height=120)):
        cv2.imwrite(str(folder / "img" / f"{index:06d}.jpg"), frame)
        boxes.append(",".join(str(v) for v in bbox))
    (folder / "groundtruth.txt").write_text("\n".join(boxes))


def test_the_exit_taken_is_the_first_below_its_threshold() -> None:
    uncertainty = np.array([[0.2, 0.9, 0.9], [0.3, 0.4, 0.9], [0.9, 0.5, 0.1], [np.nan, 0.1, 0.1]])

    assert exits_taken(uncertainty, (0.3, 0.5)).tolist() == [0, 1, 2, 1]


def test_the_operating_points_keep_their_promises() -> None:
    records = records_of(gain=0.2)

    points = choose_operating_points(records, cost=COST_MS)

    assert list(points) == ["accurate", "balanced", "fast"]
    loss, cost, _ = outcome(records, points["accurate"])
    assert loss <= 0
    assert cost < 0.9
    loss, cost, shares = outcome(records, points["balanced"])
    assert loss <= 0.05
    assert cost <= 0.62
    assert min(shares) >= 0.2
    _, cost, _ = outcome(records, points["fast"])
    assert cost <= 0.50


def test_exits_that_cost_nothing_to_leave_at_are_left_at() -> None:
    records = records_of(gain=0.0)

    points = choose_operating_points(records, cost=COST_MS)

    assert outcome(records, points["accurate"])[1] < 0.35
    assert outcome(records, points["fast"])[1] <= 0.50


@pytest.mark.parametrize("criterion", ["score", "combined"])
def test_thresholds_are_of_the_criterion(criterion: str) -> None:
    records = records_of(gain=0.2)

    points = choose_operating_points(records, cost=COST_MS, criterion=criterion)

    exits = exits_taken(records.criterion(criterion), points["balanced"])
    assert len(np.unique(exits)) == 3
    assert points["balanced"] != choose_operating_points(records, cost=COST_MS)["balanced"]


@pytest.mark.parametrize("gain", [0.0, 0.02, 0.2])
def test_presets_have_one_threshold_each_and_are_monotone_in_depth(gain: float) -> None:
    records = records_of(gain=gain)

    points = choose_presets(records, cost=COST_MS)

    assert list(points) == ["base", "medium", "fast"]
    assert all(len(set(thresholds)) == 1 for thresholds in points.values())
    base, medium, fast = (points[name][0] for name in points)
    assert base <= medium < fast
    depths = [exits_taken(records.uncertainty, points[name]).mean() for name in points]
    assert depths[0] >= depths[1] > depths[2]


def test_presets_keep_their_promises() -> None:
    records = records_of(gain=0.2)

    points = choose_presets(records, cost=COST_MS)

    loss, cost, _ = outcome(records, points["base"])
    assert loss <= 0.002
    assert cost < 0.9
    halfway, quarter = (0.2 + share * 0.8 for share in (0.5, 0.25))
    assert outcome(records, points["medium"])[1] == pytest.approx(halfway, abs=0.01)
    assert outcome(records, points["fast"])[1] == pytest.approx(quarter, abs=0.01)
    assert outcome(records, points["medium"])[1] <= halfway
    assert outcome(records, points["fast"])[1] <= quarter


def test_a_bundle_with_presets_keeps_them_when_it_is_calibrated(
    toy: Bundle, tmp_path: Path
) -> None:
    bundle = Bundle.load(Path(shutil.copytree(toy.path, tmp_path / "bundle")))
    presets = dict.fromkeys(("medium", "fast", "base"), (0.5, 0.5))
    bundle = dataclasses.replace(bundle, operating_points=presets, operating_point="medium")
    write_clip(tmp_path / "clips" / "clip")

    calibrated = calibrate_exits(bundle.write(), list(read_sequences(tmp_path / "clips")))

    assert set(calibrated.operating_points) == set(presets)
    assert calibrated.operating_point == "medium"
    assert all(len(set(t)) == 1 for t in calibrated.operating_points.values())


@pytest.mark.parametrize(("before", "after"), [("medium", "balanced"), ("fast", "fast")])
def test_the_default_is_always_among_the_new_operating_points(
    toy: Bundle, tmp_path: Path, before: str, after: str
) -> None:
    bundle = Bundle.load(Path(shutil.copytree(toy.path, tmp_path / "bundle")))
    bundle = dataclasses.replace(
        bundle, operating_points={before: (0.5, 0.5)}, operating_point=before
    )
    write_clip(tmp_path / "clips" / "clip")

    calibrated = calibrate_exits(bundle.write(), read_sequences(tmp_path / "clips"))

    assert list(calibrated.operating_points) == ["accurate", "balanced", "fast"]
    assert calibrated.operating_point == after
    assert Bundle.load(calibrated.path).operating_point == after


@pytest.mark.parametrize("name", ["toy", "toy_with_heads"])
def test_all_exits_are_asked_on_the_crops_of_the_last_one(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    write_clip(tmp_path / "clip")
    seen: list[str] = []

    records = record_exits(bundle, read_sequences(tmp_path), on_progress=seen.append)

    assert seen == ["clip"]
    assert records.iou.shape == records.score.shape == records.uncertainty.shape == (5, 3)
    np.testing.assert_allclose(records.score, np.tile(SCORES, (5, 1)), atol=1e-6)
    np.testing.assert_allclose(records.iou, records.iou[:, :1].repeat(3, 1), atol=1e-5)
    assert (np.diff(records.cost_ms) > 0).all()


def test_no_sequences_are_refused(toy: Bundle) -> None:
    with pytest.raises(ValueError, match="record_exits: expected frames with truth, got none"):
        record_exits(toy, [])
