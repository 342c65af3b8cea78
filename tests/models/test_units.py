from typing import Any

import pytest
from small_models import PATCH, make_model

from edgetrack.models.registry import create_model
from edgetrack.models.units import find_units

NAMES = [
    "backbone.blocks.0.attn",
    "backbone.blocks.0.mlp",
    "backbone.blocks.1.attn",
    "backbone.blocks.1.mlp",
    "exits.0.bypass.block.attn",
    "exits.0.bypass.block.mlp",
    "exits.0.head.towers.0.0",
    "exits.0.head.towers.1.0",
    "exits.1.head.towers.0.0",
    "exits.1.head.towers.1.0",
]


def test_units_of_all_modules_are_found_by_the_paths_of_those() -> None:
    model = make_model(PATCH)

    units = find_units(model)

    assert [u.name for u in units] == NAMES
    for one in units:
        for path in (*one.written_by, *one.read_by, *one.gates):
            model.get_submodule(path.path)


def config_with(widths: dict[str, Any]) -> dict[str, Any]:
    return make_model(PATCH).config_dict | {"widths": widths}


def test_a_configuration_without_widths_is_the_dense_ones() -> None:
    assert "widths" not in make_model(PATCH).config_dict


def test_widths_make_a_model_narrow() -> None:
    widths = {"backbone.blocks.1.attn": [1, 8], "exits.0.head.towers.1.0": [3]}

    model = create_model("early_exit_vit", config_with(widths))

    assert model.get_submodule("backbone.blocks.1.attn.qkv").weight.shape == (24, 32)
    assert model.get_submodule("backbone.blocks.1.attn.proj").weight.shape == (32, 8)
    assert model.get_submodule("exits.0.head.towers.1.0.0").weight.shape == (3, 16, 3, 3)
    assert model.get_submodule("exits.0.head.towers.1.0.1").num_features == 3
    assert model.get_submodule("exits.0.head.edges").in_channels == 3


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"blocks.0.mlp": [4]}, r"^widths: expected names among .*got \['blocks.0.mlp'\]"),
        ({"backbone.blocks.0.mlp": [65]}, r"^widths: expected 1 to \[64\] for .*got \[65\]"),
        ({"backbone.blocks.0.mlp": [4, 4]}, r"^widths: expected 1 to \[64\] for"),
        ({"backbone.blocks.0.mlp": [0]}, "^widths: expected numbers of at least 1 for"),
        ({"backbone.blocks.0.mlp": []}, "^widths: expected numbers of at least 1 for"),
        ({"backbone.blocks.0.mlp": 8}, "^widths: expected numbers of at least 1 for"),
        ({"backbone.blocks.0.mlp": ["8"]}, "^widths: expected numbers of at least 1 for"),
    ],
)
def test_widths_that_cannot_be_are_refused(widths: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("early_exit_vit", config_with(widths))
