"""Several templates per pair: what they show, and that the first one does not depend on them."""

import numpy as np
import torch
from training_packs import (
    CROPS,
    DARK,
    UInt8Array,
    batch_of,
    lazy,
    moving_clip,
    noisy_clip,
    noisy_still,
    pack_of,
    sampler_of,
    varied_pack,
)

from edgetrack.train.augment import Augmentation


def width_of_white(crop: UInt8Array) -> float:
    share = np.clip((crop.mean(2) - DARK) / (255.0 - DARK), 0, 1)
    return float(share[len(share) // 2].sum())


def test_more_templates_change_no_bit_of_the_pair() -> None:
    pack = varied_pack()
    one, several = batch_of(pack, 2), batch_of(pack, 2, num_templates=4)

    for name, value in one.items():
        np.testing.assert_array_equal(several[name], value)
    assert several.keys() - one.keys() == {"templates", "templates_bbox_cxcywh"}


def test_the_first_of_several_templates_is_the_template() -> None:
    batch = batch_of(varied_pack(), num_templates=3, batch_size=5)

    side = CROPS.template_size_px
    assert batch["templates"].shape == (5, 3, side, side, 3)
    assert batch["templates_bbox_cxcywh"].shape == (5, 3, 4)
    np.testing.assert_array_equal(batch["templates"][:, 0], batch["template"])
    np.testing.assert_array_equal(
        batch["templates_bbox_cxcywh"][:, 0], batch["template_bbox_cxcywh"]
    )


def test_later_templates_are_frames_on_the_way_to_the_search_region() -> None:
    """The target is a pixel wider every fourth frame, and crops are scaled by its size: so the
    box's shape tells the frame."""
    pack = pack_of(clips={"video": (moving_clip(num_frames=60),)})
    batch = batch_of(
        pack, num_templates=5, batch_size=40, augmentation=Augmentation.none(), absent_rate=0.0
    )

    def aspect(boxes: np.ndarray) -> np.ndarray:
        return np.asarray(boxes[..., 2] / boxes[..., 3])

    templates = aspect(batch["templates_bbox_cxcywh"])
    search = aspect(batch["search_bbox_cxcywh"])[:, None]
    direction = np.sign(search - templates[:, :1])
    steps = np.diff(np.concatenate([templates, search], 1), axis=1)
    assert (steps * direction >= -1e-6).all()
    moved = direction[:, 0] != 0
    assert moved.sum() > 20
    is_between = (templates != templates[:, :1]) & (np.abs(templates - search) > 1e-6)
    assert is_between[moved].any(1).sum() > 10
    for crops, boxes in zip(batch["templates"], batch["templates_bbox_cxcywh"], strict=True):
        for crop, bbox in zip(crops, boxes, strict=True):
            assert abs(width_of_white(crop) - bbox[2] * CROPS.template_size_px) < 1


def test_later_templates_of_a_still_are_seen_anew() -> None:
    pack = pack_of(pictures={"coco_mini": (noisy_still(),)})

    batch = batch_of(pack, num_templates=3, batch_size=8)

    first, second, third = np.moveaxis(batch["templates"].astype(int), 1, 0)
    assert np.abs(first - second).mean() > 1
    assert np.abs(second - third).mean() > 1


def test_frames_of_later_templates_are_decoded_on_demand() -> None:
    clip = noisy_clip("street", num_frames=30)
    options = {"num_templates": 4, "batch_size": 6}

    resident = batch_of(pack_of(clips={"video": (clip,)}), **options)
    decoded = batch_of(pack_of(clips={"video": (lazy(clip),)}), **options)

    for name in ("templates", "templates_bbox_cxcywh"):
        np.testing.assert_array_equal(decoded[name], resident[name])


def test_an_absent_target_has_templates_of_one_other_object() -> None:
    """White squares are searched where dark noise was shown, or the other way round."""
    pack = pack_of(
        clips={"video": (moving_clip("car_01"),), "tracks": (noisy_clip("dog#0", num_frames=9),)}
    )
    batch = batch_of(
        pack,
        num_templates=3,
        batch_size=24,
        absent_rate=1.0,
        augmentation=Augmentation.none(),
        mix={"video": 1.0, "tracks": 1.0},
    )

    middle = batch["templates"].shape[2] // 2
    is_white = (batch["templates"][:, :, middle, middle] == 255).all(-1)
    assert (is_white == is_white[:, :1]).all()
    assert 0 < is_white[:, 0].sum() < 24


def test_the_rows_of_all_ranks_are_the_batch_of_one() -> None:
    sampler = sampler_of(varied_pack(), batch_size=12, num_templates=3)
    whole = sampler.batch(2)

    for rank in range(3):
        for name, value in sampler.batch(2, rank=rank, num_ranks=3).items():
            assert torch.equal(value, whole[name][rank::3]), name
