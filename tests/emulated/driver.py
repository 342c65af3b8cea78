"""The driver's calls through ctypes: by name, with error codes by name."""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
from emulator.hooks import EmulatedDriver

from edgetrack.runtime.device_state import read_ptx

NON_BLOCKING = 1
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
DEVICEMAP = 2
IF, WHILE = 0, 1
KERNEL_NODE, MEMSET_NODE, HOST_NODE, CONDITIONAL_NODE = 0, 2, 3, 13

Argument = int | bytes | None | ctypes.Array[Any] | npt.NDArray[Any]


class Driver:
    """The calls, with a primary context that is new and current."""

    def __init__(self, emulated: EmulatedDriver) -> None:
        self.emulated = emulated
        self._library = emulated.library
        self._graphs: list[int] = []
        self.do("cuInit", 0)
        self.do("cuDevicePrimaryCtxReset_v2", 0)  # what a failed test may have left
        self.do("cuCtxPushCurrent_v2", self.make("cuDevicePrimaryCtxRetain", 0))

    def close(self) -> None:
        """Give back the context with all that is in it, and the captured graphs."""
        for graph in self._graphs:
            self.code("cuGraphDestroy", graph)
        self.do("cuCtxPopCurrent_v2", None)
        self.do("cuDevicePrimaryCtxReset_v2", 0)

    def code(self, name: str, *arguments: Argument) -> str:
        """Call; the error code's name without its prefix, ``SUCCESS`` for none."""
        done = getattr(self._library, name)(*map(_as_c, arguments))
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(done, ctypes.byref(text))
        assert text.value is not None, f"{name}: {done}"
        return text.value.decode().removeprefix("CUDA_").removeprefix("ERROR_")

    def do(self, name: str, *arguments: Argument) -> None:
        """Call what must succeed."""
        done = self.code(name, *arguments)
        assert done == "SUCCESS", f"{name}: {done}"

    def make(self, name: str, *arguments: Argument) -> int:
        """Call what returns something through its first argument."""
        out = (ctypes.c_uint64 * 1)()
        self.do(name, out, *arguments)
        return int(out[0])

    def stream(self, flags: int = NON_BLOCKING) -> int:
        return self.make("cuStreamCreate", flags)

    def event(self, flags: int = 0) -> int:
        return self.make("cuEventCreate", flags)

    def memory(self, num_bytes: int = 64) -> int:
        return self.make("cuMemAlloc_v2", num_bytes)

    def pinned(self, num_bytes: int = 64) -> npt.NDArray[np.uint8]:
        """Page-locked host memory that the device sees too, at the same address."""
        address = self.make("cuMemHostAlloc", num_bytes, DEVICEMAP)
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def function(self, name: bytes) -> int:
        module = self.make("cuModuleLoadData", read_ptx())
        return self.make("cuModuleGetFunction", module, name)

    def sync(self, stream: int) -> None:
        self.do("cuStreamSynchronize", stream)

    def graph(self) -> int:
        """An empty graph, this object's to destroy."""
        self._graphs.append(self.make("cuGraphCreate", 0))
        return self._graphs[-1]

    def begin(self, stream: int, mode: int = THREAD_LOCAL) -> None:
        self.do("cuStreamBeginCapture_v2", stream, mode)

    def end(self, stream: int) -> int:
        """End a capture; the graph is this object's to destroy."""
        graph = (ctypes.c_uint64 * 1)()
        self.do("cuStreamEndCapture", stream, graph)
        self._graphs.append(int(graph[0]))
        return int(graph[0])

    def graph_of(self, stream: int) -> tuple[int, list[int]]:
        """The graph that a stream captures into, and what its next node depends on."""
        status, ident, graph = ((ctypes.c_uint64 * 1)() for _ in range(3))
        nodes, edges, count = (ctypes.c_uint64 * 1)(), (ctypes.c_uint64 * 1)(), ctypes.c_size_t()
        self.do(
            "cuStreamGetCaptureInfo_v3", stream, status, ident, graph, nodes, edges,
            ctypes.addressof(count),
        )  # fmt: skip
        first = ctypes.cast(nodes[0], ctypes.POINTER(ctypes.c_uint64))
        return int(graph[0]), [first[k] for k in range(count.value)]

    def condition(self, graph: int, *, default: int = 0, flags: int = 1) -> int:
        context = self.make("cuCtxGetCurrent")
        return self.make("cuGraphConditionalHandleCreate", graph, context, default, flags)

    def exec(self, graph: int) -> int:
        return self.make("cuGraphInstantiateWithFlags", graph, 0)

    def launch(self, executable: int, stream: int) -> None:
        self.do("cuGraphLaunch", executable, stream)
        self.sync(stream)


class Conditional:
    """``CUgraphNodeParams`` of a conditional node."""

    def __init__(self, handle: int, context: int, *, kind: int = IF, size: int = 1) -> None:
        self.params = np.zeros(256, np.uint8)
        ints, longs = self.params.view(np.int32), self.params.view(np.uint64)
        ints[0] = CONDITIONAL_NODE
        longs[2], ints[6], ints[7], longs[5] = handle, kind, size, context

    def body(self, index: int = 0) -> int:
        """A body, once the node was added."""
        bodies = int(self.params.view(np.uint64)[4])
        return int(ctypes.cast(bodies, ctypes.POINTER(ctypes.c_uint64))[index])


def _as_c(argument: Argument) -> Any:
    if isinstance(argument, int):
        return ctypes.c_uint64(argument)  # narrower parameters read its lower half
    return (
        argument.ctypes.data_as(ctypes.c_void_p) if isinstance(argument, np.ndarray) else argument
    )
