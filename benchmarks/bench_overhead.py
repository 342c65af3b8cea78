"""What ``update`` costs beside its segments, and whether it allocates.

    python benchmarks/bench_overhead.py [--bundle B]

On a rendered 640x480 clip at full depth, one thread: the median of update minus the sum of its
segments, and the memory that Python and NumPy allocate during updates (tracemalloc).
"""

import argparse
import json
import statistics
import tracemalloc
from pathlib import Path

import edgetrack
from edgetrack.backends.ort import cpu_name
from edgetrack.data.synthetic import render_clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--frames", type=int, default=300)
    args = parser.parse_args()
    clip = list(render_clip(num_frames=args.frames))
    bundle = edgetrack.Bundle.load(args.bundle)
    policy = edgetrack.ExitPolicy.always_last(num_exits=bundle.num_exits)
    with edgetrack.Tracker(bundle, num_threads=1, exit_policy=policy) as tracker:
        tracker.init(clip[0][0], clip[0][1])
        overhead_ms, update_ms = [], []
        for frame, _ in clip[1:]:
            result = tracker.update(frame)
            segments = sum(v for k, v in tracker.stage_ms.items() if k.startswith("segment"))
            overhead_ms.append(result.latency_ms - segments)
            update_ms.append(result.latency_ms)
        tracker.init(clip[0][0], clip[0][1])
        tracemalloc.start()
        tracker.update(clip[1][0])
        kept_before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for frame, _ in clip[2:]:
            tracker.update(frame)
        kept_after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    report = {
        "device": cpu_name(),
        "frame": "640x480",
        "num_updates": len(update_ms),
        "median_update_ms": statistics.median(update_ms),
        "median_overhead_ms": statistics.median(overhead_ms),
        "kept_bytes_after_all_updates": kept_after - kept_before,
        "peak_bytes_within_updates": peak - kept_before,
    }
    path = Path(__file__).parent / "results" / "overhead-cpu-onnxruntime-fp32.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    for name, value in report.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
