"""``edgetrack prune`` as a person meets it."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from command_line import edgetrack, edgetrack_here
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
    for row in rows:
        low, high = row["spread_ms"]
        assert 0 < low <= row["full_depth_ms"] <= high
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


@pytest.mark.slow
def test_the_budget_of_a_time_between_the_extremes_is_found(home: Path) -> None:
    """Extremes are far apart, so that no load on the machine moves one past the middle."""
    wide = dataclasses.replace(
        PATCH, template_size_px=64, search_size_px=128, dim=256, mlp_ratio=8.0, exit_after=(3,)
    )
    export_random(wide, home / "wide", name="wide")
    options = ("--backend", "onnxruntime", "--threads", "1")
    extremes = edgetrack(
        "prune", "wide", "--budget", "0.01", "--output", "least", *options, "--json", cwd=home
    )
    assert extremes.returncode == 0, extremes.stderr
    dense_ms, least_ms = (row["full_depth_ms"] for row in json.loads(extremes.stdout))
    target_ms = math.sqrt(dense_ms * least_ms)

    done = edgetrack(
        "prune", "wide", "--target-ms", f"{target_ms:.3f}", "--output", "timed", *options, cwd=home
    )

    assert done.returncode == 0, done.stderr
    said = re.search(
        r"budget ([\d.]+) for [\d.]+ ms: ([\d.]+) ms \(half of \d+ rounds: [\d.]+ to [\d.]+\), the "
        r"largest within it of \d+ timed in turns at full depth; dense: ([\d.]+) ms",
        words(done.stdout),
    )
    assert said is not None, done.stdout
    budget, took_ms, whole_ms = map(float, said.groups())
    assert 0.01 <= budget < 1
    assert took_ms <= target_ms < whole_ms
    (bundle,) = (Bundle.load(folder) for folder in (home / "timed").glob("wide-*"))
    assert bundle.provenance["pruning"]["budget"] == pytest.approx(budget, rel=0.01)


def test_one_exit_cannot_be_calibrated_and_that_is_said_before_any_training(home: Path) -> None:
    config = dataclasses.replace(PATCH, exit_after=(2,))
    export_random(config, home / "single", name="single")

    done = edgetrack_here(
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
    done = edgetrack_here("prune", "dense", *options, "--output", "never", cwd=home)

    assert done.returncode == code, done.stderr
    assert message in words(done.stderr)
    assert not (home / "never").exists()
