"""Pictures and cutouts as one flat buffer of pixels on a device.

A pixel is four bytes, red, green, blue and alpha, read as one int32: one index fetches a pixel.
Colours are premultiplied by alpha, so that interpolating them is right at the rim of a cutout.
Every image has a second level of half its size, averaged over 2x2 pixels, for minification.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["ImageIndex", "ImageStore"]

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]


class ImageStore:
    """Images, packed.

    Args:
        images: N images, uint8: ``(H, W, 3)`` BGR or ``(H, W, 4)`` BGRA.
        device: Where the pixels go.

    Attributes:
        pixels: ``(P,)``, int32, on the device.
        entries: ``(N, 2, 3)``, int64: first pixel, height and width of each image at full and at
            half size.
    """

    def __init__(self, images: Sequence[UInt8Array], *, device: torch.device) -> None:
        sizes = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 1, 2)
        sizes = np.concatenate([sizes, sizes // 2], 1)
        counts = sizes.prod(2)
        firsts = np.cumsum(counts).reshape(-1, 2) - counts
        self.entries: Int64Array = np.concatenate([firsts[..., None], sizes], 2)
        rgba = np.empty((int(counts.sum()), 4), np.uint8)
        for image, entry in zip(images, self.entries, strict=True):
            full, half = (rgba[first : first + h * w].reshape(h, w, 4) for first, h, w in entry)
            _write_rgba(image, full)
            if half.size:
                height, width = half.shape[:2]
                even = full[: 2 * height, : 2 * width]
                half[...] = cv2.resize(even, (width, height), interpolation=cv2.INTER_AREA)
        self.pixels: Tensor = torch.from_numpy(rgba.view(np.int32)[:, 0]).to(device)


class ImageIndex:
    """Numbers for images: those in memory first, then the frames that are decoded on demand.

    A ``tuple`` of frames is in memory; any other sequence decodes a frame each time it is asked.
    """

    def __init__(self) -> None:
        self.resident: list[UInt8Array] = []
        self._known: dict[int, Int64Array] = {}
        self._lazy: list[Sequence[UInt8Array]] = []
        self._firsts = [0]

    def add(self, image: UInt8Array) -> int:
        """The number of an image in memory; the same array has one number."""
        if id(image) not in self._known:
            self._known[id(image)] = np.array([len(self.resident)])
            self.resident.append(image)
        return int(self._known[id(image)][0])

    def add_frames(self, frames: Sequence[UInt8Array]) -> Int64Array:
        """Numbers ``(T,)``, int64, of the frames of a clip; negative ones are decoded on demand."""
        if isinstance(frames, tuple):
            return np.array([self.add(frame) for frame in frames], np.int64)
        if id(frames) not in self._known:
            first = self._firsts[-1]
            self._known[id(frames)] = -2 - np.arange(first, first + len(frames))
            self._lazy.append(frames)
            self._firsts.append(first + len(frames))
        return self._known[id(frames)]

    def decode(self, numbers: Int64Array, *, pool: ThreadPoolExecutor) -> list[UInt8Array]:
        """The frames of negative numbers ``(N,)``, decoded."""
        frames = -2 - numbers
        clips = np.searchsorted(self._firsts, frames, side="right") - 1
        indices = frames - np.asarray(self._firsts)[clips]
        return list(pool.map(lambda c, i: self._lazy[c][i], clips.tolist(), indices.tolist()))


def _write_rgba(image: UInt8Array, out: UInt8Array) -> None:
    if image.shape[2] == 3:
        cv2.cvtColor(image, cv2.COLOR_BGR2RGBA, dst=out)
        return
    cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA, dst=out)
    alpha = out[..., 3:].astype(np.uint16)
    out[..., :3] = (out[..., :3] * alpha + 127) // 255
