"""Compile a graph in a process of its own, which gives back all memory that TensorRT took.

A builder keeps its libraries, its CUDA context and much of its memory until the process ends: on an
Orin Nano, which shares 8 GB between CPU and GPU, the second graph would find too little left. It
is a fresh interpreter and not ``multiprocessing``, which would run the caller's script once more.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from edgetrack.backends.cuda.driver import call_driver, find_cuda_device
from edgetrack.backends.trt.builder import BuildJob, StepReport, compile_graph
from edgetrack.backends.trt.errors import build_error
from edgetrack.errors import EdgeTrackError

__all__ = ["compile_in_child", "free_memory_bytes", "serve"]

# The child imports from where its parent does, wherever that was set.
_START = (
    "import sys; from multiprocessing.connection import Connection; "
    "parent = Connection(int(sys.argv[1])); sys.path[:] = parent.recv(); "
    "from edgetrack.backends.trt.child import serve; serve(parent)"
)
_MAX_TAIL_CHARS = 500


def compile_in_child(job: BuildJob, on_step: StepReport) -> None:
    """Do what ``compile_graph`` does, in another process; an exception here ends it.

    Raises:
        EngineBuildError: TensorRT refused the graph, or the process died, such as of memory.
        BackendUnavailableError: The package is not installed, or finds no driver to work with.
        OSError: The engine could not be written.
    """
    ours, theirs = multiprocessing.Pipe()
    with tempfile.TemporaryFile() as output, ours:
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_environment(job.device),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C in the terminal is for the parent to handle
            )
        try:
            error = _follow(ours, job, on_step)
        except (EOFError, ConnectionError):
            raise _died(job, child.wait(), output) from None
        finally:
            child.kill()
            child.wait()
    if error is not None:
        raise error


def serve(parent: Connection) -> None:
    """What the child does: compile, report steps, and at last the error or ``None``."""
    with contextlib.suppress(OSError):  # where memory runs out, let it be this process that ends
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
    job: BuildJob = parent.recv()
    try:
        # A parent that was killed reads no steps: sending one fails, which ends the build.
        compile_graph(job, lambda *step: parent.send(step), free_bytes=free_memory_bytes())
    except ConnectionError:
        return
    except (EdgeTrackError, OSError) as error:
        parent.send(error)
    else:
        parent.send(None)


def free_memory_bytes() -> int | None:
    """Memory that a build on the first CUDA device can use; ``None`` without one.

    It retains the device's primary context and makes it current, for as long as the process lives.

    Raises:
        DeviceError: The driver refused, such as for want of memory.
    """
    device = find_cuda_device()
    if device is None:
        return None
    if device.is_integrated:  # where the driver's figure leaves out what caches would give back
        return _available_memory_bytes()
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    call_driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call_driver("cuCtxSetCurrent", context)
    call_driver("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


def _follow(child: Connection, job: BuildJob, on_step: StepReport) -> Exception | None:
    """Hand over the job, pass on its steps, and return how it ended."""
    child.send(sys.path)
    child.send(job)
    message: Any = child.recv()
    while isinstance(message, tuple):
        on_step(*message)
        message = child.recv()
    error: Exception | None = message
    return error


def _environment(device: int) -> dict[str, str]:
    """The child's environment, in which the device is the only one: TensorRT takes the first."""
    environment = dict(os.environ)
    if device:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else []
        environment["CUDA_VISIBLE_DEVICES"] = names[device] if names else str(device)
    return environment


def _died(job: BuildJob, exit_code: int, output: IO[bytes]) -> EdgeTrackError:
    """The error for a child that ended without a word, from what it printed last."""
    output.seek(0)
    printed = output.read().decode("utf-8", "replace")[-_MAX_TAIL_CHARS:]
    end = f"it ended with code {exit_code}"
    if exit_code == -signal.SIGKILL:
        end = "it was killed, as the kernel does where a machine is out of memory"
    elif exit_code < 0:
        end = f"it crashed with {signal.Signals(-exit_code).name}"
    return build_error(
        job.onnx_path,
        expected=f"an engine from a process that runs {job.backend}",
        messages=[end, *printed.splitlines()],
        backend=job.backend,
    )


def _available_memory_bytes() -> int | None:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return None
