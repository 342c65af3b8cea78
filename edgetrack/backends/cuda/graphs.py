"""CUDA graphs with conditional nodes, which PyCUDA lacks: the driver's own calls through ctypes.

Streams, contexts and graphs are the driver's handles, as integers, so that streams of PyCUDA and
of torch do alike; the context must be current. Used are the forms of the calls that drivers of
CUDA 12.4 to 13.x all export, and structures whose layout is the same in their headers (a test
compiles against them).

    with capture(stream) as captured:
        ...                                                     # what writes the condition
        handle = conditional_handle(stream, context)
        ...                                                     # a kernel that sets it
        body = if_node(stream, context, handle)
        capture_to(other_stream, body)
        ...                                                     # what runs where it is not 0
        end_capture(other_stream)
    graph = GraphExec(captured.graph, stream)
    graph.launch(stream)
"""

import ctypes
import gc
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes import byref, c_int, c_size_t, c_void_p
from types import MappingProxyType

from edgetrack.backends.cuda.driver import (
    OLDEST_DRIVER,
    call_driver,
    driver_error,
    driver_version,
    load_driver,
    was_started_before_fork,
)
from edgetrack.errors import DeviceError

__all__ = [
    "Capture",
    "Graph",
    "GraphExec",
    "add_child_graph",
    "body_node_types",
    "capture",
    "capture_to",
    "check_body",
    "conditional_handle",
    "end_capture",
    "if_node",
    "is_capturing",
    "supports_conditional_nodes",
    "without_garbage_collection",
]

_CALLS = (
    "cuStreamBeginCaptureToGraph",
    "cuStreamGetCaptureInfo_v3",
    "cuStreamUpdateCaptureDependencies_v2",
    "cuGraphAddNode_v2",
    "cuGraphConditionalHandleCreate",
)
# Others that capture, such as a camera's pipeline, must not be disturbed by what we do meanwhile.
_CAPTURE_THREAD_LOCAL = 1
_CAPTURE_ACTIVE = 1
_SET_DEPENDENCIES = 1
_ASSIGN_DEFAULT = 1
_CONDITION_IF = 0
_NODE_GRAPH = 4
_NODE_CONDITIONAL = 13
_NODE_TYPES: Mapping[int, str] = MappingProxyType(
    {
        0: "kernel",
        1: "memcpy",
        2: "memset",
        3: "host function",
        4: "child graph",
        5: "empty",
        6: "event wait",
        7: "event record",
        8: "semaphore signal",
        9: "semaphore wait",
        10: "memory allocation",
        11: "memory free",
        12: "batch of memory operations",
        13: "conditional",
    }
)
_BODY_TYPES = frozenset({"kernel", "memcpy", "memset", "child graph", "empty", "conditional"})


class _ConditionalParams(ctypes.Structure):
    """``CUDA_CONDITIONAL_NODE_PARAMS``."""

    _fields_ = (
        ("handle", ctypes.c_uint64),
        ("type", c_int),
        ("size", ctypes.c_uint),
        ("bodies", ctypes.POINTER(c_void_p)),
        ("context", c_void_p),
    )


class _ParamsOfType(ctypes.Union):
    _fields_ = (("conditional", _ConditionalParams), ("reserved", ctypes.c_longlong * 29))


class _NodeParams(ctypes.Structure):
    """``CUgraphNodeParams``."""

    _fields_ = (
        ("type", c_int),
        ("reserved0", c_int * 3),
        ("of_type", _ParamsOfType),
        ("reserved2", ctypes.c_longlong),
    )


class _GcPause:
    """Who needs the garbage collector to be off, in all threads together."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_users = 0
        self.was_enabled = False


_gc_pause = _GcPause()


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Keep Python's garbage collector off while a stream of this thread captures.

    It runs at any allocation, on the thread that happens to make it; where it finds an object of
    CUDA in a cycle, freeing that object spoils the thread's capture. What is garbage already goes
    at the start. Blocks may be nested, and may overlap in several threads: the last one out sets
    the collector as it was.
    """
    with _gc_pause.lock:
        is_first = _gc_pause.num_users == 0
        if is_first:
            _gc_pause.was_enabled = gc.isenabled()
            gc.disable()
        _gc_pause.num_users += 1
    try:
        if is_first:  # only then is it known that this thread does not capture yet
            gc.collect()
        yield
    finally:
        with _gc_pause.lock:
            _gc_pause.num_users -= 1
            if _gc_pause.num_users == 0 and _gc_pause.was_enabled:
                gc.enable()


def supports_conditional_nodes() -> bool:
    """Whether the driver has the calls; whether a device carries nodes out is another question."""
    driver = load_driver()
    return (
        driver is not None
        and (driver_version() or 0) >= OLDEST_DRIVER
        and all(hasattr(driver, name) for name in _CALLS)
    )


class Graph:
    """A graph that was captured.

    Attributes:
        handle: The driver's ``CUgraph``; 0 once closed.
    """

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def close(self) -> None:
        """Free it and its bodies; calling it twice is fine."""
        handle, self.handle = self.handle, 0
        if handle and not was_started_before_fork():
            call_driver("cuGraphDestroy", c_void_p(handle))


class Capture:
    """Work of one stream that becomes a graph instead of running.

    Args:
        stream: The driver's ``CUstream``; not the default stream.
    """

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self._graph: Graph | None = None

    def __enter__(self) -> "Capture":
        self.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.end()
            return
        # The error under way says more than what becomes of a broken capture.
        if graph := _abandon(self._stream):
            Graph(graph).close()

    @property
    def graph(self) -> Graph:
        """What was captured; whoever takes it frees it.

        Raises:
            DeviceError: The capture has not ended.
        """
        if self._graph is None:
            raise DeviceError("capture: expected it ended, got it under way; leave its block first")
        return self._graph

    def begin(self) -> None:
        """Capture what comes next on the stream.

        Raises:
            DeviceError: The stream captures already, or is the default one.
        """
        call_driver("cuStreamBeginCapture_v2", c_void_p(self._stream), _CAPTURE_THREAD_LOCAL)

    def end(self) -> Graph:
        """Stop; the stream runs its work again.

        Raises:
            DeviceError: Something in it cannot be captured, or another stream was not joined.
        """
        try:
            self._graph = Graph(_end(self._stream))
        except DeviceError:
            if graph := _abandon(self._stream):
                Graph(graph).close()
            raise
        return self._graph


def capture(stream: int) -> Capture:
    """Capture what a ``with`` block puts on a stream; ``.graph`` of what it gives is the result."""
    return Capture(stream)


def capture_to(stream: int, graph: int) -> None:
    """Add what comes next on a stream to a graph, such as a body, until ``end_capture``.

    Args:
        stream: A stream that is not capturing.
        graph: The driver's ``CUgraph``.
    """
    none = c_void_p()
    call_driver(
        "cuStreamBeginCaptureToGraph",
        *(c_void_p(stream), c_void_p(graph), none, none, c_size_t(0)),
        _CAPTURE_THREAD_LOCAL,
    )


def end_capture(stream: int) -> None:
    """End what ``capture_to`` began.

    Raises:
        DeviceError: Something in it cannot be captured, or another stream was not joined.
    """
    try:
        _end(stream)
    except DeviceError:
        _abandon(stream)
        raise


def is_capturing(stream: int) -> bool:
    """Whether a stream captures, also where the capture is spoilt and can only be ended."""
    status = c_int()
    call_driver("cuStreamIsCapturing", c_void_p(stream), byref(status))
    return status.value != 0


def conditional_handle(stream: int, context: int) -> int:
    """Make a condition for the graph that a stream captures.

    It is 0 at every launch, until a kernel sets it.

    Args:
        stream: A stream that is capturing.
        context: The driver's ``CUcontext`` of all kernels in the graph.

    Returns:
        What ``cudaGraphSetConditional`` takes; it must get a node before the capture ends.
    """
    graph, _ = _captured_so_far(stream)
    handle = ctypes.c_uint64()
    call_driver(
        "cuGraphConditionalHandleCreate",
        *(byref(handle), graph, c_void_p(context), 0, _ASSIGN_DEFAULT),
    )
    return handle.value


def if_node(stream: int, context: int, handle: int) -> int:
    """Append a node that runs its body where the condition is not 0.

    Args:
        stream: A stream that is capturing; what comes next on it follows the node.
        context: The driver's ``CUcontext`` of all kernels in the body.
        handle: What ``conditional_handle`` gave for this stream.

    Returns:
        The body, a ``CUgraph`` that belongs to the node.
    """
    graph, dependencies = _captured_so_far(stream)
    params = _NodeParams(type=_NODE_CONDITIONAL)
    condition = params.of_type.conditional
    condition.handle, condition.type, condition.context = handle, _CONDITION_IF, context
    condition.size = 1  # drivers before CUDA 12.8 refuse an else branch
    node = c_void_p()
    call_driver(
        "cuGraphAddNode_v2",
        *(byref(node), graph, dependencies, None, c_size_t(len(dependencies))),
        byref(params),
    )
    _continue_behind(stream, node)
    body = condition.bodies[0]
    assert body is not None, "the driver made the node without a body"
    return int(body)


def add_child_graph(stream: int, graph: int) -> None:
    """Append a copy of a graph to what a stream captures; it must hold no conditional nodes."""
    parent, dependencies = _captured_so_far(stream)
    node = c_void_p()
    call_driver(
        "cuGraphAddChildGraphNode",
        *(byref(node), parent, dependencies, c_size_t(len(dependencies))),
        c_void_p(graph),
    )
    _continue_behind(stream, node)


def body_node_types(graph: int) -> list[str]:
    """The type of each node of a graph, such as ``kernel``; what child graphs hold follows them."""
    count = c_size_t()
    call_driver("cuGraphGetNodes", c_void_p(graph), None, byref(count))
    nodes = (c_void_p * count.value)()
    if count.value:
        call_driver("cuGraphGetNodes", c_void_p(graph), nodes, byref(count))
    types = []
    for node in map(c_void_p, nodes):
        number = c_int()
        call_driver("cuGraphNodeGetType", node, byref(number))
        types.append(_NODE_TYPES.get(number.value, f"type {number.value}"))
        if number.value == _NODE_GRAPH:
            child = c_void_p()
            call_driver("cuGraphChildGraphNodeGetGraph", node, byref(child))
            types += body_node_types(child.value or 0)
    return types


def check_body(graph: int) -> None:
    """Refuse a body that the driver would refuse later, with nothing but "invalid argument".

    Raises:
        DeviceError: It holds nodes of a type that no body may hold.
    """
    wrong = sorted(set(body_node_types(graph)) - _BODY_TYPES)
    if wrong:
        raise DeviceError(
            f"conditional body: expected nodes of the types {', '.join(sorted(_BODY_TYPES))}, got "
            f"{', '.join(wrong)}; build the engine without auxiliary streams and with its scratch "
            "memory given to it, and run it once before it is captured"
        )


class GraphExec:
    """A graph made ready to launch, which takes the graph over.

    Args:
        graph: What was captured; closed with this, or at once if it is refused.
        stream: A stream to make it ready by.

    Raises:
        DeviceError: The driver refused it.
    """

    def __init__(self, graph: Graph, stream: int) -> None:
        self._graph = graph
        self._handle = c_void_p()
        self._driver_launch = load_driver().cuGraphLaunch
        try:
            exec_handle, flags = byref(self._handle), ctypes.c_ulonglong(0)
            call_driver("cuGraphInstantiateWithFlags", exec_handle, c_void_p(graph.handle), flags)
            call_driver("cuGraphUpload", self._handle, c_void_p(stream))
        except DeviceError:
            self.close()
            raise

    def launch(self, stream: int) -> None:
        """Start it, in stream order.

        Raises:
            DeviceError: The driver refused, or it was closed.
        """
        code = self._driver_launch(self._handle, c_void_p(stream))
        if code:
            raise driver_error("cuGraphLaunch", code)

    def close(self) -> None:
        """Free it and its graph; calling it twice is fine."""
        handle, self._handle = self._handle, c_void_p()
        try:
            if handle.value and not was_started_before_fork():
                call_driver("cuGraphExecDestroy", handle)
        finally:
            self._graph.close()


def _captured_so_far(stream: int) -> "tuple[c_void_p, ctypes.Array[c_void_p]]":
    """The graph that a stream captures, and the nodes that its next one follows.

    Raises:
        DeviceError: It does not capture.
    """
    status, graph = c_int(), c_void_p()
    nodes, edges = ctypes.POINTER(c_void_p)(), c_void_p()
    count = c_size_t()
    # Edges are asked for, or the query fails where TensorRT made programmatic ones; a node that
    # ignores them waits for the whole of what it follows.
    call_driver(
        "cuStreamGetCaptureInfo_v3",
        *(c_void_p(stream), byref(status), None, byref(graph)),
        *(byref(nodes), byref(edges), byref(count)),
    )
    if status.value != _CAPTURE_ACTIVE:
        raise DeviceError(
            "graph node: expected a stream that captures, got one that "
            f"{'does not' if status.value == 0 else 'failed to'}; begin with capture(stream)"
        )
    # The driver's own array is only valid until the next call.
    return graph, (c_void_p * count.value)(*(nodes[k] for k in range(count.value)))


def _continue_behind(stream: int, node: c_void_p) -> None:
    """Let what a stream captures next follow a node, and nothing else."""
    call_driver(
        "cuStreamUpdateCaptureDependencies_v2",
        *(c_void_p(stream), byref(node), None, c_size_t(1), _SET_DEPENDENCIES),
    )


def _end(stream: int) -> int:
    """End a capture; the driver's ``CUgraph`` that it went to."""
    graph = c_void_p()
    call_driver("cuStreamEndCapture", c_void_p(stream), byref(graph))
    assert graph.value is not None, "the driver ended a capture without a graph"
    return graph.value


def _abandon(stream: int) -> int | None:
    """End a capture if there is one, whatever the driver says; the ``CUgraph`` if it is whole."""
    graph = c_void_p()
    load_driver().cuStreamEndCapture(c_void_p(stream), byref(graph))
    return graph.value
