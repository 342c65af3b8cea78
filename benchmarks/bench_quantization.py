"""INT8 on ONNX Runtime's CPU provider beside FP32: error, agreement, time, bytes, and AUC.

    python benchmarks/bench_quantization.py DATA_ROOT [--track STARTS] [--calibrate-on OTHER_ROOT]

On the same crops of DATA_ROOT: how far the boxes and uncertainties of every exit are from FP32's,
how often the same exit is taken at the bundle's own operating point, how long each segment takes
(engines take turns, in blocks), and how large the engines are. The rows, from the committed cache:
ONNX Runtime's twin, the plain Q/DQ graph, and TensorRT's FP16 twin, run by ONNX Runtime; the first
calibrated on OTHER_ROOT instead; with ``--static`` ONNX Runtime's own ``quantize_static``; and with
``--modelopt PYTHON`` NVIDIA's ModelOpt, run by the Python that it is installed for.
``rtx`` says whether TensorRT-RTX builds it. ``--track`` adds closed-loop AUC, from several starts,
and ``update`` times.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgetrack.backends.ort import OnnxRuntimeBackend, cpu_name
from edgetrack.boxes import cxcywh_to_xywh, iou_xywh
from edgetrack.bundle import Bundle
from edgetrack.data.sequences import Sequence, read_sequences
from edgetrack.evaluate.exits import exit_shares, exits_taken
from edgetrack.evaluate.protocols import SequenceResult, evaluate_sequence
from edgetrack.quantize.cache import CalibrationCache, find_cache
from edgetrack.quantize.calibrate import GraphRun, calibrate, chain_states
from edgetrack.quantize.int8 import quantize_bundle
from edgetrack.runtime.buffers import allocate
from edgetrack.runtime.recording import record_crops
from edgetrack.tracker import Tracker

RESULTS = Path(__file__).parent / "results"
CALIBRATION = Path(__file__).parents[1] / "calibration"
MODELOPT_SCRIPT = Path(__file__).parent / "modelopt_graphs.py"
CROPS_PER_SEQUENCE = 25
NUM_BLOCKS, BLOCK = 15, 20
FRAMES_IN_TURN = 12
TRACKED = ("fp32", "int8", "quantize_static, uint8", "ModelOpt")

Models = Mapping[str, onnx.ModelProto]
Crops = list[tuple[str, dict[str, Any]]]


def crops_of(bundle: Bundle, sequences: Iterable[Sequence]) -> Crops:
    """Some crops of every sequence, evenly spread."""
    crops: Crops = []
    for sequence in sequences:
        start = sequence.boxes_xywh[0].tolist()
        found = list(record_crops(bundle, sequence.frames(), start, name=sequence.name))
        step = max(len(found) // CROPS_PER_SEQUENCE, 1)
        crops += found[::step][:CROPS_PER_SEQUENCE]
        print(f"\r{sequence.name:40s}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return crops


def answers_of(bundle: Bundle, models: Models, crops: Crops) -> tuple[Any, Any]:
    """Boxes ``(N, exits, 4)`` cxcywh and uncertainties ``(N, exits)``."""
    runs = {name: GraphRun(model) for name, model in models.items()}
    found = [s for _, graph, s in chain_states(bundle, runs, crops) if graph != "template"]
    boxes = np.array([state["bbox_cxcywh"][0] for state in found])
    uncertainty = np.array([state["uncertainty"][0] for state in found])
    return (
        boxes.reshape(-1, bundle.num_exits, 4),
        uncertainty.reshape(-1, bundle.num_exits),
    )


def agreement(bundle: Bundle, got: tuple[Any, Any], expected: tuple[Any, Any]) -> dict[str, Any]:
    """Per exit the IoU of boxes and the difference of uncertainty; over all, the exits taken."""
    iou = iou_xywh(cxcywh_to_xywh(got[0]), cxcywh_to_xywh(expected[0]))
    taken, wanted = (exits_taken(u, bundle.thresholds()) for u in (got[1], expected[1]))
    return {
        "iou_per_exit": iou.mean(0).tolist(),
        "iou_5_percent_per_exit": np.quantile(iou, 0.05, axis=0).tolist(),
        "uncertainty_difference_per_exit": np.abs(got[1] - expected[1]).mean(0).tolist(),
        "exit_agreement": float((taken == wanted).mean()),
        "exit_shares": exit_shares(taken, num_exits=bundle.num_exits).tolist(),
    }


def engines_of(bundle: Bundle, models: Models, folder: Path) -> dict[str, Any]:
    """Engines as the backend builds and loads them, and their size."""
    backend = OnnxRuntimeBackend()
    loaded, size = [], 0
    for graph in bundle.graphs:
        model = models[graph.name]
        is_ours = any(prop.key == "edgetrack.precision" for prop in model.metadata_props)
        onnx.save(model, folder / "graph.onnx")
        backend.compile(
            folder / "graph.onnx", folder / "engine.onnx", precision="int8" if is_ours else "fp32"
        )
        size += (folder / "engine.onnx").stat().st_size
        loaded.append(backend.load(folder / "engine.onnx", graph))
    return {"engines": loaded, "bytes": size}


def segment_ms(bundle: Bundle, rows: Mapping[str, Any], crop: dict[str, Any]) -> None:
    """Median time of each graph, rows in turn, in blocks: in each, the first two runs warm up."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in bundle.graphs] for name in rows}
    buffers = {name: allocate(bundle) for name in rows}
    for name, row in rows.items():
        for tensor, values in crop.items():
            buffers[name][tensor][...] = values
        for engine in row["engines"]:
            engine.bind(buffers[name])
            engine.enqueue()
    for _ in range(NUM_BLOCKS):
        for name, row in rows.items():
            for engine, of_graph in zip(row["engines"], times[name], strict=True):
                of_graph += _timed(engine.enqueue)[2:]
    for name, row in rows.items():
        row["ms_per_graph"] = [statistics.median(t) for t in times[name]]


def _timed(run: Callable[[], None]) -> list[float]:
    times = []
    for _ in range(BLOCK + 2):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def feeds_of(bundle: Bundle, crops: Crops) -> dict[str, list[dict[str, Any]]]:
    """What each graph reads on some of the crops."""
    floats = {g.name: onnx.load(bundle.graph_path(g)) for g in bundle.graphs}
    feeds: dict[str, list[Any]] = {name: [] for name in floats}
    runs = {name: GraphRun(model) for name, model in floats.items()}
    for _, graph, state in chain_states(bundle, runs, crops[::8]):
        feeds[graph].append({v.name: state[v.name] for v in floats[graph].graph.input})
    return feeds


def modelopt_quantisation(bundle: Bundle, crops: Crops, python: Path) -> Models:
    """NVIDIA ModelOpt's own choice of layers, calibrated with ``max`` on some of the crops."""
    models = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, feeds in feeds_of(bundle, crops).items():
            stacked = {n: np.concatenate([feed[n] for feed in feeds]) for n in feeds[0]}
            np.savez(Path(folder) / f"{name}.npz", **stacked)
            shutil.copy(bundle.path / f"{name}.onnx", folder)
        subprocess.run([python, MODELOPT_SCRIPT, folder], check=True, stdout=subprocess.DEVNULL)
        for graph in bundle.graphs:
            models[graph.name] = onnx.load(Path(folder) / f"{graph.name}.quantized.onnx")
    return models


def static_quantisation(bundle: Bundle, crops: Crops, *, signed: bool) -> Models:
    """ONNX Runtime's ``quantize_static`` of layers alone, per channel, on some of the crops."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
        def __init__(self, of_graph: list[Any]) -> None:
            self._rest = iter(of_graph)

        def get_next(self) -> Any:
            return next(self._rest, None)

    models = {}
    feeds = feeds_of(bundle, crops)
    with tempfile.TemporaryDirectory() as folder:
        for name in feeds:
            path = Path(folder) / f"{name}.onnx"
            quantize_static(
                bundle.path / f"{name}.onnx",
                path,
                Reader(feeds[name]),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Gemm", "MatMul"],
                per_channel=True,
                activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={
                    "ActivationSymmetric": signed,
                    "WeightSymmetric": True,
                    "QuantizeBias": not signed,
                },
            )
            models[name] = onnx.load(path)
    return models


def is_built_by_rtx(models: Models) -> str:
    """Whether TensorRT-RTX parses and builds all graphs; else what it says first."""
    try:
        import tensorrt_rtx as trt
    except ImportError:
        return "not installed"
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    for name, model in models.items():
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse(model.SerializeToString()):
            return f"{name}: {parser.get_error(0).desc()}"
        if builder.build_serialized_network(network, builder.create_builder_config()) is None:
            return f"{name}: not built"
    return "yes"


class Shifted:
    """A tracker that is started a fraction of a pixel off."""

    def __init__(self, tracker: Tracker, shift_px: Any) -> None:
        self._tracker, self._shift_px = tracker, shift_px

    def init(self, frame: Any, bbox: Any) -> None:
        x, y, w, h = bbox
        self._tracker.init(frame, (x + self._shift_px[0], y + self._shift_px[1], w, h))

    def update(self, frame: Any) -> Any:
        return self._tracker.update(frame)


def open_trackers(bundle: Bundle, rows: Mapping[str, Models]) -> dict[str, Tracker]:
    """A tracker of each row's graphs, at the bundle's default operating point."""
    trackers = {}
    for name, models in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            for file in bundle.files:
                shutil.copy(bundle.path / file, folder)
            for graph, model in models.items():
                onnx.save(model, Path(folder) / f"{graph}.onnx")
            copy = dataclasses.replace(bundle, path=Path(folder)).write()
            trackers[name] = Tracker(copy, backend="onnxruntime", engines=folder)
    return trackers


def track(
    bundle: Bundle, trackers: Mapping[str, Tracker], sequences: list[Sequence], *, num_starts: int
) -> dict[str, dict[str, Any]]:
    """AUC in closed loop, and the exits taken.

    One lost target moves the mean AUC of 16 sequences by a point, and whether it is lost may hang
    on a rounding. So each sequence is tracked from several starts, half a pixel apart at most.
    """
    shifts_px = np.random.default_rng(0).uniform(-0.5, 0.5, (num_starts, 2))
    shifts_px[0] = 0
    found: dict[str, list[list[SequenceResult]]] = {name: [] for name in trackers}
    for sequence in sequences:
        for name, tracker in trackers.items():
            starts = [Shifted(tracker, shift) for shift in shifts_px.tolist()]
            found[name].append([evaluate_sequence(start, sequence) for start in starts])
        print(f"\r{sequence.name:40s}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {name: closed_loop_report(bundle, results) for name, results in found.items()}


def closed_loop_report(bundle: Bundle, results: list[list[SequenceResult]]) -> dict[str, Any]:
    """AUC per start, and exits over all; ``results`` is per sequence and start."""
    rows = [row for starts in results for result in starts for row in result.rows[1:]]
    exits = np.array([row.exit_index for row in rows])
    auc = np.array([[result.metrics.success_auc for result in starts] for starts in results])
    return {
        "auc_per_start": auc.mean(0).tolist(),
        "auc_mean": float(auc.mean()),
        "auc_per_sequence": {
            starts[0].name: of_sequence.tolist()
            for starts, of_sequence in zip(results, auc, strict=True)
        },
        "exit_shares": exit_shares(exits, num_exits=bundle.num_exits).tolist(),
    }


def update_ms(
    trackers: Mapping[str, Tracker], sequences: Iterable[Sequence]
) -> dict[str, dict[str, float]]:
    """Times of ``update``, some frames with each tracker in turn: load disturbs all alike."""
    latencies: dict[str, list[float]] = {name: [] for name in trackers}
    for sequence in sequences:
        frames = sequence.frames()
        first = next(frames)
        for tracker in trackers.values():
            tracker.init(first, bbox=sequence.boxes_xywh[0].tolist())
        while block := list(itertools.islice(frames, FRAMES_IN_TURN)):
            for name, tracker in trackers.items():
                latencies[name] += [tracker.update(frame).latency_ms for frame in block]
    return {
        name: {f"p{q}": float(np.percentile(times, q)) for q in (10, 50, 90)}
        for name, times in latencies.items()
    }


def rows_of(bundle: Bundle, crops: Crops, args: argparse.Namespace) -> dict[str, Models]:
    """What is compared, by name; FP32 comes first."""
    path = args.cache or find_cache(bundle, CALIBRATION)
    cache = CalibrationCache.read(path)
    rows: dict[str, Models] = {
        "fp32": {g.name: onnx.load(bundle.graph_path(g)) for g in bundle.graphs},
        "int8": quantize_bundle(bundle, cache, runtime="onnxruntime"),
        "int8, Q/DQ graph": quantize_bundle(bundle, cache),
        "int8, FP16 twin": quantize_bundle(bundle, cache, runtime="tensorrt"),
    }
    if args.calibrate_on is not None:
        seen = crops_of(bundle, read_sequences(args.calibrate_on))
        other = calibrate(bundle, seen, method=cache.method, smoothing=cache.smoothing)
        rows["int8, calibrated on real videos"] = quantize_bundle(
            bundle, other, runtime="onnxruntime"
        )
    if args.static:
        rows["quantize_static, uint8"] = static_quantisation(bundle, crops, signed=False)
        rows["quantize_static, int8"] = static_quantisation(bundle, crops, signed=True)
    if args.modelopt is not None:
        rows["ModelOpt"] = modelopt_quantisation(bundle, crops, args.modelopt)
    return rows


def main(arguments: list[str] | None = None) -> None:
    args = _arguments(arguments)
    bundle = Bundle.load(args.bundle)
    sequences = read_sequences(args.root)
    crops = crops_of(bundle, sequences)
    models = rows_of(bundle, crops, args)
    expected = answers_of(bundle, models["fp32"], crops)
    rows: dict[str, dict[str, Any]] = {}
    for name, of_row in models.items():
        print(f"\r{name:40s}", end="", file=sys.stderr)
        rows[name] = agreement(bundle, answers_of(bundle, of_row, crops), expected)
        if name != "fp32":
            rows[name]["rtx"] = is_built_by_rtx(of_row)
    with tempfile.TemporaryDirectory() as folder:
        timed = {n: m for n, m in models.items() if "twin" not in n and "real" not in n}
        engines = {name: engines_of(bundle, m, Path(folder)) for name, m in timed.items()}
        segment_ms(bundle, engines, crops[0][1])
    for name, row in engines.items():
        rows[name] |= {"bytes": row["bytes"], "ms_per_graph": row["ms_per_graph"]}
    report: dict[str, Any] = {
        "device": f"{cpu_name()}, one thread",
        "bundle": bundle.name,
        "digest": bundle.digest,
        "num_crops": len(crops),
        "graphs": [graph.name for graph in bundle.graphs],
        "rows": rows,
    }
    if args.track:
        tracked = {name: models[name] for name in TRACKED if name in models}
        trackers = open_trackers(bundle, tracked)
        report["closed_loop"] = track(bundle, trackers, list(sequences), num_starts=args.track)
        for name, times in update_ms(trackers, sequences).items():
            report["closed_loop"][name]["update_ms"] = times
    args.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    _show(report)


def _show(report: Mapping[str, Any]) -> None:
    print(f"\n{'':32s} IoU per exit          agree  ms per graph                 MB    rtx")
    for name, row in report["rows"].items():
        iou = " ".join(f"{v:.4f}" for v in row["iou_per_exit"])
        times = " ".join(f"{v:6.2f}" for v in row.get("ms_per_graph", []))
        size = f"{row['bytes'] / 1e6:6.2f}" if "bytes" in row else ""
        print(
            f"{name:32s} {iou}  {row['exit_agreement']:.4f} {times:28s} {size:6s} "
            f"{row.get('rtx', '')[:60]}"
        )
    for name, found in report.get("closed_loop", {}).items():
        times = ", ".join(f"{k} {v:.2f}" for k, v in found["update_ms"].items())
        auc = " ".join(f"{value:.4f}" for value in found["auc_per_start"])
        print(f"{name}: AUC {found['auc_mean']:.4f} ({auc}), update {times} ms")


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("root", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--calibrate-on", type=Path)
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--modelopt", type=Path, metavar="PYTHON")
    parser.add_argument("--track", type=int, default=0, metavar="STARTS")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "quantization-cpu-onnxruntime-int8.json"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
