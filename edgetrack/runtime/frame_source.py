"""Frames that lie on the GPU already: what they are, and where.

Anything with ``__cuda_array_interface__`` (PyCUDA, CuPy, Numba, torch) or DLPack counts; no
package is imported for it, and nothing is copied.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["DeviceImage", "GpuFrame", "describe", "is_on_gpu"]

# Channels of the plane that holds a frame's shape.
_CHANNELS: Mapping[str, int] = MappingProxyType(
    {
        "bgr8": 3,
        "rgb8": 3,
        "gray8": 1,
        "bgra8": 4,
        "rgba8": 4,
        "nv12-bt601": 1,
        "nv12-bt709": 1,
    }
)
_DEFAULT_FORMATS = {1: "gray8", 3: "bgr8", 4: "bgra8"}
_DLPACK_PINNED = 3  # host memory that every device reads
_DLPACK_CUDA_TYPES = (2, _DLPACK_PINNED, 13)  # device, pinned and managed memory
_DLPACK_UINT8 = (1, 8, 1)  # kDLUInt, bits, lanes


@dataclass(frozen=True)
class GpuFrame:
    """A frame in device memory, and how its bytes are to be read.

    Attributes:
        pixels: uint8; ``(H, W, C)`` or ``(H, W)``; of NV12 the luma plane ``(H, W)``. It has
            ``__cuda_array_interface__`` or DLPack. Rows may be padded. Pinned host memory counts
            as memory of every device.
        format: ``bgr8``, ``rgb8``, ``gray8``, ``bgra8``, ``rgba8``, ``nv12-bt601`` or
            ``nv12-bt709`` (both limited range). ``None`` tells it from the channels, blue first.
        chroma: The interleaved UV plane of NV12: ``(H / 2, W)`` or ``(H / 2, W / 2, 2)``, uint8.
        stream: Handle of the CUDA stream that writes the frame; the tracker waits for what is on
            it so far. ``None``: what each array itself says, and if it says nothing, its plane is
            taken as finished.
    """

    pixels: Any
    format: str | None = None
    chroma: Any = None
    stream: int | None = None


@dataclass(frozen=True)
class DeviceImage:
    """Where a frame lies, checked.

    Attributes:
        shape: ``(H, W, C)`` of what it decodes to.
        format: One of the formats of ``GpuFrame``.
        address: Device address of its first pixel.
        pitch_bytes: From one row to the next.
        chroma_address: Of the UV plane of NV12, otherwise 0.
        chroma_pitch_bytes: From one of its rows to the next.
        streams: Those that write it, whose work so far is to be waited for; none if it is finished.
        owner: Keeps the memory alive.
    """

    shape: tuple[int, int, int]
    format: str
    address: int
    pitch_bytes: int
    chroma_address: int
    chroma_pitch_bytes: int
    streams: tuple[int, ...]
    owner: Any


def is_on_gpu(frame: Any) -> bool:
    """Whether a frame claims to lie on a GPU."""
    if isinstance(frame, GpuFrame) or hasattr(frame, "__cuda_array_interface__"):
        return True
    device = getattr(frame, "__dlpack_device__", None)
    return device is not None and device()[0] in _DLPACK_CUDA_TYPES


def describe(
    frame: Any, *, ordinal: int, stream: int, device_of: Callable[[int], int | None]
) -> DeviceImage:
    """Find and check the planes of a frame on the GPU.

    Args:
        frame: What ``is_on_gpu``.
        ordinal: The device that the tracker runs on.
        stream: The tracker's stream, to which DLPack orders the work on the frame.
        device_of: Tells the device of an address, ``None`` if it is of none.

    Raises:
        TypeError: It is no uint8 array, or lies on another device.
        ValueError: Its shape, strides or format do not fit.
    """
    given = frame if isinstance(frame, GpuFrame) else GpuFrame(frame)
    plane = _plane(given.pixels, "frame", ordinal=ordinal, stream=stream)
    layout = given.format or _DEFAULT_FORMATS.get(plane.channels, "")
    if _CHANNELS.get(layout) != plane.channels:
        raise ValueError(
            f"frame: expected a format among {list(_CHANNELS)} that fits its channels, got "
            f"{given.format!r} for shape {plane.shape}; pass GpuFrame(frame, format=…)"
        )
    chroma = _chroma(given, layout, plane, ordinal=ordinal, stream=stream)
    planes = (plane,) if chroma is None else (plane, chroma)
    for what, found in zip(("frame", "chroma"), planes, strict=False):
        got = device_of(found.address)
        if got is None or (got != ordinal and not found.is_pinned):
            where = "memory that no CUDA driver allocated" if got is None else f"device {got}"
            raise TypeError(
                f"{what}: expected memory of CUDA device {ordinal}, got {where}; move it there, or "
                f"make the tracker with device={got or 0}"
            )
    writers = {p.stream for p in planes} if given.stream is None else {given.stream}
    return DeviceImage(
        shape=(plane.height, plane.width, 3 if layout.startswith("nv12") else plane.channels),
        format=layout,
        address=plane.address,
        pitch_bytes=plane.pitch_bytes,
        chroma_address=0 if chroma is None else chroma.address,
        chroma_pitch_bytes=0 if chroma is None else chroma.pitch_bytes,
        streams=tuple(sorted(writer for writer in writers if writer is not None)),
        owner=(frame, *(p.owner for p in planes)),
    )


@dataclass(frozen=True)
class _Plane:
    shape: tuple[int, ...]
    address: int
    pitch_bytes: int
    stream: int | None
    owner: Any
    is_pinned: bool = False

    @property
    def height(self) -> int:
        return self.shape[0]

    @property
    def width(self) -> int:
        return self.shape[1]

    @property
    def channels(self) -> int:
        return self.shape[2] if len(self.shape) == 3 else 1


def _chroma(
    given: GpuFrame, layout: str, luma: _Plane, *, ordinal: int, stream: int
) -> _Plane | None:
    if not layout.startswith("nv12"):
        if given.chroma is not None:
            raise ValueError(f"chroma: expected none for a {layout} frame, got one")
        return None
    if given.chroma is None:
        raise ValueError("chroma: expected the UV plane of an NV12 frame, got none")
    plane = _plane(given.chroma, "chroma", ordinal=ordinal, stream=stream)
    height, width = luma.height // 2, luma.width
    is_even = luma.height % 2 == 0 and width % 2 == 0
    if not is_even or plane.shape not in ((height, width), (height, width // 2, 2)):
        raise ValueError(
            f"chroma: expected shape {(height, width)} for luma {luma.shape} with even sides, got "
            f"{plane.shape}"
        )
    return plane


def _plane(array: Any, what: str, *, ordinal: int, stream: int) -> _Plane:
    """One array on the GPU, through whichever protocol orders the streams."""
    interface = getattr(array, "__cuda_array_interface__", None)
    has_stream = interface is not None and interface.get("stream") is not None
    if hasattr(array, "__dlpack__") and not has_stream:
        return _from_dlpack(array, what, ordinal=ordinal, stream=stream)
    if interface is None:
        raise TypeError(
            f"{what}: expected an array on the GPU (__cuda_array_interface__ or DLPack), got "
            f"{type(array).__name__}"
        )
    return _from_interface(array, interface, what)


def _from_interface(array: Any, interface: Mapping[str, Any], what: str) -> _Plane:
    if interface["typestr"] != "|u1" or interface.get("mask") is not None:
        raise TypeError(f"{what}: expected uint8 without a mask, got {interface['typestr']}")
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    return _checked_plane(
        what,
        shape=shape,
        strides=None if strides is None else tuple(strides),
        address=int(interface["data"][0]),
        stream=interface.get("stream"),
        owner=array,
    )


class _DLTensor(ctypes.Structure):
    """``DLTensor`` of dlpack.h, which both versions of its capsule begin or end with."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _from_dlpack(array: Any, what: str, *, ordinal: int, stream: int) -> _Plane:
    kind, found = array.__dlpack_device__()
    is_pinned = kind == _DLPACK_PINNED
    if kind not in _DLPACK_CUDA_TYPES or (found != ordinal and not is_pinned):
        raise TypeError(
            f"{what}: expected memory of CUDA device {ordinal}, got DLPack device type "
            f"{int(kind)}, number {found}; move it there"
        )
    # What lies on the host is ordered by no stream, and torch refuses one for it.
    capsule = array.__dlpack__(stream=None if is_pinned else stream)
    # The capsule stays unconsumed: its own destructor gives the memory back once it is dropped.
    tensor = ctypes.cast(_pointer(capsule, b"dltensor"), ctypes.POINTER(_DLTensor)).contents
    if (tensor.type_code, tensor.type_bits, tensor.type_lanes) != _DLPACK_UINT8:
        raise TypeError(f"{what}: expected uint8, got another type through DLPack")
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    return _checked_plane(
        what,
        shape=shape,
        strides=strides,
        address=(tensor.data or 0) + tensor.byte_offset,
        stream=None,
        owner=(array, capsule),
        is_pinned=is_pinned,
    )


def _pointer(capsule: Any, name: bytes) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return int(get(capsule, name))


def _checked_plane(
    what: str,
    *,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    address: int,
    stream: int | None,
    owner: Any,
    is_pinned: bool = False,
) -> _Plane:
    """A plane whose pixels lie side by side in each row."""
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"{what}: expected shape (H, W) or (H, W, C), got {shape}")
    row_bytes = shape[1] * (shape[2] if len(shape) == 3 else 1)
    inner = (1,) if len(shape) == 2 else (shape[2], 1)
    pitch_bytes = row_bytes if strides is None else strides[0]
    if strides is not None and (strides[1:] != inner or pitch_bytes < row_bytes):
        raise ValueError(
            f"{what}: expected rows of adjoining pixels, got shape {shape} with strides {strides}; "
            "make it contiguous (planar and flipped images are not)"
        )
    if not address:
        raise ValueError(f"{what}: expected a device address, got 0")
    return _Plane(shape, address, pitch_bytes, stream, owner, is_pinned)
