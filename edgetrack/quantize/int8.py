"""From a bundle and its calibration cache to the INT8 graphs that a backend compiles."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgetrack.bundle import Bundle
from edgetrack.errors import CalibrationError
from edgetrack.quantize.cache import CalibrationCache
from edgetrack.quantize.calibrate import smoothed_graphs
from edgetrack.quantize.fp16 import to_fp16
from edgetrack.quantize.layers import Layer, find_layers
from edgetrack.quantize.ort_twin import to_ort_twin
from edgetrack.quantize.qdq import insert_qdq

if TYPE_CHECKING:
    import onnx

__all__ = ["Runtime", "planned_layers", "quantize_bundle", "write_int8_graphs"]

Runtime = Literal["onnxruntime", "tensorrt"]


def write_int8_graphs(
    bundle: Bundle,
    cache: CalibrationCache,
    folder: Path,
    *,
    runtime: Runtime,
    with_attention: bool = False,
) -> dict[str, Path]:
    """Write the INT8 twin of every graph for one runtime, as ``<graph>.int8.onnx``.

    Args:
        bundle: The float32 bundle.
        cache: Its calibration cache.
        folder: Where to write; it exists.
        runtime: ``onnxruntime`` writes FP32 around the Q/DQ, ``tensorrt`` FP16.
        with_attention: Quantise the products of attention as well.

    Returns:
        Graph name → file.

    Raises:
        CalibrationError: The cache is of another bundle, or lacks a tensor.
        BackendUnavailableError: onnx or onnx-graphsurgeon is not installed.
        OSError: There is no room.
    """
    import onnx

    twins = quantize_bundle(bundle, cache, runtime=runtime, with_attention=with_attention)
    files = {}
    for name, twin in twins.items():
        files[name] = folder / f"{name}.int8.onnx"
        onnx.save(twin, files[name])
    return files


def quantize_bundle(
    bundle: Bundle,
    cache: CalibrationCache,
    *,
    runtime: Runtime | None = None,
    with_attention: bool = False,
) -> "dict[str, onnx.ModelProto]":
    """Quantise all graphs of a bundle.

    Args:
        bundle: The float32 bundle.
        cache: Its calibration cache.
        runtime: Whose twin; ``None`` is the Q/DQ graph that both are made from.
        with_attention: Quantise the products of attention as well.

    Raises:
        CalibrationError: The cache is of another bundle, or lacks a tensor.
        BackendUnavailableError: onnx or onnx-graphsurgeon is not installed.
    """
    twins = {}
    for name, model in smoothed_graphs(bundle, cache).items():
        planned = planned_layers(model, name, cache, with_attention=with_attention)
        layers = [layer for layer in planned if not layer.reason]
        ranges = cache.ranges_of(name, [t for layer in layers for t in layer.inputs])
        quantized = insert_qdq(model, layers, ranges)
        if runtime == "onnxruntime":
            quantized = _ort_twin(name, quantized, cache)
        elif runtime == "tensorrt":
            quantized = to_fp16(quantized)
        twins[name] = quantized
    return twins


def planned_layers(
    model: "onnx.ModelProto",
    graph: str,
    cache: CalibrationCache,
    *,
    with_attention: bool = False,
) -> tuple[Layer, ...]:
    """The layers of a graph, each with the reason if it stays in float.

    Args:
        model: The float graph that the cache's ranges belong to.
        graph: Its name.
        cache: Whose ``float_layers`` stay in float, and layers that saw nothing but zeros.
        with_attention: Quantise the products of attention as well.

    Raises:
        CalibrationError: The cache lacks a tensor.
    """
    planned = []
    for layer in find_layers(model, with_attention=with_attention):
        reason = layer.reason
        if not reason and f"{graph}/{layer.name}" in cache.float_layers:
            reason = "too sensitive, says the calibration cache"
        elif not reason and not all(cache.ranges_of(graph, layer.inputs)[t] for t in layer.inputs):
            reason = "calibration saw nothing but zeros"
        planned.append(dataclasses.replace(layer, reason=reason))
    return tuple(planned)


def _ort_twin(
    graph: str, quantized: "onnx.ModelProto", cache: CalibrationCache
) -> "onnx.ModelProto":
    ranges = cache.ranges_of(graph, ())
    try:
        return to_ort_twin(quantized, ranges)
    except KeyError as error:
        raise CalibrationError(
            f"calibration cache of {cache.model}: expected a range for {error.args[0]!r} of "
            f"{graph}, got none; make another with: edgetrack calibrate"
        ) from error
