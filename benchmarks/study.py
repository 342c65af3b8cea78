"""What the studies share: train a recipe and export it, unless that was done; score the result."""

import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import edgetrack
from edgetrack.bundle import Bundle
from edgetrack.data.sequences import Sequence as LabelledSequence
from edgetrack.data.synthetic import render_clip
from edgetrack.evaluate.protocols import SequenceResult, evaluate_sequence
from edgetrack.export import export_bundle
from edgetrack.models.segmented import SegmentedModel
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules
from edgetrack.train.recipes import Recipe
from edgetrack.train.run import run_recipe

RESULTS = Path(__file__).parent / "results"


def slug(name: str) -> str:
    """The name as a folder is called."""
    return "".join(c if c.isalnum() else "-" for c in name)


def train_and_export(
    recipe: Recipe,
    sources: Sequence[tuple[str, Path]],
    work: Path,
    *,
    label: str,
    stem: Path | None = None,
    start: Bundle | None = None,
    teacher: Bundle | None = None,
    pseudo_tracks: Path | None = None,
) -> Path:
    """Train and export a recipe in the folder of its name; the bundle, if that was done before.

    Without pretrained weights nothing could be frozen, so the stem learns from the first step.

    Raises:
        CheckpointError: The folder holds a run with other settings.
    """
    if stem is None and start is None:
        stages = (dataclasses.replace(stage, frozen_stem_share=0.0) for stage in recipe.stages)
        recipe = dataclasses.replace(recipe, stages=tuple(stages))
    folder = work / recipe.name
    bundle = folder / "bundle"
    if (bundle / "manifest.json").is_file() and _is_of(folder, recipe):
        return bundle

    def show(progress: Any) -> None:
        print(
            f"\r{label:30s} stage {progress.stage} {progress.step}/{progress.num_steps} "
            f"loss {progress.terms['loss']:.3f} {progress.samples_per_s:.0f}/s",
            end="",
            file=sys.stderr,
        )

    model = run_recipe(
        recipe,
        sources,
        folder,
        stem=stem,
        start=start,
        teacher=teacher,
        pseudo_tracks=pseudo_tracks,
        on_progress=show,
    )
    print(file=sys.stderr)
    export_bundle(
        model,
        bundle,
        name=f"{model.family}-study",
        operating_points={"balanced": (0.3,) * (model.num_exits - 1)},
        operating_point="balanced",
        provenance={"samples": [s.num_steps * s.batch_size for s in recipe.stages]},
        licence="a study; not for use",
    )
    return bundle


def score(
    bundle: Bundle,
    policy: ExitPolicy,
    sequences: Sequence[LabelledSequence],
    *,
    rules: TargetRules | None = None,
) -> list[SequenceResult]:
    """Track every sequence in closed loop, on one thread; by the bundle's own rules or others."""
    with edgetrack.Tracker(bundle, exit_policy=policy, rules=rules, num_threads=1) as tracker:
        return [evaluate_sequence(tracker, sequence) for sequence in sequences]


def time_in_turns(
    bundles: Mapping[str, Bundle], *, num_updates: int, num_rounds: int
) -> dict[str, tuple[float, ...]]:
    """Median ms of an update that stops at each exit; in every round each has its turn.

    Returns:
        Name → as many as the bundle has exits.
    """
    frames = list(render_clip(num_frames=num_updates + 1))
    times: dict[str, list[list[float]]] = {k: [[] for _ in b.segments] for k, b in bundles.items()}
    for _ in range(num_rounds):
        for name, bundle in bundles.items():
            with edgetrack.Tracker(bundle, backend="onnxruntime", num_threads=1) as tracker:
                for index, at_exit in enumerate(times[name]):
                    tracker.exit_policy = ExitPolicy.fixed(index, num_exits=bundle.num_exits)
                    tracker.init(frames[0][0], frames[0][1].tolist())
                    at_exit += [tracker.update(frame).latency_ms for frame, _ in frames[1:]]
    return {name: tuple(map(statistics.median, at_exits)) for name, at_exits in times.items()}


def num_parameters(model: SegmentedModel) -> int:
    """Trainable or not; statistics of batch norms are none."""
    return sum(p.numel() for p in model.parameters())


def _is_of(folder: Path, recipe: Recipe) -> bool:
    """Whether a run's folder is of this very recipe; training refuses it if not."""
    described = json.loads((folder / "recipe.json").read_text("utf-8"))
    return bool(described == json.loads(json.dumps(dataclasses.asdict(recipe))))
