"""Frames as JPEG files; each is of one grey, which tells it from the others."""

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from edgetrack.data.folder import Clip

GREY_STEP = 20


def write_frames(folder: Path, names: Iterable[str]) -> None:
    """Write a frame of 32 x 24 pixels per name; their greys are 0, 20, 40 …"""
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        frame = np.full((24, 32, 3), index * GREY_STEP, np.uint8)
        assert cv2.imwrite(str(folder / name), frame)


def numbered(count: int, *, first: int = 1, digits: int = 8) -> list[str]:
    return [f"{number:0{digits}d}.jpg" for number in range(first, first + count)]


def frame_indices(clip: Clip) -> list[int]:
    """Which of the written frames the clip holds, by their greys."""
    return [round(float(image.mean()) / GREY_STEP) for image in clip.images]
