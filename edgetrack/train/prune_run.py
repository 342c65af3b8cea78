"""Pruning from end to end: a dense bundle, a search, and a fine-tuned bundle for each budget."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from edgetrack.bundle import RESEARCH_LICENCE, Bundle
from edgetrack.errors import CheckpointError, TrainingError
from edgetrack.export import export_bundle
from edgetrack.models.general_distribution import GeneralDistributionModel
from edgetrack.models.ostrack import OSTrack
from edgetrack.models.registry import list_models, load_model
from edgetrack.models.segmented import SegmentedModel
from edgetrack.train.checkpoints import CHECKPOINT_NAME
from edgetrack.train.loop import Progress, load_trained
from edgetrack.train.prune import Pruned, learned_scores, magnitude_scores
from edgetrack.train.recipes import CALIBRATION_CLIPS, Recipe, Stage
from edgetrack.train.run import read_provenance, run_recipe
from edgetrack.train.sampling import DEFAULT_MIX

__all__ = ["PruneData", "export_pruned", "fine_tune", "open_dense", "rate_units"]

_Plan = tuple[tuple[str, float, float], ...]
# Objective, its share of the pairs, and its rate.
_GENERAL_DISTRIBUTION: _Plan = (("final_exit", 0.75, 8e-4), ("shallow_exits", 0.25, 1e-3))
_CENTER: _Plan = (("center_exit", 1.0, 1e-4),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneData:
    """What searches and fine-tunings learn from.

    Attributes:
        sources: Layout and root of each source of data.
        search_samples: Pairs of the search.
        samples: Pairs of each fine-tuning.
        batch_size: Pairs per step.
        learning_rate: Of the search.
        mix: Weights of sources, instead of the default.
        num_synthetic_clips: Rendered clips that join the data.
    """

    sources: Sequence[tuple[str, Path]]
    search_samples: int = 8_000
    samples: int = 8_000
    batch_size: int = 32
    learning_rate: float = 4e-4
    mix: Mapping[str, float] | None = None
    num_synthetic_clips: int = 48


def open_dense(path: Path, output: Path) -> tuple[Bundle, SegmentedModel]:
    """What is to be pruned: a bundle with weights, or the folder of a training run.

    A run is exported to ``<output>/dense`` first, with the thresholds, rules and licence that
    ``edgetrack export`` has by default.

    Raises:
        CheckpointError: It is neither; the message says what to pass.
    """
    if (path / CHECKPOINT_NAME).is_file():
        model, provenance = load_trained(path), read_provenance(path)
        bundle = export_bundle(
            model,
            output / "dense",
            name=provenance["recipe"]["model"],
            provenance=provenance,
            licence=RESEARCH_LICENCE,
            rules=model.rules,
        )
        return bundle, model
    if path.is_file():
        raise CheckpointError(
            f"{path}: expected a bundle or the folder of a training run, got a file; run: "
            f"edgetrack import {path} --family FAMILY --output BUNDLE, and prune that"
        )
    bundle = Bundle.load(path)
    try:
        return bundle, load_model(bundle)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; pass a bundle that has its trainable weights, as edgetrack export and "
            "edgetrack import write it, or the folder of a training run"
        ) from error


def rate_units(
    bundle: Bundle,
    model: SegmentedModel,
    output: Path,
    *,
    data: PruneData | None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Tensor]:
    """Scores of all units: by a search on data in ``<output>/search``, or by weights alone.

    Raises:
        CheckpointError: The folder holds a search of another bundle, on other data or with other
            settings.
        DataError: A source holds nothing to train on, or is malformed.
        TrainingError: The loss or a gate is not finite.
        ValueError: The family has no loss to search with.
    """
    if data is None:
        return magnitude_scores(model)
    stage = Stage(
        objective="slimming",
        samples=data.search_samples,
        batch_size=data.batch_size,
        learning_rate=data.learning_rate,
    )
    recipe = _recipe(bundle, model, "search", (stage,), data)
    folder = output / "search"
    return learned_scores(
        run_recipe(recipe, data.sources, folder, start=bundle, on_progress=on_progress)
    )


def fine_tune(
    bundle: Bundle,
    pruned: Pruned,
    output: Path,
    *,
    label: str,
    data: PruneData,
    on_progress: Callable[[Progress], None] | None = None,
) -> SegmentedModel:
    """Train what is left of a bundle, as its family is trained, in ``<output>/<label>``.

    Raises:
        CheckpointError: The folder holds a run of another bundle, of other units, on other data or
            with other settings.
        DataError: A source holds nothing to train on, or is malformed.
        TrainingError: The loss is not finite, or the family has no training without a teacher.
    """
    model = pruned.model
    if isinstance(model, GeneralDistributionModel):
        plan = _GENERAL_DISTRIBUTION
    elif isinstance(model, OSTrack):
        plan = _CENTER
    else:
        raise TrainingError(
            f"fine-tuning: expected General Distribution or CENTER heads, got {model.family}; "
            "prune without --data"
        )
    stages = tuple(
        Stage(
            objective=objective,
            samples=max(round(data.samples * share), 1),
            batch_size=data.batch_size,
            learning_rate=rate,
        )
        for objective, share, rate in plan
    )
    recipe = _recipe(bundle, model, label, stages, data, kept=pruned.kept)
    folder = output / label
    return run_recipe(
        recipe, data.sources, folder, start=bundle, weights=model, on_progress=on_progress
    )


def export_pruned(
    bundle: Bundle,
    model: SegmentedModel,
    pruned: Pruned,
    output: Path,
    *,
    budget: float,
    samples: int,
) -> Bundle:
    """Write a pruned model as a bundle, with the dense one's thresholds and rules.

    Thresholds that fit it better come from ``evaluate.exits.calibrate_exits``.

    Args:
        bundle: The dense one.
        model: ``pruned.model``, or what fine-tuning made of it.
        pruned: What was cut.
        output: The bundle's folder, replaced if it exists.
        budget: For the provenance.
        samples: Pairs of the fine-tuning; 0 without one.
    """
    provenance = {
        "pruning": {
            "budget": budget,
            "share_of_units": round(pruned.share, 4),
            "parameters": sum(p.numel() for p in model.parameters()),
            "floored": list(pruned.floored),
            "fine_tuning_samples": samples,
        },
        "dense": {
            "bundle": bundle.name,
            "digest": bundle.digest,
            "provenance": dict(bundle.provenance),
        },
    }
    return export_bundle(
        model,
        output,
        name=f"{bundle.name}-pruned-{budget:g}",
        operating_points=bundle.operating_points,
        operating_point=bundle.operating_point,
        provenance=provenance,
        licence=bundle.licence,
        criterion=bundle.criterion,
        rules=bundle.rules,
    )


def _recipe(
    bundle: Bundle,
    model: SegmentedModel,
    label: str,
    stages: tuple[Stage, ...],
    data: PruneData,
    *,
    kept: Mapping[str, Tensor] = MappingProxyType({}),
) -> Recipe:
    own: Any = bundle.provenance.get("recipe", {})
    clips = own.get("calibration_clips", CALIBRATION_CLIPS)
    variant = next(n for n in list_models() if n.startswith(f"{model.family}-"))
    # A run's folder is known by its recipe alone: the name tells what the other fields do not.
    key = _short_digest(
        [[name, str(root.resolve())] for name, root in data.sources],
        {name: numbers.tolist() for name, numbers in kept.items()},
    )
    return Recipe(
        name=re.sub(r"[^\w.-]", "-", f"{bundle.name}-{bundle.digest[:8]}-{label}-{key}"),
        model=variant,
        model_config=model.config_dict,
        stages=stages,
        num_synthetic_clips=data.num_synthetic_clips,
        calibration_clips=tuple(clips),
        mix=dict(DEFAULT_MIX if data.mix is None else data.mix),
    )


def _short_digest(*content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
