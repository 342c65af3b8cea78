"""A recipe on a training folder: decode it, render clips, join the processes, train.

Beside what the loop keeps, a run's folder gets ``provenance.json`` (what the weights come from, for
the bundle's manifest) and ``training.png``.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist

from edgetrack.bundle import sha256_of
from edgetrack.data.folder import Clip, read_training_pack
from edgetrack.data.synthetic import render_clip
from edgetrack.errors import CheckpointError
from edgetrack.models.early_exit_vit import EarlyExitViT
from edgetrack.models.published import load_shuffle_stem
from edgetrack.models.registry import create_model
from edgetrack.train.loop import LOG_NAME, Progress, fit
from edgetrack.train.recipes import Recipe
from edgetrack.train.sampling import PairSampler
from edgetrack.viz import plot_training

__all__ = ["read_provenance", "run_recipe"]

PROVENANCE_NAME = "provenance.json"
_CLIP_FRAMES, _CLIP_WIDTH, _CLIP_HEIGHT = 24, 320, 240
# Seeds from here on render training clips; the demo and the tests use small ones.
_FIRST_CLIP_SEED = 1000


def run_recipe(
    recipe: Recipe,
    data: Path,
    output: Path,
    *,
    stem: Path | None = None,
    num_workers: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
) -> EarlyExitViT:
    """Train a recipe on a folder, or go on with a run that was interrupted.

    Under ``torchrun`` every process calls this; the first one writes.

    Args:
        recipe: What to train.
        data: Training folder (see ``data.folder``).
        output: Folder of the run.
        stem: Pretrained ShuffleNetV2 weights, ``.npz``.
        num_workers: Processes per process that make pairs.
        on_progress: Called with every report, in the first process.

    Raises:
        DataError: The folder holds nothing to train on.
        CheckpointError: ``output`` holds another run, or ``stem`` does not fit.
    """
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    cv2.setNumThreads(0)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    crops = create_model(recipe.model).crops
    pack = read_training_pack(data)
    clips = [_render(_FIRST_CLIP_SEED + k) for k in range(recipe.num_synthetic_clips)]
    if is_first and not (output / PROVENANCE_NAME).is_file():
        _write_provenance(recipe, data, output, stem)

    def sampler_of(seed: int, num_pairs: int) -> PairSampler:
        return PairSampler(
            pack, crops=crops, seed=seed, num_pairs=num_pairs, mix=recipe.mix, extra_clips=clips
        )

    def initial(model: EarlyExitViT) -> None:
        if stem is not None and not hasattr(model.backbone, "stem"):
            raise ValueError(f"stem: expected none for {recipe.model}, whose stem is patches; "
                             f"got {stem}")  # fmt: skip
        if stem is not None:
            load_shuffle_stem(model.backbone.stem, stem)

    model = fit(
        recipe,
        sampler_of,
        output,
        initial=initial,
        num_workers=num_workers,
        on_progress=on_progress,
    )
    if is_first:
        plot_training(output / LOG_NAME, output / "training.png")
    return model


def read_provenance(run: Path) -> dict[str, Any]:
    """What the weights of a run come from.

    Raises:
        CheckpointError: The run has no record of it.
    """
    try:
        content: dict[str, Any] = json.loads((run / PROVENANCE_NAME).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run}: expected {PROVENANCE_NAME}, got: {error}") from error
    return content


def _write_provenance(recipe: Recipe, data: Path, output: Path, stem: Path | None) -> None:
    output.mkdir(parents=True, exist_ok=True)
    content = {
        "recipe": dataclasses.asdict(recipe),
        "samples": [s.num_steps * s.batch_size for s in recipe.stages],
        "data_digest": _digest(data),
        "stem": None if stem is None else {"file": stem.name, "sha256": sha256_of(stem)},
        "hardware": "CUDA" if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    (output / PROVENANCE_NAME).write_text(json.dumps(content, indent=1), "utf-8")


def _digest(folder: Path) -> str:
    """SHA-256 over the names and sizes of all files: tells one version of a folder from another."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    lines = [f"{p.relative_to(folder).as_posix()} {p.stat().st_size}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _render(seed: int) -> Clip:
    frames = list(
        render_clip(num_frames=_CLIP_FRAMES, width=_CLIP_WIDTH, height=_CLIP_HEIGHT, seed=seed)
    )
    return Clip(
        f"synthetic_{seed}", tuple(f for f, _ in frames), np.stack([box for _, box in frames])
    )
