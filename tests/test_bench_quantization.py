"""``benchmarks/bench_quantization.py`` on two short rendered sequences."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgetrack.data.synthetic import render_clip

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_quantization.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("sequences")
    for seed in range(2):
        images = root / f"clip-{seed}" / "img"
        images.mkdir(parents=True)
        clip = list(render_clip(num_frames=10, width=320, height=240, seed=seed))
        for index, (frame, _) in enumerate(clip, 1):
            cv2.imwrite(str(images / f"{index:06d}.png"), frame)
        np.savetxt(images.parent / "groundtruth.txt", [box for _, box in clip], "%.3f", ",")
    spec = importlib.util.spec_from_file_location("bench_quantization", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.NUM_BLOCKS, bench.BLOCK = 2, 2

    bench.main([str(root), "--track", "1", "--output", str(root / "report.json")])

    content: dict[str, Any] = json.loads((root / "report.json").read_text("utf-8"))
    return content


@pytest.mark.slow
def test_int8_is_told_beside_fp32(report: dict[str, Any]) -> None:
    fp32, int8 = report["rows"]["fp32"], report["rows"]["int8"]

    assert report["num_crops"] == 18
    assert fp32["exit_agreement"] == 1
    assert min(int8["iou_per_exit"]) > 0.97
    assert int8["bytes"] <= 0.35 * fp32["bytes"]
    assert len(int8["ms_per_graph"]) == len(report["graphs"]) == 4
    assert all(value > 0 for value in int8["ms_per_graph"])


@pytest.mark.slow
def test_closed_loop_tells_auc_and_times_of_both(report: dict[str, Any]) -> None:
    for name in ("fp32", "int8"):
        found = report["closed_loop"][name]
        assert found["auc_per_sequence"].keys() == {"clip-0", "clip-1"}
        assert found["auc_mean"] == pytest.approx(np.mean(found["auc_per_start"]))
        assert 0 < found["update_ms"]["p10"] <= found["update_ms"]["p90"]
        assert sum(found["exit_shares"]) == pytest.approx(1)
