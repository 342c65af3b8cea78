"""A new final head on a frozen trunk, such as an imported one."""

import pytest
import torch
from small_models import PATCH, PRIOR, make_inputs, make_model

from edgetrack.models.early_exit_vit import EarlyExitViTConfig
from edgetrack.train.objectives import OBJECTIVES
from edgetrack.train.recipes import Recipe, Stage

STAGE = Stage(objective="final_head", samples=8)


@pytest.mark.parametrize("config", [PATCH, PRIOR], ids=["patch", "prior"])
def test_a_final_head_learns_while_the_trunk_keeps_its_bits(config: EarlyExitViTConfig) -> None:
    model = make_model(config)
    recipe = Recipe(name="imported", model="early_exit_vit-base", stages=(STAGE,))
    objective = OBJECTIVES["final_head"](model, recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    last = f"exits.{model.num_exits - 1}."

    objective.prepare()
    objective.before_step(0.9, STAGE)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss, _ = objective(
        {
            **make_inputs(config, batch=4),
            "search_bbox_cxcywh": torch.tensor([[0.5, 0.45, 0.3, 0.2]]).expand(4, 4),
            "is_present": torch.ones(4),
        }
    )
    torch.autograd.backward(loss)
    optimizer.step()

    learnt = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learnt == {n for n, _ in model.named_parameters() if n.startswith(last)}
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert {n for n in changed if not n.startswith(last)} == set()
    assert learnt <= changed
