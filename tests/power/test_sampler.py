import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jetson_trees import orin_nano, write

from edgetrack.power import PowerSampler, read_power_mw


def sampling_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "power"]


def test_energy_of_a_steady_rail_is_power_times_time() -> None:
    with PowerSampler(lambda: {"VDD_IN": 4000.0}, interval_ms=10) as sampler:
        start = sampler.mark()
        time.sleep(0.1)
        end = sampler.mark()

    seconds = end.began_s - start.ended_s
    assert seconds >= 0.1
    assert sampler.energy_mj(start, end) == pytest.approx({"VDD_IN": 4000.0 * seconds})
    assert sampler.mean_mw(start, end) == pytest.approx({"VDD_IN": 4000.0})


def test_energy_of_a_rising_rail_is_its_integral() -> None:
    began = time.perf_counter()
    with PowerSampler(lambda: {"r": 1e4 * (time.perf_counter() - began)}) as sampler:
        time.sleep(0.05)
        start = sampler.mark()
        time.sleep(0.2)
        end = sampler.mark()

    t0, t1 = start.ended_s - began, end.began_s - began
    assert sampler.energy_mj(start, end)["r"] == pytest.approx(1e4 * (t1**2 - t0**2) / 2, rel=0.01)


def test_what_happens_between_marks_is_seen_in_the_background(tmp_path: Path) -> None:
    current = {"sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr1_input": 3000}
    orin_nano(tmp_path)
    with PowerSampler(lambda: read_power_mw(tmp_path), interval_ms=10) as sampler:
        start = sampler.mark()
        time.sleep(0.2)
        changed_s = time.perf_counter()
        write(tmp_path, current)
        time.sleep(0.2)
        end = sampler.mark()

    expected = 4968 * (changed_s - start.ended_s) + 3 * 4968 * (end.began_s - changed_s)
    # The step lies between two samples, and a busy machine may be late with one.
    assert sampler.energy_mj(start, end)["VDD_IN"] == pytest.approx(expected, rel=0.15)


def test_times_outside_the_marks_do_not_count() -> None:
    power = {"r": 50_000.0}
    with PowerSampler(lambda: dict(power), interval_ms=10) as sampler:
        time.sleep(0.05)
        power["r"] = 1000.0
        start = sampler.mark()
        time.sleep(0.1)
        end = sampler.mark()
        power["r"] = 50_000.0
        time.sleep(0.05)

    seconds = end.began_s - start.ended_s
    assert sampler.energy_mj(start, end)["r"] == pytest.approx(1000.0 * seconds)


def test_the_time_that_reading_takes_counts_neither_before_nor_after() -> None:
    def read_slowly() -> dict[str, float]:
        time.sleep(0.03)
        return {"r": 1000.0}

    with PowerSampler(read_slowly, interval_ms=100) as sampler:
        start = sampler.mark()
        began = time.perf_counter()
        time.sleep(0.02)
        seconds = time.perf_counter() - began
        end = sampler.mark()

    assert sampler.energy_mj(start, end)["r"] == pytest.approx(1000.0 * seconds, rel=0.05)


def test_an_idle_baseline_is_left_out() -> None:
    readings = {"a": 5000.0, "b": 700.0}
    with PowerSampler(lambda: readings, interval_ms=10) as sampler:
        start = sampler.mark()
        time.sleep(0.05)
        end = sampler.mark()

    seconds = end.began_s - start.ended_s
    above = sampler.energy_mj(start, end, idle_mw={"a": 3000.0, "b": None})
    assert above == {"a": pytest.approx(2000.0 * seconds), "b": None}


def test_unknown_readings_are_bridged_and_an_unknown_rail_stays_unknown() -> None:
    turns: Iterator[int] = iter(range(10**6))

    def read() -> dict[str, float | None]:
        is_odd = next(turns) % 2
        return {
            "flaky": None if is_odd else 2000.0,
            "never": None,
            **({"late": 1.0} if is_odd else {}),
        }

    with PowerSampler(read, interval_ms=10) as sampler:
        start = sampler.mark()
        time.sleep(0.15)
        end = sampler.mark()

    energies = sampler.energy_mj(start, end)
    seconds = end.began_s - start.ended_s
    assert energies["flaky"] == pytest.approx(2000.0 * seconds)
    assert energies["never"] is None
    assert energies.keys() == {"flaky", "never", "late"}


def test_a_machine_without_rails_has_no_energy() -> None:
    with PowerSampler(dict) as sampler:
        start = sampler.mark()
        end = sampler.mark()

    assert sampler.energy_mj(start, end) == sampler.mean_mw(start, end) == {}


def test_a_counter_is_better_than_samples() -> None:
    counts = iter([10_000.0, 10_250.0, 7.0])
    with PowerSampler(
        lambda: {"GPU board": 99_000.0}, read_energy_mj=lambda: {"GPU board": next(counts)}
    ) as sampler:
        start = sampler.mark()
        time.sleep(0.05)
        end = sampler.mark()
        after_a_reset = sampler.mark()

    assert sampler.energy_mj(start, end) == {"GPU board": 250.0}
    assert sampler.energy_mj(end, after_a_reset)["GPU board"] != pytest.approx(-10_243.0)


def test_sampling_ends_with_the_block_also_after_an_error() -> None:
    def fail_while_sampling() -> None:
        with PowerSampler(dict):
            assert sampling_threads() == ["power"]
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_sampling()

    assert sampling_threads() == []


@pytest.mark.parametrize("interval_ms", [0, 9.9, 101, float("nan")])
def test_an_interval_out_of_range_is_refused(interval_ms: float) -> None:
    with pytest.raises(ValueError, match=r"^interval_ms: expected 10 to 100, got"):
        PowerSampler(dict, interval_ms=interval_ms)
