"""``edgetrack train`` and ``export`` of families that learn from a bundle, on small models."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from command_line import edgetrack_here
from published_ostrack import ostrack_state_dict
from rendered import write_sequence
from small_models import DYTRACK_PRIOR, PATCH, PRIOR, export_random

from edgetrack.bundle import Bundle
from edgetrack.models import dytrack, early_exit_vit, loretrack
from edgetrack.models.registry import load_fitting_weights, load_model
from edgetrack.train.loop import load_trained
from edgetrack.train.recipes import RECIPES, get_recipe

pytestmark = pytest.mark.slow
STEPS = ("--samples", 4, "--batch-size", 2)
IMPORTED = dataclasses.replace(PATCH, dim=64, num_heads=1, mlp_ratio=4.0, exit_after=(1, 2, 3))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training folder, sequences, and a bundle to start from."""
    folder = tmp_path_factory.mktemp("families")
    write_sequence(folder / "data" / "videos" / "clip", seed=1)
    write_sequence(folder / "sequences" / "held_out", seed=11)
    export_random(PRIOR, folder / "start", name="start")
    return folder


@pytest.fixture
def home(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the current one, and recipes of small models; nothing is rendered for them."""
    monkeypatch.chdir(shared)
    single = dataclasses.replace(PRIOR, exit_after=PRIOR.exit_after[-1:])
    for configs, config in (
        (dytrack.CONFIGS, DYTRACK_PRIOR),
        (early_exit_vit.CONFIGS, PRIOR),
        (loretrack.CONFIGS, single),
    ):
        monkeypatch.setitem(configs, "small", config)
    monkeypatch.setitem(early_exit_vit.CONFIGS, "imported", IMPORTED)
    for name in ("dytrack-tiny", "loretrack-tiny", "loretrack-tiny-teacher"):
        use_small_model(monkeypatch, name, f"{name.partition('-')[0]}-small")
    use_small_model(monkeypatch, "early_exit_vit-tiny-loretrack", "early_exit_vit-small")
    use_small_model(monkeypatch, "early_exit_vit-base-imported", "early_exit_vit-imported")
    return shared


def run_command(*args: object) -> str:
    """What a command that succeeds prints."""
    done = edgetrack_here(*args, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    return done.stdout


def use_small_model(monkeypatch: pytest.MonkeyPatch, recipe: str, model: str) -> None:
    small = dataclasses.replace(
        get_recipe(recipe), model=model, model_config={}, num_synthetic_clips=0
    )
    monkeypatch.setitem(RECIPES, recipe, small)


def stages_of(run: Path) -> list[dict[str, float]]:
    """The last report of each stage."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", ["dytrack-tiny", "loretrack-tiny-teacher", "loretrack-tiny"])
def test_the_trunk_of_a_tiny_recipe_is_the_shipped_bundles(recipe: str) -> None:
    model = get_recipe(recipe).create_model()

    kept = load_fitting_weights(model, Bundle.load())

    assert not [name for name in kept if name.startswith(("backbone.", "correlation."))]


def test_a_dytrack_starts_from_early_exit_vit_and_has_presets_of_one_threshold(home: Path) -> None:
    run_command("train", "dytrack-tiny", "--data", "data", *STEPS, "--from", "start")
    run_command(
        "export", "runs/dytrack-tiny", "--output", "dytrack", "--calibrate", "sequences",
        "--evaluate", "sequences",
    )  # fmt: skip

    bundle = Bundle.load(home / "dytrack")

    assert set(bundle.operating_points) == {"base", "medium", "fast"}
    assert all(len(set(thresholds)) == 1 for thresholds in bundle.operating_points.values())
    assert (bundle.operating_point, bundle.criterion) == ("medium", "score")
    assert [stage["batch_size"] for stage in bundle.provenance["recipe"]["stages"]] == [2, 2]
    scored = bundle.provenance["evaluation"]["metrics"]
    assert set(scored) == {"exit 0", "exit 1", "base", "medium", "fast"}
    assert "operating point medium (default): stop where 1 - score is below" in run_command(
        "inspect", "dytrack"
    )


def test_a_ladder_of_resolutions_learns_from_one_teacher(home: Path) -> None:
    """And a student with early exits is distilled into, then trained on."""
    small = ("--data", "data", "--from", "start", *STEPS)
    run_command("train", "loretrack-tiny-teacher", *small, "--search-size", 128)
    run_command("export", "runs/loretrack-tiny-teacher-128", "--output", "teacher")

    ladder = run_command(
        "train", "loretrack-tiny", *small, "--search-size", "96,64", "--teacher", "teacher"
    )
    run_command("train", "early_exit_vit-tiny-loretrack", *small, "--teacher", "teacher")

    assert "the others are new" not in ladder
    assert "--calibrate" not in ladder
    for size in (96, 64):
        next_step = f"export runs/loretrack-tiny-{size} --output loretrack-tiny-{size}_bundle\n"
        assert next_step in ladder
        crops = load_trained(home / f"runs/loretrack-tiny-{size}").crops
        assert (crops.search_size_px, crops.template_size_px) == (size, size // 2)
    exported = run_command("export", "runs/loretrack-tiny-64", "--output", "student")
    assert "balanced: there is one exit" in exported
    student = Bundle.load(home / "student")
    assert (student.family, student.num_exits) == ("loretrack", 1)
    assert student.crops.search_size_px == 64
    assert student.provenance["teacher"]["bundle"] == "loretrack-small"
    calibrated = edgetrack_here(
        "export", "runs/loretrack-tiny-64", "--output", "never", "--calibrate", "sequences",
        cwd=home,
    )  # fmt: skip
    assert calibrated.returncode == 2
    assert "expected a model with exits to choose between" in " ".join(calibrated.stderr.split())
    stages = stages_of(home / "runs/early_exit_vit-tiny-loretrack")
    assert [entry["stage"] for entry in stages] == [1, 2]
    assert {"qkv", "disc"} <= stages[0].keys()
    assert "distil_0" in stages[1]


def test_an_imported_ostrack_gets_early_exits_on_its_frozen_trunk(home: Path) -> None:
    weights = ostrack_state_dict(dim=64, depth=3, template_tokens=4, search_tokens=16, head_dim=16)
    torch.save({"net": weights}, "ostrack.pth")
    run_command("import", "ostrack.pth", "--family", "ostrack", "--output", "imported")

    run_command(
        "train", "early_exit_vit-base-imported", "--data", "data", *STEPS, "--mix", "video=1",
        "--from", "imported",
    )  # fmt: skip
    run_command(
        "export", "runs/early_exit_vit-base-imported", "--output", "gd", "--calibrate", "sequences"
    )
    score = json.loads(run_command("eval", "sequences", "--bundle", "gd", "--json"))

    bundle = Bundle.load(home / "gd")
    trained = load_model(bundle).state_dict()
    assert [e["stage"] for e in stages_of(home / "runs/early_exit_vit-base-imported")] == [1, 2]
    assert (bundle.family, bundle.num_exits) == ("early_exit_vit", 3)
    assert 0 <= score["mean"]["success_auc"] <= 1
    trunk = [name for name in trained if name.startswith("backbone.")]
    assert len(trunk) > 3 * 12
    for name in trunk:
        assert torch.equal(trained[name], weights[name]), name
