"""Bundles of models with random weights, and what TensorRT-RTX compiles them to: no GPU needed."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from edgetrack.backends.trt.layer_table import LayerRow, read_layer_table
from edgetrack.build import build
from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.export import export_bundle
from edgetrack.models.segmented import SegmentedModel
from edgetrack.quantize.calibrate import MIN_CROPS, calibrate
from edgetrack.runtime.recording import record_crops


def export_untrained(model: SegmentedModel, folder: Path) -> Bundle:
    """A bundle with the operating points of the model's family."""
    return export_bundle(
        model,
        folder,
        name=f"{model.family}-untrained",
        operating_points={
            k: (t,) * (model.num_exits - 1) for k, t in model.operating_points.items()
        },
        operating_point=next(iter(model.operating_points)),
        provenance={},
        licence="random weights",
    )


def compile_with_rtx(
    bundle: Bundle, folder: Path, *, precision: str
) -> Mapping[str, tuple[LayerRow, ...]]:
    """The layer table of each graph; for INT8 as few crops as can be are calibrated on."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx, which builds without a GPU")
    calibration = None
    if precision == "int8":
        clip = list(render_clip(num_frames=MIN_CROPS + 1, width=240, height=180))
        frames = [frame for frame, _ in clip]
        crops = list(record_crops(bundle, frames, clip[0][1].tolist(), name="clip"))
        calibration = folder / "calibration"
        calibrate(bundle, crops, method="max").write(calibration)
    engines = build(
        bundle,
        backend="tensorrt-rtx",
        precision=precision,
        calibration=calibration,
        output=folder / "engines",
    )
    assert engines.key.precision == precision
    assert list(engines.graphs) == [graph.name for graph in bundle.graphs]
    return {
        name: read_layer_table(engines.path / graph.file) for name, graph in engines.graphs.items()
    }


def precisions_of_products(rows: tuple[LayerRow, ...]) -> set[str]:
    """In which types a graph multiplies matrices: ``Int8``, ``Half``, ``Float``."""
    return {row.precision for row in rows if row.is_product}


def num_attentions(rows: tuple[LayerRow, ...]) -> int:
    """Kernels that are a whole attention."""
    return sum(row.is_attention for row in rows)
