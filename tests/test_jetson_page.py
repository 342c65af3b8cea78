"""The Jetson page stays true as far as a machine without one can tell."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgetrack.cli import app
from edgetrack.data.synthetic import render_clip, write_clip
from edgetrack.frames.gstreamer import (
    Camera,
    csi_pipeline,
    parse_camera,
    rtsp_pipeline,
    v4l2_pipelines,
)

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "JETSON.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S)
SHELL = "\n".join(code for kind, code in BLOCKS if kind == "shell")
SOURCES = "\n".join(path.read_text("utf-8") for path in (ROOT / "edgetrack").rglob("*.py"))


@pytest.mark.parametrize("code", [code for kind, code in BLOCKS if kind == "python"])
def test_python_block_runs(code: str, tmp_path: Path) -> None:
    write_clip(tmp_path / "car.mp4", render_clip(num_frames=6, seed=3))

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False 0 host\n")


@pytest.mark.parametrize("line", re.findall(r"^edgetrack .*", SHELL, re.M))
def test_commands_have_the_options_that_are_shown(line: str) -> None:
    _, name, *words = shlex.split(line, comments=True)
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"})

    assert shown.exit_code == 0
    known = set(re.findall(r"--[\w-]+", shown.output))
    assert {word for word in words if word.startswith("--")} <= known


def test_extras_that_are_named_exist() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = {e for found in re.findall(r"edgetrack\[([\w,]+)\]", PAGE) for e in found.split(",")}

    assert named
    assert named <= set(project["optional-dependencies"])


def test_addresses_that_are_shown_are_understood() -> None:
    cameras = set(re.findall(r"`((?:csi|v4l2)://\S*?)`", PAGE)) | {"csi://0"}
    streams = set(re.findall(r"`(rtsp://\S*?)`", PAGE))

    assert len(cameras) >= 3
    assert len(streams) >= 2
    for address in cameras:
        parse_camera(address)
    for address in streams:
        rtsp_pipeline(address, is_jetson=True)


def test_pipelines_that_are_shown_are_those_that_run() -> None:
    shown = next(code for kind, code in BLOCKS if "nvarguscamerasrc" in code and kind == "text")
    expected = {
        "csi": csi_pipeline(Camera(kind="csi", device="0")),
        "v4l2": v4l2_pipelines(
            Camera(kind="v4l2", device="0"), device="/dev/video0", is_jetson=True
        )[0],
        "rtsp": rtsp_pipeline("rtsp://host", is_jetson=True)[0].replace("rtsp://host", "…"),
    }

    for kind, pipeline in expected.items():
        found = re.search(rf"^{kind} +(.*?appsink) …", shown, re.M | re.S)
        assert found is not None
        assert " ".join(found[1].split()) == pipeline.partition(" drop=true max-buffers")[0]


@pytest.mark.parametrize(
    "words",
    [
        "expected a driver for CUDA 12.4 or newer",
        "PyCUDA: expected one for CUDA",
        "another TensorRT wrote it",
        "expected a driver whose conditional nodes work",
        "expected an OpenCV with GStreamer",
        "to have the element",
        "expected a frame within",
        "expected a camera at",
        "expected to open it, got a refusal",
        "expected another frame after",
        "who decides to stop (this tracker:",
    ],
)
def test_messages_that_are_explained_are_written(words: str) -> None:
    assert words in PAGE
    assert words in SOURCES


def test_links_have_targets() -> None:
    targets = set(re.findall(r"^\[([\w-]+)\]:", PAGE, re.M))
    paths = re.findall(r"`((?:tests|edgetrack)/[^`]*)`", PAGE)

    assert set(re.findall(r"\]\[([\w-]+)\]", PAGE)) == targets
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
