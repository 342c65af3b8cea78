import json
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def report() -> Report:
    return examine()


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
        assert finding.is_present or finding.hint or finding.name == "Memory"


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
