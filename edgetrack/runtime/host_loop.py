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
        self._template_cropper = Cropper(bundle.crops.template_size_px)
        self._search_cropper = Cropper(bundle.crops.search_size_px)
        self._chain = Chain(bundle, engines)
        self._target: TargetState | None = None
        self._window = CropWindow(0, 0, 1)
        self._crop_ms = 0.0
        self._warm_up()

    @property
    def bbox(self) -> "npt.NDArray[np.float32] | None":
        """The current box, xywh in frame pixels, float32 ``(4,)``; ``None`` before ``start``."""
        return None if self._target is None else self._target.bbox_xywh

    @property
    def stage_ms(self) -> Mapping[str, float]:
        """Time of the last update: ``crop``, each ``segment_<k>`` that ran, ``decide``."""
        segments = self._chain.segment_ms
        ran = {f"segment_{k}": float(ms) for k, ms in enumerate(segments) if ms == ms}
        decide = self._chain.run_ms - sum(ran.values())
        return {"crop": self._crop_ms, **ran, "decide": decide}

    def check(self, frame: Any) -> npt.NDArray[np.uint8]:
        """A frame in host memory; see ``checked_array``."""
        return checked_array(frame)

    def check_policy(self, policy: ExitPolicy) -> None:
        """Accept any policy: the host decides."""

    def start(self, frame: npt.NDArray[np.uint8], bbox_xywh: npt.NDArray[np.float32]) -> None:
        """Begin on a frame."""
        buffers = self._chain.buffers
        window = CropWindow.around(bbox_xywh, factor=self._bundle.crops.template_factor)
        self._template_cropper.crop(frame, window, out=buffers["template"][0])
        if "template_bbox_cxcywh" in buffers:
            buffers["template_bbox_cxcywh"][0] = window.to_crop(bbox_xywh)
        self._chain.run_template()
        self._target = TargetState(bbox_xywh, frame_shape=frame.shape, rules=self._rules)

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
        is_sane = target.settle(self.read_answer(), score)
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
        with np.errstate(over="ignore", invalid="ignore"):
            return self._window.to_frame(self._chain.buffers["bbox_cxcywh"][0])

    def close(self) -> None:
        """Free the engines; calling it twice is fine."""
        self._chain.close()

    def _warm_up(self) -> None:
        """Run every engine, so that the first update is not slow."""
        policy = ExitPolicy.always_last(num_exits=self._bundle.num_exits)
        for _ in range(_NUM_WARM_UP_RUNS):
            self._chain.run_template()
            self._chain.run(policy)
