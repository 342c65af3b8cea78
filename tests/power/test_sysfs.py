import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from jetson_trees import agx_orin, orin_nano, thor, write, write_ina3221, xavier_nx

from edgetrack.power import (
    PowerMode,
    find_rails,
    parse_power_mode,
    read_clocks,
    read_power_mode,
    read_power_mw,
    read_temperatures_c,
)


def test_rails_of_an_orin_nano(tmp_path: Path) -> None:
    power_mw = read_power_mw(orin_nano(tmp_path))

    assert power_mw == {"VDD_IN": 4968.0, "VDD_CPU_GPU_CV": 992.0, "VDD_SOC": 1488.0}


def test_rails_of_an_agx_orin_come_from_two_chips_without_what_is_not_connected(
    tmp_path: Path,
) -> None:
    assert read_power_mw(agx_orin(tmp_path)) == pytest.approx(
        {
            **{"VDD_GPU_SOC": 3178.24, "VDD_CPU_CV": 794.88},
            **{"VIN_SYS_5V0": 3974.4, "VDDQ_VDD2_1V8AO": 794.88},
        }
    )


def test_rails_of_a_thor_include_its_input_and_one_that_cannot_be(tmp_path: Path) -> None:
    assert read_power_mw(thor(tmp_path)) == {
        **{"VDD_GPU": None, "VDD_CPU_SOC_MSS": 6000.0},
        **{"VIN_SYS_5V0": 6500.0, "VIN": 23000.0},
    }


def test_rails_of_jetpack_4_are_read_from_iio(tmp_path: Path) -> None:
    power_mw = read_power_mw(xavier_nx(tmp_path))

    assert power_mw == {"VDD_IN": 4012.0, "VDD_CPU_GPU_CV": 812.0, "VDD_SOC": 1340.0}


@pytest.mark.parametrize("value", [-1, "", "n/a", "nan", "inf", "0x10", "1 2", "\x00\xff"])
def test_a_rail_that_makes_no_sense_is_unknown_and_its_neighbour_is_not(
    tmp_path: Path, value: object
) -> None:
    write_ina3221(tmp_path, "1-0040", [("VDD_IN", 5000, value), ("VDD_SOC", 5000, 200)], hwmon=0)

    assert read_power_mw(tmp_path) == {"VDD_IN": None, "VDD_SOC": 1000.0}


def test_a_rail_is_read_anew_each_time(tmp_path: Path) -> None:
    (rail, *_) = find_rails(orin_nano(tmp_path))
    folder = tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    assert rail.read_mw() == 4968.0

    write(folder, {"curr1_input": 2000})
    assert rail.read_mw() == 9936.0

    (folder / "curr1_input").unlink()
    assert rail.read_mw() is None


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Be a user whom files can be kept from."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_what_may_not_be_read_is_unknown() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        root = orin_nano(Path(folder))
        for pattern in ("**/curr1_input", "**/temp", "**/scaling_cur_freq", "**/nvpmodel.conf"):
            for file in root.glob(pattern):
                file.chmod(0)
        (root / "sys/class/devfreq").chmod(0)
        root.chmod(0o755)

        with as_nobody():
            clocks, power_mw = read_clocks(root), read_power_mw(root)
            temperatures_c, mode = read_temperatures_c(root), read_power_mode(root)
        (root / "sys/class/devfreq").chmod(0o755)

    assert power_mw == {"VDD_IN": None, "VDD_CPU_GPU_CV": 992.0, "VDD_SOC": 1488.0}
    assert temperatures_c == {"cpu-thermal": None, "gpu-thermal": None, "cv0-thermal": None}
    assert (clocks["cpu"].now_mhz, clocks["cpu"].highest_mhz) == (None, 1344.0)
    assert "gpu" not in clocks
    assert mode == PowerMode(index=1, name=None)


def test_a_sensor_that_asks_to_come_again_is_unknown(tmp_path: Path) -> None:
    orin_nano(tmp_path)
    temp = tmp_path / "sys/class/thermal/thermal_zone0/temp"
    temp.unlink()
    os.mkfifo(temp)
    writer = os.open(temp, os.O_RDWR | os.O_NONBLOCK)  # a pipe that is empty answers EAGAIN

    try:
        assert read_temperatures_c(tmp_path)["cpu-thermal"] is None
    finally:
        os.close(writer)


def test_a_folder_where_a_file_should_be_is_unknown(tmp_path: Path) -> None:
    write_ina3221(tmp_path, "1-0040", [("VDD_IN", 5000, 100)], hwmon=0)
    file = tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon0/curr1_input"
    file.unlink()
    file.mkdir()

    assert read_power_mw(tmp_path) == {"VDD_IN": None}


def test_a_machine_without_any_of_it_says_nothing(tmp_path: Path) -> None:
    assert read_power_mode(tmp_path) is None
    assert read_clocks(tmp_path) == read_temperatures_c(tmp_path) == read_power_mw(tmp_path) == {}


def test_clocks_that_follow_the_load(tmp_path: Path) -> None:
    clocks = read_clocks(orin_nano(tmp_path))

    assert clocks.keys() == {"cpu", "gpu", "emc"}
    cpu, gpu = clocks["cpu"], clocks["gpu"]
    assert (cpu.now_mhz, cpu.lowest_mhz, cpu.highest_mhz) == (1344.0, 729.6, 1344.0)
    assert (gpu.now_mhz, gpu.lowest_mhz, gpu.highest_mhz) == (306.0, 306.0, 918.0)
    assert (cpu.is_fixed, gpu.is_fixed) == (False, False)


def test_clocks_after_jetson_clocks_are_fixed(tmp_path: Path) -> None:
    clocks = read_clocks(orin_nano(tmp_path, is_fixed=True))

    assert (clocks["cpu"].is_fixed, clocks["gpu"].is_fixed) == (True, True)
    assert clocks["gpu"].now_mhz == 918.0


def test_one_cluster_that_follows_the_load_is_enough(tmp_path: Path) -> None:
    orin_nano(tmp_path, is_fixed=True)
    policy = "sys/devices/system/cpu/cpufreq/policy4/scaling_min_freq"

    assert read_clocks(write(tmp_path, {policy: 729600}))["cpu"].is_fixed is False
    assert read_clocks(write(tmp_path, {policy: "?"}))["cpu"].is_fixed is None


def test_parts_of_a_gpu_have_clocks_of_their_own(tmp_path: Path) -> None:
    clocks = read_clocks(thor(tmp_path))

    assert clocks.keys() == {"gpu-gpc-0", "gpu-nvd-0"}
    assert clocks["gpu-gpc-0"].now_mhz == 0.0
    assert clocks["gpu-gpc-0"].is_fixed is False


def test_the_memory_clock_has_a_cap_for_all_and_a_rate_for_root(tmp_path: Path) -> None:
    emc = read_clocks(orin_nano(tmp_path))["emc"]
    assert (emc.now_mhz, emc.highest_mhz, emc.is_fixed) == (None, 2133.0, None)

    folder = "sys/kernel/debug/bpmp/debug/clk/emc"
    files = {"rate": 3199000000, "min_rate": 204000000, "max_rate": 3199000000}
    write(tmp_path / folder, {**files, "mrq_rate_locked": 1})
    write(tmp_path, {"sys/kernel/nvpmodel_clk_cap/emc": 0})  # no cap
    emc = read_clocks(tmp_path)["emc"]
    assert (emc.now_mhz, emc.lowest_mhz, emc.highest_mhz) == (3199.0, 204.0, 3199.0)
    assert emc.is_fixed is True


def test_temperatures_of_units_that_sleep_are_unknown(tmp_path: Path) -> None:
    assert read_temperatures_c(orin_nano(tmp_path / "nano")) == {
        **{"cpu-thermal": 49.468, "gpu-thermal": 50.125},
        "cv0-thermal": None,
    }
    assert read_temperatures_c(thor(tmp_path / "thor")) == {
        **{"tj-thermal": 55.1, "gpu-thermal": None}
    }


def test_of_zones_with_one_name_the_hottest_counts(tmp_path: Path) -> None:
    for zone, value in enumerate((-256000, 40000, 61000, 50000)):
        folder = f"sys/class/thermal/thermal_zone{zone}"
        write(tmp_path, {f"{folder}/type": "acpitz", f"{folder}/temp": value})

    assert read_temperatures_c(tmp_path) == {"acpitz": 61.0}


@pytest.mark.parametrize(
    ("answer", "mode"),
    [
        ("NV Power Mode: MAXN\n0\n", PowerMode(index=0, name="MAXN")),
        ("NV Fan Mode:quiet\nNV Power Mode: MODE_15W\n2", PowerMode(index=2, name="MODE_15W")),
        ("NVPM: Current mode: NV Power Mode: 25W\n1\nNVPM:", PowerMode(index=1, name="25W")),
        ("NV Power Mode: 15W\n", PowerMode(index=None, name="15W")),
        ("NV Power Mode: \n", None),
        ("NVPM ERROR: failed to read PARAM", None),
        ("", None),
    ],
)
def test_the_answer_of_nvpmodel(answer: str, mode: PowerMode | None) -> None:
    assert parse_power_mode(answer) == mode


def test_the_power_mode_is_read_from_nvpmodels_files(tmp_path: Path) -> None:
    orin_nano(tmp_path)
    assert read_power_mode(tmp_path) == PowerMode(index=1, name="25W")

    write(tmp_path, {"var/lib/nvpmodel/status": "pmode:0007"})
    assert read_power_mode(tmp_path) == PowerMode(index=7, name=None)


def test_where_no_mode_was_set_nvpmodel_is_asked_and_then_the_default_holds(tmp_path: Path) -> None:
    orin_nano(tmp_path)
    (tmp_path / "var/lib/nvpmodel/status").unlink()
    assert read_power_mode(tmp_path) == PowerMode(index=0, name="15W")

    program = tmp_path / "usr/sbin/nvpmodel"
    write(
        tmp_path,
        {"usr/sbin/nvpmodel": '#!/bin/sh\n[ "$1" = -q ] && echo NV Power Mode: 7W; echo 3'},
    )
    program.chmod(0o755)
    assert read_power_mode(tmp_path) == PowerMode(index=3, name="7W")

    program.chmod(0o644)
    assert read_power_mode(tmp_path) == PowerMode(index=0, name="15W")
