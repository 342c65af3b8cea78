"""edgetrack beside OpenCV's NanoTrack v2 and CSRT: same frames, same run, one thread each.

    python benchmarks/bench_peers.py DATA_ROOT \
        --nano-backbone nanotrack_backbone.onnx --nano-head nanotrack_head.onnx

Needs an OpenCV with contrib (pip install opencv-contrib-python-headless) and NanoTrack's two ONNX
files, which carry no licence and are not part of this project. ``DATA_ROOT`` is laid out like
``edgetrack eval`` wants it. Trackers take turns sequence by sequence.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import edgetrack
from edgetrack.backends.ort import cpu_name
from edgetrack.data.sequences import Sequence, read_sequences
from edgetrack.evaluate.metrics import bootstrap_interval
from edgetrack.evaluate.protocols import SequenceResult, evaluate_sequence


class OpenCvTracker:
    """An OpenCV tracker behind edgetrack's two verbs."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def init(self, frame: Any, bbox: Any) -> None:
        self._tracker = self._make()
        self._bbox = bbox
        self._tracker.init(frame, tuple(round(v) for v in bbox))

    def update(self, frame: Any) -> Any:
        is_found, bbox = self._tracker.update(frame)
        self._bbox = bbox if is_found else self._bbox
        return self._bbox


def main() -> None:
    args = _arguments()
    cv2.setNumThreads(1)
    bundle = edgetrack.Bundle.load(args.bundle)
    last = edgetrack.ExitPolicy.always_last(num_exits=bundle.num_exits)
    first = edgetrack.ExitPolicy.fixed(0, num_exits=bundle.num_exits)
    trackers: dict[str, Any] = {
        f"edgetrack {point}": edgetrack.Tracker(bundle, num_threads=1, operating_point=point)
        for point in bundle.operating_points
    }
    trackers |= {
        f"edgetrack {name}": edgetrack.Tracker(bundle, num_threads=1, exit_policy=policy)
        for name, policy in {"always-last": last, "exit 0": first}.items()
    }
    if args.nano_backbone and args.nano_head:
        parameters = cv2.TrackerNano_Params()
        parameters.backbone, parameters.neckhead = str(args.nano_backbone), str(args.nano_head)
        trackers["NanoTrack v2"] = OpenCvTracker(lambda: cv2.TrackerNano.create(parameters))
    if hasattr(cv2, "TrackerCSRT"):
        trackers["CSRT"] = OpenCvTracker(cv2.TrackerCSRT.create)
    results: dict[str, list[SequenceResult]] = {name: [] for name in trackers}
    sequences = read_sequences(args.root)
    for index, sequence in enumerate(sequences, 1):
        print(f"\r{index}/{len(sequences)} {sequence.name:30s}", end="", file=sys.stderr)
        _take_turns(trackers, sequence, results)
    print(file=sys.stderr)
    rows = {name: _row(runs) for name, runs in results.items()}
    base = rows.get("NanoTrack v2", rows["edgetrack always-last"])
    for row in rows.values():
        row["median_over_nanotrack"] = row["median_ms"] / base["median_ms"]
        row["mean_over_nanotrack"] = row["mean_ms"] / base["mean_ms"]
        gaps = [a - base["per_sequence_auc"][n] for n, a in row["per_sequence_auc"].items()]
        row["auc_over_nanotrack"] = [float(np.mean(gaps)), *bootstrap_interval(gaps, seed=0)]
    content = {
        "protocol": "ope",
        "threads": 1,
        "device": cpu_name(),
        "opencv": cv2.__version__,
        "python": platform.python_version(),
        "timed": "update: crop, network, decisions; reading frames is not",
        "num_frames": sum(len(s.boxes_xywh) - 1 for s in sequences),
        "trackers": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    print("tracker                     AUC   P@20   p50 ms  mean ms  ratio  AUC over Nano   exits")
    for name, row in rows.items():
        print(
            f"{name:24s} {row['success_auc']:6.3f} {row['precision_20px']:6.3f} "
            f"{row['median_ms']:8.2f} {row['mean_ms']:8.2f} {row['mean_over_nanotrack']:6.2f} "
            "{:+.3f} [{:+.3f}, {:+.3f}] ".format(*row["auc_over_nanotrack"])
            + str(row["exit_histogram"] or "")
        )


def _take_turns(
    trackers: dict[str, Any], sequence: Sequence, results: dict[str, list[SequenceResult]]
) -> None:
    for name, tracker in trackers.items():
        results[name].append(evaluate_sequence(tracker, sequence))


def _row(runs: list[SequenceResult]) -> dict[str, Any]:
    latencies = [r.latency_ms for run in runs for r in run.rows if r.latency_ms is not None]
    histograms = [run.exit_histogram for run in runs if run.exit_histogram]
    num_exits = max((len(h) for h in histograms), default=0)
    return {
        "success_auc": float(np.mean([r.metrics.success_auc for r in runs])),
        "precision_20px": float(np.mean([r.metrics.precision_20px for r in runs])),
        "median_ms": statistics.median(latencies),
        "mean_ms": statistics.fmean(latencies),
        "exit_histogram": [sum(h[k] for h in histograms if k < len(h)) for k in range(num_exits)],
        "per_sequence_auc": {r.name: r.metrics.success_auc for r in runs},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("root", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--nano-backbone", type=Path)
    parser.add_argument("--nano-head", type=Path)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results" / "peers-cpu-onnxruntime-fp32.json",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
