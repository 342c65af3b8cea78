from pathlib import Path

import numpy as np
import pytest
from frame_folders import frame_indices, numbered, write_frames
from numpy.testing import assert_array_equal

from edgetrack.data.got10k import read_got10k
from edgetrack.errors import DataError

ROWS = "3.0000,4.0000,10.0000,8.0000\n4.5,5,10,8\n5,6,0,8\n6,7,10,8\n"
NAN = [np.nan] * 4


def write_sequence(root: Path, name: str, *, rows: str = ROWS, split: str = "train") -> Path:
    folder = root / split / name
    write_frames(folder, numbered(4))
    (folder / "groundtruth.txt").write_text(rows)
    (folder / "absence.label").write_text("0\n0\n0\n1\n")
    (folder / "cover.label").write_text("8\n0\n8\n8\n")
    (folder / "cut_by_image.label").write_text("1\n1\n1\n1\n")
    (folder / "meta_info.ini").write_text("[METAINFO]\nobject_class: car\n")
    with (root / split / "list.txt").open("a") as file:
        file.write(f"{name}\n")
    return folder


def names(root: Path, **options: object) -> list[str]:
    return [clip.name for clip in read_got10k(root, **options)]


def test_boxes_are_as_written_and_nan_where_hidden_absent_or_without_area(tmp_path: Path) -> None:
    write_sequence(tmp_path, "GOT-10k_Train_000001")

    (clip,) = read_got10k(tmp_path)

    assert clip.name == "GOT-10k_Train_000001"
    assert clip.boxes_xywh.dtype == np.float32
    assert_array_equal(clip.boxes_xywh, [[3, 4, 10, 8], NAN, NAN, NAN])
    assert frame_indices(clip) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("label", "row"), [("absence.label", [6, 7, 10, 8]), ("cover.label", [4.5, 5, 10, 8])]
)
def test_each_label_hides_its_own_frames_and_may_be_missing(
    tmp_path: Path, label: str, row: list[float]
) -> None:
    folder = write_sequence(tmp_path, "a")
    (folder / label).unlink()

    (clip,) = read_got10k(tmp_path)

    assert np.isfinite(clip.boxes_xywh).all(1).sum() == 2
    assert row in clip.boxes_xywh.tolist()


def test_sequences_come_in_the_order_of_the_list(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        write_sequence(tmp_path, name)
    (tmp_path / "train" / "unlisted").mkdir()

    assert names(tmp_path) == ["b", "c", "a"]


def test_the_validation_split_has_a_folder_of_its_own(tmp_path: Path) -> None:
    write_sequence(tmp_path, "t")
    write_sequence(tmp_path, "v", split="val")

    assert names(tmp_path, split="val") == ["v"]


def test_vottrain_keeps_the_positions_of_the_published_list(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_sequence(tmp_path, name)
    (tmp_path / "got10k_vot_train_split.txt").write_text("2\n0\n")
    (tmp_path / "mine.txt").write_text("1")

    assert names(tmp_path, split="vottrain") == ["c", "a"]
    assert names(tmp_path, split="vottrain", index_list=tmp_path / "mine.txt") == ["b"]
    assert names(tmp_path) == ["a", "b", "c"]


def test_vottrain_without_its_list_says_where_to_put_it(tmp_path: Path) -> None:
    write_sequence(tmp_path, "a")

    with pytest.raises(DataError, match=r"got10k_vot_train_split\.txt.*put .* PyTracking there"):
        read_got10k(tmp_path, split="vottrain")


@pytest.mark.parametrize("line", ["1", "-1", "GOT-10k_Train_000001", "0.5"])
def test_a_position_outside_the_list_is_refused(tmp_path: Path, line: str) -> None:
    write_sequence(tmp_path, "a")
    (tmp_path / "positions.txt").write_text(line)

    with pytest.raises(DataError, match="expected positions from 0 to 0"):
        read_got10k(tmp_path, index_list=tmp_path / "positions.txt")


def test_progress_counts_sequences(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_sequence(tmp_path, name)
    calls: list[tuple[int, int]] = []

    read_got10k(tmp_path, on_progress=lambda done, total: calls.append((done, total)))

    assert calls == [(1, 2), (2, 2)]


def test_a_frame_without_a_row_is_refused(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, "GOT-10k_Train_000007")
    (folder / "00000004.jpg").unlink()

    with pytest.raises(
        DataError, match=r"GOT-10k_Train_000007: .* 3 frames .* got 4 .*groundtruth\.txt; unpack"
    ):
        read_got10k(tmp_path)


@pytest.mark.parametrize("row", ["3,4,10", "3,4,10,8,1", "3,4,ten,8", "", "3,4,inf,8"])
def test_a_malformed_row_is_named(tmp_path: Path, row: str) -> None:
    write_sequence(tmp_path, "a", rows=f"3,4,10,8\n{row}\n3,4,10,8\n3,4,10,8\n")

    with pytest.raises(DataError, match=r"groundtruth\.txt:2: expected four numbers"):
        read_got10k(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("0\n1\n", "4 frames, got 2"), ("x", "got: could")])
def test_a_malformed_label_is_named(tmp_path: Path, text: str, message: str) -> None:
    folder = write_sequence(tmp_path, "a")
    (folder / "absence.label").write_text(text)

    with pytest.raises(DataError, match=rf"absence\.label: .*{message}"):
        read_got10k(tmp_path)


def test_a_listed_sequence_that_is_missing_is_named(tmp_path: Path) -> None:
    write_sequence(tmp_path, "a")
    with (tmp_path / "train" / "list.txt").open("a") as file:
        file.write("b\n")

    with pytest.raises(DataError, match=r"b: expected the sequence that .*list\.txt names"):
        read_got10k(tmp_path)


@pytest.mark.parametrize("missing", ["list.txt", "a/groundtruth.txt"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    write_sequence(tmp_path, "a")
    (tmp_path / "train" / missing).unlink()

    with pytest.raises(DataError, match=rf"{missing}: expected .* got no such file; unpack"):
        read_got10k(tmp_path)


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    write_sequence(tmp_path, "a")
    (tmp_path / "train" / "list.txt").write_text("\n")

    with pytest.raises(DataError, match="expected names of sequences, got none"):
        read_got10k(tmp_path)


def test_a_damaged_picture_is_named_when_it_is_used(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, "a")
    (folder / "00000002.jpg").write_bytes(b"")

    (clip,) = read_got10k(tmp_path)

    with pytest.raises(DataError, match=r"00000002\.jpg: expected a picture"):
        clip.images[1]
