import math
import tracemalloc

import cv2
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from published_ostrack import map_box_back, sample_target

from edgetrack.crops import Cropper, CropWindow, to_rgb

SIZE_PX = 64


def random_frame(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


def crop_slowly(frame: np.ndarray, window: CropWindow) -> np.ndarray:
    """Slow twin: pad the frame on all sides, cut, resize, convert."""
    pad = 400
    widths = [(pad, pad), (pad, pad)] + [(0, 0)] * (frame.ndim - 2)
    padded = np.pad(frame, widths)
    left, top, side = window.left_px + pad, window.top_px + pad, window.side_px
    cut = padded[top : top + side, left : left + side]
    resized = cv2.resize(cut, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_LINEAR)
    if resized.ndim == 2:
        return np.stack([resized] * 3, axis=-1)
    return resized[..., 2::-1]


def crop(frame: np.ndarray, window: CropWindow, *, cropper: Cropper | None = None) -> np.ndarray:
    out = np.empty((SIZE_PX, SIZE_PX, 3), np.uint8)
    (cropper or Cropper(SIZE_PX)).crop(frame, window, out=out)
    return out


WINDOWS = {
    "inside": CropWindow(30, 20, 50),
    "as large as the frame is high": CropWindow(10, 0, 120),
    "over the left border": CropWindow(-25, 30, 60),
    "over the top border": CropWindow(40, -33, 70),
    "over the right border": CropWindow(130, 30, 60),
    "over the bottom border": CropWindow(40, 90, 61),
    "over all borders": CropWindow(-50, -60, 300),
    "wholly outside": CropWindow(-200, 300, 80),
    "just outside": CropWindow(160, 20, 40),
    "one pixel": CropWindow(5, 6, 1),
}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)], ids=["grey", "grey1", "bgr", "bgra"])
def test_a_crop_equals_the_slow_one(window: CropWindow, channels: tuple[int, ...]) -> None:
    frame = random_frame(120, 160, *channels)

    expected = crop_slowly(frame[..., 0] if channels == (1,) else frame, window)

    assert_array_equal(crop(frame, window), expected)


def test_memory_of_earlier_crops_does_not_show() -> None:
    frame = random_frame(120, 160, 3)
    cropper = Cropper(SIZE_PX)

    for window in [*WINDOWS.values(), *reversed(WINDOWS.values())]:
        assert_array_equal(crop(frame, window, cropper=cropper), crop_slowly(frame, window))


def test_the_frame_is_not_written_to() -> None:
    frame = random_frame(120, 160, 3)
    before = frame.copy()

    crop(frame, WINDOWS["over all borders"])

    assert_array_equal(frame, before)


def test_a_frame_that_is_a_view_is_cropped_alike() -> None:
    frame = random_frame(120, 160, 3)
    flipped = frame[:, ::-1]

    assert_array_equal(
        crop(flipped, WINDOWS["inside"]), crop(np.ascontiguousarray(flipped), WINDOWS["inside"])
    )


@pytest.mark.parametrize("window", [WINDOWS["inside"], WINDOWS["over all borders"]])
def test_crops_after_the_first_allocate_no_pixels(window: CropWindow) -> None:
    frame, out = random_frame(120, 160, 3), np.empty((SIZE_PX, SIZE_PX, 3), np.uint8)
    cropper = Cropper(SIZE_PX)
    cropper.crop(frame, window, out=out)

    tracemalloc.start()
    for _ in range(20):
        cropper.crop(frame, window, out=out)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak_bytes < 4096


def test_a_crop_without_resize_is_the_pixels_themselves() -> None:
    frame = random_frame(120, 160, 3)

    pixels = crop(frame, CropWindow(13, 17, SIZE_PX))

    assert_array_equal(pixels, frame[17 : 17 + SIZE_PX, 13 : 13 + SIZE_PX, ::-1])


def test_the_window_has_the_paper_s_side_and_the_box_s_centre() -> None:
    window = CropWindow.around(np.array([100.0, 50.0, 40.0, 90.0]), factor=3.99)

    assert window.side_px == math.ceil(math.sqrt(40 * 90) * 3.99) == 240
    assert (window.left_px + 120, window.top_px + 120) == (120, 95)


def test_the_window_is_centred_to_half_a_pixel() -> None:
    rng = np.random.default_rng(5)
    for box in np.concatenate([rng.uniform(-50, 300, (200, 2)), rng.uniform(2, 90, (200, 2))], 1):
        window = CropWindow.around(box, factor=4)
        centre = np.array([window.left_px, window.top_px]) + window.side_px / 2
        assert_allclose(centre, box[:2] + box[2:] / 2, atol=0.5 + 1e-9)


@pytest.mark.parametrize("bbox", [(5.0, 5.0, 0.0, 0.0), (5.0, 5.0, 1e-9, 1e-9)])
def test_a_vanishing_box_still_has_a_window(bbox: tuple[float, ...]) -> None:
    assert CropWindow.around(np.array(bbox), factor=2).side_px == 1


def test_a_box_goes_to_the_crop_and_back() -> None:
    rng = np.random.default_rng(5)
    boxes = np.concatenate([rng.uniform(0, 500, (60, 2)), rng.uniform(4, 90, (60, 2))], 1)
    window = CropWindow.around(boxes[0], factor=4)

    there_and_back = window.to_frame(window.to_crop(boxes.reshape(3, 20, 4)))

    assert there_and_back.dtype == np.float32
    assert_allclose(there_and_back.reshape(60, 4), boxes, atol=1e-3)


def test_a_centred_box_lies_in_the_middle_of_its_crop() -> None:
    box = np.array([100.0, 60.0, 40.0, 40.0])

    centred = CropWindow.around(box, factor=4).to_crop(box)

    assert_array_equal(centred, np.array([0.5, 0.5, 0.25, 0.25], np.float32))


def test_the_map_to_the_crop_is_where_the_pixels_go() -> None:
    frame = np.zeros((120, 160, 3), np.uint8)
    frame[40:60, 70:100] = 255
    window = CropWindow(50, 20, 80)

    bright = np.argwhere(crop(frame, window)[..., 0] > 127)
    cx, cy, w, h = window.to_crop(np.array([70, 40, 30, 20])) * SIZE_PX

    assert_array_equal(bright.min(0), [round(cy - h / 2), round(cx - w / 2)])
    assert_array_equal(bright.max(0) + 1, [round(cy + h / 2), round(cx + w / 2)])


def test_rgb_of_each_kind_of_frame() -> None:
    bgr = random_frame(4, 5, 3)

    assert_array_equal(to_rgb(bgr), bgr[..., ::-1])
    assert_array_equal(to_rgb(np.dstack([bgr, bgr[..., :1]])), bgr[..., ::-1])
    assert_array_equal(to_rgb(bgr[..., 0]), np.stack([bgr[..., 0]] * 3, -1))
    assert_array_equal(to_rgb(bgr[..., :1]), np.stack([bgr[..., 0]] * 3, -1))


@pytest.mark.parametrize("channels", [(), (3,), (4,)])
def test_a_huge_window_is_cut_as_a_padded_copy_would_be_without_making_one(
    channels: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (9, 12, *channels), dtype=np.uint8)
    frame = cv2.resize(coarse, (1200, 900), interpolation=cv2.INTER_CUBIC)
    window = CropWindow(-700, -500, 2600)
    cropper, crop = Cropper(128), np.zeros((128, 128, 3), np.uint8)
    padded = np.zeros((2600, 2600, *channels), np.uint8)
    padded[500:1400, 700:1900] = frame
    expected = to_rgb(cv2.resize(padded, (128, 128), interpolation=cv2.INTER_LINEAR))

    cropper.crop(frame, window, out=crop)

    inside = np.zeros((128, 128), bool)
    inside[26:68, 36:92] = True
    assert np.abs(crop.astype(int) - expected)[inside].max() <= 2
    assert cropper._padded.size == 0


BOXES = {
    "inside": [60.0, 50.0, 20.0, 16.0],
    "ends at the frame's end": [110.0, 70.0, 20.0, 20.0],
    "over the right border": [140.25, 40.5, 18.0, 14.0],
    "over the bottom border": [50.75, 105.5, 22.0, 13.0],
    "over the corner": [150.0, 112.0, 12.5, 9.5],
    "over the left and top border": [-3.5, -2.25, 30.0, 20.0],
    "over all borders": [20.0, 15.0, 120.0, 90.0],
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
def test_ostracks_geometry_cuts_what_its_code_cuts(box: list[float]) -> None:
    frame = random_frame(120, 160, 3)
    cropper, out = Cropper(SIZE_PX, geometry="ostrack"), np.empty((SIZE_PX, SIZE_PX, 3), np.uint8)
    window = CropWindow.around(np.array(box), factor=4.0, geometry="ostrack")

    cropper.crop(frame, window, out=out)

    expected, resize_factor = sample_target(frame[..., ::-1], box, factor=4.0, size_px=SIZE_PX)
    assert_array_equal(out, expected)
    assert window.side_px == pytest.approx(SIZE_PX / resize_factor)


def test_ostracks_geometry_blanks_the_frames_last_column_and_row() -> None:
    frame = np.full((120, 160, 3), 200, np.uint8)
    cropper, out = Cropper(SIZE_PX, geometry="ostrack"), np.empty((SIZE_PX, SIZE_PX, 3), np.uint8)

    cropper.crop(frame, CropWindow(160 - SIZE_PX, 120 - SIZE_PX, SIZE_PX), out=out)

    assert (out[:-1, :-1] == 200).all()
    assert not out[-1].any()
    assert not out[:, -1].any()


def test_ostracks_geometry_pads_a_huge_window_as_well() -> None:
    frame = random_frame(900, 1200, 3)
    cropper, out = Cropper(SIZE_PX, geometry="ostrack"), np.empty((SIZE_PX, SIZE_PX, 3), np.uint8)
    box = [300.0, 200.0, 800.0, 600.0]

    cropper.crop(frame, CropWindow.around(np.array(box), factor=4.0, geometry="ostrack"), out=out)

    expected, _ = sample_target(frame[..., ::-1], box, factor=4.0, size_px=SIZE_PX)
    assert_array_equal(out, expected)


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
def test_ostracks_geometry_maps_back_from_the_corner_before_it_was_rounded(
    box: list[float],
) -> None:
    window = CropWindow.around(np.array(box), factor=4.0, geometry="ostrack")
    answer = [0.4, 0.6, 0.3, 0.2]

    found = window.to_frame(np.array(answer))

    expected = map_box_back(answer, box, size_px=SIZE_PX, resize_factor=SIZE_PX / window.side_px)
    assert_allclose(found, expected, atol=1e-4)
    assert_allclose(window.to_frame(window.to_crop(np.array(box))), box, atol=1e-4)
