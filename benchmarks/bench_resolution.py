"""What distillation from a high resolution is worth to a low one, and what each resolution costs.

    python benchmarks/bench_resolution.py distil DATA SEQUENCES [--start B] [--samples N]
        [--teacher-samples N] [--search-size 128] [--only NAME]
    python benchmarks/bench_resolution.py ladder SEQUENCES BUNDLE... [--rules BUNDLE]

``distil`` trains a teacher (recipe ``loretrack-tiny-teacher``) and four students at one lower
resolution, all from the same weights, with the same pairs and rates: with both distillations, with
either, with none. It scores them in closed loop by the rules of the starting bundle; a gain is
taken per sequence, from the student without distillation, and its interval says how far it rests on
the choice of sequences. It says nothing of chance in training: one seed. A run that is done is not
trained again.

``ladder`` scores bundles of several resolutions in closed loop, and times each on one thread, all
in one run: AUC, products and milliseconds side by side, and as a plot.
"""

import argparse
import dataclasses
import json
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from study import RESULTS, score, slug, time_in_turns, train_and_export

from edgetrack.bundle import Bundle
from edgetrack.data.layouts import parse_source
from edgetrack.data.sequences import read_sequences
from edgetrack.errors import EdgeTrackError
from edgetrack.evaluate.metrics import bootstrap_interval
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules
from edgetrack.train.recipes import Recipe, get_recipe
from edgetrack.viz import plot_curves

# Student → factors on the weights of QKV-KD and Disc-KD.
STUDENTS = {"both": (1, 1), "QKV-KD alone": (1, 0), "Disc-KD alone": (0, 1), "none": (0, 0)}


_NUM_UPDATES, _NUM_ROUNDS = 30, 4


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
    write(
        args.output or RESULTS / "resolution_distillation-cpu.json",
        {
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
        },
    )


def ladder(args: argparse.Namespace) -> None:
    """Score and time, print, plot, write."""
    sequences = list(read_sequences(args.sequences))
    rules = TargetRules.of(Bundle.load(args.rules).rules)
    loaded = {str(path): Bundle.load(path) for path in args.bundles}
    ms = time_in_turns(loaded, num_updates=_NUM_UPDATES, num_rounds=_NUM_ROUNDS)
    rows = []
    for path in args.bundles:
        bundle = loaded[str(path)]
        policy = ExitPolicy.always_last(num_exits=bundle.num_exits)
        results = score(bundle, policy, sequences, rules=rules)
        row = {
            "bundle": path.parent.name if path.name == "bundle" else path.name,
            "search_size_px": bundle.crops.search_size_px,
            "auc": statistics.mean(r.metrics.success_auc for r in results),
            "precision_20px": statistics.mean(r.metrics.precision_20px for r in results),
            "gmacs": bundle.exit_macs[-1] / 1e9,
            "ms": ms[str(path)],
            "pairs_seen": bundle.provenance.get("samples"),
        }
        rows.append(row)
        print(
            f"{row['search_size_px']:4d} px  AUC {row['auc']:.3f}  P20 {row['precision_20px']:.3f}"
            f"  {row['gmacs']:.3f} GMACs  {row['ms']:5.1f} ms  {row['bundle']}",
            flush=True,
        )
    output = args.output or RESULTS / "resolution_ladder-cpu-onnxruntime-fp32.json"
    write(output, {"threads": 1, "cpus": os.cpu_count(), "bundles": rows})
    by_size = sorted(rows, key=lambda row: row["search_size_px"])
    plot_curves(
        {
            f"{row['search_size_px']} px, {row['bundle']}": [(row["ms"], row["auc"])]
            for row in by_size
        },
        output.with_suffix(".png"),
        x_label="median ms of an update, one thread",
        y_label="success AUC",
        title="the same trunk at several resolutions",
    )


def write(output: Path, content: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def main() -> None:
    args = _arguments()
    try:
        args.run(args)
    except (EdgeTrackError, ValueError, OSError) as error:
        raise SystemExit(f"bench_resolution.py: {error}") from error


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("distil", help="what distillation is worth at equal budget")
    one.add_argument("data", help="as for edgetrack train --data")
    one.add_argument("sequences", type=Path)
    one.add_argument("--start", type=Path, help="whose weights to start from [default: shipped]")
    one.add_argument("--search-size", type=int, default=128, help="of the students, px")
    one.add_argument("--samples", type=int, default=4_800, help="pairs of each student")
    one.add_argument("--teacher-samples", type=int, default=6_400)
    one.add_argument("--only", action="append", choices=STUDENTS, help="one student; repeat")
    one.add_argument("--train-only", action="store_true")
    one.add_argument("--work", type=Path, default=Path("runs/resolution"))
    one.set_defaults(run=distil)
    other = commands.add_parser("ladder", help="accuracy and cost of several resolutions")
    other.add_argument("sequences", type=Path)
    other.add_argument("bundles", type=Path, nargs="+")
    other.add_argument("--rules", type=Path, help="bundle whose rules all follow [shipped]")
    other.set_defaults(run=ladder)
    for command in (one, other):
        command.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
