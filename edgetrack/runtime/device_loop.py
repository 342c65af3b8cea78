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
from edgetrack.errors import DeviceError, DeviceMemoryError
from edgetrack.runtime.device_chain import FlagChain, HostChain, wait_for
from edgetrack.runtime.device_frame import DeviceFrame
from edgetrack.runtime.device_state import (
    FORMATS,
    RING,
    pack_decision,
    pack_rules,
    pack_target,
)
from edgetrack.runtime.frame_graph import FrameGraph, conditional_nodes_refusal
from edgetrack.runtime.frame_source import DeviceImage, describe, is_on_gpu
from edgetrack.runtime.frame_upload import NUM_SLOTS, FrameUploader
from edgetrack.runtime.loop import TrackResult, checked_array
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules, TargetState

__all__ = ["DeviceLoop", "open_device_loop"]

Launcher = FrameGraph | FlagChain | HostChain
Frame = npt.NDArray[np.uint8] | DeviceImage

# Loading engines may wait for the whole device, which spoils what another thread captures.
_opening = threading.Lock()


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
        device: Number of the CUDA device. Nothing else in the process may wait for all of it
            meanwhile.

    Raises:
        BackendUnavailableError: There is no such device, or no PyCUDA.
        DeviceError: The device refused something.
        EngineError: An engine does not fit.
        TypeError: The policy decides in Python, and ``exit_decision`` is not ``host``.
        ValueError: There are more exits than a device decides on.
    """
    context = CudaContext.open(device)
    try:
        with _opening, context.current(), contextlib.ExitStack() as owned:
            frame = DeviceFrame(context, bundle, load(owned), owned=owned)
            launcher = _launcher(context, frame, exit_decision, policy, bundle.num_exits)
            owned.callback(launcher.close)
            return DeviceLoop(bundle, context, frame, launcher, rules=rules, owned=owned.pop_all())
    except BaseException:
        context.close()
        raise


def _launcher(
    context: CudaContext,
    frame: DeviceFrame,
    exit_decision: str,
    policy: ExitPolicy,
    num_exits: int,
) -> Launcher:
    """The way to decide: as asked, or the first that works."""
    try:
        pack_decision(policy, num_exits=num_exits)
    except (TypeError, ValueError):
        if exit_decision not in ("auto", "host"):
            raise
        exit_decision = "host"
    if exit_decision == "host":
        return HostChain(frame.parts(), frame.read_answer, frame.write_exit)
    if exit_decision == "flag":
        return FlagChain(frame.parts(), frame.flags)
    refusal = _refusal(context, frame)
    if refusal is None:
        try:
            return FrameGraph(frame.parts())
        except DeviceMemoryError:
            raise
        except DeviceError as error:
            refusal = error
    if exit_decision == "device":
        raise DeviceError(
            f"exit_decision: expected a driver whose conditional nodes work (CUDA 12.4), got CUDA "
            f"{context.device.driver}: {refusal}; use exit_decision='flag', or update the driver"
        ) from refusal
    return FlagChain(frame.parts(), frame.flags)


def _refusal(context: CudaContext, frame: DeviceFrame) -> DeviceError | None:
    """Why conditional nodes cannot be used here; ``None`` if they can."""
    if not supports_conditional_nodes():
        return DeviceError("conditional nodes: expected a driver that has them, got an older one")
    return conditional_nodes_refusal(context, frame.module)


class DeviceLoop:
    """A ``Loop`` on a CUDA device; made by ``open_device_loop``.

    Frames are numbered from 1 at ``start``. A frame that is under way has a slot of the ring; its
    result is taken out before the slot is used again. A thread may wait for a result while another
    one submits.
    """

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
        self._is_ostrack = bundle.crops.geometry == "ostrack"
        self._context, self._frame, self._launcher = context, frame, launcher
        self._owned, self._lock = owned, threading.RLock()
        self._owned.callback(self._close_uploader)
        self._uploader: FrameUploader | None = None
        self._policy: ExitPolicy | None = None
        self._pending: list[_Pending | None] = [None] * RING
        # A frame's memory is let go of where frames are submitted: PyCUDA frees in no other thread.
        self._owners: list[Any] = [None] * RING
        self._number = self._newest = 0
        self._is_broken = False
        self._window = CropWindow(0, 0, 1)
        self._bbox: npt.NDArray[np.float32] | None = None
        self._answer = np.zeros(4, np.float32)
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

    def check(self, frame: Any) -> Frame:
        """A frame in host memory, or on this device."""
        if not is_on_gpu(frame):
            return checked_array(frame)
        ordinal, stream = self._context.device.ordinal, self._frame.stream.handle
        with self._context.current():
            return describe(frame, ordinal=ordinal, stream=stream, device_of=device_of)

    def check_policy(self, policy: ExitPolicy) -> None:
        """Refuse a policy that decides in Python, unless the host decides."""
        if self.exit_decision != "host":
            pack_decision(policy, num_exits=self._bundle.num_exits)

    def start(self, frame: Frame, bbox_xywh: npt.NDArray[np.float32]) -> None:
        """Begin on a frame; waits for what is under way."""
        crops = self._bundle.crops
        state = TargetState(
            bbox_xywh, frame_shape=frame.shape, rules=self._rules, geometry=crops.geometry
        )
        window = CropWindow.around(bbox_xywh, factor=crops.template_factor, geometry=crops.geometry)
        with self._entered():
            self._collect_all()
            self._frame.stream.synchronize()
            self._is_broken = True  # until all of it is there
            owner = self._place(frame, 0, window)
            self._frame.embed_template(
                pack_target(state, window, frame_index=-1), window.to_crop(bbox_xywh)
            )
            self._owners = [owner, *[None] * (RING - 1)]
            self._window = state.search_window(crops.search_factor)
            self._frame.write_target(pack_target(state, self._window, frame_index=0))
            self._frame.write_rules(pack_rules(self._rules, crops=crops, frame_shape=frame.shape))
            self._sequences[:] = 0
            self._frame.flags[:] = 0
            self._number = self._newest = 0
            self._bbox, self._is_broken = bbox_xywh, False

    def submit(self, frame: Frame, policy: ExitPolicy) -> "_Pending":
        """Launch the next frame; waits only if as many as the ring holds are under way."""
        started = time.perf_counter()
        with self._entered():
            if self._is_broken:
                raise DeviceError(
                    "tracker: expected init after a frame that failed on the device, got update; "
                    "call init"
                )
            number = self._number + 1
            self._collect(number % RING)
            if self.exit_decision == "host":
                self._collect(self._number % RING)  # a policy may ask where the crop lies
            elif policy is not self._policy:
                self._frame.write_decision(pack_decision(policy, num_exits=self._bundle.num_exits))
                self._policy = policy
            try:
                window = self._known_window(number)
                # Where the target will be found, and the update's crop be cut, nobody knows.
                region = window if self._bundle.update is None else None
                owner = self._place(frame, number, region)
                self._owners[number % RING] = owner
                self._launcher.launch(policy, number)
            except BaseException:
                self._forget(number)
                raise
            pending = _Pending(self, number, started)
            self._pending[number % RING] = pending
            self._number = number
        return pending

    def read_answer(self) -> npt.NDArray[np.float32]:
        """The box that the last exit gave, before any rule: xywh, frame pixels, ``(4,)``.

        Where the host decides that is the segment that ran last, otherwise the newest frame whose
        result was asked for.
        """
        with self._entered():
            if not isinstance(self._launcher, HostChain):
                return self._answer.copy()
            self._launcher.decode()
            answer = self._frame.buffers.read("bbox_cxcywh", self._frame.stream)
        with np.errstate(over="ignore", invalid="ignore"):
            return self._window.to_frame(answer[0])

    def close(self) -> None:
        """Wait for the device and free everything; calling it twice is fine."""
        if self._context.was_forked:
            self._context.close()
            return
        with self._lock:
            if self._context.is_closed:
                return
            with contextlib.suppress(DeviceError), self._context.current():
                self._collect_all()
                self._frame.stream.synchronize()  # an update goes on behind its frame's result
            for pending in filter(None, self._pending):
                pending.error = DeviceError(
                    "frame result: expected an open tracker, got one that was closed before the "
                    "device was done; ask for results before close"
                )
            with contextlib.suppress(DeviceError), self._context.current():
                self._owners = [None] * RING
                self._owned.close()
            self._context.close()

    def has(self, number: int) -> bool:
        """Whether the device has written the result of a frame that is in the ring."""
        return int(self._sequences[number % RING]) == number

    def is_over(self) -> bool:
        """Whether no result will come any more: closed, or the device is done or lost."""
        try:
            return self._context.is_closed or self._frame.stream.is_done
        except DeviceError:
            return True

    def finish(self, pending: "_Pending") -> None:
        """Wait for a frame, and take its result out of the ring."""
        # Not locked, so that another thread may submit meanwhile.
        failure = self._wait(pending)
        with self._entered():
            if not pending.is_settled:
                self._settle(pending, failure)

    @contextlib.contextmanager
    def _entered(self) -> Any:
        """Locked, with the context current; in a forked child the lock may never be free."""
        if self._context.was_forked:
            with self._context.current():  # says so
                pass
        with self._lock, self._context.current():
            yield

    def _collect_all(self) -> None:
        """Take all results out of the ring, in the order of frames."""
        for number in range(max(self._number - RING, 0) + 1, self._number + 1):
            self._collect(number % RING)

    def _collect(self, slot: int) -> None:
        """Take a result out of the ring, so that its slot can be used again.

        A frame that failed keeps its error for whoever asks for its result.
        """
        pending = self._pending[slot]
        if pending is not None:
            self._settle(pending, self._wait(pending))

    def _wait(self, pending: "_Pending") -> DeviceError | None:
        """Wait until the device has written a result; why it will not, if so."""
        try:
            wait_for(
                lambda: pending.is_settled or self.has(pending.number),
                self._frame.stream,
                what="frame result",
            )
        except DeviceError as error:
            return error
        return None

    def _settle(self, pending: "_Pending", failure: DeviceError | None) -> None:
        """Take a result, or why there is none, out of the ring."""
        slot = pending.number % RING
        self._pending[slot] = None
        if failure is not None:
            pending.error, self._is_broken = failure, True
            return
        row = self._frame.results[slot]
        pending.take(row)
        if pending.number > self._newest:
            self._newest = pending.number
            self._bbox = np.array([row["x"], row["y"], row["w"], row["h"]], np.float32)
            self._answer = row["answer"].copy()

    def _forget(self, number: int) -> None:
        """Let a frame that was not launched whole leave no trace."""
        with contextlib.suppress(DeviceError):
            self._frame.stream.synchronize()
        self._frame.flags[:] = 0
        if self.has(number):  # it was launched whole: what came then was an interrupt
            self._number = number

    def _known_window(self, number: int) -> CropWindow | None:
        """Where a frame will be looked at, if the one before it is done."""
        if number > 1:
            row = self._frame.results[(number - 1) % RING]
            if not self.has(number - 1):
                return None
            self._window = CropWindow(*(int(v) for v in row["window"].tolist()))
            if self._is_ostrack and self.exit_decision == "host":  # who may ask where the crop lies
                self._window = self._frame.read_window()
        return self._window

    def _place(self, frame: Frame, number: int, window: CropWindow | None) -> Any:
        """Say in the ring where a frame lies; what must stay alive until it is done."""
        if isinstance(frame, np.ndarray):
            frame = self._uploader_for(frame.shape, number).upload(frame, number, window)
        for stream in frame.streams:
            self._frame.stream.wait_for(stream)
        blank_px = int(self._is_ostrack)  # columns and rows at the border, as in ``Cropper``
        height, width = (side_px - blank_px for side_px in frame.shape[:2])
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

    def _uploader_for(self, frame_shape: tuple[int, ...], number: int) -> FrameUploader:
        """Room for host frames of a shape, with a slot that no frame under way reads."""
        if self._uploader is not None and self._uploader.frame_shape == frame_shape:
            if number > NUM_SLOTS:
                self._collect((number - NUM_SLOTS) % RING)
            return self._uploader
        self._collect_all()
        self._frame.stream.synchronize()
        self._close_uploader()
        self._uploader = FrameUploader(self._context, self._frame.stream, frame_shape=frame_shape)
        return self._uploader

    def _close_uploader(self) -> None:
        uploader, self._uploader = self._uploader, None
        if uploader is not None:
            uploader.close()


class _Pending:
    """The answer of one frame, which may still be under way."""

    def __init__(self, loop: DeviceLoop, number: int, started: float) -> None:
        self.number = number
        self.error: DeviceError | None = None
        self._answer: TrackResult | None = None
        self._loop, self._started = loop, started

    @property
    def is_settled(self) -> bool:
        """Whether the result, or why there is none, was taken out of the ring."""
        return self._answer is not None or self.error is not None

    @property
    def is_done(self) -> bool:
        """Whether ``result`` returns at once."""
        return self.is_settled or self._loop.has(self.number) or self._loop.is_over()

    def result(self) -> TrackResult:
        """Wait for the answer."""
        if not self.is_settled:
            self._loop.finish(self)
        if self.error is not None:
            raise self.error
        assert self._answer is not None, "a frame that is settled has an answer or an error"
        return self._answer

    def take(self, row: Any) -> None:
        """Keep what the device wrote."""
        self._answer = TrackResult(
            bbox=(float(row["x"]), float(row["y"]), float(row["w"]), float(row["h"])),
            score=float(row["score"]),
            is_lost=bool(row["is_lost"]),
            uncertainty=float(row["uncertainty"]),
            exit_index=int(row["exit_index"]),
            latency_ms=(time.perf_counter() - self._started) * 1e3,
        )
