"""A CNN, a transformer and a hybrid, pruned to the same shares with the same fine-tuning.

    python benchmarks/bench_pruning.py DATA SEQUENCES [--bundle B] [--only NAME] [--stage STAGE]

After "On Designing Light-Weight Object Trackers Through Network Pruning: Use CNNs or Transformers?"
(arXiv 2211.13769). The hybrid is a bundle that is there already; CNN and transformer are trained
here, from those of its weights that fit them: the CNN has its stem and correlation, the transformer
its blocks. So dense models are not equals; the search and each fine-tuning are. Closed loop, always
the last exit, all by the target rules of the hybrid; times are of all segments on one thread, FP32
and INT8 in turn, all in one run at the end. What is done is not done again.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from bench_quantization import engines_of, segment_ms
from study import RESULTS, num_parameters, score, train_and_export
from torch.utils.flop_counter import FlopCounterMode

from edgetrack.bundle import Bundle
from edgetrack.data.layouts import parse_source
from edgetrack.data.sequences import read_sequences
from edgetrack.data.synthetic import render_clip
from edgetrack.models.registry import load_model
from edgetrack.models.segmented import SegmentedModel
from edgetrack.quantize.calibrate import MIN_CROPS, calibrate
from edgetrack.quantize.int8 import quantize_bundle
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.recording import record_crops
from edgetrack.runtime.target import TargetRules
from edgetrack.train.prune import prune
from edgetrack.train.prune_run import PruneData, export_pruned, fine_tune, rate_units
from edgetrack.train.recipes import CALIBRATION_CLIPS, Recipe, Stage
from edgetrack.viz import plot_curves

BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.1, 0.01)
# Model and changes to its configuration; the hybrid is the bundle itself.
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn": ("siamese_cnn-tiny", {}),
    "transformer": (
        "early_exit_vit-tiny",
        {"stem": "patch", "correlation_dim": 0, "exit_after": (2, 4, 6)},
    ),
}
NAMES = (*DENSE, "hybrid")


def dense_recipe(name: str, *, samples: int) -> Recipe:
    """The training of a dense model: all of it, then the shallow exits."""
    model, changes = DENSE[name]
    return Recipe(
        name=f"{name}-dense",
        model=model,
        model_config=changes,
        stages=(
            Stage(objective="final_exit", samples=samples, learning_rate=1e-3),
            Stage(objective="shallow_exits", samples=samples // 4, learning_rate=1e-3),
        ),
        calibration_clips=CALIBRATION_CLIPS,
    )


def dense_bundle(name: str, args: argparse.Namespace) -> Bundle:
    """The bundle to prune, trained if it is not there."""
    start = Bundle.load(args.bundle)
    if name not in DENSE:
        return start
    recipe = dense_recipe(name, samples=args.samples)
    sources = [parse_source(args.data)]
    return Bundle.load(train_and_export(recipe, sources, args.work, label=recipe.name, start=start))


def prune_all(name: str, args: argparse.Namespace) -> None:
    """Search, then cut, fine-tune and export at every budget, unless that was done."""
    dense, folder = dense_bundle(name, args), args.work / name
    model = load_model(dense)
    data = PruneData(
        sources=[parse_source(args.data)], search_samples=args.search, samples=args.tune
    )

    def show(progress: Any) -> None:
        print(f"\r{name:12s} {progress.step}/{progress.num_steps} {progress.terms['loss']:.3f} ",
              end="", file=sys.stderr)  # fmt: skip

    scores = rate_units(dense, model, folder, data=data, on_progress=show)
    for budget in BUDGETS:
        output = folder / f"bundle-{budget:g}"
        if (output / "manifest.json").is_file():
            continue
        pruned = prune(model, scores, budget)
        tuned = fine_tune(
            dense, pruned, folder, label=f"tuned-{budget:g}", data=data, on_progress=show
        )
        authors = prune(model, scores, budget, parts=("trunk",)).model
        sizes = {"parameters": num_parameters(authors), "macs": segment_macs(authors)}
        (folder / f"trunk-{budget:g}.json").write_text(json.dumps(sizes), "utf-8")
        # Last: its manifest says that this budget is done.
        export_pruned(dense, tuned, pruned, output, budget=budget, samples=args.tune)


@torch.no_grad()
def segment_macs(model: SegmentedModel) -> int:
    """Multiply-accumulates of all segments, as the manifest counts them."""
    crops = model.crops
    template, search = (
        torch.zeros(1, side, side, 3, dtype=torch.uint8)
        for side in (crops.template_size_px, crops.search_size_px)
    )
    state = model.embed_template(template, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    state["search_region"] = search
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]),
    ):
        for index in range(model.num_exits):
            state |= model.run_segment(index, state)
    return counter.get_total_flops() // 2


def time_segments(bundle: Bundle) -> dict[str, float]:
    """Milliseconds of all segments, in FP32 and in INT8 with ranges of a rendered clip."""
    clip = list(render_clip(num_frames=MIN_CROPS + 1, seed=0))
    frames = [frame for frame, _ in clip]
    crops = list(record_crops(bundle, frames, tuple(clip[0][1].tolist()), name="clip"))
    cache = calibrate(bundle, crops, method="max")
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "fp32": {g.name: onnx.load(bundle.graph_path(g)) for g in bundle.graphs},
            "int8": quantize_bundle(bundle, cache, runtime="onnxruntime"),
        }
        rows = {name: engines_of(bundle, graphs, Path(folder)) for name, graphs in models.items()}
        segment_ms(bundle, rows, crops[0][1])
    names = [g.name for g in bundle.graphs]
    return {
        f"ms_{name}": sum(
            t for n, t in zip(names, row["ms_per_graph"], strict=True) if n.startswith("segment")
        )
        for name, row in rows.items()
    }


def bundles_of(name: str, args: argparse.Namespace) -> dict[float | None, Bundle]:
    """The dense bundle, as ``None``, and those of all budgets that were pruned to."""
    found: dict[float | None, Bundle] = {None: dense_bundle(name, args)}
    for budget in BUDGETS:
        path = args.work / name / f"bundle-{budget:g}"
        if (path / "manifest.json").is_file():
            found[budget] = Bundle.load(path)
    return found


def row_of(name: str, budget: float | None, bundle: Bundle, args: Any) -> dict[str, Any]:
    """What is known without tracking."""
    pruning = bundle.provenance.get("pruning", {})
    row = {
        "architecture": name,
        "budget": budget,
        "share_of_units": pruning.get("share_of_units", 1.0),
        "floored": list(pruning.get("floored", ())),
        "parameters": num_parameters(load_model(bundle)),
        "macs": sum(segment.macs for segment in bundle.segments),
    }
    if budget is not None:
        trunk_alone = args.work / name / f"trunk-{budget:g}.json"
        row["trunk_alone"] = json.loads(trunk_alone.read_text("utf-8"))
    return row


def report(args: argparse.Namespace) -> None:
    """Score, time, write, plot."""
    sequences = list(read_sequences(args.sequences))
    bundles = [
        (name, budget, bundle)
        for name in args.only
        for budget, bundle in bundles_of(name, args).items()
    ]
    rows = [row_of(*found, args) for found in bundles]
    # The other two are exported without rules: with their own, those would be compared too.
    rules = TargetRules.of(Bundle.load(args.bundle).rules)
    for row, (name, budget, bundle) in zip(rows, bundles, strict=True):
        policy = ExitPolicy.always_last(num_exits=bundle.num_exits)
        aucs = [r.metrics.success_auc for r in score(bundle, policy, sequences, rules=rules)]
        row |= {"auc": float(np.mean(aucs)), "auc_per_sequence": aucs}
        print(f"{name:12s} {budget or 'dense'!s:5s} AUC {row['auc']:.3f}", flush=True)
    for row, (_, _, bundle) in zip(rows, bundles, strict=True):
        row |= time_segments(bundle)
    write(rows, [sequence.name for sequence in sequences], args)


def write(rows: list[dict[str, Any]], sequences: list[str], args: argparse.Namespace) -> None:
    """The results as JSON, plot and table."""
    hybrid = Bundle.load(args.bundle)
    content = {
        "samples": {"dense": args.samples, "search": args.search, "fine_tuning": args.tune},
        "hybrid": hybrid.digest,
        "rules": dict(hybrid.rules),
        "cpus": os.cpu_count(),
        "sequences": sequences,
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    pruned = [row for row in rows if row["budget"] is not None]
    curves = {
        name: [(r["macs"] / 1e6, r["auc"]) for r in pruned if r["architecture"] == name]
        for name in args.only
    }
    plot_curves(
        curves,
        args.output.with_suffix(".png"),
        x_label="million multiply-accumulates of all segments",
        y_label="success AUC, last exit",
        title="Pruned to 100, 75, 50, 25, 10 and 1 % of the units",
    )
    for row in rows:
        alone = row.get("trunk_alone")
        print(
            f"{row['architecture']:12s} {row['budget'] or 'dense'!s:5s} AUC {row['auc']:.3f} "
            f"{row['parameters'] / 1e6:5.2f} M {row['macs'] / 1e6:6.1f} MMAC "
            f"{row['ms_fp32']:5.2f} ms {row['ms_int8']:5.2f} ms INT8"
            + (f"  trunk alone {alone['parameters'] / 1e6:5.2f} M" if alone else "")
        )


def main() -> None:
    args = _arguments()
    if args.stage in ("dense", "prune"):
        for name in args.only:
            dense_bundle(name, args) if args.stage == "dense" else prune_all(name, args)
        return
    report(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", help="as for edgetrack train --data")
    parser.add_argument("sequences", type=Path)
    parser.add_argument("--bundle", type=Path, help="the hybrid [default: the one that ships]")
    parser.add_argument("--samples", type=int, default=20_000, help="pairs of a dense training")
    parser.add_argument("--search", type=int, default=3_000, help="pairs of a search")
    parser.add_argument("--tune", type=int, default=3_000, help="pairs of each fine-tuning")
    parser.add_argument("--only", action="append", help="cnn, transformer or hybrid; repeat")
    parser.add_argument(
        "--stage", choices=("dense", "prune", "report"), default="report", help="in this order"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/pruning"))
    parser.add_argument("--output", type=Path, default=RESULTS / "pruning-cpu.json")
    args = parser.parse_args()
    args.only = args.only or list(NAMES)
    return args


if __name__ == "__main__":
    main()
