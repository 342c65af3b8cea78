from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from edgetrack.data.sequences import read_sequence, read_sequences
from edgetrack.errors import DataError, SourceError

ROWS = "1,2,3,4\n5.5,6,7,8\nNaN,NaN,NaN,NaN\n"


def write_sequence(root: Path, name: str = "car", *, rows: str = ROWS, num_frames: int = 3) -> Path:
    folder = root / name
    (folder / "img").mkdir(parents=True)
    for index in range(num_frames):
        frame = np.full((6, 8, 3), index * 20, np.uint8)
        assert cv2.imwrite(str(folder / "img" / f"{index + 1:06d}.png"), frame)
    (folder / "groundtruth.txt").write_text(rows)
    return folder


def test_a_sequence_holds_frames_and_truth_in_order(tmp_path: Path) -> None:
    sequence = read_sequence(write_sequence(tmp_path))

    assert sequence.name == "car"
    assert [p.name for p in sequence.frame_paths] == ["000001.png", "000002.png", "000003.png"]
    assert [int(f[0, 0, 0]) for f in sequence.frames()] == [0, 20, 40]
    assert sequence.boxes_xywh.dtype == np.float64
    assert_array_equal(sequence.boxes_xywh, [[1, 2, 3, 4], [5.5, 6, 7, 8], [np.nan] * 4])


def test_backwards_starts_at_the_last_frame_that_shows_the_target(tmp_path: Path) -> None:
    sequence = read_sequence(write_sequence(tmp_path)).backwards()

    assert [int(f[0, 0, 0]) for f in sequence.frames()] == [20, 0]
    assert_array_equal(sequence.boxes_xywh, [[5.5, 6, 7, 8], [1, 2, 3, 4]])


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        "1 2 3 4\n5.5 6 7 8\nnan nan nan nan",
        "1\t2\t3\t4\r\n5.5\t6\t7\t8\r\nNaN\tNaN\tNaN\tNaN\r\n",
        "1, 2, 3, 4\n5.5, 6, 7, 8\nNaN, NaN, NaN, NaN\n\n \n",
        "\ufeff1,2,3,4\n5.5,6,7,8\n0,0,0,0\n",
        "1,2,3,4\n5.5,6,7,8\nNaN,NaN,3,4\n",
    ],
    ids=["commas", "spaces", "tabs", "mixed", "byte-order mark and zeros", "half a row"],
)
def test_rows_are_read_however_they_are_separated(tmp_path: Path, rows: str) -> None:
    sequence = read_sequence(write_sequence(tmp_path, rows=rows))

    assert_array_equal(sequence.boxes_xywh, [[1, 2, 3, 4], [5.5, 6, 7, 8], [np.nan] * 4])


def test_sequences_come_sorted_by_name(tmp_path: Path) -> None:
    for name in ("dog", "bird", "car"):
        write_sequence(tmp_path, name)
    (tmp_path / "README.md").write_text("not a sequence")
    (tmp_path / "notes").mkdir()

    assert [s.name for s in read_sequences(tmp_path)] == ["bird", "car", "dog"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1,2,3,4\n5,6,7\n1,2,3,4\n", r"groundtruth\.txt:2: expected four numbers .* '5,6,7'"),
        ("1,2,3,4\n5,6,7,8,9\n1,2,3,4\n", r"groundtruth\.txt:2: expected four numbers"),
        ("1,2,3,4\n\n1,2,3,4\n", r"groundtruth\.txt:2: expected four numbers .* ''"),
        ("1,2,3,4\n5,6,7,x\n1,2,3,4\n", r"groundtruth\.txt:2: expected four numbers"),
        ("1,2,3,4\n5,6,inf,8\n1,2,3,4\n", r"groundtruth\.txt:2: expected four numbers"),
        ("1,2,3,4\n5,6,7,8\n1,2,3,-4\n", r"groundtruth\.txt:3: .* got 3 x -4"),
        ("1,2,3,4\n5,6,0,8\n1,2,3,4\n", r"groundtruth\.txt:2: expected a positive width"),
        ("1,2,3,4\n5,6,7,8\n", r"groundtruth\.txt: .* each of the 3 pictures in img/, got 2"),
        ("", r"groundtruth\.txt: .* each of the 3 pictures in img/, got 0"),
        ("NaN,NaN,NaN,NaN\n1,2,3,4\n1,2,3,4\n", r"groundtruth\.txt: .* absent target in line 1"),
    ],
)
def test_a_malformed_truth_is_named_with_its_line(tmp_path: Path, rows: str, message: str) -> None:
    write_sequence(tmp_path, rows=rows)

    with pytest.raises(DataError, match=message):
        read_sequences(tmp_path)


def test_a_single_frame_is_no_sequence(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, rows="1,2,3,4\n", num_frames=1)

    with pytest.raises(DataError, match=r"at least two rows.* got 1 rows"):
        read_sequence(folder)


def test_missing_truth_and_missing_pictures_are_named(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, num_frames=0)
    (folder / "img").rmdir()
    with pytest.raises(DataError, match="each of the 0 pictures in img/, got 3"):
        read_sequences(tmp_path)

    (folder / "img").mkdir()
    (folder / "groundtruth.txt").unlink()
    with pytest.raises(DataError, match=r"groundtruth\.txt: expected rows x,y,w,h"):
        read_sequences(tmp_path)


def test_a_folder_without_sequences_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got none; name the folder above"):
        read_sequences(tmp_path)
    with pytest.raises(DataError, match=r"got no such folder"):
        read_sequences(tmp_path / "none")


def test_an_unreadable_picture_is_named_when_it_is_reached(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path)
    (folder / "img" / "000002.png").write_bytes(b"no picture")
    frames = read_sequence(folder).frames()
    next(frames)

    with pytest.raises(SourceError, match=r"000002\.png"):
        next(frames)


@pytest.mark.data
def test_the_research_pack_can_be_read(data_pack: Path) -> None:
    sequences = read_sequences(data_pack / "eval")

    assert len(sequences) == 16
    absent = {s.name: int(np.isnan(s.boxes_xywh).any(1).sum()) for s in sequences}
    assert {name: n for name, n in absent.items() if n} == {"tld_pedestrian2": 72}
