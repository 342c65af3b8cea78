import dataclasses
import json
from typing import Any

import pytest
import torch
from published_ostrack import ostrack_box, ostrack_maps, ostrack_state_dict
from small_models import make_inputs
from tolerances import FROM_TWIN
from torch import Tensor
from torch.testing import assert_close

from edgetrack.models.ostrack import CONFIGS, OSTrack, OSTrackConfig
from edgetrack.models.published import PublishedCheckpoint, load_ostrack
from edgetrack.models.registry import create_model
from edgetrack.train.losses import LossWeights, center_loss

SMALL = OSTrackConfig(
    template_size_px=32,
    search_size_px=64,
    dim=64,
    num_heads=2,
    mlp_ratio=2.0,
    exit_after=(3,),
    head_channels=(32, 16, 8, 4),
)
SMALL_CE = dataclasses.replace(SMALL, eliminate_at=(0, 1))
BOTH = pytest.mark.parametrize("config", [SMALL, SMALL_CE], ids=["all candidates", "eliminating"])
TOLERANCE = FROM_TWIN["float32"]


def assert_equals_the_slow_twin(config: OSTrackConfig, *, dim: int, head_dim: int) -> None:
    """Load published names into a model of a published geometry, and compare all that it says."""
    weights = ostrack_state_dict(
        dim=dim,
        depth=config.exit_after[0],
        template_tokens=(config.template_size_px // 16) ** 2,
        search_tokens=config.search_grid**2,
        head_dim=head_dim,
    )
    checkpoint = PublishedCheckpoint(weights)
    model = load_ostrack(checkpoint, is_eliminating=bool(config.eliminate_at))
    inputs = make_inputs(config)
    with torch.no_grad():
        state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])
        maps = model.center_maps(model.run_trunk(0, {**state, **inputs}))
        (answer,) = model(**inputs)
        score, size, offset = ostrack_maps(
            weights,
            inputs["template"],
            inputs["search_region"],
            num_heads=dim // 64,
            eliminate_at=config.eliminate_at,
        )

    for ours, expected in zip(maps, (score, offset, size), strict=True):
        in_rows = expected.flatten(2).transpose(1, 2)
        assert_close(ours, in_rows.reshape(ours.shape), atol=TOLERANCE, rtol=0)
    assert score.std() > 1e-3  # weights that say the same of all cells would show nothing
    boxes = [ostrack_box(*maps) for maps in zip(score, size, offset, strict=True)]
    assert_close(answer["bbox_cxcywh"], torch.tensor(boxes), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_published_weights_of_a_narrow_trunk_say_what_the_paper_says(name: str) -> None:
    """The published geometry, depth and elimination, with two heads of attention."""
    assert_equals_the_slow_twin(CONFIGS[name], dim=128, head_dim=32)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_published_weights_say_what_the_paper_says(name: str) -> None:
    assert_equals_the_slow_twin(CONFIGS[name], dim=768, head_dim=256)


def test_elimination_leaves_the_published_numbers_of_candidates() -> None:
    narrow = dataclasses.replace(CONFIGS["256-ce"], dim=32, num_heads=1, head_channels=(8,))
    model, inputs = OSTrack(narrow).eval(), make_inputs(narrow, batch=1)
    lengths: list[int] = []
    for block in model.backbone.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1] - 64))

    with torch.no_grad():
        model(**inputs)

    assert lengths == [256] * 3 + [180] * 3 + [126] * 3 + [89] * 3


def test_eliminated_cells_are_zeros_at_their_own_places() -> None:
    torch.manual_seed(0)
    model, inputs = OSTrack(SMALL_CE).eval(), make_inputs(SMALL_CE)
    seen: list[Tensor] = []
    model.box_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])
        written = model.run_trunk(0, {**state, **inputs})
        model.center_maps(written)

    features = seen[0].flatten(2).transpose(1, 2)
    tokens = model.backbone.norm(written["tokens_0"])[:, 4:]
    for sample, places in enumerate(written["places"].tolist()):
        assert len(set(places)) == len(places) == 9  # ceil(0.7 * ceil(0.7 * 16))
        for token, place in enumerate(places):
            assert torch.equal(features[sample, place], tokens[sample, token])
        gone = sorted(set(range(16)) - set(places))
        assert not features[sample, gone].any()


@BOTH
def test_the_answer_has_the_contracts_shapes_and_ranges(config: OSTrackConfig) -> None:
    torch.manual_seed(0)
    model = OSTrack(config).eval()

    with torch.no_grad():
        (answer,) = model(**make_inputs(config, batch=3))

    shapes = {name: tuple(value.shape) for name, value in answer.items()}
    assert shapes == {"bbox_cxcywh": (3, 4), "score": (3,), "uncertainty": (3,)}
    assert torch.equal(answer["uncertainty"], 1 - answer["score"])
    assert ((answer["score"] > 0) & (answer["score"] < 1)).all()


@BOTH
def test_samples_of_a_batch_do_not_mix(config: OSTrackConfig) -> None:
    torch.manual_seed(0)
    model, inputs = OSTrack(config).eval(), make_inputs(config, batch=3)

    with torch.no_grad():
        (together,) = model(**inputs)
        (alone,) = model(**{name: value[1:2] for name, value in inputs.items()})

    for name, value in alone.items():
        assert_close(together[name][1:2], value, atol=1e-5, rtol=0)


@BOTH
def test_the_loss_reaches_every_parameter(config: OSTrackConfig) -> None:
    torch.manual_seed(0)
    model = OSTrack(dataclasses.replace(config, drop_path=0.0)).train()
    inputs = make_inputs(config, batch=4)
    state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])

    loss, _ = center_loss(
        model.center_maps(model.run_trunk(0, {**state, **inputs})),
        bbox_cxcywh=torch.tensor([[0.5, 0.45, 0.3, 0.2]]).expand(4, 4),
        is_present=torch.ones(4),
        weights=LossWeights(),
    )
    torch.autograd.backward(loss)

    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@BOTH
def test_a_config_survives_json(config: OSTrackConfig) -> None:
    again = create_model("ostrack", json.loads(json.dumps(OSTrack(config).config_dict)))

    assert again.config == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": "shuffle"}, "^ostrack: expected the stem 'patch', one exit .*got 'shuffle'"),
        ({"exit_after": (4, 8)}, r"^ostrack: expected .*exit_after \(4, 8\)"),
        ({"head_upsample": 2}, "^ostrack: expected .*head_upsample 2"),
        ({"eliminate_at": (3, 12)}, "^eliminate_at: expected rising blocks from 0 to 11"),
        ({"eliminate_at": (6, 3)}, "^eliminate_at: expected rising blocks from 0 to 11"),
        ({"keep_rate": 0.0}, "^keep_rate: expected above 0 and up to 1, got 0.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OSTrackConfig(**changes)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^ostrack: expected keys among .*got \['widht'\]"):
        create_model("ostrack-256", {"widht": 3})
