"""What TensorRT-RTX makes of our own families, read from the builder's layer table: no GPU."""

import pytest

from edgetrack.backends.trt.layer_table import LayerRow, read_layer_table
from edgetrack.build import build
from edgetrack.export import export_bundle
from edgetrack.models.early_exit_vit import CONFIGS
from edgetrack.models.registry import create_model

pytestmark = [pytest.mark.rtx, pytest.mark.slow]


@pytest.fixture(scope="module", params=["tiny", "base"])
def plans(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, tuple[LayerRow, ...]]]:
    """The layer tables of all graphs of a variant with random weights, built in FP16."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx, which builds without a GPU")
    folder = tmp_path_factory.mktemp(request.param)
    bundle = export_bundle(
        create_model(f"early_exit_vit-{request.param}"),
        folder / "bundle",
        name=request.param,
        operating_points={"balanced": (0.3, 0.3)},
        operating_point="balanced",
        provenance={},
        licence="random weights",
    )
    engines = build(bundle, backend="tensorrt-rtx", precision="fp16", output=folder / "engines")
    return request.param, {
        name: read_layer_table(engines.path / graph.file) for name, graph in engines.graphs.items()
    }


def test_attention_is_fused_in_every_block(
    plans: tuple[str, dict[str, tuple[LayerRow, ...]]],
) -> None:
    variant, tables = plans
    ends = CONFIGS[variant].exit_after
    num_exits = len(ends)
    # A shallow exit's bypass branch holds one block of its own; an exit before any block has none.
    expected = {
        f"segment_{k}": end - begin + (end > 0 and k < num_exits - 1)
        for k, (begin, end) in enumerate(zip((0, *ends), ends, strict=False))
    }

    fused = {
        name: sum(row.is_attention for row in table)
        for name, table in tables.items()
        if name != "template"
    }

    assert fused == expected


def test_no_product_runs_in_fp32(plans: tuple[str, dict[str, tuple[LayerRow, ...]]]) -> None:
    _, tables = plans

    in_fp32 = [
        row.name
        for table in tables.values()
        for row in table
        if row.is_product and row.precision == "Float"
    ]

    assert in_fp32 == []


def test_the_table_shows_four_products_and_an_attention_per_block(
    plans: tuple[str, dict[str, tuple[LayerRow, ...]]],
) -> None:
    variant, tables = plans
    ends = CONFIGS[variant].exit_after

    products = [sum(row.is_product for row in tables[f"segment_{k}"]) for k in range(len(ends))]

    for count, begin, end in zip(products, (0, *ends), ends, strict=False):
        assert count >= 5 * (end - begin)
