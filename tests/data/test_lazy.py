import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from frame_folders import GREY_STEP, numbered, write_frames

from edgetrack.data.lazy import LazyImages, list_frames
from edgetrack.errors import DataError


def grey_of(image: np.ndarray) -> int:
    assert image.shape == (24, 32, 3)
    assert image.dtype == np.uint8
    return round(float(image.mean()) / GREY_STEP)


def test_items_are_decoded_from_either_end(tmp_path: Path) -> None:
    write_frames(tmp_path, numbered(4))

    images = LazyImages(tmp_path, numbered(4))

    assert [grey_of(images[index]) for index in (0, 3, -1, -4)] == [0, 3, 3, 0]
    assert [grey_of(image) for image in images] == [0, 1, 2, 3]
    assert grey_of(images[np.int64(2)]) == 2


def test_a_slice_is_lazy_and_decodes_its_own_pictures(tmp_path: Path) -> None:
    write_frames(tmp_path, numbered(5))
    images = LazyImages(tmp_path, numbered(5))

    part = images[1::2]

    assert isinstance(part, LazyImages)
    assert [grey_of(image) for image in part] == [1, 3]
    assert len(images) == 5


def test_length_names_and_slices_need_no_disk() -> None:
    images = LazyImages("/nowhere", ["a/1.jpg", "é.jpg"])

    assert len(images) == 2
    assert len(images[:1]) == 1
    assert [images.path(0), images.path(1)] == [Path("/nowhere/a/1.jpg"), Path("/nowhere/é.jpg")]


@pytest.mark.parametrize("index", [2, -3])
def test_an_index_past_the_end_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError):
        LazyImages("/nowhere", ["1.jpg", "2.jpg"])[index]


def test_colours_are_bgr(tmp_path: Path) -> None:
    assert cv2.imwrite(str(tmp_path / "1.jpg"), np.full((24, 32, 3), (250, 0, 0), np.uint8))

    image = LazyImages(tmp_path, ["1.jpg"])[0]

    assert np.abs(image.astype(int) - [250, 0, 0]).max() < 10


def test_pixels_stay_where_labels_count_them_whatever_the_camera_noted(tmp_path: Path) -> None:
    write_frames(tmp_path, ["1.jpg"])
    plain = (tmp_path / "1.jpg").read_bytes()
    sideways = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    note = b"\xff\xe1" + (len(sideways) + 2).to_bytes(2, "big") + sideways
    (tmp_path / "1.jpg").write_bytes(plain[:2] + note + plain[2:])
    assert cv2.imread(str(tmp_path / "1.jpg")).shape == (32, 24, 3)

    image = LazyImages(tmp_path, ["1.jpg"])[0]

    assert image.shape == (24, 32, 3)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "2.jpg").write_bytes(b"not a picture")
    images = LazyImages(tmp_path, ["2.jpg"])

    with pytest.raises(DataError, match=r"2\.jpg: expected a picture, got a file that does not"):
        images[0]


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2\.jpg: expected a picture, got no such file"):
        LazyImages(tmp_path, ["2.jpg"])[0]


def test_a_copy_for_another_process_reads_the_same(tmp_path: Path) -> None:
    write_frames(tmp_path, numbered(3))

    copy = pickle.loads(pickle.dumps(list_frames(tmp_path)))

    assert [grey_of(image) for image in copy] == [0, 1, 2]


def test_names_take_few_bytes() -> None:
    images = LazyImages("/nowhere", numbered(100_000))

    assert len(pickle.dumps(images)) < 13 * 100_000


def test_frames_are_listed_by_number_and_other_files_passed_over(tmp_path: Path) -> None:
    write_frames(tmp_path, [f"{number}.jpg" for number in range(12)])
    for other in ("groundtruth.txt", ".jpg", "._3.jpg", "Thumbs.db"):
        (tmp_path / other).write_text("")

    frames = list_frames(tmp_path)

    assert [grey_of(image) for image in frames] == list(range(12))


def test_a_picture_without_a_number_is_refused(tmp_path: Path) -> None:
    write_frames(tmp_path, ["1.jpg", "preview.jpg"])

    with pytest.raises(DataError, match=r"named by their number.*preview"):
        list_frames(tmp_path)


def test_a_missing_folder_of_frames_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="img: expected a folder of frames"):
        list_frames(tmp_path / "img")
