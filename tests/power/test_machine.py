import json
from pathlib import Path

import pytest
from jetson_trees import agx_orin, orin_nano, thor, write, xavier_nx

from edgetrack.power import read_machine_state, read_power_mw, total_mw, total_rails


@pytest.mark.parametrize(
    ("board", "rails", "milliwatts"),
    [
        (orin_nano, ("VDD_IN",), 4968.0),
        (xavier_nx, ("VDD_IN",), 4012.0),
        # VDDQ_VDD2_1V8AO hangs behind VIN_SYS_5V0 and must not count twice.
        (agx_orin, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 7947.52),
        (thor, ("VIN",), 23000.0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_a_board_draws(
    tmp_path: Path, board: object, rails: tuple[str, ...], milliwatts: float
) -> None:
    power_mw = read_power_mw(board(tmp_path))  # type: ignore[operator]  # a function of a folder

    assert total_rails(power_mw) == rails
    assert total_mw(power_mw) == pytest.approx(milliwatts)


def test_a_total_with_an_unknown_part_is_unknown() -> None:
    power_mw = {"VDD_GPU_SOC": 3000.0, "VDD_CPU_CV": None, "VIN_SYS_5V0": 4000.0}

    assert total_mw(power_mw) is None


def test_rails_of_an_unknown_board_have_no_total() -> None:
    assert total_rails(["VDD_SOC", "VDD_GPU"]) == ()
    assert total_mw({"VDD_SOC": 1.0, "VDD_GPU": 2.0}) is None
    assert total_mw({}) is None


def test_the_state_of_a_machine_is_json(tmp_path: Path) -> None:
    state = read_machine_state(orin_nano(tmp_path))

    assert json.loads(json.dumps(state.as_dict())) == state.as_dict()
    assert state.as_dict()["power_mode"] == {"index": 1, "name": "25W"}
    assert state.as_dict()["clocks"]["gpu"]["highest_mhz"] == 918.0


def test_clocks_that_follow_the_load_are_named(tmp_path: Path) -> None:
    assert read_machine_state(orin_nano(tmp_path / "a")).moving_clocks == ("cpu", "gpu")
    assert read_machine_state(orin_nano(tmp_path / "b", is_fixed=True)).moving_clocks == ()


def test_a_machine_that_says_nothing_is_not_known(tmp_path: Path) -> None:
    assert not read_machine_state(tmp_path).is_known
    assert not read_machine_state(
        write(tmp_path, {"sys/class/thermal/thermal_zone0/type": "cpu"})
    ).is_known

    assert read_machine_state(
        write(tmp_path, {"sys/class/thermal/thermal_zone0/temp": 50000})
    ).is_known
