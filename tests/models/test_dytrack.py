import copy
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from small_models import DYTRACK_PATCH, DYTRACK_PRIOR, make_dytrack, make_inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from edgetrack.models.dytrack import CONFIGS, DyTrack, DyTrackConfig
from edgetrack.models.heads import decode_center
from edgetrack.models.registry import create_model
from edgetrack.models.segmented import State

SMALL = {"patch": DYTRACK_PATCH, "prior": DYTRACK_PRIOR}
EACH = pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())


@pytest.fixture(scope="module", params=SMALL.values(), ids=SMALL.keys())
def model(request: pytest.FixtureRequest) -> DyTrack:
    return make_dytrack(request.param)


def template_state(model: DyTrack, inputs: Mapping[str, Tensor]) -> State:
    state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])
    return state | {"search_region": inputs["search_region"]}


@torch.no_grad()
def run_graphs(model: DyTrack, inputs: Mapping[str, Tensor], *, heads: tuple[int, ...]) -> State:
    """Run all segments and some heads, each on nothing but the tensors that it says it reads.

    Returns:
        ``score_<k>`` and ``uncertainty_<k>`` of all exits, ``bbox_cxcywh_<k>`` of some.
    """
    state = template_state(model, inputs)
    answers: State = {}
    for index in range(model.num_exits):
        written = model.run_segment(index, {n: state[n] for n in model.segment_inputs(index)})
        state |= written
        answers |= {f"{name}_{index}": written[name] for name in ("score", "uncertainty")}
        if index in heads:
            box = model.run_head(index, {n: state[n] for n in model.head_inputs(index)})
            answers[f"bbox_cxcywh_{index}"] = box["bbox_cxcywh"]
    return answers


@torch.no_grad()
def answers_of(model: DyTrack, inputs: Mapping[str, Tensor]) -> State:
    return {
        f"{name}_{index}": value
        for index, answer in enumerate(model(**inputs))
        for name, value in answer.items()
    }


def assert_same_bits(got: State, expected: State) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_the_composed_graphs_equal_the_forward_pass_bit_for_bit(model: DyTrack) -> None:
    inputs = make_inputs(model.config)

    every = tuple(range(model.num_exits))
    assert_same_bits(run_graphs(model, inputs, heads=every), answers_of(model, inputs))


def test_a_box_is_the_same_whether_or_not_other_heads_are_run(model: DyTrack) -> None:
    inputs = make_inputs(model.config)
    expected = answers_of(model, inputs)

    for taken in range(model.num_exits):
        answers = run_graphs(model, inputs, heads=(taken,))
        assert torch.equal(answers[f"bbox_cxcywh_{taken}"], expected[f"bbox_cxcywh_{taken}"])


def test_the_decision_needs_no_box_head(model: DyTrack) -> None:
    inputs = make_inputs(model.config)
    expected = answers_of(model, inputs)
    without = copy.deepcopy(model)
    for branch in without.branches:
        for parameter in branch.head.parameters():
            parameter.data.fill_(torch.nan)

    answers = run_graphs(without, inputs, heads=())

    assert_same_bits(answers, {k: v for k, v in expected.items() if "bbox" not in k})


def test_answers_have_the_contracts_shapes_and_ranges(model: DyTrack) -> None:
    answers = model(**make_inputs(model.config, batch=3))

    assert len(answers) == model.num_exits
    for answer in answers:
        assert {name: tuple(value.shape) for name, value in answer.items()} == {
            "bbox_cxcywh": (3, 4),
            "score": (3,),
            "uncertainty": (3,),
        }
        assert ((answer["score"] > 0) & (answer["score"] < 1)).all()
        assert torch.equal(answer["uncertainty"], 1 - answer["score"])
        assert (answer["bbox_cxcywh"][:, 2:] > 0).all()


@torch.no_grad()
def test_the_score_is_the_mlp_of_the_iou_token_and_of_no_other() -> None:
    model = make_dytrack(DYTRACK_PATCH)
    features = torch.randn(2, 1 + 16, DYTRACK_PATCH.dim)
    branch = model.branches[1]

    logit = branch.iou_logit(features)
    features[:, 1:] = torch.nan
    again = branch.iou_logit(features)

    layers = [m for m in branch.decisioner if isinstance(m, torch.nn.Linear)]
    expected = features[:, 0]
    for layer in layers[:-1]:
        expected = (expected @ layer.weight.T + layer.bias).clamp(min=0)
    expected = expected @ layers[-1].weight.T + layers[-1].bias
    assert len(layers) == 3
    assert_close(logit, expected.squeeze(1))
    assert torch.equal(again, logit)


@torch.no_grad()
def test_a_box_is_the_decoded_maps_of_its_branchs_own_head(model: DyTrack) -> None:
    state = template_state(model, make_inputs(model.config))
    for index in range(model.num_exits):
        state |= model.run_segment(index, state)

        maps = model.box_maps(index, state)
        expected = decode_center(maps, window=model.window)["bbox_cxcywh"]
        assert torch.equal(model.run_head(index, state)["bbox_cxcywh"], expected)


@EACH
def test_without_recycling_a_branch_is_a_plain_one(config: DyTrackConfig) -> None:
    recycling, inputs = make_dytrack(config), make_inputs(config)
    plain = DyTrack(dataclasses.replace(config, recycling=False)).eval()
    rest = {k: v for k, v in recycling.state_dict().items() if ".recycle." not in k}
    plain.load_state_dict(rest)
    silent = copy.deepcopy(recycling)
    for branch in silent.branches[1:]:
        branch.recycle.weight.data.zero_()
        branch.recycle.bias.data.zero_()

    plain_answers = answers_of(plain, inputs)

    assert_same_bits(answers_of(silent, inputs), plain_answers)
    loud = answers_of(recycling, inputs)
    assert torch.equal(loud["score_0"], plain_answers["score_0"])
    for index in range(1, plain.num_exits):
        assert not torch.equal(loud[f"score_{index}"], plain_answers[f"score_{index}"])
        assert f"features_{index - 1}" not in plain.segment_inputs(index)


def test_recycling_starts_as_a_plain_branch() -> None:
    recycling = DyTrack(DYTRACK_PATCH).eval()
    plain = DyTrack(dataclasses.replace(DYTRACK_PATCH, recycling=False)).eval()
    weights = recycling.state_dict()
    plain.load_state_dict({k: v for k, v in weights.items() if ".recycle." not in k})
    inputs = make_inputs(DYTRACK_PATCH)

    assert_same_bits(answers_of(recycling, inputs), answers_of(plain, inputs))


@torch.no_grad()
def test_recycled_features_are_a_branchs_own_and_a_linear_layer_of_both() -> None:
    model = make_dytrack(DYTRACK_PATCH)
    tokens = torch.randn(2, 1 + 4 + 16, DYTRACK_PATCH.dim)
    before = torch.randn(2, 1 + 16, DYTRACK_PATCH.dim)

    features = model.branch_features(1, {"tokens_1": tokens, "features_0": before})

    branch = model.branches[1]
    for token, place in ((0, 0), (5, 1), (20, 16)):
        own = branch.norm(tokens[:, token])
        weight = branch.recycle.weight
        half = DYTRACK_PATCH.dim
        mixed = own @ weight[:, :half].T + before[:, place] @ weight[:, half:].T
        assert_close(features[:, place], own + mixed + branch.recycle.bias)


@torch.no_grad()
def test_the_iou_token_is_first_in_the_row_and_there_from_the_first_layer(model: DyTrack) -> None:
    state = template_state(model, make_inputs(model.config))

    tokens = state["template_tokens"]
    written = model.run_segment(0, state)

    assert torch.equal(tokens[:, :1], model.iou_token.expand(2, -1, -1))
    num_template = (model.config.template_size_px // 16) ** 2
    assert written["tokens_0"].shape[1] == 1 + num_template + model.config.search_grid**2
    assert not torch.equal(written["tokens_0"][:, :1], tokens[:, :1])


def test_an_exit_depends_on_nothing_behind_it(model: DyTrack) -> None:
    inputs = make_inputs(model.config)
    expected = answers_of(model, inputs)
    for index in range(model.num_exits - 1):
        truncated = copy.deepcopy(model)
        behind = [
            *truncated.backbone.blocks[model.config.exit_after[index] :],
            truncated.backbone.norm,
            *truncated.branches[index + 1 :],
        ]
        for parameter in (p for module in behind for p in module.parameters()):
            parameter.data.fill_(torch.nan)

        answers = answers_of(truncated, inputs)

        for name, value in expected.items():
            is_behind = int(name.rpartition("_")[2]) > index
            assert torch.equal(answers[name], value) != is_behind, name


def test_the_trunk_does_not_depend_on_the_branches(model: DyTrack) -> None:
    state = template_state(model, make_inputs(model.config))
    other = copy.deepcopy(model)
    for parameter in (*other.branches.parameters(), *other.adaptors.parameters()):
        parameter.data.fill_(torch.nan)

    again = dict(state)
    for index in range(model.num_exits):
        state |= model.run_trunk(index, state)
        again |= other.run_trunk(index, again)

    assert_same_bits(again, state)


def test_samples_of_a_batch_do_not_mix(model: DyTrack) -> None:
    inputs = make_inputs(model.config, batch=3)

    together = answers_of(model, inputs)
    alone = answers_of(model, {name: value[1:2] for name, value in inputs.items()})

    for name, value in alone.items():
        assert_close(together[name][1:2], value, atol=1e-5, rtol=0)


def test_a_config_survives_json(model: DyTrack) -> None:
    config = json.loads(json.dumps(model.config_dict))

    again = create_model("dytrack", config)

    assert again.config == model.config
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_after": (0, 4)}, "^exit_after: expected rising block counts from 1"),
        (
            {"exit_after": (0, 4), "stem": "shuffle", "correlation_dim": 8},
            r"^exit_after: expected at least one block .*got \(0, 4\)",
        ),
        ({"dim": 100}, "^dim: expected a multiple of num_heads=12, got 100"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DyTrackConfig(**changes)


def test_a_config_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^dytrack: expected keys among .*got \['widht'\]"):
        create_model("dytrack", {"widht": 3})


def gmacs_per_exit(model: DyTrack) -> list[float]:
    """Products of one frame that stops at each exit, heads of the exits before it left out."""
    state = template_state(model, make_inputs(model.config, batch=1))
    spent, totals = 0, []
    for index in range(model.num_exits):
        costs = []
        for step in (model.run_segment, model.run_head):
            with FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]):
                state |= step(index, state)
            costs.append(counter.get_total_flops() // 2)
        spent += costs[0]
        totals.append((spent + costs[1]) / 1e9)
    return totals


@pytest.mark.slow
@torch.no_grad()
def test_bases_branches_cost_what_is_published_and_recycling_a_fiftieth_more() -> None:
    model = create_model("dytrack-base").eval()
    assert isinstance(model, DyTrack)
    recycling = gmacs_per_exit(model)
    for branch in model.branches:
        branch.recycle = None

    plain = gmacs_per_exit(model)

    assert plain == pytest.approx([6.7, 16.4, 30.9], abs=0.08)
    per_branch = (1 + 256) * 2 * 768 * 768 / 1e9
    extra = [a - b for a, b in zip(recycling, plain, strict=True)]
    assert extra == pytest.approx([0, per_branch, 2 * per_branch])
    assert extra[-1] < plain[-1] / 50


def test_tiny_runs_at_its_own_crop_sizes_and_shares_the_trunk_of_early_exit_vit() -> None:
    model = make_dytrack(CONFIGS["tiny"])
    shared = create_model("early_exit_vit-tiny").state_dict()

    answers = answers_of(model, make_inputs(model.config, batch=1))

    assert all(value.isfinite().all() for value in answers.values())
    trunk = ("backbone.", "correlation.", "box_embed")
    ours = {k: v.shape for k, v in model.state_dict().items() if k.startswith(trunk)}
    assert ours == {k: v.shape for k, v in shared.items() if k.startswith(trunk)}
