"""Whether the frame graph is right and fast on this GPU: one script, results as JSON.

    PYTHONPATH=. python benchmarks/gpu/frame_graph.py --output out [--backend torch-cuda] [--quick]

Needs this checkout, NumPy, OpenCV, PyCUDA and what the backend needs. Every part is tried, whatever
became of the others, and the file is written after each:

- ``agreement``: device graph, host flag and stream sync over a whole sequence, bit for bit; and
  against the same bundle on the CPU;
- ``latency``: per exit and way to decide, frames already on the GPU: p50, p90, p99, and the submit
  call alone; the same with frames from the host;
- ``skipping``: GPU time of a frame at exit 0 over that of the crop and segment 0 in it;
- ``roofline``: GPU time of each segment over the floor that its products and its weights set;
- ``soak``: 10,000 frames, memory in use by device and process before and after.
"""

import argparse
import dataclasses
import json
import os
import platform
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.backends.cuda import CudaContext
from edgetrack.backends.engine import Backend
from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.tracker import Tracker, TrackResult

DECISIONS = ("device", "flag", "host")
Clip = list[tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]]


class Job:
    """All parts over one clip.

    Args:
        backend: Its name, or a backend.
        bundle: What to run.
        precision: ``None`` is the backend's default.
        num_frames: Updates per timed pass.
        num_warm_up: Updates before one that are not timed.
        soak_frames: Updates of the soak.
        reference: A CPU backend to compare with.
        peak_tflops: Of the GPU at this precision; with ``peak_gbps`` the floor of a segment.
        peak_gbps: Memory bandwidth.
    """

    def __init__(
        self,
        backend: "str | Backend",
        bundle: Bundle,
        *,
        precision: str | None,
        num_frames: int,
        num_warm_up: int = 50,
        soak_frames: int,
        reference: str,
        peak_tflops: float,
        peak_gbps: float,
    ) -> None:
        self.backend, self.bundle, self.precision = backend, bundle, precision
        self.num_frames, self.num_warm_up = num_frames, num_warm_up
        self.soak_frames, self.reference = soak_frames, reference
        self.peak_tflops, self.peak_gbps = peak_tflops, peak_gbps
        self.clip: Clip = list(render_clip(num_frames=120, width=640, height=480, seed=5))

    def tracker(self, decision: str, exit_index: int | None = None) -> Tracker:
        """An open tracker; with ``exit_index`` always that exit."""
        num_exits = self.bundle.num_exits
        return Tracker(
            self.bundle,
            backend=self.backend,
            precision=self.precision,
            exit_decision=decision,
            exit_policy=None
            if exit_index is None
            else ExitPolicy.fixed(exit_index, num_exits=num_exits),
        )

    def agreement(self) -> dict[str, Any]:
        """Whether all ways give the same results, and how far they are from the CPU's."""
        results = {}
        for decision in DECISIONS:
            with self.tracker(decision) as tracker:
                results[decision] = self._follow(tracker)
        with Tracker(self.bundle, backend=self.reference) as tracker:
            on_cpu = self._follow(tracker)
        there = np.array([r.bbox for r in results["host"]])
        exits = np.bincount([r.exit_index for r in on_cpu], minlength=self.bundle.num_exits)
        return {
            "device_equals_host": results["device"] == results["host"],
            "flag_equals_host": results["flag"] == results["host"],
            "num_frames": len(on_cpu),
            "exits_on_cpu": exits.tolist(),
            "exits_equal_share": float(
                np.mean(
                    [
                        a.exit_index == b.exit_index
                        for a, b in zip(results["host"], on_cpu, strict=True)
                    ]
                )
            ),
            "bbox_difference_px": {
                "mean": float(np.abs(there - [r.bbox for r in on_cpu]).mean()),
                "max": float(np.abs(there - [r.bbox for r in on_cpu]).max()),
            },
        }

    def latency(self) -> list[dict[str, Any]]:
        """Whole-frame latency and host time per way to decide and exit."""
        rows = []
        with _DeviceFrames(self.clip) as frames:
            for decision in DECISIONS:
                for exit_index in range(self.bundle.num_exits):
                    for where, given in (("gpu", frames.arrays), ("host", self._host_frames())):
                        with self.tracker(decision, exit_index) as tracker:
                            row = self._time(tracker, given)
                        rows.append(
                            {"decision": decision, "exit": exit_index, "frames": where, **row}
                        )
        return rows

    def skipping(self) -> dict[str, Any]:
        """GPU time of a whole frame at exit 0, over that of the crop and segment 0 in it.

        Crop and segment are timed by events, in the way ``host``. A whole frame has no events
        around it, so frames are submitted back to back: seconds over frames are then the device's
        own time per frame, gate and settling and gaps between launches included, unless the host
        takes longer to submit one (``submit_p50_us``). The ways ``flag`` and ``host`` are measured
        so too: they run the same kernels, and what they take longer is the host's answer.
        """
        saturated_ms = {}
        with _DeviceFrames(self.clip) as frames:
            for decision in DECISIONS:
                with self.tracker(decision, 0) as tracker:
                    saturated_ms[decision] = self._saturated_ms(tracker, frames.arrays)
                    if decision == "host":
                        stages = self._stages(tracker, frames.arrays)
                    if decision == "device":
                        row = self._time(tracker, frames.arrays)
        needed_ms = stages["crop"] + stages["segment_0"]
        return {
            "crop_and_segment_0_ms": needed_ms,
            "saturated_ms": saturated_ms,
            "submit_p50_us": row["submit_p50_us"],
            "ratio": saturated_ms["device"] / needed_ms,
        }

    def roofline(self) -> list[dict[str, Any]]:
        """GPU time of each segment over the floor of its products and weights."""
        last = self.bundle.num_exits - 1
        with _DeviceFrames(self.clip) as frames, self.tracker("host", last) as tracker:
            stages = self._stages(tracker, frames.arrays)
        rows = []
        for graph in self.bundle.segments:
            weight_bytes = self.bundle.graph_path(graph).stat().st_size / 2  # FP16 of FP32
            floors = {
                "products_ms": 2 * graph.macs / self.peak_tflops / 1e9,
                "weights_ms": weight_bytes / self.peak_gbps / 1e6,
            }
            took = stages[graph.name]
            rows.append(
                {
                    "segment": graph.name,
                    "gpu_ms": took,
                    "macs": graph.macs,
                    **floors,
                    "over_floor": took / max(floors.values()),
                }
            )
        return rows

    def soak(self) -> dict[str, Any]:
        """Memory and latency over many frames, with thresholds as they ship."""
        context = CudaContext.open()
        with _DeviceFrames(self.clip) as frames, self.tracker("device") as tracker:
            tracker.init(frames.arrays[0], self.clip[0][1])
            self._soak(tracker, frames.arrays, self.num_warm_up * 10)
            before = _memory(context)
            latencies_ms = self._soak(tracker, frames.arrays, self.soak_frames)
            after = _memory(context)
        context.close()
        return {
            "num_frames": len(latencies_ms),
            "before": before,
            "after": after,
            **_percentiles(latencies_ms, "first_half", "second_half"),
        }

    def _follow(self, tracker: Tracker) -> list[TrackResult]:
        tracker.init(*self.clip[0])
        results = [tracker.update(frame) for frame, _ in self.clip[1:]]
        return [dataclasses.replace(result, latency_ms=0.0) for result in results]

    def _host_frames(self) -> list[Any]:
        return [frame for frame, _ in self.clip]

    def _passes(self, tracker: Tracker, frames: list[Any], count: int) -> Any:
        """Frames again and again, begun afresh with each pass, so that the target is there."""
        while count > 0:
            tracker.init(frames[0], self.clip[0][1])
            yield from frames[1 : count + 1]
            count -= len(frames) - 1

    def _time(self, tracker: Tracker, frames: list[Any]) -> dict[str, float]:
        for frame in self._passes(tracker, frames, self.num_warm_up):
            tracker.update(frame)
        whole_ms, submit_us = [], []
        for frame in self._passes(tracker, frames, self.num_frames):
            started = time.perf_counter()
            pending = tracker.update_async(frame)
            submitted = time.perf_counter()
            pending.result()
            whole_ms.append((time.perf_counter() - started) * 1e3)
            submit_us.append((submitted - started) * 1e6)
        p50, p90, p99 = np.percentile(whole_ms, (50, 90, 99)).tolist()
        return {
            "p50_ms": p50,
            "p90_ms": p90,
            "p99_ms": p99,
            "p99_over_p50": p99 / p50,
            "submit_p50_us": float(np.median(submit_us)),
            "count": len(whole_ms),
        }

    def _saturated_ms(self, tracker: Tracker, frames: list[Any]) -> float:
        """Median over passes of time per frame, with as many frames under way as there may be."""
        passes_ms = []
        num_updates = len(frames) - 1
        for _ in range(1 + max(3, self.num_frames // num_updates)):
            tracker.init(frames[0], self.clip[0][1])
            started = time.perf_counter()
            pending = [tracker.update_async(frame) for frame in frames[1:]]
            pending[-1].result()
            passes_ms.append((time.perf_counter() - started) * 1e3)
        return float(np.median(passes_ms[1:])) / num_updates  # the first one warms up

    def _stages(self, tracker: Tracker, frames: list[Any]) -> dict[str, float]:
        """Median GPU time of each stage."""
        rows = []
        for frame in self._passes(tracker, frames, self.num_frames):
            tracker.update(frame)
            rows.append(dict(tracker.stage_ms))
        rows = rows[self.num_warm_up :] or rows
        return {name: float(np.median([row[name] for row in rows])) for name in rows[0]}

    def _soak(self, tracker: Tracker, frames: list[Any], count: int) -> list[float]:
        return [tracker.update(frame).latency_ms for frame in self._passes(tracker, frames, count)]


class _DeviceFrames:
    """The clip's frames in device memory, with ``__cuda_array_interface__``."""

    def __init__(self, clip: Clip) -> None:
        self._context = CudaContext.open()
        self._memory: list[Any] = []
        self.arrays: list[Any] = []
        with self._context.current():
            stream = self._context.stream()
            for frame, _ in clip:
                memory = self._context.allocate(frame.nbytes, what="a frame")
                self._memory.append(memory)
                self._context.copy_to_device(memory.address, frame, stream)
                stream.synchronize()
                self.arrays.append(_DeviceArray(memory.address, frame.shape))
            stream.close()

    def __enter__(self) -> "_DeviceFrames":
        return self

    def __exit__(self, *_: object) -> None:
        with self._context.current():
            for memory in self._memory:
                memory.close()
        self._context.close()


class _DeviceArray:
    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _memory(context: CudaContext) -> dict[str, float]:
    """What is in use just now; the highest use so far would hide what came back."""
    num_pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    with context.current():
        return {
            "device_used_mib": (context.device.memory_bytes - context.free_bytes) / 2**20,
            "process_used_mib": num_pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        }


def _percentiles(values: list[float], *halves: str) -> dict[str, Any]:
    parts = np.array_split(np.array(values), len(halves))
    return {
        f"{name}_ms": dict(
            zip(("p50", "p99", "max"), np.percentile(part, (50, 99, 100)).tolist(), strict=True)
        )
        for name, part in zip(halves, parts, strict=True)
    }


def run(job: Job, output: Path, *, setup: dict[str, Any]) -> dict[str, Any]:
    """Every part, each on its own; the file is complete after each."""
    content: dict[str, Any] = {"setup": setup}
    output.parent.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], Any]] = {
        "agreement": job.agreement,
        "latency": job.latency,
        "skipping": job.skipping,
        "roofline": job.roofline,
        "soak": job.soak,
    }
    for name, part in parts.items():
        started = time.perf_counter()
        try:
            content[name] = part()
        except Exception:  # what a GPU minute costs: the next part may well work
            content[name] = {"error": traceback.format_exc()}
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
        print(json.dumps(content[name], indent=1)[:2000], flush=True)
        output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return content


def main() -> None:
    args = _arguments()
    context = CudaContext.open()
    device = dataclasses.asdict(context.device)
    context.close()
    job = Job(
        args.backend,
        Bundle.load(args.bundle),
        precision=args.precision,
        num_frames=60 if args.quick else args.frames,
        soak_frames=200 if args.quick else args.soak,
        reference=args.reference,
        peak_tflops=args.peak_tflops,
        peak_gbps=args.peak_gbps,
    )
    setup = {
        "device": device,
        "backend": args.backend,
        "precision": args.precision,
        "bundle": {"name": job.bundle.name, "digest": job.bundle.digest},
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "peak_tflops": args.peak_tflops,
        "peak_gbps": args.peak_gbps,
    }
    slug = f"{device['name']}-{args.backend}-{args.precision or 'default'}".replace(" ", "_")
    run(job, args.output / f"frame_graph-{slug}.json", setup=setup)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--backend", default="torch-cuda")
    parser.add_argument("--bundle", help="folder; by default the one that ships")
    parser.add_argument("--precision")
    parser.add_argument("--reference", default="eager", help="CPU backend to compare with")
    parser.add_argument("--frames", type=int, default=500)
    parser.add_argument("--soak", type=int, default=10_000)
    # An H100's and H200's FP16 tensor cores without sparsity, and the H100's memory.
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--peak-gbps", type=float, default=3350.0)
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
