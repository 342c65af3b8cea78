"""The jobs of ``benchmarks/gpu`` run through, so that no GPU minute is lost to a bug in them."""

import json
import sys
from pathlib import Path

import pytest
from cpu_segments import EmulatedBackend

from edgetrack.bundle import Bundle

JOBS = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.mark.slow
def test_the_frame_graph_job_measures_everything(
    shipped_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(JOBS))
    import frame_graph

    job = frame_graph.Job(
        EmulatedBackend(),
        shipped_bundle,
        precision=None,
        num_frames=4,
        num_warm_up=1,
        soak_frames=12,
        reference="onnxruntime",
        peak_tflops=1.0,
        peak_gbps=10.0,
    )
    job.clip = job.clip[:20]

    content = frame_graph.run(job, tmp_path / "out" / "result.json", setup={"device": "emulated"})

    assert json.loads((tmp_path / "out" / "result.json").read_text("utf-8")) == content
    assert not {k: v for k, v in content.items() if "error" in v}
    agreement = content["agreement"]
    assert agreement["device_equals_host"]
    assert agreement["flag_equals_host"]
    assert agreement["exits_equal_share"] == 1
    assert len(content["latency"]) == 3 * 3 * 2
    assert {row["segment"] for row in content["roofline"]} == {f"segment_{k}" for k in range(3)}
    skipping = content["skipping"]
    assert skipping["saturated_ms"].keys() == {"device", "flag", "host"}
    assert all(ms > 0 for ms in skipping["saturated_ms"].values())
    needed_ms = skipping["crop_and_segment_0_ms"]
    assert skipping["ratio"] == skipping["saturated_ms"]["device"] / needed_ms
    assert content["soak"]["num_frames"] == 12
    assert all(content["soak"][when]["process_used_mib"] > 0 for when in ("before", "after"))
    sys.modules.pop("frame_graph")
