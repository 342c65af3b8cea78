"""Was exit 0 crippled by what follows it? The same weights, set free to serve exit 0 alone.

    python benchmarks/bench_standalone.py DATA SEQUENCES [--bundle B] [--samples N] [--seeds 0,1]

Cuts a bundle's model off behind exit 0 and trains all that is left (stem, correlation, exit) end to
end, as a stand-alone model of that depth would be, from where the bundle's own training left it. If
that gains much, exit 0 was held back by a trunk that is trained for the last exit. Both are scored
in closed loop.
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


def recipe(args: argparse.Namespace, seed: int) -> Recipe:
    """Exit 0 and what it needs, with nothing frozen, at half the recipe's rate."""
    base = get_recipe(args.recipe)
    stage = dataclasses.replace(
        base.stages[0],
        samples=args.samples,
        learning_rate=base.stages[0].learning_rate / 2,
        frozen_stem_share=0.0,
    )
    return dataclasses.replace(
        base,
        name=slug(f"exit 0 alone, seed {seed}"),
        stages=(stage, base.stages[1]),
        model_config={"exit_after": (0,)},
        seed=seed,
    )


def aucs_of_exit_0(path: Path, sequences: list[Any], rules: TargetRules) -> np.ndarray:
    """Success AUC of each sequence, always with exit 0, by the same rules for all."""
    bundle = Bundle.load(path)
    policy = ExitPolicy.fixed(0, num_exits=bundle.num_exits)
    results = score(bundle, policy, sequences, rules=rules)
    return np.array([r.metrics.success_auc for r in results])


def run(args: argparse.Namespace) -> None:
    """Train, score, print, write."""
    sequences = list(read_sequences(args.sequences))
    start = Bundle.load(args.bundle)
    rules = TargetRules.of(start.rules)
    within = aucs_of_exit_0(start.path, sequences, rules)
    print(f"within {start.name}: AUC of exit 0 {within.mean():.3f}", flush=True)
    alone = []
    for seed in args.seeds:
        path = train_and_export(
            recipe(args, seed),
            [parse_source(args.data)],
            args.work,
            label=f"exit 0 alone, seed {seed}",
            start=start,
        )
        alone.append(aucs_of_exit_0(path, sequences, rules))
        print(f"alone, seed {seed}: {alone[-1].mean():.3f}", flush=True)
    differences = within - np.mean(alone, 0)
    low, high = bootstrap_interval(differences, seed=0)
    print(f"within - alone: {differences.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
    content = {
        "bundle": {"name": start.name, "digest": start.digest},
        "samples": args.samples,
        "cpus": os.cpu_count(),
        "sequences": [sequence.name for sequence in sequences],
        "auc_within": float(within.mean()),
        "auc_alone": {seed: float(a.mean()) for seed, a in zip(args.seeds, alone, strict=True)},
        "difference": float(differences.mean()),
        "interval_95": [low, high],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def main() -> None:
    args = _arguments()
    try:
        run(args)
    except (EdgeTrackError, ValueError, OSError) as error:
        raise SystemExit(f"bench_standalone.py: {error}") from error


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(value) for value in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", help="as for edgetrack train --data")
    parser.add_argument("sequences", type=Path)
    parser.add_argument("--recipe", default="early_exit_vit-tiny")
    parser.add_argument("--bundle", type=Path, help="whose exit 0 [default: the one that ships]")
    parser.add_argument("--samples", type=int, default=32_000)
    parser.add_argument("--seeds", type=numbers, default=[0], help="0,1,2")
    parser.add_argument("--work", type=Path, default=Path("runs/standalone"))
    parser.add_argument("--output", type=Path, default=RESULTS / "standalone-cpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
