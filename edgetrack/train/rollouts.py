"""Runs of frames to roll trackers out on: neighbouring frames of clips, seen by a camera at rest.

A tracker chooses its own windows, so a run cannot be cropped beforehand. Each is rendered once, as
a square window of the frames that holds the target in all of them with room around it, and crops
are cut from that on the device.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from edgetrack.train.augment import Augmentation, Changes
from edgetrack.train.image_store import ImageStore
from edgetrack.train.plan import Backdrops, CropPlan
from edgetrack.train.sampling import PairSampler, one_ahead
from edgetrack.train.views import (
    Layers,
    Views,
    boxes_in_crop,
    mirrored,
    views_of_windows,
    windows_around,
)

__all__ = ["RunSampler", "cut_windows"]

_ROOM = 1.5  # the least side of a window, in sides of a search region around the target


class RunSampler:
    """Batches of runs, rendered on a device.

    Args:
        pairs: Where images, clips, seed, batch size and sizes of crops come from.
        num_frames: Frames of a run.

    Raises:
        ValueError: A run has fewer than two frames.
    """

    def __init__(self, pairs: PairSampler, *, num_frames: int) -> None:
        if num_frames < 2:
            raise ValueError(f"num_frames: expected at least 2, got {num_frames}")
        self.pairs, self.num_frames = pairs, num_frames
        self.size_px = int(pairs.crops.search_size_px * _ROOM)

    def batches(
        self, first_step: int, num_steps: int, *, rank: int = 0, num_ranks: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        """Make ``num_steps`` batches from ``first_step`` on, planning one ahead in a thread.

        Yields:
            What ``batch`` returns.
        """
        plan = partial(self._plan, rank=rank, num_ranks=num_ranks)
        for planned in one_ahead(plan, range(first_step, first_step + num_steps)):
            yield self._render(*planned)

    def batch(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> dict[str, Tensor]:
        """Make the rows ``rank::num_ranks`` of batch ``step``, from ``(seed, step)`` alone.

        Returns:
            For b rows of T frames: ``frames`` ``(b, T, S, S, 3)``, uint8, RGB, black outside the
            pictures; ``bboxes_cxcywh`` ``(b, T, 4)``, float32, normalised to the window.
        """
        return self._render(*self._plan(step, rank=rank, num_ranks=num_ranks))

    def _plan(self, step: int, *, rank: int, num_ranks: int) -> tuple[CropPlan, ImageStore]:
        rng = np.random.default_rng((self.pairs.seed, step))
        images, boxes = self.pairs.draw_runs(rng, num_frames=self.num_frames)
        is_mirrored = rng.random(len(images)) < 0.5
        rows = slice(rank, None, num_ranks)
        images, boxes, is_mirrored = images[rows], boxes[rows], is_mirrored[rows]
        low, high = boxes[..., :2].min(1), (boxes[..., :2] + boxes[..., 2:]).max(1)
        target_side = np.sqrt(boxes[..., 2:].prod(-1)).mean(1)
        least = _ROOM * self.pairs.crops.search_factor * target_side
        window = windows_around((low + high) / 2, np.maximum((high - low).max(1) * _ROOM, least))
        matrix = views_of_windows(*window, size_px=self.size_px)
        matrix = mirrored(matrix, is_mirrored, size_px=self.size_px)
        matrix = np.repeat(matrix, self.num_frames, 0)
        plan = self._frames(images.ravel(), matrix, boxes.reshape(-1, 4))
        (plan,), decoded = self.pairs.decode(plan)
        return plan, decoded

    def _frames(
        self,
        images: npt.NDArray[np.int64],
        matrix: npt.NDArray[np.float64],
        bboxes_xywh: npt.NDArray[np.float64],
    ) -> CropPlan:
        """Frames as they are: no backdrop, no cutouts, no change of light."""
        count = len(images)
        nothing, is_on = np.full(count, -1), np.ones(count, bool)
        how = Augmentation.none()
        changes = Changes.draw(np.random.default_rng(0), how, is_grey=~is_on, is_strong=False)
        return CropPlan(
            Backdrops(nothing, np.ones(count), np.zeros((count, 2))),
            Views(images, matrix, is_on),
            Layers.empty(count, 1),
            changes,
            boxes_in_crop(matrix, bboxes_xywh, size_px=self.size_px),
        )

    def _render(self, plan: CropPlan, decoded: ImageStore) -> dict[str, Tensor]:
        frames = self.pairs.render_crops(plan, decoded, size_px=self.size_px)
        bboxes = torch.from_numpy(plan.bbox_cxcywh.copy()).to(frames.device, non_blocking=True)
        shape = (-1, self.num_frames, *frames.shape[1:])
        return {
            "frames": frames.reshape(shape),
            "bboxes_cxcywh": bboxes.reshape(-1, self.num_frames, 4),
        }


def cut_windows(frames: Tensor, windows: Tensor, *, size_px: int) -> Tensor:
    """Cut square windows, as the tracker does but for its rounding to whole pixels.

    Args:
        frames: uint8 ``(N, S, S, 3)``.
        windows: Centres and sides ``(N, 3)``, normalised to the frames.
        size_px: Side of the crops.

    Returns:
        uint8 ``(N, size_px, size_px, 3)``, black outside the frames.
    """
    steps = (torch.arange(size_px, device=frames.device) + 0.5) / size_px - 0.5
    x, y, side = (v[:, None, None] for v in windows.float().unbind(1))
    across, down = (x + side * steps) * 2 - 1, (y + side * steps[:, None]) * 2 - 1
    shape = (len(frames), size_px, size_px)
    grid = torch.stack([across.expand(shape), down.expand(shape)], -1)
    pixels = frames.permute(0, 3, 1, 2).float()
    crops = F.grid_sample(pixels, grid, align_corners=False)
    return crops.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
