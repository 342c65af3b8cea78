"""Compile a bundle's graphs to engines, once per machine: bundle → ``engines/<key>/``.

An engine folder is named by its key: model, precision, backend and version, architecture, and a
hash over all of it with the bundle's graphs, the device and the options. What has the same key is
up to date; a new ONNX Runtime, another GPU or another bundle has another key and another folder.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from edgetrack.backends import get_backend
from edgetrack.backends.engine import Backend, BuiltGraph, EngineKey, EngineSet, find_engines
from edgetrack.bundle import Bundle, sha256_of, whole_folder
from edgetrack.errors import EngineBuildError, EngineMismatchError

__all__ = ["BuildProgress", "build"]

OnProgress = Callable[["BuildProgress"], None]

_LOCK_NAME = ".lock"
# The name that ``whole_folder`` gives to what is not finished: folders of dead builds match it.
_PARTIAL = re.compile(r"\..+-(fp32|fp16|int8)-.+-[0-9a-f]{8}\.[a-z0-9_]{8}(\.old)?")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
# ONNX Runtime's engines are as large as their graphs; TensorRT-RTX adds kernels, FP16 a cast graph.
_ROOM_FACTOR, _ROOM_PER_GRAPH_BYTES = 1.5, 4 << 20


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """How far a build is.

    Attributes:
        graph: The graph being compiled.
        index: Its number, from 0.
        num_graphs: How many there are.
        phase: What the compiler is doing.
        fraction: The share of this graph that is done; 1 once it is.
    """

    graph: str
    index: int
    num_graphs: int
    phase: str
    fraction: float


def build(
    bundle: Bundle | str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    precision: str | None = None,
    device: int = 0,
    calibration: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] = "engines",
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> EngineSet:
    """Compile all graphs of a bundle for this machine, unless that was done before.

    An interrupted or killed build leaves what was there before it.

    Args:
        bundle: The bundle, or its folder; ``None`` is the one that ships.
        backend: A backend's name; ``auto`` is the best that can build and run here.
        precision: ``fp32``, ``fp16`` or ``int8``; ``None`` is ``fp16`` where the backend has it.
        device: Number of the CUDA device to build for, on backends that use one.
        calibration: For INT8, a calibration cache, or a folder of them; ``None`` looks in the
            bundle's own folder ``calibration`` (see ``quantize.calibrate``).
        output: The folder that holds engine folders.
        force: Compile even what is up to date.
        on_progress: Called as the build goes on; never called if all is up to date.

    Raises:
        ValueError: The backend has no such precision; the message says why.
        BackendUnavailableError: The backend is unknown or not installed, or finds no GPU.
        BundleError: The bundle cannot be read.
        EngineBuildError: The compiler refused a graph, or memory or room in ``output`` ran out.
        CalibrationError: For INT8 there is no cache of this bundle, or it does not fit.
    """
    source = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    compiler = get_backend(backend, device=device)
    if precision is None:
        precision = compiler.precisions[0]
    key = compiler.key(model=source.name, bundle_digest=source.digest, precision=precision)
    root = Path(output)
    if not force and (found := _up_to_date(source, root, key)):
        return found
    source.verify()
    needed_bytes = _needed_bytes(source)
    with _explained(root, needed_bytes), _alone_in(root):
        if not force and (found := _up_to_date(source, root, key)):  # by a build that we waited for
            return found
        _remove_dead_builds(root)
        if shutil.disk_usage(root).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return _build_all(
            source,
            compiler,
            key,
            root / key.folder_name,
            on_progress,
            calibration=None if calibration is None else Path(calibration),
        )


def _up_to_date(bundle: Bundle, root: Path, key: EngineKey) -> EngineSet | None:
    """Engines with this key; changed or damaged ones count as none, so they are built again."""
    try:
        return find_engines(root, key, graphs=[graph.name for graph in bundle.graphs])
    except EngineMismatchError:
        return None


def _needed_bytes(bundle: Bundle) -> int:
    sizes = [bundle.graph_path(graph).stat().st_size for graph in bundle.graphs]
    return int(_ROOM_FACTOR * sum(sizes)) + _ROOM_PER_GRAPH_BYTES * len(sizes)


@contextlib.contextmanager
def _explained(root: Path, needed_bytes: int) -> Iterator[None]:
    """Say what an error of the file system means for a build."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            needed_mb = needed_bytes / 1e6
            raise EngineBuildError(
                f"{root}: expected {needed_mb:.1f} MB of free space for the engines, got too "
                "little; free some, or choose another folder with --output"
            ) from error
        if error.errno in _NO_WRITING:
            raise EngineBuildError(
                f"{root}: expected a folder to write engines to, got: {error.strerror}; "
                "choose another with --output"
            ) from error
        raise


@contextlib.contextmanager
def _alone_in(root: Path) -> Iterator[None]:
    """Let one build at a time write here; the kernel frees the lock of one that dies."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / _LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_dead_builds(root: Path) -> None:
    """Remove what killed builds left; we hold the lock, so none of it is being written."""
    for path in root.iterdir():
        if path.is_dir() and _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path)


def _build_all(
    bundle: Bundle,
    backend: Backend,
    key: EngineKey,
    target: Path,
    on_progress: OnProgress | None,
    *,
    calibration: Path | None,
) -> EngineSet:
    graphs: dict[str, BuiltGraph] = {}
    with whole_folder(target) as folder, tempfile.TemporaryDirectory(dir=folder) as scratch:
        if key.precision == "int8":
            _reporter(bundle, 0, on_progress)("quantising all graphs", 0.0)
        typed = _typed_graphs(bundle, backend, key.precision, Path(scratch), calibration)
        for index, graph in enumerate(bundle.graphs):
            report = _reporter(bundle, index, on_progress)
            engine_path = folder / f"{graph.name}{backend.engine_suffix}"
            graphs[graph.name] = _build_one(
                typed[graph.name], engine_path, backend, key.precision, report
            )
        built_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        EngineSet(path=folder, key=key, graphs=graphs, built_at=built_at).write()
    return EngineSet(path=target, key=key, graphs=graphs, built_at=built_at)


def _reporter(
    bundle: Bundle, index: int, on_progress: OnProgress | None
) -> Callable[[str, float], None]:
    name, num_graphs = bundle.graphs[index].name, len(bundle.graphs)

    def report(phase: str, fraction: float) -> None:
        if on_progress is not None:
            on_progress(
                BuildProgress(
                    graph=name, index=index, num_graphs=num_graphs, phase=phase, fraction=fraction
                )
            )

    return report


def _build_one(
    onnx_path: Path,
    engine_path: Path,
    backend: Backend,
    precision: str,
    report: Callable[[str, float], None],
) -> BuiltGraph:
    start = time.perf_counter()
    report("starting", 0.0)
    backend.compile(onnx_path, engine_path, precision=precision, on_step=report)
    report("done", 1.0)
    return BuiltGraph(
        file=engine_path.name,
        sha256=sha256_of(engine_path),
        size_bytes=engine_path.stat().st_size,
        build_s=round(time.perf_counter() - start, 3),
    )


def _typed_graphs(
    bundle: Bundle, backend: Backend, precision: str, scratch: Path, calibration: Path | None
) -> Mapping[str, Path]:
    """The graphs in the precision of the build, by name; FP16 and INT8 are written to scratch."""
    paths = {graph.name: bundle.graph_path(graph) for graph in bundle.graphs}
    # What quantises needs NumPy and onnx, which a build that is up to date does not.
    if precision == "fp16":
        from edgetrack.quantize.fp16 import cast_file_to_fp16

        for name, path in paths.items():
            paths[name] = scratch / path.name
            cast_file_to_fp16(path, paths[name])
    elif precision == "int8":
        from edgetrack.quantize.cache import load_cache
        from edgetrack.quantize.int8 import write_int8_graphs

        cache = load_cache(bundle, calibration)
        runtime: Literal["onnxruntime", "tensorrt"] = (
            "onnxruntime" if backend.runs_on == "cpu" else "tensorrt"
        )
        return write_int8_graphs(bundle, cache, scratch, runtime=runtime)
    return paths
