"""Frames of one target and its box in the first: all that a tracker needs, and no more truth."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgetrack.data.sequences import (
    IMAGE_FOLDER,
    TRUTH_NAME,
    read_sequence,
    read_sequences,
    read_truth,
)
from edgetrack.data.sequences import Sequence as LabelledSequence
from edgetrack.data.synthetic import render_clip
from edgetrack.data.truth import read_names
from edgetrack.errors import DataError
from edgetrack.frames import image_paths, read_frames, read_image

__all__ = ["Frame", "TargetClip", "read_target_clips", "render_target_clips"]

Frame = npt.NDArray[np.uint8]

_RENDERED_SIZES = ((320, 240), (480, 360))


@dataclass(frozen=True)
class TargetClip:
    """Frames of one target.

    Attributes:
        name: What it is called, for instance in a calibration cache.
        bbox: The target in the first frame: x, y, w, h in pixels.
        frames: Reads the frames anew, ``(H, W, 3)`` uint8 BGR.
    """

    name: str
    bbox: tuple[float, float, float, float]
    frames: Callable[[], Iterator[Frame]]


def read_target_clips(
    sources: Sequence[str],
    *,
    bbox: tuple[float, float, float, float] | None = None,
    limit: int = 300,
) -> list[TargetClip]:
    """Find clips in videos, folders or lists; their frames are read later.

    Args:
        sources: Each a video, a folder of pictures, a text file with the path of a picture per
            line, a labelled sequence, or a folder of those (see ``sequences``). The box is the
            first of a truth file beside it, if there is one: ``car.txt`` for ``car.mp4``, else
            ``groundtruth.txt`` in the folder of the pictures, of ``img``, or of the list.
        bbox: The target in the first frame of the one source without truth.
        limit: Frames of one clip, at most.

    Raises:
        DataError: A source is missing or malformed, or its box is not known.
    """
    clips: list[TargetClip] = []
    boxless = []
    for source in sources:
        path = Path(source)
        # What does not exist is told by whatever reads it.
        is_one = _shows_one_target(path) or (bbox is not None and not path.is_dir())
        if not is_one:
            clips += [_labelled(sequence, limit) for sequence in _read_labelled(path)]
            continue
        box = _first_box(path)
        if box is None:
            boxless.append(source)
            box = bbox
        if box is None or len(boxless) > 1:
            got = "none" if bbox is None else f"one for {' and for '.join(boxless)}"
            raise DataError(
                f"{source}: expected the target's box in its first frame, got {got}; give --bbox "
                "x,y,w,h for one source, and a truth file beside each other one"
            )
        clips.append(_unlabelled(path, box, limit))
    return clips


def render_target_clips(*, num_clips: int, num_frames: int, first_seed: int) -> list[TargetClip]:
    """Render short clips; they are kept in memory.

    Args:
        num_clips: How many, of two sizes in turn.
        num_frames: Length of each.
        first_seed: Of the first clip; the others follow.
    """
    clips = []
    for seed in range(first_seed, first_seed + num_clips):
        width, height = _RENDERED_SIZES[seed % len(_RENDERED_SIZES)]
        rendered = list(render_clip(num_frames=num_frames, width=width, height=height, seed=seed))
        x, y, w, h = rendered[0][1].tolist()
        frames = [frame for frame, _ in rendered]
        clips.append(TargetClip(f"rendered-{seed}", (x, y, w, h), frames.__iter__))
    return clips


def _read_labelled(source: Path) -> list[LabelledSequence]:
    """One labelled sequence, or all in a folder."""
    if (source / IMAGE_FOLDER).is_dir():
        return [read_sequence(source)]
    return read_sequences(source)


def _labelled(sequence: LabelledSequence, limit: int) -> TargetClip:
    x, y, w, h = sequence.boxes_xywh[0].tolist()
    return TargetClip(
        sequence.name, (x, y, w, h), lambda: itertools.islice(sequence.frames(), limit)
    )


def _unlabelled(source: Path, bbox: tuple[float, float, float, float], limit: int) -> TargetClip:
    name = source.parent.name if source.name == IMAGE_FOLDER else source.stem
    if not _is_list(source):
        return TargetClip(name, bbox, partial(_video_frames, str(source), limit))
    paths = [source.parent / line for line in read_names(source)]
    return TargetClip(name, bbox, lambda: map(read_image, paths[:limit]))


def _first_box(source: Path) -> tuple[float, float, float, float] | None:
    """The first box of the truth beside a source, if there is one."""
    if source.is_dir():
        places = [source / TRUTH_NAME]
        if source.name == IMAGE_FOLDER:
            places.append(source.parent / TRUTH_NAME)
    elif _is_list(source):
        places = [source.parent / TRUTH_NAME]
    else:
        places = [source.with_suffix(".txt")]
    for place in places:
        if place.is_file():
            boxes = read_truth(place)
            if not len(boxes) or np.isnan(boxes[0]).any():
                got = "an absent target" if len(boxes) else "no row"
                raise DataError(
                    f"{place}: expected a box in line 1, got {got}; cut the frames before the "
                    "target is seen"
                )
            x, y, w, h = boxes[0].tolist()
            return x, y, w, h
    return None


def _video_frames(source: str, limit: int) -> Iterator[Frame]:
    with read_frames(source) as frames:
        yield from itertools.islice(frames, limit)


def _is_list(source: Path) -> bool:
    return source.is_file() and source.suffix == ".txt"


def _shows_one_target(source: Path) -> bool:
    return source.is_file() or (source.is_dir() and bool(image_paths(source)))
