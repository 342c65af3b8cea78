"""``edgetrack export --exits --retention``: trackers of other depths from one training."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import edgetrack_here
from small_fartrack import FARTRACK_PATCH
from small_models import PATCH

from edgetrack.bundle import Bundle
from edgetrack.models.dytrack import DyTrack
from edgetrack.models.fartrack import FARTrack
from edgetrack.models.loretrack import LoReTrack, LoReTrackTiny
from edgetrack.models.ostrack import OSTrack
from edgetrack.models.registry import load_model
from edgetrack.models.segmented import SegmentedModel
from edgetrack.models.siamese_cnn import SiameseCNN
from edgetrack.train.checkpoints import write_checkpoint
from edgetrack.train.recipes import Recipe, Stage

TUNED = {
    "unsure_score": 0.4,
    "patience": 3,
    "search_growth": 1.4,
    "lost_after": 10,
    "found_score": 0.6,
}


def write_run(folder: Path, *, model: str, config: Mapping[str, Any]) -> Path:
    """A run as training leaves it, of a small model with random weights."""
    stage = Stage(objective="final_exit", samples=8)
    recipe = Recipe(name="small", model=model, stages=(stage,), model_config=config)
    described = json.loads(json.dumps(dataclasses.asdict(recipe)))
    torch.manual_seed(0)
    weights = recipe.create_model().state_dict()
    folder.mkdir()
    content = {"recipe": described, "average": weights, "model": weights}
    rest = dict.fromkeys(("stage", "step", "optimizer", "rng"))
    write_checkpoint(folder, {**content, **rest})
    (folder / "provenance.json").write_text(json.dumps({"recipe": described}), "utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "fartrack"
    return write_run(folder, model="fartrack-micro", config=dataclasses.asdict(FARTRACK_PATCH))


def test_a_depth_of_a_trained_fartrack_is_a_bundle(run: Path, tmp_path: Path) -> None:
    done = edgetrack_here(
        "export", run, "--output", "cut", "--exits", "3", "--retention", "0.5", cwd=tmp_path
    )

    assert done.returncode == 0, done.stderr
    bundle = Bundle.load(tmp_path / "cut")
    assert bundle.num_exits == 1
    assert (bundle.config["exit_after"], bundle.config["retention"]) == ([3], 0.5)
    assert len(load_model(bundle).backbone.blocks) == 3
    assert bundle.rules == {}


def test_rules_that_were_tuned_on_a_familys_scores_are_exported(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    write_run(folder, model="early_exit_vit-tiny", config=dataclasses.asdict(PATCH))

    done = edgetrack_here("export", folder, "--output", "mine", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert Bundle.load(tmp_path / "mine").rules == TUNED


@pytest.mark.parametrize(
    ("model", "rules"),
    [
        (SiameseCNN, TUNED),
        (DyTrack, TUNED),
        (LoReTrackTiny, TUNED),
        (LoReTrack, {}),
        (OSTrack, {}),
        (FARTrack, {}),
    ],
)
def test_a_family_has_rules_only_if_they_were_tuned_on_its_scores(
    model: type[SegmentedModel], rules: Mapping[str, float]
) -> None:
    assert model.rules == rules


@pytest.mark.parametrize(
    ("options", "hint", "message"),
    [
        (("--exits", "9"), "--exits", "expected a part of this model"),
        (("--exits", "six"), "--exits", "expected numbers of layers such as 6,10,15, got 'six'"),
        (("--retention", "0"), "--retention", "expected more than 0, up to 1, got 0.0"),
    ],
)
def test_what_a_model_has_not_is_refused(
    run: Path, tmp_path: Path, options: tuple[str, str], hint: str, message: str
) -> None:
    done = edgetrack_here("export", run, "--output", "cut", *options, cwd=tmp_path)

    assert done.returncode == 2
    text = " ".join(done.stderr.replace("│", " ").split())
    assert hint in text
    assert message in text
    assert not (tmp_path / "cut").exists()


def test_other_families_cannot_be_cut(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    write_run(folder, model="early_exit_vit-tiny", config=dataclasses.asdict(PATCH))

    done = edgetrack_here("export", folder, "--output", "cut", "--retention", "0.5", cwd=tmp_path)

    assert done.returncode == 2
    text = " ".join(done.stderr.replace("│", " ").split())
    assert "expected a fartrack, got early_exit_vit" in text
