"""What FARTrack's dropped tokens and depths cost and are worth, and what a long video does to it.

    python benchmarks/bench_fartrack.py tables BUNDLE SEQUENCES
    python benchmarks/bench_fartrack.py long BUNDLE [--frames 20000]

``tables`` cuts one trained bundle by retention, by depth and by what enters the bank, scores each
cut in closed loop, and times all of them, and the paper's sizes with random weights, in one run: in
turns on the same frames, one thread, full depth, the update graph included. No cut is trained
further, so a retention other than the bundle's own is one that its weights have not seen.

``long`` follows a target through frames without end, and reads the process's memory on the way.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from study import RESULTS, score, slug, time_in_turns

import edgetrack
from edgetrack.bundle import Bundle
from edgetrack.data.sequences import read_sequences
from edgetrack.data.synthetic import render_clip
from edgetrack.export import export_bundle
from edgetrack.models.fartrack import CONFIGS, FARTrack, FARTrackConfig
from edgetrack.models.registry import load_model
from edgetrack.runtime.policies import ExitPolicy

RETENTIONS = (1.0, 0.75, 0.5, 0.25)
# The paper's sizes: variant and retention.
PAPER = (*(("tiny", share) for share in RETENTIONS), ("nano", 0.75), ("pico", 0.75))


def export(model: FARTrack, folder: Path, name: str, source: Bundle | None) -> Bundle:
    """A cut as a bundle of its own, with the rules of the bundle that it is cut from."""
    return export_bundle(
        model,
        folder / slug(name),
        name="fartrack-cut",
        operating_points={"balanced": (0.0,) * (model.num_exits - 1)},
        operating_point="balanced",
        provenance={"cut": name},
        licence="a study; not for use",
        rules={} if source is None else source.rules,
    )


def cuts_of(model: FARTrack) -> dict[str, FARTrack]:
    """All cuts of a trained model, by name."""
    depth = model.config.exit_after[-1]
    found = {
        f"retention {share:.0%}": model.cut(exit_after=(depth,), retention=share)
        for share in RETENTIONS
    }
    for exit_after in model.config.exit_after[:-1]:
        found[f"depth {exit_after}"] = model.cut(exit_after=(exit_after,))
    found["first template alone"] = model.cut(exit_after=(depth,), min_update_score=1.0)
    found["templates from score 0.5"] = model.cut(exit_after=(depth,), min_update_score=0.5)
    return found


def macs_of(bundle: Bundle) -> dict[str, float]:
    assert bundle.update is not None
    return {
        "gmacs": sum(segment.macs for segment in bundle.segments) / 1e9,
        "update_gmacs": bundle.update.macs / 1e9,
    }


def tables(args: argparse.Namespace) -> None:
    """Cut, score, time, print, write."""
    source = Bundle.load(args.bundle)
    model = load_model(source)
    if not isinstance(model, FARTrack):
        raise SystemExit(f"{args.bundle}: expected a bundle of fartrack, got {source.family}")
    sequences = list(read_sequences(args.sequences))
    with tempfile.TemporaryDirectory() as folder:
        bundles = {
            name: export(cut, Path(folder), name, source) for name, cut in cuts_of(model).items()
        }
        rows: dict[str, dict[str, Any]] = {}
        for name, bundle in bundles.items():
            policy = ExitPolicy.always_last(num_exits=bundle.num_exits)
            results = score(bundle, policy, sequences)
            rows[name] = {
                "auc": statistics.mean(r.metrics.success_auc for r in results),
                "precision_20px": statistics.mean(r.metrics.precision_20px for r in results),
                "auc_per_sequence": [round(r.metrics.success_auc, 4) for r in results],
            }
        if not args.no_paper:
            for variant, share in PAPER:
                name = f"paper {variant} {share:.0%}"
                config = dataclasses.replace(CONFIGS[variant], retention=share)
                bundles[name] = export(FARTrack(config), Path(folder), name, None)
                rows[name] = {}
        times = time_in_turns(bundles, num_updates=args.updates, num_rounds=args.rounds)
        for name, bundle in bundles.items():
            config = FARTrackConfig(**bundle.config)
            row = rows[name]
            row |= {"layers": config.exit_after[-1], "kept_tokens": config.kept_tokens}
            row |= macs_of(bundle) | {"ms": times[name][-1]}
            auc = f"AUC {row['auc']:.3f}" if "auc" in row else "random weights"
            print(
                f"{name:28s} {auc:14s} {row['layers']:2d} layers  {row['kept_tokens']:3d} tokens  "
                f"{row['gmacs']:.3f} + {row['update_gmacs']:.3f} GMACs  {row['ms']:6.2f} ms",
                flush=True,
            )
    write(
        args.output or RESULTS / "fartrack-cpu-onnxruntime-fp32.json",
        {
            "bundle": {"name": source.name, "digest": source.digest},
            "samples": source.provenance.get("samples"),
            "threads": 1,
            "cpus": os.cpu_count(),
            "updates": args.updates * args.rounds,
            "sequences": [sequence.name for sequence in sequences],
            "rows": rows,
        },
    )


def long(args: argparse.Namespace) -> None:
    """Follow, read the memory, print, write."""
    bundle = Bundle.load(args.bundle)
    clip = list(render_clip(num_frames=60))
    # To and fro, so that the target never jumps.
    path = [*range(1, len(clip)), *range(len(clip) - 2, 0, -1)]
    marks = sorted({1_000, 2_000, 5_000, 10_000, args.frames})
    seen: dict[str, dict[str, float]] = {}
    with edgetrack.Tracker(bundle, backend="onnxruntime", num_threads=1) as tracker:
        tracker.init(clip[0][0], clip[0][1].tolist())
        for number, index in enumerate(itertools.cycle(path), 1):
            result = tracker.update(clip[index][0])
            if number in marks:
                seen[str(number)] = {"rss_mb": rss_mb(), "score": round(result.score, 3)}
                print(
                    f"{number:6d} frames  {rss_mb():.1f} MB  score {result.score:.2f}", flush=True
                )
            if number == args.frames:
                break
    assert bundle.update is not None
    write(
        args.output or RESULTS / "fartrack_long-cpu-onnxruntime-fp32.json",
        {
            "bundle": {"name": bundle.name, "digest": bundle.digest},
            "history_places": bundle.config["history_places"],
            "frames": args.frames,
            "seen": seen,
        },
    )


def rss_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("tables")
    one.add_argument("bundle", type=Path)
    one.add_argument("sequences", type=Path)
    one.add_argument("--updates", type=int, default=40, help="of each bundle in a round")
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--no-paper", action="store_true", help="leave the paper's sizes out")
    one.set_defaults(run=tables)
    other = commands.add_parser("long")
    other.add_argument("bundle", type=Path)
    other.add_argument("--frames", type=int, default=20_000)
    other.set_defaults(run=long)
    for command in (one, other):
        command.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
