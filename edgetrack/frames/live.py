"""Sources that do not wait: a thread reads them, and the newest frame is kept.

A camera gives its frames whether or not somebody takes them, and what piles up in a queue is
delay. So a thread of its own reads all of them, and a slot keeps the last one: a tracker that is
slower than its camera skips frames, and always sees the present.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgetrack.errors import SourceError

__all__ = ["Frame", "LiveReader", "Reader"]

Frame = npt.NDArray[np.uint8]

# Long enough for one more frame to arrive, after which the thread sees that it shall end.
_CLOSE_TIMEOUT_S = 1.0


class Reader(Protocol):
    """What the thread reads from; it is opened, read and closed by that thread alone."""

    fps: float | None
    num_frames: int | None

    def read(self) -> Frame | None:
        """The next frame, ``(H, W, 3)`` uint8 BGR; ``None`` at the end."""

    def close(self) -> None:
        """Release the source."""


class LiveReader:
    """Reads a source in a thread and hands out the newest frame.

    Opening happens in the thread too, since a camera's driver may hang there, and a wait in this
    class ends at its timeout, at ``close`` and at Ctrl-C. A source that declares how many frames
    it has, as a file behind a URL does, is not live: its thread waits, and nothing is dropped.

    Args:
        name: The source, for messages.
        openings: Ways to open it, tried in order until one gives a frame.
        hint: What to check when no frame comes.
        timeout_s: Longest wait for a frame.
        open_timeout_s: Longest wait for the first one.
    """

    def __init__(
        self,
        name: str,
        openings: Sequence[Callable[[], Reader]],
        *,
        hint: str,
        timeout_s: float,
        open_timeout_s: float,
    ) -> None:
        self._name = name
        self._hint = hint
        self._timeout_s = timeout_s
        self._open_timeout_s = max(timeout_s, open_timeout_s)
        self._slot = _Slot()
        self._thread = threading.Thread(
            target=_pump, args=(self._slot, openings), name=f"edgetrack {name}", daemon=True
        )
        # A source that nobody closed ends with its last reference, or before the interpreter
        # does: a thread that comes back from OpenCV after that would take the process down.
        self._finalizer = weakref.finalize(self, _stop, self._slot, self._thread)
        self._thread.start()

    @property
    def fps(self) -> float | None:
        """Frames per second as the source declares it; known once a frame has come."""
        return self._slot.fps

    @property
    def num_frames(self) -> int | None:
        """Frames as the source declares it; known once a frame has come, ``None`` if live."""
        return self._slot.num_frames

    @property
    def num_dropped(self) -> int:
        """Frames that were read and replaced before anybody took them."""
        return self._slot.num_dropped

    def peek(self) -> Frame | None:
        """Wait for the first frame and leave it where it is; as ``read`` otherwise."""
        return self._take(self._open_timeout_s, is_removed=False)

    def read(self) -> Frame | None:
        """The newest frame that was not yet taken, ``(H, W, 3)`` uint8 BGR; may wait for it.

        Returns:
            The frame, the caller's own; ``None`` at the end of the source and after ``close``.

        Raises:
            SourceError: No frame came in time, or the source failed.
        """
        return self._take(self._timeout_s, is_removed=True)

    def close(self) -> None:
        """End the thread and release the source; whoever waits in ``read`` returns.

        If the driver hangs, this returns after a second all the same, and the thread releases
        the source when the driver comes back.
        """
        self._finalizer()

    def _take(self, timeout_s: float, *, is_removed: bool) -> Frame | None:
        slot = self._slot
        with slot.changed:
            if not slot.changed.wait_for(lambda: slot.is_ready, timeout_s):
                raise SourceError(
                    f"{self._name}: expected a frame within {timeout_s:g} s, got none; {self._hint}"
                )
            if slot.is_closed:
                return None
            frame = slot.frame
            if frame is None and slot.failure is not None:
                raise slot.failure
            if is_removed:
                slot.frame = None
                slot.changed.notify_all()
            return frame


class _Slot:
    """What the two threads share, under one lock."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.frame: Frame | None = None
        self.num_dropped = 0
        self.fps: float | None = None
        self.num_frames: int | None = None
        self.is_ended = False
        self.is_closed = False
        self.failure: BaseException | None = None

    @property
    def is_ready(self) -> bool:
        return self.frame is not None or self.is_ended or self.is_closed

    def put(self, frame: Frame) -> bool:
        """Keep a frame in the place of the last one; ``False`` once nobody wants more."""
        with self.changed:
            if self.num_frames is not None:
                self.changed.wait_for(lambda: self.frame is None or self.is_closed)
            if self.is_closed:
                return False
            self.num_dropped += self.frame is not None
            self.frame = frame
            self.changed.notify_all()
            return True

    def end(self, failure: BaseException | None = None) -> None:
        with self.changed:
            self.is_ended = True
            self.failure = failure
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.is_closed = True
            self.frame = None
            self.changed.notify_all()


def _pump(slot: _Slot, openings: Sequence[Callable[[], Reader]]) -> None:
    """The thread: read until the end, a failure, or ``close``."""
    try:
        opened = _open_first(slot, openings)
        if opened is not None:
            reader, first = opened
            frame: Frame | None = first
            try:
                while frame is not None and slot.put(frame):
                    frame = reader.read()
            finally:
                reader.close()
    except BaseException as failure:  # whatever it is, the thread that waits shall raise it
        slot.end(failure)
    else:
        slot.end()


def _open_first(
    slot: _Slot, openings: Sequence[Callable[[], Reader]]
) -> "tuple[Reader, Frame] | None":
    """Open what gives a frame first; ``None`` if all are empty.

    Raises:
        SourceError: None gave a frame; from the last one that failed.
    """
    failure: SourceError | None = None
    for opening in openings:
        if slot.is_closed:
            break
        reader: Reader | None = None
        frame: Frame | None = None
        try:
            reader = opening()
            frame = reader.read()
        except SourceError as error:
            failure = error
        finally:
            if reader is not None and frame is None:
                reader.close()
        if reader is not None and frame is not None:
            slot.fps, slot.num_frames = reader.fps, reader.num_frames
            return reader, frame
    if failure is not None:
        raise failure
    return None


def _stop(slot: _Slot, thread: threading.Thread) -> None:
    slot.close()
    # The garbage collector may call this from the thread itself.
    if thread is not threading.current_thread():
        thread.join(_CLOSE_TIMEOUT_S)
