"""INT8 builds end to end: calibrated, gated, out of date when what they stand on changes."""

import dataclasses
import importlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from toy_bundle import write_toy_bundle

from edgetrack.backends.engine import EngineSet
from edgetrack.backends.ort import OnnxRuntimeBackend
from edgetrack.build import BuildProgress, build
from edgetrack.bundle import Bundle, GraphSpec, sha256_of
from edgetrack.data.target_clips import TargetClip, render_target_clips
from edgetrack.errors import CalibrationError, DeviceError, EngineMismatchError
from edgetrack.quantize.cache import CalibrationCache, load_cache
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.tracker import Tracker

# Builds INT8 engines, and stops in the phase that begins with the word given: says so and waits.
STOPPING_BUILD = """
import sys, time
from edgetrack.build import build
from edgetrack.data.target_clips import render_target_clips
def stop(progress):
    if progress.phase.startswith(sys.argv[4]):
        print("stopped", flush=True)
        time.sleep(600)
clips = render_target_clips(num_clips=2, num_frames=8, first_seed=0)
build(sys.argv[1], backend="onnxruntime", precision="int8", output=sys.argv[2],
      calibration=sys.argv[3], calibration_clips=clips, on_progress=stop)
"""


class Absent(OnnxRuntimeBackend):
    """A backend that builds for a device which is not here."""

    def load(self, engine_path: Path, graph: GraphSpec) -> Any:
        raise DeviceError("CUDA: expected a device, got none; plug one in")


@pytest.fixture
def own_toy(tmp_path: Path) -> Bundle:
    return write_toy_bundle(tmp_path / "own")


@pytest.fixture(scope="module")
def clips() -> list[TargetClip]:
    return render_target_clips(num_clips=2, num_frames=8, first_seed=0)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def gated(shipped_bundle: Bundle, output: Path) -> EngineSet:
    """INT8 engines of the bundle that ships, from the cache that ships."""
    return build(
        shipped_bundle,
        backend="onnxruntime",
        precision="int8",
        calibration=shipped_bundle.path / "calibration",
        output=output,
    )


@pytest.fixture(scope="module")
def absurd_cache(shipped_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose ranges in one segment are a thousand times too large: it rounds all to zero."""
    cache = load_cache(shipped_bundle, shipped_bundle.path / "calibration")
    ranges = dict(cache.ranges)
    ranges["segment_1"] = {name: 1000 * value for name, value in ranges["segment_1"].items()}
    path = tmp_path_factory.mktemp("absurd") / "absurd.json"
    dataclasses.replace(cache, ranges=ranges).write(path)
    return path


def phases_of_a_build(
    bundle: Bundle, output: Path, calibration: Path, clips: Sequence[TargetClip] = ()
) -> list[str]:
    phases: list[str] = []
    build(
        bundle,
        backend="onnxruntime",
        precision="int8",
        calibration=calibration,
        calibration_clips=clips,
        output=output,
        on_progress=lambda progress: phases.append(progress.phase),
    )
    return phases


def folders(output: Path) -> list[str]:
    return sorted(p.name for p in output.iterdir() if p.is_dir())


def test_the_verdict_is_kept_beside_the_engines(gated: EngineSet, shipped_bundle: Bundle) -> None:
    read = EngineSet.read(gated.path)

    assert read == gated
    assert list(read.gate["graphs"]) == [graph.name for graph in shipped_bundle.graphs]
    for name, found in read.gate["graphs"].items():
        assert found["precision"] == read.graphs[name].precision
        assert found["int8_bytes"] < found["float_bytes"]
        assert 0 <= found["num_int8_products"] <= found["num_products"]
    for segment in shipped_bundle.segments:
        found = read.gate["graphs"][segment.name]
        assert found["float_ms"] > 0
        assert found["int8_ms"] > 0
        assert found["box_iou"] > 0.97
    assert read.gate["update_ms"]["chosen"] > 0
    assert min(read.gate["agreement"]["exits"].values()) > 0.95
    assert read.gate["num_crops"] == 96


def test_the_float_engines_it_was_compared_with_stay(gated: EngineSet, output: Path) -> None:
    assert len(folders(output)) == 2
    assert gated.path.name.startswith("early_exit_vit-tiny-int8-onnxruntime")
    progress: list[BuildProgress] = []
    build(backend="onnxruntime", output=output, on_progress=progress.append)
    assert progress == []


def test_the_tracker_runs_them_with_their_own_thresholds(
    gated: EngineSet, shipped_bundle: Bundle
) -> None:
    fitted = {name: (0.1 + k / 10, 0.2) for k, name in enumerate(shipped_bundle.operating_points)}
    engines = dataclasses.replace(gated, operating_points=fitted)
    engines.write()
    try:
        for name in (None, *fitted):
            with open_int8(shipped_bundle, gated.path.parent, operating_point=name) as tracker:
                point = name or shipped_bundle.operating_point
                assert tracker.exit_policy == ExitPolicy(fitted[point], shipped_bundle.criterion)
                assert tracker.engines_path == gated.path
        own = ExitPolicy((0.3, 0.3))
        with open_int8(shipped_bundle, gated.path.parent, exit_policy=own) as tracker:
            assert tracker.exit_policy == own
        with Tracker(shipped_bundle, backend="onnxruntime", engines=gated.path.parent) as tracker:
            assert tracker.exit_policy.thresholds == shipped_bundle.thresholds()
    finally:
        gated.write()


def open_int8(bundle: Bundle, engines: Path, **arguments: object) -> Tracker:
    return Tracker(bundle, backend="onnxruntime", precision="int8", engines=engines, **arguments)  # type: ignore[arg-type]


def test_the_tracker_refuses_thresholds_that_were_fitted_to_others(
    gated: EngineSet, shipped_bundle: Bundle
) -> None:
    moved = {**shipped_bundle.operating_points, "balanced": (0.3, 0.31)}
    bundle = dataclasses.replace(shipped_bundle, operating_points=moved)

    with pytest.raises(
        EngineMismatchError, match=r"\[0\.3, 0\.31\] on entropy of 'balanced', got .*build"
    ):
        open_int8(bundle, gated.path.parent)
    open_int8(bundle, gated.path.parent, operating_point="fast").close()


def test_a_segment_that_int8_harms_stays_in_float_and_is_loaded(
    gated: EngineSet, shipped_bundle: Bundle, absurd_cache: Path, output: Path, tmp_path: Path
) -> None:
    shutil.copytree(output, tmp_path / "e")

    engines = build(
        shipped_bundle,
        backend="onnxruntime",
        precision="int8",
        calibration=absurd_cache,
        output=tmp_path / "e",
    )

    floats = build(shipped_bundle, backend="onnxruntime", output=tmp_path / "e")
    assert engines.graphs["segment_1"] == floats.graphs["segment_1"]
    assert engines.graphs["segment_1"].precision == "fp32"
    assert engines.graphs["segment_2"].precision == "int8"
    assert sha256_of(engines.path / "segment_1.onnx") == floats.graphs["segment_1"].sha256
    assert "costs too much" in engines.gate["graphs"]["segment_1"]["reason"]
    assert "fp32 in segment_1" in engines.gate["sentence"]
    assert min(engines.gate["agreement"]["box_iou"]) > 0.97
    open_int8(shipped_bundle, tmp_path / "e").close()


def test_strict_keeps_int8_whatever_it_does(
    gated: EngineSet, shipped_bundle: Bundle, absurd_cache: Path, output: Path, tmp_path: Path
) -> None:
    shutil.copytree(output, tmp_path / "e")

    engines = build(
        shipped_bundle,
        backend="onnxruntime",
        precision="int8",
        calibration=absurd_cache,
        is_strict=True,
        output=tmp_path / "e",
    )

    assert {graph.precision for graph in engines.graphs.values()} == {"int8"}
    assert engines.gate["sentence"].startswith("INT8 in all graphs, as --strict asks")
    assert "less than the gate allows" in engines.gate["sentence"]
    assert engines.gate["agreement"]["box_iou"][1] < 0.9
    exits, unfitted = (engines.gate["agreement"][k] for k in ("exits", "exits_unfitted"))
    assert exits["balanced"] > unfitted["balanced"] + 0.1, "thresholds met the shifted entropy"
    assert engines.operating_points["balanced"] != shipped_bundle.operating_points["balanced"]


def test_clips_of_ones_own_are_calibrated_on_and_compared_on(
    toy: Bundle, clips: list[TargetClip], tmp_path: Path
) -> None:
    phases: list[str] = []
    engines = build(
        toy,
        backend="onnxruntime",
        precision="int8",
        calibration=tmp_path / "caches",
        calibration_clips=clips,
        output=tmp_path / "e",
        on_progress=lambda progress: phases.append(progress.phase),
    )

    (written,) = (tmp_path / "caches").glob("*.json")
    cache = CalibrationCache.read(written)
    assert [name for name, _ in cache.frames][:2] == ["rendered-0/000001", "rendered-0/000002"]
    assert engines.key.quantization is not None
    assert engines.key.quantization["calibration"] == written.name
    assert engines.gate["source"] == "rendered-0, rendered-1"
    assert engines.gate["num_crops"] == 14
    assert phases.index("calibrating") < phases.index("quantising all graphs")
    assert phases_of_a_build(toy, tmp_path / "e", tmp_path / "caches") == []


def test_heads_are_gated_and_what_carries_state_stays_in_float(
    toy_with_memory: Bundle, clips: list[TargetClip], tmp_path: Path
) -> None:
    engines = build(
        toy_with_memory,
        backend="onnxruntime",
        precision="int8",
        calibration=tmp_path / "caches",
        calibration_clips=clips,
        output=tmp_path / "e",
    )

    assert list(engines.gate["graphs"]) == [graph.name for graph in toy_with_memory.graphs]
    assert engines.gate["agreement"]["box_iou"] == pytest.approx([1, 1, 1], abs=0.01)
    graphs = engines.gate["graphs"]
    for k in range(3):
        assert graphs[f"head_{k}"]["float_ms"] > 0
        assert graphs[f"head_{k}"]["int8_ms"] > 0
        assert graphs[f"head_{k}"]["box_iou"] == pytest.approx(1, abs=0.01)
        assert graphs[f"segment_{k}"]["box_iou"] is None
    for name in ("template", "update"):
        assert engines.graphs[name].precision == "fp32"
        assert graphs[name]["reason"] == "what it carries from frame to frame is not compared"
    open_int8(toy_with_memory, tmp_path / "e").close()


def test_engines_that_were_not_measured_are_measured_once_a_device_is_there(
    toy_with_memory: Bundle,
    clips: list[TargetClip],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caches, output = tmp_path / "caches", tmp_path / "e"
    with monkeypatch.context() as absent:
        module = importlib.import_module("edgetrack.build")
        absent.setattr(module, "get_backend", lambda name, *, device: Absent())
        assert phases_of_a_build(toy_with_memory, output, caches, clips) != []
        assert phases_of_a_build(toy_with_memory, output, caches) == []
    (folder,) = output.glob("*-int8-*")
    blind = EngineSet.read(folder)

    assert "timing" in phases_of_a_build(toy_with_memory, output, caches)
    assert phases_of_a_build(toy_with_memory, output, caches) == []

    assert blind.gate["not_measured"].startswith("CUDA: expected a device")
    in_float = {n for n, graph in blind.graphs.items() if graph.precision == "fp32"}
    assert in_float == {"template", "update"}, "what they carry is not compared"
    assert blind.gate["graphs"]["update"]["float_bytes"] == blind.graphs["update"].size_bytes
    assert EngineSet.read(folder).gate["not_measured"] == ""
    strict = build(
        toy_with_memory,
        backend="onnxruntime",
        precision="int8",
        calibration=caches,
        is_strict=True,
        output=output,
    )
    assert {graph.precision for graph in strict.graphs.values()} == {"int8"}


def test_clips_that_were_not_compared_on_make_engines_out_of_date(
    toy: Bundle, clips: list[TargetClip], tmp_path: Path
) -> None:
    caches, output = tmp_path / "caches", tmp_path / "e"
    phases_of_a_build(toy, tmp_path / "elsewhere", caches, clips)
    assert "rendering" in phases_of_a_build(toy, output, caches)

    assert "timing" in phases_of_a_build(toy, output, caches, clips)

    again = phases_of_a_build(toy, output, caches, clips)
    assert set(again) == {"tracking to calibrate", "calibrating"}
    assert phases_of_a_build(toy, output, caches) == []


def test_force_builds_the_float_engines_as_well(
    toy: Bundle, clips: list[TargetClip], tmp_path: Path
) -> None:
    started: list[str] = []

    def note(progress: BuildProgress) -> None:
        if progress.phase == "starting":
            started.append(progress.graph)

    for _ in range(2):
        build(
            toy,
            backend="onnxruntime",
            precision="int8",
            calibration=tmp_path / "caches",
            calibration_clips=clips,
            output=tmp_path / "e",
            force=True,
            on_progress=note,
        )

    assert sorted(started) == sorted(4 * [graph.name for graph in toy.graphs])


def test_another_cache_other_thresholds_or_strictness_are_out_of_date(
    own_toy: Bundle, clips: list[TargetClip], tmp_path: Path
) -> None:
    caches, output = tmp_path / "caches", tmp_path / "e"
    first = build(
        own_toy,
        backend="onnxruntime",
        precision="int8",
        calibration=caches,
        calibration_clips=clips,
        output=output,
    )
    (path,) = caches.glob("*.json")
    other = tmp_path / "other.json"
    dataclasses.replace(CalibrationCache.read(path), percentile=99.0).write(other)

    assert phases_of_a_build(own_toy, output, path) == []
    assert phases_of_a_build(own_toy, output, other) != []
    assert phases_of_a_build(own_toy, output, other) == []
    assert folders(output) == sorted([first.path.name, float_folder(own_toy, output)])
    moved = dataclasses.replace(
        own_toy, operating_points={**own_toy.operating_points, "fast": (0.8, 0.8)}
    ).write()
    assert moved.digest == own_toy.digest
    assert phases_of_a_build(moved, output, other) != []
    assert phases_of_a_build(moved, output, other) == []


def float_folder(bundle: Bundle, output: Path) -> str:
    return build(bundle, backend="onnxruntime", output=output).path.name


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("phase", ["calibrating", "asking", "timing what"])
def test_a_build_that_is_stopped_leaves_nothing_half_done(
    toy: Bundle, tmp_path: Path, phase: str, how: signal.Signals
) -> None:
    output, caches = tmp_path / "e", tmp_path / "caches"
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPING_BUILD, toy.path, output, caches, phase],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"

    process.send_signal(how)
    process.communicate(timeout=60)

    assert list(caches.glob("*")) == [] or phase != "calibrating"
    done = [name for name in folders(output) if not name.startswith(".")] if output.exists() else []
    assert all("-fp32-" in name for name in done)
    if how == signal.SIGINT and output.exists():
        assert folders(output) == done


def test_a_disk_that_fills_up_leaves_what_was_there(
    shipped_bundle: Bundle, absurd_cache: Path, gated: EngineSet, output: Path, tmp_path: Path
) -> None:
    shutil.copytree(output, tmp_path / "e")
    script = (
        "import resource, sys; from edgetrack.build import build\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "build(backend='onnxruntime', precision='int8', calibration=sys.argv[1],"
        " output=sys.argv[2])"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, absurd_cache, tmp_path / "e"], capture_output=True, text=True
    )

    assert done.returncode == 1
    assert "expected" in done.stderr.splitlines()[-1]
    assert folders(tmp_path / "e") == folders(output)
    assert EngineSet.read(tmp_path / "e" / gated.path.name).key == gated.key


def test_arguments_for_int8_alone_are_refused_with_another_precision(
    toy: Bundle, clips: list[TargetClip], tmp_path: Path
) -> None:
    for arguments in ({"is_strict": True}, {"calibration_clips": clips}):
        with pytest.raises(ValueError, match="expected 'int8' with is_strict or calibration_clips"):
            build(toy, backend="onnxruntime", output=tmp_path / "e", **arguments)  # type: ignore[arg-type]

    assert not (tmp_path / "e").exists()


def test_a_cache_file_in_the_place_of_its_folder_is_refused(
    toy: Bundle, clips: list[TargetClip], tmp_path: Path
) -> None:
    (tmp_path / "cache.json").write_text("{}", encoding="utf-8")

    with pytest.raises(CalibrationError, match="expected a folder to write the new calibration"):
        build(
            toy,
            backend="onnxruntime",
            precision="int8",
            calibration=tmp_path / "cache.json",
            calibration_clips=clips,
            output=tmp_path / "e",
        )


def test_too_few_frames_are_refused_and_nothing_is_written(
    toy: Bundle, clips: list[TargetClip], tmp_path: Path
) -> None:
    def few() -> Iterator[object]:
        yield from list(clips[0].frames())[:3]

    with pytest.raises(CalibrationError, match=r"expected at least 8 crops.*got 2"):
        build(
            toy,
            backend="onnxruntime",
            precision="int8",
            calibration=tmp_path / "caches",
            calibration_clips=[TargetClip("few", clips[0].bbox, few)],  # type: ignore[arg-type]
            output=tmp_path / "e",
        )

    assert list(tmp_path.iterdir()) == []


@pytest.mark.rtx
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason='needs tensorrt_rtx: pip install "edgetrack[tensorrt-rtx]"',
)
def test_engines_that_do_not_run_here_keep_int8_and_fitted_thresholds(
    shipped_bundle: Bundle, tmp_path: Path
) -> None:
    from edgetrack.backends.cuda import find_cuda_device

    if find_cuda_device(0) is not None:
        pytest.skip("needs a machine without a GPU")
    engines = build(
        shipped_bundle,
        backend="tensorrt-rtx",
        precision="int8",
        calibration=shipped_bundle.path / "calibration",
        output=tmp_path / "e",
    )

    assert {graph.precision for graph in engines.graphs.values()} == {"int8"}
    assert folders(tmp_path / "e") == [engines.path.name]
    assert engines.gate["not_measured"].startswith("CUDA: expected NVIDIA's driver")
    assert "not timed, since engines do not run here" in engines.gate["sentence"]
    assert engines.operating_points.keys() == shipped_bundle.operating_points.keys()
    assert engines.gate["graphs"]["segment_1"]["num_int8_products"] > 10
    sidecar = json.loads((engines.path / "engines.json").read_text(encoding="utf-8"))
    assert sidecar["gate"]["graphs"]["segment_1"]["float_ms"] is None
