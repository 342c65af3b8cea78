"""LoReTrack's training: a low-resolution student learns from a frozen high-resolution teacher.

Dong et al., arXiv 2405.17660; the losses are those of the released code (MIT), which has the KL
divergence where the paper's text reportedly has the mean squared error: ``LossWeights.qkv_form``
chooses. Student and teacher have the same trunk at different resolutions, and see the same crops:
the teacher's, resized bilinearly for the student.

- QKV-KD: queries, keys and values of the last block, search tokens alone.
- Disc-KD: the trunk's search features, those of the target region weighing more. That region is
  where the teacher's features have much energy.

The student's maps are resized to the teacher's grid; a divergence is one of the softmax over
channels, at each cell, and summed over the cells.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrack.models.early_exit_vit import EarlyExitViT
from edgetrack.models.heads import search_grid
from edgetrack.models.layers import Block
from edgetrack.models.ostrack import OSTrack
from edgetrack.models.segmented import SegmentedModel, State
from edgetrack.train.objectives.center import center_task_loss
from edgetrack.train.objectives.early_exit import run_trunk, task_loss
from edgetrack.train.objectives.objective import Objective

if TYPE_CHECKING:
    from edgetrack.train.recipes import Recipe, Stage

__all__ = ["LowResolution", "channel_divergence", "discriminative_loss", "qkv_loss"]

_TEMPERATURE = 4.0
_TARGET_SHARE, _REST_SHARE = 0.6, 0.4


def channel_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the teacher's softmax over channels from the student's, T = 4.

    Args:
        student: Features ``(B, C, H, W)``.
        teacher: Of the same shape.

    Returns:
        The sum over cells, the mean over samples, times T².
    """
    log_student = (student.float() / _TEMPERATURE).log_softmax(1)
    log_teacher = (teacher.float() / _TEMPERATURE).log_softmax(1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum()
    return divergence * (_TEMPERATURE**2 / student.shape[0])


def qkv_loss(student: Tensor, teacher: Tensor, *, form: str = "kl") -> Tensor:
    """QKV-KD.

    Args:
        student: Queries, keys and values of the search tokens, ``(B, 3 C, h, w)``.
        teacher: ``(B, 3 C, H, W)``.
        form: ``kl``, as the code has it, or ``mse``, as the paper's text reportedly has it.
    """
    resized = _resized(student, teacher)
    if form == "mse":
        return 3 * F.mse_loss(resized.float(), teacher.float())
    parts = zip(resized.chunk(3, 1), teacher.chunk(3, 1), strict=True)
    return torch.stack([channel_divergence(s, t) for s, t in parts]).sum()


def discriminative_loss(student: Tensor, teacher: Tensor, *, target_energy: float) -> Tensor:
    """Disc-KD.

    Args:
        student: Search features ``(B, C, h, w)``.
        teacher: ``(B, C, H, W)``.
        target_energy: Mean square over channels from which on a cell counts as the target's.
    """
    resized = _resized(student, teacher)
    target = (teacher.float().square().mean(1, keepdim=True) >= target_energy).to(teacher.dtype)
    # Cells of zeros have one and the same softmax, and so no divergence.
    of_target = channel_divergence(resized * target, teacher * target)
    of_rest = channel_divergence(resized * (1 - target), teacher * (1 - target))
    return _TARGET_SHARE * of_target + _REST_SHARE * of_rest


class LowResolution(Objective):
    """Task loss of the last exit, QKV-KD and Disc-KD.

    The student may have exits before the last: they are not run, and a later stage trains them.

    Raises:
        ValueError: There is no teacher, or it has another trunk than the student, or crops of other
            windows.
    """

    reads_teacher_crops = True
    model: OSTrack | EarlyExitViT
    teacher: OSTrack | EarlyExitViT

    def __init__(
        self, model: SegmentedModel, recipe: "Recipe", teacher: SegmentedModel | None = None
    ) -> None:
        if teacher is None:
            raise ValueError("objective: expected a teacher, got none; name one: --teacher BUNDLE")
        pair = _checked(model, role="student"), _checked(teacher, role="teacher")
        _check_pair(*pair)
        super().__init__(pair[0], recipe, pair[1])

    def prepare(self) -> None:
        """All learns but exits before the last."""
        super().prepare()
        if isinstance(self.model, EarlyExitViT):
            self.model.exits[:-1].requires_grad_(False)

    def before_step(self, share: float, stage: "Stage") -> None:
        """A pretrained stem joins late."""
        self.model.stem_requires_grad(share >= stage.frozen_stem_share)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch at the teacher's crop sizes."""
        weights = self.recipe.loss_weights
        small = self._small(batch)
        state, qkv, features = _run(self.model, small)
        loss, terms = self._task_loss(state, small)
        if weights.qkv or weights.disc:
            with torch.no_grad():
                _, teacher_qkv, teacher_features = _run(self.teacher, batch)
            by_qkv = qkv_loss(qkv, teacher_qkv, form=weights.qkv_form)
            by_features = discriminative_loss(
                features, teacher_features, target_energy=weights.target_energy
            )
            loss = loss + weights.qkv * by_qkv + weights.disc * by_features
            terms |= {"qkv": by_qkv.detach(), "disc": by_features.detach()}
        return loss, terms

    def _task_loss(
        self, state: State, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.model
        if isinstance(model, OSTrack):
            return center_task_loss(model, state, batch, self.recipe)
        last = model.num_exits - 1
        return task_loss(model, last, model.exit_logits(last, state), batch, self.recipe)

    def _small(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with crops of the student's sizes; boxes are shares, and stay."""
        crops = self.model.crops
        sizes = {"template": crops.template_size_px, "search_region": crops.search_size_px}
        return {
            name: _resized_crop(value, side_px=sizes[name]) if name in sizes else value
            for name, value in batch.items()
        }


def _checked(model: SegmentedModel, *, role: str) -> OSTrack | EarlyExitViT:
    if not isinstance(model, (OSTrack, EarlyExitViT)):
        raise ValueError(
            f"{role}: expected an ostrack, a loretrack or an early_exit_vit, got {model.family}"
        )
    if isinstance(model, OSTrack) and model.config.eliminate_at:
        raise ValueError(
            f"{role}: expected all search tokens to reach the last block, got candidate "
            "elimination; take a variant without it"
        )
    return model


def _check_pair(model: OSTrack | EarlyExitViT, teacher: OSTrack | EarlyExitViT) -> None:
    ours, theirs = (tuple(_last_qkv(m).weight.shape) for m in (model, teacher))
    if ours != theirs:
        raise ValueError(
            "teacher: expected the student's trunk, whose last block makes queries, keys and "
            f"values by a matrix of {ours}, got {theirs}"
        )
    windows = [(m.crops.template_factor, m.crops.search_factor) for m in (model, teacher)]
    if windows[0] != windows[1]:
        raise ValueError(
            f"teacher: expected template and search factors of {windows[0]}, as the student has "
            f"them, got {windows[1]}; both see the same windows"
        )


def _last_qkv(model: OSTrack | EarlyExitViT) -> nn.Linear:
    block = model.backbone.blocks[-1]
    assert isinstance(block, Block)
    return block.attn.qkv


def _run(
    model: OSTrack | EarlyExitViT, batch: Mapping[str, Tensor]
) -> tuple[State, Tensor, Tensor]:
    """What the trunk wrote, q, k and v of the last block, and the last norm's features, as maps."""
    with _kept_output(_last_qkv(model)) as kept:
        state = run_trunk(model, batch)
    tokens = model.backbone.norm(state[f"tokens_{model.num_exits - 1}"])
    grid = model.backbone.search_grid
    return state, search_grid(kept[0], grid=grid), search_grid(tokens, grid=grid)


@contextlib.contextmanager
def _kept_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Keep what a module returns in the block."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def _resized(student: Tensor, teacher: Tensor) -> Tensor:
    return F.interpolate(student, size=teacher.shape[2:], mode="bilinear", align_corners=False)


def _resized_crop(crop: Tensor, *, side_px: int) -> Tensor:
    """A crop ``(B, S, S, 3)`` as float ``(B, side_px, side_px, 3)``, in the same units."""
    if crop.shape[1] == side_px:
        return crop
    image = crop.permute(0, 3, 1, 2).float()
    image = F.interpolate(image, size=(side_px, side_px), mode="bilinear", align_corners=False)
    return image.permute(0, 2, 3, 1)
