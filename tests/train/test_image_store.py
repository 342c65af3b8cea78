from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from numpy.testing import assert_array_equal

from edgetrack.train.image_store import ImageIndex, ImageStore


def pixels_of(store: ImageStore, image: int, level: int) -> np.ndarray:
    first, height, width = store.entries[image, level]
    flat = store.pixels.numpy().view(np.uint8).reshape(-1, 4)
    return flat[first : first + height * width].reshape(height, width, 4)


def test_a_picture_is_kept_as_rgba_at_two_sizes() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((7, 10), (20, 13))]

    store = ImageStore(images, device=torch.device("cpu"))

    for number, image in enumerate(images):
        h, w = image.shape[0] // 2, image.shape[1] // 2
        half = cv2.resize(image[: 2 * h, : 2 * w], (w, h), interpolation=cv2.INTER_AREA)
        assert_array_equal(pixels_of(store, number, 0)[..., :3], image[..., ::-1])
        assert_array_equal(pixels_of(store, number, 1)[..., :3], half[..., ::-1])
        assert (pixels_of(store, number, 0)[..., 3] == 255).all()


def test_a_cutout_is_premultiplied() -> None:
    bgra = np.zeros((4, 4, 4), np.uint8)
    bgra[...] = 100, 150, 200, 255
    bgra[0] = 100, 150, 200, 0

    store = ImageStore([bgra], device=torch.device("cpu"))

    assert not pixels_of(store, 0, 0)[0].any()
    assert (pixels_of(store, 0, 0)[1] == [200, 150, 100, 255]).all()
    assert (pixels_of(store, 0, 1)[0] == [100, 75, 50, 128]).all()


def test_an_image_has_one_number_and_lazy_frames_have_negative_ones() -> None:
    image, other = np.zeros((4, 4, 3), np.uint8), np.ones((4, 4, 3), np.uint8)
    lazy = [image, other, image]
    index = ImageIndex()

    numbers = index.add(image), index.add(other), index.add(image)
    frames = index.add_frames((other, image))
    lazy_frames = index.add_frames(lazy)

    assert numbers == (0, 1, 0)
    assert_array_equal(frames, [1, 0])
    assert (lazy_frames < -1).all()
    assert_array_equal(index.add_frames(lazy), lazy_frames)
    with ThreadPoolExecutor(2) as pool:
        decoded = index.decode(lazy_frames[1:], pool=pool)
    assert [frame is wanted for frame, wanted in zip(decoded, lazy[1:], strict=True)] == [True] * 2
