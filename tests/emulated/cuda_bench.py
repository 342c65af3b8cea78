"""What the tests of the CUDA layer share."""

import ctypes
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pycuda.driver
from emulator.hooks import EmulatedDriver

from edgetrack.backends.cuda import CudaContext, Module, Stream
from edgetrack.runtime.device_state import DECISION, TARGET

DRIVER = EmulatedDriver()
ONE = (1, 1, 1)


def live() -> tuple[int, int]:
    """Bytes and handles that are not given back."""
    return DRIVER.live_bytes, DRIVER.live_handles()


def current_handle() -> int:
    """The driver's current context of this thread; 0 without one."""
    handle = ctypes.c_void_p()
    assert DRIVER.library.cuCtxGetCurrent(ctypes.byref(handle)) == 0
    return handle.value or 0


def calls(run: Callable[[], object]) -> list[str]:
    """The driver calls that ``run`` makes, in order."""
    DRIVER.clear_calls()
    run()
    return DRIVER.calls()


class Writer:
    """A kernel that writes ``2 * value`` to a word."""

    def __init__(self, context: CudaContext, module: Module, value: int) -> None:
        memory = context.allocate_mapped(DECISION.itemsize + TARGET.itemsize, what="its arguments")
        self._state = memory.array[DECISION.itemsize :].view(TARGET)
        self._state["frame_index"] = value - 1
        decision = np.uint64(memory.address)
        state = np.uint64(memory.address + DECISION.itemsize)
        self.arguments = (state, state, decision, state, np.int32(0))
        self.kernel = module.function("edgetrack_gate_flag")

    def write(self, stream: Stream, address: int) -> None:
        self.kernel.launch(stream, ONE, ONE, *self.arguments, np.uint64(address))


def run_script(
    script: str, *, before: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    header = (
        "from edgetrack.backends.cuda import *\nfrom edgetrack.errors import *\nimport os, sys\n"
    )
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(before) + header + textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@contextmanager
def nothing_left() -> Iterator[None]:
    """Check that a test gives back all that it takes, and leaves its thread as it was."""
    pycuda.driver.init()
    before, was_current = live(), current_handle()
    yield
    DRIVER.reset()
    assert live() == before
    assert current_handle() == was_current
    assert pycuda.driver.Context.get_current() is None
