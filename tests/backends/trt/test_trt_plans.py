"""What TensorRT-RTX makes of our own families, read from the builder's layer table: no GPU."""

from collections.abc import Mapping

import pytest
from compiled import compile_with_rtx

from edgetrack.backends.trt.layer_table import LayerRow
from edgetrack.models.early_exit_vit import CONFIGS

pytestmark = [pytest.mark.rtx, pytest.mark.slow]


Plans = tuple[str, Mapping[str, tuple[LayerRow, ...]]]


@pytest.fixture(scope="module", params=["tiny", "base"])
def plans(request: pytest.FixtureRequest) -> Plans:
    """The layer tables of all graphs of a variant with random weights, built in FP16."""
    name = {"tiny": "random_bundle", "base": "base_bundle"}[request.param]
    return request.param, compile_with_rtx(request.getfixturevalue(name), precision="fp16")


def test_attention_is_fused_in_every_block(plans: Plans) -> None:
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


def test_no_product_runs_in_fp32(plans: Plans) -> None:
    _, tables = plans

    in_fp32 = [
        row.name
        for table in tables.values()
        for row in table
        if row.is_product and row.precision == "Float"
    ]

    assert in_fp32 == []


def test_the_table_shows_four_products_and_an_attention_per_block(plans: Plans) -> None:
    variant, tables = plans
    ends = CONFIGS[variant].exit_after

    products = [sum(row.is_product for row in tables[f"segment_{k}"]) for k in range(len(ends))]

    for count, begin, end in zip(products, (0, *ends), ends, strict=False):
        assert count >= 5 * (end - begin)
