from pathlib import Path

import cv2
import numpy as np
import pytest

from edgetrack.data.synthetic import render_clip, write_clip
from edgetrack.data.target_clips import read_target_clips, render_target_clips
from edgetrack.errors import DataError, SourceError

BOX = (100.0, 80.0, 40.0, 40.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video, the same frames as pictures, and two labelled sequences."""
    folder = tmp_path_factory.mktemp("home")
    truth = write_clip(folder / "car.mp4", render_clip(num_frames=6, width=160, height=120))
    for images in ("pictures", "sequences/one/img", "sequences/two/img"):
        (folder / images).mkdir(parents=True)
        for index, (frame, _) in enumerate(render_clip(num_frames=6, width=160, height=120)):
            cv2.imwrite(str(folder / images / f"{index:03d}.png"), frame)
    for name in ("one", "two"):
        np.savetxt(folder / "sequences" / name / "groundtruth.txt", truth, "%.3f", ",")
    return folder


@pytest.mark.parametrize("name", ["car.mp4", "pictures"])
def test_a_video_or_pictures_with_a_box_are_one_clip(home: Path, name: str) -> None:
    (clip,) = read_target_clips([str(home / name)], bbox=BOX, limit=4)

    assert (clip.name, clip.bbox) == (Path(name).stem, BOX)
    assert [frame.shape for frame in clip.frames()] == [(120, 160, 3)] * 4
    assert len(list(clip.frames())) == 4, "frames are read anew"


def test_labelled_sequences_are_a_clip_each_and_bring_their_box(home: Path) -> None:
    clips = read_target_clips([str(home / "sequences")], limit=3)

    truth = np.loadtxt(home / "sequences" / "one" / "groundtruth.txt", delimiter=",")
    assert [clip.name for clip in clips] == ["one", "two"]
    assert clips[0].bbox == pytest.approx(truth[0])
    assert len(list(clips[0].frames())) == 3


@pytest.mark.parametrize("name", ["car.mp4", "pictures"])
def test_a_video_or_pictures_without_a_box_are_refused(home: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: expected the target's box .*--bbox x,y,w,h"):
        read_target_clips([str(home / name)])


def test_a_source_that_is_missing_is_named(home: Path) -> None:
    with pytest.raises(DataError, match="none: expected folders"):
        read_target_clips([str(home / "none")])
    (clip,) = read_target_clips([str(home / "none.mp4")], bbox=BOX)
    with pytest.raises(SourceError, match=r"none\.mp4"):
        list(clip.frames())


def test_the_first_box_of_a_truth_file_beside_is_used(home: Path, tmp_path: Path) -> None:
    truth = (home / "sequences" / "one" / "groundtruth.txt").read_text()
    (tmp_path / "car.mp4").write_bytes((home / "car.mp4").read_bytes())
    (tmp_path / "car.txt").write_text(truth)
    (tmp_path / "pictures").mkdir()
    for picture in (home / "pictures").iterdir():
        (tmp_path / "pictures" / picture.name).write_bytes(picture.read_bytes())
    for folder in (tmp_path, tmp_path / "pictures"):
        (folder / "groundtruth.txt").write_text(truth)
    names = [f"pictures/{index:03d}.png" for index in (0, 2, 4)]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
    sources = [tmp_path / name for name in ("car.mp4", "pictures", "list.txt")]
    sources.append(home / "sequences" / "one" / "img")

    clips = read_target_clips([str(source) for source in sources])

    box = [float(field) for field in truth.splitlines()[0].split(",")]
    assert [clip.name for clip in clips] == ["car", "pictures", "list", "one"]
    assert [len(list(clip.frames())) for clip in clips] == [6, 6, 3, 6]
    for clip in clips:
        assert clip.bbox == pytest.approx(box)


def test_one_labelled_sequence_may_be_named(home: Path) -> None:
    (clip,) = read_target_clips([str(home / "sequences" / "two")])

    assert clip.name == "two"


def test_one_box_is_not_for_two_sources(home: Path) -> None:
    with pytest.raises(DataError, match=r"expected the target's box .*, got one for .* and for "):
        read_target_clips([str(home / "car.mp4"), str(home / "pictures")], bbox=BOX)


@pytest.mark.parametrize(
    ("truth", "got"), [("", "no row"), ("nan,nan,nan,nan\n1,2,3,4\n", "an absent target")]
)
def test_truth_without_a_first_box_is_refused(
    home: Path, tmp_path: Path, truth: str, got: str
) -> None:
    (tmp_path / "car.mp4").write_bytes((home / "car.mp4").read_bytes())
    (tmp_path / "car.txt").write_text(truth)

    with pytest.raises(DataError, match=rf"car\.txt: expected a box in line 1, got {got}"):
        read_target_clips([str(tmp_path / "car.mp4")])


def test_rendered_clips_differ_and_are_the_same_again() -> None:
    first = render_target_clips(num_clips=3, num_frames=2, first_seed=5)
    again = render_target_clips(num_clips=1, num_frames=2, first_seed=6)

    frames = [list(clip.frames()) for clip in first]
    assert len({clip.bbox for clip in first}) == 3
    assert first[1].bbox == again[0].bbox
    assert np.array_equal(frames[1], list(again[0].frames()))
    assert len({frame.shape for clip in frames for frame in clip}) > 1
