"""The gate where engines run on a device: timed where the host decides, compared in its memory."""

import dataclasses
import shutil
from pathlib import Path

from cpu_segments import EmulatedBackend, EmulatedSegment
from emulator.hooks import EmulatedDriver

from edgetrack.backends.engine import EngineSet
from edgetrack.build import build
from edgetrack.bundle import Bundle, GraphSpec
from edgetrack.data.target_clips import render_target_clips
from edgetrack.gate import gather, settle
from edgetrack.quantize.cache import load_cache


class Loading(EmulatedBackend):
    """The emulated device with ONNX Runtime's engines in both precisions."""

    precisions = ("fp32", "int8")

    def load(self, engine_path: Path, graph: GraphSpec) -> EmulatedSegment:
        return EmulatedSegment(self._cpu.load(engine_path, graph), graph)


def for_the_device(engines: EngineSet, root: Path) -> EngineSet:
    """A copy of engines under the emulated backend's name."""
    key = dataclasses.replace(engines.key, backend=Loading.name)
    path = root / key.folder_name
    shutil.copytree(engines.path, path)
    copied = dataclasses.replace(engines, path=path, key=key, gate={}, operating_points={})
    copied.write()
    return copied


def test_engines_on_a_device_are_timed_and_compared(
    shipped_bundle: Bundle, emulated: EmulatedDriver, tmp_path: Path
) -> None:
    caches = shipped_bundle.path / "calibration"
    on_cpu = tmp_path / "cpu"
    built = build(
        shipped_bundle,
        backend="onnxruntime",
        precision="int8",
        calibration=caches,
        is_strict=True,
        output=on_cpu,
    )
    floats = for_the_device(build(shipped_bundle, backend="onnxruntime", output=on_cpu), tmp_path)
    clips = render_target_clips(num_clips=2, num_frames=9, first_seed=7)

    kept = settle(
        shipped_bundle,
        Loading(),
        for_the_device(built, tmp_path),
        cache=load_cache(shipped_bundle, caches),
        evidence=gather(shipped_bundle, clips),
        is_strict=True,
        build_floats=lambda: floats,
        on_step=lambda phase, fraction: None,
    )

    assert kept.gate["not_measured"] == ""
    for segment in shipped_bundle.segments:
        found = kept.gate["graphs"][segment.name]
        assert found["float_ms"] > 0
        assert found["int8_ms"] > 0
        assert 0.97 < found["box_iou"] < 1
    assert kept.gate["update_ms"].keys() == {"float", "chosen"}
    assert min(kept.gate["agreement"]["exits"].values()) > 0.9
