"""What tests ask of the emulated driver beyond the driver's own calls."""

import ctypes
from collections.abc import Callable
from typing import Any

_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class EmulatedDriver:
    """The emulator's extra entry points; the driver's own are ``library``'s."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.emulator_log.restype = ctypes.c_char_p
        self.library.emulator_live_bytes.restype = ctypes.c_ulonglong
        self._callbacks: list[Any] = []

    def calls(self) -> list[str]:
        """Names of the driver calls since the last ``clear_calls``, in order."""
        return self.library.emulator_log().decode().split()

    def clear_calls(self) -> None:
        """Forget the calls so far."""
        self.library.emulator_log_clear()

    def reset(self) -> None:
        """Forget the log, the failures asked for, the latency and all that ``configure`` set."""
        self.library.emulator_reset()

    def configure(self, **settings: int) -> None:
        """Overrule settings: ``version``, ``arch``, ``integrated``, ``memory_bytes``, ``devices``.

        ``latency_us`` is how long a stream waits before each piece of work: a host that forgets to
        wait then reads old values for certain.
        """
        for name, value in settings.items():
            wrong = self.library.emulator_configure(name.encode(), ctypes.c_longlong(value))
            assert not wrong, f"no such setting: {name}"

    def fail(self, call: str, code: int, *, nth: int = 1) -> None:
        """Let the ``nth`` call of this name from here on return ``code``, and do nothing."""
        self.library.emulator_fail(call.encode(), nth, code)

    def enqueue(self, stream: int, function: Callable[[], object]) -> None:
        """Queue or capture host code on a stream as if it were a kernel."""

        def run(_: int | None) -> None:
            function()

        callback = _Function(run)
        self._callbacks.append(callback)  # a graph may call it at any later time
        code = self.library.emulator_enqueue(ctypes.c_void_p(stream), callback, None)
        assert code == 0, f"emulator_enqueue: {code}"

    @property
    def live_bytes(self) -> int:
        """Device and pinned host memory that is not freed yet."""
        return int(self.library.emulator_live_bytes())

    def live_handles(self, kind: str = "") -> int:
        """Handles not given back: context, event, exec, graph, module, stream; or all of them."""
        return int(self.library.emulator_live_handles(kind.encode()))

    @property
    def num_launches(self) -> int:
        """Kernels executed since the process began."""
        return int(self.library.emulator_num_launches())
