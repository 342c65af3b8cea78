"""Live sources, over real streams on the loopback; sleeps stand for a slow tracker."""

import gc
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from loopback import (
    HEIGHT,
    WIDTH,
    file_server,
    mjpeg_server,
    number_of,
    rtsp_server,
    write_numbered,
)

from edgetrack.errors import SourceEndedError, SourceError
from edgetrack.frames import FrameSource, read_frames
from edgetrack.frames.capture import Origin, VideoReader
from edgetrack.frames.live import LiveReader

ROOT = Path(__file__).parents[2]


class PacedVideo:
    """A video file that gives its frames at a camera's pace, and does not say how many."""

    num_frames: int | None = None

    def __init__(
        self,
        path: Path,
        *,
        fps: float = 100,
        is_camera: bool = False,
        wait: Callable[[], object] | None = None,
    ) -> None:
        self._wait = wait or (lambda: time.sleep(1 / fps))
        origin = Origin(name="paced", hint="", timeout_s=5, is_camera=is_camera)
        self._reader = VideoReader(str(path), origin=origin)
        self.fps: float | None = fps
        self.num_read = 0
        self.is_closed = False

    def read(self) -> np.ndarray | None:
        self._wait()
        frame = self._reader.read()
        self.num_read += frame is not None
        return frame

    def close(self) -> None:
        self._reader.close()
        self.is_closed = True


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_numbered(tmp_path / "clip.avi", "MJPG", num_frames=60)


def live(*openings: Callable[[], PacedVideo], timeout_s: float = 5) -> LiveReader:
    return LiveReader(
        "paced", openings, hint="check it", timeout_s=timeout_s, open_timeout_s=timeout_s
    )


def frames_of(reader: LiveReader) -> Iterator[np.ndarray]:
    while (frame := reader.read()) is not None:
        yield frame


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("edgetrack ")]


def assert_no_thread_is_left(*, within_s: float = 2) -> None:
    deadline = time.monotonic() + within_s
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == []


def test_a_slow_reader_gets_the_newest_frame_and_the_count_of_those_it_missed(clip: Path) -> None:
    video = PacedVideo(clip)
    reader = live(lambda: video)
    seen = []
    while True:
        time.sleep(0.06)
        num_read = video.num_read
        frame = reader.read()
        if frame is None:
            break
        # The last one of those that were read may be on its way into the slot.
        assert number_of(frame) >= num_read - 2
        seen.append(number_of(frame))

    assert seen == sorted(set(seen))
    assert len(seen) < 45
    assert seen[-1] == 59
    assert reader.num_dropped == 60 - len(seen)
    assert (reader.fps, reader.num_frames) == (100, None)
    assert_no_thread_is_left()
    assert video.is_closed


def test_a_fast_reader_waits_and_misses_nothing(clip: Path) -> None:
    may_read = threading.Semaphore(1)
    reader = live(lambda: PacedVideo(clip, wait=may_read.acquire))

    numbers = []
    for frame in frames_of(reader):
        numbers.append(number_of(frame))
        may_read.release()

    assert numbers == list(range(60))
    assert reader.num_dropped == 0


def test_a_frame_that_was_peeked_at_is_still_there(clip: Path) -> None:
    reader = live(lambda: PacedVideo(clip, fps=5))

    first = reader.peek()

    assert first is not None
    assert reader.read() is first
    reader.close()


def test_a_frame_is_the_callers_own(clip: Path) -> None:
    reader = live(lambda: PacedVideo(clip))
    first = reader.read()
    assert first is not None
    copy = first.copy()

    for _ in range(5):
        reader.read()

    assert np.array_equal(first, copy)
    reader.close()


def test_a_camera_that_is_unplugged_gives_its_last_frame_and_then_says_so(clip: Path) -> None:
    reader = live(lambda: PacedVideo(clip, is_camera=True))

    numbers: list[int] = []
    with pytest.raises(SourceEndedError, match=r"expected another frame after 60, got none; check"):
        numbers.extend(number_of(frame) for frame in frames_of(reader))

    assert numbers[-1] == 59


def test_the_first_way_that_gives_a_frame_is_taken(clip: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.avi"
    content = clip.read_bytes()
    empty.write_bytes(content[: content.find(b"movi") + 4])

    reader = live(
        lambda: PacedVideo(tmp_path / "none.avi"),
        lambda: PacedVideo(empty),
        lambda: PacedVideo(clip),
    )

    frame = reader.read()
    assert frame is not None
    assert number_of(frame) == 0
    reader.close()


def test_when_no_way_opens_the_last_one_says_why(tmp_path: Path) -> None:
    reader = live(lambda: PacedVideo(tmp_path / "a.avi"), lambda: PacedVideo(tmp_path / "b.avi"))

    with pytest.raises(SourceError, match="paced: expected to open it, got a refusal"):
        reader.read()
    assert_no_thread_is_left()


def test_any_failure_of_the_thread_reaches_the_reader(clip: Path) -> None:
    def fail() -> PacedVideo:
        raise ZeroDivisionError("by the driver")

    with pytest.raises(ZeroDivisionError, match="by the driver"):
        live(fail, lambda: PacedVideo(clip)).read()


def test_an_opening_that_hangs_ends_at_its_timeout_and_is_released_later(clip: Path) -> None:
    goes_on = threading.Event()
    video = PacedVideo(clip)

    def hang() -> PacedVideo:
        goes_on.wait()
        return video

    reader = live(hang, timeout_s=0.2)
    with pytest.raises(SourceError, match=r"paced: expected a frame within 0\.2 s, got none; chec"):
        reader.peek()
    start = time.monotonic()
    reader.close()

    assert time.monotonic() - start < 1.5
    goes_on.set()
    assert_no_thread_is_left()
    assert video.is_closed


def test_what_fails_after_close_is_not_raised() -> None:
    goes_on = threading.Event()

    def fail_late() -> PacedVideo:
        goes_on.wait()
        raise SourceError("the driver came back")

    reader = live(fail_late)
    reader.close()
    goes_on.set()
    assert_no_thread_is_left()

    assert reader.read() is None


def test_close_wakes_who_waits(clip: Path) -> None:
    reader = live(lambda: PacedVideo(clip, fps=2), timeout_s=30)
    ends: list[tuple[object, float]] = []
    reader.read()
    waiting = threading.Thread(target=lambda: ends.append((reader.read(), time.monotonic())))
    waiting.start()
    time.sleep(0.1)

    start = time.monotonic()
    reader.close()
    waiting.join(5)

    assert ends[0][0] is None
    assert ends[0][1] - start < 0.4
    reader.close()
    assert_no_thread_is_left()


def test_a_source_that_nobody_closed_ends_with_its_last_reference(clip: Path) -> None:
    reader = live(lambda: PacedVideo(clip, fps=20))
    reader.read()
    assert threads() != []

    del reader
    gc.collect()

    assert_no_thread_is_left()


def test_a_network_camera_gives_the_newest_frame() -> None:
    seen = []
    with mjpeg_server(num_frames=90) as server, read_frames(server.url) as source:
        for frame in source:
            time.sleep(0.1)
            seen.append((number_of(frame), server.num_sent))

    numbers = [n for n, _ in seen]
    assert source.is_live
    assert source.num_frames is None
    assert source.size == (WIDTH, HEIGHT)
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 89
    assert len(numbers) + source.num_dropped == 90
    assert source.num_dropped > 40


def test_frames_before_the_first_request_are_dropped() -> None:
    with mjpeg_server(num_frames=200) as server, read_frames(server.url) as source:
        time.sleep(0.5)  # as long as a tracker's engines take to load, or longer

        assert number_of(next(source)) > 5


def test_an_rtsp_stream_is_read(tmp_path: Path) -> None:
    with rtsp_server(tmp_path, num_frames=60) as server, read_frames(server.url) as source:
        numbers = []
        for frame in source:
            numbers.append(number_of(frame))
            time.sleep(0.05)

    assert source.is_live
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 59
    assert source.num_dropped > 10


def test_a_file_behind_a_url_is_no_live_source(clip: Path) -> None:
    with file_server(clip) as server, read_frames(server.url) as source:
        numbers = []
        for frame in source:
            time.sleep(0.01)
            numbers.append(number_of(frame))

    assert numbers == list(range(60))
    assert (source.is_live, source.num_frames, source.num_dropped) == (False, 60, 0)


def test_files_are_read_without_a_thread(clip: Path) -> None:
    with read_frames(clip) as source:
        next(source)

        assert threads() == []
        assert (source.is_live, source.num_dropped) == (False, 0)


def test_a_stream_that_falls_silent_says_what_to_check_and_ends() -> None:
    with mjpeg_server(num_frames=5, is_silent_after=True) as server:
        source = read_frames(server.url, timeout_s=0.4)
        times: list[float] = []

        with pytest.raises(SourceError, match=r"expected a frame within 0\.4 s, got none; check t"):
            times.extend(time.monotonic() for _ in source)

        assert 0.3 < time.monotonic() - times[-1] < 2
        assert list(source) == []
        # OpenCV's own timeout lets the thread go while the server still keeps the connection.
        assert_no_thread_is_left(within_s=4)


def test_closing_a_silent_source_returns_and_ends_the_iteration() -> None:
    with mjpeg_server(num_frames=5, is_silent_after=True) as server:
        source = read_frames(server.url, timeout_s=30)
        rest: list[int] = []
        waiting = threading.Thread(target=lambda: rest.extend(map(number_of, source)))
        waiting.start()
        time.sleep(0.3)

        start = time.monotonic()
        source.close()
        waiting.join(5)

        assert not waiting.is_alive()
        assert time.monotonic() - start < 1.5
    assert_no_thread_is_left()


def test_a_password_is_not_shown() -> None:
    with pytest.raises(SourceError, match=r"rtsp://admin:\*\*\*@127") as caught:
        read_frames("rtsp://admin:secret@127.0.0.1:9/stream")

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(timeout_s: float, clip: Path) -> None:
    with pytest.raises(ValueError, match="timeout_s: expected a positive number"):
        read_frames(clip, timeout_s=timeout_s)


def start_python(code: str, url: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(code), url]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_ctrl_c_while_a_source_is_silent_ends_the_process() -> None:
    code = """
        import sys
        from edgetrack.frames import read_frames
        with read_frames(sys.argv[1], timeout_s=60) as source:
            for frame in source:
                print("frame", flush=True)
        """
    with mjpeg_server(num_frames=3, is_silent_after=True) as server:
        process = start_python(code, server.url)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)

        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)

    assert time.monotonic() - start < 4
    assert process.returncode == -signal.SIGINT
    assert errors.strip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_process_that_forgot_its_source_ends_cleanly(is_silent: bool) -> None:
    code = """
        import sys
        from edgetrack.frames import read_frames
        source = read_frames(sys.argv[1])
        next(source)
        """
    with mjpeg_server(num_frames=10 if is_silent else 10_000, is_silent_after=True) as server:
        _, errors = (process := start_python(code, server.url)).communicate(timeout=20)

    assert (process.returncode, errors) == (0, "")


def test_it_is_open_until_it_ends() -> None:
    with mjpeg_server(num_frames=20) as server:
        source: FrameSource = read_frames(server.url)
        assert len(list(source)) > 0
        with pytest.raises(StopIteration):
            next(source)
    assert_no_thread_is_left()
