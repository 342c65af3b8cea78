"""What `pip install edgetrack` finds on a Jetson: wheels, resolved but not installed."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]

# Python and glibc: JetPack 6 is Ubuntu 22.04, JetPack 7 Ubuntu 24.04.
JETPACKS = {"6": ("3.10", 35), "7": ("3.12", 39)}
# What an installation on a Jetson is made of. Parts of what resolves together resolve alone.
WITH_OPENCV = [*EXTRAS["opencv"], *EXTRAS["plot"], *EXTRAS["onnx"]]
# The system's OpenCV was built for NumPy 1; PyCUDA is replaced by what it needs itself.
WITH_SYSTEM_OPENCV = [*EXTRAS["onnx"], "numpy<2", "pytools", "mako", "platformdirs"]

pytestmark = [pytest.mark.slow, pytest.mark.network]


def resolve(jetpack: str, requirements: Sequence[str], folder: Path) -> dict[str, str]:
    """File names by package; pip decides by this machine's markers, and by that one's wheels."""
    python, glibc_minor = JETPACKS[jetpack]
    report = folder / "report.json"
    platforms = ["manylinux2014", *(f"manylinux_2_{n}" for n in range(17, glibc_minor + 1))]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--quiet", "--disable-pip-version-check", "--retries", "1", "--report", str(report)]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
    command += [f"--platform={p}_aarch64" for p in platforms]
    command += ["--target", str(folder / "site"), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        pytest.skip("needs pip")
    if done.returncode and ("connection broken" in done.stderr or "fetch URL" in done.stderr):
        pytest.skip("needs a package index")
    if done.returncode:
        raise LookupError(done.stderr)
    found = json.loads(report.read_text("utf-8"))["install"]
    return {
        f["metadata"]["name"].lower().replace("_", "-"): Path(f["download_info"]["url"]).name
        for f in found
    }


@pytest.mark.parametrize("jetpack", JETPACKS)
@pytest.mark.parametrize("extras", [WITH_OPENCV, WITH_SYSTEM_OPENCV], ids=["wheel", "system"])
def test_a_jetson_finds_wheels_for_all_that_is_compiled(
    extras: list[str], jetpack: str, tmp_path: Path
) -> None:
    wheels = resolve(jetpack, [*PROJECT["project"]["dependencies"], *extras], tmp_path)

    assert {"numpy", "onnxruntime", "onnx", "onnx-graphsurgeon", "rich", "typer"} <= set(wheels)
    wrong = [w for w in wheels.values() if not w.endswith(("-any.whl", "_aarch64.whl"))]
    assert wrong == []
    assert wheels["onnxruntime"].endswith("_aarch64.whl")
    if "numpy<2" in extras:
        assert wheels["numpy"].startswith("numpy-1.26")


def test_pycuda_has_no_wheels_and_is_compiled_on_the_device(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="No matching distribution found for pycuda"):
        resolve("6", EXTRAS["cuda"], tmp_path)
