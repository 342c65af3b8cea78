import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edgetrack.data.folder import read_training_pack
from edgetrack.errors import DataError

NAN_ROW = "NaN,NaN,NaN,NaN"


def write_picture(path: Path, *, width: int = 80, height: int = 60, value: int = 50) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((height, width, 3), value, np.uint8))


def write_lines(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_masked_set(root: Path) -> Path:
    """One picture with an ellipse of 40 x 32 pixels at (20, 10), and a speck."""
    folder = root / "images_with_masks" / "shapes"
    write_picture(folder / "img" / "a.png")
    mask = np.zeros((60, 80), np.uint8)
    mask[10:42, 20:60] = 7 * cv2.ellipse(
        np.zeros((32, 40), np.uint8), ((19.5, 15.5), (40, 32), 0), 1, -1
    )
    (folder / "mask").mkdir()
    assert cv2.imwrite(str(folder / "mask" / "a.png"), mask)
    objects = [
        {"id": 7, "box": [20, 10, 40, 32], "area": 1000},
        {"id": 9, "box": [0, 0, 4, 4], "area": 16},
    ]
    write_lines(
        folder / "manifest.jsonl", {"img": "img/a.png", "mask": "mask/a.png", "objects": objects}
    )
    return folder


def write_clip(root: Path, name: str, *rows: str, num_frames: int = 3) -> Path:
    folder = root / "videos" / name
    for index in range(num_frames):
        write_picture(folder / "img" / f"{index:06d}.png", value=index)
    if rows:
        (folder / "groundtruth.txt").write_text("\n".join(rows) + "\n")
    return folder


def test_pictures_come_with_the_boxes_that_are_not_tiny(tmp_path: Path) -> None:
    write_masked_set(tmp_path)

    pack = read_training_pack(tmp_path)

    (picture,) = pack.pictures["shapes"]
    assert picture.image.shape == (60, 80, 3)
    assert_array_equal(picture.boxes_xywh, np.array([[20, 10, 40, 32]], np.float32))


def test_a_mask_gives_a_cutout_that_is_tight_around_it(tmp_path: Path) -> None:
    write_masked_set(tmp_path)

    (cutout,) = read_training_pack(tmp_path).cutouts

    alpha = cutout.bgra[..., 3]
    assert cutout.kind == "shapes"
    assert alpha.any(0).all()
    assert alpha.any(1).all()
    assert_allclose(alpha.shape, (32, 40), atol=1)


def test_a_large_cutout_is_shrunk(tmp_path: Path) -> None:
    folder = tmp_path / "images_with_masks" / "large"
    write_picture(folder / "img" / "a.png", width=600, height=300)
    (folder / "mask").mkdir()
    mask = np.zeros((300, 600), np.uint8)
    mask[50:150, 100:500] = 1
    assert cv2.imwrite(str(folder / "mask" / "a.png"), mask)
    objects = [{"id": 1, "box": [100, 50, 400, 100], "area": 40000}]
    write_lines(
        folder / "manifest.jsonl", {"img": "img/a.png", "mask": "mask/a.png", "objects": objects}
    )

    (cutout,) = read_training_pack(tmp_path).cutouts

    assert cutout.bgra.shape == (40, 160, 4)


def test_regions_that_touch_the_border_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "images_with_boxes" / "regions"
    write_picture(folder / "img" / "a.png")
    objects = [
        {"box": [10, 10, 30, 30], "area": 700, "border_pixels": 0},
        {"box": [0, 0, 30, 30], "area": 700, "border_pixels": 40},
    ]
    write_lines(folder / "manifest.jsonl", {"img": "img/a.png", "objects": objects})

    (picture,) = read_training_pack(tmp_path).pictures["regions"]

    assert_array_equal(picture.boxes_xywh, np.array([[10, 10, 30, 30]], np.float32))


def test_detections_count_if_they_are_sure_and_not_the_whole_picture(tmp_path: Path) -> None:
    folder = tmp_path / "backgrounds" / "photos"
    write_picture(folder / "img" / "a.png")
    write_lines(folder / "manifest.jsonl", {"img": "img/a.png"})
    boxes = [[10, 10, 30, 20, 0.7, 3], [5, 5, 30, 20, 0.4, 3], [0, 0, 80, 60, 0.9, 3]]
    write_lines(folder / "boxes.jsonl", {"img": "img/a.png", "boxes": boxes})

    pack = read_training_pack(tmp_path)

    (picture,) = pack.pictures["photos"]
    assert_array_equal(picture.boxes_xywh, np.array([[10, 10, 30, 20]], np.float32))
    assert pack.backgrounds[0] is picture.image


def test_a_clip_keeps_its_absent_frames_as_nan(tmp_path: Path) -> None:
    write_clip(tmp_path, "car", "1,2,30,20", NAN_ROW, "3,4,30,20")

    (clip,) = read_training_pack(tmp_path).clips["video"]

    nan = np.nan
    assert_array_equal(clip.boxes_xywh, [[1, 2, 30, 20], [nan] * 4, [3, 4, 30, 20]])
    assert [int(image[0, 0, 0]) for image in clip.images] == [0, 1, 2]


def test_clips_of_small_still_objects_are_a_group_of_their_own(tmp_path: Path) -> None:
    write_clip(tmp_path, "fod_bolt", *["1,2,30,20"] * 3)

    clips = read_training_pack(tmp_path).clips

    assert [len(clips[group]) for group in ("video", "fod", "tracks")] == [0, 1, 0]


def test_detections_of_consecutive_frames_are_linked_into_a_track(tmp_path: Path) -> None:
    write_clip(tmp_path, "street", num_frames=8)
    rows = []
    for index in range(6):
        car, person = [10 + index, 10, 30, 20, 0.9, 2], [10 + index, 12, 30, 20, 0.8, 0]
        boxes = [person, car] if index < 2 else [car]
        rows.append({"img": f"street/img/{index:06d}.png", "boxes": boxes})
    write_lines(tmp_path / "videos" / "boxes.jsonl", *rows)

    (track,) = read_training_pack(tmp_path).clips["tracks"]

    assert_array_equal(track.boxes_xywh[:6, 0], np.arange(10, 16))
    assert_array_equal(track.boxes_xywh[:6, 1], 10)
    assert np.isnan(track.boxes_xywh[6:]).all()


def test_progress_counts_sets_and_clips(tmp_path: Path) -> None:
    write_masked_set(tmp_path)
    write_clip(tmp_path, "car", *["1,2,30,20"] * 3)
    calls: list[tuple[int, int]] = []

    read_training_pack(tmp_path, on_progress=lambda done, total: calls.append((done, total)))

    assert calls == [(1, 2), (2, 2)]


@pytest.mark.parametrize("name", [".", "absent"])
def test_a_folder_without_data_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="expected a training folder"):
        read_training_pack(tmp_path / name)


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        "{",
        '{"objects": []}',
        '{"img": "img/a.png", "objects": [{"area": 3}]}',
        '{"img": "img/a.png", "objects": [{"box": [1, 2, 3]}]}',
        '{"img": "img/a.png", "objects": [{"box": 7}]}',
        '{"img": "img/a.png", "objects": [{"box": [0, 0, "x", 40]}]}',
        '{"img": "img/a.png", "objects": 7}',
        '{"img": "img/a.png", "mask": 3, "objects": [{"id":1,"area":900,"box":[0,0,30,30]}]}',
    ],
)
def test_a_malformed_manifest_line_is_refused(tmp_path: Path, line: str) -> None:
    folder = write_masked_set(tmp_path)
    (folder / "manifest.jsonl").write_text(line)

    with pytest.raises(DataError, match=r"manifest\.jsonl: expected"):
        read_training_pack(tmp_path)


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"img": "a"}', '{"img": "a", "boxes": [[1, 2, 3, 4]]}']
)
def test_malformed_detections_are_refused(tmp_path: Path, line: str) -> None:
    write_clip(tmp_path, "street")
    (tmp_path / "videos" / "boxes.jsonl").write_text(line)

    with pytest.raises(DataError, match=r"boxes\.jsonl: expected"):
        read_training_pack(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1,2,30,20"] * 2, "3 frames, got 2"),
        (["1,2,30,x"] * 3, "expected rows x,y,w,h"),
        (["1,2,30"] * 4, "expected rows x,y,w,h"),
    ],
)
def test_malformed_truth_is_refused(tmp_path: Path, rows: list[str], message: str) -> None:
    write_clip(tmp_path, "car", *rows)

    with pytest.raises(DataError, match=message):
        read_training_pack(tmp_path)


def test_a_picture_that_does_not_decode_is_refused(tmp_path: Path) -> None:
    folder = write_masked_set(tmp_path)
    (folder / "img" / "a.png").write_bytes(b"not a picture")

    with pytest.raises(DataError, match=r"a\.png: expected a picture"):
        read_training_pack(tmp_path)


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = write_masked_set(tmp_path)
    assert cv2.imwrite(str(folder / "mask" / "a.png"), np.zeros((30, 40), np.uint8))

    with pytest.raises(DataError, match=r"shape \(60, 80\), got shape \(30, 40\)"):
        read_training_pack(tmp_path)


@pytest.mark.data
def test_a_part_of_the_research_pack_is_read(tmp_path: Path, data_pack: Path) -> None:
    train = data_pack / "train"
    for part in ("images_with_masks/coco_mini", "videos/davis_cows", "videos/fod_Nut_1a"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).symlink_to(train / part)

    pack = read_training_pack(tmp_path)

    assert len(pack.pictures["coco_mini"]) == 159
    assert {group: len(clips) for group, clips in pack.clips.items()} == {
        "video": 1,
        "fod": 1,
        "tracks": 0,
    }
    assert {c.kind for c in pack.cutouts} == {"coco_mini", "video"}
