import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded import record_inputs

from edgetrack.backends import get_backend
from edgetrack.backends.eager import (
    EagerBackend,
    TorchCudaBackend,
    torch_errors,
    without_tf32,
)
from edgetrack.bundle import Bundle
from edgetrack.errors import (
    BackendUnavailableError,
    CheckpointError,
    DeviceError,
    DeviceMemoryError,
    EngineError,
)
from edgetrack.runtime.buffers import allocate
from edgetrack.tracker import Tracker


def test_it_is_found_by_its_name() -> None:
    assert isinstance(get_backend("eager"), EagerBackend)


def test_an_engine_writes_its_graphs_outputs_and_nothing_else(small_bundle: Bundle) -> None:
    backend, buffers = EagerBackend(), allocate(small_bundle)
    engines = [backend.load_onnx(small_bundle.graph_path(g), g) for g in small_bundle.graphs]
    for engine in engines:
        engine.bind(buffers)
    for name, value in record_inputs(small_bundle.crops, num_frames=1)[0].items():
        if name in buffers:
            buffers[name][...] = value

    for graph, engine in zip(small_bundle.graphs, engines, strict=True):
        before = {name: value.copy() for name, value in buffers.items()}
        engine.enqueue()
        changed = {n for n, value in buffers.items() if not np.array_equal(value, before[n])}
        assert changed == {spec.name for spec in graph.outputs}


def test_a_tracker_runs_on_it(small_bundle: Bundle) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    with Tracker(small_bundle, backend="eager") as tracker:
        tracker.init(frame, (60, 40, 30, 30))

        result = tracker.update(frame)

    assert np.isfinite(result.bbox).all()


def test_a_bundle_without_weights_is_refused(toy: Bundle) -> None:
    with pytest.raises(CheckpointError, match=r"expected weights\.safetensors, got none"):
        Tracker(toy, backend="eager")


def test_it_has_no_engines_to_build_or_load(toy: Bundle, tmp_path: Path) -> None:
    backend, path = EagerBackend(), toy.graph_path(toy.template)

    with pytest.raises(EngineError, match=r"^backend eager: expected nothing to build"):
        backend.compile(path, tmp_path / "engine", precision="fp32")
    with pytest.raises(EngineError, match="expected no engines for backend eager"):
        backend.load(path, toy.template)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_it_computes_in_fp32_alone(precision: str) -> None:
    with pytest.raises(ValueError, match=r"^precision: expected 'fp32' for backend 'eager'"):
        EagerBackend().key(model="m", bundle_digest="0", precision=precision)


OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.44 GiB of "
    "which 9.19 MiB is free. Process 1 has 7.4 GiB memory in use."
)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            torch.OutOfMemoryError(OUT_OF_MEMORY),
            DeviceMemoryError,
            "segment_0: expected 20.00 MiB of device memory, got 9.19 MiB free; run fewer",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            DeviceMemoryError,
            "segment_0: expected enough of device memory, got less; run fewer",
        ),
        (
            torch.AcceleratorError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
            DeviceMemoryError,
            "segment_0: expected enough of device memory, got less; run fewer",
        ),
        (
            torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors"),
            DeviceError,
            "segment_0: expected success, got ",
        ),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
            DeviceError,
            "segment_0: expected success, got cuDNN error: CUDNN_STATUS_EXECUTION_FAILED; ",
        ),
    ],
)
def test_what_torch_says_of_the_device_is_a_device_error(
    error: RuntimeError, kind: type[DeviceError], message: str
) -> None:
    with pytest.raises(DeviceError) as raised, torch_errors("segment_0"):
        raise error

    assert type(raised.value) is kind
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shape (2, 3)"), NotImplementedError(), KeyError()])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, torch_errors("segment_0"):
        raise error

    assert raised.value is error


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_tf32_is_off_in_a_block_alone(precision: str) -> None:
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision = conv.fp32_precision = precision
    try:
        with contextlib.suppress(ZeroDivisionError), without_tf32():
            inside = matmul.fp32_precision, conv.fp32_precision
            _ = 1 / 0
        after = matmul.fp32_precision, conv.fp32_precision
    finally:
        matmul.fp32_precision, conv.fp32_precision = before

    assert inside == ("ieee", "ieee")
    assert after == (precision, precision)


def test_an_older_torch_cannot_run_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda.CUDAGraph, "raw_cuda_graph")

    with pytest.raises(BackendUnavailableError, match=r"expected torch 2\.8 or newer, got "):
        TorchCudaBackend()
