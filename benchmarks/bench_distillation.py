"""What distillation from a high resolution is worth to a low one.

    python benchmarks/bench_distillation.py DATA SEQUENCES [--start B] [--samples N]
        [--teacher-samples N] [--search-size 128] [--only NAME]

Trains a teacher (recipe ``loretrack-tiny-teacher``) and four students at one lower resolution, all
from the same weights, with the same pairs and rates: with both distillations, with either, with
none. They are scored in closed loop by the rules of the starting bundle; a gain is taken per
sequence, from the student without distillation, and its interval says how far it rests on the
choice of sequences. It says nothing of chance in training: one seed. A run that is done is not
trained again.

What each resolution costs and gives is for ``bench_families.py`` to say.
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
from edgetrack.runtime.target import TargetRules
from edgetrack.train.recipes import Recipe, get_recipe

# Student → factors on the weights of QKV-KD and Disc-KD.
STUDENTS = {"both": (1, 1), "QKV-KD alone": (1, 0), "Disc-KD alone": (0, 1), "none": (0, 0)}


def with_samples(recipe: Recipe, name: str, samples: int, **changes: Any) -> Recipe:
    """A recipe of one stage with another name and budget."""
    stage = dataclasses.replace(recipe.stages[0], samples=samples)
    return dataclasses.replace(recipe, name=slug(name), stages=(stage,), **changes)


def student(name: str, args: argparse.Namespace) -> Recipe:
    """The recipe of one student."""
    base = get_recipe("loretrack-tiny")
    qkv, disc = STUDENTS[name]
    weights = dataclasses.replace(
        base.loss_weights, qkv=qkv * base.loss_weights.qkv, disc=disc * base.loss_weights.disc
    )
    size = {"search_size_px": args.search_size, "template_size_px": args.search_size // 2}
    label = f"student {args.search_size} {name}"
    return with_samples(base, label, args.samples, loss_weights=weights, model_config=size)


def auc_of(path: Path, sequences: list[Any], rules: TargetRules) -> np.ndarray:
    """Success AUC of each sequence, with the last exit."""
    bundle = Bundle.load(path)
    policy = ExitPolicy.always_last(num_exits=bundle.num_exits)
    results = score(bundle, policy, sequences, rules=rules)
    return np.array([r.metrics.success_auc for r in results])


def distil(args: argparse.Namespace) -> None:
    """Train, score, print, write."""
    start = Bundle.load(args.start)
    sources = [parse_source(args.data)]
    teacher_recipe = with_samples(
        get_recipe("loretrack-tiny-teacher"), "teacher", args.teacher_samples
    )
    teacher = Bundle.load(
        train_and_export(teacher_recipe, sources, args.work, label="teacher", start=start)
    )
    bundles = {
        name: train_and_export(
            student(name, args), sources, args.work, label=name, start=start, teacher=teacher
        )
        for name in args.only or STUDENTS
    }
    if args.train_only:
        return
    sequences, rules = list(read_sequences(args.sequences)), TargetRules.of(start.rules)
    paths = {"start": start.path, "teacher": teacher.path, **bundles}
    aucs = {name: auc_of(path, sequences, rules) for name, path in paths.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, auc in aucs.items():
        rows[name] = {"auc": float(auc.mean()), "auc_per_sequence": auc.round(4).tolist()}
        text = f"{name:16s} AUC {auc.mean():.3f}"
        if name in STUDENTS and name != "none" and "none" in aucs:
            gain = auc - aucs["none"]
            low, high = rows[name]["interval_95"] = bootstrap_interval(gain, seed=0)
            rows[name]["gain"] = float(gain.mean())
            text += f"  gain {gain.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        print(text, flush=True)
    content = {
        "start": {"bundle": start.name, "digest": start.digest},
        "teacher_search_size_px": teacher.crops.search_size_px,
        "student_search_size_px": args.search_size,
        "teacher_samples": args.teacher_samples,
        "samples": args.samples,
        "batch_size": teacher_recipe.stages[0].batch_size,
        "learning_rate": teacher_recipe.stages[0].learning_rate,
        "seeds": 1,
        "cpus": os.cpu_count(),
        "sequences": [sequence.name for sequence in sequences],
        "runs": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def main() -> None:
    args = _arguments()
    try:
        distil(args)
    except (EdgeTrackError, ValueError, OSError) as error:
        raise SystemExit(f"bench_distillation.py: {error}") from error


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", help="as for edgetrack train --data")
    parser.add_argument("sequences", type=Path)
    parser.add_argument("--start", type=Path, help="whose weights to start from [default: shipped]")
    parser.add_argument("--search-size", type=int, default=128, help="of the students, px")
    parser.add_argument("--samples", type=int, default=4_800, help="pairs of each student")
    parser.add_argument("--teacher-samples", type=int, default=6_400)
    parser.add_argument("--only", action="append", choices=STUDENTS, help="one student; repeat")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/resolution"))
    parser.add_argument("--output", type=Path, default=RESULTS / "resolution_distillation-cpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
