"""Crops of a rendered clip, cut where the truth of the frame before is: what a tracker sees."""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.bundle import CropSpec
from edgetrack.crops import Cropper, CropWindow
from edgetrack.data.synthetic import render_clip

UInt8Array = npt.NDArray[np.uint8]


def record_inputs(
    crops: CropSpec, *, num_frames: int = 6, seed: int = 0
) -> list[dict[str, npt.NDArray[Any]]]:
    """What the host writes for each frame after the first, by the names of a bundle's tensors."""
    clip = list(render_clip(num_frames=num_frames + 1, width=320, height=240, seed=seed))
    frame, bbox_xywh = clip[0]
    window = CropWindow.around(bbox_xywh, factor=crops.template_factor)
    template = {
        "template": _crop(frame, window, crops.template_size_px),
        "template_bbox_cxcywh": window.to_crop(bbox_xywh)[None],
    }
    recorded = []
    for (_, last_xywh), (frame, _) in pairwise(clip):
        window = CropWindow.around(last_xywh, factor=crops.search_factor)
        recorded.append({**template, "search_region": _crop(frame, window, crops.search_size_px)})
    return recorded


def _crop(frame: UInt8Array, window: CropWindow, size_px: int) -> UInt8Array:
    pixels = np.empty((1, size_px, size_px, 3), np.uint8)
    Cropper(size_px).crop(frame, window, out=pixels[0])
    return pixels
