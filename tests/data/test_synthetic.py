from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edgetrack.data.synthetic import render_clip, write_clip
from edgetrack.frames import read_frames

SMALL: dict[str, Any] = {"width": 320, "height": 240, "num_frames": 24}


def render(**options: Any) -> tuple[np.ndarray, np.ndarray]:
    frames, boxes = zip(*render_clip(**SMALL | options), strict=True)
    return np.stack(frames), np.stack(boxes)


def pixels_in(frame: np.ndarray, bbox_xywh: np.ndarray) -> np.ndarray:
    """The box's pixels at 48 x 48, subpixel exact."""
    x, y, w, h = bbox_xywh.tolist()
    zoom = np.array([[w / 48, 0, x + w / 96 - 0.5], [0, h / 48, y + h / 96 - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(frame, zoom, (48, 48), flags=flags).astype(float)


def test_frames_and_boxes_have_the_promised_form() -> None:
    frames, boxes = render()

    assert frames.shape == (24, 240, 320, 3)
    assert frames.dtype == np.uint8
    assert boxes.shape == (24, 4)
    assert boxes.dtype == np.float32


def test_the_seed_decides_everything() -> None:
    first, again, other = render(seed=5), render(seed=5), render(seed=6)

    assert_array_equal(first[0], again[0])
    assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])
    assert np.abs(first[0].astype(int) - other[0]).mean() > 5


@pytest.mark.parametrize("seed", range(6))
def test_the_truth_is_tight_around_what_the_target_covers(seed: int) -> None:
    alone: dict[str, Any] = {"has_blur": False, "has_distractor": False, "has_occlusion": False}
    frames, boxes = render(seed=seed, noise_std=0, **alone)
    without, absent = render(seed=seed, noise_std=0, leaves_frame=True, **alone)
    index = int(np.flatnonzero(np.isnan(absent).any(1))[1])

    changed = cv2.absdiff(frames[index], without[index]).max(-1) > 8
    rows, columns = np.nonzero(changed)

    x, y, w, h = boxes[index].tolist()
    covered = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert_allclose(covered, [x, y, x + w, y + h], atol=2)


@pytest.mark.parametrize("seed", range(2))
def test_the_truth_follows_the_target_to_a_pixel(seed: int) -> None:
    frames, boxes = render(seed=seed, has_blur=False, has_occlusion=False, noise_std=0)

    def difference(shift: tuple[float, float]) -> float:
        """From each frame's target to the next one's, looked for off its place."""
        moved = boxes + np.array([*shift, 0, 0], np.float32)
        here = [pixels_in(f, b) for f, b in zip(frames[:-1], boxes[:-1], strict=True)]
        there = [pixels_in(f, b) for f, b in zip(frames[1:], moved[1:], strict=True)]
        return float(np.abs(np.array(here) - there)[:, 12:36, 12:36].mean())

    exact = difference((0, 0))

    assert all(exact < difference(s) for s in [(1, 0), (-1, 0), (0, 1), (0, -1)])


@pytest.mark.parametrize("seed", range(3))
def test_the_target_stays_in_the_frame_unless_told_otherwise(seed: int) -> None:
    _, boxes = render(seed=seed, num_frames=300, has_occlusion=False, has_distractor=False)

    assert boxes[:, :2].min() >= 0
    assert (boxes[:, 0] + boxes[:, 2]).max() <= 320
    assert (boxes[:, 1] + boxes[:, 3]).max() <= 240


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("num_frames", [24, 120])
def test_a_target_that_leaves_is_absent_and_comes_back(seed: int, num_frames: int) -> None:
    _, boxes = render(seed=seed, num_frames=num_frames, leaves_frame=True)

    is_absent = np.isnan(boxes).all(1)
    assert_array_equal(np.isnan(boxes).any(1), is_absent)
    assert not is_absent[[0, -1]].any()
    assert 0.1 < is_absent.mean() < 0.5
    assert (np.diff(is_absent.astype(int)) != 0).sum() == 2


def test_target_moves_turns_and_changes_size() -> None:
    _, boxes = render(num_frames=200)

    areas = boxes[:, 2:].prod(1)
    steps = np.linalg.norm(np.diff(boxes[:, :2], axis=0), axis=1)
    assert areas.max() / areas.min() > 1.5
    assert np.ptp(boxes[:, 2] / boxes[:, 3]) > 0.1
    assert 0.5 < steps.mean() < 12
    assert steps.max() < 20


@pytest.mark.parametrize("seed", range(2))
def test_a_bar_hides_part_of_the_target_once(seed: int) -> None:
    plain, boxes = render(seed=seed, num_frames=60, has_occlusion=False)
    hidden, same_boxes = render(seed=seed, num_frames=60)

    shares = []
    for a, b, box in zip(plain, hidden, boxes, strict=True):
        shares.append((pixels_in(cv2.absdiff(a, b), box).max(-1) > 8).mean())
    shares = np.array(shares)

    assert_array_equal(boxes, same_boxes)
    assert 0.2 < shares.max() < 0.75
    assert 0.03 < (shares > 0.1).mean() < 0.3
    assert (np.diff((shares > 0.1).astype(int)) == 1).sum() == 1


@pytest.mark.parametrize("seed", range(2))
def test_a_distractor_passes_near_the_target(seed: int) -> None:
    plain, boxes = render(seed=seed, num_frames=60, has_distractor=False, has_occlusion=False)
    crowded, same_boxes = render(seed=seed, num_frames=60, has_occlusion=False)
    changed = np.array([cv2.absdiff(a, b).max(-1) > 8 for a, b in zip(plain, crowded, strict=True)])

    nearest = []
    for mask, box in zip(changed, boxes, strict=True):
        rows, columns = np.nonzero(mask)
        if len(rows):
            offsets = np.stack([columns, rows], 1) - (box[:2] + box[2:] / 2)
            nearest.append(np.linalg.norm(offsets, axis=1).min() / np.sqrt(box[2:].prod()))

    assert_array_equal(boxes, same_boxes)
    assert 0.2 < min(nearest) < 1.0


def test_blur_changes_the_frames_and_not_the_truth() -> None:
    sharp, boxes = render(has_blur=False, noise_std=0)
    blurred, same_boxes = render(noise_std=0)

    assert_array_equal(boxes, same_boxes)
    assert np.abs(sharp.astype(int) - blurred).max() > 20


def test_noise_has_the_given_strength() -> None:
    clean, _ = render(num_frames=3, noise_std=0)
    noisy, _ = render(num_frames=3, noise_std=6)

    is_free = (clean > 30) & (clean < 225)
    assert 5.5 < (noisy.astype(int) - clean)[is_free].std() < 6.5


def test_the_background_pans() -> None:
    frames, boxes = render(num_frames=60, has_distractor=False, has_occlusion=False, noise_std=0)
    strip = slice(0, 20)
    if (boxes[:, 1] < 20).any():
        strip = slice(220, 240)

    assert np.abs(frames[0, strip].astype(int) - frames[-1, strip]).mean() > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"width": 47}, "size"),
        ({"height": 10}, "size"),
        ({"noise_std": -1.0}, "noise_std"),
        ({"noise_std": float("nan")}, "noise_std"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        render_clip(**options)


@pytest.mark.parametrize("leaves_frame", [False, True])
def test_a_single_frame_can_be_rendered(leaves_frame: bool) -> None:
    frames, _ = render(num_frames=1, width=48, height=48, leaves_frame=leaves_frame)

    assert frames.shape == (1, 48, 48, 3)


def test_a_written_clip_is_read_back_with_its_truth(tmp_path: Path) -> None:
    frames, boxes = render(seed=2)

    truth = write_clip(tmp_path / "clip.mp4", render_clip(seed=2, **SMALL), fps=25)

    decoded = read_frames(tmp_path / "clip.mp4")
    assert (decoded.fps, decoded.num_frames) == (25.0, 24)
    assert_array_equal(truth, boxes)
    assert np.abs(np.stack(list(decoded)).astype(int) - frames).mean() < 12


def test_an_empty_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        write_clip(tmp_path / "clip.mp4", [])
