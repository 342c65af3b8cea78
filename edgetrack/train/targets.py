"""What a pair can be about: the sources of a mix, flattened into arrays and drawn at once.

A picture with a box is a clip of one frame, so pictures and clips share one table. Cutouts and
textured boxes in unlabelled pictures have their own.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt

from edgetrack.data.folder import Clip, TrainingPack
from edgetrack.errors import DataError
from edgetrack.train.image_store import ImageIndex

__all__ = ["DEFAULT_MIX", "Cutouts", "Scenes", "TargetTable", "Targets"]

BoolArray = npt.NDArray[np.bool_]
UInt8Array = npt.NDArray[np.uint8]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Rng = np.random.Generator

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
        "pseudo": 0.08,
        "coco": 0.40,
        "got10k": 0.40,
        "lasot": 0.40,
        "trackingnet": 0.40,
    }
)
_CUTOUT_MIX = MappingProxyType(
    {"coco_mini": 0.4, "ccp_people": 0.2, "bsds500": 0.25, "video": 0.15}
)
_LINKED = "tracks"  # its boxes are linked detections: far apart, they may be of two objects
_MAX_GAP_FRAMES = 20
_MIN_SIDE_PX = 6
_SCENE_STEP = 8  # neighbouring frames of a clip are nearly the same scene
# uav_car16_2_05 is the fifth piece of one video; longer numbers are names of their own
_PIECE_NUMBER = re.compile(r"[_#]\d{1,3}(?!\d)\w*$")
_MIN_ALPHA = 100
_NUM_DIRECTIONS = 64
_GRID = 24


@dataclass(frozen=True)
class Targets:
    """N targets, each a cutout or an object in two frames, or in one picture twice.

    Attributes:
        cutout: ``(N,)``, int64: index of the cutout, or -1.
        owner: ``(N,)``, int64: the video, picture or cutout; two owners never show one object.
        images: ``(N, 2)``, int64: template and search image (see ``ImageIndex``).
        bboxes_xywh: ``(N, 2, 4)``, float64, pixels: the object in these two.
        is_video: ``(N,)``, bool: the frames are two of a clip.
        frames: ``(N, 2)``, int64: rows of the table, of one clip; -1 for what is in no clip.
    """

    cutout: Int64Array
    owner: Int64Array
    images: Int64Array
    bboxes_xywh: Float64Array
    is_video: BoolArray
    frames: Int64Array


class Cutouts:
    """Cutouts, sorted by kind.

    Attributes:
        image: ``(N,)``, int64: their images.
        size: ``(N, 2)``, float64: width and height, pixels.
        outline: ``(N, D, 2)``, float64: points of the mask's convex hull, pixels.
        first, count: ``(N,)``, int64: where the cutouts of the same kind lie.
        owner: ``(N,)``, int64.
        has_twins: ``(N,)``, bool: others of its kind may show the same object.
    """

    def __init__(self, pack: TrainingPack, index: ImageIndex, owners: dict[object, int]) -> None:
        cutouts = sorted(pack.cutouts, key=lambda c: c.kind)
        kinds = sorted({c.kind for c in cutouts})
        kind = np.array([kinds.index(c.kind) for c in cutouts], np.int64)
        bounds = np.searchsorted(kind, np.arange(len(kinds) + 1))
        self.image = np.array([index.add(c.bgra) for c in cutouts], np.int64)
        self.size = np.array([c.bgra.shape[1::-1] for c in cutouts], float).reshape(-1, 2)
        self.outline = np.array([_outline(c.bgra) for c in cutouts]).reshape(-1, _NUM_DIRECTIONS, 2)
        self.first, self.count = bounds[kind], np.diff(bounds)[kind]
        # Cutouts of a set of pictures are one of each object; those of clips are not.
        self.has_twins = np.array([c.kind not in pack.pictures for c in cutouts], bool)
        keys = [("kind", c.kind) if c.kind not in pack.pictures else id(c) for c in cutouts]
        self.owner = np.array([owners.setdefault(k, len(owners)) for k in keys], np.int64)
        weights = np.array([_CUTOUT_MIX.get(name, 0.25) for name in kinds])
        self._shares = np.cumsum(weights / weights.sum())
        self._bounds = bounds

    def __len__(self) -> int:
        return len(self.image)

    def draw(self, rng: Rng, count: int) -> Int64Array:
        """Draw targets to paste: a kind by its weight, then one of it."""
        kind = _draw_weighted(rng, self._shares, count)
        first = self._bounds[kind]
        return first + _below(rng, self._bounds[kind + 1] - first)

    def targets(self, cutout: Int64Array) -> Targets:
        """Cutouts ``(count,)`` as targets."""
        count = len(cutout)
        images, boxes = np.full((count, 2), -1), np.ones((count, 2, 4))
        is_video, frames = np.zeros(count, bool), np.full((count, 2), -1)
        return Targets(cutout, self.owner[cutout], images, boxes, is_video, frames)

    def draw_alike(self, rng: Rng, cutout: Int64Array) -> Int64Array:
        """Draw one of the same kind as each; it may be the same."""
        return self.first[cutout] + _below(rng, self.count[cutout])


class Scenes:
    """Images to show behind and beside what is pasted: all that are in memory.

    Attributes:
        image: ``(N,)``, int64. If nothing is in memory, frames that are decoded on demand.
    """

    def __init__(self, pack: TrainingPack, extra_clips: Sequence[Clip], index: ImageIndex) -> None:
        found = [index.add(p.image) for pictures in pack.pictures.values() for p in pictures]
        unlabelled = [index.add(image) for image in pack.backgrounds]
        found += unlabelled
        frames = [
            index.add_frames(clip.images)[::_SCENE_STEP].tolist()
            for group, clips in {**pack.clips, "extra": extra_clips}.items()
            if group != _LINKED  # their frames are among the backgrounds
            for clip in clips
        ]
        lazy = [number for numbers in frames for number in numbers if number < 0]
        found += [number for numbers in frames for number in numbers if number >= 0]
        self.image = np.array(list(dict.fromkeys(found or lazy)), np.int64)
        self._unlabelled = np.flatnonzero(np.isin(self.image, unlabelled))
        self._index = index
        self._textures: Float64Array | None = None

    def draw(self, rng: Rng, count: int) -> Int64Array:
        """Draw images ``(count,)``; -1 where there are none."""
        if not len(self.image):
            return np.full(count, -1)
        return self.image[rng.integers(len(self.image), size=count)]

    def draw_boxes(self, rng: Rng, count: int) -> tuple[Int64Array, Float64Array]:
        """Draw images and a box xywh ``(count, 4)`` around something in each.

        Three in four images are unlabelled. The box is large and central, or the most textured
        of four.
        """
        which = rng.integers(len(self.image), size=count)
        rest = self._unlabelled[rng.integers(len(self._unlabelled), size=count)]
        which = np.where(rng.random(count) < 0.75, rest, which)
        images = self.image[which]
        size = np.array([self._index.resident[i].shape[1::-1] for i in images], float)
        size = size.reshape(count, 1, 2)
        side = size.min(2) * np.exp(rng.uniform(np.log(0.08), np.log(0.45), (count, 4)))
        aspect = np.exp(rng.normal(0, 0.2, (count, 4)))
        wh = np.minimum(np.stack([side * aspect, side / aspect], 2), size * 0.8)
        xy = rng.random((count, 4, 2)) * (size - wh)
        best = self._contrast(which, xy / size, (xy + wh) / size).argmax(1)
        boxes = np.concatenate([xy, wh], 2)[np.arange(count), best]
        central_wh = size[:, 0] * rng.uniform(0.35, 0.7, (count, 2))
        shift = size[:, 0] * rng.uniform(-0.05, 0.05, (count, 2))
        central = np.concatenate([(size[:, 0] - central_wh) / 2 + shift, central_wh], 1)
        return images, np.where(rng.random((count, 1)) < 0.3, central, boxes)

    def _contrast(self, which: Int64Array, low: Float64Array, high: Float64Array) -> Float64Array:
        """Variance of the green channel in boxes ``(N, 4, 2)``, fractions of the image."""
        if self._textures is None:
            images = [self._index.resident[i] for i in self.image]
            self._textures = np.stack([_texture(image) for image in images])
        first = np.minimum((low * _GRID).round().astype(int), _GRID - 1)
        last = np.maximum((high * _GRID).round().astype(int), first + 1)
        x1, y1, x2, y2 = first[..., 0], first[..., 1], last[..., 0], last[..., 1]
        n, sums = which[:, None], self._textures
        total = sums[n, y2, x2] - sums[n, y1, x2] - sums[n, y2, x1] + sums[n, y1, x1]
        mean = total / ((x2 - x1) * (y2 - y1))[..., None]
        return np.asarray(mean[..., 1] - mean[..., 0] ** 2)


class TargetTable:
    """All targets of a pack, by source.

    Args:
        pack: Pictures, clips, cutouts.
        extra_clips: More clips: the source ``extra``.
        mix: Source → weight. Sources that the pack lacks are left out.
        index: Gets the images.

    Raises:
        ValueError: A source of the mix is unknown, or its weight is negative.
        DataError: The pack has nothing for the mix.
    """

    def __init__(
        self,
        pack: TrainingPack,
        extra_clips: Sequence[Clip],
        *,
        mix: Mapping[str, float],
        index: ImageIndex,
    ) -> None:
        owners: dict[object, int] = {}
        rows = _Rows(index, owners)
        for name, pictures in pack.pictures.items():
            for picture in pictures:
                rows.add_picture(name, index.add(picture.image), picture.boxes_xywh)
        for name, clips in {**pack.clips, "extra": extra_clips}.items():
            for clip in clips:
                rows.add_clip(name, clip)
        self.cutouts = Cutouts(pack, index, owners)
        self.scenes = Scenes(pack, extra_clips, index)
        self._owner_of_image = _owners_of_images(owners, len(index.resident))
        sizes = {name: len(clips) for name, clips in rows.clips.items()}
        known = {*DEFAULT_MIX, *pack.pictures, *pack.clips}
        _check(mix, known)
        sizes |= {"paste": len(pack.cutouts), "rbox": len(pack.backgrounds)}
        used = {name: weight for name, weight in mix.items() if weight and sizes.get(name)}
        if not used:
            raise DataError(
                f"training pack: expected data for one of {sorted(mix)}, got none; "
                "check the folder, or name other sources in the mix"
            )
        self._names = list(used)
        self._shares = np.cumsum(np.array(list(used.values())) / sum(used.values()))
        self._read(rows, self._names)

    def _read(self, rows: "_Rows", names: list[str]) -> None:
        """Flatten the clips of some sources."""
        clips = [clip for name in names for clip in rows.clips.get(name, [])]
        counts = [len(rows.clips.get(name, [])) for name in names]
        self._clip_count = np.array(counts, np.int64)
        self._clip_first = np.cumsum(self._clip_count) - self._clip_count
        self._length = np.array([len(images) for images, _, _ in clips], np.int64)
        self._first = np.cumsum(self._length) - self._length
        self._owner = np.array([owner for _, _, owner in clips], np.int64)
        nothing = [np.empty(0, np.int64)], [np.empty((0, 4), np.float32)]
        self._image = np.concatenate([images for images, _, _ in clips] or nothing[0])
        self._bbox = np.concatenate([bboxes for _, bboxes, _ in clips] or nothing[1])

    def draw(self, rng: Rng, count: int, *, far_gap_rate: float) -> Targets:
        """Draw targets by the mix.

        Args:
            rng: Source of randomness.
            count: How many.
            far_gap_rate: Share of pairs of labelled clips that are any distance apart; the others
                are at most 20 labelled frames apart.
        """
        source = _draw_weighted(rng, self._shares, count)
        clip = self._clip_first[source] + _below(rng, self._clip_count[source])
        u, v, gap = rng.random(count), rng.random(count), rng.random(count)
        is_linked = np.array([name == _LINKED for name in self._names])[source]
        is_far = (rng.random(count) < far_gap_rate) & ~is_linked
        found = Targets(
            np.full(count, -1),
            np.full(count, -1),
            np.full((count, 2), -1),
            np.ones((count, 2, 4)),
            np.zeros(count, bool),
            np.full((count, 2), -1),
        )
        rows = np.flatnonzero(self._clip_count[source] > 0)
        if len(rows):
            clip, length = clip[rows], self._length[clip[rows]]
            first = (u[rows] * length).astype(np.int64)
            near = first + np.floor(gap[rows] * (2 * _MAX_GAP_FRAMES + 1)) - _MAX_GAP_FRAMES
            second = np.where(is_far[rows], np.floor(v[rows] * length), near)
            second = np.clip(second.astype(np.int64), 0, length - 1)
            frames = self._first[clip][:, None] + np.stack([first, second], 1)
            found.owner[rows] = self._owner[clip]
            found.images[rows] = self._image[frames]
            found.bboxes_xywh[rows] = self._bbox[frames]
            found.is_video[rows] = length > 1
            found.frames[rows] = frames
        rows = self._rows_of("paste", source)
        if len(rows):
            found.cutout[rows] = self.cutouts.draw(rng, len(rows))
            found.owner[rows] = self.cutouts.owner[found.cutout[rows]]
        rows = self._rows_of("rbox", source)
        if len(rows):
            images, bboxes = self.scenes.draw_boxes(rng, len(rows))
            found.owner[rows] = self._owner_of_image[images]
            found.images[rows], found.bboxes_xywh[rows] = images[:, None], bboxes[:, None]
        return found

    def on_the_way(self, target: Targets, share: Float64Array) -> Targets:
        """The same targets, with a later template.

        Args:
            target: N targets of this table.
            share: ``(N,)``, in [0, 1]: how far from the template's frame to the search region's.
        """
        rows = np.flatnonzero(target.frames[:, 0] >= 0)
        first, last = target.frames[rows].T
        frames = first + np.rint((last - first) * share[rows]).astype(np.int64)
        images, bboxes = target.images.copy(), target.bboxes_xywh.copy()
        images[rows, 0], bboxes[rows, 0] = self._image[frames], self._bbox[frames]
        return dataclasses.replace(target, images=images, bboxes_xywh=bboxes)

    def draw_runs(
        self, rng: Rng, count: int, *, num_frames: int
    ) -> tuple[Int64Array, Float64Array]:
        """Draw neighbouring frames of clips by the mix; a run that meets an end turns back.

        Returns:
            Images ``(count, num_frames)`` and boxes ``(count, num_frames, 4)``, xywh, pixels.

        Raises:
            DataError: No source of the mix has a clip of two frames or more.
        """
        is_moving = self._length > 1
        source = np.repeat(np.arange(len(self._names)), self._clip_count)
        of_source = np.bincount(source, is_moving, len(self._names))
        weights = np.diff(self._shares, prepend=0.0)[source] * is_moving
        weights = weights / np.maximum(of_source[source], 1)
        if not weights.sum() > 0:
            raise DataError(
                f"training pack: expected clips to follow a target in, got none in {self._names}; "
                "add videos with boxes, or leave out the stage that rolls trackers out"
            )
        clip = _draw_weighted(rng, np.cumsum(weights / weights.sum()), count)
        turn = 2 * (self._length[clip] - 1)
        at = (_below(rng, turn)[:, None] + np.arange(num_frames)) % turn[:, None]
        frames = self._first[clip][:, None] + np.minimum(at, turn[:, None] - at)
        return self._image[frames], self._bbox[frames].astype(float)

    def _rows_of(self, name: str, source: Int64Array) -> Int64Array:
        return np.flatnonzero(source == (self._names.index(name) if name in self._names else -1))


class _Rows:
    """Clips by source, each as images ``(T,)``, boxes ``(T, 4)`` and the owner."""

    def __init__(self, index: ImageIndex, owners: dict[object, int]) -> None:
        self.clips: dict[str, list[tuple[Int64Array, npt.NDArray[np.float32], int]]] = {}
        self._index, self._owners = index, owners

    def add_picture(self, source: str, image: int, boxes_xywh: npt.NDArray[np.float32]) -> None:
        owner = self._owner(("image", image))
        images = np.array([image], np.int64)
        self.clips.setdefault(source, []).extend((images, b[None], owner) for b in boxes_xywh)

    def add_clip(self, source: str, clip: Clip) -> None:
        images = self._index.add_frames(clip.images)
        # a comparison with NaN is false, and warns of nothing
        seen = np.flatnonzero((clip.boxes_xywh[:, 2:] >= _MIN_SIDE_PX).all(1))
        is_still = len(images) == 1
        if len(seen) < (1 if is_still else 2):
            return
        name = _PIECE_NUMBER.sub("", clip.name)
        owner = self._owner(("image", int(images[0])) if is_still else name)
        self.clips.setdefault(source, []).append((images[seen], clip.boxes_xywh[seen], owner))

    def _owner(self, key: object) -> int:
        return self._owners.setdefault(key, len(self._owners))


def _check(mix: Mapping[str, float], known: set[str]) -> None:
    for name, weight in mix.items():
        if name not in known or not weight >= 0:
            raise ValueError(
                f"mix: expected weights >= 0 of {sorted(known)}, got {name!r}: {weight!r}"
            )


def _owners_of_images(owners: dict[object, int], num_images: int) -> Int64Array:
    """Owner ``(num_images,)`` of each image as a picture."""
    return np.array(
        [owners.setdefault(("image", i), len(owners)) for i in range(num_images)], np.int64
    )


def _draw_weighted(rng: Rng, shares: Float64Array, count: int) -> Int64Array:
    """Draw indices ``(count,)`` by cumulative shares."""
    drawn = np.searchsorted(shares, rng.random(count), side="right")
    return np.minimum(drawn, len(shares) - 1)


def _below(rng: Rng, limits: Int64Array) -> Int64Array:
    """Whole numbers from 0 up to each limit, which is left out; 0 where it is 0."""
    return (rng.random(len(limits)) * limits).astype(np.int64)


def _outline(bgra: UInt8Array) -> Float64Array:
    """Points ``(D, 2)`` of the convex hull of a mask, the farthest in each of D directions."""
    mask = bgra[..., 3] > _MIN_ALPHA
    rows = np.flatnonzero(mask.any(1))
    height, width = mask.shape
    if not len(rows):
        rows, mask = np.arange(height), np.ones((height, width), bool)
    left, right = mask[rows].argmax(1), width - mask[rows, ::-1].argmax(1)
    x = np.concatenate([left, left, right, right]).astype(float)
    y = np.concatenate([rows, rows + 1, rows, rows + 1]).astype(float)
    angle = np.arange(_NUM_DIRECTIONS) * (2 * np.pi / _NUM_DIRECTIONS)
    reach = x * np.cos(angle)[:, None] + y * np.sin(angle)[:, None]
    farthest = reach.argmax(1)
    return np.stack([x[farthest], y[farthest]], 1)


def _texture(image: UInt8Array) -> Float64Array:
    """Sums ``(G + 1, G + 1, 2)`` of the green channel and its square over all cells before."""
    green = image[::3, ::3, 1].astype(np.float32)
    layers = np.dstack([green, green * green])
    cells = cv2.resize(layers, (_GRID, _GRID), interpolation=cv2.INTER_AREA).astype(float)
    return np.pad(cells.cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
