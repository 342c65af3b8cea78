"""The training loop: stages, checkpoints, resuming, one or several processes.

A run is a folder: ``checkpoint.pt`` (all that resuming needs, written whole or not at all),
``log.jsonl`` (a line per report), ``recipe.json``. Pair ``i`` depends on the seed and ``i`` alone,
so a run that was killed and resumed sees the pairs that an undisturbed one sees, in the same order.

Under ``torchrun`` each process takes its rows of a batch; gradients are averaged and batch norms
see the global batch, so the number of processes does not change what is learnt. On a CPU, two
processes of one thread are close to twice as fast as one process of two threads.
"""

import contextlib
import copy
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgetrack.errors import TrainingError
from edgetrack.models.segmented import SegmentedModel
from edgetrack.train.checkpoints import (
    checkpoint_fits,
    find_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from edgetrack.train.objectives import OBJECTIVES, Objective
from edgetrack.train.recipes import Recipe, Stage, create_changed_model
from edgetrack.train.sampling import Batches

__all__ = ["Progress", "fit", "load_trained"]

LOG_NAME = "log.jsonl"
_GPU_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is.

    Attributes:
        stage: From 1.
        step: Steps done in this stage.
        num_steps: Steps of this stage.
        samples: Pairs seen in this stage.
        samples_per_s: Since the last report.
        remaining_s: Of this stage, at that speed.
        terms: Loss, its terms and the mean IoU per exit, averaged since the last report.
    """

    stage: int
    step: int
    num_steps: int
    samples: int
    samples_per_s: float
    remaining_s: float
    terms: Mapping[str, float]


def fit(
    recipe: Recipe,
    sampler_of: Callable[[int, Stage, torch.device], Batches],
    output: Path,
    *,
    teacher: SegmentedModel | None = None,
    initial: Callable[[SegmentedModel], None] | None = None,
    is_compiled: bool = False,
    checkpoint_every_s: float = 120.0,
    report_every: int = 20,
    on_progress: Callable[[Progress], None] | None = None,
) -> SegmentedModel:
    """Train a model, or go on with a run that was interrupted.

    Args:
        recipe: What to train.
        sampler_of: ``(seed, stage, device)`` → pairs of a stage.
        output: Folder of the run; if it holds a checkpoint of the same recipe, the run goes on.
        teacher: A model to learn from, for objectives that have one; it is frozen.
        initial: Called once on the fresh model, to load weights to start from.
        is_compiled: Compile the step: minutes at first, then faster on a GPU (not on a CPU).
        checkpoint_every_s: Seconds between checkpoints.
        report_every: Steps between reports.
        on_progress: Called with every report.

    Returns:
        The model with averaged weights, in eval mode, on the CPU.

    Raises:
        CheckpointError: ``output`` holds a run of another recipe, or a damaged one.
        TrainingError: The loss is not a finite number; the last checkpoint stays.
        ValueError: There is no such objective, or one cannot train this model.
        KeyboardInterrupt: Passed on after a checkpoint was written.
    """
    output.mkdir(parents=True, exist_ok=True)
    described = json.loads(json.dumps(dataclasses.asdict(recipe)))
    saved = find_checkpoint(output, recipe=described)
    torch.manual_seed(recipe.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = recipe.create_model()
    if saved is None and initial is not None:
        initial(model)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub gap
    (output / "recipe.json").write_text(json.dumps(described, indent=1), "utf-8")
    if not dist.is_initialized() or dist.get_rank() == 0:
        _drop_unsaved(output / LOG_NAME, saved)
    if teacher is not None:
        teacher.to(device).eval().requires_grad_(False)
    for number, stage in enumerate(recipe.stages, 1):
        kind = _objective_of(stage)
        if (saved is not None and saved["stage"] > number) or not kind.is_needed(model):
            continue
        objective = kind(model, recipe, teacher)
        run = _StageRun(objective, stage, number, output, described)
        sampler = sampler_of(recipe.seed + number, stage, device)
        if saved is not None and saved["stage"] == number:
            run.restore(saved)  # last of all: what comes before may draw random numbers
        saved = None
        run.train(
            sampler,
            is_compiled=is_compiled,
            checkpoint_every_s=checkpoint_every_s,
            report_every=report_every,
            on_progress=on_progress,
        )
        model.load_state_dict(run.average.state_dict())
    return model.eval().cpu()


def load_trained(path: Path) -> SegmentedModel:
    """The model of a finished or interrupted run, with averaged weights, in eval mode.

    Args:
        path: The run's folder.

    Raises:
        CheckpointError: It holds no checkpoint, or a damaged one.
    """
    saved = read_checkpoint(path)
    recipe = saved["recipe"]
    with checkpoint_fits(path):
        model = create_changed_model(recipe["model"], recipe["model_config"])
        model.load_state_dict(saved["average"])
    return model.eval()


class _StageRun:
    """One stage in progress: optimiser, averaged weights, step."""

    def __init__(
        self,
        objective: Objective,
        stage: Stage,
        number: int,
        output: Path,
        described: Mapping[str, Any],
    ) -> None:
        self.objective, self.stage, self.number = objective, stage, number
        self.model: SegmentedModel = objective.model
        self.output, self.described = output, described
        objective.prepare()
        self.average = copy.deepcopy(self.model).eval()
        self.optimizer = _optimizer(self.model, stage)
        self.device = next(self.model.parameters()).device
        self.step = 0
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1

    def restore(self, saved: Mapping[str, Any]) -> None:
        with checkpoint_fits(self.output):
            self.model.load_state_dict(saved["model"])
            self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"]["cpu"])
            if self.device.type == "cuda" and saved["rng"]["cuda"] is not None:
                torch.cuda.set_rng_state(saved["rng"]["cuda"], self.device)
        self.step = saved["step"]

    def save(self) -> None:
        if self.rank != 0 or not self.is_finite():
            return
        content = {
            "recipe": self.described,
            "stage": self.number,
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device)
                if self.device.type == "cuda"
                else None,
            },
        }
        write_checkpoint(self.output, content)

    def is_finite(self) -> bool:
        """Whether all weights still are numbers: others are never saved."""
        return all(bool(p.isfinite().all()) for p in self.model.parameters())

    def train(
        self,
        sampler: Batches,
        *,
        is_compiled: bool,
        checkpoint_every_s: float,
        report_every: int,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        if self.stage.batch_size % self.num_ranks:
            raise ValueError(
                f"batch_size: expected a multiple of {self.num_ranks} processes, "
                f"got {self.stage.batch_size}"
            )
        objective = torch.compile(self.objective) if is_compiled else self.objective
        report = _Report(self.output / LOG_NAME, self.number, self.stage, on_progress)
        saved_at = time.monotonic()
        batches = sampler.batches(
            self.step,
            self.stage.num_steps - self.step,
            rank=self.rank,
            num_ranks=self.num_ranks,
        )
        try:
            for batch in batches:
                with _held_interrupt():
                    report.add(self._update(objective, batch))
                    self.step += 1
                if self.step % report_every == 0 or self.step == self.stage.num_steps:
                    self._check(report)
                    if self.rank == 0:
                        report.write(self.step)
                    report.clear()
                if time.monotonic() - saved_at > checkpoint_every_s:
                    self.save()
                    saved_at = time.monotonic()
        finally:
            self.save()

    def _check(self, report: "_Report") -> None:
        if not math.isfinite(report.mean("loss")):
            raise TrainingError(
                f"training: expected a finite loss, got {report.mean('loss')} before step "
                f"{self.step} of stage {self.number}; the last checkpoint is kept in "
                f"{self.output}: lower the learning rate, or look for damaged boxes in the data"
            )

    def _update(self, objective: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stage = self.stage
        # A short run must not spend its time on the rise.
        warmup_steps = min(stage.warmup_steps, max(stage.num_steps // 5, 1))
        rise = min(1.0, (self.step + 1) / warmup_steps)
        fall = 0.5 * (1 + math.cos(math.pi * self.step / stage.num_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rise * (0.02 + 0.98 * fall)
        self.objective.before_step(self.step / stage.num_steps, stage)
        device_type = self.device.type
        # The flash kernel's backward pass is slow on CPUs at these sizes.
        kernels = [SDPBackend.MATH] if device_type == "cpu" else list(_GPU_KERNELS)
        with sdpa_kernel(kernels):
            with torch.autocast(
                device_type, torch.bfloat16, enabled=self.objective.recipe.autocast
            ):
                loss: Tensor
                log: dict[str, Tensor]
                loss, log = objective(batch)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
        trained = [p for g in self.optimizer.param_groups for p in g["params"]]
        if self.num_ranks > 1:
            _average_over_ranks([p.grad for p in trained if p.grad is not None])
        nn.utils.clip_grad_norm_(trained, stage.clip_norm)
        self.optimizer.step()
        self._update_average()
        log["loss"] = loss.detach()
        return log

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.stage.ema_decay, (1 + self.step) / (10 + self.step))
        trained = {id(p) for g in self.optimizer.param_groups for p in g["params"]}
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        kept = [(a, p) for a, p in pairs if id(p) in trained]
        torch._foreach_lerp_([a for a, _ in kept], [p for _, p in kept], 1 - decay)
        for a, b in zip(self.average.buffers(), self.model.buffers(), strict=True):
            if a.dtype.is_floating_point:
                a.lerp_(b, 1 - decay)


class _Report:
    """Averages of the loss terms, written to the log and handed on."""

    def __init__(
        self,
        path: Path,
        number: int,
        stage: Stage,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.path, self.number, self.stage, self.on_progress = path, number, stage, on_progress
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.since = time.monotonic()

    def add(self, log: Mapping[str, Tensor]) -> None:
        """Add the terms of a step; they stay on the device, which must not wait for the host."""
        for name, value in log.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def mean(self, name: str) -> float:
        return float(self.sums[name]) / self.count

    def write(self, step: int) -> None:
        now = time.monotonic()
        speed = self.count * self.stage.batch_size / max(now - self.since, 1e-9)
        left = (self.stage.num_steps - step) * self.stage.batch_size
        progress = Progress(
            stage=self.number,
            step=step,
            num_steps=self.stage.num_steps,
            samples=step * self.stage.batch_size,
            samples_per_s=speed,
            remaining_s=left / speed,
            terms={name: self.mean(name) for name in self.sums},
        )
        entry = {
            "stage": self.number,
            "step": step,
            "samples": progress.samples,
            "samples_per_s": round(speed, 1),
            **{k: round(v, 5) for k, v in progress.terms.items()},
        }
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        if self.on_progress is not None:
            self.on_progress(progress)


@torch.no_grad()
def _average_over_ranks(tensors: list[Tensor]) -> None:
    if not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = torch.split(flat, [t.numel() for t in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


@contextlib.contextmanager
def _held_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done: a run cannot go on from half a step."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if held:
        raise KeyboardInterrupt


def _drop_unsaved(log: Path, saved: Mapping[str, Any] | None) -> None:
    """Drop the lines of steps that come after the checkpoint: they will be done again."""
    if not log.is_file():
        return
    done = (0, 0) if saved is None else (saved["stage"], saved["step"])
    kept = []
    for line in log.read_text("utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # the last may have been cut off by a kill
            entry = json.loads(line)
            kept += [line] if (entry["stage"], entry["step"]) <= done else []
    log.write_text("".join(kept), "utf-8")


def _objective_of(stage: Stage) -> type[Objective]:
    if stage.objective not in OBJECTIVES:
        raise ValueError(
            f"objective: expected one of {sorted(OBJECTIVES)}, got {stage.objective!r}"
        )
    return OBJECTIVES[stage.objective]


def _optimizer(model: SegmentedModel, stage: Stage) -> torch.optim.AdamW:
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # A gate's step is 2-D for attention, and decay would pull it to an open gate.
            is_matrix = parameter.ndim > 1 and "gates." not in name
            key = (name.startswith(model.pretrained), is_matrix)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak": stage.learning_rate * (stage.stem_rate if is_pretrained else 1.0),
                "weight_decay": stage.weight_decay if is_matrix else 0.0,
            }
            for (is_pretrained, is_matrix), parameters in groups.items()
        ],
        lr=stage.learning_rate,
        betas=(0.9, 0.98),
        # Biases that cannot matter (a key's, before a softmax) have gradients of rounding noise.
        eps=1e-6,
    )
