import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# A driver with one device of compute capability 8.7, for CUDA 12.6.
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return NO_DEVICE; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Orin", size); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : 7; return 0;
}
"""
SCRIPT = """
from edgetrack.backends.cuda import cuda_driver_version, find_cuda_device
print(cuda_driver_version(), find_cuda_device())
"""


def ask_driver(folder: Path, *, no_device: int = 0) -> str:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, to build a stub of the CUDA driver")
    (folder / "driver.c").write_text(DRIVER, encoding="utf-8")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-DNO_DEVICE={no_device}",
         "-o", folder / "libcuda.so.1", folder / "driver.c"],
        check=True,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_driver_names_its_device(tmp_path: Path) -> None:
    assert ask_driver(tmp_path) == "12.6 CudaDevice(name='Orin', arch='sm_87')"


def test_a_driver_without_a_device_has_none(tmp_path: Path) -> None:
    assert ask_driver(tmp_path, no_device=100) == "12.6 None"
