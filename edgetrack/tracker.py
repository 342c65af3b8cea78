"""The tracker: ``init`` on a box, then ``update`` frame by frame."""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.backends import get_backend
from edgetrack.backends.engine import Backend, Engine, find_engines
from edgetrack.boxes import as_bbox_xywh
from edgetrack.bundle import Bundle
from edgetrack.crops import Cropper, CropWindow
from edgetrack.errors import BundleFormatError, FrameSizeError, TrackerStateError
from edgetrack.runtime.chain import Chain
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules, TargetState

__all__ = ["TrackResult", "Tracker"]

_NUM_WARM_UP_RUNS = 2


@dataclass(frozen=True)
class TrackResult:
    """Where the target is in one frame.

    Attributes:
        bbox: x, y, w, h in frame pixels, top-left origin; a guess while the target is lost.
        score: Confidence in [0, 1].
        is_lost: Whether the target counts as lost: unsure for some frames, and not found since.
        uncertainty: Normalised entropy of the box edges in [0, 1]; what the exit was decided by.
        exit_index: The exit that was taken, from 0.
        latency_ms: Time of this update, crop included.
    """

    bbox: tuple[float, float, float, float]
    score: float
    is_lost: bool
    uncertainty: float
    exit_index: int
    latency_ms: float


class Tracker:
    """Follow one object through frames.

    Args:
        bundle: A bundle or its folder; ``None`` is the one that ships.
        backend: ``auto``, ``onnxruntime``, ``eager``, ``tensorrt`` or ``tensorrt-rtx``.
        precision: ``None`` is the backend's own default.
        operating_point: A named pair of speed and accuracy of the bundle; ``None`` is its default.
        exit_policy: When to stop early, instead of the operating point.
        rules: How answers become the target's state, instead of the bundle's own rules.
        engines: Folder where ``edgetrack build`` put engines. ONNX Runtime starts straight from
            the bundle if none are there.
        num_threads: Threads of a CPU backend; ``None`` lets it choose.

    Raises:
        BundleError: The bundle is missing, damaged or too new.
        BackendUnavailableError: The backend is unknown or not installed.
        EngineError: Its engines are missing, or were built for something else.
        ValueError: The bundle has no such operating point, or the policy does not fit it.

    Attributes:
        bundle: What it runs.
        backend: Name of the backend that was chosen.
        precision: Precision of its engines.
        engines_path: Folder of the built engines; ``None`` where it started from the bundle.

    After an exception in ``update`` the tracker keeps its last box; call ``init`` to start afresh.

    Example:
        >>> import edgetrack
        >>> from edgetrack.data.synthetic import render_clip
        >>> frames = render_clip(num_frames=5)
        >>> with edgetrack.Tracker() as tracker:
        ...     frame, bbox = next(frames)
        ...     tracker.init(frame, bbox=bbox)
        ...     for frame, _ in frames:
        ...         result = tracker.update(frame)
        >>> len(result.bbox)
        4
    """

    def __init__(
        self,
        bundle: "Bundle | str | os.PathLike[str] | None" = None,
        *,
        backend: str = "auto",
        precision: str | None = None,
        operating_point: str | None = None,
        exit_policy: ExitPolicy | None = None,
        rules: TargetRules | None = None,
        engines: str | os.PathLike[str] = "engines",
        num_threads: int | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        thresholds = self.bundle.thresholds(operating_point)
        try:
            own_policy = ExitPolicy(thresholds, self.bundle.criterion)
            own_rules = TargetRules.of(self.bundle.rules)
        except ValueError as error:
            raise BundleFormatError(f"{self.bundle.path}: {error}; export it again") from error
        self.exit_policy = own_policy if exit_policy is None else exit_policy
        self.rules = own_rules if rules is None else rules
        chosen = get_backend(backend, num_threads=num_threads)
        self.backend = chosen.name
        self.precision = chosen.precisions[0] if precision is None else precision
        crops = self.bundle.crops
        self._template_cropper = Cropper(crops.template_size_px)
        self._search_cropper = Cropper(crops.search_size_px)
        self._target: TargetState | None = None
        self._window = CropWindow(0, 0, 1)
        self._frame_shape: tuple[int, ...] = ()
        self._num_frames = 0
        self._is_closed = False
        self._crop_ms = 0.0
        with contextlib.ExitStack() as opened:
            loaded, self.engines_path = _load_engines(
                self.bundle, chosen, precision=self.precision, root=Path(engines), opened=opened
            )
            self._chain = Chain(self.bundle, loaded)
            self._warm_up()
            opened.pop_all()  # all went well: from here on ``close`` frees them

    @property
    def exit_policy(self) -> ExitPolicy:
        """When to stop early; another one may be set between frames.

        Raises:
            ValueError: The policy that is set has not one threshold per exit but the last.
        """
        return self._exit_policy

    @exit_policy.setter
    def exit_policy(self, policy: ExitPolicy) -> None:
        if not isinstance(policy, ExitPolicy):
            raise TypeError(
                f"exit_policy: expected an ExitPolicy, got {policy!r}; see edgetrack.ExitPolicy"
            )
        if len(policy.thresholds) != self.bundle.num_exits - 1:
            raise ValueError(
                f"exit_policy: expected {self.bundle.num_exits - 1} thresholds for "
                f"{self.bundle.name}, got {len(policy.thresholds)}"
            )
        self._exit_policy = policy

    @property
    def bbox(self) -> tuple[float, float, float, float] | None:
        """The current box, xywh in frame pixels; ``None`` before ``init``."""
        return None if self._target is None else _as_tuple(self._target.bbox_xywh)

    @property
    def stage_ms(self) -> dict[str, float]:
        """Time of the last update: ``crop``, each ``segment_<k>`` that ran, ``decide``."""
        segments = self._chain.segment_ms
        ran = {f"segment_{k}": float(ms) for k, ms in enumerate(segments) if ms == ms}
        decide = self._chain.run_ms - sum(ran.values())
        return {"crop": self._crop_ms, **ran, "decide": decide}

    def init(self, frame: npt.NDArray[np.uint8], bbox: Sequence[float]) -> None:
        """Start on a frame.

        Args:
            frame: uint8; ``(H, W, 3)`` BGR, ``(H, W)`` or ``(H, W, 1)`` grey, ``(H, W, 4)`` BGRA.
            bbox: The target: x, y, w, h in pixels.

        Raises:
            TypeError: The frame is not a uint8 array.
            ValueError: Its shape is wrong, or the box is not a finite box that overlaps it.
            TrackerStateError: The tracker was closed.
        """
        self._require_open()
        frame = _checked(frame)
        height, width = frame.shape[:2]
        bbox_xywh = as_bbox_xywh(bbox, width_px=width, height_px=height)
        buffers = self._chain.buffers
        window = CropWindow.around(bbox_xywh, factor=self.bundle.crops.template_factor)
        self._template_cropper.crop(frame, window, out=buffers["template"][0])
        if "template_bbox_cxcywh" in buffers:
            buffers["template_bbox_cxcywh"][0] = window.to_crop(bbox_xywh)
        self._chain.run_template()
        self._target = TargetState(bbox_xywh, frame_shape=frame.shape, rules=self.rules)
        self._frame_shape, self._num_frames = frame.shape, 1

    def update(self, frame: npt.NDArray[np.uint8]) -> TrackResult:
        """Find the target in the next frame.

        Args:
            frame: As in ``init``, and of the same shape.

        Returns:
            The answer of the exit that was taken. If a network gives a box or a score that is not
            finite, the last box stays and the score is 0.

        Raises:
            TrackerStateError: ``init`` was not called, or the tracker was closed.
            TypeError: The frame is not a uint8 array.
            FrameSizeError: The frame's shape differs from that of ``init``.
        """
        started = time.perf_counter()
        self._require_open()
        if self._target is None:
            raise TrackerStateError("tracker: expected init before update, got update; call init")
        frame = _checked(frame)
        if frame.shape != self._frame_shape:
            raise FrameSizeError(
                f"frame {self._num_frames}: expected shape {self._frame_shape} as at init, got "
                f"{frame.shape}; call init again on the new shape"
            )
        buffers = self._chain.buffers
        self._window = self._target.search_window(self.bundle.crops.search_factor)
        self._search_cropper.crop(frame, self._window, out=buffers["search_region"][0])
        self._crop_ms = (time.perf_counter() - started) * 1e3
        exit_index = self._chain.run(self.exit_policy)
        self._num_frames += 1
        score = float(buffers["score"][0])
        is_sane = self._target.settle(self.read_answer(), score)
        return TrackResult(
            bbox=_as_tuple(self._target.bbox_xywh),
            score=score if is_sane else 0.0,
            is_lost=self._target.is_lost,
            uncertainty=float(buffers["uncertainty"][0]),
            exit_index=exit_index,
            latency_ms=(time.perf_counter() - started) * 1e3,
        )

    def read_answer(self) -> npt.NDArray[np.float32]:
        """The box that the last exit gave, before any rule: x, y, w, h in frame pixels, ``(4,)``.

        An exit policy may call it within ``should_exit``.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return self._window.to_frame(self._chain.buffers["bbox_cxcywh"][0])

    def close(self) -> None:
        """Free the engines; calling it twice is fine."""
        if not self._is_closed:
            self._is_closed = True
            self._chain.close()

    def __enter__(self) -> "Tracker":
        self._require_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _warm_up(self) -> None:
        """Run every engine, so that the first update is not slow."""
        policy = ExitPolicy.always_last(num_exits=self.bundle.num_exits)
        for _ in range(_NUM_WARM_UP_RUNS):
            self._chain.run_template()
            self._chain.run(policy)

    def _require_open(self) -> None:
        if self._is_closed:
            raise TrackerStateError("tracker: expected an open one, got a closed one; make another")


def _load_engines(
    bundle: Bundle,
    backend: Backend,
    *,
    precision: str,
    root: Path,
    opened: contextlib.ExitStack,
) -> tuple[list[Engine], Path | None]:
    """Engines that were built for this bundle here, else straight from its graphs.

    Each is entered into ``opened``, so that those before one that fails are freed.
    """
    key = backend.key(model=bundle.name, bundle_digest=bundle.digest, precision=precision)
    built = find_engines(root, key, graphs=[graph.name for graph in bundle.graphs])
    engines: list[Engine] = []
    for graph in bundle.graphs:
        if built is None:
            engine = backend.load_onnx(bundle.graph_path(graph), graph)
        else:
            engine = backend.load(built.path / built.graphs[graph.name].file, graph)
        opened.callback(engine.close)
        engines.append(engine)
    return engines, None if built is None else built.path


def _checked(frame: Any) -> npt.NDArray[np.uint8]:
    """A frame that OpenCV can read."""
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
        if not isinstance(frame, np.ndarray):
            got, hint = type(frame).__name__, "pass frames as OpenCV or read_frames gives them"
        else:
            got, hint = f"dtype {frame.dtype}", "scale it to 0..255 and convert"
        raise TypeError(f"frame: expected a uint8 array, got {got}; {hint}")
    channels = frame.shape[2] if frame.ndim == 3 else 1
    if frame.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in frame.shape:
        raise ValueError(
            "frame: expected shape (H, W, 3) BGR, (H, W) or (H, W, 1) grey, or (H, W, 4) BGRA, "
            f"got {frame.shape}"
        )
    if min(frame.strides) < 0:
        return np.ascontiguousarray(frame)
    return frame


def _as_tuple(bbox_xywh: npt.NDArray[np.float32]) -> tuple[float, float, float, float]:
    x, y, w, h = (float(v) for v in bbox_xywh)
    return x, y, w, h
