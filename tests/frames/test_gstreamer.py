"""Addresses as pipelines; where OpenCV has GStreamer, the pipelines run as well."""

import doctest
import time
from pathlib import Path

import cv2
import pytest
from loopback import number_of, rtsp_server, write_numbered

from edgetrack.errors import SourceError
from edgetrack.frames import gstreamer, read_frames
from edgetrack.frames.gstreamer import (
    APPSINK,
    Camera,
    csi_pipeline,
    missing_element,
    parse_camera,
    rtsp_pipeline,
    shown,
    v4l2_pipelines,
)

HAS_GSTREAMER = cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER)
needs_gstreamer = pytest.mark.skipif(
    not HAS_GSTREAMER, reason="needs an OpenCV with GStreamer; the wheels have none"
)
BGR = "video/x-raw,format=BGR ! appsink drop=true max-buffers=1 sync=false"
TEST_SOURCE = "videotestsrc is-live=true num-buffers=40"


def test_examples_hold() -> None:
    assert doctest.testmod(gstreamer).failed == 0


def test_a_csi_camera_goes_through_argus_and_the_converter() -> None:
    camera = parse_camera("csi://1?width=1920&height=1080&fps=60&flip=2")

    assert csi_pipeline(camera) == (
        "nvarguscamerasrc sensor-id=1 ! "
        "video/x-raw(memory:NVMM),format=NV12,width=1920,height=1080,framerate=60/1 ! "
        f"nvvidconv flip-method=2 ! video/x-raw,format=BGRx ! videoconvert ! {BGR}"
    )


@pytest.mark.parametrize(
    ("address", "camera"),
    [
        ("csi://0", Camera(kind="csi", device="0")),
        ("csi://0?", Camera(kind="csi", device="0")),
        ("v4l2://2?fps=15", Camera(kind="v4l2", device="2", fps=15)),
        (
            "v4l2:///dev/video0?width=640&height=480&format=raw",
            Camera(kind="v4l2", device="/dev/video0", width_px=640, height_px=480, format="raw"),
        ),
        (
            "v4l2:///dev/v4l/by-path/platform-3610000.xhci-usb-0:2.3:1.0-video-index0",
            Camera(
                kind="v4l2",
                device="/dev/v4l/by-path/platform-3610000.xhci-usb-0:2.3:1.0-video-index0",
            ),
        ),
    ],
)
def test_an_address_says_what_to_ask_for(address: str, camera: Camera) -> None:
    assert parse_camera(address) == camera


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("csi://", "expected csi:// and a sensor id, got ''; write csi://0"),
        ("csi:///dev/video0", "expected csi:// and a sensor id, got '/dev/video0'"),
        ("v4l2://camera", "expected v4l2:// and a camera number or its path, got 'camera'"),
        ("v4l2:///dev/video0 ! filesink", "expected v4l2:// and a camera number"),
        ("csi://0?widht=1280", "expected options of width, height, fps, flip, got 'widht=1280'"),
        ("csi://0?format=raw", "expected options of width, height, fps, flip"),
        ("csi://0?width=0", "expected width from 1 to 16384, got '0'"),
        ("csi://0?width", "expected width from 1 to 16384, got ''"),
        ("csi://0?fps=29.97", "expected fps from 1 to 1000, got '29.97'"),
        ("csi://0?flip=8", "expected flip from 0 to 7, got '8'"),
        ("v4l2://0?format=nv12", "expected format to be mjpg or raw, got 'nv12'"),
    ],
)
def test_a_wrong_address_is_refused(address: str, message: str) -> None:
    with pytest.raises(SourceError, match="^" + address.replace("?", r"\?")) as caught:
        read_frames(address)

    assert message in str(caught.value)


def test_a_usb_camera_is_asked_for_mjpg_first_and_decoded_by_the_jetson() -> None:
    pipelines = v4l2_pipelines(
        Camera(kind="v4l2", device="0"), device="/dev/video0", is_jetson=True
    )

    asked = "v4l2src device=/dev/video0 ! {},width=1280,height=720,framerate=30/1"
    jpeg, raw = asked.format("image/jpeg"), asked.format("video/x-raw")
    assert pipelines == [
        f"{jpeg} ! jpegparse ! nvv4l2decoder mjpeg=1 ! nvvidconv ! video/x-raw,format=BGRx ! "
        f"videoconvert ! {BGR}",
        f"{jpeg} ! jpegdec ! videoconvert ! {BGR}",
        f"{raw} ! videoconvert ! {BGR}",
    ]


@pytest.mark.parametrize(
    ("picture_format", "is_jetson", "decoders"),
    [
        ("", False, ["jpegdec", "none"]),
        ("mjpg", False, ["jpegdec"]),
        ("raw", False, ["none"]),
        ("mjpg", True, ["nvv4l2decoder", "jpegdec"]),
        ("raw", True, ["none"]),
    ],
)
def test_a_format_and_the_machine_choose_the_decoder(
    picture_format: str, is_jetson: bool, decoders: list[str]
) -> None:
    camera = Camera(kind="v4l2", device="0", format=picture_format)

    found = [
        next((d for d in ("nvv4l2decoder", "jpegdec") if d in p), "none")
        for p in v4l2_pipelines(camera, device="/dev/video0", is_jetson=is_jetson)
    ]

    assert found == decoders


@pytest.mark.parametrize("is_jetson", [False, True])
def test_rtsp_options_stand_behind_the_address_and_are_not_sent(is_jetson: bool) -> None:
    address = "rtsp://admin:pw@10.0.0.5/cam?channel=1&subtype=0"

    pipeline, plain = rtsp_pipeline(f"{address}#latency_ms=250", is_jetson=is_jetson)

    assert plain == address
    assert pipeline.startswith(
        f'rtspsrc location="{address}" latency=250 drop-on-latency=true protocols=tcp ! '
    )
    assert ("nvvidconv" in pipeline) == is_jetson
    assert pipeline.endswith(f"videoconvert ! {BGR}")
    assert "latency=100 " in rtsp_pipeline(address, is_jetson=is_jetson)[0]


def test_an_address_cannot_leave_its_quotes() -> None:
    pipeline, _ = rtsp_pipeline('rtsp://host/" ! filesink location="/etc/x\\', is_jetson=False)

    assert 'location="rtsp://host/%22%20!%20filesink%20location=%22/etc/x%5C" ' in pipeline


@pytest.mark.parametrize("fragment", ["latency_ms=-1", "latency_ms=1s", "codec=h264", "trackID"])
def test_wrong_rtsp_options_are_refused_without_the_password(fragment: str) -> None:
    with pytest.raises(SourceError, match=r"rtsp://admin:\*\*\*@host.*expected.*latency_ms"):
        read_frames(f"rtsp://admin:secret@host/cam#{fragment}")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("rtsp://u:p@ss@host:554/x", "rtsp://u:***@host:554/x"),
        ("rtsp://u@host/x", "rtsp://u@host/x"),
        ("http://host:8080/a@b:c", "http://host:8080/a@b:c"),
        ('rtspsrc location="rtsp://u:p@h/x" ! fakesink', 'rtspsrc location="rtsp://u:***@h/x" ! '),
        ("csi://0", "csi://0"),
    ],
)
def test_passwords_are_masked(address: str, expected: str) -> None:
    assert shown(address).startswith(expected)


def test_a_pipeline_without_a_sink_is_told_how_to_end() -> None:
    with pytest.raises(SourceError, match=r"ends in appsink, got another; .*format=BGR ! appsink"):
        read_frames("gst: videotestsrc ! autovideosink")


@pytest.mark.skipif(HAS_GSTREAMER, reason="needs an OpenCV without GStreamer, as the wheels")
@pytest.mark.parametrize("source", ["csi://0", f"gst: {TEST_SOURCE} ! appsink"])
def test_without_gstreamer_the_error_says_how_to_get_it(source: str) -> None:
    with pytest.raises(SourceError, match=r"OpenCV with GStreamer, got .*doctor.*--system-site-p"):
        read_frames(source)


@needs_gstreamer
@pytest.mark.parametrize("prefix", ["gst:", "gst: ", ""])
def test_a_live_pipeline_gives_the_newest_frame(prefix: str) -> None:
    pipeline = f"{TEST_SOURCE} ! video/x-raw,width=320,height=240 ! videoconvert ! {BGR}"

    num_frames = 0
    with read_frames(prefix + pipeline) as source:
        for _ in source:
            num_frames += 1
            time.sleep(0.1)

    assert (source.is_live, source.fps, source.size) == (True, 30, (320, 240))
    assert 2 <= num_frames <= 30
    assert num_frames + source.num_dropped <= 40


@needs_gstreamer
@pytest.mark.parametrize("picture_format", ["mjpg", "raw"])
def test_what_follows_a_usb_camera_runs(picture_format: str) -> None:
    camera = Camera(kind="v4l2", device="0", width_px=320, height_px=240, format=picture_format)
    (pipeline,) = v4l2_pipelines(camera, device="/dev/video0", is_jetson=False)
    encoder = " ! jpegenc" if picture_format == "mjpg" else ""

    # Only the camera itself is another one.
    pipeline = pipeline.replace("v4l2src device=/dev/video0", TEST_SOURCE + encoder)

    with read_frames(pipeline) as source:
        assert (source.size, next(source).shape) == ((320, 240), (240, 320, 3))


@needs_gstreamer
def test_rtsp_goes_through_gstreamer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with rtsp_server(tmp_path, num_frames=60) as server, read_frames(server.url) as source:
        numbers = [number_of(frame) for frame in source]

    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 59
    assert "GStreamer" in capfd.readouterr().err  # it says that a stream has no duration


@needs_gstreamer
def test_a_pipeline_over_a_file_gives_every_frame(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "clip.avi", "MJPG", num_frames=30)
    pipeline = f"filesrc location={path} ! decodebin ! videoconvert ! video/x-raw,format=BGR"

    with read_frames(f"{pipeline} ! appsink sync=false") as source:
        numbers = []
        for frame in source:
            numbers.append(number_of(frame))
            time.sleep(0.01)

    assert numbers == list(range(30))
    assert (source.is_live, source.num_dropped) == (False, 0)


@needs_gstreamer
def test_other_pixels_than_bgr_are_refused() -> None:
    with pytest.raises(SourceError, match=r"expected frames \(H, W, 3\), got .*format=BGR"):
        read_frames(f"{TEST_SOURCE} ! video/x-raw,format=GRAY8 ! {APPSINK}")


@needs_gstreamer
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"nosuchelement ! {APPSINK}", "to have the element nosuchelement, got none; check its na"),
        (f"{TEST_SOURCE} ! nosuchelement ! {APPSINK}", "the element nosuchelement"),
        (f"{TEST_SOURCE} num-buffer=1 ! {APPSINK}", "expected to open it, got a refusal; .*launch"),
    ],
)
def test_a_pipeline_that_cannot_run_is_refused_at_once(source: str, message: str) -> None:
    start = time.monotonic()

    with pytest.raises(SourceError, match=message):
        read_frames(source)

    assert time.monotonic() - start < 3


@needs_gstreamer
@pytest.mark.skipif(missing_element("nvarguscamerasrc") is None, reason="this is a Jetson")
def test_a_csi_camera_elsewhere_is_refused_at_once() -> None:
    with pytest.raises(SourceError, match=r"csi://0: .* element nvarguscamerasrc, .* JetPack"):
        read_frames("csi://0")


@needs_gstreamer
def test_quotes_caps_and_references_are_no_elements() -> None:
    pipeline = 'filesrc location="a ! nosuch ! b" ! video/x-raw,width=3 ! t. t. ! appsink'

    assert missing_element(pipeline) is None
