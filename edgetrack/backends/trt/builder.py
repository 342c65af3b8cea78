"""Compile one graph with TensorRT or TensorRT-RTX, in the process that calls.

Precision lives in the graph (``quantize`` casts it): every network is strongly typed, and the
builder's precision flags and calibrators, gone in TensorRT 11, are not used. Attributes of the
bindings are tested, never version numbers, and the integers behind enumerations are not kept:
they differ between versions.
"""

import contextlib
import hashlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetrack.backends import import_package
from edgetrack.backends.trt.errors import build_error, make_log
from edgetrack.backends.trt.layer_table import layer_table, write_layer_table
from edgetrack.errors import BackendUnavailableError, EngineBuildError

__all__ = [
    "WORKSPACE_BYTES",
    "BuildJob",
    "StepReport",
    "compile_graph",
    "configure",
    "make_monitor",
    "network_flags",
    "part_of",
    "read_timings",
    "set_timings",
    "write_timings",
]

StepReport = Callable[[str, float], None]

# An Orin Nano shares 8 GB between CPU and GPU, and the builder takes what it may.
WORKSPACE_BYTES = 512 << 20

_TIMINGS_MAGIC = b"edgetrack timings 1\n"


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """One graph to compile.

    Attributes:
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        onnx_path: A graph that is cast to ``precision`` already.
        engine_path: Where the engine goes.
        precision: What the graph is expected to be in.
        device: Number of the CUDA device to build for.
        timings_path: Where tactics' timings are kept between builds; ``None`` keeps none.
    """

    backend: str
    onnx_path: Path
    engine_path: Path
    precision: str
    device: int = 0
    timings_path: Path | None = None


def compile_graph(job: BuildJob, on_step: StepReport, *, free_bytes: int | None = None) -> None:
    """Compile a graph, and write its layer table beside the engine.

    Args:
        job: What to compile.
        on_step: Called in this thread with the phase's name and the fraction done.
        free_bytes: Memory that the build may use; ``None`` if that does not matter.

    Raises:
        EngineBuildError: TensorRT refused the graph, or it is in another precision.
        BackendUnavailableError: The package is not installed, or finds no driver to work with.
    """
    trt = import_package(job.backend)
    log = make_log(trt)

    def failed(expected: str, messages: list[str]) -> EngineBuildError | BackendUnavailableError:
        free = "" if free_bytes is None else f" within {free_bytes >> 20} MB of free memory"
        wanted = f"{expected} from {job.backend} {trt.__version__}{free}"
        return build_error(job.onnx_path, expected=wanted, messages=messages, backend=job.backend)

    try:
        builder = trt.Builder(log)
    except TypeError as error:  # what the bindings make of a builder that TensorRT refuses
        raise failed("a builder", [*log.take(), str(error)]) from error
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, log)
    content = job.onnx_path.read_bytes()  # network and parser point into it until the end
    if not parser.parse(content):
        found = (parser.get_error(i) for i in range(parser.num_errors))
        errors = [f"{e.node_operator()} {e.node_name()!r}: {e.desc()}" for e in found]
        raise failed("a graph that it reads", errors or log.take())
    _check_types(trt, network, job)
    config = builder.create_builder_config()
    configure(trt, config, free_bytes=free_bytes)
    with _kept_timings(config, job.timings_path):
        plan = _build(trt, builder, network, config, on_step)
    if plan is None:
        raise failed("an engine", log.take())
    write_layer_table(job.engine_path, layer_table(log.tables))
    _write_whole(job.engine_path, plan)


def network_flags(trt: Any) -> int:
    """Flags of a strongly typed network, for ``Builder.create_network``."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def configure(trt: Any, config: Any, *, free_bytes: int | None = None) -> None:
    """Set what all engines share: one stream, capturable, full layer names, no TF32, capped memory.

    Args:
        trt: The bindings.
        config: An ``IBuilderConfig``.
        free_bytes: Memory that the build may use; ``None`` sets only the cap that always holds.
    """
    workspace_bytes = WORKSPACE_BYTES
    if free_bytes is not None:
        workspace_bytes = min(WORKSPACE_BYTES, free_bytes // 2)
        # The pool must be a power of two, else TensorRT keeps its own: 75 % of *all* memory.
        tactic_bytes = 1 << (max(free_bytes * 3 // 4, 1 << 20).bit_length() - 1)
        config.set_memory_pool_limit(trt.MemoryPoolType.TACTIC_DRAM, tactic_bytes)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    config.clear_flag(trt.BuilderFlag.TF32)
    config.max_aux_streams = 0  # more would fork inside the frame's CUDA graph
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX: capturable, or fails
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def make_monitor(
    trt: Any, report: Callable[[tuple[str, float]], None], cancelled: threading.Event
) -> Any:
    """A progress monitor that reports (phase, fraction of the build), and can cancel it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the bindings are untyped
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, list[int]] = {}
            self._fraction = 0.0

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            self._phases[name] = [0, max(num_steps, 1)]

        def step_complete(self, name: str, step: int) -> bool:
            self._phases[name][0] = step + 1
            fraction = 0.0
            for done, total in reversed(self._phases.values()):
                fraction = (done + fraction) / total
            self._fraction = max(self._fraction, min(fraction, 1.0))
            report((name, self._fraction))
            return not cancelled.is_set()

        def phase_finish(self, name: str) -> None:
            self._phases.pop(name, None)

    return Monitor()


def part_of(path: Path) -> Path:
    """The file that is written before it gets the name ``path``."""
    return path.with_name(f"{path.name}.part")


def read_timings(path: Path) -> bytes:
    """The timing cache that ``write_timings`` wrote; empty if there is none, or it is damaged."""
    start = len(_TIMINGS_MAGIC) + hashlib.sha256().digest_size
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    is_whole = content[:start] == _TIMINGS_MAGIC + hashlib.sha256(content[start:]).digest()
    return content[start:] if is_whole else b""


def write_timings(path: Path, timings: bytes) -> None:
    """Write a timing cache; one that cannot be written only makes the next build slower."""
    with contextlib.suppress(OSError):
        _write_whole(path, _TIMINGS_MAGIC + hashlib.sha256(timings).digest() + timings)


def set_timings(config: Any, timings: bytes) -> Any:
    """Attach a timing cache; a new one where TensorRT refuses it, as of another device.

    Returns:
        The cache, which must outlive the build.
    """
    cache = config.create_timing_cache(timings)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


@contextlib.contextmanager
def _kept_timings(config: Any, path: Path | None) -> Iterator[None]:
    """Build with the timings of builds before, and keep those of this one, even if it fails."""
    if path is None:
        yield
        return
    cache = set_timings(config, read_timings(path))
    yield
    write_timings(path, bytes(cache.serialize()))


def _build(trt: Any, builder: Any, network: Any, config: Any, on_step: StepReport) -> Any:
    """Build in a thread: in TensorRT's callbacks Ctrl-C and exceptions would be swallowed."""
    steps: queue.SimpleQueue[tuple[str, float] | None] = queue.SimpleQueue()
    cancelled = threading.Event()
    config.progress_monitor = make_monitor(trt, steps.put, cancelled)
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(builder.build_serialized_network, network, config)
        building.add_done_callback(lambda _: steps.put(None))
        try:
            while (step := steps.get()) is not None:
                on_step(*step)
        finally:
            cancelled.set()
    return building.result()


def _check_types(trt: Any, network: Any, job: BuildJob) -> None:
    """A graph in another precision would build silently, to an engine with a wrong name."""
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    halves = [t.name for t in tensors if t.dtype == trt.DataType.HALF]
    # INT8 is Q/DQ in a graph that is cast to FP16.
    if bool(halves) != (job.precision in ("fp16", "int8")):
        raise EngineBuildError(
            f"{job.onnx_path}: expected a graph cast to {job.precision}, got float16 tensors "
            f"{halves}; run: edgetrack build"
        )


def _write_whole(path: Path, content: Any) -> None:
    """Write a file under another name first, so that ``path`` is never half of it."""
    part_of(path).write_bytes(content)
    part_of(path).replace(path)
