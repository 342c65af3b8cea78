"""Clips, frames in device memory and trackers on the emulated device, for several test files."""

import ctypes
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
from cpu_segments import EmulatedBackend

from edgetrack.backends.cuda import CudaContext
from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.tracker import Tracker, TrackResult

Frame = npt.NDArray[np.uint8]
Clip = list[tuple[Frame, npt.NDArray[Any]]]
DECISIONS = ("device", "flag", "host")


def make_clip() -> Clip:
    return list(render_clip(num_frames=40, width=320, height=240, seed=3))


def without_time(results: list[TrackResult]) -> list[TrackResult]:
    return [dataclasses.replace(result, latency_ms=0.0) for result in results]


def follow(tracker: Tracker, clip: Clip) -> list[TrackResult]:
    tracker.init(clip[0][0], clip[0][1])
    return without_time([tracker.update(frame) for frame, _ in clip[1:]])


def opened(bundle: Bundle, decision: str = "device", **options: Any) -> Tracker:
    return Tracker(bundle, backend=EmulatedBackend(), exit_decision=decision, **options)


class OnDevice:
    """A frame in device memory, as other packages offer it."""

    def __init__(self, context: CudaContext, frame: Frame, *, pad_bytes: int = 0) -> None:
        height, *inner = frame.shape
        row_bytes = int(np.prod(inner))
        pitch = row_bytes + pad_bytes
        with context.current():
            self.memory = context.allocate(height * pitch, what="a frame")
            stream = context.stream()
            rows = np.full((height, pitch), 77, np.uint8)
            rows[:, :row_bytes] = frame.reshape(height, row_bytes)
            context.copy_to_device(self.memory.address, rows, stream)
            stream.synchronize()
            stream.close()
        strides = (pitch, 1) if len(inner) == 1 else (pitch, inner[1], 1)
        self.__cuda_array_interface__ = {
            "shape": frame.shape,
            "typestr": "|u1",
            "data": (self.memory.address, False),
            "strides": strides,
            "version": 3,
            "stream": None,
        }


class ThroughDlpack:
    """What offers DLPack alone; NumPy makes the capsule, over the same memory."""

    def __init__(self, frame: OnDevice, shape: tuple[int, ...]) -> None:
        self.streams: list[int] = []
        memory = (ctypes.c_uint8 * int(np.prod(shape))).from_address(frame.memory.address)
        self._array = np.frombuffer(memory, np.uint8).reshape(shape)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, *, stream: int) -> Any:
        self.streams.append(stream)
        return self._array.__dlpack__()
