import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rendered import write_sequence
from small_families import FAMILIES, make_cnn
from small_models import PATCH, export_random, make_model

from edgetrack.bundle import Bundle
from edgetrack.errors import BundleError, CheckpointError, TrainingError
from edgetrack.export import export_bundle
from edgetrack.models.registry import load_model
from edgetrack.train import prune_run
from edgetrack.train.prune import Rounding, magnitude_scores, prune
from edgetrack.train.prune_run import (
    PruneData,
    export_pruned,
    fine_tune,
    open_dense,
    rate_units,
)
from edgetrack.train.recipes import Recipe

EXACT = Rounding(multiple=1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_random(PATCH, tmp_path_factory.mktemp("dense") / "bundle", name="small")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of the same name and configuration, with other weights."""
    return export_bundle(
        make_model(PATCH, seed=1), tmp_path_factory.mktemp("other") / "bundle", name="small",
        operating_points={"balanced": (0.5,)}, operating_point="balanced", provenance={},
        licence="none",
    )  # fmt: skip


@pytest.fixture
def data(training_folder: Path) -> PruneData:
    return PruneData(
        sources=[("folder", training_folder)],
        search_samples=8,
        samples=8,
        batch_size=4,
        num_synthetic_clips=1,
    )


@pytest.fixture(scope="module")
def training_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training folder with one rendered clip."""
    folder = tmp_path_factory.mktemp("data")
    write_sequence(folder / "videos" / "clip", seed=1)
    return folder


def test_without_data_units_are_rated_by_their_weights(dense: Bundle, tmp_path: Path) -> None:
    model = load_model(dense)

    scores = rate_units(dense, model, tmp_path, data=None)

    assert all(torch.equal(v, scores[k]) for k, v in magnitude_scores(model).items())
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_search_and_a_fine_tuning_end_in_a_bundle_of_the_same_rules(
    dense: Bundle, data: PruneData, tmp_path: Path
) -> None:
    dense = dataclasses.replace(dense, rules={"size_smoothing": 0.2})
    model = load_model(dense)
    scores = rate_units(dense, model, tmp_path, data=data)
    pruned = prune(model, scores, 0.5, rounding=EXACT)
    before = {k: v.clone() for k, v in pruned.model.state_dict().items()}

    tuned = fine_tune(dense, pruned, tmp_path, label="tuned-0.5", data=data)
    bundle = export_pruned(dense, tuned, pruned, tmp_path / "bundle", budget=0.5, samples=8)

    assert {p.name for p in tmp_path.iterdir()} >= {"search", "tuned-0.5", "bundle"}
    after = load_model(bundle).state_dict()
    assert after.keys() == before.keys()
    learnt = [k for k, v in before.items() if not torch.equal(v, after[k])]
    assert any(k.startswith("backbone.") for k in learnt)
    assert any(k.startswith("exits.0.") for k in learnt)
    assert (bundle.rules, bundle.operating_points) == (dense.rules, dense.operating_points)
    assert bundle.name == "small-pruned-0.5"
    pruning = bundle.provenance["pruning"]
    assert pruning["share_of_units"] == pytest.approx(0.5, abs=0.05)
    assert pruning["parameters"] == sum(p.numel() for p in tuned.parameters())
    assert bundle.provenance["dense"]["digest"] == dense.digest


def test_a_run_is_exported_before_it_is_pruned(
    dense: Bundle, data: PruneData, tmp_path: Path
) -> None:
    pruned = prune(load_model(dense), magnitude_scores(load_model(dense)), 1.0)
    tuned = fine_tune(dense, pruned, tmp_path, label="run", data=data)

    bundle, model = open_dense(tmp_path / "run", tmp_path)

    assert bundle.path == tmp_path / "dense"
    assert bundle.rules == model.rules != {}
    assert bundle.licence == "research data: research use"
    for name, value in model.state_dict().items():
        assert torch.equal(value, tuned.state_dict()[name])


def test_a_run_keeps_the_presets_of_its_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").touch()
    monkeypatch.setattr(prune_run, "load_trained", lambda path: FAMILIES["dytrack"]())
    monkeypatch.setattr(
        prune_run, "read_provenance", lambda path: {"recipe": {"model": "dytrack-small"}}
    )

    bundle, _ = open_dense(tmp_path / "run", tmp_path)

    assert set(bundle.operating_points) == {"base", "medium", "fast"}
    assert bundle.operating_point == "medium"


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Recipes that were to be trained; none is."""
    seen: list[Recipe] = []

    def keep(recipe: Recipe, *args: Any, weights: Any = None, **kwargs: Any) -> Any:
        seen.append(recipe)
        return weights

    monkeypatch.setattr(prune_run, "run_recipe", keep)
    monkeypatch.setattr(prune_run, "learned_scores", lambda model: {})
    return seen


def test_the_search_of_another_bundle_or_on_other_data_is_another_run(
    dense: Bundle, other: Bundle, data: PruneData, recipes: list[Recipe], tmp_path: Path
) -> None:
    elsewhere = dataclasses.replace(data, sources=[("folder", tmp_path)])

    for bundle, source in ((dense, data), (dense, data), (other, data), (dense, elsewhere)):
        rate_units(bundle, load_model(bundle), tmp_path, data=source)

    same, again, of_other, on_other_data = recipes
    assert same == again
    assert dense.digest[:8] in same.name
    assert len({same.name, of_other.name, on_other_data.name}) == 3


def test_the_fine_tuning_of_other_units_is_another_run(
    dense: Bundle, data: PruneData, recipes: list[Recipe], tmp_path: Path
) -> None:
    model = load_model(dense)
    scores = magnitude_scores(model)
    turned = {name: values.max() - values for name, values in scores.items()}

    for rated in (scores, scores, turned):
        pruned = prune(model, rated, 0.5, rounding=EXACT)
        fine_tune(dense, pruned, tmp_path, label="tuned", data=data)

    same, again, of_others = recipes
    assert same == again
    assert same.name != of_others.name


def test_a_run_of_another_bundle_is_refused(
    dense: Bundle, other: Bundle, data: PruneData, tmp_path: Path
) -> None:
    pruned = prune(load_model(dense), magnitude_scores(load_model(dense)), 1.0)
    fine_tune(dense, pruned, tmp_path, label="run", data=data)

    with pytest.raises(CheckpointError, match="choose another --output, or delete the folder"):
        fine_tune(other, pruned, tmp_path, label="run", data=data)


def test_what_has_no_trainable_weights_is_refused_and_told_what_to_pass(
    dense: Bundle, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(dense.path, bare)
    (bare / "weights.safetensors").unlink()
    manifest = json.loads((bare / "manifest.json").read_text())
    del manifest["files"]["weights.safetensors"]
    (bare / "manifest.json").write_text(json.dumps(manifest))
    checkpoint = tmp_path / "ostrack.pth"
    checkpoint.write_bytes(b"torch")

    with pytest.raises(CheckpointError, match=r"expected weights.safetensors, got none.*; pass a"):
        open_dense(bare, tmp_path)
    with pytest.raises(CheckpointError, match=r"got a file; run: edgetrack import .*ostrack.pth"):
        open_dense(checkpoint, tmp_path)
    with pytest.raises(BundleError, match="expected a bundle"):
        open_dense(tmp_path / "nothing", tmp_path)


def test_a_family_that_learns_from_a_teacher_is_told_what_to_run(
    data: PruneData, tmp_path: Path
) -> None:
    model = FAMILIES["dytrack"]()
    pruned = prune(model, magnitude_scores(model), 0.5)
    bundle: Any = None

    with pytest.raises(TrainingError, match=r"^fine-tuning: .*got dytrack; prune without --data"):
        fine_tune(bundle, pruned, tmp_path, label="never", data=data)


@pytest.mark.slow
def test_a_pruned_cnn_is_fine_tuned_too(data: PruneData, tmp_path: Path) -> None:
    model = make_cnn()
    bundle = export_bundle(
        model, tmp_path / "dense", name="cnn", operating_points={"balanced": (0.3, 0.3)},
        operating_point="balanced", provenance={}, licence="",
    )  # fmt: skip
    scores = rate_units(bundle, model, tmp_path, data=data)
    pruned = prune(model, scores, 0.25, rounding=EXACT)

    tuned = fine_tune(bundle, pruned, tmp_path, label="tuned", data=data)

    assert tuned.config_dict == pruned.model.config_dict
