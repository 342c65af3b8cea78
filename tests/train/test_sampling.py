import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from training_packs import (
    CROPS,
    DARK,
    UInt8Array,
    batch_of,
    centres_of,
    lazy,
    moving_clip,
    noisy_clip,
    noisy_still,
    pack_of,
    sampler_of,
    solid,
    still,
    varied_pack,
)

from edgetrack.bundle import CropSpec
from edgetrack.data.folder import Cutout, TrainingPack, read_training_pack
from edgetrack.train.augment import Augmentation

MOVES = dataclasses.replace(
    Augmentation.none(),
    scale_std=0.25,
    offset_sides=1.0,
    near_offset_sides=0.5,
    aspect_std=0.12,
    video_aspect_std=0.06,
    far_gap_rate=0.3,
    flip_rate=0.5,
    single_flip_rate=0.3,
    run_time_rate=0.5,
    template_jitter_rate=0.5,
    template_jitter_std=0.05,
)


def box_of_white(crop: UInt8Array) -> npt.NDArray[np.float64] | None:
    """Box cxcywh, crop pixels, of a white rectangle; ``None`` if the border cuts it."""
    share = np.clip((crop.mean(2) - DARK) / (255 - DARK), 0, 1)
    row, column = share[share.sum(1).argmax()], share[:, share.sum(0).argmax()]
    if max(row[0], row[-1], column[0], column[-1]) > 0.05:
        return None
    centres = np.arange(len(crop)) + 0.5
    middle = [row @ centres / row.sum(), column @ centres / column.sum()]
    return np.array([*middle, row.sum(), column.sum()])


def assert_boxes_enclose(pack: TrainingPack, **options: Any) -> None:
    batch = batch_of(pack, augmentation=MOVES, batch_size=60, **options)
    errors = []
    for name in ("template", "search"):
        crops = batch["template" if name == "template" else "search_region"]
        for crop, bbox in zip(crops, batch[f"{name}_bbox_cxcywh"], strict=True):
            found = box_of_white(crop)
            if found is not None:
                errors.append(bbox * len(crop) - found)
    assert len(errors) > 80
    assert np.abs(errors).max() < 0.75
    assert np.abs(np.mean(errors, 0)).max() < 0.15  # no half pixel is lost


def test_a_batch_has_the_shapes_and_dtypes_of_its_crops() -> None:
    crops = CropSpec(template_size_px=48, template_factor=2, search_size_px=112, search_factor=5)

    batch = batch_of(varied_pack(), crops=crops, batch_size=5)

    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "template": ((5, 48, 48, 3), "uint8"),
        "search_region": ((5, 112, 112, 3), "uint8"),
        "template_bbox_cxcywh": ((5, 4), "float32"),
        "search_bbox_cxcywh": ((5, 4), "float32"),
        "is_present": ((5,), "float32"),
    }


def test_the_rows_of_all_ranks_are_the_batch_of_one() -> None:
    sampler = sampler_of(varied_pack(), batch_size=48)
    whole = sampler.batch(2)

    for rank in range(3):
        part = sampler.batch(2, rank=rank, num_ranks=3)

        for name, value in part.items():
            assert torch.equal(value, whole[name][rank::3]), name


@pytest.mark.parametrize(("seed", "step"), [(3, 1), (4, 0)])
def test_another_seed_or_step_gives_another_batch(seed: int, step: int) -> None:
    pack = varied_pack()

    batch, other = batch_of(pack), batch_of(pack, step, seed=seed)

    assert not np.array_equal(batch["search_region"], other["search_region"])


def digest_of_a_batch() -> str:
    """Hash of the bytes of a batch."""
    batch = batch_of(varied_pack(), 7)
    return hashlib.sha256(b"".join(v.tobytes() for v in batch.values())).hexdigest()


def test_another_process_makes_the_same_batch() -> None:
    paths = [str(Path(__file__).parents[n]) for n in (0, 1, 2)]
    code = f"import sys; sys.path[:0] = {paths}; import test_sampling as t; "

    done = subprocess.run(
        [sys.executable, "-c", code + "print(t.digest_of_a_batch())"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "5"},
    )

    assert done.stdout.strip() == digest_of_a_batch()


def test_batches_are_those_of_their_steps() -> None:
    sampler = sampler_of(varied_pack(), batch_size=6)

    batches = list(sampler.batches(4, 3, rank=1, num_ranks=2))

    assert len(batches) == 3
    for step, batch in enumerate(batches, start=4):
        expected = sampler.batch(step, rank=1, num_ranks=2)
        assert all(torch.equal(value, expected[name]) for name, value in batch.items())


@pytest.mark.parametrize("source", ["coco_mini", "video", "extra"])
def test_boxes_enclose_the_object(source: str) -> None:
    pack = pack_of(pictures={"coco_mini": (still(),)}, clips={"video": (moving_clip(),)})

    assert_boxes_enclose(pack, mix={source: 1.0}, extra_clips=[moving_clip()])


@pytest.mark.parametrize("size", [(30, 40), (150, 110)])
def test_boxes_enclose_a_pasted_object(size: tuple[int, int]) -> None:
    pack = pack_of(
        cutouts=(solid((255, 255, 255), "shapes", size=size),),
        backgrounds=(np.full((100, 120, 3), DARK, np.uint8),),
    )

    assert_boxes_enclose(pack, mix={"paste": 1.0})


def test_boxes_enclose_a_rotated_cutout() -> None:
    bgra = np.zeros((80, 120, 4), np.uint8)
    cv2.ellipse(bgra, ((59.5, 39.5), (120, 80), 0), (255, 255, 255, 255), -1)
    pack = pack_of(
        cutouts=(Cutout(bgra, "shapes"),), backgrounds=(np.full((100, 120, 3), DARK, np.uint8),)
    )
    how = dataclasses.replace(Augmentation.none(), spin_rate=1.0)

    near = dataclasses.replace(CROPS, search_factor=1.6)
    batch = batch_of(pack, augmentation=how, mix={"paste": 1.0}, crops=near)

    for crop, bbox in zip(batch["search_region"], batch["search_bbox_cxcywh"], strict=True):
        bright = crop.max(2) > DARK + 0.25 * (255 - DARK)  # a rim covers a part of its pixels
        columns, rows = np.flatnonzero(bright.any(0)), np.flatnonzero(bright.any(1))
        x1, x2, y1, y2 = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
        found = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
        assert_allclose(bbox * len(crop), found, atol=1.2)


def test_lazy_clips_give_what_resident_clips_give() -> None:
    clips = [noisy_clip("a_000001", num_frames=11), noisy_clip("b", num_frames=1)]
    lazy_clips = [lazy(clip) for clip in clips]

    resident = batch_of(pack_of(clips={"video": tuple(clips)}))
    on_demand = batch_of(pack_of(clips={"video": tuple(lazy_clips)}))

    for name, value in on_demand.items():
        assert_array_equal(value, resident[name])
    assert all(0 < clip.images.num_decoded <= 96 for clip in lazy_clips)


def test_lazy_and_resident_clips_mix() -> None:
    extra = [noisy_clip("a_000001", num_frames=11), lazy(noisy_clip("b_000001", num_frames=9))]
    mix = {"coco_mini": 0.5, "extra": 0.5}

    whole = sampler_of(varied_pack(), extra_clips=extra, mix=mix).batch(0)

    part = sampler_of(varied_pack(), extra_clips=extra, mix=mix).batch(0, rank=1, num_ranks=2)
    assert all(torch.equal(value, whole[name][1::2]) for name, value in part.items())
    assert (whole["search_region"].flatten(1) > 0).any(1).all()


def test_a_rank_decodes_the_frames_of_its_rows_alone() -> None:
    clip = lazy(noisy_clip("a", num_frames=40))
    sampler = sampler_of(pack_of(clips={"video": (clip,)}), augmentation=Augmentation.none())

    sampler.batch(0, rank=0, num_ranks=16)

    assert 0 < clip.images.num_decoded <= 4


def test_a_clip_of_one_frame_is_a_still_picture() -> None:
    clip = moving_clip(num_frames=1)

    assert_boxes_enclose(pack_of(clips={"video": (clip,)}))


def test_run_time_windows_have_whole_pixels() -> None:
    how = dataclasses.replace(MOVES, run_time_rate=1.0)

    batch = batch_of(pack_of(pictures={"coco_mini": (still(),)}), augmentation=how)

    side_px = 50 / batch["search_bbox_cxcywh"][:, 2]
    assert_allclose(side_px, side_px.round(), atol=1e-3)
    assert_allclose(36 / batch["search_bbox_cxcywh"][:, 3], side_px, rtol=1e-5)


def test_without_augmentation_the_target_is_centred_at_its_nominal_size() -> None:
    pack = pack_of(pictures={"coco_mini": (still(),)})

    batch = batch_of(pack, augmentation=Augmentation.none())

    assert_allclose(batch["search_bbox_cxcywh"][:, :2], 0.5, atol=1e-6)
    assert_allclose(batch["search_bbox_cxcywh"][:, 2:].prod(1), 1 / 4**2, rtol=1e-5)
    assert_allclose(batch["template_bbox_cxcywh"][:, 2:].prod(1), 1 / 2**2, rtol=0.05)


def test_crops_are_rgb() -> None:
    blue = pack_of(pictures={"coco_mini": (still(bgr=(250, 30, 10)),)})

    batch = batch_of(blue, augmentation=Augmentation.none())

    assert (centres_of(batch["search_region"]) == [10, 30, 250]).all()
    assert (centres_of(batch["template"]) == [10, 30, 250]).all()


def test_the_padding_stays_black_whatever_the_light() -> None:
    picture = still(bbox=(0, 0, 60, 40))
    how = dataclasses.replace(
        Augmentation.none(), light_strength=1.0, noise_rate=1.0, motion_blur_rate=1.0, jpeg_rate=1
    )

    batch = batch_of(pack_of(pictures={"coco_mini": (picture,)}), augmentation=how)

    assert not batch["search_region"][:, :30].any()
    assert not batch["template"][:, :, :5].any()


def test_a_filled_border_shows_another_picture() -> None:
    picture = still(bbox=(0, 0, 60, 40))
    how = dataclasses.replace(Augmentation.none(), border_fill_rate=1.0)
    pack = pack_of(
        pictures={"coco_mini": (picture,)}, backgrounds=(np.full((90, 90, 3), 77, np.uint8),)
    )

    regions = batch_of(pack, augmentation=how, mix={"coco_mini": 1})["search_region"]

    assert regions[:, :30].all()
    assert (regions[:, :30] == 77).all((1, 2, 3)).any()


BORDERING = (0, 0, 60, 40)
COMPANIONS: dict[str, dict[str, float]] = {
    "near_offset_sides": {},
    "offset_sides": {},
    "rotation_std_rad": {"rotation_rate": 1.0},
    "rotation_rate": {"rotation_std_rad": 0.4},
    "video_rotation_std_rad": {"video_rotation_rate": 1.0},
    "video_rotation_rate": {"video_rotation_std_rad": 0.3},
    "template_jitter_std": {"template_jitter_rate": 1.0},
    "template_jitter_rate": {"template_jitter_std": 0.1},
}


@pytest.mark.parametrize("name", Augmentation.__dataclass_fields__)
def test_each_augmentation_works_and_does_nothing_at_zero(name: str) -> None:
    source = "video" if "video" in name or "far" in name else "coco_mini"
    pack = pack_of(
        pictures={"coco_mini": (noisy_still(), noisy_still(1, bbox=BORDERING))},
        clips={"video": (noisy_clip("a", num_frames=60),)},
        cutouts=(solid((0, 0, 200), "coco_mini"), solid((0, 200, 0), "coco_mini")),
    )
    options = {"mix": {source: 1.0}, "absent_rate": 0.0}
    base = dataclasses.replace(Augmentation.none(), **COMPANIONS.get(name, {}))

    unchanged = batch_of(pack, augmentation=Augmentation.none(), **options)
    at_zero = batch_of(pack, augmentation=base, **options)
    changed = batch_of(pack, augmentation=dataclasses.replace(base, **{name: 1.0}), **options)

    key = "template" if name.startswith("template") else "search_region"
    assert_array_equal(at_zero["template"], unchanged["template"])
    assert_array_equal(at_zero["search_region"], unchanged["search_region"])
    assert not np.array_equal(changed[key], unchanged[key])


@pytest.mark.data
def test_the_research_pack_makes_pairs(tmp_path: Path, data_pack: Path) -> None:
    for part in ("images_with_masks/coco_mini", "videos/davis_cows", "videos/u_sam2_01_dog"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).symlink_to(data_pack / "train" / part)
    detections = data_pack / "train" / "videos" / "boxes.jsonl"
    (tmp_path / "videos" / "boxes.jsonl").symlink_to(detections)

    batch = batch_of(read_training_pack(tmp_path), batch_size=200)

    centre = batch["search_bbox_cxcywh"][:, :2]
    assert ((centre > 0) & (centre < 1)).all()
    assert batch["template"].any((1, 2, 3)).all()
    assert batch["search_region"].any((1, 2, 3)).all()
