import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_packs import (
    CROPS,
    DARK,
    moving_clip,
    noisy_clip,
    noisy_still,
    pack_of,
    sampler_of,
    varied_pack,
)

from edgetrack.crops import Cropper, CropWindow
from edgetrack.errors import DataError
from edgetrack.train.rollouts import RunSampler, cut_windows


def runs_of(pack: Any, *, num_frames: int = 5, **options: Any) -> RunSampler:
    return RunSampler(sampler_of(pack, **{"batch_size": 6, **options}), num_frames=num_frames)


def digest(batch: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in batch.values())).hexdigest()


def test_a_batch_of_runs_has_the_shapes_that_it_says() -> None:
    batch = runs_of(varied_pack()).batch(0)

    side = int(CROPS.search_size_px * 1.5)
    assert {name: (tuple(v.shape), v.dtype) for name, v in batch.items()} == {
        "frames": ((6, 5, side, side, 3), torch.uint8),
        "bboxes_cxcywh": ((6, 5, 4), torch.float32),
    }


def test_the_boxes_enclose_the_target_in_every_frame() -> None:
    batch = runs_of(pack_of(clips={"video": (moving_clip(num_frames=12),)}), num_frames=8).batch(1)

    side = batch["frames"].shape[2]
    centres = np.arange(side) + 0.5
    for frame, bbox in zip(
        batch["frames"].flatten(0, 1).numpy(), batch["bboxes_cxcywh"].flatten(0, 1), strict=True
    ):
        share = np.clip((frame.mean(2) - DARK) / (255.0 - DARK), 0, 1)
        row, column = share[share.sum(1).argmax()], share[:, share.sum(0).argmax()]
        found = [row @ centres / row.sum(), column @ centres / column.sum()]
        found += [row.sum(), column.sum()]
        np.testing.assert_allclose(bbox.numpy() * side, found, atol=0.75)


def test_all_frames_of_a_run_are_seen_from_one_place() -> None:
    """The clip moves a pixel to the right per frame: so does its target in the window."""
    clip = moving_clip(num_frames=40)
    batch = runs_of(pack_of(clips={"video": (clip,)}), num_frames=6, batch_size=16).batch(0)

    steps = batch["bboxes_cxcywh"][..., 0].diff(dim=1)
    # The middle moves by one pixel or, as the target grows, by one and a half.
    assert (steps.abs().amax(1) / steps.abs().amin(1) < 1.6).all()
    is_one_way = (steps > 0).all(1) | (steps < 0).all(1)
    assert 10 <= is_one_way.sum() < 16  # some turn back at an end of the clip
    assert {bool(v) for v in steps[is_one_way][:, 0] > 0} == {True, False}  # mirrored, or not


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    pack = varied_pack()
    batch = runs_of(pack).batch(3)

    assert digest(runs_of(pack).batch(3)) == digest(batch)
    assert digest(next(iter(runs_of(pack).batches(3, 1)))) == digest(batch)
    assert digest(runs_of(pack).batch(4)) != digest(batch)
    assert digest(runs_of(pack, seed=4).batch(3)) != digest(batch)


def test_the_rows_of_all_ranks_are_the_batch_of_one() -> None:
    sampler = runs_of(varied_pack())
    whole = sampler.batch(2)

    for rank in range(3):
        for name, value in sampler.batch(2, rank=rank, num_ranks=3).items():
            assert torch.equal(value, whole[name][rank::3])


def test_a_short_clip_is_walked_to_and_fro() -> None:
    sampler = sampler_of(pack_of(clips={"video": (moving_clip(num_frames=3),)}), batch_size=9)

    images, boxes = sampler.draw_runs(np.random.default_rng(0), num_frames=7)

    assert images.shape == (9, 7)
    assert (np.abs(np.diff(images, axis=1)) == 1).all()
    assert set(images.ravel()) == {0, 1, 2}
    np.testing.assert_array_equal(boxes[..., 0], 100 + images)


def test_stills_are_no_runs_and_clips_are_drawn_by_the_mix() -> None:
    clips = {"video": (moving_clip(),), "tracks": (noisy_clip("street#0", num_frames=9),)}
    pack = pack_of(pictures={"coco_mini": (noisy_still(),)}, clips=clips)
    mix = {"video": 3.0, "tracks": 1.0, "coco_mini": 50.0}

    images, _ = sampler_of(pack, batch_size=400, mix=mix).draw_runs(
        np.random.default_rng(0), num_frames=4
    )

    is_video = (images >= 1) & (images <= 12)
    assert 0.68 < is_video.mean() < 0.82
    assert images.min() >= 1


def test_a_pack_without_clips_has_no_runs() -> None:
    sampler = runs_of(pack_of(pictures={"coco_mini": (noisy_still(),)}))

    with pytest.raises(DataError, match="expected clips to follow a target in, got none"):
        sampler.batch(0)


def test_a_run_has_at_least_two_frames() -> None:
    with pytest.raises(ValueError, match=r"^num_frames: expected at least 2, got 1"):
        runs_of(varied_pack(), num_frames=1)


def test_a_window_is_cut_as_the_tracker_cuts_it() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    frame = np.repeat(np.repeat(frame[::9, ::9], 9, 0), 9, 1)
    window = CropWindow(left_px=-10, top_px=21, side_px=48)
    expected = np.zeros((64, 64, 3), np.uint8)
    Cropper(64).crop(frame, window, out=expected)

    centre = torch.tensor([[(-10 + 24) / 90, (21 + 24) / 90, 48 / 90]])
    frames = torch.from_numpy(frame[None, ..., ::-1].copy())
    got = cut_windows(frames, centre, size_px=64)[0].numpy()

    inside = np.s_[:, 14:]  # OpenCV mixes the black beside the frame another way
    assert np.abs(got[inside].astype(int) - expected[inside]).max() <= 1
    assert not got[:, :12].any()
