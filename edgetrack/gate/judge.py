"""Compare the float and the INT8 engines of a bundle on this device."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgetrack.backends import get_backend
from edgetrack.backends.engine import Backend, EngineSet
from edgetrack.backends.trt.layer_table import read_layer_table
from edgetrack.bundle import Bundle
from edgetrack.gate.choice import Choice, OnStep, choose
from edgetrack.gate.evidence import Evidence
from edgetrack.gate.timing import time_stages
from edgetrack.gate.verdict import GraphVerdict, Verdict
from edgetrack.parity import EngineRunner, open_runner

__all__ = ["Products", "judge", "judge_unmeasured", "uncompared"]

# Graph → its products in INT8, and all of them.
Products = Mapping[str, tuple[int, int]]

# What INT8 must save of a segment's time: less is within what two timings differ by.
_MIN_SAVING = 0.03


def judge(
    bundle: Bundle,
    backend: Backend,
    *,
    floats: EngineSet,
    quantized: EngineSet,
    evidence: Evidence,
    products: Products,
    is_strict: bool,
    on_step: OnStep,
) -> Verdict:
    """Time both sets of engines, compare their answers, and choose graph by graph.

    Args:
        bundle: What both were built from.
        backend: What runs them here.
        floats: Float engines.
        quantized: INT8 engines, all of them.
        evidence: What to compare on.
        products: From the INT8 graphs; what the compiler lists counts more.
        is_strict: Keep INT8 in all graphs.
        on_step: Called with what is being done and its fraction.

    Raises:
        BackendUnavailableError: The backend cannot run here.
        DeviceError: The GPU refused something.
    """
    on_step("timing", 0.0)
    times = time_stages(bundle, backend, floats, quantized, evidence)
    ruled_out = {}
    if not is_strict:
        ruled_out = {**_slower(times, floats.key.precision), **uncompared(bundle)}
    with (
        _runner(bundle, backend, floats) as reference,
        _runner(bundle, backend, quantized) as other,
    ):
        choice = choose(
            bundle,
            evidence.compared,
            reference=reference,
            quantized=other,
            ruled_out=ruled_out,
            is_fixed=is_strict,
            on_step=on_step,
        )
    return _verdict(
        bundle,
        quantized,
        floats=floats,
        float_precision=floats.key.precision,
        is_strict=is_strict,
        evidence=evidence,
        products=products,
        choice=choice,
        times=times,
    )


def judge_unmeasured(
    bundle: Bundle,
    *,
    floats: EngineSet | None,
    quantized: EngineSet,
    reason: str,
    float_precision: str,
    twins: EngineSet,
    evidence: Evidence,
    products: Products,
    is_strict: bool,
    on_step: OnStep,
) -> Verdict:
    """Keep INT8 wherever answers show what it does, of engines that do not run here.

    Args:
        bundle: What they were built from.
        floats: Float engines, where a graph is ``uncompared``.
        quantized: The INT8 engines.
        reason: Why they do not run.
        float_precision: What they would have been compared with.
        twins: The same INT8 numbers for ONNX Runtime, which say what the exits will.
        evidence: What to ask them on.
        products: From the INT8 graphs; what the compiler lists counts more.
        is_strict: Whether INT8 was to be kept anyway.
        on_step: Called with what is being done and its fraction.
    """
    cpu = get_backend("onnxruntime")
    with _runner(bundle, cpu, None) as reference, _runner(bundle, cpu, twins) as other:
        choice = choose(
            bundle,
            evidence.compared,
            reference=reference,
            quantized=other,
            ruled_out={} if is_strict else uncompared(bundle),
            is_fixed=True,
            on_step=on_step,
        )
    return _verdict(
        bundle,
        quantized,
        floats=floats,
        float_precision=float_precision,
        is_strict=is_strict,
        evidence=evidence,
        products=products,
        choice=choice,
        times={},
        not_measured=reason,
    )


def uncompared(bundle: Bundle) -> dict[str, str]:
    """The graphs whose INT8 could drift unseen, and why: each crop starts from a recorded state."""
    if bundle.update is None:
        return {}
    begins = any(spec.name in bundle.carried for spec in bundle.template.outputs)
    graphs = (bundle.template, bundle.update) if begins else (bundle.update,)
    return {g.name: "what it carries from frame to frame is not compared" for g in graphs}


def _slower(times: Mapping[str, tuple[float, float]], float_precision: str) -> dict[str, str]:
    """The graphs that INT8 does not make faster, and the times that say so."""
    return {
        stage: f"INT8 is not faster ({int8_ms:.2f} ms, {float_precision} {float_ms:.2f})"
        for stage, (float_ms, int8_ms) in times.items()
        if int8_ms > (1 - _MIN_SAVING) * float_ms
    }


@contextlib.contextmanager
def _runner(bundle: Bundle, backend: Backend, engines: EngineSet | None) -> Iterator[EngineRunner]:
    runner = open_runner(bundle, backend, engines=engines, device=backend.device)
    with contextlib.closing(runner):
        yield runner


def _verdict(
    bundle: Bundle,
    quantized: EngineSet,
    *,
    floats: EngineSet | None,
    float_precision: str,
    is_strict: bool,
    evidence: Evidence,
    products: Products,
    choice: Choice,
    times: Mapping[str, tuple[float, float]],
    not_measured: str = "",
) -> Verdict:
    in_float = choice.float_graphs
    exits = [graph.name for graph in bundle.heads or bundle.segments]
    ious = dict(zip(exits, choice.agreement.box_iou, strict=True))
    graphs = {}
    for name, engine in quantized.graphs.items():
        float_ms, int8_ms = times.get(name, (None, None))
        num_int8, num_all = _kernels(quantized.path / engine.file) or products[name]
        graphs[name] = GraphVerdict(
            precision=float_precision if name in in_float else "int8",
            reason=in_float.get(name, ""),
            float_ms=float_ms,
            int8_ms=int8_ms,
            float_bytes=None if floats is None else floats.graphs[name].size_bytes,
            int8_bytes=engine.size_bytes,
            num_int8_products=num_int8,
            num_products=num_all,
            box_iou=ious.get(name),
        )
    return Verdict(
        float_precision=float_precision,
        is_strict=is_strict,
        not_measured=not_measured,
        source=evidence.source,
        num_crops=len(evidence.compared),
        graphs=graphs,
        agreement=choice.agreement,
        operating_point=bundle.operating_point,
        operating_points=choice.operating_points,
    )


def _kernels(engine_path: Path) -> tuple[int, int] | None:
    """Products in INT8 and all products, where the compiler lists its kernels."""
    rows = [row for row in read_layer_table(engine_path) if row.is_product]
    return (sum(row.precision == "Int8" for row in rows), len(rows)) if rows else None
