"""``edgetrack bench`` as a person meets it."""

import dataclasses
import json
from pathlib import Path

import pytest
from command_line import edgetrack
from jetson_trees import orin_nano
from toy_bundle import write_toy_bundle

from edgetrack.bench import bench
from edgetrack.bundle import Bundle
from edgetrack.cli.options import print_table
from edgetrack.cli.tables import print_bench, when_to_stop
from edgetrack.data.synthetic import render_clip
from edgetrack.tracker import Tracker

CLIP = list(render_clip(num_frames=8, width=320, height=240))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_toy_bundle(folder / "toy")
    return folder


def print_report(toy: Bundle, root: Path, *, energy_s: float = 0.0) -> None:
    frames, bbox = [frame for frame, _ in CLIP], CLIP[0][1]
    with Tracker(toy, num_threads=1) as tracker:
        report = bench(tracker, frames, bbox, energy_s=energy_s, root=root)
    print_bench(report, "a clip", {"CPU": "a CPU"})


def rejecting(constant: str) -> None:
    raise AssertionError(f"not JSON: {constant}")


def test_an_infinite_threshold_is_written_as_text(home: Path) -> None:
    done = edgetrack(
        *("bench", "--bundle", "toy", "--frames", 5, "--json"),
        *("--exit-policy", "fixed", "--threshold", 0),
        cwd=home,
    )

    report = json.loads(done.stdout, parse_constant=rejecting)
    assert report["setup"]["thresholds"] == ["inf", 0.0]


def test_power_is_asked_for_by_name(home: Path) -> None:
    args = ("bench", "--bundle", "toy", "--frames", 5, "--json")

    plain, with_power = (
        json.loads(edgetrack(*args, *more, cwd=home).stdout) for more in ((), ("--power",))
    )

    assert "energy" not in plain
    assert with_power["energy"].keys() == {"total_rails", "idle_mw", "exits", "overall"}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--exit-decision", "gpu"), 2, "auto, device, flag, host"),
        (("--exit-decision", "device", "--backend", "onnxruntime"), 1, "runs on the CPU"),
        (("--device", "-1"), 2, "--device"),
    ],
)
def test_who_decides_must_be_possible(
    home: Path, args: tuple[str, ...], code: int, message: str
) -> None:
    done = edgetrack("bench", "--bundle", "toy", "--frames", 5, *args, cwd=home)

    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_jetson_shows_its_state_and_its_energy(
    toy: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(toy, orin_nano(tmp_path), energy_s=0.05)

    printed = capsys.readouterr().out
    rows = {line.split("  ")[1]: line for line in printed.splitlines() if line.startswith("  ")}
    assert rows["power mode"].split()[2:] == ["25W", "(1)", "25W", "(1)"]
    assert "306 in 306 to 918" in rows["gpu clock, MHz"]
    assert "50.1" in rows["gpu-thermal, °C"]
    assert "unknown" in rows["cv0-thermal, °C"]
    assert "4968" in rows["VDD_IN, mW"]
    assert "clocks that follow the load: cpu, gpu, to fix them run: sudo jetson_clocks" in printed
    assert "mJ is VDD_IN; idle 4.97 W" in printed
    assert "GPU memory" not in printed
    assert "who decides" not in printed


def test_a_machine_without_sensors_shows_no_state(
    toy: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(toy, tmp_path)
    plain = capsys.readouterr().out
    print_report(toy, tmp_path, energy_s=0.05)
    asked = capsys.readouterr().out

    assert "this machine" not in plain
    assert "energy" not in plain
    assert "energy unknown: this machine has no power monitor" in asked


def test_fixed_clocks_are_shown_as_such(
    toy: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(toy, orin_nano(tmp_path, is_fixed=True))

    printed = capsys.readouterr().out
    assert "918 fixed" in printed
    assert "follow the load" not in printed


def test_tables_show_extras_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("to do", ("what", "run"), [("it", "pip install 'a[b]'")], is_numeric=False)

    assert "pip install 'a[b]'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("criterion", "thresholds", "words"),
    [
        ("entropy", (0.25, 0.3), "stop where entropy is below 0.25, 0.3"),
        ("score", (0.04,), "stop where 1 - score is below 0.04"),
        ("combined", (0.1,), "stop where the mean of entropy and 1 - score is below 0.1"),
        ("entropy", (), "there is one exit"),
        ("margin", (0.1,), "stop where margin is below 0.1"),  # of a bundle from elsewhere
    ],
)
def test_an_exit_policy_is_said_by_what_is_compared(
    criterion: str, thresholds: tuple[float, ...], words: str
) -> None:
    assert when_to_stop(criterion, thresholds) == words


def test_bench_names_the_criterion_of_the_tracker(
    toy: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(dataclasses.replace(toy, criterion="score"), tmp_path)

    assert "stop where 1 - score is below" in capsys.readouterr().out
