import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rendered import write_sequence
from small_models import PATCH, export_random

from edgetrack.bundle import Bundle
from edgetrack.errors import CheckpointError
from edgetrack.models.early_exit_vit import CONFIGS
from edgetrack.train.recipes import Recipe, get_recipe
from edgetrack.train.run import read_provenance, run_recipe


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let recipes name the small model."""
    monkeypatch.setitem(CONFIGS, "small", PATCH)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training folder with one rendered clip."""
    folder = tmp_path_factory.mktemp("data")
    write_sequence(folder / "videos" / "clip", seed=1)
    return folder


@pytest.fixture(scope="module")
def start(small_bundle: Bundle) -> Bundle:
    return small_bundle


def recipe_of(*, frozen: float = 0.0, objective: str = "final_exit", **changes: Any) -> Recipe:
    """One step of the small model."""
    base = get_recipe("early_exit_vit-smoke")
    stage = dataclasses.replace(
        base.stages[0],
        objective=objective,
        samples=4,
        batch_size=4,
        frozen_stem_share=frozen,
    )
    small: dict[str, Any] = {"model": "early_exit_vit-small", "stages": (stage,)}
    return dataclasses.replace(base, num_synthetic_clips=1, **(small | changes))


def shares_of(run: Path) -> set[float]:
    """The frozen shares that a run's records tell of."""
    recipes = (json.loads((run / "recipe.json").read_text()), read_provenance(run)["recipe"])
    return {recipe["stages"][0]["frozen_stem_share"] for recipe in recipes}


def test_nothing_is_frozen_without_weights_to_start_from(data: Path, tmp_path: Path) -> None:
    run_recipe(recipe_of(frozen=1.0), [("folder", data)], tmp_path)

    assert shares_of(tmp_path) == {0.0}


def test_what_starts_from_a_bundle_may_be_frozen_and_is_counted(
    data: Path, start: Bundle, tmp_path: Path
) -> None:
    counts: list[tuple[int, int]] = []

    def note(num_loaded: int, num_all: int) -> None:
        counts.append((num_loaded, num_all))

    recipe = recipe_of(frozen=1.0, model_config={"num_bins": PATCH.num_bins + 2})
    for _ in range(2):  # the second time the run goes on, and starts from nothing
        run_recipe(recipe, [("folder", data)], tmp_path, start=start, on_start=note)

    assert shares_of(tmp_path) == {1.0}
    ((num_loaded, num_all),) = counts
    assert 0 < num_loaded < num_all


def test_a_frozen_trunk_needs_a_bundle(data: Path, start: Bundle, tmp_path: Path) -> None:
    recipe = recipe_of(objective="final_head")

    with pytest.raises(ValueError, match="expected --from BUNDLE, whose trunk is frozen, got none"):
        run_recipe(recipe, [("folder", data)], tmp_path / "run")

    assert not (tmp_path / "run").exists()
    run_recipe(recipe, [("folder", data)], tmp_path / "run", start=start)


def test_a_run_does_not_go_on_from_other_weights_or_data(
    data: Path, start: Bundle, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = dataclasses.replace(PATCH, mlp_ratio=3.0)
    other = export_random(config, tmp_path / "other", name="other")
    more = shutil.copytree(data, tmp_path / "more")
    (more / "notes.txt").write_text("another file")
    moved = shutil.copytree(data, tmp_path / "moved")
    recipe = recipe_of()
    run_recipe(recipe, [("folder", data)], run, start=start)
    recorded = (run / "provenance.json").read_bytes()

    for named, options in {
        "bundle to start from": {"start": other},
        "bundle to start from, teacher": {"start": None, "teacher": other},
        "data": {"sources": [("folder", more)]},
    }.items():
        given: dict[str, Any] = {"sources": [("folder", data)], "start": start, **options}
        with pytest.raises(CheckpointError, match=f"got another {named}; choose another --output"):
            run_recipe(recipe, output=run, **given)

    run_recipe(recipe, [("folder", moved)], run, start=start)
    assert (run / "provenance.json").read_bytes() == recorded


def test_a_run_that_kept_nothing_starts_with_a_new_record(
    data: Path, start: Bundle, tmp_path: Path
) -> None:
    run_recipe(recipe_of(), [("folder", data)], tmp_path)
    (tmp_path / "checkpoint.pt").unlink()

    run_recipe(recipe_of(), [("folder", data)], tmp_path, start=start)

    assert read_provenance(tmp_path)["start"]["digest"] == start.digest
