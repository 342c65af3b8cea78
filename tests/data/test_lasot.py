from pathlib import Path

import numpy as np
import pytest
from frame_folders import frame_indices, numbered, write_frames
from numpy.testing import assert_array_equal

from edgetrack.data.lasot import read_lasot
from edgetrack.errors import DataError

ROWS = "3,4,10,8\n4,5,10,8\n1,1,-1,-1\n6,7,10,8\n"
NAN = [np.nan] * 4


def write_sequence(root: Path, name: str, *, is_nested: bool = True, rows: str = ROWS) -> Path:
    folder = (root / name.rpartition("-")[0] if is_nested else root) / name
    write_frames(folder / "img", numbered(4))
    (folder / "groundtruth.txt").write_text(rows)
    (folder / "full_occlusion.txt").write_text("0,1,0,0\n")
    (folder / "out_of_view.txt").write_text("0,0,0,1\n")
    (folder / "nlp.txt").write_text("a car")
    return folder


def write_list(root: Path, name: str, *names: str) -> None:
    (root / name).write_text("".join(f"{n}\n" for n in names))


def names(root: Path, split: str = "train") -> list[str]:
    return [clip.name for clip in read_lasot(root, split=split)]


@pytest.mark.parametrize("is_nested", [True, False])
def test_boxes_count_from_0_and_are_nan_where_hidden_or_out_of_view(
    tmp_path: Path, is_nested: bool
) -> None:
    write_sequence(tmp_path, "car-1", is_nested=is_nested)
    write_list(tmp_path, "training_set.txt", "car-1")

    (clip,) = read_lasot(tmp_path)

    assert clip.name == "car-1"
    assert clip.boxes_xywh.dtype == np.float32
    assert_array_equal(clip.boxes_xywh, [[2, 3, 10, 8], NAN, NAN, NAN])
    assert frame_indices(clip) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("label", "row"), [("full_occlusion.txt", [3, 4, 10, 8]), ("out_of_view.txt", [5, 6, 10, 8])]
)
def test_each_label_hides_its_own_frames_and_may_be_missing(
    tmp_path: Path, label: str, row: list[float]
) -> None:
    (write_sequence(tmp_path, "car-1") / label).unlink()
    write_list(tmp_path, "training_set.txt", "car-1")

    (clip,) = read_lasot(tmp_path)

    assert np.isfinite(clip.boxes_xywh).all(1).sum() == 2
    assert row in clip.boxes_xywh.tolist()


def test_sequences_are_sorted_by_category_and_number(tmp_path: Path) -> None:
    for name in ("car-10", "car-2", "airplane-3", "swing-1"):
        write_sequence(tmp_path, name)
    write_list(tmp_path, "testing_set.txt", "swing-1")

    assert names(tmp_path) == ["airplane-3", "car-2", "car-10"]


@pytest.mark.parametrize("lists", [{"training_set.txt": ["car-2", "dog-9"]},
                                   {"testing_set.txt": ["car-1", "car-3", "dog-8"]},
                                   {"training_set.txt": ["car-2"],
                                    "testing_set.txt": ["car-1", "car-3"]}])  # fmt: skip
def test_one_list_or_both_divide_the_sequences(tmp_path: Path, lists: dict[str, list[str]]) -> None:
    for name in ("car-1", "car-2", "car-3"):
        write_sequence(tmp_path, name)
    for file_name, listed in lists.items():
        write_list(tmp_path, file_name, *listed)

    assert names(tmp_path, "train") == ["car-2"]
    assert names(tmp_path, "test") == ["car-1", "car-3"]


def test_without_a_list_nothing_is_read_for_training(tmp_path: Path) -> None:
    write_sequence(tmp_path, "car-1")

    with pytest.raises(DataError, match=r"training_set\.txt or testing_set\.txt, got neither; put"):
        read_lasot(tmp_path)


def test_an_empty_list_of_test_sequences_allows_all(tmp_path: Path) -> None:
    write_sequence(tmp_path, "car-1")
    write_list(tmp_path, "testing_set.txt")

    assert names(tmp_path) == ["car-1"]


def test_a_split_without_sequences_is_refused(tmp_path: Path) -> None:
    write_sequence(tmp_path, "car-1")
    write_list(tmp_path, "training_set.txt", "dog-1")

    with pytest.raises(DataError, match="sequences of split train, got none among 1 folders"):
        read_lasot(tmp_path)


def test_a_frame_without_a_row_is_refused(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, "car-1")
    write_list(tmp_path, "testing_set.txt")
    write_frames(folder / "img", ["00000005.jpg"])

    with pytest.raises(DataError, match=r"car-1: .* 5 frames .* got 4 in .*groundtruth\.txt"):
        read_lasot(tmp_path)


def test_a_malformed_row_is_named(tmp_path: Path) -> None:
    write_sequence(tmp_path, "car-1", rows="1,2,3,4\n1;2;3;4\n")
    write_list(tmp_path, "testing_set.txt")

    with pytest.raises(DataError, match=r"car-1/groundtruth\.txt:2: expected four numbers"):
        read_lasot(tmp_path)


def test_a_label_of_another_length_is_named(tmp_path: Path) -> None:
    (write_sequence(tmp_path, "car-1") / "out_of_view.txt").write_text("0,0,0")
    write_list(tmp_path, "testing_set.txt")

    with pytest.raises(DataError, match=r"out_of_view\.txt: .* 4 frames, got 3"):
        read_lasot(tmp_path)


def test_a_damaged_picture_is_named_when_it_is_used(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, "car-1")
    write_list(tmp_path, "testing_set.txt")
    (folder / "img" / "00000003.jpg").write_bytes(b"damaged")

    (clip,) = read_lasot(tmp_path)

    with pytest.raises(DataError, match=r"00000003\.jpg: expected a picture"):
        clip.images[2]
