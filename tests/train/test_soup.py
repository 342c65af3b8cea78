import dataclasses
import json
from pathlib import Path

import pytest
import torch
from small_models import PRIOR

from edgetrack.errors import CheckpointError
from edgetrack.models.early_exit_vit import CONFIGS
from edgetrack.models.segmented import SegmentedModel
from edgetrack.train.checkpoints import write_checkpoint
from edgetrack.train.recipes import get_recipe
from edgetrack.train.soup import load_soup


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "small", PRIOR)


def write_run(folder: Path, *, seed: int, **config: object) -> SegmentedModel:
    """A run's checkpoint of a small model with random weights and statistics."""
    recipe = dataclasses.replace(
        get_recipe("early_exit_vit-smoke"), model="early_exit_vit-small", model_config=config
    )
    torch.manual_seed(seed)
    model = recipe.create_model()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand_like(buffer))
    folder.mkdir()
    described = json.loads(json.dumps(dataclasses.asdict(recipe)))
    rest = dict.fromkeys(("stage", "step", "optimizer", "rng"), 0)
    weights = {"model": model.state_dict(), "average": model.state_dict()}
    write_checkpoint(folder, {**rest, **weights, "recipe": described})
    return model


def test_a_soup_is_the_mean_of_weights_and_statistics(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in "abc"]
    models = [write_run(run, seed=seed) for seed, run in enumerate(runs)]

    soup = load_soup(runs)

    assert not soup.training
    for name, value in soup.state_dict().items():
        each = torch.stack([model.state_dict()[name] for model in models])
        torch.testing.assert_close(value, each.double().mean(0).to(value.dtype))
    assert any("running_var" in name for name in soup.state_dict())


def test_a_soup_of_one_run_is_that_run(tmp_path: Path) -> None:
    model = write_run(tmp_path / "a", seed=0)

    soup = load_soup([tmp_path / "a"])

    for name, value in model.state_dict().items():
        assert torch.equal(value, soup.state_dict()[name]), name


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=0, num_bins=9)

    with pytest.raises(CheckpointError, match=r"b: expected the architecture of .*a, got another"):
        load_soup([tmp_path / "a", tmp_path / "b"])
