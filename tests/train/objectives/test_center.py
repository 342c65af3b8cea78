import pytest
import torch
from small_models import PATCH, make_inputs, make_model

from edgetrack.models.ostrack import OSTrack, OSTrackConfig
from edgetrack.train.losses import center_loss
from edgetrack.train.objectives.center import CenterExit
from edgetrack.train.recipes import Recipe, Stage

CONFIG = OSTrackConfig(
    template_size_px=32,
    search_size_px=64,
    dim=32,
    num_heads=2,
    mlp_ratio=2.0,
    exit_after=(2,),
    eliminate_at=(0,),
    head_channels=(16, 8),
    drop_path=0.0,
)
RECIPE = Recipe(
    name="center",
    model="ostrack-256-ce",
    stages=(Stage(objective="center_exit", samples=8),),
)


def test_the_loss_is_that_of_the_exits_maps_and_all_of_the_model_learns() -> None:
    torch.manual_seed(0)
    model = OSTrack(CONFIG)
    objective = CenterExit(model, RECIPE)
    boxes = torch.tensor([[0.5, 0.45, 0.3, 0.2]]).expand(4, 4)
    truth = {"search_bbox_cxcywh": boxes, "is_present": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    inputs = make_inputs(CONFIG, batch=4)

    objective.prepare()
    loss, terms = objective({**inputs, **truth})
    torch.autograd.backward(loss)

    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert terms.keys() == {"score_0", "giou_0", "l1_0", "iou_0"}
    state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])
    maps = model.center_maps(model.run_trunk(0, {**state, **inputs}))
    expected, _ = center_loss(
        maps,
        bbox_cxcywh=boxes,
        is_present=truth["is_present"],
        weights=RECIPE.loss_weights,
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_without_a_center_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^objective: expected an ostrack, got early_exit_vit"):
        CenterExit(make_model(PATCH), RECIPE)
