import dataclasses
import math

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edgetrack.crops import Cropper, CropWindow, to_rgb
from edgetrack.train.augment import (
    Augmentation,
    View,
    add_distractors,
    add_occluder,
    change_light,
    paste,
    rotate_cutout,
)

UInt8Array = npt.NDArray[np.uint8]


def smooth_picture(*, width: int = 200, height: int = 150) -> UInt8Array:
    y, x = np.mgrid[:height, :width]
    channels = [128 + 100 * np.sin(x / 17), 128 + 100 * np.cos(y / 13), (x + y) / 2]
    return np.stack(channels, -1).astype(np.uint8)


def box_of_bright(crop: UInt8Array, *, size_px: int) -> npt.NDArray[np.float64]:
    """Box cxcywh, normalised, of what is brighter than 127 in the first channel."""
    bright = crop[..., 0] > 127
    columns, rows = np.flatnonzero(bright.any(0)), np.flatnonzero(bright.any(1))
    x1, x2, y1, y2 = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    return np.array([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]) / size_px


@pytest.mark.parametrize(
    "window", [CropWindow(40, 30, 64), CropWindow(31, 17, 90), CropWindow(-20, 70, 101)]
)
def test_a_view_of_a_window_is_what_the_tracker_cuts(window: CropWindow) -> None:
    picture = smooth_picture()
    expected = np.empty((96, 96, 3), np.uint8)
    Cropper(96).crop(picture, window, out=expected)

    crop = to_rgb(View.of_window(window, size_px=96).cut(picture))

    inside = View.of_window(window, size_px=96).inside(picture) > 0
    inside = cv2.erode(inside.astype(np.uint8), np.ones((5, 5))) > 0
    assert_allclose(crop[inside].astype(int), expected[inside].astype(int), atol=2)


def test_a_view_of_a_window_maps_boxes_as_the_window_does() -> None:
    window = CropWindow(-7, 13, 90)
    bbox_xywh = np.array([10.5, 20.25, 31, 17], np.float32)

    bbox_cxcywh = View.of_window(window, size_px=96).to_crop(bbox_xywh)

    assert_allclose(bbox_cxcywh, window.to_crop(bbox_xywh), rtol=1e-6)


@pytest.mark.parametrize("is_smooth", [False, True])
@pytest.mark.parametrize("is_mirrored", [False, True])
@pytest.mark.parametrize("scale", [0.3, 0.8, 2.3])
def test_boxes_follow_the_pixels(scale: float, is_mirrored: bool, is_smooth: bool) -> None:
    picture = np.zeros((151, 201, 3), np.uint8)
    picture[60:100, 80:140] = 255
    view = View.placing((110, 80), at_px=(75.4, 90.7), scale_xy=(scale, scale * 1.2), size_px=160)
    view = view.mirrored() if is_mirrored else view

    crop = view.cut(picture, smooth=is_smooth)

    bbox_cxcywh = view.to_crop(np.array([80, 60, 60, 40]))
    found = box_of_bright(crop, size_px=160)
    assert_allclose(found * 160, bbox_cxcywh * 160, atol=1.1)


def test_a_mirrored_view_is_the_mirror_image() -> None:
    picture = smooth_picture()
    view = View.of_window(CropWindow(-10, 30, 77), size_px=64)

    mirrored = view.mirrored().cut(picture)

    assert_allclose(mirrored[:, ::-1].astype(int), view.cut(picture).astype(int), atol=2)


def test_a_rotated_box_bounds_the_ellipse_in_it() -> None:
    y, x = np.mgrid[:200, :200] + 0.5
    is_inside = ((x - 100) / 60) ** 2 + ((y - 100) / 25) ** 2 <= 1
    picture = np.repeat(is_inside[..., None] * np.uint8(255), 3, 2)
    view = View.placing((100, 100), at_px=(60, 70), scale_xy=(0.7, 0.9), angle_rad=0.6, size_px=128)

    crop = view.cut(picture)

    bbox_cxcywh = view.to_crop(np.array([40, 75, 120, 50]))
    assert_allclose(box_of_bright(crop, size_px=128) * 128, bbox_cxcywh * 128, atol=1.1)


def test_outside_the_picture_is_black_or_the_border() -> None:
    picture = np.full((50, 50, 3), 200, np.uint8)
    border = np.full((64, 64, 3), 90, np.uint8)
    view = View.of_window(CropWindow(25, 0, 50), size_px=64)

    on_black, on_border = view.cut(picture), view.cut(picture, border=border)

    assert (on_black[:, 33:] == 0).all()
    assert (on_border[:, 33:] == 90).all()
    assert (on_border[1:-1, :31] == 200).all()
    assert (border == 90).all()
    assert_array_equal(view.inside(picture)[:, [0, 30, 34, 63]], [[1, 1, 0, 0]] * 64)


def test_a_rotated_cutout_is_tight_around_its_mask() -> None:
    bgra = np.zeros((40, 60, 4), np.uint8)
    cv2.ellipse(bgra, ((29.5, 19.5), (60, 40), 0), (255, 255, 255, 255), -1)

    rotated = rotate_cutout(bgra, math.pi / 2)

    assert_allclose(rotated.shape[:2], (60, 40), atol=2)
    assert (rotated[..., 3] > 100).any(0).all()
    assert (rotated[..., 3] > 100).any(1).all()


@pytest.mark.parametrize("cutout_px", [10, 40, 150])
@pytest.mark.parametrize("side_px", [10, 40, 90])
def test_a_pasted_cutout_fills_its_box(side_px: int, cutout_px: int) -> None:
    crop = np.zeros((128, 128, 3), np.uint8)
    bbox_xywh = np.array([20.3, 15.8, side_px, side_px * 0.8])
    bgra = np.full((cutout_px, cutout_px, 4), 255, np.uint8)

    paste(crop, bgra, bbox_xywh)

    x, y, w, h = bbox_xywh
    expected = np.array([x + w / 2, y + h / 2, w, h])
    fringe_px = side_px / cutout_px / 2
    assert_allclose(box_of_bright(crop, size_px=1)[:2], expected[:2], atol=0.6)
    assert_allclose(box_of_bright(crop, size_px=1)[2:], expected[2:], atol=1 + fringe_px)


def test_what_is_pasted_outside_the_crop_is_lost() -> None:
    crop = np.zeros((32, 32, 3), np.uint8)

    paste(crop, np.full((20, 20, 4), 255, np.uint8), np.array([40.0, 2.0, 20.0, 20.0]))

    assert not crop.any()


def test_distractors_leave_the_middle_of_the_target_alone() -> None:
    bbox_xywh = np.array([48.0, 48.0, 32.0, 32.0])
    num_changed = 0

    for seed in range(30):
        crop = np.zeros((128, 128, 3), np.uint8)
        add_distractors(
            crop,
            bbox_xywh,
            count=3,
            draw_cutout=lambda: np.full((30, 30, 4), 255, np.uint8),
            rng=np.random.default_rng(seed),
        )

        assert not crop[56:72, 56:72].any()
        num_changed += bool(crop.any())

    assert num_changed > 20


def test_an_occluder_hides_a_part_of_the_target() -> None:
    bbox_xywh = np.array([48.0, 48.0, 32.0, 32.0])
    for seed in range(20):
        crop = np.zeros((128, 128, 3), np.uint8)

        add_occluder(
            crop,
            bbox_xywh,
            bgra=np.full((30, 30, 4), 255, np.uint8),
            rng=np.random.default_rng(seed),
        )

        hidden = (crop[48:80, 48:80, 0] > 127).mean()
        assert 0.01 < hidden < 0.75


def test_no_augmentation_changes_nothing() -> None:
    crop = smooth_picture(width=64, height=64)
    rng = np.random.default_rng(0)

    changed = change_light(crop, Augmentation.none(), is_grey=False, is_strong=True, rng=rng)

    assert_array_equal(changed, crop)


@pytest.mark.parametrize(
    "name",
    [
        "light_strength",
        "low_resolution_rate",
        "blur_rate",
        "motion_blur_rate",
        "noise_rate",
    ],
)
def test_each_change_of_light_works_and_leaves_its_argument(name: str) -> None:
    crop = smooth_picture(width=64, height=64)
    before = crop.copy()
    how = dataclasses.replace(Augmentation.none(), **{name: 1.0})

    changed = change_light(crop, how, is_grey=False, is_strong=True, rng=np.random.default_rng(1))

    assert changed.shape == crop.shape
    assert changed.dtype == np.uint8
    assert 0 < np.abs(changed.astype(int) - before).mean() < 60
    assert_array_equal(crop, before)


def test_grey_drops_the_colours() -> None:
    crop = smooth_picture(width=64, height=64)
    rng = np.random.default_rng(0)

    changed = change_light(crop, Augmentation.none(), is_grey=True, is_strong=False, rng=rng)

    assert (changed == changed[..., :1]).all()


@pytest.mark.parametrize(("is_video", "expected"), [(True, 0.25), (False, 0.48)])
def test_angles_are_drawn_at_their_rate(is_video: bool, expected: float) -> None:
    rng = np.random.default_rng(0)

    angles = [Augmentation().angle_rad(rng, is_video=is_video) for _ in range(2000)]

    assert np.count_nonzero(angles) / 2000 == pytest.approx(expected, abs=0.04)
