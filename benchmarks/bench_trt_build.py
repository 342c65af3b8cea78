"""All segments of `tiny` and `base` as FP16 TensorRT-RTX engines: build times, sizes, kernels.

    python benchmarks/bench_trt_build.py

Needs edgetrack[train] and tensorrt-rtx, no GPU. `tiny` is the bundle that ships; `base` has random
weights, since none ship: times and plans do not depend on them.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import edgetrack
from edgetrack.backends.ort import cpu_name
from edgetrack.backends.trt.layer_table import read_layer_table
from edgetrack.export import export_bundle
from edgetrack.models.registry import create_model


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = export_bundle(
            create_model("early_exit_vit-base"),
            Path(folder) / "base",
            name="early_exit_vit-base",
            operating_points={"balanced": (0.3, 0.3)},
            operating_point="balanced",
            provenance={},
            licence="random weights",
        )
        models = {
            bundle.name: build_rows(bundle, Path(folder) / "engines")
            for bundle in (edgetrack.Bundle.load(), base)
        }
    report = {"device": f"built on {cpu_name()}, no GPU", "precision": "fp16", "models": models}
    path = Path(__file__).parent / "results" / "trt_build-portable-tensorrt_rtx-fp16.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(
        "model                 graph        build s  size MB  kernels  fused MHA  products  in FP32"
    )
    for name, rows in models.items():
        for graph, row in rows.items():
            print(
                f"{name:21s} {graph:12s} {row['build_s']:7.2f} {row['size_mb']:8.2f} "
                f"{row['kernels']:8d} {row['fused_attentions']:10d} {row['products']:9d} "
                f"{row['float_products']:8d}"
            )


def build_rows(bundle: edgetrack.Bundle, output: Path) -> dict[str, dict[str, Any]]:
    engines = edgetrack.build(bundle, backend="tensorrt-rtx", precision="fp16", output=output)
    rows = {}
    for name, graph in engines.graphs.items():
        table = read_layer_table(engines.path / graph.file)
        rows[name] = {
            "build_s": graph.build_s,
            "size_mb": graph.size_bytes / 1e6,
            "kernels": len(table),
            "fused_attentions": sum(row.is_attention for row in table),
            "products": sum(row.is_product for row in table),
            "float_products": sum(row.is_product and row.precision == "Float" for row in table),
        }
    return rows


if __name__ == "__main__":
    main()
