"""The tracker: ``init`` on a box, then ``update`` frame by frame."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from edgetrack.backends import get_backend
from edgetrack.backends.engine import Backend, DeviceEngine, Engine, find_engines
from edgetrack.boxes import as_bbox_xywh
from edgetrack.bundle import Bundle
from edgetrack.errors import (
    BundleFormatError,
    EngineNotFoundError,
    FrameSizeError,
    TrackerStateError,
)
from edgetrack.runtime.host_loop import HostLoop
from edgetrack.runtime.loop import EXIT_DECISIONS, Loop, PendingResult, TrackResult
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules

__all__ = ["EXIT_DECISIONS", "PendingResult", "TrackResult", "Tracker"]


class Tracker:
    """Follow one object through frames.

    Args:
        bundle: A bundle or its folder; ``None`` is the one that ships.
        backend: One of ``edgetrack.backends.BACKEND_NAMES``, or a backend of your own.
        precision: ``None`` is the backend's own default.
        operating_point: A named pair of speed and accuracy of the bundle; ``None`` is its default.
            INT8 engines have thresholds of their own for it.
        exit_policy: When to stop early, instead of the operating point.
        rules: How answers become the target's state, instead of the bundle's own rules.
        engines: Folder where ``edgetrack build`` put engines. ONNX Runtime starts straight from
            the bundle if none are there.
        num_threads: Threads of a CPU backend; ``None`` lets it choose.
        device: Number of the CUDA device, for a backend that is given by name and runs on one.
        exit_decision: Who decides to stop, on a CUDA device: ``device`` (one CUDA graph per frame),
            ``flag`` (the host reads a flag after each segment) or ``host`` (it waits for each
            segment, and times it); ``auto`` is the first of them that works here. On a CPU it is
            ``host``.

    Raises:
        BundleError: The bundle is missing, damaged or too new.
        BackendUnavailableError: The backend is unknown or not installed, or has no GPU to run on.
        DeviceError: The GPU refused something, such as memory.
        EngineError: Its engines are missing, or were built for something else.
        TypeError: The policy decides in Python, which ``device`` and ``flag`` cannot ask.
        ValueError: The bundle has no such operating point, or the policy does not fit it.

    Attributes:
        bundle: What it runs.
        backend: Name of the backend that was chosen.
        precision: Precision of its engines.
        engines_path: Folder of the built engines; ``None`` where it started from the bundle.

    After an exception in ``update`` the tracker keeps its last box; call ``init`` to start afresh.
    Trackers are independent of each other; each may be used from any thread, by one at a time.

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
        backend: str | Backend = "auto",
        precision: str | None = None,
        operating_point: str | None = None,
        exit_policy: ExitPolicy | None = None,
        rules: TargetRules | None = None,
        engines: str | os.PathLike[str] = "engines",
        num_threads: int | None = None,
        device: int = 0,
        exit_decision: str = "auto",
    ) -> None:
        if exit_decision not in EXIT_DECISIONS:
            raise ValueError(
                f"exit_decision: expected one of {EXIT_DECISIONS}, got {exit_decision!r}"
            )
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        thresholds = self.bundle.thresholds(operating_point)
        try:
            own_policy = ExitPolicy(thresholds, self.bundle.criterion)
            own_rules = TargetRules.of(self.bundle.rules)
        except ValueError as error:
            raise BundleFormatError(f"{self.bundle.path}: {error}; export it again") from error
        self.rules = own_rules if rules is None else rules
        policy = self._fitting(own_policy if exit_policy is None else exit_policy)
        chosen = backend
        if isinstance(chosen, str):
            chosen = get_backend(chosen, num_threads=num_threads, device=device)
        self.backend = chosen.name
        self.precision = chosen.precisions[0] if precision is None else precision
        load = _Loader(self.bundle, chosen, precision=self.precision, root=Path(engines))
        if exit_policy is None:
            policy = load.fitted(policy, operating_point)
        self._loop = _open_loop(load, self.rules, exit_decision, policy)
        self.engines_path = load.path
        self._exit_policy = policy
        self._frame_shape: tuple[int, ...] = ()
        self._num_frames = 0
        self._is_closed = False

    @property
    def exit_policy(self) -> ExitPolicy:
        """When to stop early; another one may be set between frames.

        Raises:
            ValueError: The policy that is set has not one threshold per exit but the last.
        """
        return self._exit_policy

    @exit_policy.setter
    def exit_policy(self, policy: ExitPolicy) -> None:
        self._fitting(policy)
        self._loop.check_policy(policy)
        self._exit_policy = policy

    @property
    def exit_decision(self) -> str:
        """Who decides to stop: ``device``, ``flag`` or ``host``."""
        return self._loop.exit_decision

    @property
    def gpu_memory_bytes(self) -> int:
        """Device memory of this tracker's buffers and frames, engines not counted; 0 on a CPU."""
        return self._loop.memory_bytes

    @property
    def bbox(self) -> tuple[float, float, float, float] | None:
        """The last box that is known, xywh in frame pixels; ``None`` before ``init``."""
        bbox_xywh = self._loop.bbox
        return None if bbox_xywh is None else _as_tuple(bbox_xywh)

    @property
    def stage_ms(self) -> Mapping[str, float]:
        """Time of the last update: ``crop``, each ``segment_<k>`` that ran, ``decide``.

        With heads also the ``head_<k>`` that ran, and ``update`` if the bundle carries state.
        On a CUDA device that is GPU time, and only known where ``exit_decision`` is ``host``.
        """
        return self._loop.stage_ms

    def init(self, frame: Any, bbox: Sequence[float]) -> None:
        """Start on a frame.

        Args:
            frame: uint8; ``(H, W, 3)`` BGR, ``(H, W)`` or ``(H, W, 1)`` grey, ``(H, W, 4)`` BGRA.
                On a CUDA device also a ``GpuFrame``, or an array that lies there already: whatever
                has ``__cuda_array_interface__`` or DLPack (PyCUDA, CuPy, torch); it is not copied.
            bbox: The target: x, y, w, h in pixels.

        Raises:
            TypeError: The frame is not a uint8 array, or lies on another device.
            ValueError: Its shape is wrong, or the box is not a finite box that overlaps it.
            TrackerStateError: The tracker was closed.
            DeviceError: The GPU failed, or has too little memory for such frames.
        """
        self._require_open()
        frame = self._loop.check(frame)
        height, width = frame.shape[:2]
        bbox_xywh = as_bbox_xywh(bbox, width_px=width, height_px=height)
        self._frame_shape = ()  # should the next line fail, init is to be called again
        self._loop.start(frame, bbox_xywh)
        self._frame_shape, self._num_frames = frame.shape, 1

    def update(self, frame: Any) -> TrackResult:
        """Find the target in the next frame.

        Args:
            frame: As in ``init``, and of the same shape.

        Returns:
            The answer of the exit that was taken. If a network gives a box or a score that is not
            finite, the last box stays and the score is 0.

        Raises:
            TrackerStateError: ``init`` was not called, or the tracker was closed.
            TypeError: The frame is not a uint8 array, or lies on another device.
            FrameSizeError: The frame's shape differs from that of ``init``.
            DeviceError: The GPU failed.
        """
        return self.update_async(frame).result()

    def update_async(self, frame: Any) -> PendingResult:
        """Hand in the next frame without waiting for the answer.

        Where a CUDA device decides, this returns at once, so that the next frame can be decoded
        meanwhile. Four frames may be under way, two if they lie in host memory; the next call waits
        for the oldest. Where the host decides, the work is done before it returns.

        Args:
            frame: As in ``update``; one in device memory must not be written to before its result
                is there.

        Returns:
            What ``result()`` is asked of, in any order, and as often as one likes.

        Raises:
            TrackerStateError, TypeError, FrameSizeError, DeviceError: As ``update``.
        """
        self._require_open()
        if not self._frame_shape:
            raise TrackerStateError("tracker: expected init before update, got update; call init")
        frame = self._loop.check(frame)
        if frame.shape != self._frame_shape:
            raise FrameSizeError(
                f"frame {self._num_frames}: expected shape {self._frame_shape} as at init, got "
                f"{frame.shape}; call init again on the new shape"
            )
        pending = self._loop.submit(frame, self._exit_policy)
        self._num_frames += 1
        return pending

    def read_answer(self) -> npt.NDArray[np.float32]:
        """The box that the last exit gave, before any rule: x, y, w, h in frame pixels, ``(4,)``.

        An exit policy may call it within ``should_exit``.
        """
        return self._loop.read_answer()

    def close(self) -> None:
        """Free the engines; calling it twice is fine."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.close()

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

    def _fitting(self, policy: ExitPolicy) -> ExitPolicy:
        """A policy, refused if it is none, or not of this bundle."""
        if not isinstance(policy, ExitPolicy):
            raise TypeError(
                f"exit_policy: expected an ExitPolicy, got {policy!r}; see edgetrack.ExitPolicy"
            )
        if len(policy.thresholds) != self.bundle.num_exits - 1:
            raise ValueError(
                f"exit_policy: expected {self.bundle.num_exits - 1} thresholds for "
                f"{self.bundle.name}, got {len(policy.thresholds)}"
            )
        return policy

    def _require_open(self) -> None:
        if self._is_closed:
            raise TrackerStateError("tracker: expected an open one, got a closed one; make another")


class _Loader:
    """Loads the engines that were built for a bundle here, else compiles its graphs in memory.

    Attributes:
        path: Folder of the built engines; ``None`` if there are none.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, precision: str, root: Path) -> None:
        self.bundle, self.backend = bundle, backend
        key = backend.key(model=bundle.name, bundle_digest=bundle.digest, precision=precision)
        self._built = find_engines(root, key, graphs=[graph.name for graph in bundle.graphs])
        self.path = None if self._built is None else self._built.path
        if self._built is None and precision == "int8":
            raise EngineNotFoundError(
                f"{root}: expected INT8 engines of {bundle.name} for {backend.name}, got none; "
                "run: edgetrack build --precision int8"
            )

    def fitted(self, policy: ExitPolicy, operating_point: str | None) -> ExitPolicy:
        """The policy of an operating point with the thresholds that these engines need for it.

        Raises:
            EngineMismatchError: They were fitted to other ones than the bundle now has.
        """
        if self._built is None:
            return policy
        return ExitPolicy(self._built.thresholds(self.bundle, operating_point), policy.criterion)

    def __call__(self, opened: contextlib.ExitStack) -> list[Engine | DeviceEngine]:
        """All engines; each is entered into ``opened``, so that one that fails frees the others."""
        engines: list[Engine | DeviceEngine] = []
        for graph in self.bundle.graphs:
            if self._built is None:
                engine = self.backend.load_onnx(self.bundle.graph_path(graph), graph)
            else:
                file = self._built.graphs[graph.name].file
                engine = self.backend.load(self._built.path / file, graph)
            opened.callback(engine.close)
            engines.append(engine)
        return engines


def _open_loop(load: _Loader, rules: TargetRules, exit_decision: str, policy: ExitPolicy) -> Loop:
    """What runs the frames: on the backend's device; the loop frees the engines."""
    if load.backend.runs_on == "cuda":
        # Needs PyCUDA.
        from edgetrack.runtime.device_loop import open_device_loop

        return open_device_loop(
            load.bundle,
            load,
            rules=rules,
            exit_decision=exit_decision,
            policy=policy,
            device=load.backend.device,
        )
    if exit_decision not in ("auto", "host"):
        raise ValueError(
            f"exit_decision: expected 'auto' or 'host' for backend {load.backend.name!r}, which "
            f"runs on the CPU, got {exit_decision!r}"
        )
    with contextlib.ExitStack() as opened:
        loop = HostLoop(load.bundle, cast("list[Engine]", load(opened)), rules=rules)
        opened.pop_all()  # all went well: from here on ``close`` frees them
    return loop


def _as_tuple(bbox_xywh: npt.NDArray[np.float32]) -> tuple[float, float, float, float]:
    x, y, w, h = (float(v) for v in bbox_xywh)
    return x, y, w, h
