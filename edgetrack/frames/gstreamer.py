"""Addresses of cameras and streams, turned into GStreamer pipelines.

| address | what is opened |
|---|---|
| ``csi://0?width=1280&height=720&fps=30&flip=0`` | a CSI camera of a Jetson, by sensor id |
| ``v4l2://0?width=1280&height=720&fps=30&format=mjpg`` | a USB camera; ``/dev/video0``, ``0`` |
| ``rtsp://host/path#latency_ms=100`` | a network camera; its own query stays in the address |
| ``gst: … ! appsink drop=true max-buffers=1 sync=false`` | a pipeline as it stands |

On a Jetson pictures are decoded and converted by its own units (``nvv4l2decoder``, ``nvvidconv``,
see NVIDIA's *Accelerated GStreamer* guide) up to BGRx; the last step to BGR is the CPU's.
"""

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgetrack.errors import SourceError

__all__ = [
    "APPSINK",
    "Camera",
    "csi_pipeline",
    "missing_element",
    "parse_camera",
    "rtsp_pipeline",
    "shown",
    "v4l2_pipelines",
]

# The sink keeps one picture, the newest, and does not wait for the clock.
APPSINK = "appsink drop=true max-buffers=1 sync=false"
_TO_BGR = f"videoconvert ! video/x-raw,format=BGR ! {APPSINK}"
# nvvidconv has no BGR: it gives BGRx, from video memory (NVMM) or from system memory.
_TO_BGR_ON_JETSON = f"nvvidconv ! video/x-raw,format=BGRx ! {_TO_BGR}"
_LATENCY_MS = 100

_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "csi": ("width", "height", "fps", "flip"),
    "v4l2": ("width", "height", "fps", "format"),
    "rtsp": ("latency_ms",),
}
_LARGEST: Mapping[str, int] = {
    **{"width": 16384, "height": 16384, "fps": 1000},
    **{"flip": 7, "latency_ms": 60_000},
}
_MAY_BE_ZERO = frozenset({"flip", "latency_ms"})
_FORMATS = ("mjpg", "raw")


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A camera and the pictures that are asked of it.

    Attributes:
        kind: ``csi`` (through NVIDIA's Argus) or ``v4l2``.
        device: A sensor id for ``csi``; a camera number or a path for ``v4l2``.
        width_px: Width that the camera shall give.
        height_px: Height that the camera shall give.
        fps: Frames per second that it shall give.
        flip: ``flip-method`` of ``nvvidconv``, 0 to 7; 2 turns by 180 degrees; ``csi`` only.
        format: ``mjpg``, ``raw``, or empty for MJPG and, where there is none, raw; ``v4l2`` only.
    """

    kind: str
    device: str
    width_px: int = 1280
    height_px: int = 720
    fps: int = 30
    flip: int = 0
    format: str = ""


def parse_camera(address: str) -> Camera:
    """Read ``csi://…`` or ``v4l2://…``.

    Raises:
        SourceError: It names no device, or an option that is unknown or out of range.
    """
    kind, _, rest = address.partition("://")
    device, _, query = rest.partition("?")
    if kind == "csi" and not device.isdecimal():
        raise SourceError(
            f"{address}: expected csi:// and a sensor id, got {device!r}; write csi://0"
        )
    if not (device.isdecimal() or re.fullmatch(r"/dev/[\w./:+-]+", device)):
        raise SourceError(
            f"{address}: expected v4l2:// and a camera number or its path, got {device!r}; "
            "write v4l2://0 or v4l2:///dev/video0"
        )
    options = _options(address, kind, query)
    # A format is a word, everything else a number.
    picture_format = str(options.pop("format", ""))
    numbers = {_FIELDS.get(k, k): int(v) for k, v in options.items()}
    return Camera(kind=kind, device=device, format=picture_format, **numbers)


def csi_pipeline(camera: Camera) -> str:
    """A CSI camera of a Jetson: Argus gives NV12 in video memory, ``nvvidconv`` turns and converts.

    Example:
        >>> csi_pipeline(Camera(kind="csi", device="0")).split(" ! ")[0]
        'nvarguscamerasrc sensor-id=0'
    """
    picture = f"format=NV12,width={camera.width_px},height={camera.height_px}"
    return (
        f"nvarguscamerasrc sensor-id={camera.device} ! "
        f"video/x-raw(memory:NVMM),{picture},framerate={camera.fps}/1 ! "
        f"nvvidconv flip-method={camera.flip} ! video/x-raw,format=BGRx ! {_TO_BGR}"
    )


def v4l2_pipelines(camera: Camera, *, device: str, is_jetson: bool) -> list[str]:
    """A V4L2 camera, in the order to try; the camera decides which of them works.

    MJPG comes first, since over USB 2 most cameras reach their rate in it alone. On a Jetson
    the hardware decodes it, or the CPU where the hardware does not (Thor).

    Args:
        camera: What to ask for.
        device: The device's path, ``/dev/video0``.
        is_jetson: NVIDIA's elements are there.
    """
    picture = f"width={camera.width_px},height={camera.height_px},framerate={camera.fps}/1"
    source = f"v4l2src device={device}"
    pipelines = []
    if camera.format != "raw":
        jpeg = f"{source} ! image/jpeg,{picture}"
        if is_jetson:
            pipelines.append(f"{jpeg} ! jpegparse ! nvv4l2decoder mjpeg=1 ! {_TO_BGR_ON_JETSON}")
        pipelines.append(f"{jpeg} ! jpegdec ! {_TO_BGR}")
    if camera.format != "mjpg":
        # Here the CPU converts everywhere: nvvidconv does not take every raw format.
        pipelines.append(f"{source} ! video/x-raw,{picture} ! {_TO_BGR}")
    return pipelines


def rtsp_pipeline(address: str, *, is_jetson: bool) -> tuple[str, str]:
    """An RTSP stream over TCP; ``decodebin`` takes the hardware's decoder where there is one.

    Returns:
        The pipeline, and the address without our options, as another reader may take it.

    Raises:
        SourceError: What follows ``#`` is not ``latency_ms=N``.
    """
    location, _, fragment = address.partition("#")
    latency_ms = _options(shown(address), "rtsp", fragment).get("latency_ms", _LATENCY_MS)
    quoted = location.replace("\\", "%5C").replace('"', "%22").replace(" ", "%20")
    pipeline = (
        f'rtspsrc location="{quoted}" latency={latency_ms} drop-on-latency=true protocols=tcp ! '
        # A camera's sound has pads of its own, which would be linked if they came first.
        "application/x-rtp,media=video ! decodebin ! "
        f"{_TO_BGR_ON_JETSON if is_jetson else _TO_BGR}"
    )
    return pipeline, location


def missing_element(pipeline: str) -> str | None:
    """The first element of a pipeline that this machine's GStreamer does not have.

    OpenCV before 4.8 waits without an end for a pipeline whose source is missing.

    Returns:
        Its name; ``None`` when all are there, or when GStreamer itself cannot be asked.
    """
    try:
        library = ctypes.CDLL("libgstreamer-1.0.so.0")
    except OSError:
        return None
    library.gst_init_check(None, None, None)
    library.gst_element_factory_find.restype = ctypes.c_void_p
    for part in re.sub(r'"[^"]*"', "", pipeline).split(" ! "):
        name = part.split()[0] if part.split() else ""
        # Caps have a slash, and references to named elements a dot.
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            continue
        factory = library.gst_element_factory_find(name.encode())
        if factory is None:
            return name
        library.gst_object_unref(ctypes.c_void_p(factory))
    return None


def shown(address: str) -> str:
    """An address as a message may show it: without its password.

    Example:
        >>> shown("rtsp://admin:secret@10.0.0.5/stream")
        'rtsp://admin:***@10.0.0.5/stream'
    """
    return re.sub(r"(://[^:/?#@\s]*:)[^/?#\s]*@", r"\1***@", address)


_FIELDS = {"width": "width_px", "height": "height_px"}


def _options(address: str, kind: str, text: str) -> dict[str, int | str]:
    """Read ``name=value&…``.

    Raises:
        SourceError: A name is unknown, or a value out of range.
    """
    options: dict[str, int | str] = {}
    for part in filter(None, text.split("&")):
        name, _, value = part.partition("=")
        if name not in _OPTIONS[kind]:
            raise SourceError(
                f"{address}: expected options of {', '.join(_OPTIONS[kind])}, got {part!r}; "
                "correct or remove it"
            )
        read = _format if name == "format" else _number
        options[name] = read(address, name, value)
    return options


def _format(address: str, name: str, value: str) -> str:
    if value not in _FORMATS:
        raise SourceError(
            f"{address}: expected {name} to be {' or '.join(_FORMATS)}, got {value!r}; "
            "leave it out to try both"
        )
    return value


def _number(address: str, name: str, value: str) -> int:
    smallest = 0 if name in _MAY_BE_ZERO else 1
    is_number = value.isdecimal() and len(value) < 9
    if not is_number or not smallest <= int(value) <= _LARGEST[name]:
        raise SourceError(
            f"{address}: expected {name} from {smallest} to {_LARGEST[name]}, got {value!r}; "
            "correct it"
        )
    return int(value)
