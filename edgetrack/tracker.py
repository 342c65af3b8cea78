"""The tracker: ``init`` on a box, then ``update`` frame by frame."""

import contextlib
import math
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
from edgetrack.boxes import as_bbox_xywh, clip_xywh
from edgetrack.bundle import Bundle
from edgetrack.crops import Cropper, CropWindow
from edgetrack.errors import FrameSizeError, TrackerStateError
from edgetrack.runtime.chain import Chain
from edgetrack.runtime.policies import ExitPolicy

__all__ = ["TrackResult", "Tracker"]

# OSTrack keeps this much of a box inside the frame.
_CLIP_MARGIN_PX = 10
_MIN_SIDE_PX = 2.0
_NUM_WARM_UP_RUNS = 2


@dataclass(frozen=True)
class TrackResult:
    """Where the target is in one frame.

    Attributes:
        bbox: x, y, w, h in frame pixels, top-left origin.
        score: Confidence in [0, 1].
        uncertainty: Normalised entropy of the box edges in [0, 1]; what the exit was decided by.
        exit_index: The exit that was taken, from 0.
        latency_ms: Time of this update, crop included.
    """

    bbox: tuple[float, float, float, float]
    score: float
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
        engines: str | os.PathLike[str] = "engines",
        num_threads: int | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        thresholds = self.bundle.thresholds(operating_point)
        self.exit_policy = ExitPolicy(thresholds) if exit_policy is None else exit_policy
        chosen = get_backend(backend, num_threads=num_threads)
        self.backend = chosen.name
        self.precision = chosen.precisions[0] if precision is None else precision
        crops = self.bundle.crops
        self._template_cropper = Cropper(crops.template_size_px)
        self._search_cropper = Cropper(crops.search_size_px)
        self._bbox: npt.NDArray[np.float32] | None = None
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
        return None if self._bbox is None else _as_tuple(self._bbox)

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
        self._bbox, self._frame_shape, self._num_frames = bbox_xywh, frame.shape, 1

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
        if self._bbox is None:
            raise TrackerStateError("tracker: expected init before update, got update; call init")
        frame = _checked(frame)
        if frame.shape != self._frame_shape:
            raise FrameSizeError(
                f"frame {self._num_frames}: expected shape {self._frame_shape} as at init, got "
                f"{frame.shape}; call init again on the new shape"
            )
        buffers = self._chain.buffers
        window = CropWindow.around(self._bbox, factor=self.bundle.crops.search_factor)
        self._search_cropper.crop(frame, window, out=buffers["search_region"][0])
        self._crop_ms = (time.perf_counter() - started) * 1e3
        exit_index = self._chain.run(self.exit_policy)
        self._num_frames += 1
        score = float(buffers["score"][0])
        with np.errstate(over="ignore", invalid="ignore"):
            bbox_xywh = window.to_frame(buffers["bbox_cxcywh"][0])
        if np.isfinite(bbox_xywh).all() and math.isfinite(score):
            self._bbox = _settle(bbox_xywh, width_px=frame.shape[1], height_px=frame.shape[0])
        else:
            score = 0.0
        return TrackResult(
            bbox=_as_tuple(self._bbox),
            score=score,
            uncertainty=float(buffers["uncertainty"][0]),
            exit_index=exit_index,
            latency_ms=(time.perf_counter() - started) * 1e3,
        )

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


def _settle(
    bbox_xywh: npt.NDArray[np.float32], *, width_px: int, height_px: int
) -> npt.NDArray[np.float32]:
    """Keep a box near the frame and of a size that can be cropped."""
    clipped = clip_xywh(
        bbox_xywh, width_px=width_px, height_px=height_px, margin_px=_CLIP_MARGIN_PX
    )
    clipped[2:] = np.maximum(clipped[2:], _MIN_SIDE_PX)
    return clipped.astype(np.float32)


def _as_tuple(bbox_xywh: npt.NDArray[np.float32]) -> tuple[float, float, float, float]:
    x, y, w, h = (float(v) for v in bbox_xywh)
    return x, y, w, h
