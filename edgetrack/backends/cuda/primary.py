"""A primary context as PyCUDA holds it: retained once for the process, shared, per-thread current.

PyCUDA has its own stack of contexts for each thread, ends the process where one is not empty at
the end, and frees an object only where its context is on top. So blocks are counted here, and the
stacks are emptied at exit and after a fork.
"""

import atexit
import ctypes
import functools
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Any, Protocol

from edgetrack.backends.cuda.driver import (
    CudaDevice,
    call_driver,
    describe_failure,
    load_driver,
    was_started_before_fork,
)
from edgetrack.backends.cuda.memory import Resource, keep_forever
from edgetrack.errors import DeviceError

__all__ = ["ContextEntry", "PrimaryContext", "Share", "share_primary"]


class Share(Protocol):
    """One user of a primary context, with what it made there.

    Attributes:
        open_resources: What it made and did not close yet.
    """

    open_resources: dict[Resource, bool]

    def refusal(self) -> DeviceError | None:
        """Why it cannot be entered; ``None`` if it can."""

    def close(self) -> None:
        """Free what it made and leave."""


class ContextEntry(AbstractContextManager[None]):
    """A primary context made current for a thread; one object serves all threads and depths."""

    def __init__(self, share: Share, primary: "PrimaryContext") -> None:
        self._share = share
        self._primary = primary

    def __enter__(self) -> None:
        if refusal := self._share.refusal():
            raise refusal
        self._primary.enter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _leave_context()
        if isinstance(error, self._primary.pycuda.Error):
            raise self._primary.translated(error) from error


class PrimaryContext:
    """A device's primary context, and who uses it: shares, and threads inside.

    Args:
        device: The device.
        pycuda: The module ``pycuda.driver``.

    Attributes:
        handle: The driver's ``CUcontext``.
        pid: The process that retained it.
        num_users: Shares, and threads inside; the last one out gives it back to the driver.
        shares: The shares among them.

    Raises:
        DeviceError: The driver refused it.
    """

    def __init__(self, device: CudaDevice, pycuda: Any) -> None:
        self.device = device
        self.pycuda = pycuda
        self.pid = os.getpid()
        self.num_users = 0
        self.shares: dict[Share, bool] = {}
        self._is_lost = False
        try:
            pycuda.init()
            self.pycuda_context = pycuda.Device(device.ordinal).retain_primary_context()
        except pycuda.Error as error:
            raise self.translated(error) from error
        self.handle = int(self.pycuda_context.handle)

    def enter(self) -> None:
        """Make it current for this thread, until ``_leave_context``."""
        entered = _thread.entered
        if not entered or entered[-1] is not self:
            self._push()
        entered.append(self)

    def leave(self) -> None:
        """Count one user less; the last gives the context back to the driver."""
        with _lock:
            self.num_users -= 1
            if self.num_users:
                return
            if _primaries.get(self.device.ordinal) is self:
                del _primaries[self.device.ordinal]
        if not self._is_lost:
            self._give_back()

    def translated(self, error: BaseException) -> DeviceError:
        """The error to raise for one of PyCUDA's: ``<call> failed: <description> - <detail>``."""
        call, _, said = str(error).partition(" failed: ")
        description, _, detail = said.partition(" - ")
        return describe_failure(call, description, detail=detail.strip("\0\n "))

    def pop(self) -> None:
        """Make current for this thread what was before it."""
        try:
            _insist(self.pycuda_context.pop, self.pycuda.Error)
        except self.pycuda.Error as error:
            self.abandon()
            raise self.translated(error) from error
        finally:
            self.leave()

    def abandon(self) -> None:
        """Give it up: take it off PyCUDA's stack of this thread, whatever the driver says."""
        self._is_lost = True
        try:
            self.pycuda_context.detach()
        except self.pycuda.Error:
            keep_forever(self.pycuda_context)

    def _push(self) -> None:
        with _lock:
            if self._is_lost or not self.num_users:
                raise DeviceError(
                    "CUDA context: expected it in working order, got one that was lost; restart "
                    "the process"
                )
            self.num_users += 1
        try:
            self.pycuda_context.push()
        except self.pycuda.Error as error:
            self.leave()
            raise self.translated(error) from error

    def _give_back(self) -> None:
        driver, device, handle = load_driver(), ctypes.c_int(), ctypes.c_void_p()
        # detach() leaves what it releases on the driver's stack: keep it alive until it is off.
        is_kept = not (
            driver.cuDeviceGet(ctypes.byref(device), self.device.ordinal)
            or driver.cuDevicePrimaryCtxRetain(ctypes.byref(handle), device)
        )
        try:
            _insist(self.pycuda_context.push, self.pycuda.Error)
            self.pycuda_context.detach()
            _take_off_stack(self.handle)
        except self.pycuda.Error as error:
            raise self.translated(error) from error
        finally:
            if is_kept:
                call_driver("cuDevicePrimaryCtxRelease_v2", device)


class _Thread(threading.local):
    """What a thread has entered, innermost last."""

    def __init__(self) -> None:
        self.entered: list[PrimaryContext] = []


_thread = _Thread()
_lock = threading.RLock()
_primaries: dict[int, PrimaryContext] = {}


def share_primary(ordinal: int, retain: Callable[[int], PrimaryContext]) -> PrimaryContext:
    """The primary context of a device with one user more, retained if it is the first.

    Args:
        ordinal: Number of the device.
        retain: Makes it.
    """
    with _lock:
        if ordinal not in _primaries or was_started_before_fork():
            _primaries[ordinal] = retain(ordinal)
        primary = _primaries[ordinal]
        primary.num_users += 1
        return primary


def _leave_context() -> None:
    """Undo the last ``enter`` of this thread."""
    entered = _thread.entered
    if not entered:  # emptied at exit, or after a fork
        return
    primary = entered.pop()
    if not entered or entered[-1] is not primary:
        primary.pop()


def _take_off_stack(handle: int) -> None:
    """Take a context off the driver's stack; the application's may lie on top of it."""
    popped = ctypes.c_void_p()
    pop = functools.partial(call_driver, "cuCtxPopCurrent_v2")
    _insist(lambda: pop(ctypes.byref(popped)), DeviceError)
    if popped.value != handle:
        _insist(lambda: pop(ctypes.byref(ctypes.c_void_p())), DeviceError)
        call_driver("cuCtxPushCurrent_v2", popped)


def _insist(call: Callable[[], object], failure: type[Exception]) -> None:
    """Try twice what nobody can do later: a call may only report that earlier work failed."""
    try:
        call()
    except failure:
        call()


def _close_all() -> None:
    """Leave and close everything, since PyCUDA ends the process over what is left at exit."""
    while _thread.entered:
        _leave_context()
    for primary in list(_primaries.values()):
        # Others, such as TensorRT, may still end in it: the driver takes it back with the process.
        primary.num_users += 1
        keep_forever(primary.pycuda_context)
        for share in list(primary.shares):
            with suppress(DeviceError):
                share.close()


def _forget_all() -> None:
    """Let a forked child end in peace: nothing of the parent's is freed there."""
    global _lock
    _lock = threading.RLock()  # another thread may have held it
    for primary in _primaries.values():
        keep_forever(primary.pycuda_context)
        for share in primary.shares:
            for resource in share.open_resources:
                keep_forever(resource.held)
    for primary in reversed(dict.fromkeys(_thread.entered)):
        primary.abandon()
    _thread.entered = []
    _primaries.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
