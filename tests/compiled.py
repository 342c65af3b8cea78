"""Bundles of models with random weights, and what TensorRT-RTX compiles them to: no GPU needed."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from edgetrack.backends.trt.layer_table import LayerRow, read_layer_table
from edgetrack.build import build
from edgetrack.bundle import Bundle
from edgetrack.data.target_clips import render_target_clips
from edgetrack.export import export_bundle
from edgetrack.models.segmented import SegmentedModel
from edgetrack.quantize.calibrate import MIN_CROPS


def export_untrained(model: SegmentedModel, folder: Path) -> Bundle:
    """A bundle with the operating points of the model's family."""
    return export_bundle(
        model,
        folder,
        name=f"{model.family}-untrained",
        provenance={},
        licence="random weights",
    )


def compile_with_rtx(bundle: Bundle, *, precision: str) -> Mapping[str, tuple[LayerRow, ...]]:
    """The layer table of each graph, from engines beside the bundle's folder.

    INT8 engines are calibrated and compared on as few crops as can be, with the FP16 engines that
    are there already.
    """
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx, which builds without a GPU")
    clips = render_target_clips(num_clips=1, num_frames=MIN_CROPS + 1, first_seed=0)
    engines = build(
        bundle,
        backend="tensorrt-rtx",
        precision=precision,
        calibration=bundle.path.parent / "calibration",
        calibration_clips=clips if precision == "int8" else (),
        output=bundle.path.parent / "engines",
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
