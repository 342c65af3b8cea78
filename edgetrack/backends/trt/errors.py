"""What TensorRT says when something fails, and what that means.

Its functions return ``None`` or ``False`` and say why to a logger or an error recorder, in words
that seldom tell what to do. One table, ``KNOWN_ERRORS``, holds the causes that can be read there.
"""

import collections
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from edgetrack.errors import (
    BackendUnavailableError,
    DeviceError,
    DeviceMemoryError,
    EdgeTrackError,
    EngineBuildError,
    EngineError,
    EngineMismatchError,
)

__all__ = ["KNOWN_ERRORS", "KnownError", "build_error", "make_log", "make_recorder", "run_error"]

_NUM_MESSAGES_KEPT = 16
_MAX_MESSAGE_CHARS = 600
# Without a driver TensorRT-RTX says this on every release of a resource, whatever else went wrong.
_CONSEQUENCE = re.compile(r"\(In catchCudaError at \S+?(\)$| \(cudaError 35:)")


@dataclass(frozen=True, kw_only=True)
class KnownError:
    """A cause that TensorRT's words give away.

    Attributes:
        words: A regular expression found in its messages.
        error: What to raise where an engine is loaded or run.
        hint: What to do; ``{build}`` is the command that builds the engines anew.
    """

    words: str
    error: type[EdgeTrackError]
    hint: str


# The first that is found counts, so the most telling come first: a damaged file, for one, also
# brings complaints about the driver where there is none.
KNOWN_ERRORS: tuple[KnownError, ...] = (
    KnownError(
        words=r"(?i)out[ _]?of[ _]?memory|could not be allocated|User allocator error|bad_alloc|"
        r"initialization failure with error:? 2\b|"
        r"MemoryError|Cannot allocate memory|requires \d+ bytes of GPU|INSUFFICIENT_GPU_MEMORY",
        error=DeviceMemoryError,
        hint="memory is short: close other programs (on a Jetson the desktop too), or take a "
        "smaller model",
    ),
    KnownError(
        words=r"Could not find any implementation",
        error=EngineBuildError,
        hint="TensorRT mostly says so where memory is short: close other programs (on a Jetson "
        "the desktop too), build again",
    ),
    KnownError(
        words=r"does not support this compute capability|Unsupported SM|"
        r"not supported by this TensorRT release",
        error=BackendUnavailableError,
        hint="this GPU is not among those that this TensorRT supports: install a version that "
        "does, or use another backend (see: edgetrack doctor)",
    ),
    KnownError(
        words=r"generated on an incompatible device|cannot run on this GPU|UNSUPPORTED_CC|"
        r"hardware-compatible engine|[Pp]latform specific tag mismatch",
        error=EngineMismatchError,
        hint="it was built for another GPU, run: {build}",
    ),
    KnownError(
        words=r"Version tag does not match|safeVersionRead|VERSION_MISMATCH|"
        r"not compatible with this version of TensorRT|created with TensorRT-RTX version|"
        r"old deserialization call on a newer plan",
        error=EngineMismatchError,
        hint="another TensorRT wrote it, run: {build}",
    ),
    KnownError(
        words=r"Serialization assertion|Magic tag does not match|MALFORMED_ENGINE|"
        r"empty memory buffer|No engine found|>= minBufferSize|header does not conform",
        error=EngineMismatchError,
        hint="the file is damaged, or not an engine, run: {build}",
    ),
    KnownError(
        words=r"not stream capturable|stream is capturing",
        error=EngineError,
        hint="it cannot be part of a CUDA graph: use exit_decision='host', or export the bundle "
        "again",
    ),
    KnownError(
        words=r"cudaError 35\b|error:? 35\b|driver version is insufficient|OLD_CUDA_DRIVER|"
        r"driver is installed and up to date|[Ll]oad CUDA driver|no CUDA-capable device",
        error=BackendUnavailableError,
        hint="there is no NVIDIA driver, or it is too old for this TensorRT: update the driver, "
        "and see: edgetrack doctor",
    ),
    KnownError(
        words=r"illegal memory access|unspecified launch failure|misaligned address|"
        r"device-side assert|launch timed out|illegal instruction",
        error=DeviceError,
        hint="this process cannot use the GPU any more, start it again",
    ),
    KnownError(
        words=r"CUDA initialization failure|OLD_CUDA_RUNTIME|\bCUDA_ERROR\b",
        error=BackendUnavailableError,
        hint="see what the driver says: edgetrack doctor",
    ),
)
_UNKNOWN_HINT = "use --backend onnxruntime, or report it with the output of: edgetrack doctor"


def run_error(
    where: object, *, expected: str, messages: Iterable[str], backend: str
) -> EdgeTrackError:
    """The error to raise where an engine could not be loaded or run.

    Args:
        where: What was at work, such as the engine's path.
        expected: What was wanted of TensorRT.
        messages: What TensorRT said.
        backend: Name of the backend, for the command that builds engines.
    """
    text, known, hint = _explain(messages, backend)
    kind = EngineError if known is None else known.error
    return kind(f"{where}: expected {expected}, got: {text}; {hint}")


def build_error(
    where: object, *, expected: str, messages: Iterable[str], backend: str
) -> EngineBuildError | BackendUnavailableError:
    """The error to raise where no engine came out: a build error, or that TensorRT cannot work."""
    text, known, hint = _explain(messages, backend)
    is_unavailable = known is not None and known.error is BackendUnavailableError
    kind = BackendUnavailableError if is_unavailable else EngineBuildError
    return kind(f"{where}: expected {expected}, got: {text}; {hint}")


def make_log(trt: Any) -> Any:
    """A logger that keeps what tells of failures, each message once, and the layer ``tables``."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the bindings are untyped
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.tables: list[str] = []
            self._errors: collections.deque[str] = collections.deque(maxlen=_NUM_MESSAGES_KEPT)
            self._warnings: collections.deque[str] = collections.deque(maxlen=_NUM_MESSAGES_KEPT)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.Logger.ERROR, trt.Logger.INTERNAL_ERROR):
                self.keep(message)
            elif severity == trt.Logger.WARNING and _known(message) is not None:
                # How much memory was asked for, and that there is no driver, are mere warnings.
                _add(self._warnings, message)
            elif message.startswith("Layers:"):
                self.tables.append(message)

        def keep(self, error: str) -> None:
            _add(self._errors, error)

        def take(self) -> list[str]:
            """What was said since it was last asked."""
            said = [*self._errors, *self._warnings]
            self._errors.clear()
            self._warnings.clear()
            return said

    return Log()


def make_recorder(trt: Any, log: Any) -> Any:
    """An error recorder that hands all errors to a log made by ``make_log``.

    An application may use TensorRT too, and TensorRT knows one logger per process; what happens to
    one engine surely reaches only its own recorder.
    """

    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]  # the bindings are untyped
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._errors: collections.deque[tuple[Any, str]] = collections.deque(
                maxlen=_NUM_MESSAGES_KEPT
            )

        def report_error(self, code: Any, description: str) -> bool:
            self._errors.append((code, description))
            log.keep(description)
            return True  # as NVIDIA's own recorders: what is reported ends the call

        def num_errors(self) -> int:
            return len(self._errors)

        def get_error_code(self, index: int) -> Any:
            return self._errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self._errors[index][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self._errors.clear()

    return Recorder()


def _explain(messages: Iterable[str], backend: str) -> tuple[str, KnownError | None, str]:
    """The messages as one line, without mere consequences; what they tell; what to do."""
    lines = [" ".join(message.split()) for message in messages]
    causes = [line for line in lines if not _CONSEQUENCE.search(line)]
    text = " | ".join(causes or lines) or "no reason given"
    known = _known(text)
    if known is None:
        return text, None, _UNKNOWN_HINT
    return text, known, known.hint.format(build=f"edgetrack build --backend {backend} --force")


def _known(text: str) -> KnownError | None:
    return next((known for known in KNOWN_ERRORS if re.search(known.words, text)), None)


def _add(messages: collections.deque[str], message: str) -> None:
    short = message[:_MAX_MESSAGE_CHARS]
    if short not in messages:
        messages.append(short)
