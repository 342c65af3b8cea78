"""The search for units: what it costs to keep one, and that gates join and learn."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from small_families import FAMILIES, make_cnn
from small_models import PATCH, make_inputs, make_model
from torch import Tensor
from torch.testing import assert_close
from training_packs import sampler_of, varied_pack

from edgetrack.models.early_exit_vit import CONFIGS
from edgetrack.models.pruning import gates_of, without_gates
from edgetrack.models.segmented import SegmentedModel
from edgetrack.models.units import find_units
from edgetrack.train.loop import fit
from edgetrack.train.objectives import OBJECTIVES
from edgetrack.train.objectives.slimming import AllExits, Slimming
from edgetrack.train.prune import learned_scores
from edgetrack.train.recipes import Recipe, Stage, get_recipe

PRICES = {"attention": 1.5e-4, "mlp": 7.5e-5, "channels": 7.5e-5, "gated": 7.5e-5}


def make_batch(model: SegmentedModel) -> dict[str, Tensor]:
    return make_inputs(model.config, batch=3) | {
        "search_bbox_cxcywh": torch.tensor([[0.5, 0.5, 0.4, 0.3]]).expand(3, 4),
        "is_present": torch.tensor([1.0, 1.0, 0.0]),
    }


def small_recipe(*stages: Stage) -> Recipe:
    return dataclasses.replace(
        get_recipe("early_exit_vit-smoke"), model="early_exit_vit-small", stages=stages,
        mix={"video": 1.0},
    )  # fmt: skip


@pytest.mark.parametrize("family", ["early_exit_vit, prior", "siamese_cnn", "ostrack"])
def test_a_unit_costs_its_gate_or_its_batch_norms_scales(family: str) -> None:
    model = FAMILIES[family]()
    plain = copy.deepcopy(model)
    slimming = Slimming(model, small_recipe(Stage(objective="slimming", samples=8)))
    slimming.prepare()
    model.eval()  # as ``plain`` is: batch statistics and drop path are out of the way

    loss, log = slimming(make_batch(model))

    task, _ = type(slimming.task)(plain, slimming.recipe)(make_batch(plain))
    price = 0.0
    for units in find_units(plain):
        if units.kind == "channels":
            norms = [plain.get_submodule(path).weight.detach() for path in units.scales]
            price += PRICES[units.kind] * sum(float(n.abs().sum()) for n in norms)
        else:
            price += PRICES[units.kind] * units.count  # every gate is 1
    assert float((loss - task).detach()) == pytest.approx(price, abs=1e-4)
    assert float(log["price"]) == pytest.approx(price, rel=1e-4)
    assert float(log["gate"]) == 1.0


def test_a_gates_gradient_is_the_tasks_and_the_price() -> None:
    model = make_model(PATCH)
    slimming = Slimming(model, small_recipe(Stage(objective="slimming", samples=8)))
    slimming.prepare()
    model.eval()
    gates, batch = gates_of(model), make_batch(model)

    whole = torch.autograd.grad(slimming(batch)[0], list(gates.steps))
    task = torch.autograd.grad(slimming.task(batch)[0], list(gates.steps))

    for units, total, of_task in zip(gates.units, whole, task, strict=True):
        assert of_task.any(), units.name
        price = torch.full_like(total, gates.speed * PRICES[units.kind])
        assert_close(total - of_task, price, atol=1e-6, rtol=1e-3)


def test_all_exits_learn_together() -> None:
    model = make_cnn()
    objective = AllExits(model, small_recipe(Stage(objective="slimming", samples=8)))

    loss, terms = objective(make_batch(model))
    torch.autograd.backward(loss)

    assert {"iou_0", "iou_1", "iou_2"} <= terms.keys()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_model_without_a_loss_for_all_exits_is_refused() -> None:
    recipe = small_recipe(Stage(objective="slimming", samples=8))

    with pytest.raises(ValueError, match=r"^slimming: .*got dytrack; prune it without data"):
        Slimming(FAMILIES["dytrack"](), recipe)


def test_a_search_is_a_stage_that_a_run_can_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, "small", dataclasses.replace(PATCH, drop_path=0.0))
    recipe = small_recipe(Stage(objective="slimming", samples=12, batch_size=4, warmup_steps=1))
    seen: list[int] = []

    def search(*, interrupt_at: int | None = None) -> SegmentedModel:
        def stop(progress: object) -> None:
            seen.append(progress.step)  # type: ignore[attr-defined]
            if progress.step == interrupt_at:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

        return fit(
            recipe,
            lambda seed, stage, device: sampler_of(
                varied_pack(), crops=crops, batch_size=4, seed=seed, mix={"video": 1.0}
            ),
            tmp_path,
            report_every=1,
            on_progress=stop,
        )

    crops = make_model(PATCH).crops
    with pytest.raises(KeyboardInterrupt):
        search(interrupt_at=2)
    model = search()

    assert seen == [1, 2, 3]
    assert OBJECTIVES["slimming"] is Slimming
    scores = learned_scores(model)
    assert any((scores[u.name] != 1).any() for u in gates_of(model).units)
    assert all(p.isfinite().all() for p in without_gates(model).parameters())
