"""A frame on the CPU: crop, segments until one is sure, and the target's state, one by one."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.backends.engine import Engine
from edgetrack.bundle import Bundle
from edgetrack.crops import Cropper, CropWindow
from edgetrack.runtime.chain import Chain
from edgetrack.runtime.loop import TrackResult, checked_array
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules, TargetState

__all__ = ["HostLoop"]

_NUM_WARM_UP_RUNS = 2


@dataclass(frozen=True)
class _Done:
    """An answer that is there: the work was done in ``submit``."""

    answer: TrackResult
    is_done: bool = True

    def result(self) -> TrackResult:
        return self.answer


class HostLoop:
    """A ``Loop`` over CPU engines.

    Args:
        bundle: What the engines were built from.
        engines: One per graph of the bundle, in its order; the loop closes them.
        rules: How answers become the target's state.
    """

    exit_decision = "host"
    memory_bytes = 0

    def __init__(self, bundle: Bundle, engines: Sequence[Engine], *, rules: TargetRules) -> None:
        self._bundle, self._rules = bundle, rules
        crops = bundle.crops
        self._template_cropper = Cropper(crops.template_size_px, geometry=crops.geometry)
        self._search_cropper = Cropper(crops.search_size_px, geometry=crops.geometry)
        self._chain = Chain(bundle, engines)
        self._target: TargetState | None = None
        self._window = CropWindow(0, 0, 1)
        self._crop_ms = self._update_ms = 0.0
        for _ in range(_NUM_WARM_UP_RUNS):
            self._chain.warm_up()

    @property
    def bbox(self) -> "npt.NDArray[np.float32] | None":
        """The current box, xywh in frame pixels, float32 ``(4,)``; ``None`` before ``start``."""
        return None if self._target is None else self._target.bbox_xywh

    @property
    def stage_ms(self) -> Mapping[str, float]:
        """Time of the last update: ``crop``, each ``segment_<k>`` that ran, ``decide``.

        With heads also the ``head_<k>`` that ran, and ``update`` if state is carried.
        """
        chain = self._chain
        ran = {
            f"{kind}_{k}": float(ms)
            for kind, times_ms in (("segment", chain.segment_ms), ("head", chain.head_ms))
            for k, ms in enumerate(times_ms)
            if not np.isnan(ms)
        }
        stages = {"crop": self._crop_ms, **ran, "decide": chain.run_ms - sum(ran.values())}
        return {**stages, "update": self._update_ms} if chain.has_update else stages

    def check(self, frame: Any) -> npt.NDArray[np.uint8]:
        """A frame in host memory; see ``checked_array``."""
        return checked_array(frame)

    def check_policy(self, policy: ExitPolicy) -> None:
        """Accept any policy: the host decides."""

    def start(self, frame: npt.NDArray[np.uint8], bbox_xywh: npt.NDArray[np.float32]) -> None:
        """Begin on a frame."""
        self._crop_template(frame, bbox_xywh)
        self._chain.run_template()
        self._target = TargetState(
            bbox_xywh,
            frame_shape=frame.shape,
            rules=self._rules,
            geometry=self._bundle.crops.geometry,
        )

    def submit(self, frame: npt.NDArray[np.uint8], policy: ExitPolicy) -> _Done:
        """Find the target in the next frame; the answer is there when this returns."""
        assert self._target is not None, "start comes before submit"
        started = time.perf_counter()
        buffers, target = self._chain.buffers, self._target
        self._window = target.search_window(self._bundle.crops.search_factor)
        self._search_cropper.crop(frame, self._window, out=buffers["search_region"][0])
        self._crop_ms = (time.perf_counter() - started) * 1e3
        exit_index = self._chain.run(policy)
        score = float(buffers["score"][0])
        before = target.bbox_xywh, target.num_unsure, target.is_lost
        is_sane = target.settle(self.read_answer(), score)
        if self._chain.has_update:
            try:
                self._update(frame, is_sane=is_sane)
            except BaseException:  # what is carried is of the frame before, and so must the box be
                target.bbox_xywh, target.num_unsure, target.is_lost = before
                raise
        x, y, w, h = target.bbox_xywh.tolist()
        return _Done(
            TrackResult(
                bbox=(x, y, w, h),
                score=score if is_sane else 0.0,
                is_lost=target.is_lost,
                uncertainty=float(buffers["uncertainty"][0]),
                exit_index=exit_index,
                latency_ms=(time.perf_counter() - started) * 1e3,
            )
        )

    def read_answer(self) -> npt.NDArray[np.float32]:
        """The box that the last exit gave, before any rule: xywh, frame pixels, ``(4,)``."""
        self._chain.decode()
        with np.errstate(over="ignore", invalid="ignore"):
            return self._window.to_frame(self._chain.buffers["bbox_cxcywh"][0])

    def close(self) -> None:
        """Free the engines; calling it twice is fine."""
        self._chain.close()

    def _crop_template(
        self, frame: npt.NDArray[np.uint8], bbox_xywh: npt.NDArray[np.float32]
    ) -> None:
        """Cut the template, and say where the target is in it."""
        buffers = self._chain.buffers
        crops = self._bundle.crops
        window = CropWindow.around(bbox_xywh, factor=crops.template_factor, geometry=crops.geometry)
        self._template_cropper.crop(frame, window, out=buffers["template"][0])
        if "template_bbox_cxcywh" in buffers:
            buffers["template_bbox_cxcywh"][0] = window.to_crop(bbox_xywh)

    def _update(self, frame: npt.NDArray[np.uint8], *, is_sane: bool) -> None:
        """Carry the family's state to the next frame; an answer that is no number changes none."""
        assert self._target is not None, "start comes before submit"
        started = time.perf_counter()
        if is_sane:
            self._crop_template(frame, self._target.bbox_xywh)
            self._chain.run_update()
        self._update_ms = (time.perf_counter() - started) * 1e3
