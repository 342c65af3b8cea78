import dataclasses
import json

import pytest
import torch
from small_models import PRIOR, make_inputs, randomise_norms

from edgetrack.models import early_exit_vit, ostrack
from edgetrack.models.adapt import adapt_weights
from edgetrack.models.early_exit_vit import EarlyExitViT
from edgetrack.models.loretrack import CONFIGS, LoReTrack, LoReTrackTiny
from edgetrack.models.ostrack import OSTrack
from edgetrack.models.registry import create_model


def test_base_is_an_ostrack_at_its_teachers_search_factor() -> None:
    base, teacher = CONFIGS["base"], ostrack.CONFIGS["384"]

    assert dataclasses.replace(base, template_size_px=192, search_size_px=384) == teacher
    assert isinstance(
        create_model("loretrack", dataclasses.asdict(dataclasses.replace(base, dim=24))), LoReTrack
    )


def test_tiny_is_the_last_exit_of_an_early_exit_vit_with_its_weights() -> None:
    torch.manual_seed(0)
    whole = EarlyExitViT(PRIOR).eval()
    randomise_norms(whole)
    config = dataclasses.replace(PRIOR, exit_after=PRIOR.exit_after[-1:])
    tiny = LoReTrackTiny(config).eval()
    inputs = make_inputs(PRIOR)

    tiny.load_state_dict(
        {
            k: v
            for k, v in adapt_weights(whole.state_dict(), tiny.state_dict()).items()
            if k in tiny.state_dict()
        }
    )
    with torch.no_grad():
        (answer,), expected = tiny(**inputs), whole(**inputs)[-1]

    assert tiny.num_exits == 1
    for name, value in expected.items():
        assert torch.equal(answer[name], value), name


@pytest.mark.parametrize("side_px", [256, 192, 128, 96])
def test_tiny_runs_at_every_resolution_of_the_ladder(side_px: int) -> None:
    size = {"search_size_px": side_px, "template_size_px": side_px // 2}
    config = {**create_model("loretrack-tiny").config_dict, **size}
    model = create_model("loretrack-tiny", config).eval()

    with torch.no_grad():
        (answer,) = model(**make_inputs(model.config, batch=1))

    assert isinstance(model, LoReTrackTiny)
    assert model.family == "loretrack"
    assert model.crops.search_size_px == side_px
    assert all(value.isfinite().all() for value in answer.values())


@pytest.mark.parametrize("variant", ["tiny", "base"])
def test_a_config_survives_json(variant: str) -> None:
    config = CONFIGS[variant]
    if variant == "base":
        config = dataclasses.replace(config, dim=24)

    again = create_model("loretrack", json.loads(json.dumps(dataclasses.asdict(config))))

    assert again.config == config
    assert again.family == "loretrack"
    assert isinstance(again, EarlyExitViT if variant == "tiny" else OSTrack)


def test_tiny_shares_all_but_the_exits_before_the_last() -> None:
    tiny, whole = CONFIGS["tiny"], early_exit_vit.CONFIGS["tiny"]

    assert dataclasses.replace(whole, exit_after=(4,)) == tiny


def test_an_unknown_key_is_the_only_one_that_is_named() -> None:
    config = {**dataclasses.asdict(CONFIGS["tiny"]), "widht": 3}

    with pytest.raises(ValueError, match=r"^loretrack: expected keys among .*got \['widht'\]"):
        create_model("loretrack", config)
