"""Pairs of crops to train on: a template, and a search region that shows the same object.

A pair comes from one of several sources, drawn by weight: two frames of a clip, a still picture
seen twice, a cutout pasted onto two backgrounds, a textured box in a picture that nobody
labelled. A batch is first planned, whole, from ``(seed, step)`` alone; then each process renders
its rows on its device.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgetrack.bundle import CropSpec
from edgetrack.data.folder import Clip, TrainingPack
from edgetrack.train.augment import Augmentation
from edgetrack.train.image_store import ImageIndex, ImageStore
from edgetrack.train.plan import CropPlan, PairPlan, Planner
from edgetrack.train.render import Scene, render
from edgetrack.train.targets import DEFAULT_MIX
from edgetrack.train.views import Views, rows_of

__all__ = ["DEFAULT_MIX", "Batches", "PairSampler", "PlannedBatch", "one_ahead"]

Int64Array = npt.NDArray[np.int64]
Planned = TypeVar("Planned")


class Batches(Protocol):
    """Where a stage of training gets its batches from."""

    def batches(
        self, first_step: int, num_steps: int, *, rank: int = 0, num_ranks: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        """Make ``num_steps`` batches from ``first_step`` on, the rows ``rank::num_ranks``."""


@dataclass(frozen=True)
class PlannedBatch:
    """Rows of a batch that wait to be rendered, and the frames that were decoded for them."""

    pairs: PairPlan
    decoded: ImageStore


class PairSampler:
    """Batches of pairs, rendered on a device.

    Args:
        pack: Pictures, clips, cutouts. A clip whose ``images`` are a ``tuple`` is kept on the
            device; frames of any other sequence are decoded when they are drawn. A clip of one
            frame is a still picture.
        crops: Sizes and factors of the crops.
        seed: Batch ``step`` depends on ``(seed, step)`` alone.
        batch_size: Pairs in a batch, over all processes.
        mix: Source → weight: a set or a group of clips of the pack, ``paste``, ``rbox`` or
            ``extra``. Sources that the pack lacks are left out, and the others scaled up.
        augmentation: How strongly the crops are changed.
        absent_rate: Share of pairs whose search region does not show the target.
        extra_clips: More clips, such as rendered ones.
        device: Where the images are kept and the crops rendered.
        num_templates: Templates of each pair; the first is the same whatever their number.

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
        batch_size: int,
        mix: Mapping[str, float] = DEFAULT_MIX,
        augmentation: Augmentation | None = None,
        absent_rate: float = 0.05,
        extra_clips: Sequence[Clip] = (),
        device: torch.device | str = "cpu",
        num_templates: int = 1,
    ) -> None:
        self.crops, self.seed, self.batch_size = crops, seed, batch_size
        self.num_templates = num_templates
        self.device = torch.device(device)
        self._index = ImageIndex()
        self._planner = Planner(
            pack,
            extra_clips,
            crops=crops,
            mix=mix,
            augmentation=Augmentation() if augmentation is None else augmentation,
            absent_rate=absent_rate,
            index=self._index,
        )
        self._store = ImageStore(self._index.resident, device=self.device)
        self._pool = ThreadPoolExecutor(os.cpu_count())

    def batch(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> dict[str, Tensor]:
        """Make the rows ``rank::num_ranks`` of batch ``step``; see ``render``."""
        return self.render(self.plan(step, rank=rank, num_ranks=num_ranks))

    def batches(
        self, first_step: int, num_steps: int, *, rank: int = 0, num_ranks: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        """Make ``num_steps`` batches from ``first_step`` on, planning one ahead in a thread.

        Yields:
            What ``batch`` returns.
        """
        plan = partial(self.plan, rank=rank, num_ranks=num_ranks)
        yield from map(self.render, one_ahead(plan, range(first_step, first_step + num_steps)))

    def plan(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> PlannedBatch:
        """Decide all that is random in a batch, and decode the frames that its rows need."""
        rng = np.random.default_rng((self.seed, step))
        pairs = self._planner.plan(rng, self.batch_size, num_templates=self.num_templates)
        pairs = rows_of(pairs, slice(rank, None, num_ranks))
        (template, search_region, *later), decoded = self.decode(
            pairs.template, pairs.search_region, *pairs.later_templates
        )
        pairs = replace(
            pairs,
            template=template,
            search_region=search_region,
            later_templates=tuple(later),
        )
        return PlannedBatch(pairs, decoded)

    def decode(self, *crops: CropPlan) -> tuple[list[CropPlan], ImageStore]:
        """Decode the frames that planned crops need.

        Returns:
            The crops, ready for ``render_crops``, and the frames.
        """
        numbers = [n for crop in crops for n in (crop.view.image, crop.backdrop.image)]
        used = np.unique(np.concatenate(numbers))
        frames = used[used < -1]
        decoded = ImageStore(self._index.decode(frames, pool=self._pool), device=self.device)
        return [self._numbered(crop, frames) for crop in crops], decoded

    def render_crops(self, crops: CropPlan, decoded: ImageStore, *, size_px: int) -> Tensor:
        """Render crops ``(N, size_px, size_px, 3)``, uint8, RGB, that ``decode`` gave."""
        return _render(crops, (self._store, decoded), size_px=size_px)

    def draw_runs(
        self, rng: np.random.Generator, *, num_frames: int
    ) -> tuple[Int64Array, npt.NDArray[np.float64]]:
        """Images and boxes of a batch of runs (see ``targets.TargetTable.draw_runs``)."""
        return self._planner.table.draw_runs(rng, self.batch_size, num_frames=num_frames)

    def render(self, planned: PlannedBatch) -> dict[str, Tensor]:
        """Render planned rows.

        Returns:
            On the device, for b rows: ``template`` ``(b, Ht, Ht, 3)`` and ``search_region``
            ``(b, Hs, Hs, 3)``, uint8, RGB; ``template_bbox_cxcywh`` and ``search_bbox_cxcywh``
            ``(b, 4)``, float32, normalised to their crops: the centre of the latter lies inside,
            its edges may not, and it is meaningless where the target is absent; ``is_present``
            ``(b,)``, float32: 1, or 0 where the template shows another object. With T templates
            each also ``templates`` ``(b, T, Ht, Ht, 3)`` and ``templates_bbox_cxcywh``
            ``(b, T, 4)``, the first among them.
        """
        pairs, stores = planned.pairs, (self._store, planned.decoded)
        template, search_region = pairs.template, pairs.search_region

        def to(values: npt.NDArray[np.float32]) -> Tensor:
            return torch.from_numpy(values.copy()).to(self.device, non_blocking=True)

        batch = {
            "template": _render(template, stores, size_px=self.crops.template_size_px),
            "search_region": _render(search_region, stores, size_px=self.crops.search_size_px),
            "template_bbox_cxcywh": to(template.bbox_cxcywh),
            "search_bbox_cxcywh": to(search_region.bbox_cxcywh),
            "is_present": to(pairs.is_present),
        }
        if pairs.later_templates:
            later = [
                _render(crop, stores, size_px=self.crops.template_size_px)
                for crop in pairs.later_templates
            ]
            boxes = [to(crop.bbox_cxcywh) for crop in pairs.later_templates]
            batch["templates"] = torch.stack([batch["template"], *later], 1)
            batch["templates_bbox_cxcywh"] = torch.stack([batch["template_bbox_cxcywh"], *boxes], 1)
        return batch

    def _numbered(self, crop: CropPlan, frames: Int64Array) -> CropPlan:
        """The same crops; frames that were decoded come after the images in memory."""

        def numbered(image: Int64Array) -> Int64Array:
            found = np.searchsorted(frames, image)
            return np.where(image < -1, found + len(self._index.resident), image)

        view = replace(crop.view, image=numbered(crop.view.image))
        backdrop = replace(crop.backdrop, image=numbered(crop.backdrop.image))
        return replace(crop, view=view, backdrop=backdrop)


def one_ahead(plan: Callable[[int], Planned], steps: Iterable[int]) -> Iterator[Planned]:
    """Like ``map``, with the next step planned in a thread while the caller uses this one."""
    with ThreadPoolExecutor(1) as ahead:
        plans = (ahead.submit(plan, step) for step in steps)
        following = next(plans, None)
        while following is not None:
            planned, following = following.result(), next(plans, None)
            yield planned


def _render(crop: CropPlan, stores: tuple[ImageStore, ...], *, size_px: int) -> Tensor:
    entries = np.concatenate([store.entries for store in stores])
    backdrop, view = crop.backdrop, crop.view
    sizes = entries[backdrop.image, 0, 1:]
    below = backdrop.views(sizes, size_px=size_px)
    # A cutout's backdrop is its picture; another's shows beyond its picture's edge.
    is_pasted = view.image == -1
    main = Views(
        np.where(is_pasted, below.image, view.image),
        np.where(is_pasted[:, None, None], below.matrix, view.matrix),
        is_pasted | view.is_smooth,
    )
    border = replace(below, image=np.where(is_pasted, -1, below.image))
    return render(Scene(border, main, crop.layers, crop.changes), stores, size_px=size_px)
