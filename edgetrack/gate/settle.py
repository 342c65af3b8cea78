"""From INT8 engines of all graphs to those that are kept: INT8, or float where INT8 loses."""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from edgetrack.backends.engine import Backend, EngineSet
from edgetrack.bundle import Bundle
from edgetrack.errors import BackendUnavailableError, DeviceError, DeviceMemoryError
from edgetrack.gate.choice import OnStep
from edgetrack.gate.evidence import Evidence, render_evidence
from edgetrack.gate.judge import Products, judge, judge_unmeasured, uncompared
from edgetrack.gate.timing import time_updates
from edgetrack.gate.verdict import Verdict
from edgetrack.parity import open_runner
from edgetrack.quantize.cache import CalibrationCache
from edgetrack.quantize.calibrate import smoothed_graphs
from edgetrack.quantize.int8 import planned_layers, write_int8_graphs

__all__ = ["settle", "why_not_here"]


def settle(
    bundle: Bundle,
    backend: Backend,
    quantized: EngineSet,
    *,
    cache: CalibrationCache,
    evidence: Evidence | None,
    is_strict: bool,
    build_floats: Callable[[], EngineSet],
    on_step: OnStep,
) -> EngineSet:
    """Compare INT8 engines with float ones, and put these in the place of those that lose.

    Args:
        bundle: What the engines were built from.
        backend: What runs them here, if anything does.
        quantized: INT8 engines of all graphs; files in their folder are replaced.
        cache: What they were quantised by.
        evidence: What to compare on; ``None`` renders clips.
        is_strict: Keep INT8 in all graphs.
        build_floats: Gives the float engines; not called if engines do not run here, unless some
            graph stays in float all the same.
        on_step: Called with what is being done and its fraction.

    Returns:
        The engines to keep, with their thresholds and the verdict. The sidecar is written, but for
        a caller that changes them no more.

    Raises:
        BackendUnavailableError: OpenCV or ONNX Runtime is not installed.
        DeviceMemoryError: The GPU has too little free memory to measure on.
        EngineBuildError: The float engines could not be built.
    """
    quantized.write()  # trackers find engines by their sidecar
    reason = why_not_here(bundle, backend, quantized)
    if evidence is None:
        evidence = render_evidence(bundle, on_progress=lambda done: on_step("rendering", done))
    products = _products(bundle, cache)
    if reason:
        floats = build_floats() if uncompared(bundle) and not is_strict else None
        with tempfile.TemporaryDirectory(dir=quantized.path) as scratch:
            verdict = judge_unmeasured(
                bundle,
                floats=floats,
                quantized=quantized,
                reason=reason,
                float_precision=backend.precisions[0],
                twins=_ort_twins(bundle, quantized, cache, Path(scratch)),
                evidence=evidence,
                products=products,
                is_strict=is_strict,
                on_step=on_step,
            )
        kept = quantized if floats is None else _mixed(quantized, floats, verdict)
        return _with_verdict(kept, verdict)
    floats = build_floats()
    verdict = judge(
        bundle,
        backend,
        floats=floats,
        quantized=quantized,
        evidence=evidence,
        products=products,
        is_strict=is_strict,
        on_step=on_step,
    )
    chosen = _with_verdict(_mixed(quantized, floats, verdict), verdict)
    chosen.write()
    on_step("timing what was chosen", 0.0)
    update_ms = time_updates(bundle, backend, floats=floats, chosen=chosen, evidence=evidence)
    return _with_verdict(chosen, dataclasses.replace(verdict, update_ms=update_ms))


def why_not_here(bundle: Bundle, backend: Backend, engines: EngineSet) -> str:
    """Why engines that were built here do not run here; empty if they do.

    Raises:
        DeviceMemoryError: They would, were the GPU not full just now.
        EngineError: One does not load.
    """
    try:
        open_runner(bundle, backend, engines=engines, device=backend.device).close()
    except DeviceMemoryError:
        raise
    except (BackendUnavailableError, DeviceError) as error:
        return str(error)
    return ""


def _products(bundle: Bundle, cache: CalibrationCache) -> Products:
    counts = {}
    for name, model in smoothed_graphs(bundle, cache).items():
        layers = planned_layers(model, name, cache)
        counts[name] = sum(not layer.reason for layer in layers), len(layers)
    return counts


def _ort_twins(
    bundle: Bundle, quantized: EngineSet, cache: CalibrationCache, folder: Path
) -> EngineSet:
    """The same INT8 numbers for ONNX Runtime, whose INT8 engines are the graphs themselves."""
    files = write_int8_graphs(bundle, cache, folder, runtime="onnxruntime")
    graphs = {
        name: dataclasses.replace(graph, file=files[name].name)
        for name, graph in quantized.graphs.items()
    }
    return dataclasses.replace(quantized, path=folder, graphs=graphs)


def _mixed(quantized: EngineSet, floats: EngineSet, verdict: Verdict) -> EngineSet:
    """INT8 engines with float ones in the place of those that lost, files included."""
    graphs = dict(quantized.graphs)
    for name, found in verdict.graphs.items():
        if found.precision != "int8":
            graphs[name] = floats.graphs[name]
            for file in floats.path.glob(f"{name}.*"):  # TensorRT's table of layers as well
                shutil.copyfile(file, quantized.path / file.name)
    return dataclasses.replace(quantized, graphs=graphs)


def _with_verdict(engines: EngineSet, verdict: Verdict) -> EngineSet:
    return dataclasses.replace(
        engines, operating_points=verdict.operating_points, gate=verdict.as_dict()
    )
