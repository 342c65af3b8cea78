import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import PATCH, make_model
from toy_bundle import write_toy_bundle

from edgetrack import models
from edgetrack.bundle import Bundle
from edgetrack.errors import CheckpointError
from edgetrack.models.registry import create_model, list_models, load_model


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle whose weights are those of a small early-exit ViT; only its graphs are toys."""
    toy = write_toy_bundle(tmp_path / "bundle")
    model = make_model(PATCH)
    save_file(model.state_dict(), toy.path / "weights.safetensors")
    config = model.config_dict
    return dataclasses.replace(toy, family="early_exit_vit", config=config).write()


def test_families_are_listed_with_their_variants() -> None:
    modules = Path(models.__file__).parent.glob("*.py")
    families = {m.stem for m in modules if "\nCONFIGS" in m.read_text("utf-8")}

    names = list_models()

    assert {name.partition("-")[0] for name in names} == families
    assert {"dytrack-base", "dytrack-tiny", "early_exit_vit-base"} < set(names)


@pytest.mark.parametrize("name", ["resnet-50", "early_exit_vit-huge", "early_exit_vit", ""])
def test_an_unknown_model_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^model: expected one of .*vit-tiny.*got {name!r}"):
        create_model(name)


def test_a_configuration_stands_in_for_a_variant() -> None:
    config = {**dataclasses.asdict(PATCH), "exit_after": [1, 2, 3]}

    model = create_model("early_exit_vit", config)

    assert model.num_exits == 3


def test_the_model_of_a_bundle_has_its_weights_and_does_not_train(bundle: Bundle) -> None:
    model = load_model(bundle)

    expected = make_model(PATCH).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_a_bundle_without_weights_cannot_train(tmp_path: Path) -> None:
    toy = write_toy_bundle(tmp_path)

    with pytest.raises(CheckpointError, match=r"expected weights\.safetensors, got none; this"):
        load_model(toy)


@pytest.mark.parametrize("content", [b"", b"hello world", b"\xff" * 100])
def test_damaged_weights_are_refused(bundle: Bundle, content: bytes) -> None:
    (bundle.path / "weights.safetensors").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"weights\.safetensors: expected weights of toy"):
        load_model(bundle)


def test_weights_of_another_configuration_are_named(bundle: Bundle) -> None:
    file = bundle.path / "weights.safetensors"
    weights = load_file(file)
    weights["backbone.norm.weight"] = torch.ones(7)
    del weights["backbone.norm.bias"]
    save_file(weights, file)

    with pytest.raises(CheckpointError, match=r"(?s)norm\.bias.*norm\.weight"):
        load_model(bundle)
