"""``bench`` and ``doctor`` on a machine with a GPU, which the emulator plays."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cpu_segments import EmulatedBackend
from emulator.hooks import EmulatedDriver
from jetson_trees import orin_nano, write

from edgetrack.bench import BenchReport, bench
from edgetrack.bundle import Bundle
from edgetrack.cli.tables import print_bench
from edgetrack.data.synthetic import render_clip
from edgetrack.doctor import examine
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.tracker import Tracker

CLIP = list(render_clip(num_frames=12, width=320, height=240))
FRAMES, BBOX = [frame for frame, _ in CLIP], CLIP[0][1]
WAYS = ("device", "flag", "host")


@pytest.fixture(autouse=True)
def is_reset(emulated: EmulatedDriver) -> Iterator[None]:
    """Failures that a test asked for do not outlive it."""
    yield
    emulated.fail("", 0)


def opener(bundle: Bundle, **options: Any) -> Callable[[str], Tracker]:
    return lambda way: Tracker(bundle, backend=EmulatedBackend(), exit_decision=way, **options)


def run(bundle: Bundle, way: str, root: Path, **options: Any) -> BenchReport:
    open_deciding = opener(bundle, **options)
    with open_deciding(way) as tracker:
        return bench(tracker, FRAMES, BBOX, num_warm_up=2, open_deciding=open_deciding, root=root)


@pytest.mark.parametrize("own", WAYS)
def test_the_ways_to_decide_stand_side_by_side(toy: Bundle, tmp_path: Path, own: str) -> None:
    report = run(toy, own, tmp_path)

    gpu = report.gpu
    assert gpu is not None
    assert (gpu.exit_decision, tuple(gpu.ways), gpu.unlike, gpu.unavailable) == (own, WAYS, (), {})
    assert gpu.memory_bytes > 0
    for timing in gpu.ways.values():
        assert [p.count for p in (*timing.exits, timing.overall, timing.submit)] == [11] * 5
        assert timing.exit_histogram == report.exit_histogram
    assert gpu.ways[own].overall == report.overall
    assert gpu.ways["host"].stages_ms.keys() >= {"crop", "segment_0", "segment_2"}
    assert report.submit.p50 <= report.overall.p50


def test_a_way_that_does_not_work_says_why(
    toy: Bundle, tmp_path: Path, emulated: EmulatedDriver
) -> None:
    with opener(toy)("flag") as tracker:
        emulated.fail("cuGraphConditionalHandleCreate", 801)
        report = bench(tracker, FRAMES, BBOX, open_deciding=opener(toy), root=tmp_path)

    assert report.gpu is not None
    assert tuple(report.gpu.ways) == ("flag", "host")
    assert "conditional nodes" in report.gpu.unavailable["device"]


def test_a_policy_in_python_leaves_the_host_alone(toy: Bundle, tmp_path: Path) -> None:
    class Own(ExitPolicy):
        def should_exit(self, exit_index: int, uncertainty: float, score: float) -> bool:
            return exit_index == 1

    report = run(toy, "host", tmp_path, exit_policy=Own((0.0, 0.0)))

    assert report.gpu is not None
    assert tuple(report.gpu.ways) == ("host",)
    assert report.gpu.unavailable.keys() == {"device", "flag"}
    assert report.exit_histogram == (0, 11, 0)


def test_without_an_opener_only_the_own_way_is_there(toy: Bundle, tmp_path: Path) -> None:
    with opener(toy)("device") as tracker:
        report = bench(tracker, FRAMES, BBOX, root=tmp_path)

    assert report.gpu is not None
    assert tuple(report.gpu.ways) == ("device",)


def test_a_report_of_a_gpu_is_json(toy: Bundle, tmp_path: Path) -> None:
    root = orin_nano(tmp_path)
    with opener(toy, exit_policy=ExitPolicy.fixed(1, num_exits=3))("device") as tracker:
        report = bench(tracker, FRAMES, BBOX, open_deciding=opener(toy), energy_s=0.05, root=root)

    content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert content["gpu"]["ways"]["flag"]["submit"]["count"] == 11
    assert content["setup"]["thresholds"] == [0.0, "inf"]
    assert content["energy"]["exits"][2]["total_mj"] > 0


def test_ways_that_took_other_exits_are_starred(
    toy: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_deciding(way: str) -> Tracker:
        policy = ExitPolicy.fixed(0, num_exits=3) if way == "flag" else None
        return opener(toy, exit_policy=policy)(way)

    with opener(toy)("device") as tracker:
        report = bench(tracker, FRAMES, BBOX, open_deciding=open_deciding, root=tmp_path)

    assert report.gpu is not None
    assert report.gpu.unlike == ("flag",)
    print_bench(report, "a clip", {"GPU": "emulated"})
    printed = capsys.readouterr().out
    assert "* took other exits: not to be compared" in printed
    device, flag, host = ways_row(printed, "operating point")
    assert flag.endswith("*")
    assert not device.endswith("*")
    assert not host.endswith("*")


def ways_row(printed: str, name: str) -> list[str]:
    """A row's cells in the table of the ways to decide."""
    table = printed[printed.index("who decides to stop") :]
    line = next(line for line in table.splitlines() if line.strip().startswith(name))
    return line.split(name)[1].split()


def test_what_is_printed_of_a_gpu(
    toy: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(toy, "device", orin_nano(tmp_path))

    print_bench(report, "a clip", {})

    printed = capsys.readouterr().out
    assert "who decides to stop (this tracker: device)" in printed
    assert "submit alone*" in printed
    assert "where the host decides*" in printed
    assert "* this tracker runs them without waiting: device" in printed
    assert "GPU memory" in printed
    assert len(ways_row(printed, "always exit 2")) == 3
    assert "to be compared" not in printed


@pytest.mark.parametrize(
    ("settings", "value", "decision"),
    [
        ({}, "device (probed): one CUDA graph per frame", "device"),
        ({"version": 12020}, "host", "host"),
    ],
)
def test_the_doctor_says_who_would_decide(
    emulated: EmulatedDriver, settings: dict[str, int], value: str, decision: str
) -> None:
    emulated.configure(**settings)

    report = examine()

    assert report.exit_decision.value.startswith(value)
    assert report.exit_decision.details["exit_decision"] == decision
    assert report.exit_decision.is_present == (decision != "host")
    assert ("update the driver" in report.exit_decision.hint) == (decision == "host")


def test_the_doctor_tries_conditional_nodes_and_says_why_they_do_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python imports this at its start: so the trial, a process of its own, meets the failure.
    fail = "ctypes.CDLL('libcuda.so.1').emulator_fail(b'cuGraphConditionalHandleCreate', 1, 801)"
    write(tmp_path, {"sitecustomize.py": f"import ctypes\n{fail}"})
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")

    decision = examine().exit_decision

    assert decision.details["exit_decision"] == "flag"
    assert decision.value.startswith("flag (probed): the host reads a flag that the GPU sets, as")
    assert "cuGraphConditionalHandleCreate: expected success, got" in decision.value
    assert decision.hint


def test_the_doctor_describes_the_gpu(emulated: EmulatedDriver, tmp_path: Path) -> None:
    emulated.configure(version=12060, arch=87, integrated=1, memory_bytes=8_000_000_000)
    write(tmp_path, {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1"})

    report = examine(tmp_path)

    assert "sm_87, 8.0 GB shared with the CPU, driver for CUDA 12.6" in report.gpu.value
    assert report.gpu.details["is_integrated"] is True
    assert report.pycuda.is_present
