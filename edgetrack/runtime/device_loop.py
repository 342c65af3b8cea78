"""A frame on a CUDA device: the host says where it lies and launches; the device does the rest.

The target's state lives on the device, so frame t + 1 never waits for the host to hear of frame t.
What host and device tell each other lies in two rings in mapped memory: where each frame is, and
what came of it (``device_state`` has the layouts).
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.backends.cuda import CudaContext
from edgetrack.backends.cuda.driver import device_of
from edgetrack.backends.cuda.graphs import supports_conditional_nodes
from edgetrack.bundle import Bundle
from edgetrack.crops import CropWindow
from edgetrack.errors import DeviceError
from edgetrack.runtime.device_chain import FlagChain, HostChain, wait_for
from edgetrack.runtime.device_frame import DeviceFrame
from edgetrack.runtime.device_state import (
    FORMATS,
    RING,
    pack_decision,
    pack_rules,
    pack_target,
)
from edgetrack.runtime.frame_graph import FrameGraph, conditional_nodes_work
from edgetrack.runtime.frame_source import DeviceImage, describe, is_on_gpu
from edgetrack.runtime.frame_upload import NUM_SLOTS, FrameUploader
from edgetrack.runtime.loop import TrackResult, checked_array
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules, TargetState

__all__ = ["DeviceLoop", "open_device_loop"]

Launcher = FrameGraph | FlagChain | HostChain


def open_device_loop(
    bundle: Bundle,
    load: Callable[[contextlib.ExitStack], Sequence[Any]],
    *,
    rules: TargetRules,
    exit_decision: str,
    policy: ExitPolicy,
    device: int,
) -> "DeviceLoop":
    """Open the device, load the engines there, and make a loop of them; it owns all of it.

    Args:
        bundle: What the engines were built from.
        load: Loads one engine per graph, and enters their ``close`` into the stack it is given.
        rules: How answers become the target's state.
        exit_decision: ``device``, ``flag``, ``host`` or ``auto``.
        policy: What will be used first.
        device: Number of the CUDA device.

    Raises:
        BackendUnavailableError: There is no such device, or no PyCUDA.
        DeviceError: The device refused something.
        EngineError: An engine does not fit.
        TypeError: The policy decides in Python, and ``exit_decision`` is not ``host``.
    """
    context = CudaContext.open(device)
    try:
        with context.current(), contextlib.ExitStack() as owned:
            frame = DeviceFrame(context, bundle, load(owned), owned=owned)
            launcher = _launcher(context, frame, exit_decision, policy)
            owned.callback(launcher.close)
            return DeviceLoop(bundle, context, frame, launcher, rules=rules, owned=owned.pop_all())
    except BaseException:
        context.close()
        raise


def _launcher(
    context: CudaContext, frame: DeviceFrame, exit_decision: str, policy: ExitPolicy
) -> Launcher:
    """The way to decide: as asked, or the first that works."""
    decides_in_python = _decides_in_python(policy)
    if exit_decision == "host" or (exit_decision == "auto" and decides_in_python):
        return HostChain(frame.parts(), frame.read_answer, frame.write_exit)
    if decides_in_python:
        raise TypeError(_python_policy(policy, exit_decision))
    works = supports_conditional_nodes() and conditional_nodes_work(context, frame.module)
    if exit_decision == "device" and not works:
        raise DeviceError(
            f"exit_decision: expected a driver with conditional nodes (CUDA 12.4), got CUDA "
            f"{context.device.driver}, where they do not work; use exit_decision='flag', or update "
            "the driver"
        )
    if works and exit_decision != "flag":
        return FrameGraph(frame.parts())
    return FlagChain(frame.parts(), frame.flags)


class DeviceLoop:
    """A ``Loop`` on a CUDA device; made by ``open_device_loop``."""

    def __init__(
        self,
        bundle: Bundle,
        context: CudaContext,
        frame: DeviceFrame,
        launcher: Launcher,
        *,
        rules: TargetRules,
        owned: contextlib.ExitStack,
    ) -> None:
        self._bundle, self._rules = bundle, rules
        self._context, self._frame, self._launcher = context, frame, launcher
        self._owned, self._lock = owned, threading.RLock()
        self._uploader: FrameUploader | None = None
        self._policy: ExitPolicy | None = None
        self._pending: list[_Pending | None] = [None] * RING
        self._number = 0
        self._window = CropWindow(0, 0, 1)
        self._bbox: npt.NDArray[np.float32] | None = None
        self._sequences = frame.results["sequence"]

    @property
    def exit_decision(self) -> str:
        """Who decides to stop: ``device``, ``flag`` or ``host``."""
        return self._launcher.exit_decision

    @property
    def memory_bytes(self) -> int:
        """Device memory of tensors, state and frames; engines hold their weights besides."""
        frames = 0 if self._uploader is None else self._uploader.num_bytes
        return self._frame.num_bytes + frames

    @property
    def bbox(self) -> npt.NDArray[np.float32] | None:
        """The last box that is known, xywh, frame pixels, ``(4,)``; ``None`` before ``start``."""
        return self._bbox

    @property
    def stage_ms(self) -> Mapping[str, float]:
        """GPU time of each stage of the last frame; empty unless the host decides."""
        if not isinstance(self._launcher, HostChain):
            return MappingProxyType({})
        with self._context.current():
            return self._launcher.stage_ms

    def check(self, frame: Any) -> "npt.NDArray[np.uint8] | DeviceImage":
        """A frame in host memory, or on this device."""
        if not is_on_gpu(frame):
            return checked_array(frame)
        ordinal, stream = self._context.device.ordinal, self._frame.stream.handle
        with self._context.current():
            return describe(frame, ordinal=ordinal, stream=stream, device_of=device_of)

    def check_policy(self, policy: ExitPolicy) -> None:
        """Refuse a policy that decides in Python, unless the host decides."""
        if self.exit_decision != "host" and _decides_in_python(policy):
            raise TypeError(_python_policy(policy, self.exit_decision))

    def start(
        self, frame: "npt.NDArray[np.uint8] | DeviceImage", bbox_xywh: npt.NDArray[np.float32]
    ) -> None:
        """Begin on a frame; waits for what is under way."""
        crops = self._bundle.crops
        with self._lock, self._context.current():
            self._frame.stream.synchronize()
            for slot in range(RING):
                self._collect(slot)
            if isinstance(frame, np.ndarray):
                self._fit_uploader(frame.shape)
            state = TargetState(bbox_xywh, frame_shape=frame.shape, rules=self._rules)
            window = CropWindow.around(bbox_xywh, factor=crops.template_factor)
            self._place(frame, 0, window)
            self._frame.embed_template(
                pack_target(state, window, frame_index=-1), window.to_crop(bbox_xywh)
            )
            self._window = state.search_window(crops.search_factor)
            self._frame.write_target(pack_target(state, self._window, frame_index=0))
            self._frame.write_rules(
                pack_rules(self._rules, search_factor=crops.search_factor, frame_shape=frame.shape)
            )
            self._sequences[:] = 0
            self._frame.flags[:] = 0
            self._number, self._bbox = 0, bbox_xywh

    def submit(
        self, frame: "npt.NDArray[np.uint8] | DeviceImage", policy: ExitPolicy
    ) -> "_Pending":
        """Launch the next frame; waits only if as many as the ring holds are under way."""
        started = time.perf_counter()
        with self._lock, self._context.current():
            number = self._number + 1
            self._collect(number % RING)
            if policy is not self._policy and self.exit_decision != "host":
                self._frame.write_decision(pack_decision(policy, num_exits=self._bundle.num_exits))
                self._policy = policy
            owner = self._place(frame, number, self._known_window(number))
            self._launcher.launch(policy, number)
            pending = _Pending(self, number, started, owner)
            self._pending[number % RING] = pending
            self._number = number
        return pending

    def read_answer(self) -> npt.NDArray[np.float32]:
        """The box that the last exit gave, before any rule: xywh, frame pixels, ``(4,)``."""
        with self._lock, self._context.current():
            answer = self._frame.buffers.read("bbox_cxcywh", self._frame.stream)
        with np.errstate(over="ignore", invalid="ignore"):
            return self._window.to_frame(answer[0])

    def close(self) -> None:
        """Wait for the device and free everything; calling it twice is fine."""
        with self._lock:
            if self._context.is_closed:
                return
            with contextlib.suppress(DeviceError), self._context.current():
                for slot in range(RING):
                    self._collect(slot)
            with contextlib.suppress(DeviceError), self._context.current():
                if self._uploader is not None:
                    self._uploader.close()
                self._owned.close()
            self._context.close()

    def is_done(self, number: int) -> bool:
        """Whether the device has written the result of a frame that is in the ring."""
        return int(self._sequences[number % RING]) == number

    def finish(self, pending: "_Pending") -> None:
        """Wait for a frame and read its result out of the ring."""
        with self._lock:
            if pending.answer is None and pending.error is None:
                self._collect(pending.number % RING)

    def _collect(self, slot: int) -> None:
        """Take a result out of the ring, so that its slot can be used again."""
        pending = self._pending[slot]
        if pending is None:
            return
        self._pending[slot] = None
        try:
            with self._context.current():
                wait_for(
                    lambda: self.is_done(pending.number), self._frame.stream, what="frame result"
                )
        except DeviceError as error:
            pending.error = error
            raise
        row = self._frame.results[slot]
        self._bbox = np.array([row["x"], row["y"], row["w"], row["h"]], np.float32)
        pending.settle(row)

    def _known_window(self, number: int) -> CropWindow | None:
        """Where a frame will be looked at, if the one before it is done."""
        if number > 1:
            row = self._frame.results[(number - 1) % RING]
            if not self.is_done(number - 1):
                return None
            self._window = CropWindow(*(int(v) for v in row["window"].tolist()))
        return self._window

    def _place(
        self,
        frame: "npt.NDArray[np.uint8] | DeviceImage",
        number: int,
        window: CropWindow | None,
    ) -> Any:
        """Say in the ring where a frame lies; what must stay alive until it is done."""
        if isinstance(frame, np.ndarray):
            assert self._uploader is not None, "a frame of another shape is refused before"
            if number > NUM_SLOTS:
                self._collect((number - NUM_SLOTS) % RING)
            frame = self._uploader.upload(frame, number, window)
        elif frame.stream is not None:
            self._frame.wait_for(frame.stream)
        height, width = frame.shape[:2]
        self._frame.sources[number % RING] = (
            frame.address,
            frame.chroma_address,
            width,
            height,
            frame.pitch_bytes,
            frame.chroma_pitch_bytes,
            FORMATS[frame.format],
            0,
        )
        return frame.owner

    def _fit_uploader(self, frame_shape: tuple[int, ...]) -> None:
        """Have room for host frames of a shape; what is there for another one is freed first."""
        if self._uploader is not None:
            if self._uploader.frame_shape == frame_shape:
                return
            self._uploader.close()
            self._uploader = None
        self._uploader = FrameUploader(self._context, self._frame.stream, frame_shape=frame_shape)


class _Pending:
    """The answer of one frame, which may still be under way."""

    def __init__(self, loop: DeviceLoop, number: int, started: float, owner: Any) -> None:
        self.number = number
        self.answer: TrackResult | None = None
        self.error: DeviceError | None = None
        self._loop, self._started, self._owner = loop, started, owner

    @property
    def is_done(self) -> bool:
        """Whether ``result`` returns at once."""
        return self.answer is not None or self.error is not None or self._loop.is_done(self.number)

    def result(self) -> TrackResult:
        """Wait for the answer."""
        if self.answer is None:
            self._loop.finish(self)
        if self.error is not None:
            raise self.error
        assert self.answer is not None, "a frame that is done has an answer or an error"
        return self.answer

    def settle(self, row: Any) -> None:
        """Take over what the device wrote."""
        self.answer = TrackResult(
            bbox=(float(row["x"]), float(row["y"]), float(row["w"]), float(row["h"])),
            score=float(row["score"]),
            is_lost=bool(row["is_lost"]),
            uncertainty=float(row["uncertainty"]),
            exit_index=int(row["exit_index"]),
            latency_ms=(time.perf_counter() - self._started) * 1e3,
        )
        self._owner = None


def _decides_in_python(policy: ExitPolicy) -> bool:
    return type(policy).should_exit is not ExitPolicy.should_exit


def _python_policy(policy: ExitPolicy, exit_decision: str) -> str:
    return (
        f"exit_policy: expected thresholds alone, which the GPU compares, got {type(policy)!r}, "
        f"which decides in Python, with exit_decision={exit_decision!r}; make the tracker with "
        "exit_decision='host'"
    )
