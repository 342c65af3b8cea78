"""Every block of the README that is not for another machine runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgetrack.data.synthetic import render_clip, write_clip
from edgetrack.frames import read_frames

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the README's reader has it: a video, and a labelled sequence."""
    truth = write_clip(tmp_path / "car.mp4", render_clip(num_frames=24, seed=3))
    images = tmp_path / "sequences" / "car" / "img"
    images.mkdir(parents=True)
    import cv2

    for index, frame in enumerate(read_frames(tmp_path / "car.mp4"), 1):
        cv2.imwrite(str(images / f"{index:06d}.jpg"), frame)
    np.savetxt(images.parent / "groundtruth.txt", truth, "%.3f", ",")
    return tmp_path


def test_readme_has_blocks_to_run() -> None:
    assert [kind for kind, _ in BLOCKS].count("python") >= 2
    assert "sh" in [kind for kind, _ in BLOCKS]


@pytest.mark.parametrize("code", [code for kind, code in BLOCKS if kind == "python"])
def test_readme_python_block_runs(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("code", [code for kind, code in BLOCKS if kind == "sh"])
def test_readme_shell_block_runs(code: str, folder: Path) -> None:
    commands = code.replace("edgetrack ", f"{sys.executable} -m edgetrack ")

    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=folder, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert (folder / "out.mp4").is_file()
    assert len((folder / "boxes.csv").read_text().splitlines()) == 25
