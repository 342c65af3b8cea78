"""The chain of engines: segment after segment until an exit is sure, and its head if it has one.

The host decides. State that a family keeps from frame to frame is carried behind the answer.
"""

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
    """The engines of all graphs over shared buffers.

    Args:
        bundle: What the engines were built from.
        engines: One per graph of the bundle, in its order; the chain closes them.

    Attributes:
        buffers: All tensors by name; write ``template``, ``template_bbox_cxcywh`` and
            ``search_region`` before a run, read the answer after it.
        has_update: Whether there is state to be carried from frame to frame.
        segment_ms: Time of each segment in the last run; NaN for those that did not run.
        head_ms: The same of heads; all NaN if there are none.
        run_ms: Time of the last run, decisions included.
    """

    def __init__(self, bundle: Bundle, engines: Sequence[Engine]) -> None:
        self.buffers: dict[str, npt.NDArray[Any]] = allocate(bundle)
        self.has_update = bundle.update is not None
        self.segment_ms = np.full(bundle.num_exits, np.nan)
        self.head_ms = np.full(bundle.num_exits, np.nan)
        self.run_ms = 0.0
        self._engines = list(engines)
        self._segments = self._engines[1 : 1 + bundle.num_exits]
        self._heads = self._engines[1 + bundle.num_exits :][: len(bundle.heads)]
        self._carried = [
            (self.buffers[name], self.buffers[source]) for name, source in bundle.carried.items()
        ]
        self._index = 0
        for engine in engines:
            engine.bind(self.buffers)
        self._uncertainty = self.buffers["uncertainty"]
        self._score = self.buffers["score"]

    def run_template(self) -> None:
        """Embed the template; what is carried starts anew."""
        self._engines[0].enqueue()

    def run(self, policy: ExitPolicy) -> int:
        """Run segments until the policy stops, and the head of the exit that was taken.

        Returns:
            The exit that was taken. Its answer is in ``buffers``, valid until the next run.
        """
        self.segment_ms.fill(np.nan)
        self.head_ms.fill(np.nan)
        began = time.perf_counter()
        for index, segment in enumerate(self._segments):
            self._index = index
            started = time.perf_counter()
            segment.enqueue()
            self.segment_ms[index] = (time.perf_counter() - started) * 1e3
            if policy.should_exit(index, float(self._uncertainty[0]), float(self._score[0])):
                break
        self.decode()
        self.run_ms = (time.perf_counter() - began) * 1e3
        return self._index

    def decode(self) -> None:
        """Run the head of the exit that was asked last, if its box is not there yet."""
        if self._heads and np.isnan(self.head_ms[self._index]):
            started = time.perf_counter()
            self._heads[self._index].enqueue()
            self.head_ms[self._index] = (time.perf_counter() - started) * 1e3

    def run_update(self) -> None:
        """Turn this frame, with the template in ``buffers``, into what the next one reads."""
        self._engines[-1].enqueue()
        for target, source in self._carried:
            np.copyto(target, source)

    def warm_up(self) -> None:
        """Run every engine once; nothing is carried."""
        for engine in self._engines:
            engine.enqueue()

    def close(self) -> None:
        """Close all engines; calling it twice is fine."""
        for engine in self._engines:
            engine.close()
