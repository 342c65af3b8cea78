from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edgetrack.boxes import iou_xywh
from edgetrack.bundle import Bundle
from edgetrack.data.pseudo_tracks import PseudoTrack
from edgetrack.data.synthetic import render_clip
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.tracker import Tracker
from edgetrack.train.pseudo_tracks import (
    PseudoTrackSettings,
    find_pseudo_tracks,
    textured_boxes,
    track_and_return,
)

Frames = list[npt.NDArray[np.uint8]]
SETTINGS = PseudoTrackSettings()
WIDTH, HEIGHT = 160, 120


@pytest.fixture(scope="module")
def tracker(shipped_bundle: Bundle) -> Iterator[Tracker]:
    policy = ExitPolicy.always_last(num_exits=shipped_bundle.num_exits)
    with Tracker(shipped_bundle, exit_policy=policy, num_threads=1) as tracker:
        yield tracker


def rendered(seed: int, num_frames: int) -> tuple[Frames, npt.NDArray[np.float32]]:
    """Frames and truth of a sprite that moves over a panning background."""
    pairs = list(
        render_clip(
            num_frames=num_frames,
            width=320,
            height=240,
            seed=seed,
            has_distractor=False,
            has_occlusion=False,
        )
    )
    return [frame for frame, _ in pairs], np.stack([bbox for _, bbox in pairs])


class ByShade:
    """A tracker that never errs: it returns the extent of the shade that it was started on."""

    def init(self, frame: Any, bbox: Any) -> None:
        x, y, w, h = bbox
        self.shade = frame[int(y + h / 2), int(x + w / 2), 0]

    def update(self, frame: Any) -> tuple[float, ...]:
        rows, columns = np.nonzero(frame[..., 0] == self.shade)
        x, y = columns.min(), rows.min()
        return (x, y, columns.max() + 1 - x, rows.max() + 1 - y)


class Drifting:
    """A tracker that steps to the right from its box, whichever way time runs."""

    def __init__(self, step_px: float) -> None:
        self.step_px = step_px

    def init(self, frame: Any, bbox: Any) -> None:
        self.bbox = bbox

    def update(self, frame: Any) -> tuple[float, ...]:
        x, y, w, h = self.bbox
        self.bbox = (x + self.step_px, y, w, h)
        return self.bbox


def painted(*objects: Sequence[tuple[float, ...]]) -> Frames:
    """Frames with rectangles, each of its own shade; an object is its boxes xywh by frame."""
    frames = []
    for boxes in zip(*objects, strict=True):
        frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        for shade, bbox in enumerate(boxes, 1):
            x, y, w, h = (int(v) for v in bbox)
            frame[y : y + h, x : x + w] = 40 * shade
        frames.append(frame)
    return frames


def moving(y: float, num_frames: int = 20, side: float = 16) -> list[tuple[float, ...]]:
    return [(10 + 4 * t, y, side, side) for t in range(num_frames)]


def still(x: float, y: float, num_frames: int = 20) -> list[tuple[float, ...]]:
    return [(x, y, 16, 16)] * num_frames


def found_by_shade(
    *objects: Sequence[tuple[float, ...]], settings: PseudoTrackSettings = SETTINGS
) -> list[PseudoTrack]:
    """Tracks of painted objects, all of which are detected in each frame."""

    def detected(index: int, image: Any) -> npt.NDArray[np.float32]:
        return np.array([boxes[index] for boxes in objects], np.float32)

    return find_pseudo_tracks(
        ByShade(), painted(*objects), detected, clip="clip", bundle="none", settings=settings
    )


def test_a_track_follows_the_sprite(tracker: Tracker) -> None:
    frames, truth = rendered(seed=3, num_frames=40)

    found = track_and_return(tracker, frames, truth[5], first=5, settings=SETTINGS)

    assert found is not None
    boxes, agreement = found
    assert len(boxes) >= SETTINGS.min_frames
    assert iou_xywh(boxes, truth[5 : 5 + len(boxes)]).min() > 0.5
    assert 0.6 <= agreement <= 1


def test_what_is_found_from_detections_follows_the_sprite(tracker: Tracker) -> None:
    frames, truth = rendered(seed=3, num_frames=40)
    settings = PseudoTrackSettings(per_clip=3)

    tracks = find_pseudo_tracks(
        tracker,
        frames,
        lambda index, image: truth[index : index + 1],
        clip="clip",
        bundle="name",
        settings=settings,
    )

    overlaps = [
        iou_xywh(t.boxes_xywh, truth[t.first : t.first + len(t.boxes_xywh)]).min() for t in tracks
    ]
    assert max(overlaps) > 0.5


def test_tracks_are_found_without_any_detection(tracker: Tracker) -> None:
    frames, _ = rendered(seed=4, num_frames=40)

    tracks = find_pseudo_tracks(
        tracker,
        frames,
        lambda index, image: np.empty((0, 4), np.float32),
        clip="clip",
        bundle="name",
        settings=PseudoTrackSettings(per_clip=6),
    )

    assert tracks
    assert all(len(t.boxes_xywh) >= SETTINGS.min_frames for t in tracks)


def test_a_target_lost_at_a_cut_is_dropped(tracker: Tracker) -> None:
    frames, truth = rendered(seed=3, num_frames=6)
    other, _ = rendered(seed=8, num_frames=30)

    uncut = track_and_return(
        tracker, rendered(seed=3, num_frames=36)[0], truth[0], first=0, settings=SETTINGS
    )
    cut = track_and_return(tracker, [*frames, *other], truth[0], first=0, settings=SETTINGS)

    assert uncut is not None
    assert cut is None


def test_a_track_ends_before_a_cut(tracker: Tracker) -> None:
    frames, truth = rendered(seed=3, num_frames=24)
    other, _ = rendered(seed=8, num_frames=24)

    found = track_and_return(tracker, [*frames, *other], truth[0], first=0, settings=SETTINGS)

    assert found is not None
    assert SETTINGS.min_frames <= len(found[0]) <= 24


@pytest.mark.parametrize(("step_px", "num_kept"), [(0.4, 9), (0.5, 8), (0.6, 0)])
def test_the_way_back_meets_the_start_by_seven_tenths(step_px: float, num_kept: int) -> None:
    frames = [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * 9
    start = np.array([20.0, 20, 40, 40])

    found = track_and_return(Drifting(step_px), frames, start, first=0, settings=SETTINGS)

    # off the start by d = 2 * 8 steps, then 2 * 7: IoU (40 - d) / (40 + d) of 0.72; of 0.67 and
    # 0.70 (33 / 47); of 0.61 and 0.65
    assert (0 if found is None else len(found[0])) == num_kept


@pytest.mark.parametrize(("aside_px", "is_kept"), [(9.0, True), (11.0, False)])
def test_both_ways_agree_by_six_tenths_in_every_frame(aside_px: float, is_kept: bool) -> None:
    class SteppingAside(ByShade):
        """Errs in frame 4 on the way back alone; pixel (0, 0) tells the frame."""

        def update(self, frame: Any) -> tuple[float, ...]:
            x, y, w, h = super().update(frame)
            is_back = frame[0, 0, 1] < self.index
            self.index = frame[0, 0, 1]
            return (x + aside_px * (is_back and self.index == 4), y, w, h)

        def init(self, frame: Any, bbox: Any) -> None:
            super().init(frame, bbox)
            self.index = frame[0, 0, 1]

    path = moving(20, num_frames=9, side=40)
    frames = painted(path)
    for index, frame in enumerate(frames):
        frame[0, 0, 1] = index

    settings = PseudoTrackSettings(min_frames=9)
    found = track_and_return(SteppingAside(), frames, np.array(path[0]), first=0, settings=settings)

    # 31 / 49 = 0.63, or 29 / 51 = 0.57
    assert (found is not None) == is_kept


def test_a_track_is_cut_by_quarters_until_it_returns() -> None:
    frames = [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * 65

    found = track_and_return(
        Drifting(0.4), frames, np.array([5.0, 5, 100, 100]), first=0, settings=SETTINGS
    )

    # ends 64, 48, 36, 27 miss the start by 2 * 0.4 * end > 17.6 px, 20 misses it by 16 px
    assert found is not None
    assert len(found[0]) == 21
    assert_allclose(found[0][:, 0], 5 + 0.4 * np.arange(21), rtol=1e-5)


def test_the_agreement_is_the_mean_overlap_of_both_ways() -> None:
    frames = [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * 9

    found = track_and_return(
        Drifting(0.4), frames, np.array([5.0, 5, 100, 100]), first=0, settings=SETTINGS
    )

    shifts = 0.8 * np.arange(9)
    assert found is not None
    assert found[1] == pytest.approx(float(np.mean((100 - shifts) / (100 + shifts))), abs=1e-5)


def test_a_track_ends_where_its_box_shows_something_else() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.integers(0, 255, (2, HEIGHT, WIDTH, 3)).astype(np.uint8)
    blend = (0.7 * before + 0.3 * after).astype(np.uint8)  # correlation of 0.9 with before

    found = track_and_return(
        Drifting(0),
        [*[before] * 6, *[blend] * 6, *[after] * 9],
        np.array([20.0, 20, 40, 40]),
        first=0,
        settings=SETTINGS,
    )

    # to `after` the blend correlates by 0.3 / sqrt(0.7 ** 2 + 0.3 ** 2) = 0.39, `before` by 0
    assert found is not None
    assert len(found[0]) == 21
    cut = track_and_return(
        Drifting(0),
        [*[before] * 12, *[after] * 9],
        np.array([20.0, 20, 40, 40]),
        first=0,
        settings=SETTINGS,
    )
    assert cut is not None
    assert len(cut[0]) == 12


def test_a_clip_shorter_than_a_track_gives_none() -> None:
    frames = painted(moving(20, 7))

    found = track_and_return(ByShade(), frames, np.array(moving(20)[0]), first=0, settings=SETTINGS)

    assert found is None
    assert found_by_shade(moving(20, 7)) == []


def test_an_object_found_from_several_frames_gives_one_track() -> None:
    tracks = found_by_shade(moving(20, 30), moving(60, 30))

    assert [t.boxes_xywh[0, 1] for t in sorted(tracks, key=lambda t: t.boxes_xywh[0, 1])] == [
        20,
        60,
    ]


@pytest.mark.parametrize(("apart_px", "num_tracks"), [(2, 1), (12, 2)])
def test_tracks_that_come_to_overlap_are_one(apart_px: int, num_tracks: int) -> None:
    first = np.array(moving(20))
    second = first.copy()
    second[:, 0] += np.maximum(12 - 3 * np.arange(20), apart_px)  # IoU of 4 / 28 at the start

    class OnPaths:
        """Follows the path whose box it was started on; pixel (0, 0) tells the frame."""

        def init(self, frame: Any, bbox: Any) -> None:
            index = frame[0, 0, 1]
            self.path = min((first, second), key=lambda path: abs(path[index] - bbox).sum())

        def update(self, frame: Any) -> Any:
            return self.path[frame[0, 0, 1]]

    frames = [np.zeros((HEIGHT, WIDTH, 3), np.uint8) for _ in range(20)]
    for index, frame in enumerate(frames):
        frame[0, 0, 1] = index

    tracks = find_pseudo_tracks(
        OnPaths(),
        frames,
        lambda index, image: np.array([first[index], second[index]], np.float32),
        clip="clip",
        bundle="none",
        settings=PseudoTrackSettings(min_frames=20),
    )

    assert len(tracks) == num_tracks


def test_one_third_of_the_tracks_may_stand_still() -> None:
    tracks = found_by_shade(moving(20), moving(44), still(20, 80), still(60, 80), still(100, 80))

    is_still = [bool((t.boxes_xywh == t.boxes_xywh[0]).all()) for t in tracks]
    assert sorted(is_still) == [False, False, True]


def test_objects_on_the_border_are_dropped() -> None:
    tracks = found_by_shade(moving(0), moving(HEIGHT - 16), moving(50))

    assert [t.boxes_xywh[0, 1] for t in tracks] == [50]


@pytest.mark.parametrize(("growth", "is_kept"), [(1.9, True), (2.2, False)])
def test_a_change_of_area_over_fourfold_is_dropped(growth: float, is_kept: bool) -> None:
    sides = np.linspace(20, 20 * growth, 20).round()
    settings = PseudoTrackSettings(min_frames=20)

    tracks = found_by_shade(
        [(20 + 3 * t, 20, side, side) for t, side in enumerate(sides)], settings=settings
    )

    assert bool(tracks) == is_kept


def test_no_more_tracks_are_kept_than_asked_for() -> None:
    objects = [moving(y) for y in (5, 30, 55, 80)]

    tracks = found_by_shade(*objects, settings=PseudoTrackSettings(per_clip=2))

    assert len(tracks) == 2


def test_the_same_seed_gives_the_same_tracks(tracker: Tracker) -> None:
    frames, truth = rendered(seed=3, num_frames=24)

    def find(seed: int) -> list[PseudoTrack]:
        return find_pseudo_tracks(
            tracker,
            frames,
            lambda index, image: truth[index : index + 1],
            clip="clip",
            bundle="name",
            settings=PseudoTrackSettings(per_clip=3, seed=seed),
        )

    first, again, other = find(0), find(0), find(1)

    assert [t.first for t in first] == [t.first for t in again]
    for a, b in zip(first, again, strict=True):
        assert_array_equal(a.boxes_xywh, b.boxes_xywh)
    assert [t.boxes_xywh.tolist() for t in first] != [t.boxes_xywh.tolist() for t in other]


def test_textured_boxes_lie_on_texture() -> None:
    image = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    image[40:80, 60:110] = np.random.default_rng(0).integers(0, 255, (40, 50, 1))

    boxes = textured_boxes(image, np.empty((0, 4)), count=3, rng=np.random.default_rng(1))

    assert len(boxes) > 0
    assert (iou_xywh(boxes, np.array([60, 40, 50, 40])) > 0.1).all()


def test_textured_boxes_stay_away_from_those_taken() -> None:
    image = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    free = textured_boxes(image, np.empty((0, 4)), count=4, rng=np.random.default_rng(1))

    boxes = textured_boxes(image, free, count=4, rng=np.random.default_rng(1))

    assert len(boxes) > 0
    assert iou_xywh(boxes[:, None], free).max() <= 0.3


def test_a_blank_frame_has_no_textured_box() -> None:
    blank = np.zeros((HEIGHT, WIDTH, 3), np.uint8)

    boxes = textured_boxes(blank, np.empty((0, 4)), count=4, rng=np.random.default_rng(0))

    assert boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_clip": 0}, "per_clip of at least 1"),
        ({"seed": -1}, "seed of at least 0"),
        ({"min_frames": 66}, "min_frames from 2 to max_frames"),
        ({"min_iou": 1.5}, r"overlaps in \[0, 1\]"),
        ({"max_static_share": 1}, "share below 1"),
        ({"min_likeness": 2}, r"min_likeness in \[-1, 1\]"),
        ({"max_area_ratio": 0.5}, "max_area_ratio of at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PseudoTrackSettings(**changes)


def test_a_start_outside_the_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="first: expected a frame from 0 to 19, got 20"):
        track_and_return(ByShade(), painted(moving(20)), np.ones(4), first=20, settings=SETTINGS)


def test_a_tracker_that_returns_no_box_is_named() -> None:
    class Mute(ByShade):
        def update(self, frame: Any) -> Any:
            return "nothing"

    with pytest.raises(ValueError, match=r"update: expected four numbers.* frame 1, got 'nothing'"):
        track_and_return(
            Mute(), painted(moving(20)), np.array(moving(20)[0]), first=0, settings=SETTINGS
        )
