"""Streams, events and kernels of a CUDA context; ``CudaContext`` makes them."""

import struct
from ctypes import byref, c_float, c_void_p
from typing import Any

import numpy as np

from edgetrack.backends.cuda.driver import call_driver, driver_error, load_driver
from edgetrack.backends.cuda.memory import Resource, Scope
from edgetrack.errors import DeviceError

__all__ = ["Event", "Function", "Module", "Stream"]

_ERROR_NOT_READY = 600
_EVENT_DISABLE_TIMING = 2


class Stream(Resource):
    """A queue of device work that does not wait for the default stream."""

    def __init__(self, scope: Scope, held: Any) -> None:
        super().__init__(scope, held, what="stream")
        self._handle = int(held.handle)
        self._mark: Event | None = None

    @property
    def handle(self) -> int:
        """The driver's ``CUstream``."""
        _ = self.held
        return self._handle

    @property
    def is_done(self) -> bool:
        """Whether all its work is done; not to be asked while it captures."""
        with self._scope.current():
            return bool(self.held.is_done())

    def synchronize(self) -> None:
        """Wait until all its work is done.

        Raises:
            DeviceError: The work failed, or the stream captures.
        """
        with self._scope.current():
            self.held.synchronize()

    def wait(self, event: "Event") -> None:
        """Let what comes next wait for an event, on the device."""
        with self._scope.current():
            call_driver("cuStreamWaitEvent", c_void_p(self.handle), c_void_p(event.handle), 0)

    def wait_for(self, handle: int) -> None:
        """Let what comes next wait for all that another stream has so far, given its ``CUstream``.

        The handles 1 and 2 are the default streams, legacy and per thread.
        """
        with self._scope.current():
            if self._mark is None:
                self._mark = Event(self._scope, with_timing=False)
            self._mark.record_on(handle)
            self.wait(self._mark)

    def _free(self, held: Any) -> None:
        if self._mark is not None:
            self._mark.close()


class Event(Resource):
    """A point in a stream's work, to wait for or to measure time by.

    It is the driver's own: PyCUDA hides the handle of its events, so they cannot be recorded on a
    stream that it did not make.
    """

    def __init__(self, scope: Scope, *, with_timing: bool) -> None:
        handle = c_void_p()
        flags = 0 if with_timing else _EVENT_DISABLE_TIMING
        call_driver("cuEventCreate", byref(handle), flags)
        super().__init__(scope, handle.value, what="event")
        self._with_timing = with_timing

    @property
    def handle(self) -> int:
        """The driver's ``CUevent``."""
        handle: int = self.held
        return handle

    def record(self, stream: Stream) -> None:
        """Mark the work that the stream has so far."""
        self.record_on(stream.handle)

    def record_on(self, handle: int) -> None:
        """Mark the work that a stream has so far, given its ``CUstream``."""
        with self._scope.current():
            call_driver("cuEventRecord", c_void_p(self.handle), c_void_p(handle))

    def synchronize(self) -> None:
        """Wait until the marked work is done; at once where nothing was marked.

        Raises:
            DeviceError: The work failed.
        """
        with self._scope.current():
            call_driver("cuEventSynchronize", c_void_p(self.handle))

    @property
    def is_done(self) -> bool:
        """Whether the marked work is done; true where nothing was marked."""
        with self._scope.current():
            code = load_driver().cuEventQuery(c_void_p(self.handle))
        if code not in (0, _ERROR_NOT_READY):
            raise driver_error("cuEventQuery", code)
        return bool(code == 0)

    def elapsed_ms(self, since: "Event") -> float:
        """Milliseconds on the device between two events that are done.

        Raises:
            ValueError: One of them was made without timing.
            DeviceError: One is not recorded or not done.
        """
        if not (self._with_timing and since._with_timing):
            raise ValueError(
                "event: expected two with timing, got one without; make it with with_timing=True"
            )
        elapsed_ms = c_float()
        with self._scope.current():
            # The first form of the call: the second came with CUDA 12.8.
            first, last = c_void_p(since.handle), c_void_p(self.handle)
            call_driver("cuEventElapsedTime", byref(elapsed_ms), first, last)
        return elapsed_ms.value

    def _free(self, held: Any) -> None:
        call_driver("cuEventDestroy_v2", c_void_p(held))


class Module(Resource):
    """Kernels that were loaded onto the device."""

    def __init__(self, scope: Scope, held: Any) -> None:
        super().__init__(scope, held, what="module of kernels")
        self._functions: list[Function] = []

    def function(self, name: str) -> "Function":
        """One of its kernels, valid until the module is closed.

        Raises:
            DeviceError: It has no such kernel.
        """
        with self._scope.current():
            function = Function(self._scope, self.held.get_function(name), name=name)
        self._functions.append(function)
        return function

    def _free(self, held: Any) -> None:
        # PyCUDA unloads a module after the last of its functions.
        for function in self._functions:
            function.drop()


class Function:
    """A kernel of a module.

    Attributes:
        name: Its name in the module.
    """

    def __init__(self, scope: Scope, kernel: Any, *, name: str) -> None:
        self.name = name
        self._scope = scope
        self._kernel = kernel
        self._types: tuple[type, ...] | None = None
        self._layout = struct.Struct("")

    def launch(
        self,
        stream: Stream,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        *args: "np.number[Any]",
    ) -> None:
        """Put the kernel into a stream, which may be capturing.

        Args:
            stream: A stream of the same context.
            grid: Blocks in x, y, z.
            block: Threads of a block in x, y, z.
            *args: NumPy scalars, whose types must be the kernel's own: ``np.uint64`` for an
                address, ``np.int32``, ``np.float32`` …

        Raises:
            TypeError: An argument is not a NumPy scalar, or of another type than at the first
                launch.
            DeviceError: The driver refused it, or the module was closed.
        """
        types = tuple(map(type, args))
        if types != self._types:
            self._prepare(types)
        if self._kernel is None:
            raise DeviceError(
                f"{self.name}: expected its module open, got it closed; close it after its last use"
            )
        packed = self._layout.pack(*args)
        with self._scope.current():
            # PyCUDA's public forms call cuFuncSetBlockShape before: deprecated, and one call more.
            self._kernel._launch_kernel(grid, block, packed, 0, stream.held)

    def drop(self) -> None:
        """Let go of the kernel, with its module."""
        self._kernel = None

    def _prepare(self, types: tuple[type, ...]) -> None:
        for number, kind in enumerate(types):
            if not issubclass(kind, np.number):
                raise TypeError(
                    f"{self.name}, argument {number}: expected a NumPy scalar, got {kind.__name__};"
                    " write np.uint64(address), np.int32(count) …"
                )
        if self._types is not None:
            expected, got = (", ".join(t.__name__ for t in ts) for ts in (self._types, types))
            raise TypeError(
                f"{self.name}: expected arguments of the types of its first launch, ({expected}), "
                f"got ({got}); a kernel has one signature"
            )
        # Kernels take their arguments at C's offsets, as struct's native mode lays them out.
        self._layout = struct.Struct("@" + "".join(np.dtype(t).char for t in types))
        self._types = types
