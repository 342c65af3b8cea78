import contextlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from edgetrack.errors import FrameSizeError, SourceEndedError, SourceError
from edgetrack.frames import FrameSource, VideoSink, image_paths, read_frames, read_image

WIDTH, HEIGHT = 96, 64


def numbered_frame(index: int, *, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Texture that no codec gets rid of, with a column per frame number."""
    frame = np.random.default_rng(7).integers(0, 100, (height // 8, width // 8, 3), dtype=np.uint8)
    frame = cv2.resize(frame, (width, height))
    frame[:, index % (width // 8) * 8 :][:, :8] = 255
    return frame


def number_of(frame: np.ndarray) -> int:
    columns = frame.reshape(frame.shape[0], -1, 8, 3).mean(axis=(0, 2, 3))
    return int(columns.argmax())


def write_video(path: Path, codec: str, *, num_frames: int = 60, fps: float = 30) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (WIDTH, HEIGHT))
    if not writer.isOpened():
        pytest.skip(f"needs an OpenCV that writes {codec} in {path.suffix}")
    for index in range(num_frames):
        writer.write(numbered_frame(index))
    writer.release()
    return path


def numbers_until_cut(source: FrameSource) -> tuple[list[int], str]:
    numbers = []
    try:
        for frame in source:
            numbers.append(number_of(frame))
    except SourceEndedError as error:
        return numbers, str(error)
    return pytest.fail("the source ended like a healthy one")


def cut_in_the_middle(path: Path) -> Path:
    content = path.read_bytes()
    cut = path.with_name(f"cut{path.suffix}")
    cut.write_bytes(content[: len(content) // 2])
    return cut


def with_index_first(path: Path) -> Path:
    """Move an mp4's index before its frames, as files made for streaming have it."""
    content, boxes, position = path.read_bytes(), {}, 0
    while position < len(content):
        size = int.from_bytes(content[position : position + 4], "big")
        boxes[content[position + 4 : position + 8]] = content[position : position + size]
        position += size
    index = bytearray(boxes.pop(b"moov"))
    at = index.find(b"stco") + 8
    for entry in range(int.from_bytes(index[at : at + 4], "big")):
        where = at + 4 + 4 * entry
        offset = int.from_bytes(index[where : where + 4], "big") + len(index)
        index[where : where + 4] = offset.to_bytes(4, "big")
    streaming = path.with_name("streaming.mp4")
    streaming.write_bytes(boxes.pop(b"ftyp") + index + b"".join(boxes.values()))
    return streaming


def write_pictures(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for index, name in enumerate(names):
        assert cv2.imwrite(str(folder / name), numbered_frame(index))
    return folder


def test_a_video_gives_its_frames_in_order_with_rate_count_and_size(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", "mp4v", num_frames=12, fps=25)

    source = read_frames(path)
    frames = list(source)

    assert (source.fps, source.num_frames, source.size) == (25.0, 12, (WIDTH, HEIGHT))
    assert [number_of(f) for f in frames] == list(range(12))
    assert all(f.shape == (HEIGHT, WIDTH, 3) and f.dtype == np.uint8 for f in frames)


def test_a_video_may_be_named_in_bytes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", "mp4v", num_frames=5)

    assert len(list(read_frames(os.fsencode(path)))) == 5


def test_a_url_is_read_like_a_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", "mp4v", num_frames=5)

    assert len(list(read_frames(path.as_uri()))) == 5


@pytest.mark.parametrize("num_frames", [1, 2, 59, 150])
@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "mp4v"), ("avi", "MJPG"), ("webm", "VP80"), ("mkv", "mp4v")]
)
def test_no_healthy_video_is_said_to_be_cut_off(
    tmp_path: Path, suffix: str, codec: str, num_frames: int
) -> None:
    path = write_video(tmp_path / f"a.{suffix}", codec, num_frames=num_frames, fps=30000 / 1001)

    assert len(list(read_frames(path))) == num_frames


def test_a_video_of_variable_rate_is_judged_by_its_time_stamps(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", "mp4v", num_frames=60, fps=30)
    content = bytearray(path.read_bytes())
    at = content.find(b"\x23\xe3\x83") + 4  # DefaultDuration, in nanoseconds
    size = content[at - 1] & 0x7F
    declared = int.from_bytes(content[at : at + size], "big") // 2
    content[at : at + size] = declared.to_bytes(size, "big")
    path.write_bytes(content)

    source = read_frames(path)

    assert source.num_frames is not None
    assert source.num_frames > 100
    assert len(list(source)) == 60


@pytest.mark.parametrize(("suffix", "codec"), [("avi", "MJPG"), ("webm", "VP80"), ("mp4", "mp4v")])
def test_a_video_cut_in_the_middle_gives_all_that_is_left_and_then_says_so(
    tmp_path: Path, suffix: str, codec: str
) -> None:
    path = write_video(tmp_path / f"clip.{suffix}", codec)
    source = read_frames(cut_in_the_middle(with_index_first(path) if suffix == "mp4" else path))

    numbers, message = numbers_until_cut(source)

    assert 15 <= len(numbers) <= 45
    # The last one may be half a frame.
    assert numbers[:-1] == [index % (WIDTH // 8) for index in range(len(numbers) - 1)]
    assert f"cut.{suffix}: expected 60 frames as it declares, got {len(numbers)}; " in message
    with pytest.raises(StopIteration):
        next(source)


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100])
def test_a_file_that_is_no_video_is_refused_at_the_call(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)

    with pytest.raises(SourceError, match=r"clip\.mp4: expected .* re-encode"):
        read_frames(path)


def test_a_video_without_a_frame_is_refused_at_the_call(tmp_path: Path) -> None:
    content = write_video(tmp_path / "clip.avi", "MJPG").read_bytes()
    (tmp_path / "empty.avi").write_bytes(content[: content.find(b"movi") + 4])

    with pytest.raises(SourceError, match=r"empty\.avi: expected .* re-encode"):
        read_frames(tmp_path / "empty.avi")


def test_an_mp4_without_its_end_is_refused_at_the_call(tmp_path: Path) -> None:
    path = cut_in_the_middle(write_video(tmp_path / "clip.mp4", "mp4v"))

    with pytest.raises(SourceError, match=r"cut\.mp4: .* cut off"):
        read_frames(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.mp4", "no such file or folder; check the path"),
        (97, "camera 97: .* plugged in"),
        ("97", "camera 97: .* plugged in"),
        (-1, "camera -1: expected a camera number from 0 to 99, got -1"),
        ("-1", "camera -1: expected a camera number from 0 to 99, got -1"),
        (100, "camera 100: expected a camera number"),
        (99999999999, "camera 99999999999: expected a camera number"),
        ("99999999999", "camera 99999999999: expected a camera number"),
        pytest.param("9" * 5000, "expected a camera number", id="5000 digits"),
        (True, "camera True: expected a camera number"),
        ("", "got an empty text; name one"),
        (b"nowhere.mp4", "^nowhere.mp4: .* no such file or folder"),
        (
            "/dev/null",
            r"^/dev/null: expected .*\(/dev/video\*\), got another device; check the path",
        ),
        ("http://127.0.0.1:9/none.mp4", "expected to open it, got a refusal; check the address"),
        ("file:///nowhere.mp4", "expected to open it, got a refusal; it is empty, no video"),
    ],
)
def test_a_source_that_cannot_be_opened_is_refused_at_the_call(
    source: str | bytes | int, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        read_frames(source)


def test_a_folder_gives_its_pictures_in_natural_order(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "img", ["1.png", "2.png", "9.PNG", "10.png", "b1.png"])
    (folder / "notes.txt").write_text("no picture")
    (folder / "._1.png").write_bytes(b"left by another system")

    source = read_frames(str(folder))

    assert (source.fps, source.num_frames, source.size) == (None, 5, (WIDTH, HEIGHT))
    assert [number_of(f) for f in source] == [0, 1, 2, 3, 4]
    assert [p.name for p in image_paths(folder)][2:4] == ["9.PNG", "10.png"]


def test_a_grey_picture_becomes_bgr(tmp_path: Path) -> None:
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    cv2.imwrite(str(tmp_path / "grey.png"), grey)

    image = read_image(tmp_path / "grey.png")

    assert_array_equal(image, np.repeat(grey[..., None], 3, axis=2))


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")

    with pytest.raises(SourceError, match=r"expected a folder with pictures .* got none"):
        read_frames(tmp_path)


def test_a_single_picture_is_refused(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "img", ["1.png"])

    with pytest.raises(SourceError, match="got one picture; name its folder"):
        read_frames(folder / "1.png")


def test_an_unreadable_picture_is_named(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "img", ["1.png", "2.png", "3.png"])
    (folder / "2.png").write_bytes(b"no picture")
    source = read_frames(folder)
    next(source)

    with pytest.raises(SourceError, match=r"2\.png: expected a readable picture"):
        next(source)
    with pytest.raises(StopIteration):
        next(source)


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.png: .* no such file"):
        read_image(tmp_path / "none.png")


def test_frames_that_change_size_are_refused_with_number_and_sizes(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "img", ["1.png", "2.png", "3.png"])
    cv2.imwrite(str(folder / "3.png"), numbered_frame(0, width=48, height=32))
    source = read_frames(folder)
    next(source)
    next(source)

    with pytest.raises(FrameSizeError, match="96x64 pixels in frame 2 as in frame 0, got 48x32"):
        next(source)
    with pytest.raises(StopIteration):
        next(source)


def test_a_closed_source_ends_and_may_be_closed_again(tmp_path: Path) -> None:
    with read_frames(write_video(tmp_path / "clip.mp4", "mp4v", num_frames=5)) as source:
        next(source)

    source.close()

    assert list(source) == []


def test_a_sink_writes_what_the_decoder_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"

    with VideoSink(path, fps=25, size=(WIDTH, HEIGHT)) as sink:
        for index in range(10):
            sink.write(numbered_frame(index))
        assert not path.exists()
    sink.close()

    source = read_frames(path)
    assert (source.fps, source.num_frames, source.size) == (25.0, 10, (WIDTH, HEIGHT))
    assert [number_of(f) for f in source] == list(range(10))
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_what_was_written_before_an_exception_is_playable(
    tmp_path: Path, exception: type[BaseException]
) -> None:
    path = tmp_path / "out.mp4"

    with contextlib.suppress(exception), VideoSink(path, fps=30, size=(WIDTH, HEIGHT)) as sink:
        for index in range(4):
            sink.write(numbered_frame(index))
        raise exception

    assert len(list(read_frames(path))) == 4


def test_a_sink_without_frames_leaves_no_file(tmp_path: Path) -> None:
    with VideoSink(tmp_path / "out.mp4", fps=30, size=(WIDTH, HEIGHT)):
        pass

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((WIDTH, HEIGHT, 3), np.uint8),
        np.zeros((HEIGHT, WIDTH), np.uint8),
        np.zeros((HEIGHT, WIDTH, 3), np.float32),
    ],
)
def test_a_sink_refuses_frames_that_opencv_would_drop(tmp_path: Path, frame: np.ndarray) -> None:
    with (
        VideoSink(tmp_path / "out.mp4", fps=30, size=(WIDTH, HEIGHT)) as sink,
        pytest.raises(ValueError, match=r"expected frames \(64, 96, 3\) uint8, got"),
    ):
        sink.write(frame)


@pytest.mark.parametrize(
    ("name", "fps", "message"),
    [("out.avi", 30, r"ends in \.mp4"), ("out.mp4", 0, "fps"), ("out.mp4", float("nan"), "fps")],
)
def test_a_sink_refuses_bad_arguments(tmp_path: Path, name: str, fps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoSink(tmp_path / name, fps=fps, size=(WIDTH, HEIGHT))


def test_a_sink_without_a_name_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^path: expected a name that ends in \.mp4, got an empty"
    ):
        VideoSink("", fps=30, size=(WIDTH, HEIGHT))


def test_a_sink_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"out\.mp4: .* check that its folder exists"):
        VideoSink(tmp_path / "none" / "out.mp4", fps=30, size=(WIDTH, HEIGHT))


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"the old one")

    done = run_python(
        """
        import resource, sys
        import numpy as np
        from edgetrack.frames import VideoSink
        noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with VideoSink(sys.argv[1], fps=30, size=(96, 64)) as sink:
            for _ in range(30):
                sink.write(noise)
        """,
        str(path),
    )

    assert "SourceError: " in done.stderr
    assert "expected 30 frames on the disk" in done.stderr
    assert path.read_bytes() == b"the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("module", ["frames", "crops", "viz", "data.synthetic"])
def test_without_opencv_it_says_what_to_install(module: str) -> None:
    done = run_python(f"import sys; sys.modules['cv2'] = None; import edgetrack.{module}")

    assert "BackendUnavailableError: cv2: expected to import it" in done.stderr
    assert "pip install 'edgetrack[opencv]'" in done.stderr
    assert "--system-site-packages" in done.stderr
