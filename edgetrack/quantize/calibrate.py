"""Run a tracker's own crops through the float graphs, and keep the ranges of their activations.

The crops are gone through twice: for the largest magnitudes, then for histograms between 0 and
them. Neither depends on the order of the crops, and memory does not grow with their number.
"""

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgetrack.backends import import_package
from edgetrack.backends.ort import refusals
from edgetrack.bundle import Bundle, GraphSpec
from edgetrack.errors import CalibrationError
from edgetrack.quantize.cache import CalibrationCache
from edgetrack.quantize.layers import GraphIndex, find_layers
from edgetrack.quantize.plain import plain_copy, require_packages
from edgetrack.quantize.ranges import METHODS, MagnitudeHistogram, choose_range
from edgetrack.quantize.smooth import fold_smoothing, smoothable_tensors, smoothing_factors

if TYPE_CHECKING:
    import onnx

__all__ = ["MIN_CROPS", "Crops", "GraphRun", "calibrate", "chain_states", "smoothed_graphs"]

MIN_CROPS = 8

Arrays = Mapping[str, npt.NDArray[Any]]
Crops = Iterable[tuple[str, Arrays]]
Float32Array = npt.NDArray[np.float32]


class GraphRun:
    """A float graph in ONNX Runtime that also gives activations from its inside.

    Args:
        model: The graph; not written to.
        watched: Activations to give, besides the outputs.

    Raises:
        CalibrationError: ONNX Runtime cannot run it.
    """

    def __init__(self, model: "onnx.ModelProto", watched: Iterable[str] = ()) -> None:
        import onnx

        ort = import_package("onnxruntime")
        refused = refusals()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        tapped = onnx.ModelProto()
        tapped.CopyFrom(model)
        self._inputs = [value.name for value in model.graph.input]
        self._outputs = [value.name for value in model.graph.output]
        inside = set(watched) - {*self._inputs, *self._outputs}
        for name in sorted(inside):
            tapped.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        self._outputs += sorted(inside)
        try:
            self._session = ort.InferenceSession(
                tapped.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except refused as error:
            raise CalibrationError(
                f"graph {model.graph.name!r}: expected one that ONNX Runtime runs, got: {error}; "
                "update onnxruntime, or export the bundle again"
            ) from error

    def run(self, state: Arrays) -> dict[str, npt.NDArray[Any]]:
        """All outputs and watched activations for the inputs that ``state`` holds by name."""
        feeds = {name: state[name] for name in self._inputs}
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))


def calibrate(
    bundle: Bundle,
    crops: Crops,
    *,
    method: str = "percentile",
    percentile: float = 99.99,
    smoothing: float = 0.5,
    on_progress: Callable[[float], None] | None = None,
) -> CalibrationCache:
    """Find the ranges of a bundle's activations.

    Args:
        bundle: What to calibrate.
        crops: Per frame its name and what the tracker read, by tensor name: ``template``,
            ``template_bbox_cxcywh`` and ``search_region``, and whatever else ``runtime.recording``
            gives.
        method: How to choose ranges, one of ``ranges.METHODS``.
        percentile: For the method of that name: the share that is not clipped, in percent.
        smoothing: Strength of SmoothQuant, 0 to 1; 0 is none.
        on_progress: Called with the fraction done.

    Raises:
        CalibrationError: There are too few crops, they show nothing, or do not fit the bundle, an
            activation is not finite, or ONNX Runtime cannot run a graph.
        ValueError: The method is unknown, or a number out of its range.
        BackendUnavailableError: onnx, onnx-graphsurgeon or onnxruntime is not installed.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing: expected a number from 0 to 1, got {smoothing!r}")
    require_packages("onnx", "onnx_graphsurgeon")
    seen = list(crops)
    _check_crops(bundle, seen)
    progress = _Progress(2 * len(seen), on_progress)
    graphs = _load(bundle)
    largest, maxima = _find_maxima(bundle, graphs, progress.over(seen))
    if smoothing > 0:
        for name, model in graphs.items():
            factors = smoothing_factors(model, maxima[name], strength=smoothing)
            for tensor, by in factors.items():
                largest[name][tensor] = float((np.array(maxima[name][tensor]) / by).max())
            graphs[name] = fold_smoothing(model, factors)
    histograms = _count(bundle, graphs, largest, progress.over(seen))
    return CalibrationCache(
        model=bundle.name,
        bundle_digest=bundle.digest,
        method=method,
        percentile=percentile,
        smoothing=smoothing,
        ranges={
            graph: {
                name: _six_digits(choose_range(histogram, method, percentile=percentile))
                for name, histogram in of_graph.items()
            }
            for graph, of_graph in histograms.items()
        },
        channel_maxima=maxima,
        frames=tuple((name, _digest(tensors)) for name, tensors in seen),
        tools={p: importlib.metadata.version(p) for p in ("numpy", "onnx", "onnxruntime")},
    )


def smoothed_graphs(bundle: Bundle, cache: CalibrationCache) -> "dict[str, onnx.ModelProto]":
    """The float graphs of a bundle that a cache's ranges belong to, by name.

    Raises:
        CalibrationError: The cache is of another bundle, or lacks a tensor.
    """
    cache.check(bundle)
    graphs = _load(bundle)
    for name, model in graphs.items():
        if cache.smoothing <= 0:
            continue
        maxima = cache.channel_maxima.get(name, {})
        if missing := sorted(set(smoothable_tensors(model)) - maxima.keys()):
            raise CalibrationError(
                f"calibration cache of {cache.model}: expected maxima for {missing[0]!r} of "
                f"{name}, got none; make another with: edgetrack calibrate"
            )
        factors = smoothing_factors(model, maxima, strength=cache.smoothing)
        graphs[name] = fold_smoothing(model, factors)
    return graphs


def chain_states(
    bundle: Bundle, runs: Mapping[str, GraphRun], crops: Crops
) -> Iterator[tuple[str, str, dict[str, npt.NDArray[Any]]]]:
    """Run all graphs on every crop, the template graph once per template.

    Args:
        bundle: Which graphs, in which order.
        runs: Graph → what runs it.
        crops: As for ``calibrate``.

    Yields:
        Frame name, graph name, and what the graph read and gave. A template that was seen before
        is not given again.
    """
    state: dict[str, npt.NDArray[Any]] = {}
    templates: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for frame, tensors in crops:
        key = _digest({spec.name: tensors[spec.name] for spec in bundle.template.inputs})
        if key not in templates:
            templates[key] = runs["template"].run(tensors)
            yield frame, "template", {**tensors, **templates[key]}
        state.update(templates[key])
        for graph in bundle.graphs_in_turn[1:]:
            recorded = bundle.recorded_inputs(graph)
            state.update({spec.name: tensors[name] for name, spec in recorded.items()})
            given = runs[graph.name].run(state)
            yield frame, graph.name, {**state, **given}
            state.update({spec.name: given[spec.name] for spec in graph.outputs})


class _Progress:
    def __init__(self, num_steps: int, report: Callable[[float], None] | None) -> None:
        self._num_steps, self._report, self._done = num_steps, report, 0

    def over(self, crops: Crops) -> Crops:
        for crop in crops:
            yield crop
            self._done += 1
            if self._report is not None:
                self._report(self._done / self._num_steps)


def _load(bundle: Bundle) -> "dict[str, onnx.ModelProto]":
    import onnx

    graphs = {}
    for graph in bundle.graphs:
        try:
            graphs[graph.name] = plain_copy(onnx.load(bundle.graph_path(graph)))
        except ValueError as error:
            raise CalibrationError(
                f"{bundle.graph_path(graph)}: {error}; export the bundle again"
            ) from error
    return graphs


def _watched(model: "onnx.ModelProto") -> list[str]:
    """What layers read, and what convolutions give, also behind a ReLU."""
    index = GraphIndex(model.graph)
    watched: list[str] = []
    for layer in find_layers(model):
        watched += layer.inputs
        if layer.kind == "conv":
            watched.append(layer.output)
            for reader in index.readers.get(layer.output, []):
                if model.graph.node[reader].op_type == "Relu":
                    watched.append(model.graph.node[reader].output[0])
    return sorted(set(watched))


def _find_maxima(
    bundle: Bundle, graphs: "Mapping[str, onnx.ModelProto]", crops: Crops
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, tuple[float, ...]]]]:
    """Largest magnitudes of watched activations, and of smoothable ones by channel."""
    watched = {name: _watched(model) for name, model in graphs.items()}
    smoothable = {name: smoothable_tensors(model) for name, model in graphs.items()}
    runs = {n: GraphRun(m, [*watched[n], *smoothable[n]]) for n, m in graphs.items()}
    largest: dict[str, dict[str, float]] = {name: {} for name in graphs}
    channels: dict[str, dict[str, Float32Array]] = {name: {} for name in graphs}
    for frame, graph, state in chain_states(bundle, runs, crops):
        for name in watched[graph]:
            amax = float(np.abs(state[name]).max())
            if not np.isfinite(amax):
                raise CalibrationError(
                    f"{graph}: expected finite activations, got {amax} at {name!r} on "
                    f"{frame!r}; the model diverged, export one that tracks"
                )
            largest[graph][name] = max(amax, largest[graph].get(name, 0.0))
        for name in smoothable[graph]:
            found = np.abs(state[name]).reshape(-1, state[name].shape[-1]).max(0)
            channels[graph][name] = np.maximum(found, channels[graph].get(name, found))
    maxima = {
        graph: {name: tuple(_six_digits(v) for v in values) for name, values in of_graph.items()}
        for graph, of_graph in channels.items()
    }
    return largest, maxima


def _count(
    bundle: Bundle,
    graphs: "Mapping[str, onnx.ModelProto]",
    largest: Mapping[str, Mapping[str, float]],
    crops: Crops,
) -> dict[str, dict[str, MagnitudeHistogram]]:
    """Histograms of watched activations."""
    runs = {name: GraphRun(model, largest[name]) for name, model in graphs.items()}
    histograms = {
        graph: {name: MagnitudeHistogram(amax) for name, amax in of_graph.items()}
        for graph, of_graph in largest.items()
    }
    for _, graph, state in chain_states(bundle, runs, crops):
        for name, histogram in histograms[graph].items():
            histogram.add(state[name])
    return histograms


def _check_crops(bundle: Bundle, crops: list[tuple[str, Arrays]]) -> None:
    """Refuse crops from which nothing can be learnt."""
    if len(crops) < MIN_CROPS:
        raise CalibrationError(
            f"calibrate: expected at least {MIN_CROPS} crops, better 200, got {len(crops)}; "
            "give more frames"
        )
    recorded = {n: s for g in bundle.graphs for n, s in bundle.recorded_inputs(g).items()}
    for frame, tensors in crops:
        for name, spec in recorded.items():
            array = tensors.get(name)
            if array is None or array.shape != spec.shape or array.dtype != spec.dtype:
                got = "none" if array is None else f"{array.dtype} {array.shape}"
                raise CalibrationError(
                    f"{frame}: expected {name!r} as {spec.dtype} {spec.shape}, got {got}; "
                    f"record the crops with {bundle.name}"
                )
    first = _first_input(bundle.segments[0])
    if all(np.ptp(tensors[first]) == 0 for _, tensors in crops):
        raise CalibrationError(
            f"calibrate: expected frames that show something, got {len(crops)} of one colour; "
            "give other frames"
        )


def _first_input(segment: GraphSpec) -> str:
    """The search region: the one input of bytes."""
    return next(spec.name for spec in segment.inputs if spec.dtype == "uint8")


def _digest(tensors: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _six_digits(number: float) -> float:
    """Enough for a scale, and free of the noise of another machine's rounding."""
    return float(f"{number:.6g}")
