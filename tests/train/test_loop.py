import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import PATCH, PRIOR, make_inputs
from torch import Tensor, nn

from edgetrack.data.folder import Clip, TrainingPack
from edgetrack.errors import CheckpointError, TrainingError
from edgetrack.models.early_exit_vit import CONFIGS, EarlyExitViT
from edgetrack.models.registry import create_model
from edgetrack.train.checkpoints import read_checkpoint
from edgetrack.train.loop import Progress, fit, load_trained
from edgetrack.train.losses import tracking_loss
from edgetrack.train.objectives.early_exit import freeze_all_but_shallow_exits
from edgetrack.train.recipes import Recipe, Stage, get_recipe
from edgetrack.train.sampling import PairSampler

NUM_STEPS = (6, 4)
OBJECTIVE_NAMES = ("final_exit", "shallow_exits")
BATCH = 4
SHALLOW = "exits.0."


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let recipes name the small model; its drop path makes a run draw random numbers."""
    monkeypatch.setitem(CONFIGS, "small", PATCH)


@pytest.fixture(scope="module")
def pack() -> TrainingPack:
    """One clip of a bright box that moves over noise."""
    rng = np.random.default_rng(0)
    boxes = np.array([(60 + 3 * i, 40 + i, 30, 24) for i in range(8)], np.float32)
    images = []
    for x, y, w, h in boxes.astype(int):
        image = rng.integers(0, 90, (120, 160, 3), np.uint8)
        image[y : y + h, x : x + w] = (40, 200, 240)
        images.append(image)
    clip = Clip("box", tuple(images), boxes)
    return TrainingPack(pictures={}, clips={"video": (clip,)}, cutouts=(), backgrounds=())


def small_recipe(**changes: Any) -> Recipe:
    stages = tuple(
        Stage(objective=name, samples=BATCH * steps, batch_size=BATCH, warmup_steps=2)
        for name, steps in zip(OBJECTIVE_NAMES, NUM_STEPS, strict=True)
    )
    small = {"model": "early_exit_vit-small", "stages": stages, **changes}
    return dataclasses.replace(get_recipe("early_exit_vit-smoke"), **small)


class Run:
    """A training run in a folder, with a report after every step."""

    def __init__(self, pack: TrainingPack, folder: Path) -> None:
        self.pack, self.folder = pack, folder
        self.reports: list[Progress] = []

    def fit(self, recipe: Recipe | None = None, **options: Any) -> EarlyExitViT:
        defaults = {"report_every": 1, "on_progress": self.reports.append}
        model = fit(recipe or small_recipe(), self._sampler, self.folder, **(defaults | options))
        assert isinstance(model, EarlyExitViT)
        return model

    def fit_until(self, stage: int, step: int, **options: Any) -> None:
        """Train up to Ctrl-C after a step."""

        def interrupt(progress: Progress) -> None:
            self.reports.append(progress)
            if (progress.stage, progress.step) == (stage, step):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.fit(on_progress=interrupt, **options)

    def log(self) -> list[dict[str, float]]:
        lines = (self.folder / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def logged_steps(self) -> list[tuple[float, float]]:
        return [(entry["stage"], entry["step"]) for entry in self.log()]

    def _sampler(self, seed: int, stage: Stage, device: torch.device) -> PairSampler:
        crops = create_model("early_exit_vit-small").crops  # draws random numbers, as a caller may
        return PairSampler(
            self.pack,
            crops=crops,
            seed=seed,
            batch_size=stage.batch_size,
            mix={"video": 1.0},
            device=device,
        )


ALL_STEPS = [(stage, step) for stage in (1, 2) for step in range(1, NUM_STEPS[stage - 1] + 1)]


@pytest.fixture
def run(pack: TrainingPack, tmp_path: Path) -> Run:
    return Run(pack, tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(pack: TrainingPack, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(pack, tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "small", PATCH)
        run.fit()
    return run


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def changed_names(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_run_trains_both_stages_and_gives_a_model_to_use(run: Run) -> None:
    model = run.fit()

    assert not any(module.training for module in model.modules())
    assert [(p.stage, p.step) for p in run.reports] == ALL_STEPS
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert_same_bits(weights_of(load_trained(run.folder)), weights_of(model))


def test_stage_1_trains_all_but_the_shallow_exits(run: Run) -> None:
    fresh: list[dict[str, Tensor]] = []

    run.fit_until(1, NUM_STEPS[0], initial=lambda model: fresh.append(weights_of(model)))

    changed = changed_names(fresh[0], weights_of(load_trained(run.folder)))
    learning = {name for name in fresh[0] if "num_batches" not in name}
    assert changed == {name for name in learning if not name.startswith(SHALLOW)}


def test_stage_2_leaves_the_trunk_and_the_final_head_bit_for_bit(run: Run) -> None:
    run.fit_until(1, NUM_STEPS[0])
    after_stage_1 = load_trained(run.folder)
    inputs = make_inputs(PATCH, batch=4)

    after_stage_2 = run.fit()

    changed = changed_names(weights_of(after_stage_1), weights_of(after_stage_2))
    learning = {name for name in after_stage_2.state_dict() if "num_batches" not in name}
    assert changed == {name for name in learning if name.startswith(SHALLOW)}
    with torch.no_grad():
        before, after = after_stage_1(**inputs), after_stage_2(**inputs)
    for name, value in before[-1].items():
        assert torch.equal(after[-1][name], value)
    assert not torch.equal(after[0]["uncertainty"], before[0]["uncertainty"])


def test_stage_2_trains_the_shallow_exits_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = EarlyExitViT(PATCH)
    inputs = make_inputs(PATCH, batch=4)

    trained = freeze_all_but_shallow_exits(model)
    state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])
    state["search_region"] = inputs["search_region"]
    state |= model.run_trunk(0, state)
    loss, _ = tracking_loss(
        *model.exit_logits(0, state),
        bbox_cxcywh=torch.tensor([[0.5, 0.45, 0.3, 0.2]]).expand(4, 4),
        is_present=torch.ones(4),
        bin_size=PATCH.bin_size,
        weights=small_recipe().loss_weights,
    )
    torch.autograd.backward(loss)

    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {n for n, _ in model.named_parameters() if n.startswith(SHALLOW)}
    assert {id(p) for p in trained} == {id(p) for p in model.exits[0].parameters()}
    assert {n for n, m in model.named_modules() if m.training} == {
        n for n, _ in model.named_modules() if f"{n}.".startswith(SHALLOW)
    }


@pytest.mark.parametrize(
    "at", [(1, 1), (1, 4), (1, NUM_STEPS[0]), (2, 1), (2, NUM_STEPS[1])], ids=str
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    run: Run, undisturbed: Run, at: tuple[int, int]
) -> None:
    run.fit_until(*at)

    model = run.fit()

    assert_same_bits(weights_of(model), weights_of(load_trained(undisturbed.folder)))
    assert run.logged_steps() == ALL_STEPS


def test_ctrl_c_within_a_step_ends_the_step_first(run: Run, undisturbed: Run) -> None:
    passes: list[None] = []

    def press_ctrl_c(*_: object) -> None:
        passes.append(None)
        if len(passes) == 3:
            signal.raise_signal(signal.SIGINT)

    def hook(model: EarlyExitViT) -> None:
        model.exits[-1].head.cls.register_forward_hook(press_ctrl_c)

    with pytest.raises(KeyboardInterrupt):
        run.fit(initial=hook)
    assert run.logged_steps() == ALL_STEPS[:2]

    model = run.fit()

    assert_same_bits(weights_of(model), weights_of(load_trained(undisturbed.folder)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_killed_run_goes_on_from_its_last_checkpoint(run: Run, undisturbed: Run) -> None:
    run.fit_until(1, 2)
    with (run.folder / "log.jsonl").open("a") as log:  # what was done but not saved
        log.write('{"stage": 1, "step": 3, "loss": 9}\n{"stage": 1, "step": 4, "lo')
    (run.folder / ".checkpoint.pt.partial").write_bytes(b"half of one")

    model = run.fit()

    assert_same_bits(weights_of(model), weights_of(load_trained(undisturbed.folder)))
    assert run.logged_steps() == ALL_STEPS


def test_a_checkpoint_is_written_as_often_as_asked(run: Run) -> None:
    saved: list[bool] = []

    def note(progress: Progress) -> None:
        saved.append((run.folder / "checkpoint.pt").exists())

    run.fit(checkpoint_every_s=0.0, on_progress=note)

    assert saved == [False] + [True] * (len(ALL_STEPS) - 1)


def test_a_finished_run_is_not_trained_again(run: Run) -> None:
    first = run.fit()
    run.reports.clear()

    again = run.fit(initial=lambda model: pytest.fail("a resumed run has its weights"))

    assert run.reports == []
    assert_same_bits(weights_of(again), weights_of(first))


def test_another_seed_trains_another_model(run: Run, undisturbed: Run) -> None:
    model = run.fit(small_recipe(seed=1))

    assert changed_names(weights_of(model), weights_of(load_trained(undisturbed.folder)))


def test_training_learns_a_box_by_heart(run: Run) -> None:
    stages = (
        Stage(
            objective="final_exit",
            samples=60 * BATCH,
            batch_size=BATCH,
            warmup_steps=5,
            learning_rate=2e-3,
        ),
        Stage(objective="shallow_exits", samples=BATCH, batch_size=BATCH, warmup_steps=5),
    )

    run.fit(small_recipe(stages=stages), report_every=20)

    first, last = run.reports[0], run.reports[2]
    assert last.terms["loss"] < 0.7 * first.terms["loss"]
    assert last.terms["iou_1"] > first.terms["iou_1"]


def test_the_log_has_a_line_per_report(run: Run) -> None:
    run.fit(report_every=4)

    assert run.logged_steps() == [(1, 4), (1, 6), (2, 4)]  # the last step is always reported
    first, last = run.log()[0], run.log()[-1]
    terms = {"score", "giou", "l1", "dfl", "iou"}
    heading = {"stage", "step", "samples", "samples_per_s", "loss"}
    assert first.keys() == heading | {f"{name}_1" for name in terms}
    assert last.keys() == heading | {f"{name}_0" for name in terms} | {"distil_0"}
    assert [entry["samples"] for entry in run.log()] == [16, 24, 16]


def test_a_report_averages_since_the_one_before(run: Run, undisturbed: Run) -> None:
    run.fit(report_every=3)

    losses = [entry["loss"] for entry in undisturbed.log()[:6]]
    expected = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert [e["loss"] for e in run.log()[:2]] == pytest.approx(expected, abs=2e-5)


def test_a_report_says_how_long_is_left(run: Run) -> None:
    run.fit()

    for report in run.reports:
        assert report.samples == BATCH * report.step
        assert report.num_steps == NUM_STEPS[report.stage - 1]
        left = (report.num_steps - report.step) * BATCH
        assert report.remaining_s == pytest.approx(left / report.samples_per_s)


def test_the_averaged_weights_are_not_the_last_ones(run: Run) -> None:
    model = run.fit()

    saved = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    assert changed_names(weights_of(model), saved["model"])
    assert_same_bits(weights_of(model), saved["average"])


@pytest.mark.parametrize("change", [{"seed": 5}, {"autocast": False}, {"model": "other"}])
def test_a_checkpoint_of_another_recipe_is_refused_and_kept(
    run: Run, change: dict[str, Any]
) -> None:
    run.fit_until(1, 1)
    before = (run.folder / "checkpoint.pt").read_bytes()

    with pytest.raises(CheckpointError, match="expected a run of this recipe, got one of"):
        run.fit(small_recipe(**change))

    assert (run.folder / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_another_network_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.fit_until(1, 1)
    monkeypatch.setitem(CONFIGS, "small", dataclasses.replace(PATCH, dim=48))

    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: expected weights of this version"):
        run.fit()
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: expected weights of this version"):
        load_trained(run.folder)


def test_a_damaged_checkpoint_is_refused_and_kept(run: Run) -> None:
    run.folder.mkdir()
    (run.folder / "checkpoint.pt").write_bytes(b"half of one")

    with pytest.raises(CheckpointError, match="damaged or foreign file"):
        run.fit()

    assert (run.folder / "checkpoint.pt").read_bytes() == b"half of one"


def test_a_folder_without_a_checkpoint_has_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected checkpoint\.pt, got none; run: edgetrack"):
        load_trained(tmp_path)


def test_no_room_for_a_checkpoint_keeps_the_old_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.fit_until(1, 1)
    before = shutil.copy(run.folder / "checkpoint.pt", run.folder / "before.pt").read_bytes()
    (run.folder / ".checkpoint.pt.partial").mkdir()  # nothing can be written there

    with pytest.raises((OSError, RuntimeError)):
        run.fit()

    assert (run.folder / "checkpoint.pt").read_bytes() == before


def test_an_unknown_objective_is_refused(run: Run) -> None:
    stages = (Stage(objective="first_exit", samples=BATCH, batch_size=BATCH),)

    with pytest.raises(ValueError, match=r"^objective: expected one of \[.*'final_exit'"):
        run.fit(small_recipe(stages=stages))


def test_an_unknown_model_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match=r"^model: expected one of"):
        run.fit(small_recipe(model="resnet-50"))


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(run: Run) -> None:
    run.fit_until(1, 2)
    weights = dataclasses.replace(small_recipe().loss_weights, giou=math.inf)
    saved = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    broken = small_recipe(loss_weights=weights)
    saved["recipe"] = json.loads(json.dumps(dataclasses.asdict(broken)))
    torch.save(saved, run.folder / "checkpoint.pt")
    before = (run.folder / "checkpoint.pt").read_bytes()
    with pytest.raises(TrainingError, match=r"expected a finite loss, got (inf|nan) .* is kept"):
        run.fit(broken)

    assert (run.folder / "checkpoint.pt").read_bytes() == before


# Correlation prior, batch norms in the trunk; float32 and no drop path, which draws per process.
EXACT_CONFIG = dataclasses.replace(PRIOR, drop_path=0.0)
# A small rate: Adam divides rounding noise by itself where a gradient is near zero.
EXACT = {
    "autocast": False,
    "model": "early_exit_vit-exact",
    "stages": tuple(
        Stage(
            objective=name,
            samples=BATCH * steps,
            batch_size=BATCH,
            warmup_steps=2,
            learning_rate=5e-5,
        )
        for name, steps in zip(OBJECTIVE_NAMES, NUM_STEPS, strict=True)
    ),
}


def test_only_weights_decay_not_gates_of_any_shape(run: Run) -> None:
    stage = Stage(objective="slimming", samples=BATCH, batch_size=BATCH)

    model = run.fit(small_recipe(stages=(stage,)))

    groups = read_checkpoint(run.folder)["optimizer"]["param_groups"]
    matrices = [name for name, p in model.named_parameters() if p.ndim > 1]
    gates = [name for name in matrices if name.startswith("gates.")]
    assert gates
    num_decaying = sum(len(group["params"]) for group in groups if group["weight_decay"])
    assert num_decaying == len(matrices) - len(gates)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
def test_a_compiled_run_learns_the_same(
    pack: TrainingPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, "small", EXACT_CONFIG)
    monkeypatch.setitem(CONFIGS, "exact", EXACT_CONFIG)
    plain = Run(pack, tmp_path / "plain").fit(small_recipe(**EXACT))

    compiled = Run(pack, tmp_path / "compiled").fit(small_recipe(**EXACT), is_compiled=True)

    for got, expected in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def train_as_rank(rank: int, pack: TrainingPack, folder: Path) -> None:
    """What each of two processes does."""
    rendezvous = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.set_num_threads(1)
    CONFIGS["small"] = CONFIGS["exact"] = EXACT_CONFIG
    model = Run(pack, folder).fit(small_recipe(**EXACT))
    torch.save(model.state_dict(), folder / f"rank_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_the_model_that_one_does(
    pack: TrainingPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.multiprocessing.spawn(train_as_rank, args=(pack, tmp_path), nprocs=2)
    monkeypatch.setitem(CONFIGS, "small", EXACT_CONFIG)
    monkeypatch.setitem(CONFIGS, "exact", EXACT_CONFIG)
    alone = weights_of(Run(pack, tmp_path / "alone").fit(small_recipe(**EXACT)))

    first, second = (torch.load(tmp_path / f"rank_{k}.pt", weights_only=True) for k in (0, 1))
    assert_same_bits(first, second)
    assert Run(pack, tmp_path).logged_steps() == ALL_STEPS
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-5)
