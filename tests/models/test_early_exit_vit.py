import copy
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from small_models import PATCH, PRIOR, make_inputs, make_model
from torch import Tensor
from torch.testing import assert_close

from edgetrack.models.early_exit_vit import CONFIGS, EarlyExitViT, EarlyExitViTConfig
from edgetrack.models.heads import decode_answer, search_grid
from edgetrack.models.registry import create_model
from edgetrack.models.segmented import State
from edgetrack.train.losses import LossWeights, tracking_loss

SMALL = {"patch": PATCH, "prior": PRIOR}


@pytest.fixture(scope="module", params=SMALL.values(), ids=SMALL.keys())
def model(request: pytest.FixtureRequest) -> EarlyExitViT:
    return make_model(request.param)


@torch.no_grad()
def run_segments(model: EarlyExitViT, inputs: Mapping[str, Tensor]) -> list[State]:
    """Run the segments one by one, each on nothing but the tensors that it says it reads."""
    state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])
    state["search_region"] = inputs["search_region"]
    answers = []
    for index in range(model.num_exits):
        read = {name: state[name] for name in model.segment_inputs(index)}
        written = model.run_segment(index, read)
        state |= written
        answers.append({k: written[k] for k in ("bbox_cxcywh", "score", "uncertainty")})
    return answers


@torch.no_grad()
def answers_of(model: EarlyExitViT, inputs: Mapping[str, Tensor]) -> list[State]:
    return list(model(**inputs))


def assert_same_bits(got: list[State], expected: list[State]) -> None:
    for one, other in zip(got, expected, strict=True):
        for name in other:
            assert torch.equal(one[name], other[name]), name


def num_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_composed_segments_equal_the_forward_pass_bit_for_bit(model: EarlyExitViT) -> None:
    inputs = make_inputs(model.config)

    assert_same_bits(run_segments(model, inputs), answers_of(model, inputs))


def test_answers_have_the_contracts_shapes_and_ranges(model: EarlyExitViT) -> None:
    answers = answers_of(model, make_inputs(model.config, batch=3))

    assert len(answers) == model.num_exits
    for answer in answers:
        assert {name: tuple(value.shape) for name, value in answer.items()} == {
            "bbox_cxcywh": (3, 4),
            "score": (3,),
            "uncertainty": (3,),
        }
        for name in ("score", "uncertainty"):
            assert ((answer[name] >= 0) & (answer[name] <= 1)).all()
        assert (answer["bbox_cxcywh"][:, 2:] >= 0).all()


@torch.no_grad()
def test_an_answer_is_the_decoded_maps_of_its_exit(model: EarlyExitViT) -> None:
    inputs = make_inputs(model.config)
    state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])
    state["search_region"] = inputs["search_region"]

    for index in range(model.num_exits):
        state |= model.run_trunk(index, state)
        answer = model.run_segment(index, state)

        maps = model.exit_logits(index, state)
        window, bin_size = model.window, model.config.bin_size
        expected = decode_answer(*maps, window=window, bin_size=bin_size)
        assert_same_bits([answer], [expected])


@torch.no_grad()
def test_the_last_exit_uses_the_trunks_own_norm_and_others_their_own() -> None:
    model = make_model(PATCH)
    tokens = torch.randn(2, 4 + 16, PATCH.dim)

    shallow = model.exit_logits(0, {"tokens_0": tokens})
    last = model.exit_logits(1, {"tokens_1": tokens})

    own = model.exits[0].bypass(model.exits[0].norm(tokens))
    final = search_grid(model.backbone.norm(tokens), grid=4)
    for maps, path, features in (
        (shallow, model.exits[0], own),
        (last, model.exits[1], final),
    ):
        for got, expected in zip(maps, path.head(features), strict=True):
            assert torch.equal(got, expected)


def test_a_segment_does_not_write_to_what_it_reads(model: EarlyExitViT) -> None:
    inputs = make_inputs(model.config)
    state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])
    state["search_region"] = inputs["search_region"]
    before = {name: value.clone() for name, value in state.items()}

    model.run_segment(0, state)

    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_an_exit_depends_on_nothing_behind_it(model: EarlyExitViT) -> None:
    inputs = make_inputs(model.config)
    expected = answers_of(model, inputs)
    for index in range(model.num_exits - 1):
        truncated = copy.deepcopy(model)
        behind = [
            *truncated.backbone.blocks[model.config.exit_after[index] :],
            truncated.backbone.norm,
            *truncated.exits[index + 1 :],
        ]
        for parameter in (p for module in behind for p in module.parameters()):
            parameter.data.fill_(torch.nan)

        answers = answers_of(truncated, inputs)

        assert_same_bits(answers[: index + 1], expected[: index + 1])
        assert answers[index + 1]["uncertainty"].isnan().all()


def test_the_last_exit_does_not_depend_on_the_shallow_ones(model: EarlyExitViT) -> None:
    inputs = make_inputs(model.config)
    expected = answers_of(model, inputs)[-1]
    without = copy.deepcopy(model)
    for parameter in without.exits[:-1].parameters():
        parameter.data.fill_(torch.nan)

    assert_same_bits(answers_of(without, inputs)[-1:], [expected])


def test_samples_of_a_batch_do_not_mix(model: EarlyExitViT) -> None:
    inputs = make_inputs(model.config, batch=3)

    together = answers_of(model, inputs)[-1]
    alone = answers_of(model, {name: value[1:2] for name, value in inputs.items()})[-1]

    for name, value in alone.items():
        assert_close(together[name][1:2], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("config", "depends"), [(PATCH, False), (PRIOR, True)])
def test_where_the_target_is_in_the_template_counts_with_a_prior(
    config: EarlyExitViTConfig, depends: bool
) -> None:
    model, inputs = make_model(config), make_inputs(config)
    moved = {**inputs, "template_bbox_cxcywh": inputs["template_bbox_cxcywh"] * 0.5}

    is_same = torch.equal(
        answers_of(model, inputs)[-1]["bbox_cxcywh"], answers_of(model, moved)[-1]["bbox_cxcywh"]
    )

    assert is_same != depends


@torch.no_grad()
def test_cells_under_the_targets_box_are_marked_and_count_four_times_as_much() -> None:
    model, template = make_model(PRIOR), make_inputs(PRIOR, batch=1)["template"]

    inside = model.embed_template(template, torch.tensor([[0.5, 0.5, 1.0, 1.0]]))
    outside = model.embed_template(template, torch.tensor([[5.0, 5.0, 1.0, 1.0]]))

    marks = inside["template_tokens"] - outside["template_tokens"]
    assert_close(marks, (model.box_embed[0] - model.box_embed[1]).expand_as(marks))
    assert_close(inside["correlation_kernel"], 4 * outside["correlation_kernel"])


def test_the_answer_depends_on_the_template(model: EarlyExitViT) -> None:
    inputs = make_inputs(model.config)
    other = {**inputs, "template": make_inputs(model.config, seed=1)["template"]}

    for one, two in zip(answers_of(model, inputs), answers_of(model, other), strict=True):
        assert not torch.equal(one["uncertainty"], two["uncertainty"])


@pytest.mark.parametrize("config", [PATCH, PRIOR], ids=SMALL.keys())
def test_stage_1_reaches_the_trunk_and_the_last_exit_and_no_other(
    config: EarlyExitViTConfig,
) -> None:
    torch.manual_seed(0)
    model = EarlyExitViT(dataclasses.replace(config, drop_path=0.0)).train()
    inputs = make_inputs(config, batch=4)
    state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])
    state["search_region"] = inputs["search_region"]
    for index in range(model.num_exits):
        state |= model.run_trunk(index, state)

    loss, _ = tracking_loss(
        *model.exit_logits(model.num_exits - 1, state),
        bbox_cxcywh=torch.tensor([[0.5, 0.45, 0.3, 0.2]]).expand(4, 4),
        is_present=torch.ones(4),
        bin_size=config.bin_size,
        weights=LossWeights(),
    )
    torch.autograd.backward(loss)

    shallow = tuple(f"exits.{index}." for index in range(model.num_exits - 1))
    for name, parameter in model.named_parameters():
        is_reached = parameter.grad is not None and bool(parameter.grad.any())
        assert is_reached != name.startswith(shallow), name


def test_a_config_survives_json(model: EarlyExitViT) -> None:
    config = json.loads(json.dumps(model.config_dict))

    again = create_model("early_exit_vit", config)

    assert again.config == model.config
    again.load_state_dict(model.state_dict())


def test_a_config_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^early_exit_vit: expected keys among .*got \['widht'\]"):
        create_model("early_exit_vit", {"widht": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": "resnet"}, "^stem: expected 'patch' or 'shuffle', got 'resnet'"),
        ({"exit_after": ()}, r"^exit_after: expected rising .*got \(\)"),
        ({"exit_after": (0, 4)}, "^exit_after: expected rising"),
        ({"exit_after": (4, 4)}, "^exit_after: expected rising"),
        ({"exit_after": (8, 4)}, "^exit_after: expected rising"),
        ({"dim": 100}, "^dim: expected a multiple of num_heads=12, got 100"),
        ({"bypass_dim": 30}, "^bypass_dim: expected a multiple of bypass_heads=4, got 30"),
        ({"search_size_px": 250}, "^search_size_px: expected a multiple of 16, got 250"),
        ({"template_size_px": 60}, "^template_size_px: expected a multiple of 16, got 60"),
        ({"correlation_dim": 8}, "^correlation_dim: expected 0 with stem 'patch'"),
        (
            {"stem": "shuffle", "correlation_dim": 8, "head_upsample": 4},
            "^head_upsample: expected 1 or 2 with correlation_dim, .*got 4",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EarlyExitViTConfig(**changes)


def test_tiny_has_three_exits_and_at_most_three_million_parameters() -> None:
    model = create_model("early_exit_vit-tiny")

    assert model.num_exits == 3
    assert num_parameters(model) <= 3_000_000


def test_tiny_runs_at_its_own_crop_sizes() -> None:
    model = make_model(CONFIGS["tiny"])

    answers = answers_of(model, make_inputs(model.config, batch=1))

    assert all(value.isfinite().all() for answer in answers for value in answer.values())
