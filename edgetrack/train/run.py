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
from edgetrack.train.checkpoints import CHECKPOINT_NAME
from edgetrack.train.loop import LOG_NAME, Progress, fit
from edgetrack.train.objectives import OBJECTIVES
from edgetrack.train.recipes import Recipe, Stage
from edgetrack.train.rollouts import RunSampler
from edgetrack.train.sampling import Batches, PairSampler
from edgetrack.viz import plot_training

__all__ = ["read_provenance", "read_sources", "run_recipe"]

PROVENANCE_NAME = "provenance.json"
# Key of the provenance → what the command line calls it, where that differs.
_NAMES = {"start": "bundle to start from", "pseudo_tracks": "pseudo-tracks file"}
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
    on_start: Callable[[int, int], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> SegmentedModel:
    """Train a recipe, or go on with a run that was interrupted.

    Under ``torchrun`` every process calls this; the first one writes. Without weights to start from
    nothing is frozen: the recipe's ``frozen_stem_share`` counts as 0 then.

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
        on_start: Called with the number of tensors that start from ``start`` and of all, in the
            first process, when a run begins.
        on_progress: Called with every report, in the first process.

    Raises:
        DataError: A source holds nothing to train on, or is malformed.
        CheckpointError: ``output`` holds another run, or one from other weights or data, or
            ``stem`` or ``start`` does not fit.
        TrainingError: The loss is not finite any more.
        ValueError: The recipe's trunk stays frozen, and there are no weights to start from.
    """
    recipe = _with_what_can_be_frozen(
        recipe, has_stem=stem is not None, has_start=start is not None or weights is not None
    )
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    describe_inputs = functools.partial(
        _describe_inputs,
        sources,
        files={"stem": stem, "pseudo_tracks": pseudo_tracks},
        bundles={"start": start, "teacher": teacher},
    )
    has_record = all((output / n).is_file() for n in (CHECKPOINT_NAME, PROVENANCE_NAME))
    if is_first and has_record:  # before minutes of reading; the other processes end with this one
        _check_inputs(output, describe_inputs())
    pack = read_sources(
        sources,
        pseudo_tracks=pseudo_tracks,
        leave_out=recipe.calibration_clips,
        on_reading=on_reading,
    )
    clips = [_render(_FIRST_CLIP_SEED + k) for k in range(recipe.num_synthetic_clips)]
    guide = None if teacher is None else load_model(teacher)
    crops = recipe.create_model().crops
    if is_first and not has_record:
        _write_provenance(recipe, describe_inputs(), output)

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
            num_new, num_all = len(load_fitting_weights(model, start)), len(model.state_dict())
            if is_first and on_start is not None:
                on_start(num_all - num_new, num_all)

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


def _with_what_can_be_frozen(recipe: Recipe, *, has_stem: bool, has_start: bool) -> Recipe:
    """The recipe as it can be trained: random weights are never frozen."""
    if not has_start and any(stage.objective == "final_head" for stage in recipe.stages):
        raise ValueError("recipe: expected --from BUNDLE, whose trunk is frozen, got none")
    if has_stem or has_start:
        return recipe
    stages = (dataclasses.replace(stage, frozen_stem_share=0.0) for stage in recipe.stages)
    return dataclasses.replace(recipe, stages=tuple(stages))


def _describe_inputs(
    sources: Sequence[tuple[str, Path]],
    *,
    files: Mapping[str, Path | None],
    bundles: Mapping[str, Bundle | None],
) -> dict[str, Any]:
    """What a run reads, as its provenance holds it."""
    return {
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
    }


def _check_inputs(output: Path, inputs: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that read something else."""
    before = read_provenance(output)
    changed = [
        name
        for name, now in inputs.items()
        if name in before and _identity_of(before[name]) != _identity_of(now)
    ]
    if changed:
        names = ", ".join(_NAMES.get(name, name) for name in changed)
        raise CheckpointError(
            f"{output}: expected the inputs that this run began with, got another {names}; "
            "choose another --output, or delete the folder"
        )


def _identity_of(described: Any) -> Any:
    """What tells one input from another: a bundle or a file may be moved and renamed."""
    if isinstance(described, dict):
        return described.get("digest", described.get("sha256"))
    return described


def _write_provenance(recipe: Recipe, inputs: Mapping[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    content = {
        "recipe": dataclasses.asdict(recipe),
        "samples": [s.num_steps * s.batch_size for s in recipe.stages],
        **inputs,
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
