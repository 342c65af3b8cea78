"""What each rule of the target's state is worth, one at a time and together, in closed loop.

    python benchmarks/bench_rules.py DATA_ROOT [--bundle B]

Always the last exit, one thread, forwards and backwards; differences to no rule at all are those of
the mean of both ways, with a paired bootstrap over the sequences. See
``edgetrack/runtime/target.py`` for the rules.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgetrack.bundle import Bundle
from edgetrack.data.sequences import read_sequences
from edgetrack.evaluate.metrics import bootstrap_interval
from edgetrack.evaluate.protocols import evaluate_sequence
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules
from edgetrack.tracker import Tracker

RESULTS = Path(__file__).parent / "results"
WIDER = {"unsure_score": 0.5, "search_growth": 1.4, "patience": 2}
LOST = {"lost_after": 8, "found_score": 0.6}

VARIANTS: dict[str, dict[str, float]] = {
    "none": {},
    "size smoothing 0.2": {"size_smoothing": 0.2},
    "size smoothing 0.35": {"size_smoothing": 0.35},
    "centre smoothing 0.15": {"centre_smoothing": 0.15},
    "size change at most 1.1": {"max_size_change": 1.1},
    "size change at most 1.3": {"max_size_change": 1.3},
    "hold the size when unsure": {"unsure_score": 0.5, "size_hold": 1.0},
    "look 1.25 wider when unsure": {**WIDER, "search_growth": 1.25},
    "look 1.4 wider when unsure": WIDER,
    "look 1.7 wider when unsure": {**WIDER, "search_growth": 1.7},
    "look 1.4 wider below 0.4": {**WIDER, "unsure_score": 0.4},
    "look 1.4 wider below 0.6": {**WIDER, "unsure_score": 0.6},
    "look 1.4 wider after 1 frame": {**WIDER, "patience": 1},
    "look 1.4 wider after 4 frames": {**WIDER, "patience": 4},
    "wider, look around when lost": {**WIDER, **LOST, "look_around": 0.4},
    "wider, hold the size": {**WIDER, "size_hold": 1.0},
    "wider, hold 0.6 of the size": {**WIDER, "size_hold": 0.6},
    "wider, size smoothing 0.2": {**WIDER, "size_smoothing": 0.2},
    "wider, size smoothing 0.35": {**WIDER, "size_smoothing": 0.35},
}


def main() -> None:
    args = _arguments()
    bundle, sequences = Bundle.load(args.bundle), list(read_sequences(args.root))
    policy = ExitPolicy.always_last(num_exits=bundle.num_exits)
    rows: dict[str, dict[str, Any]] = {}
    own = {"the bundle's own": dict(bundle.rules)}
    for name, rules in {**VARIANTS, **own}.items():
        print(f"\r{name:40s}", end="", file=sys.stderr)
        chosen = TargetRules.of(rules)
        with Tracker(bundle, exit_policy=policy, rules=chosen, num_threads=1) as tracker:
            results = [evaluate_sequence(tracker, s) for s in sequences]
            back = [evaluate_sequence(tracker, s.backwards()) for s in sequences]
        aucs, aucs_back = ([r.metrics.success_auc for r in each] for each in (results, back))
        both = np.mean([aucs, aucs_back], 0)
        gaps = both - (rows["none"]["auc_both_ways_per_sequence"] if rows else both)
        low, high = bootstrap_interval(gaps, seed=0)
        rows[name] = {
            "rules": rules,
            "auc": float(np.mean(aucs)),
            "precision_20px": float(np.mean([r.metrics.precision_20px for r in results])),
            "gain": float(gaps.mean()),
            "gain_low": low,
            "gain_high": high,
            "auc_both_ways": float(both.mean()),
            "auc_per_sequence": aucs,
            "auc_both_ways_per_sequence": both.tolist(),
        }
    print(file=sys.stderr)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"bundle": bundle.name, "digest": bundle.digest, "variants": rows}
    args.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    for name, row in rows.items():
        print(
            f"{name:32s} AUC {row['auc']:.4f}  P20 {row['precision_20px']:.4f}  "
            f"both ways {row['auc_both_ways']:.4f}  "
            f"{row['gain']:+.4f} [{row['gain_low']:+.4f}, {row['gain_high']:+.4f}]"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("root", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS / "rules-cpu-onnxruntime-fp32.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
