"""Plan batches of pairs: all that is random, decided in NumPy for a whole batch at once."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetrack.bundle import CropSpec
from edgetrack.data.folder import Clip, TrainingPack
from edgetrack.train.augment import Augmentation, Changes
from edgetrack.train.image_store import ImageIndex
from edgetrack.train.targets import Targets, TargetTable
from edgetrack.train.views import (
    Layers,
    Views,
    apply_linear,
    boxes_in_crop,
    mirrored,
    place,
    rows_of,
    turns,
    views_of_windows,
    windows_around,
)

__all__ = ["Backdrops", "CropPlan", "PairPlan", "Planner"]

BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Rng = np.random.Generator

_HARD_ABSENT_RATE = 0.4
_ALIKE_RATE = 0.4  # distractors of the target's kind, in pasted scenes
_NUM_TRIES = 8
_NUM_PLACES = 3
_MIN_BACKDROP_PX = 24
_NUM_DISTRACTORS = 3
_TARGET_LAYER, _OCCLUDER_LAYER = _NUM_DISTRACTORS, _NUM_DISTRACTORS + 1


@dataclass(frozen=True)
class Backdrops:
    """Square windows of pictures, whose sizes need not be known yet.

    Attributes:
        image: ``(N,)``, int64; -1 is none.
        side: ``(N,)``, float64: fraction of the picture's shorter side.
        corner: ``(N, 2)``, float64: left and top, fractions of what the side leaves free.
    """

    image: Int64Array
    side: Float64Array
    corner: Float64Array

    def views(self, sizes: Int64Array, *, size_px: int) -> Views:
        """What crops show of them.

        Args:
            sizes: ``(N, 2)``: height and width of the pictures; of no matter where there is none.
            size_px: Side of the crops.
        """
        side = np.maximum((sizes.min(1) * self.side).astype(int), _MIN_BACKDROP_PX)
        free = np.maximum(sizes[:, ::-1] - side[:, None], 0) + 1
        corner = np.floor(self.corner * free)
        matrix = views_of_windows(corner, side.astype(float), size_px=size_px)
        return Views(self.image, matrix, np.ones(len(side), bool))


@dataclass(frozen=True)
class CropPlan:
    """N crops.

    Attributes:
        backdrop: Lies below the view, and shows outside its picture.
        view: The picture with the target in it; none where the target is a cutout.
        layers: Cutouts.
        changes: Of the pixels.
        bbox_cxcywh: ``(N, 4)``, float32, normalised: the target.
    """

    backdrop: Backdrops
    view: Views
    layers: Layers
    changes: Changes
    bbox_cxcywh: Float32Array


@dataclass(frozen=True)
class PairPlan:
    """N pairs.

    Attributes:
        template: The first template.
        search_region: Where to find the same object.
        is_present: ``(N,)``, float32: 1, or 0 where the template shows another object.
        later_templates: Templates between the two, oldest first.
    """

    template: CropPlan
    search_region: CropPlan
    is_present: Float32Array
    later_templates: tuple[CropPlan, ...] = ()


class Planner:
    """Plan batches; arguments as for ``sampling.PairSampler``."""

    def __init__(
        self,
        pack: TrainingPack,
        extra_clips: Sequence[Clip],
        *,
        crops: CropSpec,
        mix: Mapping[str, float],
        augmentation: Augmentation,
        absent_rate: float,
        index: ImageIndex,
    ) -> None:
        self.crops, self.augmentation, self.absent_rate = crops, augmentation, absent_rate
        self.table = TargetTable(pack, extra_clips, mix=mix, index=index)
        self._cutouts, self._scenes = self.table.cutouts, self.table.scenes

    def plan(self, rng: Rng, count: int, *, num_templates: int = 1) -> PairPlan:
        """Plan ``count`` pairs; what else is drawn does not depend on ``num_templates``."""
        how = self.augmentation
        target = self.table.draw(rng, count, far_gap_rate=how.far_gap_rate)
        target, other, is_present = self._hide_some(rng, target)
        is_mirrored = rng.random(count) < how.flip_rate
        is_search_mirrored = is_mirrored ^ (rng.random(count) < how.single_flip_rate)
        is_grey = rng.random(count) < how.grey_rate
        pairs = PairPlan(
            self._template(rng, other, is_mirrored, is_grey),
            self._search_region(rng, target, other, is_search_mirrored, is_grey),
            is_present.astype(np.float32),
        )
        shares = np.sort(rng.random((num_templates - 1, count)), 0)
        later = tuple(
            self._template(rng, self.table.on_the_way(other, share), is_mirrored, is_grey)
            for share in shares
        )
        return dataclasses.replace(pairs, later_templates=later)

    def _hide_some(self, rng: Rng, target: Targets) -> tuple[Targets, Targets, BoolArray]:
        """What the search regions show, what the templates show, and whether that is the same."""
        absent = np.flatnonzero(rng.random(len(target.owner)) < self.absent_rate)
        others = self.table.draw(rng, _NUM_TRIES * len(absent), far_gap_rate=0.0)
        differs = others.owner.reshape(len(absent), _NUM_TRIES) != target.owner[absent, None]
        chosen = np.arange(len(absent)) * _NUM_TRIES + differs.argmax(1)
        is_found = differs.any(1)
        other = _replaced(target, absent[is_found], rows_of(others, chosen[is_found]))
        is_present = np.ones(len(target.owner), bool)
        is_present[absent[is_found]] = False
        hard = absent[rng.random(len(absent)) < _HARD_ABSENT_RATE]
        if len(hard) and len(self._cutouts):
            shown = self._cutouts.draw(rng, len(hard))
            sought = self._cutouts.draw_alike(rng, shown)
            fits = self._cutouts.owner[sought] != self._cutouts.owner[shown]
            hard, shown, sought = hard[fits], shown[fits], sought[fits]
            is_present[hard] = False
            target = _replaced(target, hard, self._cutouts.targets(shown))
            other = _replaced(other, hard, self._cutouts.targets(sought))
        return target, other, is_present

    def _template(
        self, rng: Rng, target: Targets, is_mirrored: BoolArray, is_grey: BoolArray
    ) -> CropPlan:
        how, size, count = self.augmentation, self.crops.template_size_px, len(is_grey)
        std = how.template_jitter_std * (rng.random((count, 1)) < how.template_jitter_rate)
        jitter = rng.standard_normal((count, 3)) * std
        shift, scale = jitter[:, :2], np.exp(jitter[:, 2])
        bbox = target.bboxes_xywh[:, 0]
        side = np.sqrt(bbox[:, 2] * bbox[:, 3])
        centre = bbox[:, :2] + bbox[:, 2:] / 2 + shift * side[:, None]
        window = windows_around(centre, side * scale * self.crops.template_factor)
        matrix = views_of_windows(*window, size_px=size)
        matrix = mirrored(matrix, is_mirrored, size_px=size)
        bbox_cxcywh = boxes_in_crop(matrix, bbox, size_px=size)
        view = Views(target.images[:, 0], matrix, rng.random(count) < 0.5)
        side = size / self.crops.template_factor * scale
        layers = Layers.empty(count, 1)
        pasted = target.cutout >= 0
        linear = self._linear(target.cutout, side, is_mirrored=is_mirrored)
        at = size / 2 + shift * side[:, None]
        boxes = self._put(layers, 0, target.cutout, linear, at, where=pasted)
        bbox_cxcywh[pasted] = boxes[pasted] / size
        backdrop = self._backdrops(rng, pasted, zoom=0.5)
        changes = Changes.draw(rng, how, is_grey=is_grey, is_strong=False)
        return CropPlan(backdrop, view, layers, changes, bbox_cxcywh)

    def _search_region(
        self,
        rng: Rng,
        target: Targets,
        other: Targets,
        is_mirrored: BoolArray,
        is_grey: BoolArray,
    ) -> CropPlan:
        how, size, count = self.augmentation, self.crops.search_size_px, len(is_grey)
        side = np.exp(rng.standard_normal(count) * how.scale_std) * size / self.crops.search_factor
        reach = np.where(rng.random(count) < 0.7, how.offset_sides, how.near_offset_sides) * side
        limit = (size / 2 - side / 4)[:, None]
        at = size / 2 + np.clip(rng.uniform(-1, 1, (count, 2)) * reach[:, None], -limit, limit)
        pasted = target.cutout >= 0
        angle = how.draw_angles_rad(rng, target.is_video)
        is_changed = target.is_video | pasted
        aspect = np.where(is_changed, how.video_aspect_std, how.aspect_std)
        aspect = np.exp(rng.standard_normal(count) * aspect)
        matrix = self._matrix(rng, target, side=side, at=at, angle_rad=angle, aspect=aspect)
        matrix = mirrored(matrix, is_mirrored, size_px=size)
        bbox_cxcywh = boxes_in_crop(matrix, target.bboxes_xywh[:, 1], size_px=size)
        view = Views(target.images[:, 1], matrix, rng.random(count) < 0.5)
        layers = Layers.empty(count, _OCCLUDER_LAYER + 1)
        linear = self._linear(
            target.cutout, side, aspect=aspect, angle_rad=angle, is_mirrored=is_mirrored
        )
        boxes = self._put(layers, _TARGET_LAYER, target.cutout, linear, at, where=pasted)
        bbox_cxcywh[pasted] = boxes[pasted] / size
        if len(self._cutouts):
            self._distract(rng, layers, bbox_cxcywh * size, target, other)
            self._occlude(rng, layers, bbox_cxcywh * size, target, other)
        is_filled = pasted | (rng.random(count) < how.border_fill_rate)
        backdrop = self._backdrops(rng, is_filled, zoom=1.0)
        changes = Changes.draw(rng, how, is_grey=is_grey, is_strong=True)
        return CropPlan(backdrop, view, layers, changes, bbox_cxcywh)

    def _matrix(
        self,
        rng: Rng,
        target: Targets,
        *,
        side: Float64Array,
        at: Float64Array,
        angle_rad: Float64Array,
        aspect: Float64Array,
    ) -> Float64Array:
        """Views that show targets at ``at``, the root of their area ``side`` wide."""
        size = self.crops.search_size_px
        bbox = target.bboxes_xywh[:, 1]
        middle = bbox[:, :2] + bbox[:, 2:] / 2
        scale = side / np.sqrt(bbox[:, 2] * bbox[:, 3])
        corner, window = windows_around(middle + (size / 2 - at) / scale[:, None], size / scale)
        run_time = views_of_windows(corner, window, size_px=size)
        scale_xy = scale[:, None] * np.stack([1 / aspect, aspect], 1)
        free = place(middle, at=at, scale_xy=scale_xy, angle_rad=angle_rad)
        is_run_time = rng.random(len(side)) < self.augmentation.run_time_rate
        return np.where((is_run_time & (angle_rad == 0))[:, None, None], run_time, free)

    def _linear(
        self,
        cutout: Int64Array,
        side: Float64Array,
        *,
        is_mirrored: BoolArray,
        aspect: Float64Array | float = 1.0,
        angle_rad: Float64Array | None = None,
    ) -> Float64Array:
        """Maps ``(N, 2, 2)`` that rotate cutouts, scale them to a root of the area, mirror them."""
        scale = side / np.sqrt(self._cutouts.size[cutout].prod(1)) if len(self._cutouts) else side
        sign = np.where(is_mirrored, -1, 1)
        scale_xy = np.stack([sign * scale * aspect, scale / aspect], 1)
        return turns(np.zeros(len(side)) if angle_rad is None else angle_rad, scale_xy)

    def _put(
        self,
        layers: Layers,
        level: int,
        cutout: Int64Array,
        linear: Float64Array,
        at: Float64Array,
        *,
        where: BoolArray,
    ) -> Float64Array:
        """Add cutouts to a level, the middles of their boxes at ``at``.

        Returns:
            The boxes ``(N, 4)``, cxcywh, crop pixels.
        """
        boxes = np.zeros((len(at), 4))
        rows = np.flatnonzero(where)
        if len(rows):
            cutout, linear = cutout[rows], linear[rows]
            points = apply_linear(linear[:, None], self._cutouts.outline[cutout])
            low, high = points.min(1), points.max(1)
            boxes[rows] = np.concatenate([at[rows], high - low], 1)
            layers.image[rows, level] = self._cutouts.image[cutout]
            layers.matrix[rows, level, :, :2] = linear
            layers.matrix[rows, level, :, 2] = at[rows] - (low + high) / 2
        return boxes

    def _distract(
        self,
        rng: Rng,
        layers: Layers,
        bbox_cxcywh: Float32Array,
        target: Targets,
        other: Targets,
    ) -> None:
        """Add objects of the target's size beside it; one that finds no place is left out."""
        count, size = len(bbox_cxcywh), self.crops.search_size_px
        pasted = target.cutout >= 0
        rate = self.augmentation.distractor_rate
        num_beside = np.where(rng.random(count) < rate, rng.integers(1, 3, size=count), 0)
        num_pasted = rng.integers(_NUM_DISTRACTORS + 1, size=count) * (rate > 0)
        number = np.where(pasted, num_pasted, num_beside)
        centre, wh = bbox_cxcywh[:, None, :2], bbox_cxcywh[:, None, 2:]
        side = np.sqrt(bbox_cxcywh[:, 2] * bbox_cxcywh[:, 3])
        for level in range(_NUM_DISTRACTORS):
            cutout = rng.integers(len(self._cutouts), size=count)
            is_alike = pasted & (rng.random(count) < _ALIKE_RATE)
            alike = self._cutouts.draw_alike(rng, np.maximum(target.cutout, 0))
            cutout = np.where(is_alike, alike, cutout)
            own_side = side * np.exp(rng.standard_normal(count) * 0.3)
            own = self._cutouts.size[cutout]
            own = own * (own_side / np.sqrt(own.prod(1)))[:, None]
            at = rng.random((count, _NUM_PLACES, 2)) * size
            is_free = (np.abs(at - centre) > 0.45 * (own[:, None] + wh)).any(2)
            at = at[np.arange(count), is_free.argmax(1)]
            is_mirrored = rng.random(count) < 0.5
            where = (level < number) & is_free.any(1) & self._differs(cutout, target, other)
            linear = self._linear(cutout, own_side, is_mirrored=is_mirrored)
            self._put(layers, level, cutout, linear, at, where=where)

    def _occlude(
        self,
        rng: Rng,
        layers: Layers,
        bbox_cxcywh: Float32Array,
        target: Targets,
        other: Targets,
    ) -> None:
        """Add objects over a part of the border of some targets."""
        count = len(bbox_cxcywh)
        cutout = rng.integers(len(self._cutouts), size=count)
        own = bbox_cxcywh[:, 2:] * rng.uniform(0.3, 0.8, (count, 2))
        angle = rng.uniform(0, 2 * np.pi, count)
        towards = np.stack([np.cos(angle), np.sin(angle)], 1)
        at = bbox_cxcywh[:, :2] + bbox_cxcywh[:, 2:] / 2 * towards
        linear = turns(np.zeros(count), own / self._cutouts.size[cutout])
        where = rng.random(count) < self.augmentation.occluder_rate
        where &= self._differs(cutout, target, other)
        self._put(layers, _OCCLUDER_LAYER, cutout, linear, at, where=where)

    def _differs(self, cutout: Int64Array, target: Targets, other: Targets) -> BoolArray:
        """Whether cutouts show neither what is searched nor what the template shows."""
        owner = self._cutouts.owner[cutout]
        is_twin = self._cutouts.has_twins[cutout]
        is_same = (cutout == target.cutout) | (cutout == other.cutout)
        is_same |= is_twin & ((owner == target.owner) | (owner == other.owner))
        return np.asarray(~is_same)

    def _backdrops(self, rng: Rng, where: BoolArray, *, zoom: float) -> Backdrops:
        count = len(where)
        image = np.where(where, self._scenes.draw(rng, count), -1)
        return Backdrops(image, rng.uniform(0.35, 1, count) * zoom, rng.random((count, 2)))


def _replaced(targets: Targets, rows: Int64Array, by: Targets) -> Targets:
    """The same targets but for some rows."""
    changed = {}
    for name, values in vars(targets).items():
        changed[name] = values.copy()
        changed[name][rows] = getattr(by, name)
    return Targets(**changed)
