"""What TensorRT-RTX makes of the INT8 graphs, read from the builder's layer table: no GPU."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from recorded import record_inputs

from edgetrack.backends.trt.layer_table import LayerRow, layer_table
from edgetrack.bundle import Bundle
from edgetrack.quantize.cache import CalibrationCache, find_cache
from edgetrack.quantize.calibrate import MIN_CROPS, calibrate, smoothed_graphs
from edgetrack.quantize.int8 import planned_layers, quantize_bundle
from edgetrack.quantize.layers import Layer

pytestmark = [pytest.mark.rtx, pytest.mark.slow]

COMMITTED = Path(__file__).parents[2] / "calibration"
ARCHITECTURES = ("SM86", "SM89", "SM120")
Tables = dict[str, tuple[LayerRow, ...]]
Plans = tuple[dict[str, list[Layer]], Tables]


def build(trt: Any, model: onnx.ModelProto) -> tuple[LayerRow, ...]:
    """Build one engine for all three architectures; its layer table."""
    tables: list[str] = []
    errors: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]  # the bindings are untyped
        def log(self, severity: Any, message: str) -> None:
            if "Layers:" in message:
                tables.append(message)
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                errors.append(message)

    builder = trt.Builder(log := Log())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse(model.SerializeToString()), errors
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.max_aux_streams = 0
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(ARCHITECTURES)
    for index, name in enumerate(ARCHITECTURES):
        assert config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    assert builder.build_serialized_network(network, config) is not None, errors
    return layer_table(tables)


def plans_of(trt: Any, bundle: Bundle, cache: CalibrationCache) -> Plans:
    models = smoothed_graphs(bundle, cache)
    layers = {
        name: [x for x in planned_layers(model, name, cache) if not x.reason]
        for name, model in models.items()
    }
    twins = quantize_bundle(bundle, cache, runtime="tensorrt")
    return layers, {name: build(trt, twin) for name, twin in twins.items()}


@pytest.fixture(scope="module", params=["tiny", "base"])
def plans(request: pytest.FixtureRequest, shipped_bundle: Bundle) -> Plans:
    """INT8 layers and layer tables: of the bundle that ships, and of a random ``base``."""
    trt = pytest.importorskip(
        "tensorrt_rtx", reason="needs tensorrt_rtx, which builds without a GPU"
    )
    if request.param == "tiny":
        path = find_cache(shipped_bundle, COMMITTED)
        assert path is not None
        return plans_of(trt, shipped_bundle, CalibrationCache.read(path))
    base = request.getfixturevalue("base_bundle")
    recorded = record_inputs(base.crops, num_frames=MIN_CROPS)
    crops = [(f"clip/{k:06d}", inputs) for k, inputs in enumerate(recorded)]
    return plans_of(trt, base, calibrate(base, crops, method="max"))


def products_of(rows: tuple[LayerRow, ...], precision: str) -> list[LayerRow]:
    return [row for row in rows if row.is_product and row.precision == precision]


def test_each_quantised_layer_runs_as_an_int8_product(plans: Plans) -> None:
    layers, tables = plans

    planned = {name: len(of_graph) for name, of_graph in layers.items()}

    assert sum(planned.values()) > 20
    assert {n: len(products_of(rows, "Int8")) for n, rows in tables.items()} == planned


def test_every_linear_layer_is_an_int8_gemm(plans: Plans) -> None:
    layers, tables = plans

    for name, rows in tables.items():
        num_linear = sum(layer.kind == "linear" for layer in layers[name])
        assert sum(row.type == "gemm" for row in products_of(rows, "Int8")) == num_linear


def test_attention_stays_fused(plans: Plans) -> None:
    layers, tables = plans

    for name, rows in tables.items():
        num_blocks = sum(layer.name.endswith("attn.qkv") for layer in layers[name])
        assert sum(row.is_attention for row in rows) == num_blocks


def test_no_product_runs_in_fp32(plans: Plans) -> None:
    _, tables = plans

    assert [row.name for rows in tables.values() for row in products_of(rows, "Float")] == []
