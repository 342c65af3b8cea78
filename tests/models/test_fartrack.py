import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from small_fartrack import FARTRACK_PATCH, FARTRACK_PRIOR, follow, make_fartrack
from small_models import make_inputs
from tolerances import FROM_TWIN
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from edgetrack.models.coordinates import decode_coordinates
from edgetrack.models.fartrack import CONFIGS, FARTrack, FARTrackConfig
from edgetrack.models.registry import create_model
from edgetrack.models.segmented import State

SMALL = {"patch": FARTRACK_PATCH, "prior": FARTRACK_PRIOR}
EACH = pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())
ANSWER = ("bbox_cxcywh", "score", "uncertainty")


@pytest.fixture(scope="module", params=SMALL.values(), ids=SMALL.keys())
def model(request: pytest.FixtureRequest) -> FARTrack:
    return make_fartrack(request.param)


@torch.no_grad()
def answers_of(model: FARTrack, inputs: Mapping[str, Tensor]) -> list[State]:
    return list(model(**inputs))


def state_of(model: FARTrack, inputs: Mapping[str, Tensor]) -> State:
    state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])
    return state | {"search_region": inputs["search_region"]}


def assert_same_bits(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@torch.no_grad()
def test_the_composed_segments_equal_the_forward_pass_bit_for_bit(model: FARTrack) -> None:
    inputs = make_inputs(model.config)
    state = state_of(model, inputs)

    for index, expected in enumerate(answers_of(model, inputs)):
        state |= model.run_segment(index, {n: state[n] for n in model.segment_inputs(index)})
        assert_same_bits(state, expected)


def test_answers_have_the_contracts_shapes_and_ranges(model: FARTrack) -> None:
    answers = answers_of(model, make_inputs(model.config, batch=3))

    assert len(answers) == model.num_exits
    for answer in answers:
        shapes = {name: tuple(value.shape) for name, value in answer.items()}
        assert shapes == {"bbox_cxcywh": (3, 4), "score": (3,), "uncertainty": (3,)}
        for name in ("score", "uncertainty"):
            assert ((answer[name] >= 0) & (answer[name] <= 1)).all()
        assert (answer["bbox_cxcywh"][:, 2:] > 0).all()


def test_golden_answers() -> None:
    """Pinned: what the small model said when its parts were checked against their slow twins."""
    inputs = make_inputs(FARTRACK_PATCH, batch=1)
    inputs |= {"template": inputs["template"] // 2}

    state = follow(
        make_fartrack(dataclasses.replace(FARTRACK_PATCH, min_update_score=0.0), seed=4),
        inputs["template"],
        inputs["template_bbox_cxcywh"],
        [inputs["search_region"], inputs["search_region"] // 2],
    )

    for name, golden in GOLDEN.items():
        assert_close(state[name][0], torch.tensor(golden), atol=1e-4, rtol=0)


GOLDEN: dict[str, Any] = {
    "bbox_cxcywh": [0.6458, 0.1861, 0.6674, 0.6792],
    "score": 0.0443,
    "uncertainty": 0.4539,
}


@torch.no_grad()
def test_an_exit_equals_the_model_that_was_cut_there(model: FARTrack) -> None:
    inputs = make_inputs(model.config)
    expected = answers_of(model, inputs)

    for depth, answer in zip(model.config.exit_after, expected, strict=True):
        cut = model.cut(exit_after=(depth,))
        assert cut.num_exits == 1
        assert len(cut.backbone.blocks) == depth
        assert_same_bits(answers_of(cut, inputs)[0], answer)


def test_an_exit_depends_on_nothing_behind_it(model: FARTrack) -> None:
    inputs = make_inputs(model.config)
    expected = answers_of(model, inputs)
    broken = copy.deepcopy(model)
    for parameter in broken.backbone.blocks[model.config.exit_after[0] :].parameters():
        parameter.data.fill_(torch.nan)

    answers = answers_of(broken, inputs)

    assert_same_bits(answers[0], expected[0])
    assert answers[1]["uncertainty"].isnan().all()


@torch.no_grad()
def test_logits_at_a_depth_are_those_of_its_exit(model: FARTrack) -> None:
    inputs = make_inputs(model.config)
    depths = model.config.exit_after

    found = model.logits_at(depths, state_of(model, inputs))

    for logits, answer in zip(found, answers_of(model, inputs), strict=True):
        assert_same_bits(decode_coordinates(logits, model.config.num_bins), answer)


def test_samples_of_a_batch_do_not_mix(model: FARTrack) -> None:
    inputs = make_inputs(model.config, batch=3)

    together = answers_of(model, inputs)[-1]
    alone = answers_of(model, {name: value[1:2] for name, value in inputs.items()})[-1]

    for name, value in alone.items():
        assert_close(together[name][1:2], value, atol=FROM_TWIN["float32"], rtol=0)


@EACH
def test_training_reaches_every_parameter(config: FARTrackConfig) -> None:
    torch.manual_seed(0)
    model = FARTrack(config).train()
    inputs = make_inputs(config, batch=3)
    count = config.num_templates
    templates = torch.stack([inputs["template"] // (k + 1) for k in range(count)], 1)
    bboxes = inputs["template_bbox_cxcywh"][:, None].expand(-1, count, -1)
    state = model.embed_templates(templates, bboxes, is_sparse=True)
    state["search_region"] = inputs["search_region"]

    logits = torch.stack(model.logits_at(config.exit_after, state))
    torch.autograd.backward((logits * torch.randn_like(logits)).sum())

    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@torch.no_grad()
def masked_answer(model: FARTrack, state: State, kept: Tensor) -> State:
    """A slow twin: all tokens of all templates, those that were dropped hidden from attention."""
    count, cells = model.config.num_templates, model.backbone.template_grid**2
    tokens = model._embed_search({**state, **model._fine_features(state)})
    is_seen = torch.ones(tokens.shape[:2], dtype=torch.bool)
    is_seen[:, : count * cells] = False
    for row in range(len(tokens)):
        for slot in range(count):
            is_seen[row, slot * cells + kept[row, slot]] = True
    hidden = torch.zeros(is_seen.shape).masked_fill(~is_seen, -torch.inf)[:, None, None]
    for block in model.backbone.blocks:
        q, k, v = block.attn.heads(block.norm1(tokens))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + hidden).softmax(-1)
        tokens = tokens + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
    logits = model.vocabulary(model.backbone.norm(tokens[:, -4:]))
    return decode_coordinates(logits, model.config.num_bins)


@torch.no_grad()
def test_gathered_tokens_give_what_masked_ones_give(model: FARTrack) -> None:
    inputs = make_inputs(model.config, batch=2)
    count = model.config.num_templates
    templates = torch.stack([inputs["template"] // (k + 1) for k in range(count)], 1)
    bboxes = inputs["template_bbox_cxcywh"][:, None].expand(-1, count, -1)
    sparse, dense = (
        model.embed_templates(templates, bboxes, is_sparse=is_sparse)
        | {"search_region": inputs["search_region"]}
        for is_sparse in (True, False)
    )
    embedded = [
        super(FARTrack, model).embed_template(templates[:, k], bboxes[:, k]) for k in range(count)
    ]
    kept = torch.stack([model.kept_cells(e["template_tokens"]) for e in embedded], 1)

    (logits,) = model.logits_at(model.config.exit_after[-1:], sparse)

    gathered = decode_coordinates(logits, model.config.num_bins)
    for name, value in masked_answer(model, dense, kept).items():
        assert_close(gathered[name], value, atol=FROM_TWIN["float32"], rtol=0)
    everything = torch.arange(dense["template_tokens"].shape[1] // count)
    unpruned = masked_answer(model, dense, everything.expand(2, count, -1))
    assert not torch.allclose(unpruned["bbox_cxcywh"], gathered["bbox_cxcywh"], atol=1e-4)


@torch.no_grad()
def test_the_kept_cells_are_those_that_the_stand_in_attends_to_most(model: FARTrack) -> None:
    model = model.cut(retention=0.5)
    inputs, config = make_inputs(model.config, batch=16), model.config
    tokens = super(FARTrack, model).embed_template(
        inputs["template"], inputs["template_bbox_cxcywh"]
    )["template_tokens"]

    kept = model.kept_cells(tokens)

    grid, wide = config.template_size_px // 16, config.search_size_px // 16
    middle, centre = grid // 2 * grid + grid // 2, wide // 2 * wide + wide // 2
    for row in range(len(tokens)):
        stand_in = tokens[row, middle] - model.backbone.pos_embed_z[0, middle]
        stand_in = stand_in + model.backbone.pos_embed_x[0, centre] + model.identity[-1]
        sequence = torch.cat([tokens[row] + model.identity[-2], stand_in[None]])[None]
        total = torch.zeros(grid**2)
        for block in model.backbone.blocks[: config.selection_layers]:
            q, k, _ = block.attn.heads(block.norm1(sequence))
            for head in range(config.num_heads):
                weights = (k[0, head] @ q[0, head, -1] / math.sqrt(q.shape[-1])).softmax(0)
                total += weights[:-1] / config.num_heads
            sequence = block(sequence)
        expected = sorted(total.argsort(descending=True)[: config.kept_tokens].tolist())
        assert kept[row].tolist() == expected


@pytest.mark.parametrize(
    ("retention", "kept", "row"), [(1.0, 49, 445), (0.75, 37, 385), (0.5, 25, 325), (0.25, 13, 265)]
)
def test_tokens_of_the_papers_network(retention: float, kept: int, row: int) -> None:
    config = dataclasses.replace(CONFIGS["tiny"], retention=retention)

    search_tokens = (config.search_size_px // 16) ** 2
    assert config.kept_tokens == kept
    assert config.num_templates * kept + search_tokens + 4 == row


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
@torch.no_grad()
def test_fewer_tokens_are_fewer_products(share: float) -> None:
    dense = dataclasses.replace(FARTRACK_PATCH, retention=1.0)
    model = make_fartrack(dense).cut(retention=share)
    state = state_of(model, make_inputs(dense, batch=1))

    macs = []
    for index in range(model.num_exits):
        # The counter knows the products of the plain kernel alone.
        with FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]):
            state |= model.run_segment(index, state)
        macs.append(counter.get_total_flops() // 2)

    tokens = 4 * model.config.kept_tokens + 36 + 2 * 4 + 4
    dim, hidden, words = 32, 64, 40 + 5
    block = tokens * dim * (4 * dim + 2 * hidden) + 2 * tokens * tokens * dim
    head, patches = 4 * dim * words, 36 * 3 * 16 * 16 * dim
    assert macs == [patches + 2 * block + head, block + head, block + head]


@torch.no_grad()
def test_full_retention_keeps_all_tokens_in_their_order() -> None:
    model = make_fartrack(dataclasses.replace(FARTRACK_PATCH, retention=1.0))
    inputs = make_inputs(model.config)

    state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])

    tokens = model.backbone.embed(inputs["template"]) + model.backbone.pos_embed_z
    assert torch.equal(state["bank"][:, 0], tokens)


@torch.no_grad()
def test_the_first_template_fills_all_slots_and_places(model: FARTrack) -> None:
    inputs = make_inputs(model.config)

    state = state_of(model, inputs)

    slots = state["template_tokens"].unflatten(1, (model.config.num_templates, -1))
    bare = slots - model.identity[:-1, None]
    for place in range(model.config.history_places):
        assert torch.equal(state["bank"][:, place], state["bank"][:, 0])
    for slot in range(model.config.num_templates):
        assert_close(bare[:, slot], state["bank"][:, 0])
    assert state["bank_clock"].tolist() == [[0, 1], [0, 1]]


@torch.no_grad()
def test_an_update_puts_the_new_template_last_and_keeps_the_first() -> None:
    model = make_fartrack(dataclasses.replace(FARTRACK_PATCH, min_update_score=0.0))
    inputs = make_inputs(model.config, batch=1)
    state = state_of(model, inputs)
    other = make_inputs(model.config, batch=1, seed=1)

    for index in range(model.num_exits):
        state |= model.run_segment(index, state)
    written = model.run_update({**state, **other})

    new = model.embed_template(other["template"], other["template_bbox_cxcywh"])["bank"][:, 0]
    slots = written["next_template_tokens"].unflatten(1, (model.config.num_templates, -1))
    slots = slots - model.identity[:-1, None]
    for slot in range(model.config.num_templates - 1):
        assert_close(slots[:, slot], state["bank"][:, 0])
    assert_close(slots[:, -1], new)
    assert not torch.allclose(new, state["bank"][:, 0], atol=1e-2)


def test_what_is_carried_keeps_its_shape_and_dtype(model: FARTrack) -> None:
    inputs = make_inputs(model.config, batch=1)
    first = state_of(model, inputs)

    state = follow(
        model,
        inputs["template"],
        inputs["template_bbox_cxcywh"],
        [inputs["search_region"]] * 12,
    )

    for name in model.carried:
        assert state[name].shape == first[name].shape
        assert state[name].dtype == first[name].dtype


@pytest.mark.parametrize(("score", "is_taken"), [(0.04, False), (0.06, True), (torch.nan, False)])
def test_a_doubtful_frame_adds_no_template(score: float, is_taken: bool) -> None:
    model = make_fartrack(FARTRACK_PATCH)
    inputs = make_inputs(model.config, batch=1)
    state = state_of(model, inputs)
    state |= {
        "score": torch.tensor([score]),
        "bbox_cxcywh": torch.tensor([[0.4, 0.5, 0.2, 0.2]]),
        "template": inputs["template"] // 3,
    }

    written = model.run_update({**inputs, **state})

    for name in ("template_tokens", "bank", "bank_clock"):
        assert torch.equal(written[f"next_{name}"], state[name]) != is_taken
    assert not torch.equal(written["next_trajectory"], state["trajectory"])


def test_the_trajectory_is_the_last_boxes_in_the_next_search_region() -> None:
    model = make_fartrack(FARTRACK_PATCH)
    inputs = make_inputs(model.config, batch=1)
    state = state_of(model, inputs)
    boxes = [(0.6, 0.45, 0.3, 0.2), (0.5, 0.5, 0.2, 0.25), (0.35, 0.7, 0.25, 0.25)]

    # In the frame, a search region is at some corner and has some side.
    x, y, side, seen = 10.0, 20.0, 100.0, []
    for cx, cy, w, h in boxes:
        state |= {"bbox_cxcywh": torch.tensor([[cx, cy, w, h]]), "score": torch.ones(1)}
        written = model.run_update({**inputs, **state})
        state |= {name: written[source] for name, source in model.carried.items()}
        seen.append((x + cx * side, y + cy * side, w * side, h * side))
        side = math.sqrt(w * h) * side * model.crops.search_factor
        x, y = seen[-1][0] - side / 2, seen[-1][1] - side / 2

    expected = [
        [(cx - x) / side, (cy - y) / side, w / side, h / side] for cx, cy, w, h in seen[-2:]
    ]
    assert_close(state["trajectory"], torch.tensor([expected]), atol=1e-5, rtol=0)
    assert_close(state["trajectory"][0, -1, :2], torch.tensor([0.5, 0.5]))


def test_a_target_that_has_not_moved_has_stood_in_the_middle() -> None:
    model = make_fartrack(FARTRACK_PATCH)
    inputs = make_inputs(model.config, batch=1)

    state = state_of(model, inputs)

    w, h = inputs["template_bbox_cxcywh"][0, 2:].tolist()
    ratio = model.crops.template_factor / model.crops.search_factor
    expected = torch.tensor([[[0.5, 0.5, w * ratio, h * ratio]] * 2])
    assert_close(state["trajectory"], expected)


def test_where_the_target_was_counts_only_with_a_trajectory() -> None:
    inputs = make_inputs(FARTRACK_PATCH, batch=1)
    for num_trajectory in (0, 2):
        config = dataclasses.replace(FARTRACK_PATCH, num_trajectory=num_trajectory)
        model = make_fartrack(config)
        state = state_of(model, inputs)
        assert ("trajectory" in state) == bool(num_trajectory)
        assert ("trajectory" in model.segment_inputs(0)) == bool(num_trajectory)
        if num_trajectory:
            moved = {**state, "trajectory": state["trajectory"] * 0.5}
            one, other = (model.run_segment(0, s)["uncertainty"] for s in (state, moved))
            assert not torch.equal(one, other)


@torch.no_grad()
def test_every_slot_counts(model: FARTrack) -> None:
    inputs = make_inputs(model.config, batch=1)
    count = model.config.num_templates
    templates = inputs["template"][:, None].expand(-1, count, -1, -1, -1)
    bboxes = inputs["template_bbox_cxcywh"][:, None].expand(-1, count, -1)

    def answer(templates: Tensor) -> Tensor:
        state = model.embed_templates(templates, bboxes, is_sparse=True)
        state["search_region"] = inputs["search_region"]
        return model.logits_at([1], state)[0]

    same = answer(templates)
    for slot in range(count):
        changed = templates.clone()
        changed[:, slot] //= 3
        assert not torch.equal(answer(changed), same)


@EACH
def test_a_config_survives_json(config: FARTrackConfig) -> None:
    model = make_fartrack(config)

    again = create_model("fartrack", json.loads(json.dumps(model.config_dict)))

    assert again.config == config
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_templates": 0}, "^num_templates: expected at least 1 slot for templates, got 0"),
        ({"retention": 0.0}, r"^retention: expected more than 0, up to 1, got 0\.0"),
        ({"retention": 1.5}, r"^retention: expected more than 0, up to 1, got 1\.5"),
        ({"retention": math.nan}, "^retention: expected more than 0, up to 1, got nan"),
        ({"selection_layers": 0}, "^selection_layers: expected at least 1, got 0"),
        ({"selection_layers": 16}, "^exit_after: expected the first exit behind layer 16"),
        ({"history_places": 0}, "^history_places: expected an even number from 2 on, got 0"),
        ({"history_places": 5}, "^history_places: expected an even number from 2 on, got 5"),
        ({"num_bins": 2}, "num_bins >= 4"),
        ({"min_update_score": 2.0}, r"min_update_score in \[0, 1\]"),
        ({"exit_after": (4, 2)}, "^exit_after: expected rising"),
        ({"template_size_px": 100}, "^template_size_px: expected a multiple of 16"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FARTrackConfig(**changes)


def test_an_exit_before_any_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^exit_after: expected at least one block"):
        dataclasses.replace(FARTRACK_PRIOR, exit_after=(0, 2))


@pytest.mark.parametrize("changes", [{"exit_after": (4, 9)}, {"num_bins": 60}, {"dim": 64}])
def test_a_model_cannot_be_cut_to_what_it_has_not(changes: dict[str, Any]) -> None:
    model = make_fartrack(FARTRACK_PATCH)

    with pytest.raises(
        ValueError, match=r"^cut: expected a part of this model, got one that needs"
    ):
        model.cut(**changes)


def test_a_batch_with_another_number_of_templates_is_refused() -> None:
    model = make_fartrack(FARTRACK_PATCH)
    inputs = make_inputs(model.config)

    with pytest.raises(ValueError, match=r"^templates: expected one for each of 4 slots, got 1"):
        model.embed_templates(
            inputs["template"][:, None], inputs["template_bbox_cxcywh"][:, None], is_sparse=True
        )


@pytest.mark.parametrize(("variant", "millions"), [("tiny", 6.82), ("nano", 4.59), ("pico", 2.81)])
def test_the_papers_variants_have_its_number_of_parameters(variant: str, millions: float) -> None:
    """The published counts are of modules: embeddings and biases that are bare are not in them."""
    model = create_model(f"fartrack-{variant}")

    modules = (p for m in model.modules() if not list(m.children()) for p in m.parameters())
    bare = sum(p.numel() for p in model.vocabulary.parameters())
    assert (sum(p.numel() for p in modules) - bare) / 1e6 == pytest.approx(millions, abs=0.01)


def test_micro_runs_at_its_own_crop_sizes() -> None:
    model = make_fartrack(CONFIGS["micro"])

    answers = answers_of(model, make_inputs(model.config, batch=1))

    assert all(value.isfinite().all() for answer in answers for value in answer.values())


@torch.no_grad()
def test_training_drops_no_branch_while_cells_are_chosen(model: FARTrack) -> None:
    model = model.cut(retention=0.5, selection_layers=model.config.exit_after[0])
    for block in model.backbone.blocks:
        block.drop_path = 0.9
    cells = (model.config.template_size_px // 16) ** 2
    tokens = torch.randn(16, cells, model.config.dim, generator=torch.manual_seed(0))

    chosen = model.kept_cells(tokens)

    assert torch.equal(model.train().kept_cells(tokens), chosen)
