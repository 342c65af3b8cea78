"""A recipe on sources of data: read them, render clips, join the processes, train.

Beside what the loop keeps, a run's folder gets ``provenance.json`` (what the weights come from, for
the bundle's manifest) and ``training.png``.
"""

import dataclasses
import datetime
import functools
import json
import os
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from edgetrack.bundle import Bundle, sha256_of
from edgetrack.data.folder import Clip, TrainingPack, folder_digest, read_training_pack
from edgetrack.data.layouts import FOLDER, read_layout
from edgetrack.data.pseudo_tracks import read_pseudo_tracks
from edgetrack.data.synthetic import render_clip
from edgetrack.errors import CheckpointError
from edgetrack.models.layers import ShuffleStem
from edgetrack.models.published import load_shuffle_stem
from edgetrack.models.registry import load_fitting_weights, load_model
from edgetrack.models.segmented import SegmentedModel
from edgetrack.train.loop import LOG_NAME, Progress, fit
from edgetrack.train.objectives import OBJECTIVES
from edgetrack.train.recipes import Recipe, Stage
from edgetrack.train.rollouts import RunSampler
from edgetrack.train.sampling import Batches, PairSampler
from edgetrack.viz import plot_training

__all__ = ["read_provenance", "read_sources", "run_recipe"]

PROVENANCE_NAME = "provenance.json"
_CLIP_FRAMES, _CLIP_WIDTH, _CLIP_HEIGHT = 24, 320, 240
# Seeds from here on render training clips; the demo and the tests use small ones.
_FIRST_CLIP_SEED = 1000


def run_recipe(
    recipe: Recipe,
    sources: Sequence[tuple[str, Path]],
    output: Path,
    *,
    stem: Path | None = None,
    start: Bundle | None = None,
    weights: SegmentedModel | None = None,
    teacher: Bundle | None = None,
    pseudo_tracks: Path | None = None,
    is_compiled: bool = False,
    on_reading: Callable[[str, int, int], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> SegmentedModel:
    """Train a recipe, or go on with a run that was interrupted.

    Under ``torchrun`` every process calls this; the first one writes.

    Args:
        recipe: What to train.
        sources: Layout and root of each source of data (see ``data.layouts.parse_source``).
        output: Folder of the run.
        stem: Pretrained ShuffleNetV2 weights, ``.npz``.
        start: A bundle whose weights to start from, where names and shapes fit.
        weights: A model of the recipe's configuration to start from, such as what is left of
            ``start`` when it was pruned.
        teacher: A bundle to learn from, for objectives that have a teacher.
        pseudo_tracks: Tracks in the videos of the first training folder, or of the folder that
            holds the file, as ``edgetrack pseudolabel`` writes them.
        is_compiled: Compile the step; for GPUs.
        on_reading: Called with the name of a source and the numbers of its parts done and to do.
        on_progress: Called with every report, in the first process.

    Raises:
        DataError: A source holds nothing to train on, or is malformed.
        CheckpointError: ``output`` holds another run, or ``stem`` or ``start`` does not fit.
        TrainingError: The loss is not finite any more.
    """
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    pack = read_sources(
        sources,
        pseudo_tracks=pseudo_tracks,
        leave_out=recipe.calibration_clips,
        on_reading=on_reading,
    )
    clips = [_render(_FIRST_CLIP_SEED + k) for k in range(recipe.num_synthetic_clips)]
    guide = None if teacher is None else load_model(teacher)
    crops = recipe.create_model().crops
    if is_first and not (output / PROVENANCE_NAME).is_file():
        _write_provenance(
            recipe,
            sources,
            output,
            files={"stem": stem, "pseudo_tracks": pseudo_tracks},
            bundles={"start": start, "teacher": teacher},
        )

    def sampler_of(seed: int, stage: Stage, device: torch.device) -> Batches:
        is_at_teachers = OBJECTIVES[stage.objective].reads_teacher_crops
        pairs = PairSampler(
            pack,
            crops=guide.crops if is_at_teachers and guide is not None else crops,
            seed=seed,
            batch_size=stage.batch_size,
            mix=recipe.mix,
            extra_clips=clips,
            device=device,
            num_templates=stage.num_templates,
        )
        return RunSampler(pairs, num_frames=stage.num_frames) if stage.num_frames else pairs

    def initial(model: SegmentedModel) -> None:
        if stem is not None:
            stems = [m for m in model.modules() if isinstance(m, ShuffleStem)]
            if not stems:
                raise ValueError(f"stem: expected none for {recipe.model}, which has no "
                                 f"ShuffleNetV2 stem; got {stem}")  # fmt: skip
            load_shuffle_stem(stems[0], stem)
        if weights is not None:
            model.load_state_dict(weights.state_dict())
        elif start is not None:
            load_fitting_weights(model, start)

    model = fit(
        recipe,
        sampler_of,
        output,
        teacher=guide,
        initial=initial,
        is_compiled=is_compiled,
        on_progress=on_progress,
    )
    if is_first:
        plot_training(output / LOG_NAME, output / "training.png")
    return model


def read_sources(
    sources: Sequence[tuple[str, Path]],
    *,
    pseudo_tracks: Path | None = None,
    leave_out: Collection[str] = (),
    on_reading: Callable[[str, int, int], None] | None = None,
) -> TrainingPack:
    """Read all sources of a run into one pack; a layout's clips are a group of its name.

    Args:
        sources: Layout and root of each.
        pseudo_tracks: See ``run_recipe``; they make the group ``pseudo``.
        leave_out: Sets and clips of training folders that are not read.
        on_reading: Called with the name of a source and the numbers of its parts done and to do.

    Raises:
        DataError: A source holds nothing to train on, or is malformed.
    """
    packs: list[TrainingPack] = []
    groups: dict[str, tuple[Clip, ...]] = {}
    for name, root in sources:
        report = None if on_reading is None else functools.partial(on_reading, name)
        if name == FOLDER:
            packs.append(read_training_pack(root, leave_out=leave_out, on_progress=report))
        else:
            clips = read_layout(name, root, on_progress=report)
            group = name.partition(":")[0]
            groups[group] = groups.get(group, ()) + clips
    if pseudo_tracks is not None:
        folders = [root for name, root in sources if name == FOLDER]
        own = pseudo_tracks.parent
        root = own if (own / "videos").is_dir() or not folders else folders[0]
        groups["pseudo"] = read_pseudo_tracks(pseudo_tracks, root)
    return TrainingPack(
        pictures={k: v for pack in packs for k, v in pack.pictures.items()},
        clips={
            **{
                k: tuple(clip for pack in packs for clip in pack.clips.get(k, ()))
                for pack in packs
                for k in pack.clips
            },
            **groups,
        },
        cutouts=tuple(cutout for pack in packs for cutout in pack.cutouts),
        backgrounds=tuple(image for pack in packs for image in pack.backgrounds),
    )


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


def _write_provenance(
    recipe: Recipe,
    sources: Sequence[tuple[str, Path]],
    output: Path,
    *,
    files: Mapping[str, Path | None],
    bundles: Mapping[str, Bundle | None],
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    content = {
        "recipe": dataclasses.asdict(recipe),
        "samples": [s.num_steps * s.batch_size for s in recipe.stages],
        # A published set has millions of files, and its name says enough.
        "data": [
            {"layout": name, "digest": folder_digest(root) if name == FOLDER else None}
            for name, root in sources
        ],
        **{
            k: None if file is None else {"file": file.name, "sha256": sha256_of(file)}
            for k, file in files.items()
        },
        **{
            k: None
            if bundle is None
            else {
                "bundle": bundle.name,
                "digest": bundle.digest,
                "provenance": dict(bundle.provenance),
            }
            for k, bundle in bundles.items()
        },
        "hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} {platform.machine()} CPUs",
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    (output / PROVENANCE_NAME).write_text(json.dumps(content, indent=1), "utf-8")


def _render(seed: int) -> Clip:
    frames = list(
        render_clip(num_frames=_CLIP_FRAMES, width=_CLIP_WIDTH, height=_CLIP_HEIGHT, seed=seed)
    )
    return Clip(
        f"synthetic_{seed}", tuple(f for f, _ in frames), np.stack([box for _, box in frames])
    )
