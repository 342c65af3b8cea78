import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from frame_folders import frame_indices, write_frames
from numpy.testing import assert_array_equal

from edgetrack.data import coco
from edgetrack.data.coco import read_coco
from edgetrack.errors import DataError

PICTURES = {9: "000000000009.jpg", 25: "000000000025.jpg"}


def labelled(object_id: int, picture_id: int, *bbox: float, iscrowd: int = 0) -> dict[str, Any]:
    return {
        "segmentation": [[1.5, 2.5, 3.5, 4.5, 5.5, 6.5]],
        "area": 80.0,
        "iscrowd": iscrowd,
        "image_id": picture_id,
        "bbox": list(bbox) or [3.25, 4.5, 12, 11],
        "category_id": 18,
        "id": object_id,
    }


def write_set(
    root: Path, *objects: dict[str, Any], split: str = "train", pictures: str = ""
) -> Path:
    write_frames(root / pictures / f"{split}2017", PICTURES.values())
    path = root / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(exist_ok=True)
    images = [
        {"license": 3, "file_name": name, "height": 24, "width": 32, "id": picture_id}
        for picture_id, name in PICTURES.items()
    ]
    content = {
        "info": {"year": 2017, "note": 'a ] and a } in text: \\" é'},
        "licenses": [{"id": 1, "name": "CC"}],
        "images": images,
        "annotations": list(objects),
        "categories": [{"id": 18, "name": "dog"}],
    }
    path.write_text(json.dumps(content), "utf-8")
    return path


@pytest.mark.parametrize("pictures", ["", "images"])
def test_each_object_is_a_clip_of_one_frame(tmp_path: Path, pictures: str) -> None:
    write_set(tmp_path, labelled(1, 25), labelled(2, 9, 0, 0, 30, 20), pictures=pictures)

    first, second = read_coco(tmp_path)

    assert [first.name, second.name] == ["000000000025#1", "000000000009#2"]
    assert first.boxes_xywh.dtype == np.float32
    assert_array_equal(first.boxes_xywh, [[3.25, 4.5, 12, 11]])
    assert_array_equal(second.boxes_xywh, [[0, 0, 30, 20]])
    assert [frame_indices(first), frame_indices(second)] == [[1], [0]]


def test_objects_of_one_picture_share_it(tmp_path: Path) -> None:
    write_set(tmp_path, labelled(1, 9), labelled(2, 9, 0, 0, 30, 20))

    first, second = read_coco(tmp_path)

    assert first.images is second.images


def test_crowds_and_thin_or_broken_boxes_are_left_out(tmp_path: Path) -> None:
    write_set(
        tmp_path,
        labelled(1, 9, iscrowd=1),
        labelled(2, 9, 1, 1, 9.9, 20),
        labelled(3, 9, 1, 1, 20, 9.9),
        labelled(4, 9, 1, 1, -20, 20),
        labelled(5, 9, 1, 1, float("nan"), 20),
        labelled(6, 9, 1, 1, float("inf"), 20),
        labelled(7, 9, 1, 1, 10, 10),
    )

    clips = read_coco(tmp_path)

    assert [clip.name for clip in clips] == ["000000000009#7"]


def test_the_validation_split_has_files_of_its_own(tmp_path: Path) -> None:
    write_set(tmp_path, labelled(1, 9))
    write_set(tmp_path, labelled(2, 9), split="val")

    assert [clip.name for clip in read_coco(tmp_path, split="val")] == ["000000000009#2"]


@pytest.mark.parametrize("chunk_chars", [1, 7, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_annotations_are_read_alike_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_chars: int, indent: int | None
) -> None:
    path = write_set(tmp_path, labelled(12345, 9), labelled(2, 25, 1, 2, 31, 14))
    content = json.loads(path.read_text("utf-8"))
    content = {"version": 123, "empty": [], **dict(reversed(content.items()))}  # images come last
    path.write_text(json.dumps(content, indent=indent) + "\n", "utf-8")
    monkeypatch.setattr(coco, "_CHUNK_CHARS", chunk_chars)

    clips = read_coco(tmp_path)

    assert [clip.name for clip in clips] == ["000000000009#12345", "000000000025#2"]
    assert clips[1].boxes_xywh.tolist() == [[1, 2, 31, 14]]


def test_progress_counts_the_bytes_of_the_annotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_set(tmp_path, *(labelled(number, 9) for number in range(200)))
    monkeypatch.setattr(coco, "_CHUNK_CHARS", 1 << 13)
    calls: list[tuple[int, int]] = []

    read_coco(tmp_path, on_progress=lambda done, total: calls.append((done, total)))

    assert len({done for done, _ in calls}) > 3
    assert sorted(calls) == calls
    assert calls[-1] == (path.stat().st_size, path.stat().st_size)


@pytest.mark.parametrize("key", ["id", "image_id", "bbox"])
def test_an_annotation_without_a_part_is_refused(tmp_path: Path, key: str) -> None:
    item = labelled(1, 9)
    del item[key]
    write_set(tmp_path, item)

    with pytest.raises(DataError, match=rf"instances_train2017\.json: .*KeyError\('{key}'\)"):
        read_coco(tmp_path)


@pytest.mark.parametrize("bbox", [[1, 2, 3], [1, 2, 3, "x"], 7, None])
def test_a_malformed_bbox_is_refused(tmp_path: Path, bbox: Any) -> None:
    write_set(tmp_path, {**labelled(1, 9), "bbox": bbox})

    with pytest.raises(DataError, match="expected images with id and file_name, and annotations"):
        read_coco(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
def test_json_that_breaks_off_is_refused(tmp_path: Path, share: float) -> None:
    path = write_set(tmp_path, labelled(1, 9), labelled(2, 25))
    text = path.read_text("utf-8")
    path.write_text(text[: int(share * len(text))], "utf-8")

    with pytest.raises(DataError, match=r"instances_train2017\.json: expected JSON, got"):
        read_coco(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{]", '{"images": [}', '{"images" 3}', "\x00"])
def test_what_is_not_an_object_of_lists_is_refused(tmp_path: Path, text: str) -> None:
    write_set(tmp_path).write_text(text)

    with pytest.raises(DataError, match="expected JSON, got"):
        read_coco(tmp_path)


def test_an_object_of_an_unknown_picture_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, labelled(1, 77))

    with pytest.raises(DataError, match="got image_id 77 that is not in images"):
        read_coco(tmp_path)


def test_a_labelled_picture_that_is_missing_is_named(tmp_path: Path) -> None:
    write_set(tmp_path, labelled(1, 9))
    (tmp_path / "train2017" / PICTURES[9]).unlink()

    with pytest.raises(DataError, match=r"000000000009\.jpg: expected a picture that instances"):
        read_coco(tmp_path)


def test_annotations_without_objects_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path, labelled(1, 9, iscrowd=1))

    with pytest.raises(DataError, match="expected objects of 10 px and more, got none"):
        read_coco(tmp_path)


def test_a_damaged_picture_is_named_when_it_is_used(tmp_path: Path) -> None:
    write_set(tmp_path, labelled(1, 9))
    (tmp_path / "train2017" / PICTURES[9]).write_bytes(b"damaged")

    (clip,) = read_coco(tmp_path)

    with pytest.raises(DataError, match=r"000000000009\.jpg: expected a picture"):
        clip.images[0]


@pytest.mark.slow
def test_many_objects_take_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    write_set(tmp_path, *(labelled(number, 9 if number % 2 else 25) for number in range(30_000)))

    tracemalloc.start()
    try:
        clips = read_coco(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(clips) == 30_000
    assert peak < 600 * len(clips)
