"""``data.pseudo_tracks``; pytest wants another name than that of the tests in ``train``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edgetrack.data.folder import folder_digest
from edgetrack.data.pseudo_tracks import (
    PseudoTrack,
    extract_frames,
    read_pseudo_tracks,
    read_unlabelled_clips,
    write_pseudo_tracks,
)
from edgetrack.data.synthetic import render_clip, write_clip
from edgetrack.errors import DataError, SourceError
from edgetrack.frames import image_paths, read_image

HEADER = {"format": 1, "bundle_digest": "0", "settings": {}, "date": "d", "data_digest": "1"}
ROW: dict[str, Any] = {
    "clip": "street",
    "first": 1,
    "boxes": [[1, 2, 10, 12], [2, 2, 10, 12.5]],
    "agreement": 0.9,
    "bundle": "tiny-0",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A training folder: street and yard without truth, lane with."""
    for name in ("street", "yard", "lane"):
        folder = tmp_path / "videos" / name / "img"
        folder.mkdir(parents=True)
        for index in range(4):
            image = np.full((60, 80, 3), 10 * index, np.uint8)
            assert cv2.imwrite(str(folder / f"{index:06d}.png"), image)
    (tmp_path / "videos" / "lane" / "groundtruth.txt").write_text("1,1,9,9\n" * 4)
    return tmp_path


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(path: Path, tracks: Any) -> None:
    write_pseudo_tracks(path, tracks, bundle_digest="ab", settings={"seed": 3}, data_digest="cd")


def test_tracks_are_read_as_they_were_written(root: Path) -> None:
    boxes = np.array([[1.25, 2, 10, 12], [2, 2.5, 10, 12]], np.float32)
    track = PseudoTrack(clip="yard", first=2, boxes_xywh=boxes, agreement=0.8, bundle="tiny-0")
    write(root / "tracks.jsonl", [track])

    (clip,) = read_pseudo_tracks(root / "tracks.jsonl", root)

    assert clip.name == "yard#0"
    assert_array_equal(clip.boxes_xywh, boxes)
    assert clip.boxes_xywh.dtype == np.float32
    assert [int(image[0, 0, 0]) for image in clip.images] == [20, 30]


def test_the_header_says_what_the_tracks_were_made_with(root: Path) -> None:
    write(root / "tracks.jsonl", [])

    (line,) = (root / "tracks.jsonl").read_text().splitlines()

    header = json.loads(line)
    assert header.pop("date")
    assert header == {
        "format": 1, "bundle_digest": "ab", "settings": {"seed": 3}, "data_digest": "cd",
    }  # fmt: skip
    assert read_pseudo_tracks(root / "tracks.jsonl", root) == ()


def test_tracks_of_one_video_share_images(root: Path) -> None:
    path = write_lines(root / "t.jsonl", HEADER, ROW, {**ROW, "first": 2}, {**ROW, "clip": "yard"})

    street, later, yard = read_pseudo_tracks(path, root)

    assert street.images[1] is later.images[0]
    assert street.images[0] is not yard.images[0]


def test_a_failure_while_writing_keeps_the_file_that_was_there(root: Path) -> None:
    path = root / "tracks.jsonl"
    path.write_text("before")

    def tracks() -> Iterator[PseudoTrack]:
        yield PseudoTrack(
            clip="a", first=0, boxes_xywh=np.ones((1, 4), np.float32), agreement=1, bundle="b"
        )
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, tracks())

    assert path.read_text() == "before"
    assert sorted(p.name for p in root.iterdir()) == ["tracks.jsonl", "videos"]


@pytest.mark.parametrize(
    ("row", "got"),
    [
        ([1, 2], "TypeError"),
        ({k: v for k, v in ROW.items() if k != "first"}, "KeyError"),
        ({**ROW, "boxes": [[1, 2, 3]]}, "ValueError"),
        ({**ROW, "boxes": []}, "ValueError"),
        ({**ROW, "boxes": [[1, 2, 0, 4]]}, "positive width"),
        ({**ROW, "boxes": [[1, 2, float("nan"), 4]]}, "finite"),
        ({**ROW, "boxes": [[1e300, 2, 3, 4]]}, "finite"),
        ({**ROW, "first": -1}, "0 or more"),
        ({**ROW, "agreement": "high"}, "ValueError"),
    ],
)
def test_a_malformed_line_is_named(root: Path, row: Any, got: str) -> None:
    path = write_lines(root / "t.jsonl", HEADER, ROW, row)

    with pytest.raises(DataError, match=rf"t\.jsonl:3: expected a track with .*{got}"):
        read_pseudo_tracks(path, root)


def test_a_line_that_is_no_json_is_named(root: Path) -> None:
    path = write_lines(root / "t.jsonl", HEADER, ROW)
    path.write_text(path.read_text()[:-9])

    with pytest.raises(DataError, match=r"t\.jsonl:2: expected a track"):
        read_pseudo_tracks(path, root)


@pytest.mark.parametrize("clip", ["alley", "../videos/street", "", "."])
def test_an_unknown_clip_is_named(root: Path, clip: str) -> None:
    path = write_lines(root / "t.jsonl", HEADER, ROW, {**ROW, "clip": clip})

    with pytest.raises(DataError, match=r"t\.jsonl:3: expected a clip in .*, got '"):
        read_pseudo_tracks(path, root)


def test_frames_that_a_clip_lacks_are_named(root: Path) -> None:
    path = write_lines(root / "t.jsonl", HEADER, {**ROW, "first": 3})

    with pytest.raises(DataError, match=r"t\.jsonl:2: expected frames below 4 .*, got 3 to 4"):
        read_pseudo_tracks(path, root)


@pytest.mark.parametrize("text", ["", "[]\n", '{"format": 2}\n', json.dumps(ROW), "no json"])
def test_a_file_without_the_header_is_refused(root: Path, text: str) -> None:
    (root / "t.jsonl").write_text(text)

    with pytest.raises(DataError, match=r"t\.jsonl:1: expected the header of pseudo-tracks"):
        read_pseudo_tracks(root / "t.jsonl", root)


def test_a_missing_file_is_named(root: Path) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl: expected pseudo-tracks, got: .*No such file"):
        read_pseudo_tracks(root / "t.jsonl", root)


def test_clips_with_truth_are_left_out(root: Path) -> None:
    clips = read_unlabelled_clips(root)

    assert [clip.name for clip in clips] == ["street", "yard"]
    assert [clip.name for clip in read_unlabelled_clips(root, "y*")] == ["yard"]


@pytest.mark.parametrize("pattern", ["lane", "alley"])
def test_a_folder_without_unlabelled_clips_is_refused(root: Path, pattern: str) -> None:
    with pytest.raises(DataError, match=f"without groundtruth.txt named '{pattern}', got 3 clips"):
        read_unlabelled_clips(root, pattern)


def test_the_frames_of_a_clip_are_a_sequence(root: Path) -> None:
    frames = read_unlabelled_clips(root)[0].frames()

    assert len(frames) == 4
    assert int(frames[-1][0, 0, 0]) == 30
    assert [int(frame[0, 0, 0]) for frame in frames[1:3]] == [10, 20]


def test_starts_are_the_sure_detections_the_surest_first(root: Path) -> None:
    row = {
        "img": "street/img/000002.png",
        "boxes": [[1, 1, 20, 20, 0.6, 0], [5, 5, 30, 30, 0.9, 2], [9, 9, 20, 20, 0.3, 0],
                  [9, 9, 4, 20, 0.9, 0]],
    }  # fmt: skip
    write_lines(root / "videos" / "boxes.jsonl", row)
    street, _ = read_unlabelled_clips(root)

    starts = street.start_boxes(2, street.frames()[2])

    assert_allclose(starts, [[5, 5, 30, 30], [1, 1, 20, 20]])
    assert street.start_boxes(0, street.frames()[0]).shape == (0, 4)


@pytest.mark.parametrize(("long_side_px", "shape"), [(48, (36, 48, 3)), (512, (72, 96, 3))])
def test_frames_are_extracted_at_a_size(
    tmp_path: Path, long_side_px: int, shape: tuple[int, ...]
) -> None:
    write_clip(tmp_path / "clip.mp4", render_clip(num_frames=3, width=96, height=72))

    extract_frames(tmp_path / "clip.mp4", tmp_path / "img", long_side_px=long_side_px)

    paths = image_paths(tmp_path / "img")
    assert [path.name for path in paths] == ["000001.jpg", "000002.jpg", "000003.jpg"]
    assert read_image(paths[2]).shape == shape


def test_a_file_that_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("no video")

    with pytest.raises(SourceError, match=r"clip\.mp4: expected"):
        extract_frames(tmp_path / "clip.mp4", tmp_path / "img", long_side_px=64)


def test_another_file_gives_another_digest(root: Path) -> None:
    before = folder_digest(root)

    (root / "more").write_text("")

    assert folder_digest(root) != before
    (root / "more").unlink()
    assert folder_digest(root) == before
