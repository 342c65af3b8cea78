from pathlib import Path

import numpy as np
import pytest
from frame_folders import frame_indices, numbered, write_frames
from numpy.testing import assert_allclose, assert_array_equal

from edgetrack.data.vot import read_vot
from edgetrack.errors import DataError

ROWS = ("3,4,10,8", "4.5,5,10,8", "6,7,10,8")


def write_sequence(root: Path, name: str, *rows: str, frames: str = "color") -> Path:
    write_frames(root / name / frames, numbered(len(rows or ROWS)))
    (root / name / "groundtruth.txt").write_text("\n".join(rows or ROWS) + "\n")
    return root / name


def bbox_of(root: Path, row: str) -> list[float]:
    """The box of a single region."""
    write_sequence(root, "a", row)
    (clip,) = read_vot(root)
    return clip.boxes_xywh[0].tolist()


def mask_row(mask: np.ndarray, x: int, y: int) -> str:
    """A mask as the toolkit writes it: rows one after the other, background first."""
    runs, value = [0], 0
    for pixel in mask.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    height, width = mask.shape
    return "m" + ",".join(str(number) for number in (x, y, width, height, *runs))


@pytest.mark.parametrize("frames", ["color", "."])
def test_boxes_are_as_written_with_frames_in_either_place(tmp_path: Path, frames: str) -> None:
    write_sequence(tmp_path, "ants1", frames=frames)

    (clip,) = read_vot(tmp_path)

    assert clip.name == "ants1"
    assert clip.boxes_xywh.dtype == np.float32
    assert_array_equal(clip.boxes_xywh, [[3, 4, 10, 8], [4.5, 5, 10, 8], [6, 7, 10, 8]])
    assert frame_indices(clip) == [0, 1, 2]


def test_the_box_of_an_upright_polygon_is_that_polygon(tmp_path: Path) -> None:
    assert bbox_of(tmp_path, "3,4,13,4,13,12,3,12") == [3, 4, 10, 8]


def test_the_box_of_a_turned_polygon_keeps_its_area_and_centre(tmp_path: Path) -> None:
    # a square with a diagonal of 10, on its corner: the box around it has twice its area
    x, y, w, h = bbox_of(tmp_path, "10,5,15,10,10,15,5,10")

    assert_allclose([w, h], np.sqrt(50), rtol=1e-6)
    assert_allclose([x + w / 2, y + h / 2], [10, 10], rtol=1e-6)


def test_the_box_of_a_polygon_does_not_depend_on_its_direction(tmp_path: Path) -> None:
    there, back = (
        bbox_of(tmp_path / name, row)
        for name, row in (("there", "2,1,9,3,8,9,1,6"), ("back", "1,6,8,9,9,3,2,1"))
    )

    assert there == back


@pytest.mark.parametrize("seed", range(8))
def test_the_box_of_a_mask_is_tight(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((7, 9), np.uint8)
    rows, columns = rng.integers(0, 7, 3), rng.integers(0, 9, 3)
    mask[rows, columns] = 1
    if seed % 2:
        mask[rows.min(), columns.min() :] = mask[rows.min() + 1 :, : columns.max()] = 1
    rows, columns = np.nonzero(mask)

    bbox = bbox_of(tmp_path, mask_row(mask, 20, 30))

    width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
    assert bbox == [20 + columns.min(), 30 + rows.min(), width, height]


@pytest.mark.parametrize(
    ("row", "bbox"),
    [
        ("m5,6,4,3,0,12", [5, 6, 4, 3]),
        ("m5,6,4,3,5,2", [6, 7, 2, 1]),  # the background after the last run may be left out
        ("m5,6,4,3,3,2", [5, 6, 4, 2]),  # a run across the end of a row reaches both sides
        ("m5,6,4,3,1,1,2,0,8", [6, 6, 1, 1]),  # a run of no pixels
    ],
)
def test_the_box_of_a_mask_in_runs(tmp_path: Path, row: str, bbox: list[float]) -> None:
    assert bbox_of(tmp_path, row) == bbox


@pytest.mark.parametrize(
    "row",
    ["nan,nan,nan,nan", "NaN," * 7 + "NaN", "0", "1", "0,0,0,0", "m0,0,0,0", "m2,3,4,5,20",
     "3,4,3,4,3,4,3,4", "1,1,2,2,3,3"],
)  # fmt: skip
def test_an_absent_object_is_nan(tmp_path: Path, row: str) -> None:
    assert np.isnan(bbox_of(tmp_path, row)).all()


def test_sequences_come_in_the_order_of_the_list(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_sequence(tmp_path, name)
    (tmp_path / "list.txt").write_text("c\na\n")

    for split in ("train", "test"):
        assert [clip.name for clip in read_vot(tmp_path, split=split)] == ["c", "a"]


def test_the_workspace_of_the_toolkit_is_read_too(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_sequence(tmp_path / "sequences", name)

    assert [clip.name for clip in read_vot(tmp_path)] == ["a", "b"]


def test_a_listed_sequence_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("ants1\n")

    with pytest.raises(DataError, match=r"ants1/groundtruth\.txt: expected .* no such file"):
        read_vot(tmp_path)


def test_a_frame_without_a_row_is_refused(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, "ants1")
    (folder / "color" / "00000001.jpg").unlink()

    with pytest.raises(DataError, match=r"ants1: .* 2 frames .* got 3 in .*groundtruth\.txt"):
        read_vot(tmp_path)


@pytest.mark.parametrize(
    "row",
    ["1,2,3", "1,2", "1,2,3,4,5", "1,2,3,4,5,6,7", "1,2,x,4", "", "1,2,inf,4", "m1,2,3",
     "m1,2,3,4,x", "m1,2,3,4,5,-1,2", "m1,2,3,4,13", "m1,2,-3,4,1"],
)  # fmt: skip
def test_a_malformed_row_is_named(tmp_path: Path, row: str) -> None:
    write_sequence(tmp_path, "ants1", "1,2,3,4", row, "1,2,3,4")

    with pytest.raises(DataError, match=r"ants1/groundtruth\.txt:2: expected a box"):
        read_vot(tmp_path)


def test_a_damaged_picture_is_named_when_it_is_used(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path, "ants1")
    (folder / "color" / "00000003.jpg").write_bytes(b"damaged")

    (clip,) = read_vot(tmp_path)

    with pytest.raises(DataError, match=r"00000003\.jpg: expected a picture"):
        clip.images[2]
