import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from small_families import CNN, make_cnn
from small_models import make_inputs
from torch import Tensor, nn
from torch.testing import assert_close

from edgetrack.models.registry import create_model
from edgetrack.models.segmented import State
from edgetrack.models.siamese_cnn import CONFIGS, SiameseCNN, SiameseCNNConfig
from edgetrack.train.losses import LossWeights, tracking_loss

# Exit by exit: cx, cy, w, h, score and uncertainty of the model of ``golden_model``.
GOLDEN = (
    (0.53259, 0.67149, 0.66742, 0.63815, 0.75028, 0.66597),
    (0.55798, 0.57701, 0.62606, 0.62952, 0.84568, 0.88774),
    (0.52485, 0.64694, 0.6688, 0.57389, 0.99744, 0.58744),
)


@pytest.fixture(scope="module")
def model() -> SiameseCNN:
    return make_cnn()


@torch.no_grad()
def answers_of(model: SiameseCNN, inputs: Mapping[str, Tensor]) -> list[State]:
    return list(model(**inputs))


@torch.no_grad()
def test_the_composed_segments_equal_the_forward_pass_bit_for_bit(model: SiameseCNN) -> None:
    inputs = make_inputs(model.config)
    state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])
    state["search_region"] = inputs["search_region"]

    for index, answer in enumerate(answers_of(model, inputs)):
        read = {name: state[name] for name in model.segment_inputs(index)}
        written = model.run_segment(index, read)
        state |= written

        assert all(torch.equal(written[name], value) for name, value in answer.items())


def test_answers_have_the_contracts_shapes_and_ranges(model: SiameseCNN) -> None:
    answers = answers_of(model, make_inputs(model.config, batch=3))

    assert len(answers) == model.num_exits == 3
    for answer in answers:
        assert {name: tuple(value.shape) for name, value in answer.items()} == {
            "bbox_cxcywh": (3, 4),
            "score": (3,),
            "uncertainty": (3,),
        }
        for name in ("score", "uncertainty"):
            assert ((answer[name] >= 0) & (answer[name] <= 1)).all()


def test_samples_of_a_batch_do_not_mix(model: SiameseCNN) -> None:
    inputs = make_inputs(model.config, batch=3)

    together = answers_of(model, inputs)[-1]
    alone = answers_of(model, {name: value[1:2] for name, value in inputs.items()})[-1]

    for name, value in alone.items():
        assert_close(together[name][1:2], value, atol=1e-5, rtol=0)


def test_the_answer_depends_on_the_template_and_on_where_the_target_is(model: SiameseCNN) -> None:
    inputs = make_inputs(model.config)
    other = {**inputs, "template": make_inputs(model.config, seed=1)["template"]}
    moved = {**inputs, "template_bbox_cxcywh": inputs["template_bbox_cxcywh"] * 0.5}

    answers = [answers_of(model, i) for i in (inputs, other, moved)]

    for one, two, three in zip(*answers, strict=True):
        assert not torch.equal(one["uncertainty"], two["uncertainty"])
        assert not torch.equal(one["uncertainty"], three["uncertainty"])


def test_the_first_exit_pays_for_no_coarse_stem(model: SiameseCNN) -> None:
    inputs = make_inputs(model.config)
    expected = answers_of(model, inputs)
    broken = make_cnn()
    for parameter in broken.backbone.stem.stage3.parameters():
        parameter.data.fill_(torch.nan)

    answers = answers_of(broken, inputs)

    assert torch.equal(answers[0]["uncertainty"], expected[0]["uncertainty"])
    assert answers[1]["uncertainty"].isnan().all()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_loss_of_an_exit_reaches_the_trunk_before_it_and_its_own_head(index: int) -> None:
    torch.manual_seed(0)
    model = SiameseCNN(CNN).train()
    inputs = make_inputs(CNN, batch=4)
    state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])
    state["search_region"] = inputs["search_region"]
    for segment in range(model.num_exits):
        state |= model.run_trunk(segment, state)

    loss, _ = tracking_loss(
        *model.exit_logits(index, state),
        bbox_cxcywh=torch.tensor([[0.5, 0.45, 0.3, 0.2]]).expand(4, 4),
        is_present=torch.ones(4),
        bin_size=CNN.bin_size,
        weights=LossWeights(),
    )
    torch.autograd.backward(loss)

    behind = tuple(f"backbone.stages.{k}." for k in range(index + 1, 3))
    others = tuple(f"exits.{k}." for k in range(3) if k != index)
    coarse = ("backbone.join.", "backbone.stem.stage3.") if index == 0 else ()
    for name, parameter in model.named_parameters():
        is_reached = parameter.grad is not None and bool(parameter.grad.any())
        assert is_reached != name.startswith((*behind, *others, *coarse)), name


def golden_model() -> SiameseCNN:
    """A model whose weights no random generator makes."""
    model = SiameseCNN(CNN).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            steps = torch.arange(parameter.numel(), dtype=torch.float64)
            values = torch.sin(steps * 0.7 + number)
            if parameter.ndim > 1:
                values *= 1.5 / parameter[0].numel() ** 0.5
            else:
                values = 1 + 0.1 * values if values.numel() > 1 else values
            parameter.copy_(values.reshape(parameter.shape))
    return model


def golden_inputs() -> dict[str, Tensor]:
    def image(side_px: int, period: int) -> Tensor:
        steps = torch.arange(side_px * side_px * 3, dtype=torch.int64)
        return (steps * period % 251).to(torch.uint8).reshape(1, side_px, side_px, 3)

    return {
        "template": image(32, 37),
        "template_bbox_cxcywh": torch.tensor([[0.5, 0.45, 0.4, 0.3]]),
        "search_region": image(64, 41),
    }


def test_answers_are_as_they_were() -> None:
    answers = answers_of(golden_model(), golden_inputs())

    for answer, expected in zip(answers, GOLDEN, strict=True):
        got = [*answer["bbox_cxcywh"][0], answer["score"][0], answer["uncertainty"][0]]
        assert_close(torch.stack(got), torch.tensor(expected), atol=1e-4, rtol=0)


def test_one_stage_is_a_model_with_one_exit() -> None:
    model = make_cnn(dataclasses.replace(CNN, depths=(2,)))

    assert len(answers_of(model, make_inputs(model.config))) == 1


def test_a_config_survives_json(model: SiameseCNN) -> None:
    again = create_model("siamese_cnn", json.loads(json.dumps(model.config_dict)))

    assert again.config == model.config
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": ()}, r"^depths: expected at least 1 for every stage, got \(\)"),
        ({"depths": (1, 0)}, "^depths: expected at least 1"),
        ({"search_size_px": 120}, "^search_size_px: expected a multiple of 16, got 120"),
        ({"template_size_px": 0}, "^template_size_px: expected a multiple of 16, got 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SiameseCNNConfig(**changes)


def test_a_config_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^siamese_cnn: expected keys among .*got \['widht'\]"):
        create_model("siamese_cnn", {"widht": 3})


def test_tiny_runs_at_its_own_crop_sizes_on_the_stem_of_early_exit_vit() -> None:
    model = create_model("siamese_cnn-tiny").eval()

    answers = answers_of(model, make_inputs(CONFIGS["tiny"], batch=1))

    assert all(value.isfinite().all() for answer in answers for value in answer.values())
    stem = create_model("early_exit_vit-tiny").backbone.stem.state_dict()
    assert isinstance(model, SiameseCNN)
    model.backbone.stem.load_state_dict(stem)
    assert sum(p.numel() for p in model.parameters()) < 1_200_000
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())
