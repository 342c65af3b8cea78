"""Exit policies in closed loop: success AUC against mean time, and is the difference real?

    python benchmarks/bench_policies.py DATA_ROOT [--bundle B]

One run, one thread: every fixed exit, every operating point, a sweep of one quantile of the
criterion, and random exits with the histogram of each operating point. Differences between
policies come with a paired bootstrap over the sequences. Also how well the score tells a target
that is followed (IoU above 0.5) from one that is lost (absent, or IoU below 0.1): ROC-AUC.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgetrack.bundle import Bundle
from edgetrack.data.sequences import read_sequences
from edgetrack.evaluate.exits import record_exits
from edgetrack.evaluate.metrics import bootstrap_interval, roc_auc
from edgetrack.evaluate.protocols import SequenceResult, evaluate_sequence
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.tracker import Tracker
from edgetrack.viz import plot_curves

RESULTS = Path(__file__).parent / "results"
SWEEP_QUANTILES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)


@dataclass(frozen=True)
class RandomPolicy(ExitPolicy):
    """Stops at exits drawn with these shares, whatever the frame."""

    shares: tuple[float, ...] = ()
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def should_exit(self, exit_index: int, uncertainty: float, score: float) -> bool:
        left = sum(self.shares[exit_index:])
        return exit_index == len(self.thresholds) or bool(
            self.rng.random() * left < self.shares[exit_index]
        )


def run(bundle: Bundle, policy: ExitPolicy, sequences: list[Any]) -> list[SequenceResult]:
    with Tracker(bundle, exit_policy=policy, num_threads=1) as tracker:
        return [evaluate_sequence(tracker, s) for s in sequences]


def summary(results: list[SequenceResult], num_exits: int) -> dict[str, Any]:
    rows = [r for result in results for r in result.rows if r.exit_index is not None]
    shares = np.bincount([r.exit_index for r in rows], minlength=num_exits) / len(rows)
    times = np.array([r.latency_ms for r in rows])
    overlaps = np.concatenate([r.overlaps[1:] for r in results])
    left = np.array([r.exit_index for r in rows]) == 0
    return {
        "auc": float(np.mean([r.metrics.success_auc for r in results])),
        "precision_20px": float(np.mean([r.metrics.precision_20px for r in results])),
        "mean_ms": float(times.mean()),
        "median_ms": float(np.median(times)),
        "shares": shares.tolist(),
        "iou_left_at_exit_0": _mean(overlaps[left]),
        "iou_went_on": _mean(overlaps[~left]),
    }


def _mean(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def difference(a: list[SequenceResult], b: list[SequenceResult]) -> dict[str, float]:
    """Mean AUC of ``a`` minus that of ``b``, with its 95 % interval."""
    gaps = [x.metrics.success_auc - y.metrics.success_auc for x, y in zip(a, b, strict=True)]
    low, high = bootstrap_interval(gaps, seed=0)
    return {"mean": float(np.mean(gaps)), "low": low, "high": high}


def score_roc(results: list[SequenceResult], sequences: list[Any]) -> float:
    followed, lost = [], []
    for result, sequence in zip(results, sequences, strict=True):
        absent = ~np.isfinite(sequence.boxes_xywh).all(1)
        for row, overlap, is_absent in zip(result.rows, result.overlaps, absent, strict=True):
            if row.score is None:
                continue
            if is_absent or overlap < 0.1:
                lost.append(row.score)
            elif overlap > 0.5:
                followed.append(row.score)
    return roc_auc(followed, lost)


def main() -> None:
    args = _arguments()
    bundle, sequences = Bundle.load(args.bundle), list(read_sequences(args.root))
    count = bundle.num_exits
    values = record_exits(bundle, sequences).criterion(bundle.criterion)
    policies: dict[str, ExitPolicy] = {
        f"exit {k}": ExitPolicy.fixed(k, num_exits=count) for k in range(count)
    }
    policies |= {k: ExitPolicy(t, bundle.criterion) for k, t in bundle.operating_points.items()}
    for q in SWEEP_QUANTILES:
        thresholds = np.quantile(values[:, :-1], q, axis=0).tolist()
        policies[f"quantile {q}"] = ExitPolicy(tuple(thresholds), bundle.criterion)
    done: dict[str, list[SequenceResult]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, policy in policies.items():
        print(f"\r{name:30s}", end="", file=sys.stderr)
        done[name] = run(bundle, policy, sequences)
        rows[name] = summary(done[name], count)
    for name in bundle.operating_points:
        shares = tuple(rows[name]["shares"])
        label = f"random as {name}"
        print(f"\r{label:30s}", end="", file=sys.stderr)
        done[label] = run(bundle, RandomPolicy((0.0,) * (count - 1), shares=shares), sequences)
        rows[label] = summary(done[label], count)
    print(file=sys.stderr)
    last = f"exit {count - 1}"
    differences = {f"{last} - exit 0": difference(done[last], done["exit 0"])}
    for name in bundle.operating_points:
        differences[f"{name} - {last}"] = difference(done[name], done[last])
        differences[f"{name} - random"] = difference(done[name], done[f"random as {name}"])
    content = {
        "bundle": bundle.name,
        "digest": bundle.digest,
        "policies": rows,
        "differences": differences,
        "score_roc_auc": score_roc(done[last], sequences),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    for name, row in rows.items():
        shares = " / ".join(f"{100 * s:.0f}" for s in row["shares"])
        print(
            f"{name:22s} AUC {row['auc']:.4f}  P20 {row['precision_20px']:.3f}  "
            f"{row['mean_ms']:.2f} ms  exits {shares} %"
        )
    for name, gap in differences.items():
        print(f"{name:26s} {gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]")
    print(f"ROC-AUC of the score: {content['score_roc_auc']:.3f}")

    def points(prefix: str) -> list[tuple[float, float]]:
        return sorted((r["mean_ms"], r["auc"]) for n, r in rows.items() if n.startswith(prefix))

    plot_curves(
        {
            f"{bundle.criterion} below a threshold": points("quantile"),
            "operating points": sorted(
                (rows[n]["mean_ms"], rows[n]["auc"]) for n in bundle.operating_points
            ),
            "random exits, same histograms": points("random"),
            "fixed exits": points("exit"),
        },
        args.output.with_suffix(".png"),
        x_label="mean ms per update, one thread",
        y_label="mean success AUC, closed loop",
        title=bundle.name,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("root", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "policies-cpu-onnxruntime-fp32.json"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
