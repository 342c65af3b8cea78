"""What is found out about a frame on the GPU, with arrays that only claim to lie there."""

from typing import Any

import numpy as np
import pytest

from edgetrack.runtime.frame_source import DeviceImage, GpuFrame, describe, is_on_gpu

TRACKERS_STREAM = 77
PINNED = 3


class Claimed:
    """An array with ``__cuda_array_interface__``, written on a stream."""

    def __init__(self, shape: tuple[int, ...], stream: int | None = None) -> None:
        self._array = np.zeros(shape, np.uint8)
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "|u1",
            "data": (self._array.ctypes.data, False),
            "stream": stream,
            "version": 3,
        }


class ThroughDlpack:
    """Memory that DLPack offers, with the streams that it was asked for."""

    def __init__(self, array: Any, kind: int, number: int = 0) -> None:
        self.array, self.device, self.asked = array, (kind, number), list[int | None]()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        if self.device[0] == PINNED and stream is not None:
            raise AssertionError("stream should be None on cpu.")  # as torch says it
        self.asked.append(stream)
        return self.array.__dlpack__()


def described(frame: Any, *, device: int | None = 0) -> DeviceImage:
    assert is_on_gpu(frame)
    return describe(frame, ordinal=0, stream=TRACKERS_STREAM, device_of=lambda _: device)


@pytest.mark.parametrize(
    ("luma", "chroma", "given", "streams"),
    [
        (5, 9, None, (5, 9)),
        (9, 5, None, (5, 9)),
        (5, 5, None, (5,)),
        (None, 9, None, (9,)),
        (5, None, None, (5,)),
        (None, None, None, ()),
        (5, 9, 3, (3,)),
    ],
)
def test_the_streams_of_both_planes_of_nv12_are_waited_for(
    luma: int | None, chroma: int | None, given: int | None, streams: tuple[int, ...]
) -> None:
    frame = GpuFrame(
        Claimed((4, 6), luma), format="nv12-bt601", chroma=Claimed((2, 6), chroma), stream=given
    )

    assert described(frame).streams == streams


def test_a_frame_of_one_plane_has_its_stream() -> None:
    assert described(Claimed((4, 6, 3), 5)).streams == (5,)
    assert described(Claimed((4, 6, 3))).streams == ()


def test_dlpack_is_told_who_reads_and_leaves_nothing_to_wait_for() -> None:
    frame = ThroughDlpack(np.zeros((4, 6, 3), np.uint8), kind=2)

    assert described(frame).streams == ()
    assert frame.asked == [TRACKERS_STREAM]


@pytest.mark.parametrize(("number", "device"), [(0, 0), (0, 1), (1, 1)])
def test_pinned_memory_is_every_devices_and_asks_for_no_stream(number: int, device: int) -> None:
    array = np.zeros((4, 6, 3), np.uint8)
    frame = ThroughDlpack(array, PINNED, number)

    image = described(frame, device=device)

    assert image.address == array.ctypes.data
    assert frame.asked == [None]


def test_memory_of_another_device_is_refused() -> None:
    array = np.zeros((4, 6, 3), np.uint8)

    with pytest.raises(TypeError, match="expected memory of CUDA device 0, got DLPack device type"):
        described(ThroughDlpack(array, 2, 1))
    with pytest.raises(TypeError, match="frame: expected memory of CUDA device 0, got device 1"):
        described(Claimed((4, 6, 3)), device=1)
    with pytest.raises(TypeError, match="got memory that no CUDA driver allocated"):
        described(ThroughDlpack(array, PINNED), device=None)


def test_a_chroma_plane_of_another_device_is_refused() -> None:
    luma, chroma = Claimed((4, 6)), Claimed((2, 6))
    address = chroma.__cuda_array_interface__["data"][0]
    frame = GpuFrame(luma, format="nv12-bt709", chroma=chroma)

    with pytest.raises(TypeError, match="chroma: expected memory of CUDA device 0, got device 1"):
        describe(frame, ordinal=0, stream=1, device_of=lambda found: int(found == address))
