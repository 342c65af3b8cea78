"""The host decides, on a device: per segment by a flag in mapped memory, or by waiting.

``FlagChain`` is for drivers without conditional nodes: a graph per segment, whose gate tells the
host through a word that both see, and one for what follows the exit that was taken. ``HostChain``
waits for each segment and asks the exit policy itself, so that any policy works and each stage can
be timed; it is the reference of the other two.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
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
    """A graph per segment and for the rest; the host reads one word before it starts the next.

    Args:
        parts: Every engine must have run once before.
        flags: What ``gate_flag`` writes at each exit but the last: ``frame number << 1 | goes on``.
    """

    exit_decision = "flag"

    def __init__(self, parts: FrameParts, flags: npt.NDArray[np.uint32]) -> None:
        self._stream, self._flags = parts.stream, flags
        self._segments: list[GraphExec] = []
        self._ends: list[GraphExec] = []  # one per head, or one for all exits
        last = len(parts.segments) - 1
        try:
            with without_garbage_collection():
                for index in range(len(parts.segments)):
                    self._segments.append(self._captured(parts, index, is_last=index == last))
                for head in range(max(len(parts.heads), 1)):
                    self._ends.append(self._captured_end(parts, parts.heads[head : head + 1]))
        except BaseException:
            self.close()
            raise

    def launch(self, policy: ExitPolicy, number: int) -> None:
        """Run the next frame up to the exit that it takes, and start its settling."""
        handle, index = self._stream.handle, 0
        for index, graph in enumerate(self._segments):
            graph.launch(handle)
            if index == len(self._segments) - 1 or not self._goes_on(index, number):
                break
        self._ends[min(index, len(self._ends) - 1)].launch(handle)

    def close(self) -> None:
        """Free the graphs; calling it twice is fine."""
        for graph in (*self._segments, *self._ends):
            graph.close()

    def _goes_on(self, index: int, number: int) -> bool:
        """Wait for what the gate of an exit says."""
        word, expected = self._flags[index : index + 1], number & _FRAME_NUMBER_BITS
        wait_for(partial(_tells_of, word, expected), self._stream, what="exit flag")
        return bool(int(word[0]) & 1)

    def _captured(self, parts: FrameParts, index: int, *, is_last: bool) -> GraphExec:
        stream = parts.stream
        with capture(stream.handle) as captured:
            if index == 0:
                parts.crop(stream)
            parts.segments[index](stream)
            if not is_last:
                parts.gate_flag(index, stream)
        return GraphExec(captured.graph, stream.handle)

    def _captured_end(
        self, parts: FrameParts, heads: Sequence[Callable[[Stream], None]]
    ) -> GraphExec:
        """What follows the last segment of a frame."""
        with capture(parts.stream.handle) as captured:
            for part in (*heads, parts.settle, parts.update):
                if part is not None:
                    part(parts.stream)
        return GraphExec(captured.graph, parts.stream.handle)


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
        num_marks = 2 + len(parts.segments) + len(parts.heads) + (parts.update is not None)
        self._marks = [parts.context.event() for _ in range(num_marks)]
        self._stages: list[str] = []
        self._index = -1

    @property
    def stage_ms(self) -> Mapping[str, float]:
        """GPU time in the last frame, once its result is there.

        By ``crop``, ``segment_<k>`` and ``head_<k>``; ``update`` is of all behind the answer.
        """
        marks = self._marks[: len(self._stages) + 1]
        marks[-1].synchronize()
        spans = [end.elapsed_ms(start) for start, end in itertools.pairwise(marks)]
        return dict(zip(self._stages, spans, strict=True))

    def launch(self, policy: ExitPolicy, number: int) -> None:
        """Run the next frame up to the exit that the policy takes, and start its settling."""
        parts, stream = self._parts, self._parts.stream
        self._stages.clear()
        self._marks[0].record(stream)
        self._run("crop", parts.crop)
        for index, segment in enumerate(parts.segments):
            self._index = index
            self._run(f"segment_{index}", segment)
            if policy.should_exit(index, *self._read_answer()):
                break
        self.decode()
        self._set_exit(self._index)
        parts.settle(stream)
        if parts.update is not None:
            self._run("update", parts.update)

    def decode(self) -> None:
        """Run the head of the exit that was asked last, if its box is not there yet."""
        name = f"head_{self._index}"
        if self._parts.heads and self._index >= 0 and name not in self._stages:
            self._run(name, self._parts.heads[self._index])

    def close(self) -> None:
        """Free the events; calling it twice is fine."""
        for mark in self._marks:
            mark.close()

    def _run(self, stage: str, part: Callable[[Stream], None]) -> None:
        part(self._parts.stream)
        self._stages.append(stage)
        self._marks[len(self._stages)].record(self._parts.stream)
