"""Quantise graphs with NVIDIA ModelOpt, for ``bench_quantization.py --modelopt``.

    python benchmarks/modelopt_graphs.py FOLDER

Runs in an environment of its own with ``nvidia-modelopt[onnx]``, which pins other versions of the
packages that edgetrack uses; so it imports nothing of edgetrack. FOLDER holds ``<graph>.onnx`` and
``<graph>.npz``, the inputs to calibrate on stacked along the batch; ``<graph>.quantized.onnx`` is
written beside them.
"""

import sys
from pathlib import Path

import numpy as np
from modelopt.onnx.quantization import quantize


def main() -> None:
    for graph in sorted(Path(sys.argv[1]).glob("*.onnx")):
        quantize(
            str(graph),
            quantize_mode="int8",
            calibration_data=dict(np.load(graph.with_suffix(".npz"))),
            calibration_method="max",
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=str(graph.with_suffix(".quantized.onnx")),
            log_level="ERROR",
        )


if __name__ == "__main__":
    main()
