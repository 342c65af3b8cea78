"""What every exit says on the same crops: does depth pay, does entropy know, what do thresholds do?

    python benchmarks/bench_exits.py DATA_ROOT [--bundle B] [--shares 0.45,0.35]

Tracks each sequence with the last exit, and on every crop asks all exits. From those records: mean
IoU and Spearman's rho of entropy and IoU per exit; mean depth and mean IoU over a sweep of one
threshold for all exits, beside exits drawn at random with the same histogram. ``--shares`` proposes
thresholds under which the first exits take these shares of the frames: use it on training videos,
never on the data that the README quotes.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetrack.backends import get_backend
from edgetrack.boxes import clip_xywh, iou_xywh
from edgetrack.bundle import Bundle
from edgetrack.crops import Cropper, CropWindow
from edgetrack.data.sequences import Sequence, read_sequences
from edgetrack.evaluate.metrics import spearman_rho
from edgetrack.runtime.chain import Chain
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.viz import plot_curves

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Recorder(ExitPolicy):
    """Never stops early, and keeps what each exit said."""

    chain: Chain
    answers: list[tuple[np.ndarray, float, float]]

    def should_exit(self, exit_index: int, uncertainty: float) -> bool:
        buffers = self.chain.buffers
        score = float(buffers["score"][0])
        self.answers.append((buffers["bbox_cxcywh"][0].copy(), score, uncertainty))
        return super().should_exit(exit_index, uncertainty)


def record(bundle: Bundle, chain: Chain, sequence: Sequence) -> list[list[tuple[float, ...]]]:
    """Per frame with truth, per exit: IoU, score, uncertainty."""
    policy = Recorder((0.0,) * (bundle.num_exits - 1), chain, [])
    template, search = Cropper(bundle.crops.template_size_px), Cropper(bundle.crops.search_size_px)
    frames, bbox, rows = sequence.frames(), sequence.boxes_xywh[0], []
    first = next(frames)
    window = CropWindow.around(bbox, factor=bundle.crops.template_factor)
    template.crop(first, window, out=chain.buffers["template"][0])
    chain.buffers["template_bbox_cxcywh"][0] = window.to_crop(bbox)
    chain.run_template()
    for frame, truth in zip(frames, sequence.boxes_xywh[1:], strict=True):
        window = CropWindow.around(bbox, factor=bundle.crops.search_factor)
        search.crop(frame, window, out=chain.buffers["search_region"][0])
        policy.answers.clear()
        chain.run(policy)
        boxes = [window.to_frame(a[0]) for a in policy.answers]
        height, width = frame.shape[:2]
        bbox = clip_xywh(boxes[-1], width_px=width, height_px=height, margin_px=10)
        if np.isfinite(truth).all():
            rows.append(
                [
                    (float(iou_xywh(b, truth)), score, uncertainty)
                    for b, (_, score, uncertainty) in zip(boxes, policy.answers, strict=True)
                ]
            )
    return rows


def taken(uncertainty: np.ndarray, thresholds: Any) -> np.ndarray:
    """The exit that each frame takes; ``uncertainty`` is (frames, exits)."""
    stops = uncertainty[:, :-1] < np.asarray(thresholds)
    return np.where(stops.any(1), stops.argmax(1), uncertainty.shape[1] - 1)


def sweep(iou: np.ndarray, uncertainty: np.ndarray, macs: np.ndarray) -> list[dict[str, float]]:
    cost = macs.cumsum() / macs.sum()
    points = []
    for threshold in np.linspace(0.0, 0.8, 81):
        exits = taken(uncertainty, threshold)
        histogram = np.bincount(exits, minlength=iou.shape[1]) / len(exits)
        points.append(
            {
                "threshold": float(threshold),
                "mean_depth": float(exits.mean()),
                "mean_cost": float(histogram @ cost),
                "mean_iou": float(iou[np.arange(len(exits)), exits].mean()),
                "random_iou": float(histogram @ iou.mean(0)),
                "shares": histogram.tolist(),
            }
        )
    return points


def propose(uncertainty: np.ndarray, shares: list[float]) -> list[float]:
    """Thresholds under which the first exits take these shares of all frames."""
    left, thresholds = np.ones(len(uncertainty), bool), []
    for index, share in enumerate(shares):
        here = uncertainty[left, index]
        thresholds.append(float(np.quantile(here, min(share * len(uncertainty) / len(here), 1.0))))
        left &= ~(uncertainty[:, index] < thresholds[-1])
    return thresholds


def main() -> None:
    args = _arguments()
    bundle = Bundle.load(args.bundle)
    backend = get_backend("onnxruntime")
    chain = Chain(bundle, [backend.load_onnx(bundle.graph_path(g), g) for g in bundle.graphs])
    sequences, records = read_sequences(args.root), []
    for index, sequence in enumerate(sequences, 1):
        print(f"\r{index}/{len(sequences)} {sequence.name:30s}", end="", file=sys.stderr)
        records.append(np.array(record(bundle, chain, sequence)))
    print(file=sys.stderr)
    everything = np.concatenate(records)
    iou, uncertainty = everything[..., 0], everything[..., 2]
    macs = np.array([s.macs for s in bundle.segments], np.float64)
    points = sweep(iou, uncertainty, macs)
    default = taken(uncertainty, bundle.thresholds())
    content = {
        "bundle": bundle.name,
        "digest": bundle.digest,
        "num_frames": len(iou),
        "mean_iou_per_exit": iou.mean(0).tolist(),
        "rho_entropy_iou_per_exit": [
            spearman_rho(u, i) for u, i in zip(uncertainty.T, iou.T, strict=True)
        ],
        "default_thresholds": list(bundle.thresholds()),
        "default_shares": (np.bincount(default, minlength=iou.shape[1]) / len(default)).tolist(),
        "default_mean_iou": float(iou[np.arange(len(default)), default].mean()),
        "iou_of_frames_that_leave_at_exit_0": float(iou[default == 0, 0].mean()),
        "iou_of_frames_that_go_on": float(iou[default > 0, -1].mean()),
        "depth_falls_with_threshold": bool(np.all(np.diff([p["mean_depth"] for p in points]) <= 0)),
        "sweep": points,
    }
    if args.shares:
        content["proposed_thresholds"] = propose(uncertainty, args.shares)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    for name, value in content.items():
        if name != "sweep":
            print(f"{name}: {value}")
    cost = macs.cumsum() / macs.sum()
    plot_curves(
        {
            "entropy": [(p["mean_cost"], p["mean_iou"]) for p in points],
            "random exits, same histogram": [(p["mean_cost"], p["random_iou"]) for p in points],
            "fixed exits": list(zip(cost.tolist(), iou.mean(0).tolist(), strict=True)),
        },
        args.output.with_suffix(".png"),
        x_label="mean share of full depth's MACs",
        y_label="mean IoU on recorded crops",
        title=bundle.name,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("root", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--shares", type=lambda t: [float(v) for v in t.split(",")])
    parser.add_argument("--output", type=Path, default=RESULTS / "exits-cpu-onnxruntime-fp32.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
