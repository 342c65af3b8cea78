"""``edgetrack train`` and ``edgetrack export`` from end to end, on a folder rendered here."""

import json
import re
from pathlib import Path

import pytest
from command_line import edgetrack, edgetrack_here
from rendered import write_sequence

from edgetrack.bundle import Bundle

TINY_RUN = ("train", "early_exit_vit-smoke", "--data", "data", "--samples", "16,8")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training folder, a GOT-10k folder and sequences to calibrate on."""
    folder = tmp_path_factory.mktemp("author")
    for seed in (1, 2):
        write_sequence(folder / "data" / "videos" / f"clip_{seed}", seed=seed)
        write_sequence(folder / "sequences" / f"held_out_{seed}", seed=10 + seed)
    return folder


@pytest.fixture(scope="module")
def bundle(home: Path) -> Bundle:
    """What the commands make of it."""
    trained = edgetrack(*TINY_RUN, cwd=home)
    assert trained.returncode == 0, trained.stderr
    assert "--output early_exit_vit-smoke_bundle --calibrate DATA" in trained.stdout
    exported = edgetrack(
        "export", "runs/early_exit_vit-smoke", "--output", "mine", "--calibrate", "sequences",
        "--evaluate", "sequences", "--rules", "size_smoothing=0.2", "--criterion", "combined",
        cwd=home,
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    assert "balanced: stop where" in exported.stdout
    return Bundle.load(home / "mine")


@pytest.mark.slow
def test_a_calibrated_bundle_has_three_points_rules_and_where_it_comes_from(bundle: Bundle) -> None:
    assert list(bundle.operating_points) == ["accurate", "balanced", "fast"]
    assert bundle.operating_point == "balanced"
    assert (bundle.criterion, bundle.rules) == ("combined", {"size_smoothing": 0.2})
    assert bundle.provenance["samples"] == [16, 8]
    assert bundle.provenance["calibration"]["sequences"] == ["held_out_1", "held_out_2"]
    scored = bundle.provenance["evaluation"]["metrics"]
    assert set(scored) == {"exit 0", "exit 1", "exit 2", "accurate", "balanced", "fast"}
    assert 0 <= scored["exit 2"]["success_auc"] <= 1


@pytest.mark.slow
def test_training_starts_from_another_bundle_and_another_mix(home: Path, bundle: Bundle) -> None:
    done = edgetrack(
        *TINY_RUN, "--from", str(bundle.path), "--mix", "video=2,extra=1", "--seed", "3",
        "--output", "again", cwd=home,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert re.search(rf"^(\d+) of \1 tensors start from {bundle.path}$", done.stdout, re.M)
    provenance = json.loads((home / "again" / "provenance.json").read_text())
    assert provenance["start"]["digest"] == bundle.digest
    assert provenance["recipe"]["mix"] == {"video": 2.0, "extra": 1.0}
    assert provenance["recipe"]["seed"] == 3
    log = [json.loads(line) for line in (home / "again" / "log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in log] == [1, 2]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--mix", "video"), 2, "expected name=weight"),
        (("--search-size", "128,x"), 2, "expected sides that the model can have"),
        (("--search-size", "100"), 2, "template_size_px: expected a multiple of 16, got 50"),
        (("--samples", "0,1"), 2, "expected a whole number of at least 1, or 2"),
        (("--batch-size", "8,8,8"), 2, "expected a whole number of at least 1, or 2"),
        (("--processes", "3"), 2, "expected a divisor of the batch size [8, 8], got 3"),
        (("--data", "imagenet=data"), 1, "expected a training folder or LAYOUT=ROOT"),
        (("--data", "got10k=nowhere"), 1, "expected a folder of got10k data, got none"),
        (("--from", "nowhere"), 1, "expected a bundle"),
    ],
)
def test_wrong_training_options_are_named(
    home: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    done = edgetrack_here(*TINY_RUN, *options, "--output", "never", cwd=home)

    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not (home / "never").exists()


@pytest.mark.slow
def test_the_mean_of_runs_is_exported_with_where_each_comes_from(
    home: Path, bundle: Bundle
) -> None:
    run = "runs/early_exit_vit-smoke"
    done = edgetrack_here("export", run, run, "--output", "mean", cwd=home)

    assert done.returncode == 0, done.stderr
    mean = Bundle.load(home / "mean")
    assert [of["samples"] for of in mean.provenance["mean_of"]] == [[16, 8], [16, 8]]
    files = [b.path / "weights.safetensors" for b in (mean, bundle)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--rules", "luck=1"), 2, "rules: expected names among"),
        (("--criterion", "luck"), 2, "expected one of entropy, score, combined"),
    ],
)
def test_wrong_export_options_are_named(
    home: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    done = edgetrack_here("export", "runs/none", "--output", "never", *options, cwd=home)

    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())
