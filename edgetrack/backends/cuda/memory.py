"""What lives in a CUDA context until it is closed, and the memory among it.

``CudaContext`` makes such resources. Each belongs to whoever asked for it, until ``close``;
closing the context closes what is left. Every call makes the context current for its thread by
itself; several in a row are cheaper inside ``with context.current():``.
"""

import ctypes
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgetrack.errors import DeviceError

__all__ = ["DeviceMemory", "MappedMemory", "Resource", "Scope", "keep_forever"]


class Scope(Protocol):
    """What a resource needs of its context.

    Attributes:
        open_resources: What was made and not closed yet, oldest first.
    """

    open_resources: "dict[Resource, bool]"

    @property
    def was_forked(self) -> bool:
        """Whether the process was forked since, so that the driver must not be called."""

    def current(self) -> AbstractContextManager[None]:
        """Make the context current for this thread."""


class Resource:
    """What lives in a context until it is closed.

    Args:
        scope: Its context.
        held: What PyCUDA or the driver gave; dropping the last reference frees it.
        what: Its name in messages.
    """

    def __init__(self, scope: Scope, held: Any, *, what: str) -> None:
        self._scope = scope
        self._held = held
        self._what = what
        scope.open_resources[self] = True

    @property
    def held(self) -> Any:
        """What PyCUDA or the driver gave.

        Raises:
            DeviceError: It was closed.
        """
        if self._held is None:
            raise DeviceError(
                f"{self._what}: expected it open, got it closed; close it after its last use, and "
                "the context after everything in it"
            )
        return self._held

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, by itself or with its context."""
        return self._held is None

    def close(self) -> None:
        """Free it; calling it twice is fine."""
        if not self._scope.open_resources.pop(self, False):  # atomic: of two threads, one goes on
            return
        held, self._held = self._held, None
        try:
            # PyCUDA frees in the context that is current: elsewhere it warns and leaks.
            with self._scope.current():
                self._free(held)
                held = None
        except DeviceError:
            keep_forever(held)
            if not self._scope.was_forked:
                raise

    def abandon(self) -> None:
        """Leave it to the end of the process: the driver refuses to free it."""
        if self._scope.open_resources.pop(self, False):
            held, self._held = self._held, None
            keep_forever(held)

    def _free(self, held: Any) -> None:
        """Free what is freed by a call; the rest goes with its last reference."""


class DeviceMemory(Resource):
    """Memory of the device, not initialised.

    Attributes:
        num_bytes: Its size.
    """

    def __init__(self, scope: Scope, held: Any, *, num_bytes: int, what: str) -> None:
        super().__init__(scope, held, what=what)
        self.num_bytes = num_bytes
        self._address = int(held)

    @property
    def address(self) -> int:
        """Its device address, aligned to 256 bytes."""
        _ = self.held
        return self._address

    def _free(self, held: Any) -> None:
        held.free()


class MappedMemory(Resource):
    """Pinned host memory that the device reads and writes in place; zero at first.

    Attributes:
        num_bytes: Its size.
    """

    def __init__(self, scope: Scope, held: npt.NDArray[np.uint8], *, what: str) -> None:
        base: Any = held.base
        self._address = int(base.get_device_pointer())
        super().__init__(scope, held, what=what)
        held[:] = 0
        self.num_bytes = held.nbytes

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """Its bytes, ``(num_bytes,)``; no view of them may be used after ``close``."""
        array: npt.NDArray[np.uint8] = self.held
        return array

    @property
    def address(self) -> int:
        """Its address on the device, which may differ from the host's."""
        _ = self.held
        return self._address

    def _free(self, held: Any) -> None:
        held.base.free()


def keep_forever(held: Any) -> None:
    """Never free an object of PyCUDA: where the driver refuses, its destructor ends the process."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
