"""Render clips whose truth is exact: a textured sprite over a textured, panning background.

The target moves, turns and changes size smoothly, is blurred by its motion, passes a sprite of
its own shape but another texture, and is partly hidden by a bar once. The truth is the tight box
of its whole silhouette, hidden part included, at the middle of the exposure.
"""

import math
import os
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from edgetrack.boxes import clip_xywh
from edgetrack.data.sprites import Pose, Sprite, random_outline, random_texture
from edgetrack.errors import package_missing
from edgetrack.frames import VideoSink

try:
    import cv2
except ImportError as error:
    raise package_missing("cv2", error) from error

__all__ = ["render_clip", "write_clip"]

Frame = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

SHUTTER = 0.5  # exposure over frame time: 0.5 is a film camera's
MIN_SIDE_PX = 48
# Where in the clip, as a fraction of its length, each difficulty comes.
OCCLUSION_AT = 0.3
DISTRACTOR_AT = 0.6
LEAVES_AT = (0.45, 0.6)
RETURNS_AT = (0.75, 0.95)
MIN_VISIBLE_FRACTION = 0.1
NOISE_SHIFT_PX = 32


def render_clip(
    *,
    num_frames: int = 120,
    width: int = 640,
    height: int = 480,
    seed: int = 0,
    has_blur: bool = True,
    has_distractor: bool = True,
    has_occlusion: bool = True,
    leaves_frame: bool = False,
    noise_std: float = 4.0,
) -> Iterator[tuple[Frame, Float32Array]]:
    """Render a clip, frame by frame; the same arguments give the same clip.

    Args:
        num_frames: Length. Speeds are per frame, so a short clip is a piece of a motion; the
            difficulties come at fixed fractions of the length.
        width: Frame width, at least 48.
        height: Frame height, at least 48.
        seed: Decides everything that is random; a switch changes nothing but what it names.
        has_blur: Blur the target along its motion.
        has_distractor: Let a look-alike pass.
        has_occlusion: Let a bar pass over the target; it hides about half of it.
        leaves_frame: Let the target leave the frame and come back.
        noise_std: Standard deviation of the sensor noise, grey levels.

    Yields:
        Frame ``(H, W, 3)`` uint8 BGR and truth ``(4,)`` float32 xywh, each its own memory. The
        truth is NaN where less than a tenth of the box is in the frame, else the whole box.

    Raises:
        ValueError: A size or count is too small, or the noise is negative.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames: expected at least 1, got {num_frames}")
    if min(width, height) < MIN_SIDE_PX:
        raise ValueError(f"size: expected at least {MIN_SIDE_PX} pixels, got {width}x{height}")
    if not noise_std >= 0:
        raise ValueError(f"noise_std: expected 0 or more grey levels, got {noise_std!r}")
    target_rng, background_rng, distractor_rng, bar_rng, noise_rng = (
        np.random.default_rng([seed, part]) for part in range(5)
    )
    size_px = min(width, height) * target_rng.uniform(0.18, 0.32)
    outline_px = random_outline(target_rng) * size_px
    path = _smooth_path(target_rng, num_frames)
    reach_px = float(np.linalg.norm(outline_px, axis=1).max() * path[:, 2].max())
    half = np.array([width, height]) / 2
    path[:, :2] = half + path[:, :2] * (half - reach_px)
    target = Sprite(outline_px, rng=target_rng)
    layers = [(target, _excursion(path, width, 2 * reach_px) if leaves_frame else path)]
    truth = _visible_truth(*layers[0], width=width, height=height)
    if has_distractor:
        offsets = _passing(distractor_rng, num_frames, at=DISTRACTOR_AT, speed=5, miss=1.1)
        look_alike = Sprite(outline_px, rng=distractor_rng)
        layers.insert(0, (look_alike, _beside(path, offsets * size_px)))
    if has_occlusion:
        offsets = _passing(bar_rng, num_frames, at=OCCLUSION_AT, speed=14, miss=0.0)
        bar = Sprite(_bar(offsets) * size_px, rng=bar_rng)
        layers.append((bar, _beside(path, offsets * size_px)))
    background = _Background(background_rng, num_frames, width=width, height=height)
    noise = _Noise(noise_rng, width=width, height=height, std=noise_std)
    return _frames(background, layers, truth, noise, has_blur=has_blur)


def write_clip(
    path: str | os.PathLike[str],
    clip: Iterable[tuple[Frame, Float32Array]],
    *,
    fps: float = 30.0,
) -> Float32Array:
    """Write a clip to an mp4 file.

    Args:
        path: Where; ends in ``.mp4``.
        clip: Frames and boxes, as ``render_clip`` gives them.
        fps: Frames per second.

    Returns:
        The boxes ``(T, 4)``, xywh, NaN where the target is absent.

    Raises:
        SourceError: The file cannot be written.
        ValueError: The clip is empty.
    """
    pairs = iter(clip)
    first = next(pairs, None)
    if first is None:
        raise ValueError(f"{path}: expected a clip of at least one frame, got none")
    frame, bbox_xywh = first
    truth = [bbox_xywh]
    with VideoSink(path, fps=fps, size=(frame.shape[1], frame.shape[0])) as sink:
        sink.write(frame)
        for frame, bbox_xywh in pairs:
            sink.write(frame)
            truth.append(bbox_xywh)
    return np.stack(truth)


Layer = tuple[Sprite, Float64Array]


def _frames(
    background: "_Background",
    layers: list[Layer],
    truth: Float32Array,
    noise: "_Noise",
    *,
    has_blur: bool,
) -> Iterator[tuple[Frame, Float32Array]]:
    motions = [np.gradient(p[:, :2], axis=0) if len(p) > 1 else p[:, :2] * 0 for _, p in layers]
    shutter = SHUTTER if has_blur else 0
    for index, bbox_xywh in enumerate(truth):
        frame = background.at(index)
        for (sprite, path), motion in zip(layers, motions, strict=True):
            blur_x, blur_y = (motion[index] * shutter).tolist()
            sprite.draw(Pose(*path[index].tolist()), blur_xy_px=(blur_x, blur_y), out=frame)
        noise.add_to(frame)
        yield frame, bbox_xywh.copy()


def _visible_truth(sprite: Sprite, path: Float64Array, *, width: int, height: int) -> Float32Array:
    """Boxes ``(T, 4)``, NaN where too little of the box is in the frame."""
    boxes = np.stack([sprite.bbox_at(Pose(*row.tolist())) for row in path])
    inside = clip_xywh(boxes, width_px=width, height_px=height)
    fraction = inside[:, 2:].prod(1) / boxes[:, 2:].prod(1)
    boxes[fraction < MIN_VISIBLE_FRACTION] = np.nan
    return boxes


class _Noise:
    """One field of noise, read at a random place for each frame: drawing it anew costs 20 ms."""

    def __init__(self, rng: np.random.Generator, *, width: int, height: int, std: float) -> None:
        self._rng, self._width, self._height, self._std = rng, width, height, std
        shape = (height + NOISE_SHIFT_PX, width + NOISE_SHIFT_PX, 3)
        self._field = np.round(rng.standard_normal(shape, np.float32) * std).astype(np.int16)

    def add_to(self, frame: Frame) -> None:
        dx, dy = self._rng.integers(0, NOISE_SHIFT_PX, 2).tolist()
        field = self._field[dy : dy + self._height, dx : dx + self._width]
        if self._std > 0:
            cv2.add(frame, field, dst=frame, dtype=cv2.CV_8U)


class _Background:
    """A textured plane that pans by up to a sixteenth of the frame."""

    def __init__(
        self, rng: np.random.Generator, num_frames: int, *, width: int, height: int
    ) -> None:
        self.size = (width, height)
        margin = np.array([width, height]) / 16
        plane = (width + 2 * math.ceil(width / 16), height + 2 * math.ceil(height / 16))
        self._texture = random_texture(rng, *plane, num_shapes=40)
        self._centres = np.array(plane) / 2 - 0.5 + _smooth_path(rng, num_frames)[:, :2] * margin

    def at(self, index: int) -> Frame:
        x, y = self._centres[index].tolist()
        return np.asarray(cv2.getRectSubPix(self._texture, self.size, (x, y)), np.uint8)


def _smooth_path(rng: np.random.Generator, num_frames: int) -> Float64Array:
    """Rows x, y in [-1, 1], scale in [0.7, 1.4], angle in [-0.35, 0.35] rad; ``(T, 4)``."""
    turns = 2 * np.pi * np.arange(num_frames)[:, None]
    slow, fast = rng.uniform(100, 240, 4), rng.uniform(35, 80, 4)
    phases = rng.uniform(0, 2 * np.pi, (2, 4))
    waves = 0.7 * np.sin(turns / slow + phases[0]) + 0.3 * np.sin(turns / fast + phases[1])
    waves[:, 2] = 1.4 ** waves[:, 2]
    waves[:, 3] *= 0.35
    return np.asarray(waves)


def _excursion(path: Float64Array, width: int, outside_px: float) -> Float64Array:
    """The same path with a trip over the nearer side border and back."""
    time = np.arange(len(path)) / len(path)
    ramps = [np.clip((time - a) / (b - a), 0, 1) for a, b in (LEAVES_AT, RETURNS_AT)]
    leave, come_back = (r * r * (3 - 2 * r) for r in ramps)
    start = path[int(LEAVES_AT[0] * len(path)), 0]
    goal = -outside_px if start < width / 2 else width + outside_px
    x = path[:, 0] + (leave - come_back) * (goal - path[:, 0])
    return np.column_stack([x, path[:, 1:]])


def _passing(
    rng: np.random.Generator, num_frames: int, *, at: float, speed: float, miss: float
) -> Float64Array:
    """Offsets ``(T, 2)`` of a straight pass, in target sizes; nearest (``miss``) at ``at``."""
    angle = rng.uniform(0, 2 * np.pi)
    along = np.array([math.cos(angle), math.sin(angle)])
    aside = np.array([-along[1], along[0]])
    time = np.arange(num_frames)[:, None] / num_frames
    return np.asarray((time - at) * speed * along + miss * aside)


def _beside(path: Float64Array, offsets_px: Float64Array) -> Float64Array:
    """The path shifted by offsets, at the same scale and angle."""
    return np.column_stack([path[:, :2] + offsets_px, path[:, 2:]])


def _bar(offsets: Float64Array) -> Float64Array:
    """Outline of a bar across the direction in which it passes, in target sizes."""
    along = offsets[-1] - offsets[0]
    along = along / max(float(np.linalg.norm(along)), 1e-9)
    aside = np.array([-along[1], along[0]])
    ends = [0.18 * along + 1.3 * aside, 0.18 * along - 1.3 * aside]
    return np.stack([*ends, -ends[0], -ends[1]])
