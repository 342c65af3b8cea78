import dataclasses
import json

import pytest

from edgetrack.models.registry import list_models
from edgetrack.train.objectives import OBJECTIVES
from edgetrack.train.recipes import RECIPES, Recipe, Stage, get_recipe
from edgetrack.train.sampling import DEFAULT_MIX

ALL = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


@ALL
def test_a_recipe_is_found_by_its_own_name(recipe: Recipe) -> None:
    assert get_recipe(recipe.name) is recipe


@ALL
def test_a_recipe_names_a_model_and_sources_that_exist(recipe: Recipe) -> None:
    assert recipe.model in list_models()
    assert recipe.mix.keys() <= DEFAULT_MIX.keys()


@ALL
def test_a_recipe_names_objectives_that_can_train_its_model(recipe: Recipe) -> None:
    model = recipe.create_model()

    for stage in recipe.stages:
        OBJECTIVES[stage.objective](model, recipe, model).prepare()
        assert any(p.requires_grad for p in model.parameters())


@ALL
def test_batches_can_be_shared_by_two_processes(recipe: Recipe) -> None:
    assert all(stage.batch_size % 2 == 0 for stage in recipe.stages)


@ALL
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    described = json.loads(json.dumps(dataclasses.asdict(recipe)))

    stages = tuple(Stage(**stage) for stage in described["stages"])
    assert stages == recipe.stages
    assert described["mix"] == recipe.mix


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^recipe: expected one of .*_vit-tiny'.*'big'"):
        get_recipe("big")


@pytest.mark.parametrize(
    ("samples", "batch_size", "num_steps"), [(64, 8, 8), (71, 8, 8), (3, 8, 1)]
)
def test_a_stage_has_whole_batches_and_at_least_one(
    samples: int, batch_size: int, num_steps: int
) -> None:
    stage = Stage(objective="final_exit", samples=samples, batch_size=batch_size)
    assert stage.num_steps == num_steps


@pytest.mark.parametrize("name", ["samples", "batch_size", "warmup_steps"])
def test_a_stage_without_steps_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected at least 1, got 0"):
        Stage(**{"objective": "final_exit", "samples": 8, name: 0})
