"""Frames from host memory to where the crop kernel reads them.

An integrated GPU reads mapped host memory in place, so that only the pixels are copied that the
crop needs; a discrete one gets the same region by DMA.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetrack.backends.cuda import CudaContext, DeviceMemory, MappedMemory, Stream
from edgetrack.crops import CropWindow
from edgetrack.runtime.frame_source import DeviceImage

__all__ = ["NUM_SLOTS", "FrameUploader"]

NUM_SLOTS = 2
_PITCH_ALIGNMENT_BYTES = 256
# The crop of a very large window reads a little beside it.
_MARGIN_PX = 2
_FORMATS = {1: "gray8", 3: "bgr8", 4: "bgra8"}


class FrameUploader:
    """Two frames in pinned memory, and on a discrete GPU two in device memory.

    Args:
        context: Where; current in this thread at every call.
        stream: What the copies are put on.
        frame_shape: ``(H, W)`` or ``(H, W, C)`` of all frames.

    Attributes:
        frame_shape: As given.
        num_bytes: Memory that the device uses: mapped if it is integrated, its own if not.

    Raises:
        DeviceMemoryError: There is no room.
    """

    def __init__(
        self, context: CudaContext, stream: Stream, *, frame_shape: tuple[int, ...]
    ) -> None:
        self.frame_shape = frame_shape
        self._context, self._stream = context, stream
        height, width, *channels = frame_shape
        self._num_channels = channels[0] if channels else 1
        row_bytes = width * self._num_channels
        self._pitch_bytes = -(-row_bytes // _PITCH_ALIGNMENT_BYTES) * _PITCH_ALIGNMENT_BYTES
        self._slots: list[_Slot] = []
        what = f"frames of {width}x{height}"
        size = self._pitch_bytes * height
        try:
            for _ in range(NUM_SLOTS):
                mapped = context.allocate_mapped(size, what=what)
                self._slots.append(_Slot(mapped, self._pixels(mapped), None))
                if not context.device.is_integrated:
                    memory = context.allocate(size, what=what)
                    self._slots[-1] = _Slot(mapped, self._slots[-1].pixels, memory)
        except BaseException:
            self.close()
            raise
        self.num_bytes = size * NUM_SLOTS

    def upload(
        self, frame: npt.NDArray[np.uint8], number: int, window: CropWindow | None
    ) -> DeviceImage:
        """Put a frame, or the region of it that a crop needs, where the device reads it.

        Args:
            frame: Of ``frame_shape``, any strides. It may be written to after this returns.
            number: Frame ``number - NUM_SLOTS`` must be done.
            window: What will be cropped, if it is known.

        Returns:
            The whole frame; outside of the region its pixels are of an earlier frame.
        """
        slot = self._slots[number % NUM_SLOTS]
        height, width = self.frame_shape[:2]
        left, top, right, bottom = 0, 0, width, height
        if window is not None:
            left, top = (max(v - _MARGIN_PX, 0) for v in (window.left_px, window.top_px))
            right = min(window.left_px + window.side_px + _MARGIN_PX, width)
            bottom = min(window.top_px + window.side_px + _MARGIN_PX, height)
        if right > left and bottom > top:
            pixels = frame.reshape(*self.frame_shape[:2], self._num_channels)
            slot.pixels[top:bottom, left:right] = pixels[top:bottom, left:right]
            if slot.memory is not None:
                first = top * self._pitch_bytes + left * self._num_channels
                self._context.copy_rows(
                    address=slot.memory.address + first,
                    pitch_bytes=self._pitch_bytes,
                    source=slot.pixels.ctypes.data + first,
                    source_pitch_bytes=self._pitch_bytes,
                    width_bytes=(right - left) * self._num_channels,
                    num_rows=bottom - top,
                    stream=self._stream,
                )
        return DeviceImage(
            shape=(height, width, self._num_channels),
            format=_FORMATS[self._num_channels],
            address=(slot.memory or slot.mapped).address,
            pitch_bytes=self._pitch_bytes,
            chroma_address=0,
            chroma_pitch_bytes=0,
            streams=(),
            owner=None,
        )

    def close(self) -> None:
        """Free the memory; calling it twice is fine."""
        for slot in self._slots:
            slot.mapped.close()
            if slot.memory is not None:
                slot.memory.close()

    def _pixels(self, mapped: MappedMemory) -> npt.NDArray[np.uint8]:
        """The memory as ``(H, W, C)`` with padded rows."""
        height, width = self.frame_shape[:2]
        channels = self._num_channels
        rows = mapped.array[: height * self._pitch_bytes].reshape(height, self._pitch_bytes)
        return rows[:, : width * channels].reshape(height, width, channels)


@dataclass(frozen=True)
class _Slot:
    mapped: MappedMemory
    pixels: npt.NDArray[np.uint8]
    memory: DeviceMemory | None
