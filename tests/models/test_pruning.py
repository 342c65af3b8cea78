import copy
import json
from collections.abc import Mapping

import pytest
import torch
from small_families import FAMILIES
from small_models import PATCH, make_inputs, make_model
from torch import Tensor
from torch.testing import assert_close

from edgetrack.models.pruning import Gates, gates_of, remove_units, without_gates
from edgetrack.models.registry import create_model
from edgetrack.models.segmented import SegmentedModel
from edgetrack.models.units import Units, find_units

BUDGETS = (0.75, 0.5, 0.25, 0.1, 0.01)
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES.keys())
def model(request: pytest.FixtureRequest) -> SegmentedModel:
    made: SegmentedModel = request.param()
    return made


def random_units(units: Units, share: float, generator: torch.Generator) -> Tensor:
    """Some units of a set, at least one; alike in every head, and not all heads, for attention."""
    if units.kind != "attention":
        count = max(round(units.count * share), 1)
        return torch.randperm(units.count, generator=generator)[:count].sort().values
    num_heads, dim = units.shape
    heads = torch.randperm(num_heads, generator=generator)[: max(round(num_heads * share), 1)]
    count = max(round(dim * share), 1)
    rows = [torch.randperm(dim, generator=generator)[:count].sort().values for _ in heads]
    return torch.stack([h * dim + row for h, row in zip(heads.sort().values, rows, strict=True)])


def some_of(model: SegmentedModel, share: float, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {u.name: random_units(u, share, generator) for u in find_units(model)}


def masked(model: SegmentedModel, kept: Mapping[str, Tensor]) -> SegmentedModel:
    """A copy of full width, all of whose gates but some are closed."""
    wide = copy.deepcopy(model)
    Gates(wide, find_units(wide)).close_all_but(kept)
    return wide


@torch.no_grad()
def answers_of(model: SegmentedModel) -> list[Tensor]:
    answers = model(**make_inputs(model.config))
    return [answer[name] for answer in answers for name in sorted(answer)]


def farthest(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_pruned_model_answers_as_the_masked_one(model: SegmentedModel, budget: float) -> None:
    kept = some_of(model, budget)

    narrow = answers_of(remove_units(model, kept))

    assert farthest(narrow, answers_of(masked(model, kept))) < TOLERANCE
    assert farthest(narrow, answers_of(model)) > 1e-3  # the units that went did count


def test_every_set_of_units_goes_alone_and_exactly(model: SegmentedModel) -> None:
    size = sum(p.numel() for p in model.parameters())
    for units in find_units(model):
        kept = {units.name: random_units(units, 0.5, torch.Generator().manual_seed(1))}

        narrow = remove_units(model, kept)

        assert farthest(answers_of(narrow), answers_of(masked(model, kept))) < TOLERANCE, units.name
        assert sum(p.numel() for p in narrow.parameters()) < size, units.name


def test_a_pruned_model_comes_back_from_its_configuration(model: SegmentedModel) -> None:
    narrow = remove_units(model, some_of(model, 0.25))

    again = create_model(model.family, json.loads(json.dumps(narrow.config_dict)))
    again.load_state_dict(narrow.state_dict())

    assert farthest(answers_of(again.eval()), answers_of(narrow)) == 0
    assert again.config_dict == narrow.config_dict


def test_a_pruned_model_is_pruned_again(model: SegmentedModel) -> None:
    once = remove_units(model, some_of(model, 0.5))
    kept = some_of(once, 0.5, seed=1)

    twice = remove_units(once, kept)

    assert farthest(answers_of(twice), answers_of(masked(once, kept))) < TOLERANCE
    assert twice.widths.keys() == once.widths.keys()


def test_a_pruned_model_learns_in_every_part_that_the_dense_one_does(
    model: SegmentedModel,
) -> None:
    def reached(some: SegmentedModel) -> set[str]:
        some = copy.deepcopy(some)
        answers = some(**make_inputs(some.config))
        loss = sum(v.float().sum() for answer in answers for v in answer.values())
        torch.autograd.backward(loss)
        return {n for n, p in some.named_parameters() if p.grad is not None}

    assert reached(remove_units(model, some_of(model, 0.5))) == reached(model)


def test_open_gates_change_nothing(model: SegmentedModel) -> None:
    gated = copy.deepcopy(model)
    Gates(gated, find_units(gated), speed=25.0)

    assert farthest(answers_of(gated), answers_of(model)) < TOLERANCE
    assert farthest(answers_of(without_gates(gated)), answers_of(model)) == 0


def test_a_copy_of_a_gated_model_has_gates_of_its_own() -> None:
    model = make_model(PATCH)
    Gates(model, find_units(model))
    dense = answers_of(model)

    other = copy.deepcopy(model)
    gates_of(other).close_all_but(some_of(other, 0.1))

    assert farthest(answers_of(model), dense) == 0
    assert farthest(answers_of(other), dense) > 1e-3


def test_a_gate_learns_as_many_times_faster_as_it_says() -> None:
    model = make_model(PATCH)
    gates = Gates(model, find_units(model), speed=10.0)

    for step in gates.steps:
        step.data.fill_(-0.05)

    assert_close(gates.values(0), torch.full(gates.units[0].shape, 0.5))


def test_the_narrow_heads_divide_by_the_root_of_the_wide_heads_dimension() -> None:
    model = make_model(PATCH)
    name = "backbone.blocks.0.attn"
    kept = {name: torch.tensor([[0, 3, 5, 9], [16, 17, 20, 31]])}

    narrow = remove_units(model, kept).get_submodule(name)

    wide = model.get_submodule(name)
    rows = kept[name].flatten()
    assert_close(narrow.qkv.weight[:8], wide.qkv.weight[:32][rows] * 0.5)  # (4 / 16) ** 0.5
    assert torch.equal(narrow.qkv.weight[8:16], wide.qkv.weight[32:64][rows])
    assert torch.equal(narrow.proj.weight, wide.proj.weight[:, rows])


def test_units_that_are_not_there_are_refused() -> None:
    model = make_model(PATCH)

    with pytest.raises(ValueError, match=r"^pruning: expected names among .*got \['mlp'\]"):
        remove_units(model, {"mlp": torch.tensor([0])})
    with pytest.raises(ValueError, match=r"^pruning: expected at least one unit of .*mlp"):
        remove_units(model, {"backbone.blocks.0.mlp": torch.tensor([], dtype=torch.long)})
    Gates(model, find_units(model))
    with pytest.raises(ValueError, match=r"^gates: expected a model without any"):
        Gates(model, find_units(model))
