"""What is asked of CUDA without PyCUDA and without a GPU; tests/emulated has the rest."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# A driver with one device of compute capability 8.7; attributes are 75, 76, 16 and 18.
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int *count) { *count = NUM_DEVICES; return 0; }
int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal; return ordinal < 0 || ordinal >= NUM_DEVICES ? 101 : 0;
}
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Orin", size); return 0; }
int cuDeviceTotalMem_v2(unsigned long *bytes, int device) { *bytes = 8ul << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 7 : attribute == 16 ? 14 : attribute == 18;
  return 0;
}
"""
OPEN = """
import sys
sys.modules["pycuda"] = None  # as where it is not installed
from edgetrack.backends.cuda import CudaContext
from edgetrack.errors import EdgeTrackError
try:
    CudaContext.open(ORDINAL)
except EdgeTrackError as error:
    print(type(error).__name__, error)
"""
FORKED = """
import os
from edgetrack.backends.cuda import CudaContext, find_cuda_device
from edgetrack.errors import DeviceError
find_cuda_device()
if os.fork() == 0:
    try:
        CudaContext.open()
    except DeviceError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""


def run(script: str, folder: Path | None = None) -> str:
    environment = dict(os.environ)
    if folder is not None:
        environment["LD_LIBRARY_PATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def build_driver(folder: Path, *, version: int = 12060, num_devices: int = 1) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, to build a stub of the CUDA driver")
    (folder / "driver.c").write_text(DRIVER, encoding="utf-8")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-DNUM_DEVICES={num_devices}", f"-DVERSION={version}",
         "-o", folder / "libcuda.so.1", folder / "driver.c"],
        check=True,
    )  # fmt: skip
    return folder


def ask(function: str, folder: Path) -> str:
    return run(f"from edgetrack.backends.cuda import *\nprint({function})", folder)


def test_the_driver_describes_its_device(tmp_path: Path) -> None:
    folder = build_driver(tmp_path)

    assert ask("cuda_driver_version()", folder) == "12.6"
    assert ask("find_cuda_device()", folder) == (
        "CudaDevice(name='Orin', arch='sm_87', ordinal=0, num_multiprocessors=14, "
        "memory_bytes=8589934592, is_integrated=True, driver='12.6')"
    )


def test_a_device_is_found_by_its_number(tmp_path: Path) -> None:
    folder = build_driver(tmp_path, num_devices=2)

    assert ask("find_cuda_device(1).ordinal", folder) == "1"
    assert ask("find_cuda_device(2), find_cuda_device(-1)", folder) == "None None"


def test_a_driver_without_a_device_has_none(tmp_path: Path) -> None:
    folder = build_driver(tmp_path, num_devices=0)

    assert ask("cuda_driver_version(), find_cuda_device()", folder) == "12.6 None"


@pytest.mark.parametrize(
    ("version", "ordinal", "kind", "words"),
    [
        (12030, 0, "BackendUnavailableError", "12.4 or newer, got one for 12.3; update the driver"),
        (13000, 2, "DeviceError", "one of the 2 devices"),
        (12060, -1, "DeviceError", "got -1; CUDA_VISIBLE_DEVICES"),
        (12060, 1, "BackendUnavailableError", "pip install 'edgetrack[cuda]'"),
        (12060, 1, "BackendUnavailableError", "CPATH=/usr/local/cuda/include"),
    ],
)
def test_a_context_that_cannot_be_opened_says_why(
    tmp_path: Path, version: int, ordinal: int, kind: str, words: str
) -> None:
    folder = build_driver(tmp_path, version=version, num_devices=2)

    told = run(OPEN.replace("ORDINAL", str(ordinal)), folder)

    assert told.startswith(kind)
    assert words in told
    assert "\n" not in told


def test_pycuda_for_a_newer_driver_says_so(tmp_path: Path) -> None:
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda" / "driver.py").write_text("raise ImportError('undefined symbol: cuNew')")
    script = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n" + OPEN.split("\n", 3)[3]

    told = run(script.replace("ORDINAL", "0"), build_driver(tmp_path))

    assert "expected one for CUDA 12.6 or older, got: undefined symbol: cuNew" in told
    assert "--force-reinstall" in told


def test_without_a_driver_a_context_says_what_to_install() -> None:
    if run("from edgetrack.backends.cuda import *\nprint(cuda_driver_version())") != "None":
        pytest.skip("this machine has a CUDA driver")

    told = run(OPEN.replace("ORDINAL", "0"))

    assert told.startswith("BackendUnavailableError CUDA: expected NVIDIA's driver")
    assert "--backend onnxruntime" in told


def test_a_process_forked_after_cuda_was_used_is_refused(tmp_path: Path) -> None:
    told = run(FORKED, build_driver(tmp_path))

    assert "'spawn' method" in told
