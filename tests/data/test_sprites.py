import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edgetrack.data.sprites import Pose, Sprite, random_outline, random_texture

EDGE = 1.1 / 16  # the silhouette is drawn to a sixteenth of a pixel
RECTANGLE = np.array([(-20.0, -10.0), (20.0, -10.0), (20.0, 10.0), (-20.0, 10.0)])


def make_sprite(outline_px: np.ndarray = RECTANGLE, *, seed: int = 0) -> Sprite:
    return Sprite(outline_px, rng=np.random.default_rng(seed))


def alpha_of(sprite: Sprite, pose: Pose, **options: tuple[float, float]) -> np.ndarray:
    """How much of each pixel the sprite covers, from a drawing on black and one on white."""
    drawings = []
    for grey in (0, 255):
        frame = np.full((120, 160, 3), grey, np.uint8)
        sprite.draw(pose, out=frame, **options)
        drawings.append(frame.astype(float))
    return 1 - (drawings[1] - drawings[0]).mean(-1) / 255


def test_a_rectangle_at_whole_pixels_covers_exactly_its_box() -> None:
    sprite, pose = make_sprite(), Pose(70, 50)
    expected = np.zeros((120, 160))
    expected[40:60, 50:90] = 1

    assert_array_equal(sprite.bbox_at(pose), [50, 40, 40, 20])
    assert_allclose(alpha_of(sprite, pose), expected, atol=EDGE)


def test_a_rectangle_at_half_pixels_covers_half_of_its_border() -> None:
    alpha = alpha_of(make_sprite(), Pose(70.5, 50))

    assert_allclose(alpha[45, 49:53], [0, 0.5, 1, 1], atol=EDGE)
    assert_allclose(alpha[45, 88:92], [1, 1, 0.5, 0], atol=EDGE)


def test_a_quarter_turn_swaps_width_and_height() -> None:
    box = make_sprite().bbox_at(Pose(70, 50, angle_rad=math.pi / 2))

    assert_allclose(box, [60, 30, 20, 40], atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_the_box_is_tight_around_what_is_drawn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sprite = make_sprite(random_outline(rng) * 50, seed=seed)
    pose = Pose(*rng.uniform(60, 70, 2), scale=rng.uniform(0.7, 1.4), angle_rad=rng.uniform(-1, 1))

    rows, columns = np.nonzero(alpha_of(sprite, pose) > 0.1)

    x, y, w, h = sprite.bbox_at(pose).tolist()
    drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert_allclose(drawn, [x, y, x + w, y + h], atol=1.5)


def test_blur_spreads_along_the_motion_and_keeps_the_centre() -> None:
    sprite, pose = make_sprite(), Pose(70, 50)

    blurred = alpha_of(sprite, pose, blur_xy_px=(12.0, 0.0))

    assert 0.1 < blurred[50, 46] < 0.9
    assert blurred[35, 70] == blurred[65, 70] == 0
    assert_allclose(np.average(np.arange(160) + 0.5, weights=blurred.sum(0)), 70, atol=0.1)
    assert_allclose(blurred.sum(), alpha_of(sprite, pose).sum(), rtol=0.02)


@pytest.mark.parametrize(("x", "y"), [(-5, 50), (165, 50), (70, -5), (70, 125), (500, 500)])
def test_what_lies_outside_the_frame_is_cut(x: float, y: float) -> None:
    box = make_sprite().bbox_at(Pose(x, y))

    alpha = alpha_of(make_sprite(), Pose(x, y))

    left, top = np.clip(box[:2], 0, (160, 120))
    right, bottom = np.clip(box[:2] + box[2:], 0, (160, 120))
    assert_allclose(alpha.sum(), (right - left) * (bottom - top), rtol=0.02)


@pytest.mark.parametrize("seed", range(12))
def test_outlines_have_a_centred_box_of_unit_area(seed: int) -> None:
    outline = random_outline(np.random.default_rng(seed))

    low, high = outline.min(0), outline.max(0)
    assert_allclose(low, -high, atol=1e-12)
    assert_allclose((high - low).prod(), 1)


def test_textures_differ_and_are_not_flat() -> None:
    rng = np.random.default_rng(0)

    first, second = (random_texture(rng, 64, 48, num_shapes=4) for _ in range(2))

    assert first.shape == (48, 64, 3)
    assert first.std() > 10
    assert np.abs(first.astype(int) - second).mean() > 10
