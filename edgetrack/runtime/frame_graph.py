"""The device decides: one CUDA graph per frame, with the later segments behind conditional nodes.

    crop → segment 0 → gate → IF(segment 1 → gate → IF(segment 2)) → settle

The gate compares and sets the condition, so the host launches once and is not asked. Where exits
have heads, each gate sets two conditions, and behind ``IF(segment k + 1 …)`` comes ``IF(head k)``;
where state is carried from frame to frame, the update follows ``settle``. What a frame consists of
is the same for the ways in ``device_chain``, where the host decides.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from edgetrack.backends.cuda import CudaContext, Function, MappedMemory, Module, Stream
from edgetrack.backends.cuda.graphs import (
    GraphExec,
    add_child_graph,
    capture,
    capture_to,
    check_body,
    conditional_handle,
    end_capture,
    if_node,
    without_garbage_collection,
)
from edgetrack.errors import DeviceError, DeviceMemoryError
from edgetrack.runtime.policies import ExitPolicy

__all__ = ["FrameGraph", "FrameParts", "conditional_nodes_refusal"]

_ONE = (1, 1, 1)
_PROBE_BYTES = 12


@dataclass(frozen=True, kw_only=True)
class FrameParts:
    """What a frame consists of; each is put on a stream, which may be capturing.

    Attributes:
        context: Where; current whenever a part is called.
        stream: The tracker's own stream.
        crop: Cut the search region of the frame whose turn it is.
        segments: The segments with their exit heads, in order.
        heads: The heads of the exits, in order; empty if segments give the box.
        gate: ``gate(exit_index, stream, handle, head_handle)`` decides, and sets a condition to "go
            on"; another one to "stop" unless ``head_handle`` is ``None``.
        gate_flag: ``gate_flag(exit_index, stream)`` decides, and tells the host.
        settle: Turn the answer into the target's state, and write the result.
        update: Carry the family's state to the next frame; ``None`` if there is none.
    """

    context: CudaContext
    stream: Stream
    crop: Callable[[Stream], None]
    segments: Sequence[Callable[[Stream], None]]
    heads: Sequence[Callable[[Stream], None]]
    gate: Callable[[int, Stream, int, int | None], None]
    gate_flag: Callable[[int, Stream], None]
    settle: Callable[[Stream], None]
    update: Callable[[Stream], None] | None


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
            with without_garbage_collection(), capture(stream.handle) as captured:
                parts.crop(stream)
                self._capture_from(0, stream)
                parts.settle(stream)
                if parts.update is not None:
                    parts.update(stream)
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
            for head in parts.heads[index:]:
                head(stream)
            return
        context, head_handle = parts.context.handle, None
        handle = conditional_handle(stream.handle, context)
        if parts.heads:
            head_handle = conditional_handle(stream.handle, context)
        parts.gate(index, stream, handle, head_handle)
        self._capture_if(stream, handle, partial(self._capture_from, index + 1))
        if head_handle is not None:
            self._capture_if(stream, head_handle, parts.heads[index])

    def _capture_if(self, stream: Stream, handle: int, part: Callable[[Stream], None]) -> None:
        """Capture what runs where a condition holds."""
        context = self._parts.context
        body = if_node(stream.handle, context.handle, handle)
        # A stream that is capturing cannot be used for the body as well.
        inner = context.stream()
        self._body_streams.append(inner)
        with _capturing_to(inner, body):
            part(inner)
        check_body(body)


def conditional_nodes_refusal(context: CudaContext, module: Module) -> DeviceError | None:
    """Why IF nodes do not work on this device: they are tried, as a frame uses them.

    Args:
        context: Current in this thread.
        module: The frame's kernels.

    Returns:
        What the driver said, or that a body ran which should not have, or the other way round;
        ``None`` if they work.

    Raises:
        DeviceMemoryError: There is no room to try.
    """
    probe = module.function("edgetrack_probe")
    with contextlib.ExitStack() as opened:
        stream = opened.enter_context(contextlib.closing(context.stream()))
        words = opened.enter_context(
            contextlib.closing(context.allocate_mapped(_PROBE_BYTES, what="conditional nodes"))
        )
        try:
            for value in (0, 1):
                # Two kernels that write the value, one of them in a body, and a fill in the inner.
                expected = (value, value, value)
                if (got := _probed(context, probe, stream, words, value=value)) != expected:
                    return DeviceError(
                        f"conditional nodes: expected {expected} of a trial, got {got}"
                    )
        except DeviceMemoryError:
            raise
        except DeviceError as error:
            return error
    return None


def _probed(
    context: CudaContext, probe: Function, stream: Stream, words: MappedMemory, *, value: int
) -> tuple[int, ...]:
    """Words that a kernel, a kernel in an IF node and a fill in an IF node within it wrote."""
    words.array[:] = 0

    def condition(on: Stream, word: int) -> int:
        handle = conditional_handle(on.handle, context.handle)
        arguments = np.uint64(words.address + 4 * word), np.uint32(value), np.uint64(handle)
        probe.launch(on, _ONE, _ONE, *arguments)
        return if_node(on.handle, context.handle, handle)

    with contextlib.ExitStack() as opened:
        outer = opened.enter_context(contextlib.closing(context.stream()))
        inner = opened.enter_context(contextlib.closing(context.stream()))
        with capture(inner.handle) as filled:
            context.set_bytes(words.address + 8, 1, 1, inner)
        opened.enter_context(contextlib.closing(filled.graph))
        with (
            without_garbage_collection(),
            capture(stream.handle) as captured,
            _capturing_to(outer, condition(stream, 0)),
            _capturing_to(inner, condition(outer, 1)),
        ):
            add_child_graph(inner.handle, filled.graph.handle)
        graph = GraphExec(captured.graph, stream.handle)
        opened.enter_context(contextlib.closing(graph))
        graph.launch(stream.handle)
        stream.synchronize()
    written: list[int] = words.array[:_PROBE_BYTES].view(np.uint32).tolist()
    return tuple(written)


@contextlib.contextmanager
def _capturing_to(stream: Stream, graph: int) -> Iterator[None]:
    """Capture into a body; where an engine fails in it, its error is the one to hear."""
    capture_to(stream.handle, graph)
    try:
        yield
    except BaseException:
        with contextlib.suppress(DeviceError):
            end_capture(stream.handle)
        raise
    end_capture(stream.handle)
