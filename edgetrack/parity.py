"""The same crops through two sets of engines: which tensor departs first, and does it matter?

Each graph of the second set gets what the first one's graphs wrote, so that a difference belongs to
the graph that makes it and not to those before. Whether it matters is asked of the whole chains,
each on its own tensors: how far their boxes and exits agree.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from edgetrack.backends.engine import Backend, DeviceEngine, Engine, EngineSet
from edgetrack.boxes import iou_xywh
from edgetrack.bundle import Bundle, GraphSpec
from edgetrack.errors import EngineMismatchError
from edgetrack.runtime.buffers import DeviceBuffers, allocate
from edgetrack.runtime.policies import ExitPolicy

__all__ = [
    "EngineRunner",
    "ExitAnswers",
    "ParityReport",
    "TensorDifference",
    "ask_exits",
    "compare",
    "open_runner",
]

Arrays = Mapping[str, npt.NDArray[Any]]
Float64Array = npt.NDArray[np.float64]
Answer = tuple[npt.NDArray[np.float64], float, float]  # box, uncertainty, score


@dataclass(frozen=True)
class TensorDifference:
    """How far one graph's output is from the reference, over all crops.

    Attributes:
        graph: The graph that wrote it, from the reference's inputs.
        tensor: Its name.
        max_abs: Largest absolute difference.
        rms: Root of the mean squared difference over that of the reference.
        cosine: Of the two tensors as vectors, the mean over crops; 1 is parallel.
    """

    graph: str
    tensor: str
    max_abs: float
    rms: float
    cosine: float


@dataclass(frozen=True)
class ParityReport:
    """How two sets of engines differ.

    Attributes:
        tensors: Outputs of all graphs, in their order.
        first_departing: The first whose ``rms`` exceeds the tolerance; ``None`` if none does.
        tolerance: What ``rms`` may be.
        bbox_iou_mean: IoU of the boxes of both chains at the same exit, over crops and exits.
        bbox_iou_min: The worst of them.
        exit_agreement: Share of crops at which both chains take the same exit.
        num_crops: Crops that were compared.
    """

    tensors: tuple[TensorDifference, ...]
    first_departing: TensorDifference | None
    tolerance: float
    bbox_iou_mean: float
    bbox_iou_min: float
    exit_agreement: float
    num_crops: int

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return asdict(self)


@dataclass(frozen=True)
class ExitAnswers:
    """What all exits said on N crops.

    Attributes:
        bbox_cxcywh: ``(N, exits, 4)``, normalised to the search region.
        uncertainty: ``(N, exits)``.
        score: ``(N, exits)``.
    """

    bbox_cxcywh: Float64Array
    uncertainty: Float64Array
    score: Float64Array

    def on(self, crops: slice) -> "ExitAnswers":
        """What they said on some of the crops."""
        return ExitAnswers(self.bbox_cxcywh[crops], self.uncertainty[crops], self.score[crops])

    def exits_taken(self, policy: ExitPolicy) -> npt.NDArray[np.intp]:
        """The exit that each crop takes, ``(N,)``."""
        rows = zip(self.bbox_cxcywh, self.uncertainty.tolist(), self.score.tolist(), strict=True)
        return np.array([_exit(policy, list(zip(*row, strict=True))) for row in rows], np.intp)

    def box_iou(self, other: "ExitAnswers") -> Float64Array:
        """IoU with the boxes of other engines, ``(N, exits)``; 0 where a box is not finite."""
        pairs = zip(self.bbox_cxcywh.reshape(-1, 4), other.bbox_cxcywh.reshape(-1, 4), strict=True)
        return np.array([_iou(*pair) for pair in pairs]).reshape(self.score.shape)


class EngineRunner(Protocol):
    """Engines of one bundle over tensors in host memory, wherever they run."""

    def run(self, index: int, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run graph ``index`` of the bundle on ``inputs`` and give its outputs."""

    def close(self) -> None:
        """Free the engines."""


def compare(
    bundle: Bundle,
    reference: EngineRunner,
    other: EngineRunner,
    crops: Iterable[Arrays],
    *,
    policy: ExitPolicy | None = None,
    other_policy: ExitPolicy | None = None,
    tolerance: float = 1e-3,
) -> ParityReport:
    """Compare two sets of engines of one bundle on crops.

    Args:
        bundle: What both were built from.
        reference: What counts as right.
        other: What is compared with it.
        crops: Per frame what was read, by name, as ``runtime.recording`` gives it.
        policy: What decides on exits; ``None`` is the bundle's default operating point.
        other_policy: What decides for ``other``, such as thresholds fitted to INT8; ``None`` is the
            same policy.
        tolerance: What the relative ``rms`` of a tensor may be.

    Raises:
        ValueError: There are no crops.
    """
    policy = ExitPolicy(bundle.thresholds(), bundle.criterion) if policy is None else policy
    other_policy = policy if other_policy is None else other_policy
    sums: dict[tuple[str, str], _Sums] = {}
    ious: list[float] = []
    num_equal_exits = num_crops = 0
    for crop in crops:
        exact = _chain(bundle, reference, crop)
        for graph in bundle.graphs_in_turn:
            written = other.run(bundle.graphs.index(graph), exact.inputs[graph.name])
            for spec in graph.outputs:
                key = graph.name, spec.name
                expected = exact.outputs[graph.name][spec.name]
                sums.setdefault(key, _Sums()).add(expected, written[spec.name])
        own = _chain(bundle, other, crop)
        ious += [_iou(a[0], b[0]) for a, b in zip(exact.answers, own.answers, strict=True)]
        num_equal_exits += _exit(policy, exact.answers) == _exit(other_policy, own.answers)
        num_crops += 1
    if not num_crops:
        raise ValueError("parity: expected crops to compare on, got none")
    tensors = tuple(
        TensorDifference(graph, tensor, *found.result()) for (graph, tensor), found in sums.items()
    )
    return ParityReport(
        tensors=tensors,
        first_departing=next((t for t in tensors if not t.rms <= tolerance), None),
        tolerance=tolerance,
        bbox_iou_mean=float(np.mean(ious)),
        bbox_iou_min=float(np.min(ious)),
        exit_agreement=num_equal_exits / num_crops,
        num_crops=num_crops,
    )


def ask_exits(bundle: Bundle, runner: EngineRunner, crops: Iterable[Arrays]) -> ExitAnswers:
    """Ask all exits on crops.

    Args:
        bundle: What the engines were built from.
        runner: The engines.
        crops: As for ``compare``.

    Raises:
        ValueError: There are no crops.
    """
    answers = [_chain(bundle, runner, crop).answers for crop in crops]
    if not answers:
        raise ValueError("parity: expected crops to ask on, got none")
    boxes, uncertainty, score = (
        np.array([[answer[part] for answer in row] for row in answers], np.float64)
        for part in range(3)
    )
    return ExitAnswers(boxes, uncertainty, score)


def open_runner(
    bundle: Bundle, backend: Backend, *, engines: EngineSet | None, device: int = 0
) -> EngineRunner:
    """Load engines to run graph by graph.

    Args:
        bundle: What they were built from.
        backend: What runs them.
        engines: Built ones; ``None`` compiles the bundle's graphs in memory.
        device: Number of the CUDA device, where the backend runs on one.

    Raises:
        EngineMismatchError: They were built from another bundle.
        EngineError: One does not load.
    """
    if engines is not None and engines.key.bundle_digest != bundle.digest:
        raise EngineMismatchError(
            f"{engines.path}: expected engines of {bundle.name} ({bundle.digest[:12]}…), got those "
            f"of {engines.key.model} ({engines.key.bundle_digest[:12]}…); name the bundle that "
            "they were built from"
        )

    def load(graph: GraphSpec) -> Engine | DeviceEngine:
        if engines is None:
            return backend.load_onnx(bundle.graph_path(graph), graph)
        return backend.load(engines.path / engines.graphs[graph.name].file, graph)

    if backend.runs_on == "cuda":
        return _DeviceRunner(bundle, load, device=device)
    return _HostRunner(bundle, load)


class _HostRunner:
    """Engines on the CPU."""

    def __init__(self, bundle: Bundle, load: Any) -> None:
        self._bundle, self._buffers = bundle, allocate(bundle)
        with contextlib.ExitStack() as opened:
            self._engines = []
            for graph in bundle.graphs:
                engine = cast("Engine", load(graph))
                opened.callback(engine.close)
                engine.bind(self._buffers)
                self._engines.append(engine)
            self._opened = opened.pop_all()

    def run(self, index: int, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        graph = self._bundle.graphs[index]
        for spec in graph.inputs:
            self._buffers[spec.name][...] = inputs[spec.name]
        self._engines[index].enqueue()
        return {spec.name: self._buffers[spec.name].copy() for spec in graph.outputs}

    def close(self) -> None:
        self._opened.close()


class _DeviceRunner:
    """Engines on a CUDA device."""

    def __init__(self, bundle: Bundle, load: Any, *, device: int) -> None:
        from edgetrack.backends.cuda import CudaContext

        self._bundle = bundle
        self._context = CudaContext.open(device)
        try:
            with self._context.current(), contextlib.ExitStack() as opened:
                self._engines: list[DeviceEngine] = []
                for graph in bundle.graphs:
                    engine = cast("DeviceEngine", load(graph))
                    opened.callback(engine.close)
                    self._engines.append(engine)
                buffers = DeviceBuffers(self._context, bundle, self._engines)
                opened.callback(buffers.close)
                stream = self._context.stream()
                opened.callback(stream.close)
                buffers.clear(stream)
                for engine in self._engines:
                    engine.bind_device(
                        buffers.addresses, scratch=buffers.scratch, stream=stream.handle
                    )
                self._buffers, self._stream = buffers, stream
                self._opened = opened.pop_all()
        except BaseException:
            self._context.close()
            raise

    def run(self, index: int, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        graph = self._bundle.graphs[index]
        with self._context.current():
            for spec in graph.inputs:
                self._buffers.write(spec.name, inputs[spec.name], self._stream)
            self._engines[index].enqueue_on(self._stream.handle)
            read = {s.name: self._buffers.read(s.name, self._stream) for s in graph.outputs}
        return {spec.name: read[spec.name].astype(spec.dtype) for spec in graph.outputs}

    def close(self) -> None:
        if not self._context.is_closed:
            with self._context.current():
                self._opened.close()
            self._context.close()


@dataclass(frozen=True)
class _Chain:
    """One crop through all graphs: what each read and wrote, by name, and the exits' answers."""

    inputs: dict[str, Arrays]
    outputs: dict[str, dict[str, npt.NDArray[Any]]]
    answers: list[Answer]


def _chain(bundle: Bundle, runner: EngineRunner, crop: Arrays) -> _Chain:
    state: dict[str, npt.NDArray[Any]] = {}
    inputs: dict[str, Arrays] = {}
    outputs, answers = {}, []
    for graph in bundle.graphs_in_turn:
        recorded = bundle.recorded_inputs(graph)
        state |= {spec.name: crop[name] for name, spec in recorded.items()}
        inputs[graph.name] = {spec.name: state[spec.name] for spec in graph.inputs}
        written = runner.run(bundle.graphs.index(graph), inputs[graph.name])
        outputs[graph.name] = written
        state |= written
        if "bbox_cxcywh" in written:  # of the segment, or of the head behind it
            box = written["bbox_cxcywh"][0].astype(np.float64)
            answers.append((box, float(state["uncertainty"][0]), float(state["score"][0])))
    return _Chain(inputs, outputs, answers)


def _exit(policy: ExitPolicy, answers: Sequence[Answer]) -> int:
    return next(
        k for k, (_, unsure, score) in enumerate(answers) if policy.should_exit(k, unsure, score)
    )


def _iou(first_cxcywh: npt.NDArray[np.float64], second_cxcywh: npt.NDArray[np.float64]) -> float:
    xywh = [np.concatenate([b[:2] - b[2:] / 2, b[2:]]) for b in (first_cxcywh, second_cxcywh)]
    return float(iou_xywh(*xywh)) if np.isfinite(xywh).all() else 0.0


class _Sums:
    """Differences of one tensor, crop by crop."""

    def __init__(self) -> None:
        self._max_abs = self._squared = self._reference = 0.0
        self._cosines: list[float] = []

    def add(self, exact: npt.NDArray[Any], got: npt.NDArray[Any]) -> None:
        a, b = exact.astype(np.float64).ravel(), got.astype(np.float64).ravel()
        self._max_abs = max(self._max_abs, float(np.abs(a - b).max()), key=_nan_first)
        self._squared += float(((a - b) ** 2).sum())
        self._reference += float((a**2).sum())
        length = float(np.linalg.norm(a) * np.linalg.norm(b))
        self._cosines.append(float(a @ b) / length if length else float(np.array_equal(a, b)))

    def result(self) -> tuple[float, float, float]:
        rms = math.sqrt(self._squared / self._reference) if self._reference else self._squared
        return self._max_abs, rms, float(np.mean(self._cosines))


def _nan_first(value: float) -> float:
    """A NaN counts as the largest difference."""
    return math.inf if math.isnan(value) else value
