import math

import numpy as np
import numpy.typing as npt
import pytest

from edgetrack.runtime.target import TargetRules, TargetState

Float32Array = npt.NDArray[np.float32]
FRAME = (240, 320, 3)
START = (100.0, 80.0, 40.0, 30.0)


def box(x: float, y: float, w: float, h: float) -> Float32Array:
    return np.array([x, y, w, h], np.float32)


def state(**rules: float) -> TargetState:
    return TargetState(box(*START), frame_shape=FRAME, rules=TargetRules.of(rules))


def test_without_rules_the_answer_is_the_state() -> None:
    target = state()

    target.settle(box(10, 20, 90, 5), 0.01)

    np.testing.assert_allclose(target.bbox_xywh, [10, 20, 90, 5], atol=1e-4)
    assert not target.is_lost


def test_ostracks_geometry_settles_no_side_below_ten_pixels() -> None:
    plain, published = (
        TargetState(box(*START), frame_shape=FRAME, rules=TargetRules.off(), geometry=geometry)
        for geometry in ("edgetrack", "ostrack")
    )

    for target in (plain, published):
        target.settle(box(50, 60, 4, 30), 0.9)

    np.testing.assert_allclose(plain.bbox_xywh, [50, 60, 4, 30])
    np.testing.assert_allclose(published.bbox_xywh, [50, 60, 10, 30])


def test_smoothing_keeps_a_share_of_the_last_centre_and_size() -> None:
    target = state(centre_smoothing=0.25, size_smoothing=0.5)

    target.settle(box(140, 80, 80, 30), 0.9)  # centre 180, 95; it was 120, 95

    np.testing.assert_allclose(target.bbox_xywh, [165 - 30, 80, 60, 30], atol=1e-4)


@pytest.mark.parametrize(("answered", "kept"), [(90.0, 50.0), (10.0, 32.0), (44.0, 44.0)])
def test_a_size_changes_by_a_factor_at_most(answered: float, kept: float) -> None:
    target = state(max_size_change=1.25)

    target.settle(box(100, 80, answered, 30), 0.9)

    assert target.bbox_xywh[2] == pytest.approx(kept)
    assert target.bbox_xywh[0] + target.bbox_xywh[2] / 2 == pytest.approx(100 + answered / 2)


def test_an_unsure_tracker_looks_wider_until_itis_sure() -> None:
    target = state(unsure_score=0.5, patience=2, search_growth=1.5)
    sides = []
    for score in (0.9, 0.4, 0.4, 0.6, 0.9):
        target.settle(box(*START), score)
        sides.append(target.search_window(4.0).side_px)

    plain, wide = math.ceil(math.sqrt(1200) * 4), math.ceil(math.sqrt(1200) * 6)
    assert sides == [plain, plain, wide, plain, plain]


def test_an_unsure_frame_may_hold_the_size_while_the_centre_follows() -> None:
    target = state(unsure_score=0.5, size_hold=1.0)

    target.settle(box(140, 80, 80, 60), 0.4)

    np.testing.assert_allclose(target.bbox_xywh, [160, 95, 40, 30], atol=1e-4)


def test_lost_has_hysteresis() -> None:
    target = state(unsure_score=0.4, lost_after=3, found_score=0.7)
    lost = []
    for score in (0.3, 0.3, 0.5, 0.3, 0.3, 0.3, 0.5, 0.3, 0.71, 0.3):
        target.settle(box(*START), score)
        lost.append(target.is_lost)

    assert lost == [False] * 5 + [True] * 3 + [False] * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_answer_that_is_no_box_moves_nothing(bad: float) -> None:
    target = state(unsure_score=0.5, lost_after=2)

    for _ in range(2):
        target.settle(box(bad, 80, 40, 30), 0.9)

    np.testing.assert_array_equal(target.bbox_xywh, box(*START))
    assert target.is_lost


def test_a_score_that_is_no_number_moves_nothing() -> None:
    target = state()

    target.settle(box(1, 2, 30, 40), math.nan)

    np.testing.assert_array_equal(target.bbox_xywh, box(*START))


def lost_state(**rules: float) -> TargetState:
    target = state(unsure_score=0.5, found_score=0.6, lost_after=2, **rules)
    for _ in range(2):
        target.settle(box(*START), 0.1)
    assert target.is_lost
    return target


def test_a_lost_target_is_looked_for_beside_its_place_and_in_it_by_turns() -> None:
    target = lost_state(look_around=0.4)
    centres = []
    for _ in range(8):
        window = target.search_window(4.0)
        centres.append((window.left_px + window.side_px / 2, window.top_px + window.side_px / 2))
        target.settle(box(*START), 0.1)

    away = [math.hypot(x - 120, y - 95) for x, y in centres]
    assert max(away[0::2]) <= 1
    assert min(away[1::2]) > 40
    assert away[7] > away[1]  # further each time
    assert len({(round(x), round(y)) for x, y in centres[1::2]}) == 4


def test_a_look_beside_counts_only_if_it_finds_the_target() -> None:
    target = lost_state(look_around=0.4)
    target.settle(box(*START), 0.1)

    target.settle(box(200, 100, 20, 20), 0.55)
    np.testing.assert_array_equal(target.bbox_xywh, box(*START))
    target.settle(box(*START), 0.1)
    target.settle(box(200, 100, 20, 20), 0.65)

    np.testing.assert_allclose(target.bbox_xywh, [200, 100, 20, 20])
    assert not target.is_lost


def test_looks_stay_in_the_frame() -> None:
    target = lost_state(look_around=1.0)
    for _ in range(200):
        window = target.search_window(4.0)
        centre_x, centre_y = (v + window.side_px / 2 for v in (window.left_px, window.top_px))
        assert -1 <= centre_x <= FRAME[1] + 1
        assert -1 <= centre_y <= FRAME[0] + 1
        target.settle(box(*START), 0.1)


def test_a_box_stays_near_the_frame_and_can_be_cropped() -> None:
    target = state()

    target.settle(box(1000, 1000, 0, 0), 0.9)

    x, y, w, h = target.bbox_xywh
    assert x <= FRAME[1]
    assert y <= FRAME[0]
    assert min(w, h) >= 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("centre_smoothing", 1.5),
        ("size_smoothing", -0.1),
        ("max_size_change", 0.9),
        ("unsure_score", math.nan),
        ("patience", 0),
        ("search_growth", 0.5),
        ("size_hold", 2),
        ("lost_after", 0),
        ("found_score", 1.1),
        ("look_around", -1),
    ],
)
def test_a_rule_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected .* got"):
        TargetRules.of({name: value})


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rules: expected names among .*look_around.*'growth'"):
        TargetRules.of({"growth": 1.0})
