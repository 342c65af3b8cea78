"""What the two stages of a DyTrack minimise, against slow twins, and what they leave alone."""

import copy
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import DYTRACK_PATCH, DYTRACK_PRIOR, PATCH, make_dytrack, make_inputs, make_model
from tolerances import FROM_TWIN
from torch import Tensor
from torch.testing import assert_close

from edgetrack.boxes import iou_xywh
from edgetrack.bundle import Bundle
from edgetrack.data.folder import Clip, TrainingPack
from edgetrack.data.synthetic import render_clip
from edgetrack.evaluate.metrics import spearman_rho
from edgetrack.models.dytrack import CONFIGS, DyTrack, DyTrackConfig
from edgetrack.models.registry import load_fitting_weights
from edgetrack.models.segmented import SegmentedModel
from edgetrack.train.loop import fit
from edgetrack.train.losses import LossWeights, giou
from edgetrack.train.objectives import OBJECTIVES
from edgetrack.train.objectives.dytrack import target_aware_distillation
from edgetrack.train.recipes import Recipe, Stage, get_recipe
from edgetrack.train.sampling import PairSampler

GRID, DIM, OUTSIDE = 4, 6, 0.2
BOXES = torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.7, 0.5, 0.2], [0.9, 0.4, 0.3, 0.6]])
IS_PRESENT = torch.tensor([1.0, 0.0, 1.0])
STILL = dataclasses.replace(DYTRACK_PATCH, drop_path=0.0)
EACH = pytest.mark.parametrize("config", [STILL, DYTRACK_PRIOR], ids=["patch", "prior"])


def make_batch(config: DyTrackConfig) -> dict[str, Tensor]:
    return make_inputs(config, batch=3) | {
        "search_bbox_cxcywh": BOXES,
        "is_present": IS_PRESENT,
    }


def make_recipe(**weights: float) -> Recipe:
    return dataclasses.replace(get_recipe("dytrack-tiny"), loss_weights=LossWeights(**weights))  # type: ignore[arg-type]  # ``boxes_at`` keeps its default


def cover_slowly(bbox: Tensor) -> list[float]:
    """Share of each cell that a box covers."""
    cx, cy, w, h = bbox.tolist()

    def along(centre: float, size: float, cell: int) -> float:
        begin, end = max(centre - size / 2, cell / GRID), min(centre + size / 2, (cell + 1) / GRID)
        return max(end - begin, 0.0) * GRID

    return [along(cy, h, i // GRID) * along(cx, w, i % GRID) for i in range(GRID**2)]


def distillation_slowly(student: Tensor, teacher: Tensor) -> Tensor:
    """Twin of ``target_aware_distillation``: sample by sample, cell by cell."""
    total = torch.zeros((), dtype=student.dtype)
    for b in range(len(BOXES)):
        if not IS_PRESENT[b]:
            continue
        weights = [OUTSIDE + (1 - OUTSIDE) * c for c in cover_slowly(BOXES[b])]
        pattern = torch.zeros((), dtype=student.dtype)
        for cell, weight in enumerate(weights):
            s, t = student[b, cell], teacher[b, cell]
            pattern = pattern + weight * ((s / s.norm() - t / t.norm()) ** 2).sum()
        energies = [torch.stack([(f**2).mean() for f in m[b]]) for m in (student, teacher)]
        p, q = (torch.exp(e) / torch.exp(e).sum() for e in energies)
        divergence = (q * (torch.log(q) - torch.log(p))).sum()
        total = total + pattern / sum(weights) + divergence
    return total / len(BOXES)


def test_distillation_equals_the_slow_twin_gradients_included() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, GRID**2, DIM, generator=generator).requires_grad_()
    twin = student.detach().clone().requires_grad_()
    teacher = torch.randn(3, GRID**2, DIM, generator=generator)

    loss = target_aware_distillation(student, teacher, bbox_cxcywh=BOXES, is_present=IS_PRESENT)
    expected = distillation_slowly(twin, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    (expected_gradient,) = torch.autograd.grad(expected, twin)

    assert_close(loss, expected, atol=FROM_TWIN["float32"], rtol=0)
    assert_close(gradient, expected_gradient, atol=FROM_TWIN["float32"], rtol=0)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn() -> None:
    features = torch.randn(3, GRID**2, DIM, generator=torch.Generator().manual_seed(0))
    student = features.clone().requires_grad_()

    loss = target_aware_distillation(student, features, bbox_cxcywh=BOXES, is_present=IS_PRESENT)
    (gradient,) = torch.autograd.grad(loss, student)

    assert loss.item() == pytest.approx(0, abs=FROM_TWIN["float32"])
    assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_a_cell_at_the_target_teaches_five_times_as_much_as_one_beside_it() -> None:
    box = torch.tensor([[0.125, 0.125, 0.25, 0.25]])  # the first cell, exactly
    losses = []
    for cell in (0, 10):
        student = torch.eye(GRID**2)[None]
        teacher = student.clone()
        teacher[0, cell] = -teacher[0, cell]  # turned round: as far off as can be, as strong
        losses.append(
            target_aware_distillation(student, teacher, bbox_cxcywh=box, is_present=torch.ones(1))
        )

    assert_close(losses[0], losses[1] / OUTSIDE)


@EACH
def test_the_joint_stage_reaches_every_parameter(config: DyTrackConfig) -> None:
    model = make_dytrack(config)
    objective = OBJECTIVES["dytrack_branches"](model, make_recipe())
    objective.prepare()

    loss, _ = objective(make_batch(config))
    torch.autograd.backward(loss)

    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        is_undone_by_a_norm = ".center.conv" in name and name.endswith(".0.bias")
        assert is_undone_by_a_norm or parameter.grad.any(), name


@pytest.mark.parametrize(
    ("weights", "term"),
    [
        ({"score": 3.0}, "score"),
        ({"giou": 3.0}, "giou"),
        ({"l1": 3.0}, "l1"),
        ({"iou": 3.0}, "iou_error"),
        ({"distil_target": 3.0}, "distil"),
    ],
)
def test_the_joint_loss_is_the_weighed_sum_of_its_terms_over_the_branches(
    weights: dict[str, float], term: str
) -> None:
    nothing = dict.fromkeys(("score", "giou", "l1", "iou", "distil_target"), 0.0)
    objective = OBJECTIVES["dytrack_branches"](
        make_dytrack(STILL), make_recipe(**(nothing | weights))
    )

    loss, log = objective(make_batch(STILL))

    branches = 2 if term == "distil" else 3
    assert {f"{term}_{k}" for k in range(branches)} <= log.keys()
    assert_close(loss, 3 * torch.stack([log[f"{term}_{k}"] for k in range(branches)]).sum())


def test_self_distillation_pulls_at_the_early_branches_alone() -> None:
    model = make_dytrack(STILL)
    nothing = dict.fromkeys(("score", "giou", "l1", "iou"), 0.0)
    objective = OBJECTIVES["dytrack_branches"](model, make_recipe(**nothing))

    loss, _ = objective(make_batch(STILL))
    torch.autograd.backward(loss)

    def is_pulled(module: torch.nn.Module) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())

    assert is_pulled(model.adaptors[1])
    assert is_pulled(model.backbone.blocks[1])
    assert not is_pulled(model.backbone.blocks[2])
    assert not is_pulled(model.backbone.norm)


@EACH
def test_the_predicted_iou_is_taught_the_iou_of_the_answer(config: DyTrackConfig) -> None:
    model, batch = make_dytrack(config), make_batch(config)
    objective = OBJECTIVES["dytrack_decisioners"](model, make_recipe())
    objective.prepare()
    with torch.no_grad():
        answers = model(**{name: batch[name] for name in make_inputs(config)})
    truths = answers[0]["bbox_cxcywh"] * torch.tensor([1.0, 1.0, 1.3, 0.9])

    loss, log = objective(batch | {"search_bbox_cxcywh": truths})

    total = 0.0
    for index, answer in enumerate(answers):
        errors, ious = [], []
        for b in range(3):
            found, truth = (
                np.array([cx - w / 2, cy - h / 2, w, h])
                for cx, cy, w, h in (answer["bbox_cxcywh"][b].tolist(), truths[b].tolist())
            )
            ious.append(float(iou_xywh(found, truth)) * IS_PRESENT[b].item())
            predicted = answer["score"][b].item()
            errors.append(-ious[b] * math.log(predicted) - (1 - ious[b]) * math.log(1 - predicted))
        assert index > 0 or (min(ious[0], ious[2]) > 0.5 and ious[1] == 0)
        assert log[f"iou_error_{index}"].item() == pytest.approx(sum(errors) / 3, rel=1e-4)
        assert log[f"iou_{index}"].item() == pytest.approx(sum(ious) / 2, rel=1e-4)
        total += sum(errors) / 3
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_only_decisioners_learn_in_their_stage() -> None:
    model = make_dytrack(STILL).train()
    objective = OBJECTIVES["dytrack_decisioners"](model, make_recipe())

    objective.prepare()
    torch.autograd.backward(objective(make_batch(STILL))[0])

    for name, parameter in model.named_parameters():
        is_reached = parameter.grad is not None and bool(parameter.grad.any())
        assert is_reached == (".decisioner." in name), name


def test_the_decisioners_stage_keeps_the_bits_of_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, "small", DYTRACK_PATCH)
    start = make_dytrack(DYTRACK_PATCH)
    image = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)
    clip = Clip("box", (image, image), np.array([[60, 40, 30, 24], [64, 42, 30, 24]], np.float32))
    pack = TrainingPack(pictures={}, clips={"video": (clip,)}, cutouts=(), backgrounds=())
    recipe = dataclasses.replace(
        get_recipe("dytrack-tiny"),
        model="dytrack-small",
        stages=(Stage(objective="dytrack_decisioners", samples=16, batch_size=4),),
    )

    def sampler_of(seed: int, stage: Stage, device: torch.device) -> PairSampler:
        return PairSampler(
            pack,
            crops=start.crops,
            seed=seed,
            batch_size=stage.batch_size,
            mix={"video": 1.0},
            device=device,
        )

    def initial(model: SegmentedModel) -> None:
        model.load_state_dict(copy.deepcopy(start.state_dict()))

    trained = fit(recipe, sampler_of, tmp_path, initial=initial).state_dict()

    for name, value in start.state_dict().items():
        assert torch.equal(trained[name], value) != (".decisioner." in name), name


@pytest.mark.slow
def test_the_predicted_iou_ranks_answers_on_clips_that_were_not_seen(tmp_path: Path) -> None:
    """On rendered clips, from the weights of the bundle that ships."""
    start = Bundle.load()
    samples = {"dytrack_branches": 960, "dytrack_decisioners": 320}
    recipe = dataclasses.replace(
        get_recipe("dytrack-tiny"),
        stages=tuple(
            Stage(
                objective=name,
                samples=count,
                batch_size=16,
                learning_rate=2e-3,
                frozen_stem_share=1.0,
                ema_decay=0.98,
            )
            for name, count in samples.items()
        ),
    )

    def sampler_of(seed: int, stage: Stage, device: torch.device) -> PairSampler:
        return sampler_on(range(12), batch_size=stage.batch_size, seed=seed)

    model = fit(
        recipe, sampler_of, tmp_path, initial=lambda model: load_fitting_weights(model, start)
    )
    batch = sampler_on(range(50, 56), batch_size=128, seed=9).batch(0)
    with torch.no_grad():
        answers = model(batch["template"], batch["template_bbox_cxcywh"], batch["search_region"])

    rhos = []
    for answer in answers:
        iou, _ = giou(xyxy(answer["bbox_cxcywh"]), xyxy(batch["search_bbox_cxcywh"]))
        true_iou = (iou * batch["is_present"]).numpy()
        rhos.append(spearman_rho(answer["score"].numpy(), true_iou))
    assert min(rhos) > 0  # one block gathers little
    assert min(rhos[1:]) > 0.3


def sampler_on(clips: Iterable[int], *, batch_size: int, seed: int) -> PairSampler:
    """Pairs of rendered clips, by the seeds of the clips."""
    rendered = []
    for number in clips:
        frames = list(render_clip(num_frames=16, width=240, height=180, seed=number))
        boxes = np.stack([bbox for _, bbox in frames])
        rendered.append(Clip(f"clip_{number}", tuple(frame for frame, _ in frames), boxes))
    pack = TrainingPack(pictures={}, clips={"video": tuple(rendered)}, cutouts=(), backgrounds=())
    return PairSampler(
        pack, crops=Bundle.load().crops, seed=seed, batch_size=batch_size, mix={"video": 1.0}
    )


def xyxy(bbox_cxcywh: Tensor) -> Tensor:
    centre, half = bbox_cxcywh[:, :2], bbox_cxcywh[:, 2:] / 2
    return torch.cat([centre - half, centre + half], 1)


def test_a_pretrained_stem_joins_after_its_share_of_the_stage() -> None:
    model = make_dytrack(DYTRACK_PRIOR)
    objective = OBJECTIVES["dytrack_branches"](model, make_recipe())
    stage = Stage(objective="dytrack_branches", samples=8, frozen_stem_share=0.5)
    objective.prepare()

    learns = []
    for share in (0.0, 0.49, 0.5, 0.99):
        objective.before_step(share, stage)
        learns.append(all(p.requires_grad for p in model.backbone.stem.parameters()))

    assert learns == [False, False, True, True]


@pytest.mark.parametrize("name", ["dytrack_branches", "dytrack_decisioners"])
def test_another_family_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^objective: expected a dytrack, got early_exit_vit"):
        OBJECTIVES[name](make_model(PATCH), make_recipe())


def test_the_recipes_train_dytracks() -> None:
    for name in ("dytrack-tiny", "dytrack-base"):
        recipe = get_recipe(name)
        if name == "dytrack-tiny":
            assert isinstance(recipe.create_model(), DyTrack)
        objectives = [stage.objective for stage in recipe.stages]
        assert objectives == ["dytrack_branches", "dytrack_decisioners"]
