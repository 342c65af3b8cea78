"""``edgetrack prune`` as a person meets it."""

import dataclasses
import json
from pathlib import Path

import pytest
from command_line import edgetrack
from small_models import PATCH, export_random

from edgetrack.bundle import Bundle


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small dense bundle."""
    folder = tmp_path_factory.mktemp("prune")
    export_random(PATCH, folder / "dense", name="small")
    return folder


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.mark.slow
def test_each_budget_becomes_a_bundle_and_a_row(home: Path) -> None:
    done = edgetrack(
        "prune", "dense", "--budget", "0.5,0.01", "--multiple", "1", "--output", "out",
        "--backend", "onnxruntime", "--threads", "1", "--json", cwd=home,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["bundle"] for row in rows] == ["dense", "small-0.5", "small-0.01"]
    for key in ("share_of_units", "parameters", "macs"):
        values = [row[key] for row in rows]
        assert values == sorted(values, reverse=True)
    assert all(row["full_depth_ms"] > 0 for row in rows)
    pruned = Bundle.load(home / "out" / "small-0.01")
    assert pruned.provenance["pruning"]["budget"] == 0.01
    assert pruned.provenance["pruning"]["fine_tuning_samples"] == 0
    assert pruned.config["widths"]["backbone.blocks.0.mlp"] == [1]


@pytest.mark.slow
def test_a_time_that_no_budget_meets_is_said_with_what_one_percent_takes(home: Path) -> None:
    done = edgetrack(
        "prune", "dense", "--target-ms", "0.001", "--output", "never", "--threads", "1", cwd=home
    )

    assert done.returncode == 1
    assert "target_ms: expected at least" in done.stderr
    assert not list(home.glob("never/small-*"))


def test_one_exit_cannot_be_calibrated_and_that_is_said_before_any_training(home: Path) -> None:
    config = dataclasses.replace(PATCH, exit_after=(2,))
    export_random(config, home / "single", name="single")

    done = edgetrack(
        "prune", "single", "--budget", "0.5", "--calibrate", "nowhere", "--output", "never",
        cwd=home,
    )  # fmt: skip

    assert done.returncode == 2, done.stderr
    assert "--calibrate" in done.stderr
    assert "expected a model with exits to choose between, got one exit" in words(done.stderr)
    assert not (home / "never").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--budget", "0"), 2, "budget: expected above 0 and up to 1, got 0"),
        (("--budget", "0.5,1.5"), 2, "budget: expected above 0 and up to 1, got 1.5"),
        (("--budget", "half"), 2, "expected shares above 0 and up to 1 such as 0.5,0.25"),
        ((), 2, "expected it or --target-ms, one of the two"),
        (("--budget", "0.5", "--target-ms", "5"), 2, "expected it or --target-ms"),
        (("--target-ms", "-1"), 2, "expected above 0, got -1"),
        (("--budget", "0.5", "--parts", "tail"), 2, "expected some of trunk, head, stem, got tail"),
        (("--budget", "0.5", "--heads", "ragged"), 2, "heads: expected one of"),
        (("--budget", "0.5", "--parts", "stem"), 1, "parts: expected units in ('stem',)"),
        (("--budget", "0.5", "--data", "nowhere"), 1, "expected a training folder, got none"),
        (("--budget", "0.5", "--calibrate", "nowhere"), 1, "got no such folder"),
    ],
)
def test_wrong_options_are_named(
    home: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    done = edgetrack("prune", "dense", *options, "--output", "never", cwd=home)

    assert done.returncode == code, done.stderr
    assert message in words(done.stderr)
    assert not (home / "never").exists()
