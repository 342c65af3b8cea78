import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edgetrack.bundle import CropSpec
from edgetrack.data.folder import Clip, Cutout, Picture, TrainingPack, read_training_pack
from edgetrack.errors import DataError
from edgetrack.train.augment import Augmentation
from edgetrack.train.sampling import DEFAULT_MIX, PairSampler

UInt8Array = npt.NDArray[np.uint8]
CROPS = CropSpec(template_size_px=64, template_factor=2, search_size_px=128, search_factor=4)
MOVES = dataclasses.replace(
    Augmentation.none(),
    scale_std=0.25,
    offset_sides=1.0,
    near_offset_sides=0.5,
    aspect_std=0.12,
    video_aspect_std=0.06,
    flip_rate=0.5,
    single_flip_rate=0.3,
    run_time_rate=0.5,
    template_jitter_rate=0.5,
    template_jitter_std=0.05,
)


def picture_of(
    bbox_xywh: tuple[int, int, int, int],
    *,
    bgr: tuple[int, int, int] = (255, 255, 255),
    size: tuple[int, int] = (240, 320),
) -> UInt8Array:
    x, y, w, h = bbox_xywh
    image = np.full((*size, 3), 20, np.uint8)
    image[y : y + h, x : x + w] = bgr
    return image


def pack_of(
    *,
    pictures: dict[str, tuple[Picture, ...]] | None = None,
    clips: dict[str, tuple[Clip, ...]] | None = None,
    cutouts: tuple[Cutout, ...] = (),
    backgrounds: tuple[UInt8Array, ...] = (),
) -> TrainingPack:
    return TrainingPack(
        pictures=pictures or {}, clips=clips or {}, cutouts=cutouts, backgrounds=backgrounds
    )


def still(*, bgr: tuple[int, int, int] = (255, 255, 255)) -> Picture:
    bbox = (140, 90, 50, 36)
    return Picture(picture_of(bbox, bgr=bgr), np.array([bbox], np.float32))


def moving_clip(name: str = "car_01", *, num_frames: int = 12) -> Clip:
    boxes = [(100 + 4 * i, 80 + 2 * i, 40 + i, 30) for i in range(num_frames)]
    return Clip(name, tuple(picture_of(b) for b in boxes), np.array(boxes, np.float32))


def varied_pack() -> TrainingPack:
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    cutout = np.random.default_rng(1).integers(0, 256, (30, 40, 4), np.uint8)
    return pack_of(
        pictures={"coco_mini": (still(), still(bgr=(0, 0, 200)))},
        clips={"video": (moving_clip(),), "tracks": (moving_clip("street#0"),)},
        cutouts=(Cutout(cutout, "coco_mini"), Cutout(cutout[::-1], "video")),
        backgrounds=(noise,),
    )


def sampler_of(pack: TrainingPack, **options: Any) -> PairSampler:
    return PairSampler(pack, **{"crops": CROPS, "seed": 3, "num_pairs": 400, **options})


def box_of_bright(crop: UInt8Array) -> npt.NDArray[np.float64] | None:
    """Box cxcywh, crop pixels, of what is brighter than 137; ``None`` if the border cuts it."""
    bright = crop.max(2) > 137
    columns, rows = np.flatnonzero(bright.any(0)), np.flatnonzero(bright.any(1))
    x1, x2, y1, y2 = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    if min(x1, y1) == 0 or max(x2, y2) == len(crop):
        return None
    return np.array([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])


def assert_boxes_enclose(sampler: PairSampler, *, num_pairs: int = 60) -> None:
    num_checked = 0
    for index in range(num_pairs):
        pair = sampler[index]
        for crop, bbox in (
            (pair["template"], pair["template_bbox_cxcywh"]),
            (pair["search_region"], pair["search_bbox_cxcywh"]),
        ):
            found = box_of_bright(crop)
            if found is not None:
                assert_allclose(bbox * len(crop), found, atol=1.5)
                num_checked += 1
    assert num_checked > num_pairs


def test_a_pair_has_the_shapes_and_dtypes_of_its_crops() -> None:
    crops = CropSpec(template_size_px=48, template_factor=2, search_size_px=112, search_factor=5)

    pair = sampler_of(varied_pack(), crops=crops)[0]

    assert {name: (value.shape, value.dtype.name) for name, value in pair.items()} == {
        "template": ((48, 48, 3), "uint8"),
        "search_region": ((112, 112, 3), "uint8"),
        "template_bbox_cxcywh": ((4,), "float32"),
        "search_bbox_cxcywh": ((4,), "float32"),
        "is_present": ((), "float32"),
    }


def test_a_pair_depends_on_seed_and_index_alone() -> None:
    pack = varied_pack()
    first, second = sampler_of(pack), sampler_of(pack)
    backwards = {index: first[index] for index in reversed(range(40))}

    for index in range(40):
        pair = second[index]

        for name, value in pair.items():
            assert_array_equal(value, backwards[index][name])


@pytest.mark.parametrize(("seed", "index"), [(3, 1), (4, 0)])
def test_another_seed_or_index_gives_another_pair(seed: int, index: int) -> None:
    pack = varied_pack()

    pair, other = sampler_of(pack)[0], sampler_of(pack, seed=seed)[index]

    assert not np.array_equal(pair["search_region"], other["search_region"])


@pytest.mark.parametrize("source", ["coco_mini", "video"])
def test_boxes_enclose_the_object(source: str) -> None:
    pack = pack_of(pictures={"coco_mini": (still(),)}, clips={"video": (moving_clip(),)})

    assert_boxes_enclose(sampler_of(pack, mix={source: 1.0}, augmentation=MOVES))


def test_boxes_enclose_a_pasted_object() -> None:
    pack = pack_of(
        cutouts=(Cutout(np.full((30, 40, 4), 255, np.uint8), "shapes"),),
        backgrounds=(np.full((100, 120, 3), 20, np.uint8),),
    )

    assert_boxes_enclose(sampler_of(pack, mix={"paste": 1.0}, augmentation=MOVES))


def test_extra_clips_are_sampled() -> None:
    sampler = sampler_of(
        pack_of(), mix={"extra": 1.0}, augmentation=MOVES, extra_clips=[moving_clip()]
    )

    assert_boxes_enclose(sampler)


def test_frames_without_the_object_are_not_sampled() -> None:
    clip = moving_clip()
    boxes = clip.boxes_xywh.copy()
    boxes[3:] = np.nan
    pack = pack_of(clips={"video": (dataclasses.replace(clip, boxes_xywh=boxes),)})
    sampler = sampler_of(pack)

    for index in range(50):
        pair = sampler[index]

        assert np.isfinite(pair["template_bbox_cxcywh"]).all()
        assert np.isfinite(pair["search_bbox_cxcywh"]).all()


def test_run_time_windows_have_whole_pixels() -> None:
    how = dataclasses.replace(MOVES, run_time_rate=1.0)
    sampler = sampler_of(pack_of(pictures={"coco_mini": (still(),)}), augmentation=how)

    for index in range(30):
        width, height = sampler[index]["search_bbox_cxcywh"][2:].tolist()

        side_px = 50 / width
        assert side_px == pytest.approx(round(side_px), abs=1e-3)
        assert 36 / height == pytest.approx(side_px, rel=1e-5)


def test_without_augmentation_the_target_is_centred_at_its_nominal_size() -> None:
    sampler = sampler_of(
        pack_of(pictures={"coco_mini": (still(),)}), augmentation=Augmentation.none()
    )

    pair = sampler[0]

    assert_allclose(pair["search_bbox_cxcywh"][:2], 0.5, atol=1e-6)
    assert pair["search_bbox_cxcywh"][2:].prod() == pytest.approx(1 / 4**2)
    assert pair["template_bbox_cxcywh"][2:].prod() == pytest.approx(1 / 2**2, rel=0.05)


def test_crops_are_rgb() -> None:
    blue = pack_of(pictures={"coco_mini": (still(bgr=(250, 30, 10)),)})

    pair = sampler_of(blue, augmentation=Augmentation.none())[0]

    assert_array_equal(pair["search_region"][64, 64], [10, 30, 250])
    assert_array_equal(pair["template"][32, 32], [10, 30, 250])


def test_the_padding_stays_black_whatever_the_light() -> None:
    corner = (0, 0, 60, 40)
    picture = Picture(picture_of(corner), np.array([corner], np.float32))
    how = dataclasses.replace(
        Augmentation.none(), light_strength=1.0, noise_rate=1.0, motion_blur_rate=1.0
    )
    sampler = sampler_of(pack_of(pictures={"coco_mini": (picture,)}), augmentation=how)

    for index in range(10):
        pair = sampler[index]

        assert not pair["search_region"][:30].any()
        assert not pair["template"][:, :5].any()


def test_a_filled_border_shows_another_picture() -> None:
    corner = (0, 0, 60, 40)
    picture = Picture(picture_of(corner), np.array([corner], np.float32))
    how = dataclasses.replace(Augmentation.none(), border_fill_rate=1.0)
    pack = pack_of(
        pictures={"coco_mini": (picture,)}, backgrounds=(np.full((90, 90, 3), 77, np.uint8),)
    )

    regions = [
        sampler_of(pack, augmentation=how, mix={"coco_mini": 1})[i]["search_region"]
        for i in range(8)
    ]

    assert all(region[:30].all() for region in regions)
    assert any((region[:30] == 77).all() for region in regions)


def test_an_absent_pair_shows_another_object_in_the_template() -> None:
    red, green = still(bgr=(0, 0, 255)), still(bgr=(0, 255, 0))
    sampler = sampler_of(
        pack_of(pictures={"coco_mini": (red, green)}),
        augmentation=Augmentation.none(),
        absent_rate=1.0,
    )

    for index in range(20):
        pair = sampler[index]

        colours = [pair["template"][32, 32].tolist(), pair["search_region"][64, 64].tolist()]
        assert pair["is_present"] == 0
        assert sorted(colours) == [[0, 255, 0], [255, 0, 0]]


def test_a_pair_is_absent_at_the_given_rate() -> None:
    sampler = sampler_of(varied_pack(), absent_rate=0.25)

    share = np.mean([1 - sampler[index]["is_present"] for index in range(400)])

    assert share == pytest.approx(0.25, abs=0.07)


def test_pieces_of_one_video_never_make_an_absent_pair() -> None:
    pack = pack_of(clips={"video": (moving_clip("car_01"), moving_clip("car_02"))})
    sampler = sampler_of(pack, absent_rate=1.0)

    assert all(sampler[index]["is_present"] == 1 for index in range(20))


def test_every_source_of_the_default_mix_makes_pairs() -> None:
    pack = varied_pack()
    served = [name for name in DEFAULT_MIX if name in ("paste", "rbox", "coco_mini", "video")]

    for source in served:
        sampler = sampler_of(pack, mix={source: 1.0})

        for index in range(30):
            centre = sampler[index]["search_bbox_cxcywh"][:2]
            assert ((centre > 0) & (centre < 1)).all()


def test_the_length_is_the_number_of_pairs() -> None:
    sampler = sampler_of(varied_pack(), num_pairs=7)
    pairs: Iterator[object] = iter(sampler)  # type: ignore[call-overload]  # by __getitem__

    assert len(sampler) == len(list(pairs)) == 7


@pytest.mark.parametrize("index", [-1, 400])
def test_an_index_outside_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match="expected 0 <= index < 400"):
        sampler_of(varied_pack())[index]


def test_an_empty_pack_is_refused() -> None:
    with pytest.raises(DataError, match="training pack: expected data"):
        sampler_of(pack_of())


def test_a_mix_that_the_pack_cannot_serve_is_refused() -> None:
    with pytest.raises(DataError, match=r"expected data for one of \['fod'\]"):
        sampler_of(varied_pack(), mix={"fod": 1.0})


@pytest.mark.parametrize("mix", [{"videos": 1.0}, {"video": -1.0}])
def test_a_bad_mix_is_refused(mix: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="mix: expected weights >= 0 of"):
        sampler_of(varied_pack(), mix=mix)


@pytest.mark.data
def test_the_research_pack_makes_pairs(tmp_path: Path, data_pack: Path) -> None:
    for part in ("images_with_masks/coco_mini", "videos/davis_cows", "videos/u_sam2_01_dog"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).symlink_to(data_pack / "train" / part)
    detections = data_pack / "train" / "videos" / "boxes.jsonl"
    (tmp_path / "videos" / "boxes.jsonl").symlink_to(detections)
    sampler = sampler_of(read_training_pack(tmp_path))

    for index in range(200):
        pair = sampler[index]

        centre = pair["search_bbox_cxcywh"][:2]
        assert ((centre > 0) & (centre < 1)).all()
        assert pair["template"].any()
        assert pair["search_region"].any()
