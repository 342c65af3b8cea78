"""``edgetrack calibrate``, as a person meets it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from command_line import edgetrack

from edgetrack.bundle import Bundle
from edgetrack.cli.calibrate import calibrate
from edgetrack.data.synthetic import render_clip, write_clip
from edgetrack.quantize.cache import CalibrationCache


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos with truth beside them, one without, and black pictures."""
    folder = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("car", "dog", "bare")):
        clip = render_clip(num_frames=12, width=160, height=120, seed=seed)
        truth = write_clip(folder / f"{name}.mp4", clip)
        if name != "bare":
            np.savetxt(folder / f"{name}.txt", truth, "%.3f", ",")
    (folder / "black").mkdir()
    for index in range(12):
        cv2.imwrite(str(folder / "black" / f"{index}.png"), np.zeros((120, 160, 3), np.uint8))
    return folder


def only_cache(folder: Path) -> CalibrationCache:
    (file,) = folder.glob("*.json")
    return CalibrationCache.read(file)


@pytest.mark.slow
def test_several_sequences_make_one_cache_that_lists_their_frames(
    home: Path, small_bundle: Bundle, tmp_path: Path
) -> None:
    done = edgetrack(
        *("calibrate", small_bundle.path, "--frames", "car.mp4", "--frames", "dog.mp4"),
        *("--method", "max", "--limit", "7", "--output", tmp_path),
        cwd=home,
    )

    cache = only_cache(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{cache.file_name} from 12 crops" in done.stdout
    assert "warning: expected 200 crops or more, got 12" in done.stderr
    expected = [f"{name}/{k:06d}" for name in ("car", "dog") for k in range(1, 7)]
    assert [name for name, _ in cache.frames] == expected
    assert len({digest for _, digest in cache.frames}) == 12
    assert cache.method == "max"
    assert cache.tools.keys() >= {"numpy", "onnx", "onnxruntime"}
    cache.check(small_bundle)


@pytest.mark.slow
def test_sensitivity_ranks_plots_and_keeps_the_worst(
    home: Path, small_bundle: Bundle, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")

    done = edgetrack(
        *("calibrate", small_bundle.path, "--frames", "car.mp4", "--output", tmp_path),
        *("--sensitivity", "--max-loss", "0.002"),
        cwd=home,
    )

    cache = only_cache(tmp_path)
    worst = next(iter(cache.losses))
    picture = tmp_path / cache.file_name.replace(".json", ".png")
    assert done.returncode == 0, done.stderr
    assert worst in cache.float_layers
    assert len(cache.float_layers) < len(cache.losses)
    assert worst in done.stdout
    assert f"layers that stay in float: {len(cache.float_layers)}" in done.stdout
    assert cv2.imread(str(picture)).std() > 5


@pytest.mark.slow
def test_a_budget_alone_ranks_as_well(home: Path, small_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ("--frames", "car.mp4", "--max-loss", "1", "--output", tmp_path)

    edgetrack("calibrate", small_bundle.path, *options, cwd=home)

    assert only_cache(tmp_path).losses
    assert only_cache(tmp_path).float_layers == ()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.slow
def test_memory_stays_below_600_mb(home: Path, shipped_bundle: Bundle, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from edgetrack.cli import app\n"
        "app(standalone_mode=False)\n"
        "print(Path('/proc/self/status').read_text('utf-8'))\n"
    )
    frames = [option for name in ("car", "dog") * 4 for option in ("--frames", f"{name}.mp4")]
    options = [*frames, "--output", str(tmp_path)]

    done = subprocess.run(
        [sys.executable, "-c", code, "calibrate", str(shipped_bundle.path), *options],
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    )

    assert len(only_cache(tmp_path).frames) == 88
    # Not getrusage: its peak is also that of the process that started this one.
    peak_kb = int(done.stdout.split("VmHWM:")[1].split()[0])
    assert peak_kb < 600_000


@pytest.mark.slow
def test_more_crops_than_fit_are_thinned_evenly(
    home: Path, small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetrack.gate.evidence._MAX_CROPS", 10)
    frames = [str(home / name) for name in ("car.mp4", "dog.mp4", "car.mp4")]

    calibrate(small_bundle.path, frames=frames, output=tmp_path, method="max")

    seen = [f"{name}/{k:06d}" for name in ("car", "dog", "car") for k in range(1, 12)]
    assert [name for name, _ in only_cache(tmp_path).frames] == seen[::4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "expected a video or a folder, got none"),
        (("--frames", "bare.mp4"), "expected the target's box in its first frame, got none"),
        (("--frames", "none"), "got no such folder"),
        (("--frames", "car.mp4", "--limit", "5"), "expected at least 8 crops, better 200, got 4"),
        (("--frames", "car.mp4", "--method", "least"), "method: expected one of"),
        (("--frames", "black", "--bbox", "40,40,30,30"), "got 11 of one colour"),
        (("--frames", "bare.mp4", "--bbox", "900,900,30,30"), "expected a box that overlaps"),
    ],
)
def test_what_cannot_be_calibrated_on_is_told_and_nothing_is_written(
    home: Path, toy: Bundle, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done = edgetrack("calibrate", toy.path, *options, "--output", tmp_path / "out", cwd=home)

    assert done.returncode in (1, 2)
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    home: Path, toy: Bundle, tmp_path: Path
) -> None:
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "from edgetrack.cli import main\n"
        "main()\n"
    )
    options = ["--frames", "car.mp4", "--output", str(tmp_path / "out")]

    done = subprocess.run(
        [sys.executable, "-B", "-c", code, "calibrate", str(toy.path), *options],
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    assert "expected room and leave to write the calibration cache" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(home: Path, shipped_bundle: Bundle, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgetrack", "calibrate", str(shipped_bundle.path)]
    options = ["--frames", "car.mp4", "--sensitivity", "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        command + options, cwd=home, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_the_cache_that_was_written_is_json_with_a_version(
    home: Path, toy: Bundle, tmp_path: Path
) -> None:
    edgetrack("calibrate", toy.path, "--frames", "car.mp4", "--output", tmp_path, cwd=home)

    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text("utf-8"))["format_version"] == 1
