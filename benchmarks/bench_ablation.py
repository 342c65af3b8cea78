"""What each source of training pairs is worth: the same budget, one source left out at a time.

    python benchmarks/bench_ablation.py DATA SEQUENCES [--stem S] [--start B] [--samples N,M]
        [--pseudo-tracks F] [--only NAME] [--seeds 0,1,2]

Every run is trained alike but for its mix, in which a source that is left out is replaced by more
of all others; then exported, and scored in closed loop with always the last exit, forwards as
``edgetrack eval`` does and backwards. ``all`` is trained under every seed, the rest under the first
one. A difference is that of the mean of both ways, per sequence, from the mean of ``all`` over its
seeds; its interval says how far it rests on the choice of sequences, and the spread of ``all`` over
its seeds how far on chance in training: believe what exceeds both. Cutouts of a set that is left
out are still pasted. A run that is done is not trained again.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from study import RESULTS, score, slug, train_and_export

from edgetrack.bundle import Bundle
from edgetrack.data.layouts import parse_source
from edgetrack.data.sequences import read_sequences
from edgetrack.errors import EdgeTrackError
from edgetrack.evaluate.metrics import bootstrap_interval
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.train.recipes import Recipe, get_recipe
from edgetrack.viz import plot_curves

GROUPS: dict[str, tuple[str, ...]] = {
    "labelled video": ("video",),
    "small still objects": ("fod",),
    "linked detections": ("tracks",),
    "pseudo-tracks": ("pseudo",),
    "rendered clips": ("extra",),
    "still pictures with boxes": ("coco_mini", "map_demo", "ccp_people"),
    "segmented regions": ("bsds500",),
    "unlabelled photos": ("imagenet_sample", "rbox"),
    "pasted cutouts": ("paste",),
}


def recipes(args: argparse.Namespace) -> dict[str, Recipe]:
    """Name of each run → its recipe."""
    base = get_recipe(args.recipe)
    stages = tuple(
        dataclasses.replace(stage, samples=samples)
        for stage, samples in zip(base.stages, args.samples, strict=True)
    )

    def recipe(name: str, seed: int, left_out: tuple[str, ...] = ()) -> Recipe:
        kept = {k: v for k, v in base.mix.items() if k not in left_out}
        return dataclasses.replace(base, name=slug(name), stages=stages, mix=kept, seed=seed)

    runs = {f"all, seed {seed}": recipe(f"all, seed {seed}", seed) for seed in args.seeds}
    groups = {name: group for name, group in GROUPS.items() if base.mix.keys() & set(group)}
    left_out = {name: recipe(name, args.seeds[0], group) for name, group in groups.items()}
    return runs | {name: _without_second_stage(chosen) for name, chosen in left_out.items()}


def _without_second_stage(recipe: Recipe) -> Recipe:
    """One step of it: it does not change the last exit, which is what is scored."""
    first, second = recipe.stages
    second = dataclasses.replace(second, samples=second.batch_size)
    return dataclasses.replace(recipe, stages=(first, second))


def evaluate(path: Path, sequences: list[Any]) -> dict[str, np.ndarray]:
    """AUC and precision of each sequence with the last exit; AUC of both directions, too."""
    bundle = Bundle.load(path)
    policy = ExitPolicy.always_last(num_exits=bundle.num_exits)
    results = score(bundle, policy, sequences)
    back = score(bundle, policy, [sequence.backwards() for sequence in sequences])
    auc, auc_back = (np.array([r.metrics.success_auc for r in rs]) for rs in (results, back))
    return {
        "auc": auc,
        "precision_20px": np.array([r.metrics.precision_20px for r in results]),
        "auc_both_ways": (auc + auc_back) / 2,
    }


def summarise(found: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Means of each run, and its difference to ``all``, with an interval."""
    whole = [row["auc_both_ways"] for name, row in found.items() if name.startswith("all, ")]
    reference = np.mean(whole, 0) if whole else None
    rows = {}
    for name, row in found.items():
        rows[name] = {
            **{key: float(values.mean()) for key, values in row.items()},
            "auc_per_sequence": row["auc"].round(4).tolist(),
        }
        if reference is not None:
            differences = row["auc_both_ways"] - reference
            rows[name]["difference"] = float(differences.mean())
            rows[name]["interval_95"] = bootstrap_interval(differences, seed=0)
    return rows


def plot(rows: dict[str, dict[str, Any]], out_png: Path, *, title: str) -> None:
    """An interval for each run, and the seeds of ``all`` as points of one row."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, row in rows.items():
        if name.startswith("all, "):
            curves.setdefault("all, under each seed", []).append((row["difference"], 0))
        else:
            low, high = row["interval_95"]
            height = -len(curves) if curves else -1
            curves[name] = [(x, height) for x in (low, row["difference"], high)]
    plot_curves(
        curves,
        out_png,
        x_label="difference of mean AUC, both ways, to all sources, 95 % over sequences",
        y_label="source left out, as in the legend",
        title=title,
    )


def run(args: argparse.Namespace) -> None:
    """Train, score, print, write."""
    planned = recipes(args)
    names = args.only or list(planned)
    if unknown := set(names) - planned.keys():
        raise ValueError(f"--only: expected some of {list(planned)}, got {sorted(unknown)}")
    start = None if args.start is None else Bundle.load(args.start)
    bundles = {
        name: train_and_export(
            planned[name],
            [parse_source(args.data)],
            args.work,
            label=name,
            stem=args.stem,
            start=start,
            pseudo_tracks=args.pseudo_tracks,
        )
        for name in names
    }
    if args.train_only:
        return
    sequences = list(read_sequences(args.sequences))
    rows = summarise({name: evaluate(path, sequences) for name, path in bundles.items()})
    for name, row in rows.items():
        low, high = row.get("interval_95", (np.nan, np.nan))
        print(
            f"{name:28s} AUC {row['auc']:.3f}  P20 {row['precision_20px']:.3f}  "
            f"both ways {row['auc_both_ways']:.3f}  "
            f"{row.get('difference', np.nan):+.3f} [{low:+.3f}, {high:+.3f}]"
        )
    whole = [row["auc_both_ways"] for name, row in rows.items() if name.startswith("all, ")]
    content = {
        "recipe": args.recipe,
        "samples": args.samples,
        "config": Bundle.load(next(iter(bundles.values()))).config,
        "start": None if start is None else {"bundle": start.name, "digest": start.digest},
        "stem": None if args.stem is None else args.stem.name,
        "mixes": {name: dict(planned[name].mix) for name in names},
        "cpus": os.cpu_count(),
        "sequences": [sequence.name for sequence in sequences],
        "auc_std_over_seeds": float(np.std(whole, ddof=1)) if len(whole) > 1 else None,
        "runs": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    if whole:
        title = f"{args.samples[0]} + {args.samples[1]} pairs"
        plot(rows, args.output.with_suffix(".png"), title=title)


def main() -> None:
    args = _arguments()
    try:
        run(args)
    except (EdgeTrackError, ValueError, OSError) as error:
        raise SystemExit(f"bench_ablation.py: {error}") from error


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(value) for value in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", help="as for edgetrack train --data")
    parser.add_argument("sequences", type=Path)
    parser.add_argument("--recipe", default="early_exit_vit-tiny")
    parser.add_argument("--stem", type=Path, help="pretrained ShuffleNetV2 stem, .npz")
    parser.add_argument("--start", type=Path, help="bundle whose weights to start from")
    parser.add_argument("--samples", type=numbers, default=[24_000, 6_000], help="N,M")
    parser.add_argument("--pseudo-tracks", type=Path)
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="of all: 0,1,2")
    parser.add_argument("--only", action="append", help="one run, such as 'all, seed 0'; repeat")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--output", type=Path, default=RESULTS / "ablation-cpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
