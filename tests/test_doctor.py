import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jetson_trees import orin_nano, write

from edgetrack.doctor import Finding, Report, examine, jetpack_release, opencv_traits

JETPACK_OPENCV = """
  GUI:                           GTK3
    GTK+:                        YES (ver 3.24.33)

  Video I/O:
    FFMPEG:                      YES
    GStreamer:                   YES (1.20.3)
"""
WHEEL_OPENCV = """
  GUI:                           NONE

  Video I/O:
    GStreamer:                   NO
"""
# A driver of CUDA VERSION with an integrated device, and conditional nodes if HAS_NODES.
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Orin", size); return 0; }
int cuDeviceTotalMem_v2(unsigned long *bytes, int device) { *bytes = 7990000000ul; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 7 : attribute == 18; return 0;
}
#if HAS_NODES
int cuStreamBeginCaptureToGraph, cuStreamGetCaptureInfo_v3, cuStreamUpdateCaptureDependencies_v2,
  cuGraphAddNode_v2, cuGraphConditionalHandleCreate;
#endif
"""
SCRIPT = """
import json, pathlib, sys
from edgetrack.doctor import examine
print(json.dumps(examine(pathlib.Path(sys.argv[1])).as_dict()))
"""


@pytest.fixture(scope="module")
def report() -> Report:
    return examine()


def examine_jetson(
    folder: Path, *, version: int = 12060, has_nodes: bool = True, has_pycuda: bool = True
) -> dict[str, Any]:
    """Examine a machine with such a driver, and with the files of a Jetson."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, to build a stub of the CUDA driver")
    (folder / "driver.c").write_text(DRIVER, encoding="utf-8")
    macros = [f"-DVERSION={version}", f"-DHAS_NODES={int(has_nodes)}"]
    command = ["gcc", "-shared", "-fPIC", *macros, "-o", folder / "libcuda.so.1"]
    subprocess.run([*command, folder / "driver.c"], check=True)
    root = orin_nano(folder / "root")
    write(root, {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1"})
    if has_pycuda:
        write(folder, {"pycuda/__init__.py": "", "pycuda/driver.py": ""})
        write(folder, {"pycuda-2026.1.dist-info/METADATA": "Name: pycuda\nVersion: 2026.1"})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, root],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def examine_with(module: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """Examine a machine on which a module is this."""
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return examine()


def test_report_is_json(report: Report) -> None:
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()


def test_report_holds_findings_in_order(report: Report) -> None:
    findings = list(report)

    assert all(isinstance(f, Finding) for f in findings)
    assert findings[0].name == "Python"
    assert findings[-1].name == "torch"


def test_what_the_tests_run_on_is_found(report: Report) -> None:
    assert report.python.details["version"] == ".".join(map(str, sys.version_info[:3]))
    assert report.cpu.details["num_usable_cores"] >= 1
    assert report.memory.details["free_bytes"] > 0
    assert report.onnxruntime.is_present
    assert "CPUExecutionProvider" in report.onnxruntime.details["providers"]


def test_what_is_missing_comes_with_a_hint(report: Report) -> None:
    for finding in report:
        assert finding.is_present or finding.hint or finding.name in ("Memory", "Power")


def test_examining_imports_nothing_heavy() -> None:
    script = (
        "import sys; from edgetrack.doctor import examine; examine()\n"
        "print(*{'cv2', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'torch'} & set(sys.modules))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == []


def test_opencv_built_for_numpy_1_has_its_own_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "raise ImportError('numpy.core.multiarray failed to import')"

    report = examine_with("cv2", code, tmp_path, monkeypatch)

    assert not report.opencv.is_present
    assert "pip install 'numpy<2'" in report.opencv.hint


def test_a_package_that_crashes_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"

    report = examine_with("onnxruntime", code, tmp_path, monkeypatch)

    assert not report.onnxruntime.is_present
    assert report.onnxruntime.value == "its import ended with -11"
    assert "pip install onnxruntime" in report.onnxruntime.hint


def test_a_package_that_is_missing_is_named_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "raise ModuleNotFoundError(\"No module named 'cv2'\")"

    report = examine_with("cv2", code, tmp_path, monkeypatch)

    assert report.opencv.value == "not installed"
    assert "edgetrack[opencv]" in report.opencv.hint


def test_opencv_of_jetpack_has_gstreamer_and_windows() -> None:
    assert opencv_traits(JETPACK_OPENCV) == {
        "has_gstreamer": True,
        "has_gui": True,
        "gui": "GTK3",
    }


def test_headless_wheel_has_neither() -> None:
    traits = opencv_traits(WHEEL_OPENCV)

    assert not traits["has_gstreamer"]
    assert not traits["has_gui"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
            {"l4t": "36.4.3", "jetpack": "6"},
        ),
        ("# R35 (release), REVISION: 5.0, GCID: 1", {"l4t": "35.5.0", "jetpack": "5"}),
        ("# R99 (release), REVISION: 1.0, GCID: 1", {"l4t": "99.1.0", "jetpack": "unknown"}),
        ("something else", None),
    ],
)
def test_jetpack_is_read_from_the_tegra_release(text: str, expected: dict[str, str] | None) -> None:
    assert jetpack_release(text) == expected


def test_a_gpu_is_described(tmp_path: Path) -> None:
    gpu = examine_jetson(tmp_path)["gpu"]

    assert gpu["value"] == "Orin, sm_87, 8.0 GB shared with the CPU, driver for CUDA 12.6"
    assert gpu["details"]["memory_bytes"] == 7_990_000_000


@pytest.mark.parametrize(
    ("machine", "decision", "hint"),
    [
        ({}, "unknown", "a tracker on this GPU would fail in the same way"),  # a stub cannot try
        ({"has_nodes": False}, "flag", ""),
        ({"has_pycuda": False}, "host", "install PyCUDA"),
        ({"version": 12030}, "host", "update the driver"),
    ],
)
def test_who_would_decide_to_stop(
    tmp_path: Path, machine: dict[str, Any], decision: str, hint: str
) -> None:
    finding = examine_jetson(tmp_path, **machine)["exit_decision"]

    assert finding["details"]["exit_decision"] == decision
    is_probed = " (probed)" if decision == "unknown" else ""
    assert finding["value"].startswith(f"{decision}{is_probed}: ")
    assert finding["is_present"] is (decision == "flag")
    assert finding["hint"].startswith(hint)
    assert bool(finding["hint"]) is bool(hint)


def test_without_a_gpu_the_host_decides(report: Report) -> None:
    if report.gpu.is_present:
        pytest.skip("needs a machine without a GPU")

    assert report.exit_decision.details["exit_decision"] == "host"
    assert not report.exit_decision.is_present


def test_pycuda_on_a_jetson_needs_the_toolkits_paths(tmp_path: Path) -> None:
    hint = examine_jetson(tmp_path, has_pycuda=False)["pycuda"]["hint"]

    assert "export PATH=/usr/local/cuda/bin:$PATH CPATH=/usr/local/cuda/include" in hint
    assert "pip install 'edgetrack[cuda]'" in hint


def test_pycuda_elsewhere_does_not(report: Report) -> None:
    if report.pycuda.is_present:
        pytest.skip("needs a machine without PyCUDA")

    assert report.pycuda.hint == "run: pip install 'edgetrack[cuda]'"


def test_power_mode_and_clocks_come_with_a_hint_to_fix_them(tmp_path: Path) -> None:
    power = examine(orin_nano(tmp_path)).power

    assert power.is_present
    assert power.value == (
        "mode 25W, cpu up to 1344 MHz, gpu up to 918 MHz, emc up to 2133 MHz, 50 °C, "
        "rails VDD_IN, VDD_CPU_GPU_CV, VDD_SOC"
    )
    assert "sudo jetson_clocks" in power.hint
    assert power.details["power_mode"] == {"index": 1, "name": "25W"}


def test_fixed_clocks_need_no_hint(tmp_path: Path) -> None:
    power = examine(orin_nano(tmp_path, is_fixed=True)).power

    assert "gpu fixed at 918 MHz" in power.value
    assert power.hint == ""


def test_a_machine_without_sensors_says_so(tmp_path: Path, report: Report) -> None:
    if report.gpu.is_present:
        pytest.skip("needs a machine without a GPU")

    power = examine(tmp_path).power

    assert not power.is_present
    assert power.hint == ""
