"""The compiled kernels that are checked in, and what real compilers say of their source."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from compiled_kernels import FRAME_CU

from edgetrack.runtime.device_state import KERNEL_NAMES, read_ptx
from edgetrack.runtime.kernels import build

ARCHITECTURES = ["sm_87", "sm_90", "sm_110", "sm_120"]


def find_tool(name: str) -> str:
    """A program of the CUDA toolkit, 13 or newer; the test is skipped without one."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(str(Path(r, "bin")) for r in roots if r)]
    path = shutil.which(name, path=os.pathsep.join(folders))
    if path is None:
        pytest.skip(f"needs {name} of the CUDA toolkit, in PATH, CUDA_HOME or /usr/local/cuda")
    text = subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)", text)
    if version is None or int(version[1]) < 13:
        pytest.skip(f"needs {name} 13 or newer, which knows all devices; {path} is older")
    return path


def test_the_ptx_is_of_the_present_source() -> None:
    assert build.is_up_to_date(), "run: python edgetrack/runtime/kernels/build.py"


def test_another_source_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "frame.cu"
    changed.write_bytes(FRAME_CU.read_bytes() + b"\n")
    monkeypatch.setattr(build, "SOURCE", changed)

    assert not build.is_up_to_date()
    monkeypatch.setattr("sys.argv", ["build.py", "--check"])
    assert build.main() == 1


def test_the_ptx_loads_on_the_oldest_driver_and_device() -> None:
    ptx = read_ptx().decode()

    assert ".version 8.4\n" in ptx
    assert ".target sm_75\n" in ptx


def test_the_ptx_has_every_kernel() -> None:
    assert sorted(re.findall(r"\.entry (\w+)", read_ptx().decode())) == sorted(KERNEL_NAMES)


def test_products_and_sums_are_not_fused() -> None:
    """Only CUDA's own sine and cosine, which ask for it, may; they are in double."""
    assert "fma.rn.f32" not in read_ptx().decode()


def test_the_pinned_compiler_gives_the_ptx_that_is_checked_in() -> None:
    library = build.find_nvrtc()
    if library is None:
        pytest.skip("needs NVRTC: pip install 'nvidia-cuda-nvrtc-cu12==12.4.127'")

    assert build.compile_ptx(library) == build.PTX.read_text("utf-8")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_ptx_can_be_assembled(tmp_path: Path, architecture: str) -> None:
    command = [find_tool("ptxas"), f"-arch={architecture}", "-v", str(build.PTX)]

    done = subprocess.run(
        [*command, "-o", str(tmp_path / "frame.cubin")], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert_no_spills(done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_source_compiles_without_warnings_or_spills(tmp_path: Path, architecture: str) -> None:
    options = [*("-cubin", "--fmad=false", "-std=c++17", "-Xptxas=-v"), "-Werror=all-warnings"]
    command = [find_tool("nvcc"), *options, f"-arch={architecture}", str(FRAME_CU)]

    done = subprocess.run(
        [*command, "-o", str(tmp_path / "frame.cubin")], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert_no_spills(done.stderr)


def assert_no_spills(log: str) -> None:
    spilt = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spilt) >= len(KERNEL_NAMES), log
    assert set(spilt) == {("0", "0")}, log
    crop = log[log.index("'edgetrack_crop'") :]
    registers = re.search(r"Used (\d+) registers", crop)
    assert registers is not None
    assert int(registers[1]) <= 64, "more than a quarter of an SM's threads would not fit"
