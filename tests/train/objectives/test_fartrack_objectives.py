import dataclasses

import pytest
import torch
from small_fartrack import FARTRACK_PATCH, FARTRACK_PRIOR, make_fartrack
from small_models import PATCH, make_inputs, make_model
from torch import Tensor, nn
from torch.testing import assert_close

from edgetrack.models.coordinates import expected_corners
from edgetrack.models.fartrack import FARTrack, FARTrackConfig
from edgetrack.train.coordinate_losses import (
    coordinate_cross_entropy,
    depth_divergence,
    siou_loss,
)
from edgetrack.train.objectives import OBJECTIVES
from edgetrack.train.objectives.fartrack import (
    FARTrackDepths,
    FARTrackFrames,
    FARTrackRollout,
)
from edgetrack.train.recipes import Recipe, Stage
from edgetrack.train.rollouts import cut_windows

NO_GATE = dataclasses.replace(FARTRACK_PATCH, min_update_score=0.0)


def recipe_of(name: str) -> Recipe:
    stage = Stage(objective=name, samples=8, batch_size=4)
    return Recipe(name="test", model="fartrack-micro", stages=(stage,))


def batch_of(config: FARTrackConfig, *, batch: int = 4) -> dict[str, Tensor]:
    inputs = make_inputs(config, batch=batch)
    count = config.num_templates
    templates = torch.stack([inputs["template"] // (k + 1) for k in range(count)], 1)
    return {
        **inputs,
        "templates": templates,
        "templates_bbox_cxcywh": inputs["template_bbox_cxcywh"][:, None].expand(-1, count, -1),
        "search_bbox_cxcywh": torch.tensor([[0.5, 0.4, 0.25, 0.3]]).expand(batch, 4).clone(),
        "is_present": torch.tensor([1.0, 0.0] * (batch // 2)),
    }


def runs_of(*, batch: int = 2, num_frames: int = 6) -> dict[str, Tensor]:
    """A bright square that moves over a dark, grainy ground."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 60, (batch, num_frames, 96, 96, 3), generator=generator)
    boxes = torch.zeros(batch, num_frames, 4)
    for row in range(batch):
        for index in range(num_frames):
            x, y = 30 + 3 * index, 40 - row * index
            frames[row, index, y : y + 20, x : x + 16] += 150
            boxes[row, index] = torch.tensor([x + 8, y + 10, 16, 20]) / 96
    return {"frames": frames.to(torch.uint8), "bboxes_cxcywh": boxes}


def corners_of(bbox: Tensor) -> Tensor:
    half = bbox[..., 2:] / 2
    return torch.cat([bbox[..., :2] - half, bbox[..., :2] + half], -1)


def assert_same_pixels(one: Tensor, other: Tensor) -> None:
    """A last bit of a box may turn a pixel by a grey level."""
    assert (one.int() - other.int()).abs().max() <= 1


def slow_task_loss(logits: Tensor, batch: dict[str, Tensor], num_bins: int) -> Tensor:
    corners = corners_of(batch["search_bbox_cxcywh"])
    rows = []
    for row in range(len(logits)):
        if not batch["is_present"][row]:
            rows.append(torch.zeros(()))
            continue
        one, true = logits[row : row + 1], corners[row : row + 1]
        ce = coordinate_cross_entropy(one, true, num_bins=num_bins)
        siou, _ = siou_loss(expected_corners(one, num_bins), true)
        rows.append(2 * ce[0] + 2 * siou[0])
    return torch.stack(rows).mean()


def dense_logits(model: FARTrack, batch: dict[str, Tensor], depths: list[int]) -> list[Tensor]:
    state = model.embed_templates(
        batch["templates"], batch["templates_bbox_cxcywh"], is_sparse=False
    )
    return model.logits_at(depths, {**state, "search_region": batch["search_region"]})


def test_frames_teach_the_final_depth_where_the_target_is_present() -> None:
    model = make_fartrack(FARTRACK_PATCH)
    batch = batch_of(FARTRACK_PATCH)

    loss, log = FARTrackFrames(model, recipe_of("fartrack_frames"))(batch)

    (logits,) = dense_logits(model, batch, [4])
    assert_close(loss, slow_task_loss(logits, batch, 40))
    assert log.keys() == {"ce_4", "siou_4", "iou_4"}


def test_every_depth_from_a_third_on_learns_from_the_next() -> None:
    model = make_fartrack(dataclasses.replace(FARTRACK_PATCH, exit_after=(2, 3, 7)))
    batch = batch_of(FARTRACK_PATCH)

    loss, log = FARTrackDepths(model, recipe_of("fartrack_depths"))(batch)

    depths = [2, 3, 4, 5, 6, 7]
    logits = dense_logits(model, batch, depths)
    task = torch.stack([slow_task_loss(at, batch, 40) for at in logits]).mean()
    steps = [depth_divergence(logits[k], logits[k + 1], num_bins=40) for k in range(5)]
    divergence = (torch.stack(steps).mean(0) * batch["is_present"]).mean()
    assert_close(loss, task + 0.01 * divergence)
    assert {name for name in log if name.startswith("iou")} == {"iou_2", "iou_3", "iou_7"}


def test_fifteen_layers_have_the_papers_eleven_depths() -> None:
    model = make_fartrack(
        dataclasses.replace(FARTRACK_PATCH, exit_after=(6, 10, 15), num_templates=1)
    )
    batch = batch_of(FARTRACK_PATCH)
    batch |= {name: batch[name][:, :1] for name in ("templates", "templates_bbox_cxcywh")}
    objective = FARTrackDepths(model, recipe_of("fartrack_depths"))
    loss, _ = objective(batch)

    logits = dense_logits(model, batch, list(range(5, 16)))
    task = torch.stack([slow_task_loss(at, batch, 40) for at in logits]).mean()
    steps = [depth_divergence(logits[k], logits[k + 1], num_bins=40) for k in range(10)]
    divergence = (torch.stack(steps).mean(0) * batch["is_present"]).mean()
    assert_close(loss, task + 0.01 * divergence)


@pytest.mark.parametrize("config", [NO_GATE, FARTRACK_PRIOR], ids=["patch", "prior"])
def test_roll_outs_see_what_the_tracker_sees(config: FARTrackConfig) -> None:
    """A slow twin: one run at a time, template by template, with the exported functions."""
    model = make_fartrack(config)
    batch = runs_of()
    objective = FARTrackRollout(model, recipe_of("fartrack_rollout"))

    with torch.no_grad():
        seen = objective._roll_out(batch["frames"], batch["bboxes_cxcywh"])
        logits = objective._answers(seen)

    num_steps = batch["frames"].shape[1] - 1
    for row in range(2):
        bbox = batch["bboxes_cxcywh"][row, :1]

        def crop(index: int, bbox: Tensor, factor: float, size_px: int, row: int = row) -> Tensor:
            side = (bbox[:, 2] * bbox[:, 3]).sqrt() * factor
            window = torch.stack([bbox[:, 0], bbox[:, 1], side], 1)
            return cut_windows(batch["frames"][row : row + 1, index], window, size_px=size_px)

        def in_template(bbox: Tensor) -> Tensor:
            side = (bbox[:, 2] * bbox[:, 3]).sqrt() * 2
            return torch.cat([torch.full((1, 2), 0.5), bbox[:, 2:] / side], 1)

        with torch.no_grad():
            template = crop(0, bbox, 2.0, config.template_size_px)
            state = model.embed_template(template, in_template(bbox))
            for step in range(num_steps):
                side = (bbox[:, 2] * bbox[:, 3]).sqrt() * 4
                region = crop(step + 1, bbox, 4.0, config.search_size_px)
                assert_same_pixels(seen["search_region"][row, step], region[0])
                state["search_region"] = seen["search_region"][row : row + 1, step]
                for index in range(model.num_exits):
                    state |= model.run_segment(index, state)
                last = logits[-1][row * num_steps + step]
                (exact,) = model.logits_at(config.exit_after[-1:], state)
                assert_close(last, exact[0], atol=1e-4, rtol=0)
                answer = state["bbox_cxcywh"]
                centre = bbox[:, :2] + (answer[:, :2] - 0.5) * side[:, None]
                size = (answer[:, 2:] * side[:, None]).clamp(0.01, 1)
                bbox = torch.cat([centre.clamp(0, 1), size], 1)
                template = crop(step + 1, bbox, 2.0, config.template_size_px)
                assert_same_pixels(seen["template"][row, step + 1], template[0])
                template = seen["template"][row : row + 1, step + 1]
                inputs = {"template": template, "template_bbox_cxcywh": in_template(bbox)}
                written = model.run_update({**state, **inputs})
                state |= {name: written[source] for name, source in model.carried.items()}


def test_a_roll_out_asks_for_the_siou_of_frames_that_show_the_target() -> None:
    model = make_fartrack(FARTRACK_PRIOR)
    batch = runs_of()
    objective = FARTrackRollout(model, recipe_of("fartrack_rollout"))

    loss, log = objective(batch)

    with torch.no_grad():
        seen = objective._roll_out(batch["frames"], batch["bboxes_cxcywh"])
        total = torch.zeros(())
        for logits in objective._answers(seen):
            siou, _ = siou_loss(expected_corners(logits, 40), corners_of(seen["truth"]))
            total += 2 * (siou * seen["is_visible"]).mean() / 2
    assert_close(loss, total)
    assert 0 < float(seen["is_visible"].mean()) <= 1
    assert log.keys() == {"iou_1", "iou_3", "visible"}


def test_a_gated_frame_leaves_the_slots_as_they_were() -> None:
    closed = make_fartrack(dataclasses.replace(FARTRACK_PATCH, min_update_score=1.0))
    objective = FARTrackRollout(closed, recipe_of("fartrack_rollout"))

    with torch.no_grad():
        seen = objective._roll_out(*runs_of().values())

    assert not seen["slots"].any()


def test_a_roll_out_teaches_all_but_batch_norms_and_leaves_the_modes() -> None:
    model = make_fartrack(FARTRACK_PRIOR)
    objective = FARTrackRollout(model, recipe_of("fartrack_rollout"))
    objective.prepare()
    before = {name: value.clone() for name, value in model.named_buffers()}

    loss, _ = objective(runs_of())
    torch.autograd.backward(loss)

    norms = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    special = {"vocabulary.output_bias"}
    for name, parameter in model.named_parameters():
        if name not in special:
            assert (parameter.grad is not None and bool(parameter.grad.any())) != (name in norms), (
                name
            )
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert model.training
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("name", ["fartrack_frames", "fartrack_depths", "fartrack_rollout"])
def test_other_families_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^objective: expected a fartrack model, got early_exit"):
        OBJECTIVES[name](make_model(PATCH), recipe_of(name))


def test_a_roll_out_of_pairs_is_refused() -> None:
    objective = FARTrackRollout(make_fartrack(FARTRACK_PRIOR), recipe_of("fartrack_rollout"))

    with pytest.raises(ValueError, match=r"^fartrack_rollout: expected a batch of runs, got pairs"):
        objective(batch_of(FARTRACK_PRIOR))


def test_a_stem_joins_late() -> None:
    model = make_fartrack(FARTRACK_PRIOR)
    objective = FARTrackFrames(model, recipe_of("fartrack_frames"))
    objective.prepare()
    stage = Stage(objective="fartrack_frames", samples=8, frozen_stem_share=0.5)

    learns = []
    for share in (0.0, 0.4, 0.6):
        objective.before_step(share, stage)
        learns.append(next(model.backbone.stem.parameters()).requires_grad)

    assert learns == [False, False, True]
