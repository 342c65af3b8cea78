"""Backends: what compiles the graphs of a bundle, and what runs them."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgetrack.errors import BackendUnavailableError

if TYPE_CHECKING:
    from edgetrack.backends.engine import Backend

__all__ = [
    "BACKEND_NAMES",
    "BackendInfo",
    "get_backend",
    "import_package",
    "installed_version",
    "list_backends",
]


@dataclass(frozen=True, kw_only=True)
class BackendInfo:
    """Whether a backend is there, found out without importing it.

    Attributes:
        name: Its name on the command line.
        is_installed: Its package can be found.
        version: Version of its package, if known.
        install: How to get it.
    """

    name: str
    is_installed: bool
    version: str | None
    install: str


@dataclass(frozen=True)
class _Package:
    module: str
    distributions: tuple[str, ...]
    install: str


_PACKAGES: Mapping[str, _Package] = {
    "onnxruntime": _Package(
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
        "run: pip install onnxruntime",
    ),
    "eager": _Package("torch", ("torch",), 'run: pip install "edgetrack[train]"'),
    "torch-cuda": _Package(
        "torch", ("torch",), "install a CUDA build of torch 2.8 or newer (see pytorch.org)"
    ),
    "tensorrt": _Package(
        "tensorrt",
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        "on Jetson run: sudo apt install nvidia-jetpack; elsewhere: pip install tensorrt",
    ),
    "tensorrt-rtx": _Package(
        "tensorrt_rtx",
        ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
        'run: pip install "edgetrack[tensorrt-rtx]"',
    ),
}
BACKEND_NAMES = ("auto", *_PACKAGES)


def get_backend(name: str, *, num_threads: int | None = None, device: int = 0) -> "Backend":
    """Make a backend by its name.

    Args:
        name: One of ``BACKEND_NAMES``; ``auto`` is the best that can build and run here.
        num_threads: CPU threads per graph (``onnxruntime`` only); ``None`` lets it choose.
        device: Number of the CUDA device, for backends that use one.

    Raises:
        BackendUnavailableError: There is no such backend, or its package is not installed.
    """
    chosen = _best(device) if name == "auto" else name
    package = _PACKAGES.get(chosen)
    if package is None:
        raise BackendUnavailableError(
            f"backend: expected one of {', '.join(BACKEND_NAMES)}, got {name!r}"
        )
    if importlib.util.find_spec(package.module) is None:
        raise BackendUnavailableError(_missing(chosen, "none"))
    if chosen == "onnxruntime":
        from edgetrack.backends.ort import OnnxRuntimeBackend

        return OnnxRuntimeBackend(num_threads)
    if chosen == "eager":
        from edgetrack.backends.eager import EagerBackend

        return EagerBackend()
    if chosen == "torch-cuda":
        from edgetrack.backends.eager import TorchCudaBackend

        return TorchCudaBackend(device)
    from edgetrack.backends.trt import TensorRTBackend

    return TensorRTBackend("tensorrt" if chosen == "tensorrt" else "tensorrt-rtx", device=device)


def _best(device: int) -> str:
    """TensorRT where all of it is there, else ONNX Runtime, which runs everywhere."""
    from edgetrack.backends.cuda import find_cuda_device

    packages = ("tensorrt", "pycuda")
    has_packages = all(importlib.util.find_spec(package) is not None for package in packages)
    return "tensorrt" if has_packages and find_cuda_device(device) is not None else "onnxruntime"


def list_backends() -> tuple[BackendInfo, ...]:
    """All backends, installed or not."""
    return tuple(
        BackendInfo(
            name=name,
            is_installed=importlib.util.find_spec(package.module) is not None,
            version=installed_version(name),
            install=package.install,
        )
        for name, package in _PACKAGES.items()
    )


def installed_version(backend: str) -> str | None:
    """Version of a backend's package, read without importing it; ``None`` if unknown."""
    for distribution in _PACKAGES[backend].distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def import_package(backend: str) -> Any:
    """Import a backend's package.

    Raises:
        BackendUnavailableError: It is not installed, or a library that it needs is missing.
        KeyboardInterrupt: Ctrl-C came in the middle, also where the package hides it.
    """
    try:
        # First: where Ctrl-C comes in NumPy's import, ONNX Runtime prints it and calls it missing.
        importlib.import_module("numpy")
        return importlib.import_module(_PACKAGES[backend].module)
    except (ImportError, OSError) as error:
        if _was_interrupted(error):
            raise KeyboardInterrupt from error
        raise BackendUnavailableError(_missing(backend, str(error))) from error


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is what led to an error: compiled packages turn it into an ``ImportError``."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _missing(backend: str, got: str) -> str:
    package = _PACKAGES[backend]
    return (
        f"backend {backend!r}: expected the package {package.module}, got {got}; {package.install}"
    )
