"""The device decides: one CUDA graph per frame, with the later segments behind conditional nodes.

    crop → segment 0 → gate → IF(segment 1 → gate → IF(segment 2)) → settle

The gate compares and sets the condition, so the host launches once and is not asked. What a frame
consists of is the same for the ways in ``device_chain``, where the host decides.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from edgetrack.backends.cuda import CudaContext, Function, MappedMemory, Module, Stream
from edgetrack.backends.cuda.graphs import (
    GraphExec,
    capture,
    capture_to,
    check_body,
    conditional_handle,
    end_capture,
    if_node,
)
from edgetrack.errors import DeviceError
from edgetrack.runtime.policies import ExitPolicy

__all__ = ["FrameGraph", "FrameParts", "conditional_nodes_work"]

_ONE = (1, 1, 1)
_PROBE_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class FrameParts:
    """What a frame consists of; each is put on a stream, which may be capturing.

    Attributes:
        context: Where; current whenever a part is called.
        stream: The tracker's own stream.
        crop: Cut the search region of the frame whose turn it is.
        segments: The segments with their exit heads, in order.
        gate: ``gate(exit_index, stream, handle)`` decides, and sets a condition to "go on".
        gate_flag: ``gate_flag(exit_index, stream)`` decides, and tells the host.
        settle: Turn the answer into the target's state, and write the result.
    """

    context: CudaContext
    stream: Stream
    crop: Callable[[Stream], None]
    segments: Sequence[Callable[[Stream], None]]
    gate: Callable[[int, Stream, int], None]
    gate_flag: Callable[[int, Stream], None]
    settle: Callable[[Stream], None]


class FrameGraph:
    """A whole frame as one graph launch.

    Args:
        parts: Every engine must have run once before.

    Raises:
        DeviceError: The driver refused a node, or the graph.
    """

    exit_decision = "device"

    def __init__(self, parts: FrameParts) -> None:
        self._parts = parts
        self._body_streams: list[Stream] = []
        stream = parts.stream
        try:
            with capture(stream.handle) as captured:
                parts.crop(stream)
                self._capture_from(0, stream)
                parts.settle(stream)
            self._exec = GraphExec(captured.graph, stream.handle)
        finally:
            for body_stream in self._body_streams:
                body_stream.close()

    def launch(self, policy: ExitPolicy, number: int) -> None:
        """Start the next frame; its number and the thresholds are read from device memory."""
        self._exec.launch(self._parts.stream.handle)

    def close(self) -> None:
        """Free the graph; calling it twice is fine."""
        self._exec.close()

    def _capture_from(self, index: int, stream: Stream) -> None:
        """Capture a segment, and all that may follow it in the bodies of nested IF nodes."""
        parts = self._parts
        parts.segments[index](stream)
        if index == len(parts.segments) - 1:
            return
        context = parts.context
        handle = conditional_handle(stream.handle, context.handle)
        parts.gate(index, stream, handle)
        body = if_node(stream.handle, context.handle, handle)
        # A stream that is capturing cannot be used for the body as well.
        inner = context.stream()
        self._body_streams.append(inner)
        with _capturing_to(inner, body):
            self._capture_from(index + 1, inner)
        check_body(body)


def conditional_nodes_work(context: CudaContext, module: Module) -> bool:
    """Whether an IF node skips and runs its body on this device: it is tried, not looked up.

    Args:
        context: Current in this thread.
        module: The frame's kernels.
    """
    probe, stream = module.function("edgetrack_probe"), context.stream()
    words = context.allocate_mapped(_PROBE_BYTES, what="the probe of conditional nodes")
    try:
        return all(
            _probed(context, probe, stream, words, value=value) == (value, value)
            for value in (0, 1)
        )
    except DeviceError:
        return False
    finally:
        words.close()
        stream.close()


def _probed(
    context: CudaContext, probe: Function, stream: Stream, words: MappedMemory, *, value: int
) -> tuple[int, int]:
    """The value that a kernel wrote, and whether the body of its IF node ran."""
    words.array[:] = 0
    inner = context.stream()
    try:
        with capture(stream.handle) as captured:
            handle = conditional_handle(stream.handle, context.handle)
            arguments = np.uint64(words.address), np.uint32(value), np.uint64(handle)
            probe.launch(stream, _ONE, _ONE, *arguments)
            with _capturing_to(inner, if_node(stream.handle, context.handle, handle)):
                context.set_bytes(words.address + 4, 1, 1, inner)
        graph = GraphExec(captured.graph, stream.handle)
    finally:
        inner.close()
    try:
        graph.launch(stream.handle)
        stream.synchronize()
    finally:
        graph.close()
    written, taken = words.array[:_PROBE_BYTES].view(np.uint32).tolist()
    return written, taken


@contextmanager
def _capturing_to(stream: Stream, graph: int) -> Iterator[None]:
    """Capture into a body; the capture is ended also where an engine fails in it."""
    capture_to(stream.handle, graph)
    try:
        yield
    finally:
        end_capture(stream.handle)
