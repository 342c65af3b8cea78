import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from jetson_trees import orin_nano, write

from edgetrack.bench import BenchReport, Percentiles, bench
from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.tracker import Tracker

CLIP = [(frame, box) for frame, box in render_clip(num_frames=12, width=320, height=240)]
FRAMES, BBOX = [frame for frame, _ in CLIP], tuple(float(v) for v in CLIP[0][1])
NUM_UPDATES = len(FRAMES) - 1


@pytest.fixture
def tracker(toy: Bundle) -> Iterator[Tracker]:
    with Tracker(toy, num_threads=1) as tracker:
        yield tracker


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """The root of a machine without any sensor."""
    return tmp_path / "nowhere"


def names_in(value: object) -> set[str]:
    """All keys of nested dictionaries."""
    if isinstance(value, dict):
        return {*value, *(name for inner in value.values() for name in names_in(inner))}
    if isinstance(value, (list, tuple)):
        return {name for inner in value for name in names_in(inner)}
    return set()


def test_percentiles_of_known_latencies() -> None:
    found = Percentiles.of([float(v) for v in range(101)])

    assert found == Percentiles(p50=50.0, p90=90.0, p99=99.0, mean=50.0, count=101)


def test_every_exit_is_forced_and_the_operating_point_is_free(
    tracker: Tracker, nowhere: Path
) -> None:
    taken: dict[str, list[int]] = {}
    names: list[str] = []
    update_async = tracker.update_async

    def note(frame: np.ndarray) -> object:
        pending = update_async(frame)
        taken.setdefault(names[-1], []).append(pending.result().exit_index)
        return pending

    tracker.update_async = note  # type: ignore[method-assign, assignment]  # to see what was done
    report = bench(tracker, FRAMES, BBOX, num_warm_up=3, on_pass=names.append, root=nowhere)

    assert names == [*(f"timing exit {k}" for k in range(3)), "timing operating point"]
    assert [set(taken[name]) for name in names[:3]] == [{0}, {1}, {2}]
    assert len(taken["timing exit 0"]) == 3 + NUM_UPDATES
    free = taken["timing operating point"][3:]
    assert report.exit_histogram == tuple(free.count(k) for k in range(3))
    assert len(set(free)) > 1
    assert [p.count for p in report.exits] == [NUM_UPDATES] * 3
    assert report.overall.count == NUM_UPDATES


def test_the_trackers_own_policy_is_restored_even_after_an_error(
    tracker: Tracker, nowhere: Path
) -> None:
    own = ExitPolicy((0.3, 0.2), "combined")
    tracker.exit_policy = own

    report = bench(tracker, FRAMES, BBOX, root=nowhere)
    assert tracker.exit_policy is own
    assert report.setup["thresholds"] == [0.3, 0.2]
    assert report.setup["criterion"] == "combined"

    broken = [*FRAMES[:5], FRAMES[5][:100]]
    with pytest.raises(Exception, match="frame"):
        bench(tracker, broken, BBOX, num_warm_up=0, root=nowhere)
    assert tracker.exit_policy is own


def test_stages_add_up_to_the_update(tracker: Tracker, nowhere: Path) -> None:
    report = bench(tracker, FRAMES * 5, BBOX, root=nowhere)

    assert report.stages_ms.keys() == {
        *("crop", "segment_0", "segment_1", "segment_2", "decide", "rest")
    }
    assert sum(report.stages_ms.values()) == pytest.approx(report.exits[2].p50, rel=0.5)
    assert report.fps == pytest.approx(1e3 / report.overall.mean)


def test_heads_and_the_update_are_stages_too(toy_with_memory: Bundle, nowhere: Path) -> None:
    with Tracker(toy_with_memory, num_threads=1) as tracker:
        report = bench(tracker, FRAMES, BBOX, num_warm_up=1, root=nowhere)

    segments = [f"segment_{k}" for k in range(3)]
    assert list(report.stages_ms) == ["crop", *segments, "head_2", "decide", "update", "rest"]
    assert report.setup["timed"] == "crop, segments, heads, decisions, mapping back, update"


def test_one_frame_is_too_few(tracker: Tracker, nowhere: Path) -> None:
    with pytest.raises(ValueError, match=r"^bench: expected at least 2 frames, got 1"):
        bench(tracker, FRAMES[:1], BBOX, root=nowhere)


def test_an_infinite_threshold_is_text_in_json(tracker: Tracker, nowhere: Path) -> None:
    tracker.exit_policy = ExitPolicy.fixed(1, num_exits=3)

    content = json.loads(json.dumps(bench(tracker, FRAMES, BBOX, root=nowhere).as_dict()))

    assert content["setup"]["thresholds"] == [0.0, "inf"]
    assert math.isinf(float(content["setup"]["thresholds"][1]))


def test_a_report_is_json_without_anything_that_json_lacks(
    tracker: Tracker, tmp_path: Path
) -> None:
    root = orin_nano(tmp_path)

    content = bench(tracker, FRAMES, BBOX, energy_s=0.05, root=root).as_dict()

    assert json.loads(json.dumps(content, allow_nan=False)) == json.loads(json.dumps(content))


def test_on_a_cpu_nothing_of_a_gpu_appears(tracker: Tracker, nowhere: Path) -> None:
    opened: list[str] = []

    report = bench(tracker, FRAMES, BBOX, open_deciding=opened.append, root=nowhere)  # type: ignore[arg-type]  # not to be called

    assert opened == []
    assert report.gpu is report.energy is report.before is report.after is None
    assert names_in(report.as_dict()).isdisjoint(
        {"gpu", "submit", "ways", "energy", "before", "after", "exit_decision", "memory_bytes"}
    )


def test_the_state_of_the_machine_is_noted_before_and_after(
    tracker: Tracker, tmp_path: Path
) -> None:
    root = orin_nano(tmp_path)
    temperature = {"sys/class/thermal/thermal_zone1/temp": 61000}

    report = bench(tracker, FRAMES, BBOX, root=root, on_pass=lambda _: write(root, temperature))

    assert report.before is not None
    assert report.after is not None
    assert report.before.temperatures_c["gpu-thermal"] == 50.125
    assert report.after.temperatures_c["gpu-thermal"] == 61.0
    assert report.as_dict()["after"]["power_mode"] == {"index": 1, "name": "25W"}


def test_energy_per_frame_is_power_over_frames_per_second(tracker: Tracker, tmp_path: Path) -> None:
    root = orin_nano(tmp_path)
    names: list[str] = []

    energy = bench(tracker, FRAMES, BBOX, energy_s=0.2, root=root, on_pass=names.append).energy

    assert names[4:] == [
        *("power when idle", "energy exit 0", "energy exit 1", "energy exit 2"),
        "energy operating point",
    ]
    assert energy is not None
    assert energy.total_rails == ("VDD_IN",)
    assert energy.idle_mw == pytest.approx(4968.0)
    for row in (*energy.exits, energy.overall):
        assert row.num_frames % NUM_UPDATES == 0
        # 4,968 mW for what an update takes, of which all is idle power on this recorded machine.
        longest_mj = 4968.0 * 0.25 / row.num_frames
        assert row.total_mj == row.rails_mj["VDD_IN"]
        assert 0 < row.total_mj < longest_mj * 2
        assert row.rails_mj["VDD_SOC"] == pytest.approx(row.total_mj * 1488 / 4968)
        assert row.above_idle_mj == pytest.approx(0.0, abs=1e-6 * row.total_mj)


def test_energy_above_idle_is_what_updates_add(tracker: Tracker, tmp_path: Path) -> None:
    root = orin_nano(tmp_path)
    current = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr1_input"

    def on_pass(name: str) -> None:
        current.write_text("1000" if name == "power when idle" else "3000")

    energy = bench(tracker, FRAMES, BBOX, energy_s=0.1, root=root, on_pass=on_pass).energy

    assert energy is not None
    row = energy.overall
    assert row.total_mj is not None
    assert row.above_idle_mj == pytest.approx(row.total_mj * 2 / 3, rel=0.01)


def test_energy_without_sensors_is_unknown_at_once(tracker: Tracker, nowhere: Path) -> None:
    began = time.perf_counter()

    energy = bench(tracker, FRAMES, BBOX, energy_s=30.0, root=nowhere).energy

    assert time.perf_counter() - began < 10
    assert energy is not None
    assert (energy.total_rails, energy.idle_mw) == ((), None)
    assert energy.overall.total_mj is None
    assert len(energy.exits) == 3


def test_a_rail_that_falls_silent_makes_the_total_unknown(tracker: Tracker, tmp_path: Path) -> None:
    root = orin_nano(tmp_path)
    current = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr1_input"

    energy = bench(
        tracker, FRAMES, BBOX, energy_s=0.05, root=root, on_pass=lambda _: current.write_text("-1")
    ).energy

    assert energy is not None
    assert energy.overall.total_mj is None
    assert energy.overall.rails_mj["VDD_SOC"] is not None
    assert "power" not in {thread.name for thread in threading.enumerate()}


def test_report_keeps_its_face(tracker: Tracker, nowhere: Path) -> None:
    report = bench(tracker, FRAMES, BBOX, root=nowhere)

    assert isinstance(report, BenchReport)
    assert list(report.as_dict()) == [
        *("overall", "fps", "exit_histogram", "exits", "stages_ms", "peak_memory_mb", "setup")
    ]
