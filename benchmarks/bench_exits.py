"""What every exit says on the same crops: does depth pay, does the criterion know?

    python benchmarks/bench_exits.py DATA_ROOT [--bundle B]

Tracks each sequence with the last exit, and on every crop asks all exits. From those records: mean
IoU and Spearman's rho of entropy and IoU per exit; for each criterion (entropy, score, combined)
mean cost and mean IoU over a sweep of one threshold for all exits, beside exits drawn at random
with the same histogram and beside fixed exits. Costs are measured times of an update.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgetrack.bundle import Bundle
from edgetrack.data.sequences import read_sequences
from edgetrack.evaluate.exits import ExitRecords, exit_shares, exits_taken, record_exits
from edgetrack.evaluate.metrics import spearman_rho
from edgetrack.runtime.policies import CRITERIA
from edgetrack.viz import plot_curves

RESULTS = Path(__file__).parent / "results"


def sweep(records: ExitRecords, criterion: str) -> list[dict[str, Any]]:
    """Cost and IoU over thresholds that are the same quantile of each exit's criterion."""
    values = records.criterion(criterion)
    iou, cost = records.iou, records.cost_ms / records.cost_ms[-1]
    points = []
    for quantile in np.linspace(0, 1, 41):
        thresholds = np.quantile(values[:, :-1], quantile, axis=0)
        exits = exits_taken(values, thresholds)
        shares = exit_shares(exits, num_exits=iou.shape[1])
        points.append(
            {
                "thresholds": thresholds.tolist(),
                "cost": float(shares @ cost),
                "iou": float(iou[np.arange(len(exits)), exits].mean()),
                "random_iou": float(shares @ iou.mean(0)),
                "shares": shares.tolist(),
            }
        )
    return points


def gain_over_random(points: list[dict[str, Any]]) -> float:
    """Mean IoU above random exits of the same histogram, over the sweep."""
    return float(np.mean([p["iou"] - p["random_iou"] for p in points]))


def main() -> None:
    args = _arguments()
    bundle = Bundle.load(args.bundle)
    sequences = read_sequences(args.root)
    records = record_exits(
        bundle, sequences, on_progress=lambda name: print(f"\r{name:40s}", end="", file=sys.stderr)
    )
    print(file=sys.stderr)
    iou = records.iou
    sweeps = {name: sweep(records, name) for name in CRITERIA}
    points = {}
    for name, thresholds in bundle.operating_points.items():
        exits = exits_taken(records.criterion(bundle.criterion), thresholds)
        taken = iou[np.arange(len(exits)), exits]
        points[name] = {
            "thresholds": list(thresholds),
            "shares": exit_shares(exits, num_exits=bundle.num_exits).tolist(),
            "cost": float((records.cost_ms / records.cost_ms[-1])[exits].mean()),
            "iou": float(taken.mean()),
            "iou_of_frames_that_leave_at_exit_0": float(taken[exits == 0].mean()),
            "iou_of_frames_that_go_on": float(taken[exits > 0].mean()),
        }
    content = {
        "bundle": bundle.name,
        "digest": bundle.digest,
        "num_frames": len(iou),
        "iou_per_exit": iou.mean(0).tolist(),
        "ms_per_exit": records.cost_ms.tolist(),
        "rho_entropy_iou_per_exit": [
            spearman_rho(u, i) for u, i in zip(records.uncertainty.T, iou.T, strict=True)
        ],
        "gain_over_random_exits": {name: gain_over_random(s) for name, s in sweeps.items()},
        "operating_points": points,
        "sweeps": sweeps,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    for name, value in content.items():
        if name != "sweeps":
            print(f"{name}: {value}")
    cost = records.cost_ms / records.cost_ms[-1]
    entropy = sweeps["entropy"]
    curves = {name: [(p["cost"], p["iou"]) for p in points] for name, points in sweeps.items()}
    curves["random exits, histogram of entropy's"] = [(p["cost"], p["random_iou"]) for p in entropy]
    curves["fixed exits"] = list(zip(cost.tolist(), iou.mean(0).tolist(), strict=True))
    plot_curves(
        curves,
        args.output.with_suffix(".png"),
        x_label="mean time of an update over full depth's",
        y_label="mean IoU on recorded crops",
        title=bundle.name,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("root", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS / "exits-cpu-onnxruntime-fp32.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
