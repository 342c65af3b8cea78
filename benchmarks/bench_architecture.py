"""What each choice of architecture is worth at one training budget, beside its time on a CPU.

    python benchmarks/bench_architecture.py DATA SEQUENCES [--stem STEM.npz] [--only NAME]

Every variant is trained from scratch on the same pairs, exported, and scored in closed loop with
always the last exit and always the first, forwards and backwards; times are medians of updates on
one thread, in turns. A variant that is done is not trained again.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from study import RESULTS, score, slug, time_in_turns, train_and_export

from edgetrack.backends.ort import cpu_name
from edgetrack.bundle import Bundle
from edgetrack.data.layouts import parse_source
from edgetrack.data.sequences import read_sequences
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.train.recipes import Stage, get_recipe

# What the first bundle was that shipped; blocks are added or removed so that full depth costs about
# the same, where that can be done.
FIRST: dict[str, Any] = {"template_size_px": 64, "search_size_px": 128, "exit_after": (0, 3, 6)}
CHANGES: dict[str, dict[str, Any]] = {
    "128 px, 6 blocks": {},
    "exits after 1, 3, 6 blocks": {"exit_after": (1, 3, 6)},
    "patch stem, 10 blocks": {"stem": "patch", "correlation_dim": 0, "exit_after": (2, 5, 10)},
    "no correlation prior": {"correlation_dim": 0, "exit_after": (1, 4, 7)},
    "width 192, 4 blocks": {"dim": 192, "num_heads": 6, "exit_after": (0, 2, 4)},
    "width 128, 9 blocks": {"dim": 128, "num_heads": 4, "exit_after": (0, 4, 9)},
    "8 blocks": {"exit_after": (0, 3, 8)},
    "3 blocks": {"exit_after": (0, 1, 3)},
    "160 px, 4 blocks": {"template_size_px": 80, "search_size_px": 160, "exit_after": (0, 2, 4)},
    "heads at stride 16": {"head_upsample": 1, "exit_after": (1, 3, 6)},
    "33 bins": {"num_bins": 33, "bin_size": 1 / 52},
    "9 bins": {"num_bins": 9, "bin_size": 1 / 13},
}
VARIANTS = {name: FIRST | changes for name, changes in CHANGES.items()}


def train(name: str, changes: dict[str, Any], args: argparse.Namespace) -> Path:
    """Train and export one variant, unless that was done."""
    stages = (
        Stage(
            objective="final_exit",
            samples=args.samples,
            learning_rate=1e-3,
            frozen_stem_share=1.0,
        ),
        Stage(objective="shallow_exits", samples=args.samples // 4, learning_rate=1e-3),
    )
    recipe = dataclasses.replace(
        get_recipe("early_exit_vit-tiny"), name=slug(name), model_config=changes, stages=stages
    )
    stem = None if changes.get("stem") == "patch" else args.stem
    return train_and_export(recipe, [parse_source(args.data)], args.work, label=name, stem=stem)


def evaluate(path: Path, sequences: list[Any]) -> dict[str, Any]:
    """Products, parameters, and mean AUC and precision of the last and the first exit."""
    bundle = Bundle.load(path)
    turned = [sequence.backwards() for sequence in sequences]
    row: dict[str, Any] = {
        "parameters": sum_parameters(path),
        "macs": bundle.exit_macs[-1],
    }
    for label, policy in {
        "last": ExitPolicy.always_last(num_exits=bundle.num_exits),
        "first": ExitPolicy.fixed(0, num_exits=bundle.num_exits),
    }.items():
        results, back = score(bundle, policy, sequences), score(bundle, policy, turned)
        row[f"auc_{label}"] = statistics.mean(r.metrics.success_auc for r in results)
        row[f"precision_{label}"] = statistics.mean(r.metrics.precision_20px for r in results)
        row[f"auc_both_ways_{label}"] = statistics.mean(
            r.metrics.success_auc for r in (*results, *back)
        )
    return row


def sum_parameters(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path / "weights.safetensors", "np") as file:
        return sum(file.get_tensor(key).size for key in file.keys())  # noqa: SIM118


def main() -> None:
    args = _arguments()
    names = args.only or list(VARIANTS)
    bundles = {name: train(name, VARIANTS[name], args) for name in names}
    if args.train_only:
        return
    sequences = list(read_sequences(args.sequences))
    rows = {name: evaluate(path, sequences) for name, path in bundles.items()}
    times = time_in_turns(
        {name: Bundle.load(path) for name, path in bundles.items()}, num_updates=20, num_rounds=10
    )
    for name, at_exits in times.items():
        rows[name]["ms_at_exits"] = at_exits
    content = {"samples": args.samples, "device": cpu_name(), "variants": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    for name, row in sorted(rows.items(), key=lambda kv: -kv[1]["auc_both_ways_last"]):
        print(
            f"{name:30s} last {row['auc_last']:.3f}, both ways {row['auc_both_ways_last']:.3f}; "
            f"first {row['auc_first']:.3f}, both ways {row['auc_both_ways_first']:.3f}; "
            f"{row['ms_at_exits'][-1]:5.1f} / {row['ms_at_exits'][0]:.1f} ms, "
            f"{row['macs'] / 1e6:.0f} MMACs, {row['parameters'] / 1e6:.2f} M"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", help="as for edgetrack train --data")
    parser.add_argument("sequences", type=Path)
    parser.add_argument("--stem", type=Path)
    parser.add_argument("--samples", type=int, default=24_000)
    parser.add_argument("--only", action="append", help="one variant; repeat")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/architecture"))
    parser.add_argument("--output", type=Path, default=RESULTS / "architecture-cpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
