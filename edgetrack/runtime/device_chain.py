"""The host decides, on a device: per segment by a flag in mapped memory, or by waiting.

``FlagChain`` is for drivers without conditional nodes: a graph per segment, whose gate tells the
host through a word that both see. ``HostChain`` waits for each segment and asks the exit policy
itself, so that any policy works and each stage can be timed; it is the reference of the other two.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from edgetrack.backends.cuda import Stream
from edgetrack.backends.cuda.graphs import GraphExec, capture, without_garbage_collection
from edgetrack.errors import DeviceError
from edgetrack.runtime.frame_graph import FrameParts
from edgetrack.runtime.policies import ExitPolicy

__all__ = ["FlagChain", "HostChain", "wait_for"]

_POLLS_PER_CHECK = 2000
_FRAME_NUMBER_BITS = 0x7FFFFFFF


def wait_for(is_there: Callable[[], bool], stream: Stream, *, what: str) -> None:
    """Poll a word in mapped memory; give up once the stream has ended without it.

    Raises:
        DeviceError: The device failed, or did not write the word.
    """
    while True:
        for _ in range(_POLLS_PER_CHECK):
            if is_there():
                return
        # Asked before the word is read a last time: work that is done has written it.
        is_done = stream.is_done
        if is_done and not is_there():
            raise DeviceError(
                f"{what}: expected the device to write it, got a stream that ended without; "
                "make a new tracker, and report it with the output of: edgetrack doctor"
            )


class FlagChain:
    """A graph per segment; the host reads one word before it starts the next.

    Args:
        parts: Every engine must have run once before.
        flags: What ``gate_flag`` writes at each exit but the last: ``frame number << 1 | goes on``.
    """

    exit_decision = "flag"

    def __init__(self, parts: FrameParts, flags: npt.NDArray[np.uint32]) -> None:
        self._stream, self._flags = parts.stream, flags
        self._graphs: list[GraphExec] = []
        last = len(parts.segments) - 1
        try:
            with without_garbage_collection():
                for index in range(len(parts.segments)):
                    self._graphs.append(self._captured(parts, index, is_last=index == last))
                with capture(parts.stream.handle) as captured:
                    parts.settle(parts.stream)
            self._graphs.append(GraphExec(captured.graph, parts.stream.handle))
        except BaseException:
            self.close()
            raise

    def launch(self, policy: ExitPolicy, number: int) -> None:
        """Run the next frame up to the exit that it takes, and start its settling."""
        *segments, settle = self._graphs
        handle = self._stream.handle
        expected = number & _FRAME_NUMBER_BITS
        for index, graph in enumerate(segments[:-1]):
            graph.launch(handle)
            word = self._flags[index : index + 1]
            wait_for(partial(_tells_of, word, expected), self._stream, what="exit flag")
            if not int(word[0]) & 1:
                settle.launch(handle)
                return
        segments[-1].launch(handle)
        settle.launch(handle)

    def close(self) -> None:
        """Free the graphs; calling it twice is fine."""
        for graph in self._graphs:
            graph.close()

    def _captured(self, parts: FrameParts, index: int, *, is_last: bool) -> GraphExec:
        stream = parts.stream
        with capture(stream.handle) as captured:
            if index == 0:
                parts.crop(stream)
            parts.segments[index](stream)
            if not is_last:
                parts.gate_flag(index, stream)
        return GraphExec(captured.graph, stream.handle)


def _tells_of(word: npt.NDArray[np.uint32], number: int) -> bool:
    """Whether a gate has decided on this frame."""
    return int(word[0]) >> 1 == number


class HostChain:
    """No graphs: wait for each segment, then ask the policy.

    Args:
        parts: What a frame consists of.
        read_answer: Waits, and gives uncertainty and score of the segment that ran.
        set_exit: Puts the exit that was taken into the target's state, in stream order.
    """

    exit_decision = "host"

    def __init__(
        self,
        parts: FrameParts,
        read_answer: Callable[[], tuple[float, float]],
        set_exit: Callable[[int], None],
    ) -> None:
        self._parts, self._read_answer, self._set_exit = parts, read_answer, set_exit
        self._marks = [parts.context.event() for _ in range(len(parts.segments) + 2)]
        self._num_marks = 0

    @property
    def stage_ms(self) -> Mapping[str, float]:
        """GPU time in the last frame, by ``crop`` and ``segment_<k>``, once its result is there."""
        marks = self._marks[: self._num_marks]
        spans = [end.elapsed_ms(start) for start, end in itertools.pairwise(marks)]
        return {f"segment_{k - 1}" if k else "crop": ms for k, ms in enumerate(spans)}

    def launch(self, policy: ExitPolicy, number: int) -> None:
        """Run the next frame up to the exit that the policy takes, and start its settling."""
        parts, stream, index = self._parts, self._parts.stream, 0
        self._marks[0].record(stream)
        parts.crop(stream)
        self._marks[1].record(stream)
        for index, segment in enumerate(parts.segments):
            segment(stream)
            self._marks[index + 2].record(stream)
            if policy.should_exit(index, *self._read_answer()):
                break
        self._num_marks = index + 3
        self._set_exit(index)
        parts.settle(stream)

    def close(self) -> None:
        """Free the events; calling it twice is fine."""
        for mark in self._marks:
            mark.close()
