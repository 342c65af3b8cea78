"""LoReTrack's losses beside slow, obvious twins, gradients included."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from small_models import PATCH, PRIOR, make_inputs
from tolerances import FROM_TWIN
from torch import Tensor
from torch.testing import assert_close

from edgetrack.models.early_exit_vit import EarlyExitViT, EarlyExitViTConfig
from edgetrack.models.ostrack import OSTrack, OSTrackConfig
from edgetrack.models.segmented import SegmentedModel
from edgetrack.train.losses import LossWeights
from edgetrack.train.objectives.low_resolution import (
    LowResolution,
    channel_divergence,
    discriminative_loss,
    qkv_loss,
)
from edgetrack.train.recipes import Recipe, Stage

STUDENT = OSTrackConfig(
    template_size_px=32,
    search_size_px=64,
    dim=32,
    num_heads=2,
    mlp_ratio=2.0,
    exit_after=(2,),
    head_channels=(16, 8),
    drop_path=0.0,
)
TEACHER = dataclasses.replace(STUDENT, template_size_px=64, search_size_px=128)
Loss = Callable[[Tensor, Tensor], Tensor]


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(v) for v in values]
    return [p / sum(powers) for p in powers]


def divergence_slowly(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> float:
    """T² / B · Σ of p ln(p / q) over samples, cells and channels."""
    total, (num_samples, _, height, width) = 0.0, student.shape
    for b in range(num_samples):
        for y in range(height):
            for x in range(width):
                p = softmax((teacher[b, :, y, x] / temperature).tolist())
                q = softmax((student[b, :, y, x] / temperature).tolist())
                total += sum(pk * math.log(pk / qk) for pk, qk in zip(p, q, strict=True))
    return temperature**2 / num_samples * total


def resized_slowly(maps: Tensor, side: int) -> Tensor:
    """Bilinear, sample by sample: cell centres at (i + 1/2) / n, the border repeated."""
    num_samples, channels, height, width = maps.shape
    out = torch.zeros(num_samples, channels, side, side, dtype=maps.dtype)
    for y in range(side):
        for x in range(side):
            at_y = min(max((y + 0.5) * height / side - 0.5, 0.0), height - 1.0)
            at_x = min(max((x + 0.5) * width / side - 0.5, 0.0), width - 1.0)
            top, left = int(at_y), int(at_x)
            for row, share_y in ((top, 1 - at_y + top), (min(top + 1, height - 1), at_y - top)):
                for column, share_x in (
                    (left, 1 - at_x + left),
                    (min(left + 1, width - 1), at_x - left),
                ):
                    out[:, :, y, x] += share_y * share_x * maps[:, :, row, column]
    return out


def qkv_slowly(student: Tensor, teacher: Tensor) -> float:
    resized = resized_slowly(student, teacher.shape[3])
    width = teacher.shape[1] // 3
    parts = [slice(k * width, (k + 1) * width) for k in range(3)]
    return sum(divergence_slowly(resized[:, part], teacher[:, part]) for part in parts)


def qkv_mse_slowly(student: Tensor, teacher: Tensor) -> float:
    resized = resized_slowly(student, teacher.shape[3])
    width = teacher.shape[1] // 3
    parts = [slice(k * width, (k + 1) * width) for k in range(3)]
    return sum(float((resized[:, p] - teacher[:, p]).square().mean()) for p in parts)


def disc_slowly(student: Tensor, teacher: Tensor, *, energy: float = 0.2) -> float:
    resized = resized_slowly(student, teacher.shape[3])
    inside, outside = (torch.zeros_like(teacher[:, :1]) for _ in range(2))
    for b in range(teacher.shape[0]):
        for y in range(teacher.shape[2]):
            for x in range(teacher.shape[3]):
                cell = teacher[b, :, y, x].tolist()
                is_target = sum(v * v for v in cell) / len(cell) >= energy
                (inside if is_target else outside)[b, 0, y, x] = 1
    return 0.6 * divergence_slowly(resized * inside, teacher * inside) + 0.4 * divergence_slowly(
        resized * outside, teacher * outside
    )


def some_maps(channels: int, *, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's, in float64; the teacher's energies lie around 0.2."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = (
        torch.randn(2, channels, side, side, generator=generator, dtype=torch.float64)
        for side in sides
    )
    strength = torch.rand(2, 1, sides[1], sides[1], generator=generator, dtype=torch.float64)
    return student, teacher * strength


CASES: dict[str, tuple[Loss, Callable[[Tensor, Tensor], float], int]] = {
    "divergence": (channel_divergence, divergence_slowly, 5),
    "qkv": (qkv_loss, qkv_slowly, 6),
    "qkv, mse": (lambda s, t: qkv_loss(s, t, form="mse"), qkv_mse_slowly, 6),
    "disc": (lambda s, t: discriminative_loss(s, t, target_energy=0.2), disc_slowly, 5),
}


@pytest.mark.parametrize(("loss", "slowly", "channels"), CASES.values(), ids=CASES.keys())
def test_a_loss_and_its_gradient_are_the_slow_ones(
    loss: Loss, slowly: Callable[[Tensor, Tensor], float], channels: int
) -> None:
    sides = (4, 4) if slowly is divergence_slowly else (2, 4)
    student, teacher = some_maps(channels, sides=sides)
    student.requires_grad_(True)

    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)

    # The losses compute in float32, whatever they are given.
    assert value.item() == pytest.approx(slowly(student.detach(), teacher), rel=1e-5)
    step = 1e-4
    for index in [(0, 0, 0, 0), (0, 1, 1, 0), (1, channels - 1, 1, 1), (1, 2, 0, 1)]:
        ends = []
        for sign in (1, -1):
            moved = student.detach().clone()
            moved[index] += sign * step
            ends.append(slowly(moved, teacher))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert gradient[index].item() == pytest.approx(slope, rel=1e-3, abs=FROM_TWIN["float32"])


@pytest.mark.parametrize("loss", [case[0] for case in CASES.values()], ids=CASES.keys())
def test_a_student_like_its_teacher_loses_nothing(loss: Loss) -> None:
    _, teacher = some_maps(6, sides=(2, 4))

    assert loss(teacher.clone(), teacher).item() == pytest.approx(0, abs=FROM_TWIN["float32"])


def test_the_target_weighs_more_than_the_rest() -> None:
    student, teacher = some_maps(5, sides=(4, 4))

    whole = channel_divergence(student, teacher)
    all_target = discriminative_loss(student, teacher, target_energy=0.0)
    no_target = discriminative_loss(student, teacher, target_energy=1e9)

    assert_close(all_target, 0.6 * whole)
    assert_close(no_target, 0.4 * whole)


def recipe(**weights: object) -> Recipe:
    stage = Stage(objective="low_resolution", samples=8)
    return Recipe(
        name="low", model="loretrack-base", stages=(stage,), loss_weights=LossWeights(**weights)
    )


def early_exit_pair(config: EarlyExitViTConfig) -> tuple[SegmentedModel, SegmentedModel]:
    """A student with several exits, and a teacher of twice its resolution."""
    torch.manual_seed(0)
    config = dataclasses.replace(config, drop_path=0.0)
    twice = {"template_size_px": 64, "search_size_px": 128}
    return EarlyExitViT(config), EarlyExitViT(dataclasses.replace(config, **twice)).eval()


def ostrack_pair() -> tuple[SegmentedModel, SegmentedModel]:
    torch.manual_seed(0)
    return OSTrack(STUDENT), OSTrack(TEACHER).eval()


PAIRS: dict[str, Callable[[], tuple[SegmentedModel, SegmentedModel]]] = {
    "ostrack": ostrack_pair,
    "early exits, patch": lambda: early_exit_pair(PATCH),
    "early exits, prior": lambda: early_exit_pair(PRIOR),
}


def batch_for(teacher: SegmentedModel) -> dict[str, Tensor]:
    boxes = torch.tensor([[0.5, 0.45, 0.3, 0.2]]).expand(4, 4)
    inputs = make_inputs(teacher.config, batch=4)
    return {**inputs, "search_bbox_cxcywh": boxes, "is_present": torch.ones(4)}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_the_student_learns_and_the_teacher_does_not(
    pair: Callable[[], tuple[SegmentedModel, SegmentedModel]],
) -> None:
    student, teacher = pair()
    objective = LowResolution(student, recipe(), teacher)
    objective.prepare()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}

    loss, terms = objective(batch_for(teacher))
    torch.autograd.backward(loss)

    assert {"qkv", "disc"} <= terms.keys()
    shallow = tuple(f"exits.{index}." for index in range(student.num_exits - 1))
    for name, parameter in student.named_parameters():
        is_reached = parameter.grad is not None and bool(parameter.grad.any())
        assert is_reached != name.startswith(shallow or "no such prefix"), name
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_terms_are_weighed_as_the_paper_has_them() -> None:
    student, teacher = ostrack_pair()
    batch = batch_for(teacher)
    student.eval()

    def loss_with(**weights: float) -> tuple[float, dict[str, Tensor]]:
        loss, terms = LowResolution(student, recipe(**weights), teacher)(batch)
        return loss.item(), terms

    alone, terms = loss_with(qkv=0.0, disc=0.0)
    both, found = loss_with()

    assert "qkv" not in terms
    expected = alone + 0.01 * found["qkv"].item() + 0.01 * found["disc"].item()
    assert both == pytest.approx(expected, rel=1e-5)
    assert loss_with(disc=0.0)[0] == pytest.approx(alone + 0.01 * found["qkv"].item(), rel=1e-5)


def test_a_student_sees_the_teachers_crops_resized() -> None:
    student, teacher = ostrack_pair()
    objective, batch = LowResolution(student, recipe(), teacher), batch_for(teacher)
    seen: list[Tensor] = []
    student.backbone.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    objective(batch)

    for pixels, name, side in zip(seen, ("template", "search_region"), (32, 64), strict=True):
        quarters = batch[name].float().unflatten(1, (side, 2)).unflatten(3, (side, 2)).mean((2, 4))
        expected = (quarters - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor(
            [58.395, 57.12, 57.375]
        )
        assert_close(pixels.permute(0, 2, 3, 1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (STUDENT, None, "^objective: expected a teacher, got none; name one: --teacher"),
        (STUDENT, dataclasses.replace(TEACHER, dim=64), "^teacher: expected the student's trunk"),
        (STUDENT, dataclasses.replace(TEACHER, search_factor=5.0), r"^teacher: .*got \(2.0, 5.0\)"),
        (STUDENT, dataclasses.replace(TEACHER, eliminate_at=(0,)), "^teacher: expected all search"),
        (dataclasses.replace(STUDENT, eliminate_at=(0,)), TEACHER, "^student: expected all search"),
    ],
)
def test_a_pair_that_cannot_learn_is_refused(
    student: OSTrackConfig, teacher: OSTrackConfig | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LowResolution(OSTrack(student), recipe(), None if teacher is None else OSTrack(teacher))


def test_no_model_keeps_a_hook() -> None:
    student, teacher = ostrack_pair()

    LowResolution(student, recipe(), teacher)(batch_for(teacher))

    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())
