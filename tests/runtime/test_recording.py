from collections.abc import Iterator

import numpy as np
import pytest

from edgetrack.bundle import Bundle
from edgetrack.crops import Cropper, CropWindow
from edgetrack.data.synthetic import render_clip
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.recording import record_crops
from edgetrack.tracker import Tracker

Clip = tuple[list[np.ndarray], list[float]]


@pytest.fixture(scope="module")
def clip() -> Clip:
    rendered = list(render_clip(num_frames=6, width=200, height=150))
    return [frame for frame, _ in rendered], rendered[0][1].tolist()


def crop(frame: np.ndarray, window: CropWindow, size_px: int) -> np.ndarray:
    pixels = np.empty((1, size_px, size_px, 3), np.uint8)
    Cropper(size_px).crop(frame, window, out=pixels[0])
    return pixels


def test_crops_are_those_that_the_tracker_cuts(toy: Bundle, clip: Clip) -> None:
    frames, bbox = clip
    crops = toy.crops
    with Tracker(toy, exit_policy=ExitPolicy.always_last(num_exits=toy.num_exits)) as tracker:
        tracker.init(frames[0], bbox)
        boxes = [bbox, *(tracker.update(frame).bbox for frame in frames[1:])]

    recorded = list(record_crops(toy, frames, bbox, name="clip"))

    assert len(recorded) == len(frames) - 1
    for (_, inputs), frame, last in zip(recorded, frames[1:], boxes, strict=False):
        window = CropWindow.around(np.array(last), factor=crops.search_factor)
        expected = crop(frame, window, crops.search_size_px)
        np.testing.assert_array_equal(inputs["search_region"], expected)


def test_every_frame_comes_with_the_template_of_the_first(toy: Bundle, clip: Clip) -> None:
    frames, bbox = clip
    window = CropWindow.around(np.array(bbox), factor=toy.crops.template_factor)

    recorded = list(record_crops(toy, frames, bbox, name="clip"))

    for _, inputs in recorded:
        expected = crop(frames[0], window, toy.crops.template_size_px)
        np.testing.assert_array_equal(inputs["template"], expected)
        np.testing.assert_array_equal(
            inputs["template_bbox_cxcywh"][0], window.to_crop(np.array(bbox))
        )
        assert inputs.keys() == {"template", "template_bbox_cxcywh", "search_region"}


def test_frames_come_with_what_was_carried_into_them(toy_with_memory: Bundle, clip: Clip) -> None:
    frames, bbox = clip
    bundle = toy_with_memory

    recorded = [inputs for _, inputs in record_crops(bundle, frames, bbox, name="clip")]

    assert [float(inputs["age"][0]) for inputs in recorded] == list(range(len(frames) - 1))
    assert len({inputs["memory"].tobytes() for inputs in recorded}) == len(recorded)


def test_the_crop_of_the_update_is_kept_beside_that_of_the_template(
    toy_with_memory: Bundle, clip: Clip
) -> None:
    frames, bbox = clip
    bundle = toy_with_memory
    with Tracker(bundle, exit_policy=ExitPolicy.always_last(num_exits=3)) as tracker:
        tracker.init(frames[0], bbox)
        boxes = [np.array(tracker.update(frame).bbox, np.float32) for frame in frames[1:]]

    recorded = [inputs for _, inputs in record_crops(bundle, frames, bbox, name="clip")]

    for inputs, frame, found in zip(recorded, frames[1:], boxes, strict=True):
        window = CropWindow.around(found, factor=bundle.crops.template_factor)
        expected = crop(frame, window, bundle.crops.template_size_px)
        np.testing.assert_array_equal(inputs["update.template"], expected)
        np.testing.assert_array_equal(
            inputs["update.template_bbox_cxcywh"][0], window.to_crop(found)
        )
        np.testing.assert_array_equal(inputs["template"], recorded[0]["template"])


def test_frames_are_named(toy: Bundle, clip: Clip) -> None:
    frames, bbox = clip

    names = [name for name, _ in record_crops(toy, frames, bbox, name="car")]

    assert names == [f"car/{k:06d}" for k in range(1, 6)]


def test_frames_are_read_one_by_one(toy: Bundle, clip: Clip) -> None:
    frames, bbox = clip
    num_read = 0

    def lazy() -> Iterator[np.ndarray]:
        nonlocal num_read
        for frame in frames:
            num_read += 1
            yield frame

    next(record_crops(toy, lazy(), bbox, name="clip"))

    assert num_read == 2


def test_crops_stay_as_they_were_when_the_next_one_is_cut(toy: Bundle, clip: Clip) -> None:
    frames, bbox = clip
    recording = record_crops(toy, frames, bbox, name="clip")
    _, first = next(recording)
    before = first["search_region"].copy()

    list(recording)

    np.testing.assert_array_equal(first["search_region"], before)


def test_wrong_frames_are_refused(toy: Bundle, clip: Clip) -> None:
    frames, bbox = clip

    with pytest.raises(ValueError, match="clip: expected frames, got none"):
        next(record_crops(toy, [], bbox, name="clip"))
    with pytest.raises(TypeError, match="expected a uint8 array"):
        next(record_crops(toy, [frames[0] / 255], bbox, name="clip"))
