import dataclasses

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from edgetrack.train.augment import Augmentation, Changes

SIZE_PX = 64


def smooth_crops(count: int = 1) -> Tensor:
    """``(count, 3, S, S)``, float32: waves."""
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX]
    channels = [128 + 100 * np.sin(x / 7), 128 + 100 * np.cos(y / 5), (x + y)]
    return torch.tensor(np.stack(channels), dtype=torch.float32).repeat(count, 1, 1, 1)


def dots(count: int = 1) -> Tensor:
    crops = torch.zeros(count, 3, SIZE_PX, SIZE_PX)
    crops[:, :, 32, 32] = 255
    return crops


def changes_of(count: int = 1, *, seed: int = 0, is_grey: bool = False, **how: float) -> Changes:
    return Changes.draw(
        np.random.default_rng(seed),
        dataclasses.replace(Augmentation.none(), **how),
        is_grey=np.full(count, is_grey),
        is_strong=True,
    )


def picture_of(crop: Tensor) -> npt.NDArray[np.float32]:
    return crop.permute(1, 2, 0).numpy().copy()


def test_no_augmentation_changes_nothing() -> None:
    crops = smooth_crops(4)

    changed = changes_of(4).apply(crops.clone())

    assert torch.equal(changed, crops)


@pytest.mark.parametrize(
    "name",
    [
        "light_strength",
        "low_resolution_rate",
        "blur_rate",
        "motion_blur_rate",
        "noise_rate",
        "jpeg_rate",
    ],
)
def test_each_change_works_in_moderation(name: str) -> None:
    crops = smooth_crops(8)

    changed = changes_of(8, **{name: 1.0}).apply(crops.clone())

    difference = (changed - crops).abs().mean((1, 2, 3))
    assert (difference > 0.1).all()
    assert (difference < 60).all()
    assert changed.min() >= 0
    assert changed.max() <= 255


@pytest.mark.parametrize("name", ["low_resolution_rate", "blur_rate", "noise_rate", "jpeg_rate"])
def test_changes_are_drawn_at_their_rate_and_touch_those_rows_alone(name: str) -> None:
    crops = smooth_crops(300)

    changed = changes_of(300, **{name: 0.3}).apply(crops.clone())

    is_changed = (changed != crops).flatten(1).any(1)
    assert is_changed.float().mean().item() == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize("name", ["blur_rate", "motion_blur_rate"])
def test_templates_are_not_blurred(name: str) -> None:
    how = dataclasses.replace(Augmentation.none(), **{name: 1.0})
    weak = Changes.draw(np.random.default_rng(0), how, is_grey=np.zeros(4, bool), is_strong=False)
    crops = smooth_crops(4)

    assert torch.equal(weak.apply(crops.clone()), crops)


def test_grey_drops_the_colours() -> None:
    crops = smooth_crops()
    expected = cv2.cvtColor(picture_of(crops[0]), cv2.COLOR_RGB2GRAY)

    changed = changes_of(is_grey=True).apply(crops)

    assert (changed == changed[:, :1]).all()
    assert_allclose(changed[0, 0].numpy(), expected, atol=0.01)


def test_light_is_a_gain_and_a_bias_and_grey_crops_get_no_colour() -> None:
    crops = torch.full((64, 3, 8, 8), 100.0)

    colour = changes_of(64, light_strength=1.0).apply(crops.clone())
    grey = changes_of(64, light_strength=1.0, is_grey=True).apply(crops.clone())

    assert 0 < colour[:, 0, 0, 0].std() < 40
    has_cast = (colour[:, 0] != colour[:, 1]).flatten(1).any(1)
    assert 0.3 < has_cast.float().mean() < 0.7
    assert_allclose(grey[:, 0].numpy(), grey[:, 2].numpy())


def test_a_gaussian_blur_is_opencvs() -> None:
    changes = changes_of(blur_rate=1.0)
    crops = smooth_crops()
    expected = cv2.GaussianBlur(picture_of(crops[0]), (0, 0), float(changes.blur_px[0]))

    changed = changes.apply(crops)

    assert_allclose(picture_of(changed[0]), expected, atol=0.2)


def test_a_motion_blur_draws_a_line_through_the_pixel() -> None:
    changes = changes_of(100, motion_blur_rate=1.0)

    changed = changes.apply(dots(100))[:, 0]

    assert_allclose(changed.sum((1, 2)).numpy(), 255, rtol=1e-5)
    lengths = (changed > 0).sum((1, 2))
    assert lengths.min() == 3
    assert lengths.max() == 17
    across = (changed > 0).any(2).sum(1), (changed > 0).any(1).sum(1)
    is_flat = across[1] == lengths
    assert (is_flat | (across[0] == lengths)).all()
    assert 0.5 < is_flat.float().mean() < 1
    rows = torch.nonzero(changed[:, 24:41, 24:41].flatten(1).sum(1) > 254)
    assert len(rows) == 100


def test_noise_has_its_standard_deviation_and_differs_from_row_to_row() -> None:
    changes = changes_of(2, noise_rate=1.0)
    crops = torch.full((2, 3, SIZE_PX, SIZE_PX), 128.0)

    noise = changes.apply(crops) - 128

    assert_allclose(noise.std((1, 2, 3)).numpy(), changes.noise, rtol=0.05)
    assert abs(torch.corrcoef(noise.flatten(1))[0, 1]) < 0.1


def test_low_resolution_keeps_the_mean_and_loses_detail() -> None:
    crops = (torch.arange(SIZE_PX) % 2 * 255.0).expand(4, 3, SIZE_PX, SIZE_PX).clone()

    changed = changes_of(4, low_resolution_rate=1.0).apply(crops.clone())

    assert_allclose(changed.mean((1, 2, 3)).numpy(), 127.5, atol=4)
    assert (changed.std((1, 2, 3)) < 100).all()


def test_a_crop_does_not_depend_on_its_neighbours() -> None:
    how = dict.fromkeys(["light_strength", "low_resolution_rate", "blur_rate", "motion_blur_rate"])
    changes = changes_of(12, noise_rate=0.5, jpeg_rate=0.5, **dict.fromkeys(how, 0.5))
    crops = torch.rand(12, 3, SIZE_PX, SIZE_PX) * 255
    together = changes.apply(crops.clone())

    for row in range(12):
        one = slice(row, row + 1)
        alone = Changes(**{k: v[one] for k, v in vars(changes).items()}).apply(crops[one].clone())

        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(("is_video", "expected"), [(True, 0.25), (False, 0.48)])
def test_angles_are_drawn_at_their_rate(is_video: bool, expected: float) -> None:
    angles = Augmentation().draw_angles_rad(np.random.default_rng(0), np.full(2000, is_video))

    assert np.count_nonzero(angles) / 2000 == pytest.approx(expected, abs=0.04)
