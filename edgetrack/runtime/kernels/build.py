"""Compile ``frame.cu`` to ``frame.ptx``, which is checked in: devices need no compiler.

PTX ISA 8.4 for compute capability 7.5 loads on every driver from CUDA 12.4 on, which compiles it
for its own GPU; PTX of a newer compiler is refused by the drivers of JetPack 6. Hence the compiler
is pinned: NVRTC 12.4, from a wheel. No fused multiply-add, so that kernels compute bit for bit
what the host does.

Run:
    python edgetrack/runtime/kernels/build.py            # write frame.ptx
    python edgetrack/runtime/kernels/build.py --check    # is frame.ptx of the present frame.cu?
"""

import argparse
import ctypes
import hashlib
import importlib.util
import re
import sys
from pathlib import Path

__all__ = ["compile_ptx", "find_nvrtc", "is_up_to_date", "source_digest"]

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "frame.cu"
PTX = FOLDER / "frame.ptx"
NVRTC_VERSION = (12, 4)
OPTIONS = ("--gpu-architecture=compute_75", "--fmad=false", "--std=c++17")


def find_nvrtc() -> Path | None:
    """The NVRTC library of the wheel ``nvidia-cuda-nvrtc-cu12``; ``None`` if not installed."""
    if importlib.util.find_spec("nvidia") is None:
        return None
    spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    for folder in (spec and spec.submodule_search_locations) or ():
        if libraries := sorted(Path(folder, "lib").glob("libnvrtc.so.12")):
            return libraries[0]
    return None


def source_digest() -> str:
    """SHA-256 of ``frame.cu`` in hexadecimal."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


def is_up_to_date() -> bool:
    """Whether ``frame.ptx`` was compiled from the present ``frame.cu``."""
    if not PTX.is_file():
        return False
    first_line = PTX.read_text("utf-8").partition("\n")[0]
    return f"sha256 {source_digest()}" in first_line


def compile_ptx(library: Path) -> str:
    """Compile ``frame.cu``.

    Args:
        library: NVRTC 12.4.

    Returns:
        PTX, behind a comment line with the source's hash and the compiler's version.

    Raises:
        RuntimeError: It is another version, or it refuses the source.
    """
    nvrtc = ctypes.CDLL(str(library))
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    if (major.value, minor.value) != NVRTC_VERSION:
        raise RuntimeError(
            f"{library.name}: expected NVRTC 12.4, got {major.value}.{minor.value}; "
            "run: pip install 'nvidia-cuda-nvrtc-cu12==12.4.*'"
        )
    program = ctypes.c_void_p()
    source, name = SOURCE.read_bytes(), SOURCE.name.encode()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name, 0, None, None)
    options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
    if nvrtc.nvrtcCompileProgram(program, len(options), options) != 0:
        log = _text(nvrtc, "ProgramLog", program)
        raise RuntimeError(f"{SOURCE.name}: expected what NVRTC compiles, got:\n{log}")
    ptx = _text(nvrtc, "PTX", program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    version = re.search(r"V(\d+\.\d+\.\d+)", ptx)
    compiler = f"NVRTC {version[1] if version else '12.4'} {' '.join(OPTIONS)}"
    return f"// {SOURCE.name} sha256 {source_digest()}, {compiler}\n{ptx.strip()}\n"


def _text(nvrtc: ctypes.CDLL, kind: str, program: ctypes.c_void_p) -> str:
    """``PTX`` or ``ProgramLog`` of a compiled program."""
    size = ctypes.c_size_t()
    nvrtc[f"nvrtcGet{kind}Size"](program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc[f"nvrtcGet{kind}"](program, text)
    return text.value.decode()


def main() -> int:
    """Write or check ``frame.ptx``; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compile frame.cu to frame.ptx.")
    parser.add_argument("--check", action="store_true", help="only compare the stored hash")
    parser.add_argument("--nvrtc", type=Path, help="path of libnvrtc.so.12 (default: the wheel's)")
    arguments = parser.parse_args()
    if arguments.check:
        if is_up_to_date():
            return 0
        print(f"{PTX.name}: expected one of the present {SOURCE.name}; run: python {__file__}")
        return 1
    library = arguments.nvrtc or find_nvrtc()
    if library is None:
        print("nvrtc: expected NVRTC 12.4; run: pip install 'nvidia-cuda-nvrtc-cu12==12.4.*'")
        return 1
    PTX.write_text(compile_ptx(library), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
