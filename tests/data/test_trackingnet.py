from pathlib import Path

import numpy as np
import pytest
from frame_folders import frame_indices, write_frames
from numpy.testing import assert_array_equal

from edgetrack.data.trackingnet import read_trackingnet
from edgetrack.errors import DataError


def write_sequence(root: Path, name: str, *, chunk: int = 0, num_frames: int = 12) -> Path:
    folder = root / f"TRAIN_{chunk}"
    write_frames(folder / "frames" / name, [f"{index}.jpg" for index in range(num_frames)])
    rows = [f"{index}.5,4.0,10.25,8.0" for index in range(num_frames)]
    (folder / "anno").mkdir(exist_ok=True)
    (folder / "anno" / f"{name}.txt").write_text("\n".join(rows))
    return folder


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write_sequence(tmp_path, "a")

    (clip,) = read_trackingnet(tmp_path)

    assert frame_indices(clip) == list(range(12))
    assert clip.boxes_xywh.dtype == np.float32
    assert_array_equal(clip.boxes_xywh, [[i + 0.5, 4, 10.25, 8] for i in range(12)])


def test_chunks_that_are_there_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for chunk, name in ((11, "a"), (2, "d"), (2, "c"), (0, "e")):
        write_sequence(tmp_path, name, chunk=chunk, num_frames=1)
    write_frames(tmp_path / "TEST" / "frames" / "z", ["0.jpg"])

    clips = read_trackingnet(tmp_path)

    assert [clip.name for clip in clips] == ["e", "c", "d", "a"]


def test_boxes_may_leave_the_frame_and_absent_ones_are_nan(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, "a", num_frames=3)
    (folder / "anno" / "a.txt").write_text("-5,-6,10,8\nNaN,NaN,NaN,NaN\n0,0,0,0\n")

    (clip,) = read_trackingnet(tmp_path)

    assert_array_equal(clip.boxes_xywh, [[-5, -6, 10, 8], [np.nan] * 4, [np.nan] * 4])


def test_a_frame_without_a_row_is_refused(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, "a")
    (folder / "frames" / "a" / "5.jpg").unlink()

    with pytest.raises(DataError, match=r"a: .* 11 frames in .*frames/a, got 12 in .*anno/a\.txt"):
        read_trackingnet(tmp_path)


def test_truth_without_frames_is_refused(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, "a")
    (folder / "anno" / "b.txt").write_text("1,2,3,4")

    with pytest.raises(DataError, match="frames/b: expected a folder of frames"):
        read_trackingnet(tmp_path)


def test_a_malformed_row_is_named(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, "a", num_frames=1)
    (folder / "anno" / "a.txt").write_text("1,2,3\n")

    with pytest.raises(DataError, match=r"a\.txt:1: expected four numbers x,y,w,h, got '1,2,3'"):
        read_trackingnet(tmp_path)


def test_the_test_set_is_no_split(tmp_path: Path) -> None:
    write_sequence(tmp_path, "a")

    with pytest.raises(DataError, match="expected split train, got 'test'"):
        read_trackingnet(tmp_path, split="test")


def test_a_damaged_picture_is_named_when_it_is_used(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, "a")
    (folder / "frames" / "a" / "10.jpg").write_bytes(b"damaged")

    (clip,) = read_trackingnet(tmp_path)

    with pytest.raises(DataError, match=r"a/10\.jpg: expected a picture"):
        clip.images[10]
