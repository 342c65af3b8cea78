import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgetrack.train import jpeg


def picture(height: int = 96, width: int = 128) -> npt.NDArray[np.uint8]:
    """Waves, edges and some noise, RGB."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(x / 9 + y / 31), 128 + 80 * np.cos(y / 7), (x + y) % 200]
    rgb = np.stack(waves, -1) + np.random.default_rng(0).normal(0, 6, (height, width, 3))
    rgb[20:50, 30:70] = 230, 40, 90
    return np.clip(rgb, 0, 255).astype(np.uint8)


def compressed(rgb: npt.NDArray[np.uint8], *qualities: int) -> npt.NDArray[np.float32]:
    pixels = torch.from_numpy(rgb).permute(2, 0, 1).float()
    batch = pixels.repeat(len(qualities), 1, 1, 1)
    found = jpeg.compress(batch, torch.tensor([float(q) for q in qualities]))
    return found.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("quality", [20, 50, 85])
@pytest.mark.parametrize("size", [(96, 128), (61, 83)])
def test_loss_is_that_of_opencvs_jpeg(quality: int, size: tuple[int, int]) -> None:
    rgb = picture(*size)
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality]
    _, data = cv2.imencode(".jpg", rgb[..., ::-1], flags)
    expected = cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(float)

    found = compressed(rgb, quality)[0]

    loss = np.abs(expected - rgb).mean()
    assert np.abs(found - expected).mean() < 0.25 * loss


def test_each_picture_has_its_own_quality() -> None:
    rgb = picture()

    both = compressed(rgb, 20, 80)

    assert (both[0] == compressed(rgb, 20)[0]).all()
    assert (both[1] == compressed(rgb, 80)[0]).all()
    assert np.abs(both[0] - rgb).mean() > 1.3 * np.abs(both[1] - rgb).mean()


def test_a_flat_picture_keeps_its_colour() -> None:
    rgb = np.full((16, 16, 3), (200, 90, 30), np.uint8)

    assert np.abs(compressed(rgb, 90)[0] - rgb).max() < 3
