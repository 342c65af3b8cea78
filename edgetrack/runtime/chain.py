"""The chain of engines: run segment after segment until an exit is sure; the host decides."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.backends.engine import Engine
from edgetrack.bundle import Bundle
from edgetrack.runtime.buffers import allocate
from edgetrack.runtime.policies import ExitPolicy

__all__ = ["Chain"]


class Chain:
    """A template engine and segment engines over shared buffers.

    Args:
        bundle: What the engines were built from.
        engines: One per graph of the bundle, in its order; the chain closes them.

    Attributes:
        buffers: All tensors by name; write ``template``, ``template_bbox_cxcywh`` and
            ``search_region`` before a run, read the answer after it.
        segment_ms: Time of each segment in the last run; NaN for those that did not run.
        run_ms: Time of the last run, decisions included.
    """

    def __init__(self, bundle: Bundle, engines: Sequence[Engine]) -> None:
        self.buffers: dict[str, npt.NDArray[Any]] = allocate(bundle)
        self.segment_ms = np.full(bundle.num_exits, np.nan)
        self.run_ms = 0.0
        self._template, *self._segments = engines
        for engine in engines:
            engine.bind(self.buffers)
        self._uncertainty = self.buffers["uncertainty"]
        self._score = self.buffers["score"]

    def run_template(self) -> None:
        """Embed the template."""
        self._template.enqueue()

    def run(self, policy: ExitPolicy) -> int:
        """Run segments until the policy stops.

        Returns:
            The exit that was taken. Its answer is in ``buffers``, valid until the next run.
        """
        self.segment_ms.fill(np.nan)
        index = -1
        began = time.perf_counter()
        for index, segment in enumerate(self._segments):
            started = time.perf_counter()
            segment.enqueue()
            self.segment_ms[index] = (time.perf_counter() - started) * 1e3
            if policy.should_exit(index, float(self._uncertainty[0]), float(self._score[0])):
                break
        self.run_ms = (time.perf_counter() - began) * 1e3
        return index

    def close(self) -> None:
        """Close all engines; calling it twice is fine."""
        for engine in (self._template, *self._segments):
            engine.close()
