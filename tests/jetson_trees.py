"""File systems of Jetsons, as far as power, clocks and temperatures go, written into a folder.

Names, units and paths are those of L4T 32 (iio), 35, 36 and 38; what is switched off answers as
there: with nothing, -256 °C, an empty label, or "NC".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

I2C = "sys/devices/platform/bus@0/c240000.i2c/i2c-1"
NVPMODEL_CONF = """\
###########################
# < POWER_MODEL ID=id_num NAME=mode_name >
< PARAM TYPE=CLOCK NAME=GPU >
MAX_FREQ /sys/devices/platform/bus@0/17000000.gpu/devfreq_dev/max_freq
< POWER_MODEL ID=0 NAME=15W >
GPU MAX_FREQ 612000000
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=0 >
"""

Channel = tuple[str, object, object]  # label, millivolts, milliamperes


def write(root: Path, files: Mapping[str, object]) -> Path:
    """Write files by their path below ``root``, each ended by a line break."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{content}\n", encoding="utf-8")
    return root


def write_ina3221(root: Path, address: str, channels: Sequence[Channel], *, hwmon: int) -> None:
    """One monitor as the hwmon driver shows it, under a link as the kernel makes it."""
    folder = f"{I2C}/{address}/hwmon/hwmon{hwmon}"
    files: dict[str, object] = {f"{folder}/name": "ina3221", f"{folder}/curr4_input": 5}
    files |= {f"{folder}/in7_label": "sum of shunt voltages", f"{folder}/in7_input": 760}
    for channel, (label, millivolts, milliamperes) in enumerate(channels, 1):
        files[f"{folder}/in{channel}_label"] = label
        files[f"{folder}/in{channel}_input"] = millivolts
        files[f"{folder}/curr{channel}_input"] = milliamperes
    write(root, files)
    _link_driver(root, "ina3221", address)


def write_zones(root: Path, zones: Mapping[str, object]) -> None:
    """Thermal zones by their names, in thousandths of a degree."""
    for index, (name, value) in enumerate(zones.items()):
        folder = f"sys/class/thermal/thermal_zone{index}"
        write(root, {f"{folder}/type": name, f"{folder}/temp": value})


def orin_nano(root: Path, *, is_fixed: bool = False) -> Path:
    """An Orin Nano on JetPack 6 in its mode 25W."""
    lowest_hz, now_hz = (918000000, 918000000) if is_fixed else (306000000, 306000000)
    lowest_khz = 1344000 if is_fixed else 729600
    write_ina3221(
        root,
        "1-0040",
        [("VDD_IN", 4968, 1000), ("VDD_CPU_GPU_CV", 4960, 200), ("VDD_SOC", 4960, 300)],
        hwmon=1,
    )
    cpufreq, gpu = "sys/devices/system/cpu/cpufreq", "sys/class/devfreq/17000000.gpu"
    for policy, now_khz in ((0, lowest_khz), (4, 1344000)):
        write(
            root / f"{cpufreq}/policy{policy}",
            {
                "scaling_cur_freq": now_khz,
                "scaling_min_freq": lowest_khz,
                "scaling_max_freq": 1344000,
            },
        )
    write(root, {f"{gpu}/cur_freq": now_hz, f"{gpu}/min_freq": lowest_hz})
    write(root, {f"{gpu}/max_freq": 918000000, "sys/class/devfreq/15340000.vic/cur_freq": 115200})
    write(root, {"sys/kernel/nvpmodel_clk_cap/emc": 2133000000})
    write(root, {"etc/nvpmodel.conf": NVPMODEL_CONF, "var/lib/nvpmodel/status": "pmode:0001"})
    write_zones(root, {"cpu-thermal": 49468, "gpu-thermal": 50125, "cv0-thermal": ""})
    return root


def agx_orin(root: Path) -> Path:
    """The monitors of an AGX Orin: two chips, unused channels, DDR behind the 5 V rail."""
    write_ina3221(
        root,
        "1-0040",
        [("VDD_GPU_SOC", 19864, 160), ("VDD_CPU_CV", 19872, 40), ("VIN_SYS_5V0", 4968, 800)],
        hwmon=3,
    )
    write_ina3221(
        root, "1-0041", [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 4968, 160), ("", 0, 0)], hwmon=4
    )
    return root


def thor(root: Path) -> Path:
    """A Thor: the module's rails, the kit's input from another chip, a GPU in two parts, asleep."""
    write_ina3221(
        root,
        "2-0040",
        [("VDD_GPU", 12000, -30), ("VDD_CPU_SOC_MSS", 12000, 500), ("VIN_SYS_5V0", 5000, 1300)],
        hwmon=1,
    )
    write(root / I2C / "2-0044/hwmon/hwmon2", {"name": "ina238", "power1_input": 23_000_000})
    _link_driver(root, "ina238", "2-0044")
    for part in ("gpu-gpc-0", "gpu-nvd-0"):
        folder = f"sys/class/devfreq/{part}"
        write(root, {f"{folder}/cur_freq": 0, f"{folder}/min_freq": 315000000})
        write(root, {f"{folder}/max_freq": 1575000000})
    write_zones(root, {"tj-thermal": 55100, "gpu-thermal": -256000})
    return root


def xavier_nx(root: Path) -> Path:
    """The monitor of a Xavier NX on JetPack 4, whose driver gives power as it is."""
    write(
        root / "sys/bus/i2c/drivers/ina3221x/7-0040/iio:device0",
        {
            **{"rail_name_0": "VDD_IN", "in_power0_input": 4012, "in_voltage0_input": 4960},
            **{"rail_name_1": "VDD_CPU_GPU_CV", "in_power1_input": 812},
            **{"rail_name_2": "VDD_SOC", "in_power2_input": 1340},
        },
    )
    return root


def _link_driver(root: Path, driver: str, address: str) -> None:
    link = root / f"sys/bus/i2c/drivers/{driver}/{address}"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(root / I2C / address)
