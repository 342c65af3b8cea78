"""Pairs of crops to train on: a template, and a search region that shows the same object.

A pair comes from one of several sources, drawn by weight: two frames of a clip, a still picture
seen twice, a cutout pasted onto two backgrounds, a textured box in a picture that nobody
labelled. Pair ``i`` of a seed is the same whichever worker makes it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypedDict, TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from edgetrack.boxes import cxcywh_to_xywh, xywh_to_cxcywh
from edgetrack.bundle import CropSpec
from edgetrack.crops import CropWindow
from edgetrack.data.folder import Clip, Cutout, TrainingPack
from edgetrack.errors import DataError
from edgetrack.train.augment import (
    Augmentation,
    View,
    add_distractors,
    add_occluder,
    change_light,
    paste,
    rotate_cutout,
)

__all__ = ["DEFAULT_MIX", "Pair", "PairSampler", "worker_init"]

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
Rng = np.random.Generator
T = TypeVar("T")

DEFAULT_MIX: Mapping[str, float] = MappingProxyType(
    {
        "video": 0.20,
        "fod": 0.12,
        "tracks": 0.06,
        "extra": 0.08,
        "coco_mini": 0.16,
        "map_demo": 0.06,
        "ccp_people": 0.04,
        "bsds500": 0.08,
        "imagenet_sample": 0.10,
        "paste": 0.20,
        "rbox": 0.10,
    }
)
_CUTOUT_MIX = MappingProxyType(
    {"coco_mini": 0.4, "ccp_people": 0.2, "bsds500": 0.25, "video": 0.15}
)
_MAX_GAP_FRAMES = 20
_MIN_SIDE_PX = 6
_MIN_BACKGROUND_PX = 24
_SCENE_STEP = 8  # neighbouring frames of a clip are nearly the same scene
_PIECE_NUMBER = re.compile(r"[_#]\d+\w*$")  # uav_car16_2_05 is the fifth piece of one video


class Pair(TypedDict):
    """One training example; sizes Ht, Hs are those of the crops.

    Attributes:
        template: ``(Ht, Ht, 3)``, uint8, RGB.
        search_region: ``(Hs, Hs, 3)``, uint8, RGB.
        template_bbox_cxcywh: ``(4,)``, float32, normalised to the template.
        search_bbox_cxcywh: ``(4,)``, float32, normalised to the search region; its centre lies
            inside, its edges may not. Meaningless where the target is absent.
        is_present: ``()``, float32: 1, or 0 where the template shows another object.
    """

    template: UInt8Array
    search_region: UInt8Array
    template_bbox_cxcywh: Float32Array
    search_bbox_cxcywh: Float32Array
    is_present: Float32Array


@dataclass(frozen=True)
class _Frames:
    """An object in two frames, or in one picture twice; ``owner`` is the video or picture."""

    owner: object
    template_image: UInt8Array
    template_bbox_xywh: Float32Array
    search_image: UInt8Array
    search_bbox_xywh: Float32Array
    is_video: bool


@dataclass(frozen=True)
class _Look:
    """What the crops of a pair have in common."""

    is_mirrored: bool
    is_search_mirrored: bool
    is_grey: bool


_Target = _Frames | Cutout


@dataclass(frozen=True)
class _Crop:
    """Pixels ``(S, S, 3)`` BGR, the box normalised to them, and where they show the frame.

    ``inside`` is ``None`` where nothing of the crop is padding.
    """

    pixels: UInt8Array
    bbox_cxcywh: Float32Array
    inside: UInt8Array | None = None


class PairSampler:
    """A map-style data set of pairs, for ``torch.utils.data.DataLoader`` or a plain loop.

    Workers should start by fork: then they share the memory of the pack.

    Args:
        pack: Pictures, clips, cutouts.
        crops: Sizes and factors of the crops.
        seed: Pair ``i`` depends on ``(seed, i)`` alone.
        num_pairs: Its length.
        mix: Source → weight: a set or a group of clips of the pack, ``paste``, ``rbox`` or
            ``extra``. Sources that the pack lacks are left out, and the others scaled up.
        augmentation: How strongly the crops are changed.
        absent_rate: Share of pairs whose search region does not show the target.
        extra_clips: More clips, such as rendered ones.

    Raises:
        ValueError: A source of the mix is unknown, or its weight is negative.
        DataError: The pack has nothing for the mix.
    """

    def __init__(
        self,
        pack: TrainingPack,
        *,
        crops: CropSpec,
        seed: int,
        num_pairs: int,
        mix: Mapping[str, float] = DEFAULT_MIX,
        augmentation: Augmentation | None = None,
        absent_rate: float = 0.05,
        extra_clips: Sequence[Clip] = (),
    ) -> None:
        self.crops = crops
        self.seed = seed
        self.num_pairs = num_pairs
        self.augmentation = Augmentation() if augmentation is None else augmentation
        self.absent_rate = absent_rate
        self._unlabelled = pack.backgrounds
        clips = {**pack.clips, "extra": tuple(extra_clips)}
        self._clips = {group: _with_frames(members) for group, members in clips.items()}
        self._boxes = {
            name: [(p.image, bbox) for p in pictures for bbox in p.boxes_xywh]
            for name, pictures in pack.pictures.items()
        }
        self._scenes = _scenes(pack, extra_clips)
        self._cutouts: dict[str, list[Cutout]] = {}
        for cutout in pack.cutouts:
            self._cutouts.setdefault(cutout.kind, []).append(cutout)
        self._all_cutouts = pack.cutouts
        self._sources = self._available(mix)
        self._kinds = {kind: _CUTOUT_MIX.get(kind, 0.25) for kind in self._cutouts}

    def __len__(self) -> int:
        return self.num_pairs

    def __getitem__(self, index: int) -> Pair:
        """Make one pair.

        Raises:
            IndexError: It lies outside the data set.
        """
        if not 0 <= index < self.num_pairs:
            raise IndexError(f"pair: expected 0 <= index < {self.num_pairs}, got {index}")
        rng = np.random.default_rng((self.seed, index))
        target = self._draw_target(rng)
        other = self._draw_other(rng, target) if rng.random() < self.absent_rate else None
        how = self.augmentation
        is_mirrored = rng.random() < how.flip_rate
        look = _Look(
            is_mirrored=is_mirrored,
            is_search_mirrored=is_mirrored != (rng.random() < how.single_flip_rate),
            is_grey=rng.random() < how.grey_rate,
        )
        template = self._template(rng, other or target, look)
        search_region = self._search_region(rng, target, look)
        return Pair(
            template=_finish(template, how, look, is_strong=False, rng=rng),
            search_region=_finish(search_region, how, look, is_strong=True, rng=rng),
            template_bbox_cxcywh=template.bbox_cxcywh,
            search_bbox_cxcywh=search_region.bbox_cxcywh,
            is_present=np.array(other is None, np.float32),
        )

    def _available(self, mix: Mapping[str, float]) -> dict[str, float]:
        """The part of a mix that the data can serve."""
        known = {*DEFAULT_MIX, *self._boxes, *self._clips}
        for name, weight in mix.items():
            if name not in known or weight < 0:
                raise ValueError(
                    f"mix: expected weights >= 0 of {sorted(known)}, got {name!r}: {weight!r}"
                )
        data: dict[str, Sequence[object]] = {**self._boxes, **self._clips}
        data |= {"paste": self._all_cutouts, "rbox": self._unlabelled}
        available = {name: weight for name, weight in mix.items() if weight and data.get(name)}
        if not available:
            raise DataError(
                f"training pack: expected data for one of {sorted(mix)}, got none; "
                "check the folder, or name other sources in the mix"
            )
        return available

    def _draw_target(self, rng: Rng) -> _Target:
        source = _draw(rng, self._sources)
        if source == "paste":
            return _pick(rng, self._cutouts[_draw(rng, self._kinds)])
        if source in self._clips:
            clip, frames = _pick(rng, self._clips[source])
            first = int(rng.integers(len(frames)))
            gap = int(rng.integers(-_MAX_GAP_FRAMES, _MAX_GAP_FRAMES + 1))
            second = min(max(first + gap, 0), len(frames) - 1)
            i, j = frames[first], frames[second]
            owner = _PIECE_NUMBER.sub("", clip.name)
            boxes = clip.boxes_xywh
            return _Frames(owner, clip.images[i], boxes[i], clip.images[j], boxes[j], True)
        if source == "rbox":
            images = self._unlabelled if rng.random() < 0.75 else self._scenes
            image = _pick(rng, images)
            bbox = _textured_box(rng, image)
        else:
            image, bbox = _pick(rng, self._boxes[source])
        return _Frames(id(image), image, bbox, image, bbox, False)

    def _draw_other(self, rng: Rng, target: _Target) -> _Target | None:
        """Another target that the search region of this one is unlikely to show."""
        for _ in range(8):
            other = self._draw_target(rng)
            if isinstance(other, Cutout) or isinstance(target, Cutout):
                if other is not target:
                    return other
            elif other.owner != target.owner:
                return other
        return None

    def _template(self, rng: Rng, target: _Target, look: _Look) -> _Crop:
        how, size = self.augmentation, self.crops.template_size_px
        std = how.template_jitter_std if rng.random() < how.template_jitter_rate else 0.0
        shift_x, shift_y, log_scale = (rng.standard_normal(3) * std).tolist()
        if isinstance(target, Cutout):
            side = size / self.crops.template_factor * math.exp(log_scale)
            centre = (size / 2 + shift_x * side, size / 2 + shift_y * side)
            crop = self._background(rng, size_px=size, zoom=0.5)
            bbox = _box_of(target.bgra, side=side, centre=centre)
            paste(crop, _mirror(target.bgra, look.is_mirrored), bbox)
            return _Crop(crop, _normalised(bbox, size))
        x, y, w, h = target.template_bbox_xywh.tolist()
        side, scale = math.sqrt(w * h), math.exp(log_scale)
        centre_x, centre_y = x + w / 2 + shift_x * side, y + h / 2 + shift_y * side
        w, h = w * scale, h * scale
        jittered = np.array([centre_x - w / 2, centre_y - h / 2, w, h])
        window = CropWindow.around(jittered, factor=self.crops.template_factor)
        view = View.of_window(window, size_px=size)
        view = view.mirrored() if look.is_mirrored else view
        crop = view.cut(target.template_image, smooth=rng.random() < 0.5)
        bbox_cxcywh = view.to_crop(target.template_bbox_xywh)
        return _Crop(crop, bbox_cxcywh, view.inside(target.template_image))

    def _search_region(self, rng: Rng, target: _Target, look: _Look) -> _Crop:
        how, size = self.augmentation, self.crops.search_size_px
        side = size / self.crops.search_factor * math.exp(rng.normal(0, how.scale_std))
        reach = how.offset_sides if rng.random() < 0.7 else how.near_offset_sides
        limit = size / 2 - side / 4
        offsets = np.clip(rng.uniform(-1, 1, 2) * reach * side, -limit, limit)
        centre_x, centre_y = (size / 2 + offsets).tolist()
        if isinstance(target, Cutout):
            return self._pasted(rng, target, look, side=side, centre=(centre_x, centre_y))
        view = self._view(rng, target, side=side, centre=(centre_x, centre_y))
        view = view.mirrored() if look.is_search_mirrored else view
        is_filled = rng.random() < how.border_fill_rate
        border = self._background(rng, size_px=size) if is_filled else None
        crop = view.cut(target.search_image, smooth=rng.random() < 0.5, border=border)
        bbox_cxcywh = view.to_crop(target.search_bbox_xywh)
        bbox_xywh = cxcywh_to_xywh(bbox_cxcywh * size)
        if rng.random() < how.distractor_rate:
            self._distract(rng, crop, bbox_xywh, count=int(rng.integers(1, 3)), kind=None)
        self._occlude(rng, crop, bbox_xywh)
        inside = None if is_filled else view.inside(target.search_image)
        return _Crop(crop, bbox_cxcywh, inside)

    def _view(self, rng: Rng, target: _Frames, *, side: float, centre: tuple[float, float]) -> View:
        """The view that shows the target at ``centre`` with a root of its area of ``side``."""
        how, size = self.augmentation, self.crops.search_size_px
        x, y, w, h = target.search_bbox_xywh.tolist()
        scale = side / math.sqrt(w * h)
        angle = how.angle_rad(rng, is_video=target.is_video)
        middle = (x + w / 2, y + h / 2)
        if not angle and rng.random() < how.run_time_rate:
            previous = size / scale / self.crops.search_factor
            left = middle[0] + (size / 2 - centre[0]) / scale - previous / 2
            top = middle[1] + (size / 2 - centre[1]) / scale - previous / 2
            previous_xywh = np.array([left, top, previous, previous])
            window = CropWindow.around(previous_xywh, factor=self.crops.search_factor)
            return View.of_window(window, size_px=size)
        std = how.video_aspect_std if target.is_video else how.aspect_std
        aspect = math.exp(rng.normal(0, std))
        return View.placing(
            middle,
            at_px=centre,
            scale_xy=(scale / aspect, scale * aspect),
            angle_rad=angle,
            size_px=size,
        )

    def _pasted(
        self, rng: Rng, cutout: Cutout, look: _Look, *, side: float, centre: tuple[float, float]
    ) -> _Crop:
        """A search region made of a background, distractors and a cutout, in this order."""
        how, size = self.augmentation, self.crops.search_size_px
        bgra = cutout.bgra
        scale = side / math.sqrt(bgra.shape[0] * bgra.shape[1])
        if angle := how.angle_rad(rng, is_video=False):
            bgra = rotate_cutout(bgra, angle)
        side = scale * math.sqrt(bgra.shape[0] * bgra.shape[1])
        aspect = math.exp(rng.normal(0, how.video_aspect_std))
        bbox = _box_of(bgra, side=side, centre=centre, aspect=aspect)
        crop = self._background(rng, size_px=size)
        if how.distractor_rate:
            self._distract(rng, crop, bbox, count=int(rng.integers(4)), kind=cutout.kind)
        paste(crop, _mirror(bgra, look.is_search_mirrored), bbox)
        self._occlude(rng, crop, bbox)
        return _Crop(crop, _normalised(bbox, size))

    def _background(self, rng: Rng, *, size_px: int, zoom: float = 1.0) -> UInt8Array:
        image = _pick(rng, self._scenes)
        height, width = image.shape[:2]
        side = max(int(min(height, width) * rng.uniform(0.35, 1) * zoom), _MIN_BACKGROUND_PX)
        left = int(rng.integers(max(width - side, 0) + 1))
        top = int(rng.integers(max(height - side, 0) + 1))
        return View.of_window(CropWindow(left, top, side), size_px=size_px).cut(image, smooth=True)

    def _distract(
        self, rng: Rng, crop: UInt8Array, bbox_xywh: Float32Array, *, count: int, kind: str | None
    ) -> None:
        """Write up to ``count`` distractors into a crop; 40 % of them of one kind, if given."""

        def draw_cutout() -> UInt8Array:
            own = self._cutouts[kind] if kind and rng.random() < 0.4 else self._all_cutouts
            return _pick(rng, own).bgra

        if self._all_cutouts:
            add_distractors(crop, bbox_xywh, count=count, draw_cutout=draw_cutout, rng=rng)

    def _occlude(self, rng: Rng, crop: UInt8Array, bbox_xywh: Float32Array) -> None:
        if self._all_cutouts and rng.random() < self.augmentation.occluder_rate:
            bgra = _pick(rng, self._all_cutouts).bgra
            add_occluder(crop, bbox_xywh, bgra=bgra, rng=rng)


def worker_init(worker_id: int) -> None:
    """Keep OpenCV to one thread; pass as ``worker_init_fn`` of a ``DataLoader``."""
    cv2.setNumThreads(0)


def _finish(
    crop: _Crop, how: Augmentation, look: _Look, *, is_strong: bool, rng: Rng
) -> UInt8Array:
    """The crop in RGB, its light changed."""
    pixels = change_light(crop.pixels, how, is_grey=look.is_grey, is_strong=is_strong, rng=rng)
    rgb = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    if crop.inside is not None:  # no light changes the black that the tracker pads with
        rgb = cv2.bitwise_and(rgb, rgb, mask=crop.inside)
    return np.asarray(rgb, np.uint8)


def _pick(rng: Rng, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def _draw(rng: Rng, weights: Mapping[str, float]) -> str:
    """Draw a key by its weight."""
    rest = rng.random() * sum(weights.values())
    for name, weight in weights.items():
        rest -= weight
        if rest < 0:
            return name
    return name


def _with_frames(clips: Sequence[Clip]) -> list[tuple[Clip, npt.NDArray[np.intp]]]:
    """The clips in which the object is seen twice or more, each with those frames."""
    found = []
    for clip in clips:
        # a comparison with NaN is false, and warns of nothing
        frames = np.flatnonzero((clip.boxes_xywh[:, 2:] >= _MIN_SIDE_PX).all(1))
        if len(frames) > 1:
            found.append((clip, frames))
    return found


def _scenes(pack: TrainingPack, extra_clips: Sequence[Clip]) -> list[UInt8Array]:
    """All pictures, and some frames of the clips."""
    scenes = [p.image for pictures in pack.pictures.values() for p in pictures]
    known = {id(image) for image in scenes}
    scenes += [image for image in pack.backgrounds if id(image) not in known]
    for group, clips in {**pack.clips, "extra": extra_clips}.items():
        if group != "tracks":  # their frames are among the backgrounds
            scenes += [image for clip in clips for image in clip.images[::_SCENE_STEP]]
    return scenes


def _textured_box(rng: Rng, image: UInt8Array) -> Float32Array:
    """A box xywh ``(4,)`` around something: large and central, or the most textured of four."""
    height, width = image.shape[:2]
    if rng.random() < 0.3:
        w, h = width * rng.uniform(0.35, 0.7), height * rng.uniform(0.35, 0.7)
        x = (width - w) / 2 + width * rng.uniform(-0.05, 0.05)
        y = (height - h) / 2 + height * rng.uniform(-0.05, 0.05)
        return np.array([x, y, w, h], np.float32)
    best, best_contrast = np.zeros(4, np.float32), -1.0
    for _ in range(4):
        side = min(height, width) * math.exp(rng.uniform(math.log(0.08), math.log(0.45)))
        aspect = math.exp(rng.normal(0, 0.2))
        w, h = min(side * aspect, width * 0.8), min(side / aspect, height * 0.8)
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        inside = image[int(y) : int(y + h) + 1 : 3, int(x) : int(x + w) + 1 : 3, 1]
        contrast = float(inside.std())
        if contrast > best_contrast:
            best, best_contrast = np.array([x, y, w, h], np.float32), contrast
    return best


def _box_of(
    bgra: UInt8Array, *, side: float, centre: tuple[float, float], aspect: float = 1.0
) -> Float32Array:
    """Box xywh ``(4,)`` of a cutout whose root of the area is to be ``side``, at ``centre``."""
    aspect *= math.sqrt(bgra.shape[1] / bgra.shape[0])
    w, h = side * aspect, side / aspect
    return np.array([centre[0] - w / 2, centre[1] - h / 2, w, h], np.float32)


def _mirror(bgra: UInt8Array, is_mirrored: bool) -> UInt8Array:
    return bgra[:, ::-1] if is_mirrored else bgra


def _normalised(bbox_xywh: Float32Array, size_px: int) -> Float32Array:
    return np.asarray(xywh_to_cxcywh(bbox_xywh) / np.float32(size_px), np.float32)
