"""TensorRT's way to build, on an emulated Orin; TensorRT-RTX, which needs no GPU, plays it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_bundle import write_toy_bundle

from edgetrack.backends.trt import TensorRTBackend
from edgetrack.backends.trt.builder import part_of, read_timings
from edgetrack.backends.trt.child import free_memory_bytes
from edgetrack.build import build
from edgetrack.bundle import Bundle
from edgetrack.errors import BackendUnavailableError

PACKAGE = "from tensorrt_rtx import *\nfrom tensorrt_rtx import __version__\n"
METADATA = "Metadata-Version: 2.1\nName: tensorrt\nVersion: 10.3.0\n"
ASK = "from edgetrack.backends.trt.child import free_memory_bytes; print(free_memory_bytes())"
TIMINGS = "timings-Emulated_sm_87-sm_87-tensorrt10.3.0.cache"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_toy_bundle(tmp_path / "toy")


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package ``tensorrt`` 10.3.0 that is TensorRT-RTX."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip('needs tensorrt_rtx: pip install "edgetrack[tensorrt-rtx]"')
    folder = tmp_path / "packages"
    (folder / "tensorrt-10.3.0.dist-info").mkdir(parents=True)
    (folder / "tensorrt-10.3.0.dist-info" / "METADATA").write_text(METADATA, encoding="utf-8")
    (folder / "tensorrt.py").write_text(PACKAGE, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")


@pytest.mark.usefixtures("tensorrt")
def test_engines_are_built_for_the_device_each_in_a_process_of_its_own(
    bundle: Bundle, tmp_path: Path
) -> None:
    processes: dict[str, set[str]] = {}

    engines = build(
        bundle,
        backend="tensorrt",
        output=tmp_path / "engines",
        on_progress=lambda p: processes.setdefault(p.graph, set()).update(children().split()),
    )

    key = engines.key
    assert (key.device, key.arch, key.precision) == ("Emulated sm_87", "sm_87", "fp16")
    assert [len(found) for found in processes.values()] == [1, 1, 1, 1]
    assert len(set.union(*processes.values())) == 4
    assert "tensorrt_rtx" not in sys.modules
    assert build(bundle, backend="tensorrt", output=tmp_path / "engines") == engines


@pytest.mark.usefixtures("tensorrt")
def test_timings_are_kept_beside_the_engines_and_replaced_if_damaged(
    bundle: Bundle, tmp_path: Path
) -> None:
    file = tmp_path / "engines" / TIMINGS
    build(bundle, backend="tensorrt", output=tmp_path / "engines")
    assert read_timings(file)[:4] == b"ptrt"
    file.write_bytes(file.read_bytes()[:-1])

    build(bundle, backend="tensorrt", output=tmp_path / "engines", force=True)

    assert read_timings(file)[:4] == b"ptrt"
    assert not part_of(file).exists()


@pytest.mark.usefixtures("tensorrt")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(BackendUnavailableError, match="a CUDA GPU with number 7, for which"):
        TensorRTBackend("tensorrt", 7).key(model="toy", bundle_digest="0", precision="fp16")


def test_on_an_integrated_gpu_the_memory_of_the_machine_counts() -> None:
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    available_kb = next(int(x.split()[1]) for x in text.splitlines() if "MemAvailable" in x)

    assert free_memory_bytes() == pytest.approx(available_kb << 10, rel=0.2)


def test_on_a_discrete_gpu_its_own_memory_counts() -> None:
    asked = subprocess.run(
        [sys.executable, "-c", ASK],
        env={**os.environ, "EMULATED_INTEGRATED": "0", "EMULATED_MEMORY_BYTES": str(1 << 30)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert int(asked.stdout) == 1 << 30
