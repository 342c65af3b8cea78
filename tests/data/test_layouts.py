from pathlib import Path

import pytest
from frame_folders import frame_indices, write_frames

from edgetrack.data.layouts import FOLDER, LAYOUTS, parse_source, read_layout, read_layout_sequences
from edgetrack.errors import DataError


def test_the_names_of_the_layouts_are_sorted() -> None:
    assert LAYOUTS == ("coco", "got10k", "lasot", "otb", "trackingnet", "vot")


def test_a_layout_is_read_by_its_name(tmp_path: Path) -> None:
    write_frames(tmp_path / "TRAIN_3" / "frames" / "a", ["0.jpg", "1.jpg"])
    (tmp_path / "TRAIN_3" / "anno").mkdir()
    (tmp_path / "TRAIN_3" / "anno" / "a.txt").write_text("1,2,3,4\n5,6,7,8\n")
    calls: list[tuple[int, int]] = []

    (clip,) = read_layout(
        "trackingnet", tmp_path, on_progress=lambda done, total: calls.append((done, total))
    )

    assert clip.boxes_xywh.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert frame_indices(clip) == [0, 1]
    assert calls == [(1, 1)]


def test_a_split_is_read_as_sequences_from_the_first_box_on(tmp_path: Path) -> None:
    for split, boxes in (("train", "1,2,3,4"), ("val", "5,6,7,8")):
        write_frames(tmp_path / split / "a", ["00000001.jpg", "00000002.jpg", "00000003.jpg"])
        (tmp_path / split / "list.txt").write_text("a\n")
        (tmp_path / split / "a" / "groundtruth.txt").write_text(f"{boxes}\n" * 3)
        (tmp_path / split / "a" / "absence.label").write_text("1\n0\n0\n")

    (sequence,) = read_layout_sequences("got10k:val", tmp_path)

    assert sequence.boxes_xywh.tolist() == [[5, 6, 7, 8]] * 2
    assert [path.name for path in sequence.frame_paths] == ["00000002.jpg", "00000003.jpg"]


def test_still_pictures_are_no_sequences(tmp_path: Path) -> None:
    write_frames(tmp_path / "TRAIN_3" / "frames" / "a", ["0.jpg"])
    (tmp_path / "TRAIN_3" / "anno").mkdir()
    (tmp_path / "TRAIN_3" / "anno" / "a.txt").write_text("1,2,3,4\n")

    with pytest.raises(DataError, match="expected videos with boxes in the layout trackingnet"):
        read_layout_sequences("trackingnet", tmp_path)


@pytest.mark.parametrize("name", ["imagenet", "", FOLDER])
def test_an_unknown_layout_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"layout: expected coco, got10k, .* got"):
        read_layout(name, tmp_path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_split_that_a_layout_lacks_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: expected split .*train.*, got 'Train'; choose"):
        read_layout(f"{name}:Train", tmp_path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_root_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"absent: expected .* got no such folder; name the folder"):
        read_layout(name, tmp_path / "absent")


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_empty_root_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"expected .* got an empty folder; name the folder"):
        read_layout(name, tmp_path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_root_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes").mkdir()

    with pytest.raises(DataError, match=r"expected .* got none of them; name the folder"):
        read_layout(name, tmp_path)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("got10k=/datasets/GOT-10k", ("got10k", Path("/datasets/GOT-10k"))),
        ("got10k:val=/datasets/GOT-10k", ("got10k:val", Path("/datasets/GOT-10k"))),
        ("coco=a=b", ("coco", Path("a=b"))),
        ("data/train", (FOLDER, Path("data/train"))),
        ("./a=b", (FOLDER, Path("a=b"))),
        ("folder=a=b", (FOLDER, Path("a=b"))),
        ("vot=~/vot", ("vot", Path.home() / "vot")),
    ],
)
def test_a_source_is_a_layout_and_a_root_or_a_training_folder(
    text: str, source: tuple[str, Path]
) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize("text", ["got10=/datasets", "GOT10k=/datasets", "=/datasets", "coco=", ""])
def test_a_source_of_an_unknown_layout_or_without_a_root_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="source: expected a training folder or LAYOUT=ROOT"):
        parse_source(text)
