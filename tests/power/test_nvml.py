"""NVML through a stand-in library in C, which keeps count of who came and went."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jetson_trees import orin_nano

from edgetrack.power import Clock, Nvml, read_machine_state

LIBRARY = """
#include <string.h>
#define FAILS 3  /* NVML_ERROR_NOT_SUPPORTED */
int num_users = 0;
int nvmlInit_v2(void) { num_users++; return INIT; }
int nvmlShutdown(void) { num_users--; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = CARDS; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  *device = (void *)(0x7000000000000000 + index); return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) {
  if (strcmp(bus, "0000:02:00.0")) return FAILS;
  *device = (void *)0x7000000000000001; return 0; }
static int card(void *device) { return (long)device - 0x7000000000000000; }
int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *mhz) {
  *mhz = (kind == 1 ? 1200 : 9500) + card(device); return kind == 0; }
int nvmlDeviceGetMaxClockInfo(void *device, int kind, unsigned *mhz) {
  *mhz = kind == 1 ? 1980 : 9501; return SILENT; }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) {
  *celsius = 41; return sensor || SILENT; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *mw) { *mw = 71234; return SILENT; }
#if !SILENT
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *mj) {
  *mj = 1ull << 40; return 0; }
#endif
"""
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "A", size); return 0; }
int cuDeviceTotalMem_v2(unsigned long *bytes, int device) { *bytes = 1ul << 33; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 8; return 0; }
int cuDeviceGetPCIBusId(char *bus, int size, int device) {
  strncpy(bus, device == 0 ? "0000:02:00.0" : "0000:00:00.0", size); return 0; }
"""
ASK = """
import json, sys
from edgetrack.power import Nvml
nvml = Nvml.open(int(sys.argv[1]))
print(json.dumps(nvml and nvml.read_clocks()["gpu"].now_mhz))
"""


def compile_library(path: Path, code: str, **macros: int) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, to build a stand-in of NVML")
    source = path.with_suffix(".c")
    source.write_text(code, encoding="utf-8")
    defines = [f"-D{name}={value}" for name, value in macros.items()]
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", *defines, "-o", path, source], check=True)
    return path


def nvml_library(folder: Path, *, cards: int = 1, init: int = 0, silent: int = 0) -> Path:
    macros = {"CARDS": cards, "INIT": init, "SILENT": silent}
    return compile_library(folder / "libnvidia-ml.so.1", LIBRARY, **macros)


def num_users(library: Path) -> int:
    return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "num_users").value


def test_a_card_tells_clocks_temperature_power_and_energy(tmp_path: Path) -> None:
    library = nvml_library(tmp_path)

    nvml = Nvml.open(library=str(library))

    assert nvml is not None
    assert nvml.read_clocks() == {
        "gpu": Clock(now_mhz=1200.0, lowest_mhz=None, highest_mhz=1980.0, is_fixed=None),
        "memory": Clock(now_mhz=9500.0, lowest_mhz=None, highest_mhz=9501.0, is_fixed=None),
    }
    assert nvml.read_temperatures_c() == {"gpu": 41.0}
    assert nvml.read_power_mw() == {"GPU board": 71234.0}
    assert nvml.read_energy_mj() == {"GPU board": 2.0**40}


def test_it_is_left_once_and_then_says_nothing(tmp_path: Path) -> None:
    library = nvml_library(tmp_path)
    nvml = Nvml.open(library=str(library))
    assert nvml is not None
    assert num_users(library) == 1

    nvml.close()
    nvml.close()

    assert num_users(library) == 0
    assert nvml.read_power_mw() == nvml.read_clocks() == {}


def test_what_a_card_does_not_support_is_left_out(tmp_path: Path) -> None:
    nvml = Nvml.open(library=str(nvml_library(tmp_path, silent=1)))

    assert nvml is not None
    assert nvml.read_clocks()["gpu"].highest_mhz is None
    assert nvml.read_temperatures_c() == nvml.read_power_mw() == nvml.read_energy_mj() == {}


def test_without_the_library_or_its_driver_there_is_none(tmp_path: Path) -> None:
    assert Nvml.open(library=str(tmp_path / "none.so")) is None
    assert Nvml.open(library=str(nvml_library(tmp_path, init=9))) is None

    empty = compile_library(tmp_path / "empty.so", "int nothing;")
    assert Nvml.open(library=str(empty)) is None


@pytest.mark.parametrize(
    ("cards", "ordinal", "mhz"),
    [
        (2, 0, 1201.0),  # CUDA's first card is NVML's second
        (2, 1, None),  # no way to tell which one it is
        (1, 1, 1200.0),
    ],
)
def test_a_card_is_found_by_its_place_on_the_bus(
    tmp_path: Path, cards: int, ordinal: int, mhz: float | None
) -> None:
    nvml_library(tmp_path, cards=cards)
    compile_library(tmp_path / "libcuda.so.1", DRIVER)

    done = subprocess.run(
        [sys.executable, "-c", ASK, str(ordinal)],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert json.loads(done.stdout) == mhz


def test_a_card_that_is_not_the_one_is_left_again(tmp_path: Path) -> None:
    library = nvml_library(tmp_path, cards=2)

    assert Nvml.open(library=str(library)) is None

    assert num_users(library) == 0


def test_files_know_better_than_nvml_where_both_speak(tmp_path: Path) -> None:
    nvml = Nvml.open(library=str(nvml_library(tmp_path)))

    state = read_machine_state(orin_nano(tmp_path / "root"), nvml=nvml)

    assert state.clocks["gpu"].is_fixed is False
    assert state.clocks["memory"].highest_mhz == 9501.0
    assert state.temperatures_c["gpu"] == 41.0
    assert {"VDD_IN", "GPU board"} <= state.power_mw.keys()
