"""Engines of TensorRT at work on a real GPU: what they compute, and that they can be captured."""

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tolerances import BETWEEN_BACKENDS
from toy_bundle import write_toy_bundle

from edgetrack.backends.cuda import CudaContext
from edgetrack.backends.cuda.driver import find_cuda_device
from edgetrack.backends.cuda.graphs import GraphExec, capture
from edgetrack.backends.cuda.streams import Stream
from edgetrack.backends.ort import OnnxRuntimeBackend
from edgetrack.backends.trt import TensorRTBackend
from edgetrack.backends.trt.engine import TensorRTEngine
from edgetrack.build import build
from edgetrack.bundle import Bundle
from edgetrack.errors import BackendUnavailableError
from edgetrack.runtime.buffers import DeviceBuffers, allocate

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Rig:
    """All engines of a bundle, bound to buffers; the context is current."""

    bundle: Bundle
    engines: list[TensorRTEngine]
    buffers: DeviceBuffers
    stream: Stream


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    package = request.param.replace("-", "_")
    if find_cuda_device() is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"needs a CUDA device and the package {package}")
    bundle = write_toy_bundle(tmp_path / "toy")
    built = build(bundle, backend=request.param, precision="fp32", output=tmp_path / "engines")
    backend = TensorRTBackend(request.param)
    with CudaContext.open() as context, context.current(), contextlib.ExitStack() as opened:
        try:
            engines = [
                backend.load(built.path / built.graphs[g.name].file, g) for g in bundle.graphs
            ]
        except BackendUnavailableError as error:
            pytest.skip(str(error))
        for engine in engines:
            opened.callback(engine.close)
        buffers = DeviceBuffers(context, bundle, engines)
        stream = context.stream()
        buffers.clear(stream)
        for engine in engines:
            engine.bind_device(buffers.addresses, scratch=buffers.scratch, stream=stream.handle)
        stream.synchronize()
        yield Rig(bundle, engines, buffers, stream)


def pictures(bundle: Bundle, *, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Random values of what no graph writes."""
    rng = np.random.default_rng(seed)
    written = {t.name for g in bundle.graphs for t in g.outputs}
    read = {t.name: t for g in bundle.graphs for t in g.inputs if t.name not in written}
    return {
        name: rng.integers(0, 256, t.shape, np.uint8)
        if t.dtype == "uint8"
        else rng.random(t.shape, np.float32)
        for name, t in read.items()
    }


def on_the_cpu(bundle: Bundle, given: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """All tensors after all graphs ran once, with ONNX Runtime."""
    buffers, backend = allocate(bundle), OnnxRuntimeBackend()
    for name, value in given.items():
        buffers[name][...] = value
    for graph in bundle.graphs:
        engine = backend.load_onnx(bundle.graph_path(graph), graph)
        engine.bind(buffers)
        engine.enqueue()
        engine.close()
    return buffers


def assert_equal_to_the_cpu(rig: Rig, given: dict[str, npt.NDArray[Any]]) -> None:
    expected = on_the_cpu(rig.bundle, given)
    for graph in rig.bundle.graphs:
        for spec in graph.outputs:
            kind = spec.name if spec.name in BETWEEN_BACKENDS["float32"] else "tokens"
            got = rig.buffers.read(spec.name, rig.stream)
            tolerance = BETWEEN_BACKENDS["float32"][kind]
            np.testing.assert_allclose(got, expected[spec.name], rtol=0, atol=tolerance)


def test_a_chain_of_engines_computes_what_the_cpu_does(rig: Rig) -> None:
    given = pictures(rig.bundle, seed=1)

    for name, value in given.items():
        rig.buffers.write(name, value, rig.stream)
    for engine in rig.engines:
        engine.enqueue_on(rig.stream.handle)

    assert_equal_to_the_cpu(rig, given)


def test_a_captured_chain_computes_what_the_cpu_does_on_each_frame(rig: Rig) -> None:
    with capture(rig.stream.handle) as captured:
        for engine in rig.engines:
            engine.enqueue_on(rig.stream.handle)
    graph = GraphExec(captured.graph, rig.stream.handle)

    for seed in (2, 3):
        given = pictures(rig.bundle, seed=seed)
        for name, value in given.items():
            rig.buffers.write(name, value, rig.stream)
        graph.launch(rig.stream.handle)

        assert_equal_to_the_cpu(rig, given)

    graph.close()
