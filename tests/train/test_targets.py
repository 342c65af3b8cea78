import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from training_packs import (
    batch_of,
    centres_of,
    moving_clip,
    pack_of,
    picture_of,
    sampler_of,
    solid,
    still,
    varied_pack,
)

from edgetrack.data.folder import Clip
from edgetrack.errors import DataError
from edgetrack.train.augment import Augmentation
from edgetrack.train.sampling import DEFAULT_MIX


def test_frames_without_the_object_are_not_sampled() -> None:
    clip = moving_clip()
    boxes = clip.boxes_xywh.copy()
    boxes[3:] = np.nan
    pack = pack_of(clips={"video": (dataclasses.replace(clip, boxes_xywh=boxes),)})

    batch = batch_of(pack)

    assert np.isfinite(batch["template_bbox_cxcywh"]).all()
    assert np.isfinite(batch["search_bbox_cxcywh"]).all()


@pytest.mark.parametrize(("group", "rate", "is_far"), [("video", 1, True), ("video", 0, False),
                                                       ("tracks", 1, False)])  # fmt: skip
def test_only_labelled_clips_have_far_pairs(group: str, rate: float, is_far: bool) -> None:
    """A target that grows by a pixel per frame tells how far its frames are apart."""
    boxes = [(40, 40, 20 + i, 20) for i in range(100)]
    image = picture_of(boxes[50])
    clip = Clip("a", (image,) * 100, np.array(boxes, np.float32))
    how = dataclasses.replace(Augmentation.none(), far_gap_rate=rate)

    batch = batch_of(
        pack_of(clips={group: (clip,)}), mix={group: 1}, augmentation=how, absent_rate=0
    )

    w, h = batch["template_bbox_cxcywh"][:, 2:].T
    sw, sh = batch["search_bbox_cxcywh"][:, 2:].T
    gaps = np.abs(20 * w / h - 20 * sw / sh).round()
    assert (gaps.max() > 20) == is_far
    assert gaps.max() > 10


def test_an_absent_pair_shows_another_object_in_the_template() -> None:
    red, green = still(bgr=(0, 0, 255)), still(bgr=(0, 255, 0))

    batch = batch_of(
        pack_of(pictures={"coco_mini": (red, green)}),
        augmentation=Augmentation.none(),
        absent_rate=1.0,
    )

    assert not batch["is_present"].any()
    colours = centres_of(batch["template"]).astype(int) + centres_of(batch["search_region"])
    assert (colours == [255, 255, 0]).all()


def test_hard_absent_pairs_show_two_cutouts_of_one_kind() -> None:
    kinds = {"coco_mini": ((0, 0, 200), (0, 0, 120)), "bsds500": ((0, 200, 0), (0, 120, 0))}
    pack = pack_of(
        pictures={kind: (still(), still()) for kind in kinds},
        cutouts=tuple(solid(bgr, kind) for kind, pair in kinds.items() for bgr in pair),
    )

    batch = batch_of(
        pack,
        mix={"coco_mini": 1.0},
        augmentation=Augmentation.none(),
        absent_rate=1.0,
        batch_size=400,
    )

    shown, sought = centres_of(batch["search_region"]), centres_of(batch["template"])
    is_hard = (shown == 0).any(1)
    assert not batch["is_present"][is_hard].any()
    assert is_hard.mean() == pytest.approx(0.4 / 2, abs=0.07)  # half of them draw one twice
    assert_array_equal(shown[is_hard] > 0, sought[is_hard] > 0)
    assert (shown[is_hard] != sought[is_hard]).any(1).all()


def test_cutouts_of_clips_make_no_hard_absent_pairs() -> None:
    """They may show one object twice."""
    pack = pack_of(
        cutouts=(solid((0, 0, 200), "video"), solid((0, 200, 0), "video")),
        clips={"video": (moving_clip(),)},
    )

    batch = batch_of(pack, mix={"paste": 1.0}, absent_rate=1.0)

    assert batch["is_present"].all()


def test_a_pair_is_absent_at_the_given_rate() -> None:
    batch = batch_of(varied_pack(), absent_rate=0.25, batch_size=400)

    assert 1 - batch["is_present"].mean() == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize(
    ("names", "is_present"),
    [(("car_01", "car_02"), True), (("car_000001", "car_000002"), False)],
)
def test_pieces_of_one_video_never_make_an_absent_pair(
    names: tuple[str, str], is_present: bool
) -> None:
    clips = tuple(moving_clip(name) for name in names)

    batch = batch_of(pack_of(clips={"video": clips}), absent_rate=1.0)

    assert (batch["is_present"] == is_present).all()


def test_every_source_of_the_default_mix_makes_pairs() -> None:
    pack = varied_pack()
    served = [name for name in DEFAULT_MIX if name in ("paste", "rbox", "coco_mini", "video")]

    for source in served:
        batch = batch_of(pack, mix={source: 1.0})

        centre = batch["search_bbox_cxcywh"][:, :2]
        assert ((centre > 0) & (centre < 1)).all()


def test_sources_are_drawn_by_their_weights() -> None:
    pack = pack_of(
        pictures={"a": (still(bgr=(0, 0, 255)),), "b": (still(bgr=(0, 255, 0)),)},
        clips={"video": (moving_clip(),)},
    )

    batch = batch_of(
        pack,
        mix={"a": 3.0, "b": 1.0, "fod": 9.0},
        augmentation=Augmentation.none(),
        absent_rate=0,
        batch_size=400,
    )

    is_red = (centres_of(batch["template"]) == [255, 0, 0]).all(1)
    assert is_red.mean() == pytest.approx(0.75, abs=0.07)


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
