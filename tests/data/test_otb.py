from pathlib import Path

import numpy as np
import pytest
from frame_folders import frame_indices, numbered, write_frames
from numpy.testing import assert_array_equal

from edgetrack.data.otb import read_otb
from edgetrack.errors import DataError

ROWS = "3,4,10,8\n4,5,10,8\n6,7,10,8\n"


def write_sequence(
    root: Path, name: str, *, rows: str = ROWS, first: int = 1, num_frames: int = 3
) -> Path:
    write_frames(root / name / "img", numbered(num_frames, first=first, digits=4))
    (root / name / "groundtruth_rect.txt").write_text(rows)
    return root / name


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        ROWS.replace(",", "\t"),
        ROWS.replace(",", " "),
        "3\t4\t10\t8\r\n4 5 10 8\r\n6, 7,10, 8\r\n\r\n",
    ],
)
def test_boxes_count_from_0_whatever_separates_them(tmp_path: Path, rows: str) -> None:
    write_sequence(tmp_path, "Basketball", rows=rows)

    (clip,) = read_otb(tmp_path)

    assert clip.name == "Basketball"
    assert clip.boxes_xywh.dtype == np.float32
    assert_array_equal(clip.boxes_xywh, [[2, 3, 10, 8], [3, 4, 10, 8], [5, 6, 10, 8]])
    assert frame_indices(clip) == [0, 1, 2]


def test_a_row_of_zeros_is_an_absent_object(tmp_path: Path) -> None:
    write_sequence(tmp_path, "Board", rows="3,4,10,8\n0,0,0,0\nNaN,NaN,NaN,NaN\n")

    (clip,) = read_otb(tmp_path)

    assert_array_equal(clip.boxes_xywh, [[2, 3, 10, 8], [np.nan] * 4, [np.nan] * 4])


@pytest.mark.parametrize(
    ("name", "first", "last", "num_frames"),
    [
        ("David", 300, 770, 771),
        ("Diving", 1, 215, 231),
        ("football1", 1, 74, 81),
        ("Freeman3", 1, 460, 474),
        ("Freeman4", 1, 283, 297),
    ],
)
def test_sequences_with_truth_for_a_part_have_the_frames_of_that_part(
    tmp_path: Path, name: str, first: int, last: int, num_frames: int
) -> None:
    (tmp_path / name / "img").mkdir(parents=True)
    for file_name in numbered(num_frames, digits=4):
        (tmp_path / name / "img" / file_name).touch()
    rows = "3,4,10,8\n" * (last - first + 1)
    (tmp_path / name / "groundtruth_rect.txt").write_text(rows)

    (clip,) = read_otb(tmp_path)

    assert len(clip.images) == len(clip.boxes_xywh) == last - first + 1
    assert [clip.images.path(index).stem for index in (0, -1)] == [f"{first:04d}", f"{last:04d}"]


def test_a_part_that_was_cut_out_already_is_taken_whole(tmp_path: Path) -> None:
    write_sequence(tmp_path, "David", first=300)

    (clip,) = read_otb(tmp_path)

    assert frame_indices(clip) == [0, 1, 2]


def test_two_truth_files_are_two_clips_of_the_same_frames(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, "Jogging")
    (folder / "groundtruth_rect.txt").rename(folder / "groundtruth_rect.1.txt")
    (folder / "groundtruth_rect.2.txt").write_text("11,12,5,6\n" * 3)

    first, second = read_otb(tmp_path)

    assert [first.name, second.name] == ["Jogging.1", "Jogging.2"]
    assert first.boxes_xywh[0].tolist() == [2, 3, 10, 8]
    assert second.boxes_xywh[0].tolist() == [10, 11, 5, 6]
    assert first.images is second.images


def test_an_empty_second_truth_file_is_passed_over(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, "Human4")
    (folder / "groundtruth_rect.txt").rename(folder / "groundtruth_rect.2.txt")
    (folder / "groundtruth_rect.1.txt").write_text("")

    (clip,) = read_otb(tmp_path)

    assert clip.name == "Human4"


def test_sequences_are_sorted_and_train_and_test_are_the_same(tmp_path: Path) -> None:
    for name in ("Woman", "Basketball"):
        write_sequence(tmp_path, name)

    for split in ("train", "test"):
        assert [c.name for c in read_otb(tmp_path, split=split)] == ["Basketball", "Woman"]


def test_a_frame_without_a_row_is_refused(tmp_path: Path) -> None:
    write_sequence(tmp_path, "Car4", num_frames=4)

    with pytest.raises(DataError, match=r"Car4: .* 4 frames .* got 3 in .*groundtruth_rect\.txt"):
        read_otb(tmp_path)


def test_empty_truth_is_refused(tmp_path: Path) -> None:
    write_sequence(tmp_path, "Car4", rows="")

    with pytest.raises(DataError, match=r"Car4: .* 3 frames .* got 0"):
        read_otb(tmp_path)


def test_a_malformed_row_is_named(tmp_path: Path) -> None:
    write_sequence(tmp_path, "Car4", rows="1,2,3,4\n1,2,3,4,5\n")

    with pytest.raises(DataError, match=r"Car4/groundtruth_rect\.txt:2: expected four numbers"):
        read_otb(tmp_path)


def test_a_damaged_picture_is_named_when_it_is_used(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, "Car4")
    (folder / "img" / "0002.jpg").write_bytes(b"damaged")

    (clip,) = read_otb(tmp_path)

    with pytest.raises(DataError, match=r"0002\.jpg: expected a picture"):
        clip.images[1]
