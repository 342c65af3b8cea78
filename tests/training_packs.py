"""Tiny training packs, and batches from them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edgetrack.bundle import CropSpec
from edgetrack.data.folder import Clip, Cutout, Picture, TrainingPack
from edgetrack.train.sampling import PairSampler

UInt8Array = npt.NDArray[np.uint8]
Batch = dict[str, npt.NDArray[Any]]
CROPS = CropSpec(template_size_px=64, template_factor=2, search_size_px=128, search_factor=4)
DARK = 20


class LazyFrames(Sequence[UInt8Array]):
    """Frames that are made when they are asked for."""

    def __init__(self, frames: tuple[UInt8Array, ...]) -> None:
        self.frames, self.num_decoded = frames, 0

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: Any) -> Any:
        self.num_decoded += 1
        return self.frames[index].copy()


def picture_of(
    bbox_xywh: tuple[int, int, int, int],
    *,
    bgr: tuple[int, int, int] = (255, 255, 255),
    size: tuple[int, int] = (240, 320),
) -> UInt8Array:
    x, y, w, h = bbox_xywh
    image = np.full((*size, 3), DARK, np.uint8)
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


def still(
    *,
    bgr: tuple[int, int, int] = (255, 255, 255),
    bbox: tuple[int, int, int, int] = (140, 90, 50, 36),
) -> Picture:
    return Picture(picture_of(bbox, bgr=bgr), np.array([bbox], np.float32))


def noise_of(seed: int, *shape: int) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def noisy_still(seed: int = 0, *, bbox: tuple[int, ...] = (141, 93, 50, 36)) -> Picture:
    return Picture(cv2.blur(noise_of(seed, 240, 320, 3), (3, 3)), np.array([bbox], np.float32))


def moving_clip(name: str = "car_01", *, num_frames: int = 12) -> Clip:
    boxes = [(100 + i, 80 + i // 2, 40 + i // 4, 30) for i in range(num_frames)]
    return Clip(name, tuple(picture_of(b) for b in boxes), np.array(boxes, np.float32))


def noisy_clip(name: str, *, num_frames: int) -> Clip:
    seed = sum(name.encode())
    images = tuple(noise_of(seed + i, 90, 120, 3) for i in range(num_frames))
    boxes = [(30 + i % 40, 20, 30, 40) for i in range(num_frames)]
    return Clip(name, images, np.array(boxes, np.float32))


def lazy(clip: Clip) -> Clip:
    return dataclasses.replace(clip, images=LazyFrames(clip.images))


def solid(bgr: tuple[int, int, int], kind: str, *, size: tuple[int, int] = (30, 40)) -> Cutout:
    return Cutout(np.full((*size, 4), (*bgr, 255), np.uint8), kind)


def varied_pack() -> TrainingPack:
    cutout = noise_of(1, 30, 40, 4)
    cutout[..., 3] |= 128
    return pack_of(
        pictures={"coco_mini": (still(), noisy_still(5))},
        clips={"video": (moving_clip(),), "tracks": (noisy_clip("street#0", num_frames=9),)},
        cutouts=(Cutout(cutout, "coco_mini"), Cutout(cutout[::-1], "video")),
        backgrounds=(noise_of(0, 120, 160, 3),),
    )


def sampler_of(pack: TrainingPack, **options: Any) -> PairSampler:
    return PairSampler(pack, **{"crops": CROPS, "seed": 3, "batch_size": 32, **options})


def batch_of(pack: TrainingPack, step: int = 0, **options: Any) -> Batch:
    return {k: v.numpy() for k, v in sampler_of(pack, **options).batch(step).items()}


def centres_of(crops: UInt8Array) -> UInt8Array:
    middle = crops.shape[1] // 2
    return crops[:, middle, middle]
