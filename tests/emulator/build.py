"""Builds the emulated CUDA driver, and PyCUDA against it, once per version of their sources."""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).parent
ROOT = SOURCES.parents[1]
CACHE = ROOT / "build" / "emulator"
FRAME_CU = ROOT / "edgetrack" / "runtime" / "kernels" / "frame.cu"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra")
KERNEL_FLAGS = ("-O2", "-ffp-contract=off")  # kernels are compiled with --fmad=false
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
PYCUDA = "pycuda==2026.1"
HEADER_WHEELS = ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-profiler-api==13.0.85")
# What PyCUDA's configure.py would write.
SITECONF = "CUDA_INC_DIR = [{include!r}]\nCUDADRV_LIB_DIR = [{lib!r}]\nCUDA_ENABLE_CURAND = False\n"


class CannotBuildError(RuntimeError):
    """This machine lacks what the emulator is built with: a reason to skip, not to fail."""


def build_environment() -> dict[str, str]:
    """Build what is not built yet.

    Returns:
        The environment in which ``libcuda.so.1`` is the emulator and ``pycuda`` is found.

    Raises:
        CannotBuildError: There is no g++, or no cuda.h or PyCUDA and no network to get them.
    """
    if shutil.which("g++") is None:
        raise CannotBuildError("the emulated CUDA driver needs g++")
    with _lock():
        include = _find_headers()
        library = _build_library(include)
        pycuda = _build_pycuda(include, library)
    paths = {"LD_LIBRARY_PATH": library, "PYTHONPATH": pycuda}
    joined = {
        name: os.pathsep.join([str(path), *filter(None, [os.environ.get(name)])])
        for name, path in paths.items()
    }
    return {**os.environ, **joined, "EDGETRACK_EMULATED": "1"}


@contextmanager
def _lock() -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find_headers() -> Path:
    """The folder of cuda.h and cudaProfiler.h: a toolkit's, or that of NVIDIA's wheels."""
    nvcc = shutil.which("nvcc")
    roots = [Path(nvcc).resolve().parents[1]] if nvcc else []
    roots += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    fetched = CACHE / "headers"
    for include in [*(root / "include" for root in roots), fetched / "nvidia/cu13/include"]:
        if (include / "cudaProfiler.h").is_file() and _cuda_version(include / "cuda.h") >= 12080:
            return include
    _fetch("install", "--no-deps", "--target", str(fetched), *HEADER_WHEELS)
    return fetched / "nvidia" / "cu13" / "include"


def _cuda_version(header: Path) -> int:
    if not header.is_file():
        return 0
    lines = header.read_text("utf-8", errors="replace").splitlines()
    return next((int(x.split()[2]) for x in lines if x.startswith("#define CUDA_VERSION ")), 0)


def _build_library(include: Path) -> Path:
    """Compile what changed; returns the folder of ``libcuda.so.1``."""
    headers = sorted(SOURCES.glob("*.h"))
    (CACHE / "objects").mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        is_kernels = source.name == "kernels.cpp"
        flags = [*FLAGS, *KERNEL_FLAGS] if is_kernels else list(FLAGS)
        inputs = [source, *headers, *([FRAME_CU] if is_kernels else [])]
        made = CACHE / "objects" / f"{_digest(inputs, [*flags, str(include)])}.o"
        if not made.is_file():
            partial = made.with_suffix(".partial")
            command = ["g++", *flags, "-isystem", include, "-c", source, "-o", partial]
            _run(command, f"compiling {source.name}")
            partial.replace(made)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted(SOURCES.glob("*.cpp"))))
    folder = CACHE / _digest([], [path.name for path in objects])
    if not (folder / "libcuda.so").exists():
        folder.mkdir(exist_ok=True)
        library = folder / "libcuda.so.1"
        command = ["g++", "-shared", "-pthread", "-Wl,-soname,libcuda.so.1", *objects]
        _run([*command, "-Wl,--no-undefined", "-o", library], "linking the emulator")
        (folder / "libcuda.so").symlink_to(library.name)  # what PyCUDA is linked with
    return folder


def _build_pycuda(include: Path, library: Path) -> Path:
    """Compile PyCUDA from its source distribution, about two minutes; returns its folder."""
    version = f"{PYCUDA}-cuda{_cuda_version(include / 'cuda.h')}"
    tag = f"{sys.implementation.cache_tag}-{platform.machine()}"
    made = CACHE / f"{version.replace('==', '-')}-{tag}"
    if made.is_dir():
        return made
    work = CACHE / "pycuda-work"
    shutil.rmtree(work, ignore_errors=True)
    _fetch("download", "--no-deps", "--no-binary", "pycuda", "--dest", str(work), PYCUDA)
    with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
        archive.extractall(work, filter="data")
    source = next(path for path in work.iterdir() if path.is_dir())
    siteconf = SITECONF.format(include=str(include), lib=str(library))
    (source / "siteconf.py").write_text(siteconf, encoding="utf-8")
    command = [*PIP, "wheel", "--no-deps", "--wheel-dir", work, source]
    _run(command, "building PyCUDA", CFLAGS="-O0 -g0 -w")
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        wheel.extractall(work / "package")
    (work / "package").replace(made)
    shutil.rmtree(work)
    return made


def _digest(files: list[Path], words: list[str]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _fetch(*arguments: str) -> None:
    done = subprocess.run([*PIP, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuildError(f"pip {' '.join(arguments)} failed: {done.stderr.strip()[-1000:]}")


def _run(command: Sequence[str | Path], what: str, **variables: str) -> None:
    environment = {**os.environ, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    is_warned = command[0] == "g++" and done.stderr
    if done.returncode or is_warned:
        raise SystemExit(f"{what} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
