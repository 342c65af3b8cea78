import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from published_ostrack import clip_box

from edgetrack.boxes import (
    as_bbox_xywh,
    clip_xywh,
    cxcywh_to_xywh,
    iou_xywh,
    xywh_to_cxcywh,
    xywh_to_xyxy,
    xyxy_to_xywh,
)


def random_boxes(count: int, *, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(-20, 80, (count, 2)), rng.uniform(1, 60, (count, 2))], 1)


def iou_one_by_one(a: np.ndarray, b: np.ndarray) -> float:
    """Slow twin: pixels counted on a fine grid of whole boxes."""
    grid = np.zeros((2, 200, 200), bool)
    for layer, (x, y, w, h) in zip(grid, (a.astype(int), b.astype(int)), strict=True):
        layer[y : y + h, x : x + w] = True
    return float((grid[0] & grid[1]).sum() / (grid[0] | grid[1]).sum())


def test_conversions_by_hand() -> None:
    box = np.array([10.0, 20.0, 6.0, 8.0])

    assert_array_equal(xywh_to_cxcywh(box), [13, 24, 6, 8])
    assert_array_equal(xywh_to_xyxy(box), [10, 20, 16, 28])


@pytest.mark.parametrize(
    ("there", "back"), [(xywh_to_cxcywh, cxcywh_to_xywh), (xywh_to_xyxy, xyxy_to_xywh)]
)
def test_conversions_come_back(there, back) -> None:
    boxes = random_boxes(24).reshape(2, 3, 4, 4)

    assert_allclose(back(there(boxes)), boxes, rtol=1e-12)


def test_iou_equals_counted_pixels() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 100, (2, 40, 4)) + np.array([0, 0, 1, 1])

    slow = [iou_one_by_one(p, q) for p, q in zip(a, b, strict=True)]

    assert_allclose(iou_xywh(a, b), slow, rtol=1e-12)


def test_iou_broadcasts() -> None:
    boxes = random_boxes(5)

    table = iou_xywh(boxes[:, None], boxes[None])

    assert table.shape == (5, 5)
    assert_array_equal(table, table.T)


def test_iou_of_a_box_with_itself_is_never_above_one() -> None:
    boxes = random_boxes(10_000)

    overlaps = iou_xywh(boxes, boxes)

    assert overlaps.max() == 1.0
    assert_allclose(overlaps, 1, rtol=1e-12)


def test_iou_of_boxes_that_touch_is_zero() -> None:
    assert iou_xywh(np.array([0.0, 0, 5, 5]), np.array([5.0, 0, 5, 5])) == 0


def test_iou_of_empty_boxes_is_zero_and_of_nan_is_nan() -> None:
    assert iou_xywh(np.zeros(4), np.zeros(4)) == 0
    assert np.isnan(iou_xywh(np.full(4, np.nan), np.ones(4)))


def test_clip_leaves_boxes_inside_alone() -> None:
    box = np.array([5.0, 6, 20, 10])

    assert_array_equal(clip_xywh(box, width_px=40, height_px=30, margin_px=10), box)


def test_clip_cuts_at_each_border() -> None:
    box = np.array([-5.0, -6, 100, 100])

    assert_array_equal(clip_xywh(box, width_px=40, height_px=30), [0, 0, 40, 30])


@pytest.mark.parametrize(
    ("x", "y"), [(-500.0, 3.0), (500.0, 3.0), (3.0, -500.0), (3.0, 500.0), (500.0, 500.0)]
)
def test_clip_keeps_a_margin_of_a_box_that_left(x: float, y: float) -> None:
    box = np.array([x, y, 20, 15])

    x, y, w, h = clip_xywh(box, width_px=40, height_px=30, margin_px=10)

    assert w >= 10
    assert h >= 10
    assert 0 <= x <= 30
    assert 0 <= y <= 20


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ((-50.0, 3, 2, 5), (0, 3, 2, 5)),
        ((500.0, 3, 2, 5), (38, 3, 2, 5)),
        ((3.0, 500, 2, 5), (3, 25, 2, 5)),
        ((3.0, 4, 2, 5), (3, 4, 2, 5)),
        ((3.0, 4, -2, -5), (3, 4, 0, 0)),
    ],
)
def test_clip_does_not_stretch_a_box_narrower_than_the_margin(
    bbox: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    clipped = clip_xywh(np.array(bbox), width_px=40, height_px=30, margin_px=10)

    assert_array_equal(clipped, expected)


def test_a_user_s_box_is_taken_unchanged_as_float32() -> None:
    box = as_bbox_xywh((-3, 4.5, 20, 10), width_px=40, height_px=30)

    assert box.dtype == np.float32
    assert_array_equal(box, [-3, 4.5, 20, 10])


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        ((1, 2, 3), "four finite numbers"),
        ((1, 2, 3, float("nan")), "four finite numbers"),
        ((1, 2, float("inf"), 3), "four finite numbers"),
        ((1e300, 2, 3, 4), "four finite numbers"),
        ((10**400, 2, 3, 4), "four numbers"),
        ("car", "four numbers"),
        (None, "four .*numbers"),
        ((1, 2, 0, 3), "positive width and height .* got 0 x 3"),
        ((1, 2, 3, -4), "positive width and height .* got 3 x -4"),
        ((0, 0, 81, 4), "at most twice as large as the 40x30 frame, got 81 x 4"),
        ((0, 0, 4, 1e30), "at most twice as large as the 40x30 frame"),
        ((40, 2, 3, 4), "overlaps the 40x30 frame"),
        ((1, 30, 3, 4), "overlaps the 40x30 frame"),
        ((-3, 2, 3, 4), "overlaps the 40x30 frame"),
        ((1, -4, 3, 4), "overlaps the 40x30 frame"),
    ],
)
def test_a_user_s_bad_box_is_refused(bbox, message: str) -> None:
    with pytest.raises(ValueError, match=f"^bbox: expected .*{message}"):
        as_bbox_xywh(bbox, width_px=40, height_px=30)


def test_a_smallest_side_of_the_margin_is_ostracks_clip_box() -> None:
    rng = np.random.default_rng(2)
    corners, sizes = rng.uniform(-60, 90, (300, 2)), rng.uniform(0, 50, (300, 2))
    boxes = np.concatenate([corners, sizes], 1)

    clipped = clip_xywh(boxes, width_px=60, height_px=50, margin_px=10, min_side_px=10)

    expected = [clip_box(box, height=50, width=60) for box in boxes.tolist()]
    assert_allclose(clipped, expected, atol=1e-9)
    assert (clipped[:, 2:] >= 10).all()
