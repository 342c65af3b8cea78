"""Bundles of any family side by side: accuracy, products, parameters and time at each exit.

    python benchmarks/bench_families.py SEQUENCES BUNDLE... [--rules BUNDLE] [--output FILE]

Every exit of every bundle is scored in closed loop, as if there were no other, and so is the
default operating point; every exit is timed on one thread, all in one run, in turns on the same
frames. Results are a table, JSON and a plot. Each bundle follows its own rules of the target's
state; ``--rules`` gives all of them one bundle's, which is fair to copies of one trunk, such as a
ladder of resolutions.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from study import RESULTS, num_parameters, score, time_in_turns

from edgetrack.bundle import Bundle
from edgetrack.data.sequences import Sequence, read_sequences
from edgetrack.errors import EdgeTrackError
from edgetrack.models.registry import load_model
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules
from edgetrack.viz import plot_curves

_NUM_UPDATES, _NUM_ROUNDS = 30, 6


def label_of(path: Path) -> str:
    """What a bundle is called here: its folder, or the run's that it lies in."""
    path = path.resolve()
    return path.parent.name if path.name == "bundle" else path.name


def accuracy(
    bundle: Bundle, policy: ExitPolicy, sequences: list[Sequence], rules: TargetRules | None
) -> dict[str, Any]:
    """Closed loop over all sequences."""
    results = score(bundle, policy, sequences, rules=rules)
    taken = [row.exit_index for result in results for row in result.rows[1:]]
    return {
        "auc": statistics.mean(r.metrics.success_auc for r in results),
        "precision_20px": statistics.mean(r.metrics.precision_20px for r in results),
        "auc_per_sequence": [round(r.metrics.success_auc, 4) for r in results],
        "share_of_exits": [round(taken.count(k) / len(taken), 3) for k in range(bundle.num_exits)],
    }


def row_of(
    bundle: Bundle, sequences: list[Sequence], rules: TargetRules | None, ms: tuple[float, ...]
) -> dict[str, Any]:
    """All that is said of one bundle."""
    exits = []
    for index in range(bundle.num_exits):
        policy = ExitPolicy.fixed(index, num_exits=bundle.num_exits)
        costs = {"gmacs": bundle.exit_macs[index] / 1e9, "ms": ms[index]}
        exits.append(costs | accuracy(bundle, policy, sequences, rules))
    row = {
        "family": bundle.family,
        "digest": bundle.digest,
        "search_size_px": bundle.crops.search_size_px,
        "parameters": num_parameters(load_model(bundle)),
        "samples": bundle.provenance.get("samples"),
        "exits": exits,
    }
    if bundle.num_exits > 1:
        policy = ExitPolicy.below(
            bundle.thresholds(), criterion=bundle.criterion, num_exits=bundle.num_exits
        )
        row[bundle.operating_point] = accuracy(bundle, policy, sequences, rules)
    return row


def main() -> None:
    """Time, score, print, plot, write."""
    args = _arguments()
    try:
        bundles = {label_of(path): Bundle.load(path) for path in args.bundles}
        if len(bundles) < len(args.bundles):
            raise ValueError(f"bundles: expected folders of different names, got {args.bundles}")
        rules = None if args.rules is None else TargetRules.of(Bundle.load(args.rules).rules)
        sequences = list(read_sequences(args.sequences))
        ms = time_in_turns(bundles, num_updates=_NUM_UPDATES, num_rounds=_NUM_ROUNDS)
        rows = {}
        for label, bundle in bundles.items():
            rows[label] = row_of(bundle, sequences, rules, ms[label])
            show(label, rows[label])
        output = args.output or RESULTS / "families-cpu-onnxruntime-fp32.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "threads": 1,
            "cpus": os.cpu_count(),
            "updates": _NUM_UPDATES * _NUM_ROUNDS,
            "sequences": [sequence.name for sequence in sequences],
            "bundles": rows,
        }
        output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        plot_curves(
            {label: [(e["ms"], e["auc"]) for e in row["exits"]] for label, row in rows.items()},
            output.with_suffix(".png"),
            x_label="median ms of an update, one thread",
            y_label="success AUC",
            title="what each exit costs and gives",
        )
    except (EdgeTrackError, ValueError, OSError) as error:
        raise SystemExit(f"bench_families.py: {error}") from error


def show(label: str, row: dict[str, Any]) -> None:
    """A line per exit, and one for the default operating point."""
    size = f"{row['search_size_px']} px, {row['parameters'] / 1e6:.1f} M"
    for index, at in enumerate(row["exits"]):
        costs = f"{at['gmacs']:.3f} GMACs  {at['ms']:6.2f} ms"
        text = f"AUC {at['auc']:.3f}  P20 {at['precision_20px']:.3f}  {costs}"
        print(f"{label:28s} {size:16s} exit {index}  {text}", flush=True)
    for name, at in row.items():
        if isinstance(at, dict):
            text = f"AUC {at['auc']:.3f}  P20 {at['precision_20px']:.3f}"
            print(f"{label:28s} {size:16s} {name}  {text}  {at['share_of_exits']}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("sequences", type=Path)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rules", type=Path, help="bundle whose rules all follow [each its own]")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
