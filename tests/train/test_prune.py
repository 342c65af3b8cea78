import dataclasses
from collections.abc import Mapping

import pytest
import torch
from small_families import FAMILIES, make_cnn
from small_models import PATCH, PRIOR, make_model
from torch import Tensor

from edgetrack.errors import TrainingError
from edgetrack.models.early_exit_vit import CONFIGS
from edgetrack.models.pruning import Gates
from edgetrack.models.registry import create_model
from edgetrack.models.segmented import SegmentedModel
from edgetrack.models.units import Units, find_units
from edgetrack.train.prune import (
    Rounding,
    choose_units,
    lay_out,
    learned_scores,
    magnitude_scores,
    num_parameters_left,
    part_of,
    prune,
)

BUDGETS = (0.75, 0.5, 0.25, 0.1, 0.01)


def units_of(name: str, kind: str, *shape: int) -> Units:
    return Units(name=name, kind=kind, shape=shape, written_by=(), read_by=(), gates=())


def counts(chosen: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in chosen.items()}


def size_of(model: SegmentedModel) -> int:
    return sum(p.numel() for p in model.parameters())


MLPS = (units_of("a", "mlp", 4), units_of("b", "mlp", 4))
MLP_SCORES = {"a": torch.tensor([0.9, 0.1, 0.8, 0.2]), "b": torch.tensor([0.3, 0.7, 0.05, 0.04])}


def test_the_best_of_all_layers_stay() -> None:
    chosen = choose_units(MLPS, MLP_SCORES, 0.5)

    assert chosen["a"].tolist() == [True, False, True, False]
    assert chosen["b"].tolist() == [True, True, False, False]
    assert counts(choose_units(MLPS, MLP_SCORES, 0.25)) == {"a": 2, "b": 0}


def test_each_kind_has_a_threshold_of_its_own() -> None:
    attention = units_of("c", "attention", 2, 2)
    scores = {**MLP_SCORES, "c": torch.full((2, 2), 1e-3)}

    assert counts(choose_units((*MLPS, attention), scores, 0.5)) == {"a": 2, "b": 2, "c": 2}


def test_at_one_percent_every_layer_keeps_its_share() -> None:
    units = (units_of("a", "mlp", 200), units_of("b", "mlp", 400))
    scores = {"a": torch.arange(200.0), "b": 1e6 + torch.arange(400.0)}

    assert counts(choose_units(units, scores, 0.01)) == {"a": 2, "b": 4}
    assert counts(choose_units(units, scores, 0.02)) == {"a": 0, "b": 12}


def test_units_that_nothing_tells_apart_still_meet_the_budget() -> None:
    ones = {"a": torch.ones(4), "b": torch.ones(4)}

    assert sum(counts(choose_units(MLPS, ones, 0.25)).values()) == 2


def test_uniform_heads_keep_as_many_each_and_each_its_best() -> None:
    units = units_of("c", "attention", 2, 3)
    scores = {"c": torch.tensor([[0.1, 0.9, 0.8], [0.5, 0.1, 0.2]])}

    chosen = choose_units((units,), scores, 0.33)

    assert chosen["c"].tolist() == [[False, True, False], [True, False, False]]


def test_free_heads_keep_the_best_dimensions_wherever_they_are() -> None:
    units = units_of("c", "attention", 2, 3)
    scores = {"c": torch.tensor([[0.1, 0.9, 0.8], [0.5, 0.1, 0.2]])}

    chosen = choose_units((units,), scores, 0.33, heads="free")

    assert chosen["c"].tolist() == [[False, True, True], [False, False, False]]


def test_a_free_layer_drops_empty_heads_and_fills_the_others_up() -> None:
    units = units_of("c", "attention", 3, 4)
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.2, 0.1, 0.3, 0.0], [0.6, 0.0, 0.1, 0.5]])

    kept = lay_out(units, scores, scores >= 0.6, Rounding(heads="free", multiple=1))

    assert kept.tolist() == [[0, 1, 2], [8, 10, 11]]


def test_kept_numbers_are_rounded_up_and_filled_with_the_next_best() -> None:
    units, scores = units_of("a", "mlp", 20), torch.arange(20.0)

    kept = lay_out(units, scores, scores >= 17, Rounding(multiple=8))

    assert kept.tolist() == list(range(12, 20))
    assert len(lay_out(units, scores, scores >= 2, Rounding(multiple=8))) == 20


def test_a_layer_that_the_budget_empties_keeps_its_best_unit() -> None:
    units, scores = units_of("a", "mlp", 4), torch.tensor([0.1, 0.4, 0.3, 0.2])

    assert lay_out(units, scores, scores > 1, Rounding(multiple=1)).tolist() == [1]


def test_emptied_layers_are_named() -> None:
    model = make_model(PATCH)
    scores = {u.name: torch.ones(u.shape) for u in find_units(model)}
    scores["backbone.blocks.1.mlp"] *= 0.01

    pruned = prune(model, scores, 0.25, rounding=Rounding(multiple=1), parts=("trunk",))

    assert "backbone.blocks.1.mlp" in pruned.floored
    assert pruned.model.widths["backbone.blocks.1.mlp"] == (1,)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_family_prunes_to_every_budget(family: str, budget: float) -> None:
    model = FAMILIES[family]()

    pruned = prune(model, magnitude_scores(model), budget, rounding=Rounding(multiple=1))

    assert budget - 0.005 <= pruned.share <= budget + 0.15
    assert size_of(pruned.model) < size_of(model)


def test_multiples_of_eight_are_what_compilers_get() -> None:
    model = create_model("early_exit_vit-tiny")

    pruned = prune(model, magnitude_scores(model), 0.3)

    dense = {u.name: u.shape[-1] for u in find_units(model)}
    for name, width in pruned.model.widths.items():
        assert width[-1] % 8 == 0 or width[-1] == dense[name]


def test_a_budget_of_one_keeps_the_model_as_it_is() -> None:
    model = make_model(PATCH)

    pruned = prune(model, magnitude_scores(model), 1.0)

    assert pruned.share == 1.0
    assert pruned.model.config_dict == model.config_dict


def test_heads_and_stem_are_left_alone_if_they_are_not_named() -> None:
    model = make_model(PRIOR)

    pruned = prune(model, magnitude_scores(model), 0.25, parts=("trunk",))

    assert {part_of(u) for u in find_units(model)} == {"trunk", "head", "stem"}
    assert all(name.startswith("backbone.blocks.") for name in pruned.model.widths)
    whole = prune(model, magnitude_scores(model), 0.25)
    assert size_of(whole.model) < size_of(pruned.model)


@pytest.mark.slow
def test_ostracks_parameters_at_the_papers_budgets() -> None:
    """The published arithmetic: 92.4 M parameters dense, head and patch embedding untouched."""
    model = create_model("ostrack-256")
    trunk = [u for u in find_units(model) if part_of(u) == "trunk"]
    scores = magnitude_scores(model)

    millions = [
        round(num_parameters_left(model, choose_units(trunk, scores, b, heads="free")) / 1e6, 1)
        for b in BUDGETS
    ]

    assert round(size_of(model) / 1e6, 1) == 92.4
    assert millions == [71.1, 49.9, 28.6, 15.9, 8.2]


def test_parameters_that_masks_leave_are_those_of_the_cut_model() -> None:
    model = make_cnn()
    scores = magnitude_scores(model)
    chosen = choose_units(find_units(model), scores, 0.5)

    pruned = prune(model, scores, 0.5, rounding=Rounding(multiple=1))

    assert num_parameters_left(model, chosen) == size_of(pruned.model)


def test_a_unit_that_nothing_reads_is_rated_last() -> None:
    model = make_model(PATCH)
    model.get_submodule("backbone.blocks.0.mlp.fc2").weight.data[:, 5] = 0
    model.get_submodule("backbone.blocks.0.attn.proj").weight.data[:, 18] = 0
    model.get_submodule("exits.1.head.towers.0.0.1").weight.data[3] = 0

    scores = magnitude_scores(model)

    assert scores["backbone.blocks.0.mlp"].argmin() == 5
    assert scores["backbone.blocks.0.attn"].flatten().argmin() == 18
    assert scores["exits.1.head.towers.0.0"].argmin() == 3


def test_a_search_rates_by_gates_and_by_batch_norm_scales() -> None:
    model = make_model(PATCH)
    gates = Gates(model, (u for u in find_units(model) if u.kind != "channels"))
    gates.steps[1].data[7] = -1.5  # a gate of -0.5
    model.get_submodule("exits.0.head.towers.1.0.1").weight.data[2] = -3.0

    scores = learned_scores(model)

    assert scores.keys() == {u.name for u in find_units(model)}
    assert scores[gates.units[1].name][7] == pytest.approx(0.5)
    assert scores["exits.0.head.towers.1.0"][2] == pytest.approx(3.0)


def test_gates_that_are_no_numbers_are_refused() -> None:
    model = make_model(PATCH)
    gates = Gates(model, find_units(model))
    gates.steps[2].data[0, 1] = torch.nan

    with pytest.raises(TrainingError, match=r"^gates: expected finite numbers, got 1 others in b"):
        learned_scores(model)


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = make_model(PATCH)
    model.get_submodule("backbone.blocks.1.mlp.fc1").weight.data[0, 0] = torch.nan

    with pytest.raises(TrainingError, match=r"^weights: .*backbone.blocks.1.mlp"):
        magnitude_scores(model)


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.5, float("nan")])
def test_a_budget_that_is_no_share_is_refused(budget: float) -> None:
    model = make_model(PATCH)

    with pytest.raises(ValueError, match=r"^budget: expected above 0 and up to 1, got"):
        prune(model, magnitude_scores(model), budget)


def test_layouts_and_parts_that_are_not_there_are_refused() -> None:
    model = make_model(PATCH)
    scores = magnitude_scores(model)

    with pytest.raises(ValueError, match=r"^heads: expected one of .*got 'ragged'"):
        Rounding(heads="ragged")
    with pytest.raises(ValueError, match=r"^multiple: expected at least 1, got 0"):
        Rounding(multiple=0)
    with pytest.raises(ValueError, match=r"^parts: expected some of .*got \['tail'\]"):
        prune(model, scores, 0.5, parts=("tail",))
    with pytest.raises(ValueError, match=r"^parts: expected units in \('stem',\) of early_exit_v"):
        prune(model, scores, 0.5, parts=("stem",))


def test_a_pruned_tiny_stays_a_tiny() -> None:
    model = make_model(dataclasses.replace(CONFIGS["tiny"], exit_after=(0, 1)))

    pruned = prune(model, magnitude_scores(model), 0.01)

    assert pruned.model.num_exits == 2
    assert pruned.model.crops == model.crops
