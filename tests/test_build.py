import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_bundle import write_toy_bundle

from edgetrack.backends import get_backend
from edgetrack.backends.engine import SIDECAR_NAME, EngineKey, EngineSet, find_engines
from edgetrack.backends.trt.layer_table import read_layer_table
from edgetrack.boxes import iou_xywh
from edgetrack.build import BuildProgress, build
from edgetrack.bundle import Bundle, sha256_of
from edgetrack.data.synthetic import render_clip
from edgetrack.errors import (
    BackendUnavailableError,
    BundleTamperedError,
    CalibrationError,
    EngineBuildError,
    EngineMismatchError,
)
from edgetrack.tracker import Tracker

# Builds, and stops at the third graph: says so and waits until it is killed or the file is there.
STOPPING_BUILD = """
import sys, time
from pathlib import Path
from edgetrack.build import build
go_on = Path(sys.argv[3])
def stop_at_third(progress):
    if progress.index == 2 and not go_on.exists():
        print("stopped", flush=True)
        while not go_on.exists():
            time.sleep(0.01)
build(sys.argv[1], output=sys.argv[2], force=len(sys.argv) > 4, on_progress=stop_at_third)
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_toy_bundle(tmp_path / "toy")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "engines"


def key_of(bundle: Bundle) -> EngineKey:
    return get_backend("onnxruntime").key(
        model=bundle.name, bundle_digest=bundle.digest, precision="fp32"
    )


def found(bundle: Bundle, output: Path) -> EngineSet | None:
    return find_engines(output, key_of(bundle), graphs=[g.name for g in bundle.graphs])


def start_stopping_build(bundle: Bundle, output: Path, *extra: str) -> "subprocess.Popen[str]":
    arguments = [bundle.path, output, output.parent / "go_on", *extra]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPING_BUILD, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"
    return process


def kill(process: "subprocess.Popen[str]", how: signal.Signals) -> str:
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    return stderr


def folders(output: Path) -> list[str]:
    return sorted(p.name for p in output.iterdir() if p.is_dir())


def test_all_graphs_are_compiled_and_recorded(bundle: Bundle, output: Path) -> None:
    engines = build(bundle, output=output)

    assert engines.path == output / key_of(bundle).folder_name
    assert list(engines.graphs) == [g.name for g in bundle.graphs]
    for graph in engines.graphs.values():
        file = engines.path / graph.file
        assert graph.size_bytes == file.stat().st_size > 0
        assert graph.sha256 == sha256_of(file)
        assert graph.build_s > 0
    assert EngineSet.read(engines.path) == engines


def test_a_bundle_may_be_given_by_its_folder(bundle: Bundle, output: Path) -> None:
    assert build(bundle.path, output=output) == found(bundle, output)


def test_a_second_build_finds_all_up_to_date(bundle: Bundle, output: Path) -> None:
    first = build(bundle, output=output)
    progress: list[BuildProgress] = []

    second = build(bundle, output=output, on_progress=progress.append)

    assert second == first
    assert progress == []


def test_finding_all_up_to_date_imports_nothing_heavy(bundle: Bundle, output: Path) -> None:
    build(bundle, output=output)
    script = (
        "import sys; from edgetrack.build import build; build(sys.argv[1], output=sys.argv[2])\n"
        "print(*{'onnx', 'onnxruntime', 'torch', 'cv2', 'tensorrt_rtx'} & set(sys.modules))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, bundle.path, output],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == []


def test_force_builds_again(bundle: Bundle, output: Path) -> None:
    build(bundle, output=output)
    progress: list[BuildProgress] = []

    build(bundle, output=output, force=True, on_progress=progress.append)

    assert {p.graph for p in progress} == {g.name for g in bundle.graphs}
    assert folders(output) == [key_of(bundle).folder_name]


def test_progress_goes_through_the_graphs_in_order(bundle: Bundle, output: Path) -> None:
    progress: list[BuildProgress] = []

    build(bundle, output=output, on_progress=progress.append)

    places = [(p.index, p.fraction) for p in progress]
    assert places == sorted(places)
    assert [p.graph for p in progress if p.phase == "done"] == [g.name for g in bundle.graphs]
    assert {p.num_graphs for p in progress} == {4}


def test_another_bundle_has_its_own_engines(bundle: Bundle, output: Path) -> None:
    build(bundle, output=output)
    other = write_toy_bundle(bundle.path.with_name("other"), name="other")

    build(other, output=output)

    assert len(folders(output)) == 2


def edit_key(engines: EngineSet, **changes: Any) -> None:
    sidecar = engines.path / SIDECAR_NAME
    content = json.loads(sidecar.read_text(encoding="utf-8"))
    content["key"] |= changes
    sidecar.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("field", "value"),
    [("backend_version", "1.2.3"), ("device", "Cortex-A78AE"), ("precision", "int8")],
)
def test_engines_for_something_else_are_refused(
    bundle: Bundle, output: Path, field: str, value: str
) -> None:
    edit_key(build(bundle, output=output), **{field: value})

    with pytest.raises(EngineMismatchError, match=f"{field} .*, got '{value}'.*edgetrack build"):
        found(bundle, output)


def test_a_damaged_engine_is_refused_and_built_again(bundle: Bundle, output: Path) -> None:
    engines = build(bundle, output=output)
    (engines.path / engines.graphs["segment_1"].file).write_bytes(b"damaged")

    with pytest.raises(EngineMismatchError, match=r"for segment_1, got .*run: edgetrack build"):
        found(bundle, output)
    again = build(bundle, output=output)

    assert again.graphs["segment_1"].sha256 == engines.graphs["segment_1"].sha256


def test_engines_without_a_graph_are_refused_and_built_again(bundle: Bundle, output: Path) -> None:
    sidecar = build(bundle, output=output).path / SIDECAR_NAME
    content = json.loads(sidecar.read_text(encoding="utf-8"))
    del content["graphs"]["segment_1"]
    sidecar.write_text(json.dumps(content), encoding="utf-8")

    with pytest.raises(EngineMismatchError, match=r"none of \['segment_1'\]; run: .*--force"):
        found(bundle, output)
    again = build(bundle, output=output)

    assert list(again.graphs) == [g.name for g in bundle.graphs]
    assert found(bundle, output) == again


def test_a_damaged_sidecar_is_built_again(bundle: Bundle, output: Path) -> None:
    sidecar = build(bundle, output=output).path / SIDECAR_NAME
    content = json.loads(sidecar.read_text(encoding="utf-8"))
    content["graphs"]["segment_1"]["sha256"] = 5
    sidecar.write_text(json.dumps(content), encoding="utf-8")

    assert build(bundle, output=output) == found(bundle, output)


def test_a_killed_build_leaves_nothing_to_be_found(bundle: Bundle, output: Path) -> None:
    process = start_stopping_build(bundle, output)

    kill(process, signal.SIGKILL)

    assert found(bundle, output) is None
    assert all(name.startswith(".") for name in folders(output))


def test_the_next_build_removes_what_a_killed_one_left(bundle: Bundle, output: Path) -> None:
    kill(start_stopping_build(bundle, output), signal.SIGKILL)
    other = output / ".not-ours"
    other.mkdir()

    engines = build(bundle, output=output)

    assert folders(output) == [".not-ours", engines.path.name]


def test_ctrl_c_removes_what_was_begun(bundle: Bundle, output: Path) -> None:
    stderr = kill(start_stopping_build(bundle, output), signal.SIGINT)

    assert "KeyboardInterrupt" in stderr
    assert folders(output) == []


def test_a_killed_rebuild_leaves_the_engines_before_it(bundle: Bundle, output: Path) -> None:
    engines = build(bundle, output=output)

    kill(start_stopping_build(bundle, output, "force"), signal.SIGKILL)

    assert found(bundle, output) == engines


def test_a_build_waits_for_one_that_is_running(bundle: Bundle, output: Path) -> None:
    first = start_stopping_build(bundle, output)
    script = (
        "import sys; from edgetrack.build import build\n"
        "build(sys.argv[1], output=sys.argv[2], on_progress=lambda p: print('building'))"
    )
    second = subprocess.Popen(
        [sys.executable, "-c", script, bundle.path, output], stdout=subprocess.PIPE, text=True
    )

    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=1)
    (output.parent / "go_on").touch()
    first.communicate(timeout=60)
    stdout, _ = second.communicate(timeout=60)

    assert (first.returncode, second.returncode, stdout) == (0, 0, "")


def test_too_little_room_is_said_before_the_build(
    bundle: Bundle, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))

    with pytest.raises(EngineBuildError, match=r"expected \d+\.\d MB of free space.*--output"):
        build(bundle, output=output)

    assert folders(output) == []


def test_room_that_runs_out_in_a_build_is_the_same_error(bundle: Bundle, output: Path) -> None:
    def run_out(progress: BuildProgress) -> None:
        if progress.index == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(EngineBuildError, match=r"expected \d+\.\d MB of free space"):
        build(bundle, output=output, on_progress=run_out)

    assert folders(output) == []


def test_an_output_that_is_a_file_is_refused(bundle: Bundle, output: Path) -> None:
    output.write_text("", encoding="utf-8")

    with pytest.raises(EngineBuildError, match="expected a folder to write engines to"):
        build(bundle, output=output)


def test_a_bundle_that_was_tampered_with_is_not_built(bundle: Bundle, output: Path) -> None:
    bundle.graph_path(bundle.segments[1]).write_bytes(b"tampered")

    with pytest.raises(BundleTamperedError, match=r"segment_1\.onnx"):
        build(bundle, output=output)

    assert not output.exists()


def test_bad_arguments_are_refused_before_anything_is_written(bundle: Bundle, output: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="got 'openvino'"):
        build(bundle, backend="openvino", output=output)
    with pytest.raises(ValueError, match=r"'fp16'.*slower"):
        build(bundle, precision="fp16", output=output)

    assert not output.exists()


@pytest.mark.rtx
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason='needs tensorrt_rtx: pip install "edgetrack[tensorrt-rtx]"',
)
def test_tensorrt_rtx_builds_fp16_engines_by_default(bundle: Bundle, output: Path) -> None:
    engines = build(bundle, backend="tensorrt-rtx", output=output)

    assert engines.key.precision == "fp16"
    suffixes = {"".join(f.suffixes) for f in engines.path.iterdir()}
    assert suffixes == {".plan", ".layers.json", ".json"}
    assert build(bundle, backend="tensorrt-rtx", output=output) == engines


@pytest.mark.rtx
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason='needs tensorrt_rtx: pip install "edgetrack[tensorrt-rtx]"',
)
def test_tensorrt_rtx_builds_every_graph_of_the_bundle_that_ships(output: Path) -> None:
    bundle = Bundle.load()

    engines = build(bundle, backend="tensorrt-rtx", precision="fp16", output=output)

    assert list(engines.graphs) == [graph.name for graph in bundle.graphs]
    for graph in engines.graphs.values():
        rows = read_layer_table(engines.path / graph.file)
        assert {row.precision for row in rows if row.is_product} == {"Half"}


def test_int8_engines_are_built_from_the_bundles_own_cache_and_track_as_fp32_does(
    shipped_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no calibration/ here
    built = build(shipped_bundle, backend="onnxruntime", precision="int8", output=tmp_path / "e")
    (first, bbox), *clip = render_clip(num_frames=24, width=320, height=240, seed=4)
    boxes = {}
    for precision in ("fp32", "int8"):
        with Tracker(
            shipped_bundle, backend="onnxruntime", precision=precision, engines=tmp_path / "e"
        ) as tracker:
            tracker.init(first, bbox.tolist())
            boxes[precision] = np.array([tracker.update(frame).bbox for frame, _ in clip])

    assert built.key.precision == "int8"
    graphs = sum(shipped_bundle.graph_path(g).stat().st_size for g in shipped_bundle.graphs)
    assert sum(g.size_bytes for g in built.graphs.values()) < 0.45 * graphs
    assert not np.array_equal(boxes["int8"], boxes["fp32"])
    assert iou_xywh(boxes["int8"], boxes["fp32"]).mean() > 0.9
    assert [p.name for p in built.path.iterdir() if p.is_dir()] == []


def test_int8_without_a_cache_says_how_to_make_one(
    toy: Bundle, shipped_bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="make one with: edgetrack calibrate"):
        build(toy, backend="onnxruntime", precision="int8", output=tmp_path / "e")
    cache = next((shipped_bundle.path / "calibration").glob("*.json"))
    with pytest.raises(CalibrationError, match="expected one of toy"):
        build(
            toy, backend="onnxruntime", precision="int8", calibration=cache, output=tmp_path / "e"
        )
    assert not (tmp_path / "e").exists()


def test_the_committed_cache_and_the_shipped_one_are_the_same(shipped_bundle: Bundle) -> None:
    folders = (Path(__file__).parents[1] / "calibration", shipped_bundle.path / "calibration")
    first, second = ({f.name: f.read_bytes() for f in d.glob("*.json")} for d in folders)

    assert first == second
    assert len(first) == 1
