"""Was exit 0 crippled by what follows it? A model that is exit 0 alone, with the same budget.

    python benchmarks/bench_standalone.py DATA SEQUENCES [--stem S] [--samples N,M] [--seeds 0,1,2]
        [--pseudo-tracks F]

Trains, under each seed, the whole model as its recipe says (N pairs for the trunk and the last
exit, M for the shallow ones), and a model cut off behind exit 0 that sees all N + M pairs and whose
stem and correlation serve nothing else. Both are scored in closed loop with exit 0.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from study import RESULTS, score, slug, train_and_export

from edgetrack.bundle import Bundle
from edgetrack.data.layouts import parse_source
from edgetrack.data.sequences import read_sequences
from edgetrack.errors import EdgeTrackError
from edgetrack.evaluate.metrics import bootstrap_interval
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.train.recipes import Recipe, Stage, get_recipe


def with_budget(recipe: Recipe, samples: tuple[int, int], *, name: str, seed: int) -> Recipe:
    """A recipe of another size."""
    stages: tuple[Stage, Stage] = (
        dataclasses.replace(recipe.stages[0], samples=samples[0]),
        dataclasses.replace(recipe.stages[1], samples=samples[1]),
    )
    return dataclasses.replace(recipe, name=slug(name), stages=stages, seed=seed)


def recipes(args: argparse.Namespace) -> dict[str, Recipe]:
    """Name of each run → its recipe; the whole models are those of ``bench_ablation.py``."""
    base = get_recipe(args.recipe)
    first, second = args.samples
    cut = dataclasses.replace(base, model_config={"exit_after": (0,)})
    runs = {}
    for seed in args.seeds:
        whole, alone = f"all, seed {seed}", f"exit 0 alone, seed {seed}"
        runs[whole] = with_budget(base, (first, second), name=whole, seed=seed)
        runs[alone] = with_budget(cut, (first + second, second), name=alone, seed=seed)
    return runs


def run(args: argparse.Namespace) -> None:
    """Train, score, print, write."""
    sequences = list(read_sequences(args.sequences))
    aucs: dict[str, np.ndarray] = {}
    for name, recipe in recipes(args).items():
        path = train_and_export(
            recipe,
            [parse_source(args.data)],
            args.work,
            label=name,
            stem=args.stem,
            pseudo_tracks=args.pseudo_tracks,
        )
        bundle = Bundle.load(path)
        policy = ExitPolicy.fixed(0, num_exits=bundle.num_exits)
        aucs[name] = np.array(
            [r.metrics.success_auc for r in score(bundle, policy, sequences)], np.float64
        )
        print(f"{name:24s} AUC of exit 0: {aucs[name].mean():.3f}")
    alone = np.mean([v for k, v in aucs.items() if k.startswith("exit 0")], 0)
    within = np.mean([v for k, v in aucs.items() if k.startswith("all")], 0)
    low, high = bootstrap_interval(within - alone, seed=0)
    print(f"within the model - alone: {(within - alone).mean():+.3f} [{low:+.3f}, {high:+.3f}]")
    content = {
        "recipe": args.recipe,
        "samples": args.samples,
        "cpus": os.cpu_count(),
        "sequences": [sequence.name for sequence in sequences],
        "auc_of_exit_0": {name: float(values.mean()) for name, values in aucs.items()},
        "difference": float((within - alone).mean()),
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
    parser.add_argument("--stem", type=Path, help="pretrained ShuffleNetV2 stem, .npz")
    parser.add_argument("--samples", type=numbers, default=[24_000, 6_000], help="N,M")
    parser.add_argument("--pseudo-tracks", type=Path)
    parser.add_argument("--seeds", type=numbers, default=[0], help="0,1,2")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--output", type=Path, default=RESULTS / "standalone-cpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
