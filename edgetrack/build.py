"""Compile a bundle's graphs to engines, once per machine: bundle → ``engines/<key>/``.

An engine folder is named by its key: model, precision, backend and version, architecture, and a
hash over all of it with the bundle's graphs, the device and the options. What has the same key is
up to date; a new ONNX Runtime, another GPU or another bundle has another key and another folder.

INT8 is measured against float on this device before it is kept (see ``gate``), so such a build
makes both sets of engines, and may take graphs of the float one. Another calibration cache, other
operating points or other clips to compare on make it out of date; so does a device to measure on,
where there was none.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgetrack.backends import get_backend
from edgetrack.backends.engine import Backend, BuiltGraph, EngineKey, EngineSet, find_engines
from edgetrack.bundle import Bundle, sha256_of, whole_folder
from edgetrack.errors import CalibrationError, EngineBuildError, EngineError

if TYPE_CHECKING:
    from edgetrack.data.target_clips import TargetClip
    from edgetrack.gate import Evidence
    from edgetrack.quantize.cache import CalibrationCache

__all__ = ["BuildProgress", "build"]

OnProgress = Callable[["BuildProgress"], None]

_LOCK_NAME = ".lock"
# The name that ``whole_folder`` gives to what is not finished: folders of dead builds match it.
_PARTIAL = re.compile(r"\..+-(fp32|fp16|int8)-.+-[0-9a-f]{8}\.[a-z0-9_]{8}(\.old)?")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
_METHOD = "mse"  # that of ``edgetrack calibrate``
# ONNX Runtime's engines are as large as their graphs; TensorRT-RTX adds kernels, FP16 a cast graph.
_ROOM_FACTOR, _ROOM_PER_GRAPH_BYTES = 1.5, 4 << 20


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """How far a build is.

    Attributes:
        graph: The graph being compiled; empty while something is done to all of them.
        index: Its number, from 0.
        num_graphs: How many there are.
        phase: What is being done.
        fraction: The share of this graph, or of this phase, that is done; 1 once it is.
    """

    graph: str
    index: int
    num_graphs: int
    phase: str
    fraction: float


@dataclass(frozen=True, kw_only=True)
class _Int8:
    """What an INT8 build needs besides the bundle; evidence where it calibrated on the same."""

    cache: "CalibrationCache"
    is_strict: bool
    evidence: "Evidence | None"


def build(
    bundle: Bundle | str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    precision: str | None = None,
    device: int = 0,
    calibration: str | os.PathLike[str] | None = None,
    calibration_clips: "Sequence[TargetClip]" = (),
    is_strict: bool = False,
    output: str | os.PathLike[str] = "engines",
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> EngineSet:
    """Compile all graphs of a bundle for this machine, unless that was done before.

    For INT8 the float engines are built as well, and both are compared on this device (see
    ``gate``): a graph that is not faster in INT8, or does harm, stays in float, and thresholds are
    fitted to what was chosen. The template graph runs once per target and is not timed. Of a bundle
    with an update graph, what writes its state stays in float, since frames are compared one by
    one. Where the engines do not run here, nothing is timed and all other graphs stay in INT8,
    until a build finds that they run.

    An interrupted or killed build leaves what was there before it.

    Args:
        bundle: The bundle, or its folder; ``None`` is the one that ships.
        backend: A backend's name; ``auto`` is the best that can build and run here.
        precision: ``fp32``, ``fp16`` or ``int8``; ``None`` is ``fp16`` where the backend has it.
        device: Number of the CUDA device to build for, on backends that use one.
        calibration: For INT8, a calibration cache, or a folder of them; ``None`` looks in
            ``calibration``, then in the bundle's own folder of that name. With
            ``calibration_clips`` the folder to which the new cache is written.
        calibration_clips: For INT8, calibrate on these first, and compare on them; without them
            the comparison is on clips that are rendered.
        is_strict: For INT8, keep it in all graphs, whatever the comparison says.
        output: The folder that holds engine folders.
        force: Compile even what is up to date, for INT8 the float engines too.
        on_progress: Called as the build goes on; if all is up to date, only for what is done with
            ``calibration_clips`` before that is known.

    Raises:
        ValueError: The backend has no such precision; the message says why. Or an argument for
            INT8 came with another precision.
        BackendUnavailableError: The backend is unknown or not installed, or finds no GPU.
        BundleError: The bundle cannot be read.
        EngineBuildError: The compiler refused a graph, or memory or room in ``output`` ran out.
        DeviceError: For INT8, the GPU failed or was too full to measure on; build again.
        CalibrationError: For INT8 there is no cache of this bundle, or it does not fit; or the
            clips cannot be calibrated on.
        SourceError: A clip cannot be read.
    """
    source = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    compiler = get_backend(backend, device=device)
    if precision is None:
        precision = compiler.precisions[0]
    key = compiler.key(model=source.name, bundle_digest=source.digest, precision=precision)
    cache_path = None if calibration is None else Path(calibration)
    int8 = None
    if precision == "int8":
        int8 = _prepare_int8(source, cache_path, calibration_clips, is_strict, on_progress)
        key = dataclasses.replace(key, quantization=_quantization(source, int8))
    elif is_strict or calibration_clips:
        raise ValueError(
            f"precision: expected 'int8' with is_strict or calibration_clips, got {precision!r}"
        )
    root = Path(output)
    if not force and (found := _up_to_date(source, compiler, root, key)):
        return found
    source.verify()
    needed_bytes = _needed_bytes(source, num_sets=1 if int8 is None else 2)
    with _explained(root, needed_bytes), _alone_in(root):
        # Again: a build that we waited for may have made them.
        if not force and (found := _up_to_date(source, compiler, root, key)):
            return found
        _remove_dead_builds(root)
        if shutil.disk_usage(root).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if int8 is None:
            return _build_float(source, compiler, key, root, on_progress)
        return _build_int8(source, compiler, key, root, int8, force, on_progress)


def _prepare_int8(
    bundle: Bundle,
    calibration: Path | None,
    clips: "Sequence[TargetClip]",
    is_strict: bool,
    on_progress: OnProgress | None,
) -> _Int8:
    """Find the calibration cache, or make one on clips and write it."""
    from edgetrack.quantize.cache import FOLDER_NAME, load_cache

    if not clips:
        cache = load_cache(bundle, calibration)
        return _Int8(cache=cache, is_strict=is_strict, evidence=None)
    folder = Path(FOLDER_NAME) if calibration is None else calibration
    if folder.is_file():
        raise CalibrationError(
            f"{folder}: expected a folder to write the new calibration cache to, got a file; name "
            "its folder"
        )
    from edgetrack.gate import gather
    from edgetrack.quantize.calibrate import calibrate

    evidence = gather(
        bundle, clips, on_progress=lambda done: _tell(on_progress, "tracking to calibrate", done)
    )
    cache = calibrate(
        bundle,
        evidence.crops,
        method=_METHOD,
        on_progress=lambda done: _tell(on_progress, "calibrating", done),
    )
    cache.write(folder / cache.file_name)
    return _Int8(cache=cache, is_strict=is_strict, evidence=evidence)


def _quantization(bundle: Bundle, int8: _Int8) -> Mapping[str, Any]:
    """What INT8 engines depend on besides the rest of their key, as JSON gives it back."""
    return {
        "calibration": int8.cache.file_name,
        "is_strict": int8.is_strict,
        "criterion": bundle.criterion,
        "operating_points": {name: list(t) for name, t in bundle.operating_points.items()},
        "evidence": None if int8.evidence is None else int8.evidence.source,
    }


def _up_to_date(bundle: Bundle, backend: Backend, root: Path, key: EngineKey) -> EngineSet | None:
    """Engines with this key; changed or damaged ones count as none, so they are built again.

    So do those that were not measured for want of a device that is there now.
    """
    names = [graph.name for graph in bundle.graphs]
    try:
        found = find_engines(root, dataclasses.replace(key, quantization=None), graphs=names)
        if found is None or not _stands_on(found.key.quantization, key.quantization):
            return None
        if found.gate.get("not_measured"):
            from edgetrack.gate.settle import why_not_here

            return found if why_not_here(bundle, backend, found) else None
    except EngineError:
        return None
    return found


def _stands_on(built: Mapping[str, Any] | None, wanted: Mapping[str, Any] | None) -> bool:
    """Whether engines were quantised as wanted; without clips, judged on whatever it was."""
    if not isinstance(built, dict) or wanted is None:
        return built == wanted
    if wanted["evidence"] is None:
        built = {**built, "evidence": None}
    return built == wanted


def _needed_bytes(bundle: Bundle, *, num_sets: int) -> int:
    sizes = [bundle.graph_path(graph).stat().st_size for graph in bundle.graphs]
    return num_sets * (int(_ROOM_FACTOR * sum(sizes)) + _ROOM_PER_GRAPH_BYTES * len(sizes))


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


def _build_float(
    bundle: Bundle, backend: Backend, key: EngineKey, root: Path, on_progress: OnProgress | None
) -> EngineSet:
    target = root / key.folder_name
    with whole_folder(target) as folder, tempfile.TemporaryDirectory(dir=folder) as scratch:
        typed = {graph.name: bundle.graph_path(graph) for graph in bundle.graphs}
        if key.precision == "fp16":
            # Needs onnx, which a build that is up to date does not.
            from edgetrack.quantize.fp16 import cast_file_to_fp16

            for name, path in typed.items():
                typed[name] = Path(scratch) / path.name
                cast_file_to_fp16(path, typed[name])
        engines = _compile_all(bundle, backend, key, typed, folder, on_progress)
        engines.write()
    return dataclasses.replace(engines, path=target)


def _build_int8(
    bundle: Bundle,
    backend: Backend,
    key: EngineKey,
    root: Path,
    int8: _Int8,
    force: bool,
    on_progress: OnProgress | None,
) -> EngineSet:
    # Needs OpenCV, and NumPy and onnx, which a build that is up to date does not.
    from edgetrack.gate import settle
    from edgetrack.quantize.int8 import write_int8_graphs

    def build_floats() -> EngineSet:
        precision = backend.precisions[0]
        float_key = dataclasses.replace(key, precision=precision, quantization=None)
        found = None if force else _up_to_date(bundle, backend, root, float_key)
        return found or _build_float(bundle, backend, float_key, root, on_progress)

    target = root / key.folder_name
    with whole_folder(target) as folder, tempfile.TemporaryDirectory(dir=folder) as scratch:
        _tell(on_progress, "quantising all graphs", 0.0)
        runtime: Literal["onnxruntime", "tensorrt"] = (
            "onnxruntime" if backend.runs_on == "cpu" else "tensorrt"
        )
        typed = write_int8_graphs(bundle, int8.cache, Path(scratch), runtime=runtime)
        quantized = _compile_all(bundle, backend, key, typed, folder, on_progress)
        engines = settle(
            bundle,
            backend,
            quantized,
            cache=int8.cache,
            evidence=int8.evidence,
            is_strict=int8.is_strict,
            build_floats=build_floats,
            on_step=lambda phase, fraction: _tell(on_progress, phase, fraction),
        )
        engines.write()
    return dataclasses.replace(engines, path=target)


def _compile_all(
    bundle: Bundle,
    backend: Backend,
    key: EngineKey,
    typed: Mapping[str, Path],
    folder: Path,
    on_progress: OnProgress | None,
) -> EngineSet:
    """Compile graphs that are in the key's precision already; the sidecar is not written."""
    graphs = {}
    for index, graph in enumerate(bundle.graphs):
        report = _reporter(bundle, index, on_progress)
        engine_path = folder / f"{graph.name}{backend.engine_suffix}"
        graphs[graph.name] = _build_one(
            typed[graph.name], engine_path, backend, key.precision, report
        )
    built_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return EngineSet(path=folder, key=key, graphs=graphs, built_at=built_at)


def _tell(on_progress: OnProgress | None, phase: str, fraction: float) -> None:
    """Report what is done to all graphs at once."""
    if on_progress is not None:
        on_progress(BuildProgress(graph="", index=0, num_graphs=1, phase=phase, fraction=fraction))


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
        precision=precision,
    )
