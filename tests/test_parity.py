"""The same inputs through torch and through ONNX Runtime, graph by graph."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper
from recorded import record_inputs
from tolerances import BETWEEN_BACKENDS

from edgetrack.backends.eager import EagerBackend
from edgetrack.backends.engine import Backend, Engine
from edgetrack.backends.ort import OnnxRuntimeBackend
from edgetrack.build import build
from edgetrack.bundle import ANSWER_NAMES, Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.errors import EngineMismatchError
from edgetrack.models.registry import load_model
from edgetrack.parity import EngineRunner, ask_exits, compare, open_runner
from edgetrack.runtime.buffers import allocate
from edgetrack.runtime.chain import Chain
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.recording import record_crops

BUNDLES = pytest.mark.parametrize(
    "bundle",
    ["small_bundle", "shipped_bundle", pytest.param("random_bundle", marks=pytest.mark.slow)],
    indirect=True,
)


@pytest.fixture
def bundle(request: pytest.FixtureRequest) -> Bundle:
    loaded: Bundle = request.getfixturevalue(request.param)
    return loaded


def chain_on(backend: Backend, bundle: Bundle) -> Chain:
    engines = [backend.load_onnx(bundle.graph_path(g), g) for g in bundle.graphs]
    return Chain(bundle, cast("list[Engine]", engines))


def exact_answers(bundle: Bundle, inputs: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Answers of all exits from one forward pass of the author's model."""
    with torch.inference_mode():
        answers = load_model(bundle)(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    return [{name: value.numpy() for name, value in answer.items()} for answer in answers]


def chain_answers(
    chain: Chain, bundle: Bundle, inputs: dict[str, np.ndarray]
) -> list[dict[str, np.ndarray]]:
    """Answers of all exits, each from a run that ends there."""
    for name in inputs.keys() & chain.buffers.keys():
        chain.buffers[name][...] = inputs[name]
    chain.run_template()
    answers = []
    for index in range(bundle.num_exits):
        chain.run(ExitPolicy.fixed(index, num_exits=bundle.num_exits))
        answers.append({name: chain.buffers[name].copy() for name in ANSWER_NAMES})
    return answers


@BUNDLES
def test_every_graph_computes_in_onnx_runtime_what_it_computes_in_torch(bundle: Bundle) -> None:
    tolerance = BETWEEN_BACKENDS["float32"]
    worst = dict.fromkeys([*ANSWER_NAMES, "tokens"], 0.0)
    sides = []
    for backend in (EagerBackend(), OnnxRuntimeBackend()):
        buffers = allocate(bundle)
        engines = [backend.load_onnx(bundle.graph_path(g), g) for g in bundle.graphs]
        for engine in engines:
            engine.bind(buffers)
        sides.append((engines, buffers))
    (eager, exact), (ort, got) = sides

    for inputs in record_inputs(bundle.crops):
        for name in inputs.keys() & exact.keys():
            exact[name][...] = inputs[name]
        for graph, eager_engine, ort_engine in zip(bundle.graphs, eager, ort, strict=True):
            for spec in graph.inputs:
                got[spec.name][...] = exact[spec.name]
            eager_engine.enqueue()
            ort_engine.enqueue()
            for spec in graph.outputs:
                kind = spec.name if spec.name in ANSWER_NAMES else "tokens"
                difference = float(np.abs(got[spec.name] - exact[spec.name]).max())
                worst[kind] = max(worst[kind], difference)

    assert {k: v for k, v in worst.items() if not v <= tolerance[k]} == {}


@BUNDLES
def test_the_chain_in_torch_equals_the_forward_pass_bit_for_bit(bundle: Bundle) -> None:
    inputs = record_inputs(bundle.crops, num_frames=1)[0]

    got = chain_answers(chain_on(EagerBackend(), bundle), bundle, inputs)

    for answer, expected in zip(got, exact_answers(bundle, inputs), strict=True):
        for name in ANSWER_NAMES:
            np.testing.assert_array_equal(answer[name], expected[name])


@BUNDLES
def test_the_chain_in_onnx_runtime_equals_the_forward_pass(bundle: Bundle) -> None:
    chain = chain_on(OnnxRuntimeBackend(), bundle)
    tolerance = BETWEEN_BACKENDS["float32"]

    for inputs in record_inputs(bundle.crops, seed=1):
        expected = exact_answers(bundle, inputs)
        for answer, other in zip(chain_answers(chain, bundle, inputs), expected, strict=True):
            for name in ANSWER_NAMES:
                np.testing.assert_allclose(answer[name], other[name], atol=tolerance[name], rtol=0)


@pytest.fixture
def exact(shipped_bundle: Bundle) -> Iterator[EngineRunner]:
    runner = open_runner(shipped_bundle, OnnxRuntimeBackend(), engines=None)
    yield runner
    runner.close()


def scaled(bundle: Bundle, folder: Path, *, graph: str, factor: float) -> Bundle:
    """A copy of a bundle in which the largest weight of one graph is scaled."""
    shutil.copytree(bundle.path, folder)
    path = folder / f"{graph}.onnx"
    proto = onnx.load(path)
    weight = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name)
    )
    onnx.save(proto, path)
    return dataclasses.replace(Bundle.load(folder, verify=False), path=folder).write()


def test_engines_agree_with_themselves(shipped_bundle: Bundle, exact: EngineRunner) -> None:
    report = compare(shipped_bundle, exact, exact, record_inputs(shipped_bundle.crops))

    assert {t.max_abs for t in report.tensors} == {0}
    assert {t.rms for t in report.tensors} == {0}
    assert min(t.cosine for t in report.tensors) == pytest.approx(1)
    assert report.first_departing is None
    assert report.bbox_iou_min == pytest.approx(1)
    assert report.exit_agreement == 1
    assert [t.graph for t in report.tensors][:2] == ["template", "template"]
    assert report.num_crops == 6


@pytest.mark.parametrize("graph", ["segment_1", "segment_2"])
def test_the_graph_that_departs_is_named_and_not_those_behind_it(
    shipped_bundle: Bundle, exact: EngineRunner, tmp_path: Path, graph: str
) -> None:
    changed = scaled(shipped_bundle, tmp_path / "changed", graph=graph, factor=1.5)
    other = open_runner(changed, OnnxRuntimeBackend(), engines=None)

    report = compare(shipped_bundle, exact, other, record_inputs(shipped_bundle.crops))
    other.close()

    assert report.first_departing is not None
    assert report.first_departing.graph == graph
    assert {t.graph for t in report.tensors if t.rms > 0} == {graph}
    assert report.bbox_iou_min < 1


@pytest.mark.parametrize("graph", [None, "head_1", "update"])
def test_heads_and_the_update_are_compared_too(
    toy_with_memory: Bundle, tmp_path: Path, graph: str | None
) -> None:
    bundle = toy_with_memory
    clip = list(render_clip(num_frames=5, width=160, height=120))
    recorded = record_crops(bundle, [f for f, _ in clip], clip[0][1].tolist(), name="clip")
    crops = [inputs for _, inputs in recorded]
    changed = bundle
    if graph is not None:
        changed = scaled(bundle, tmp_path / "changed", graph=graph, factor=1.5)
    engines = [open_runner(b, OnnxRuntimeBackend(), engines=None) for b in (bundle, changed)]

    report = compare(bundle, *engines, crops)
    for runner in engines:
        runner.close()

    assert {t.graph for t in report.tensors} == {g.name for g in bundle.graphs}
    assert {t.graph for t in report.tensors if t.rms > 0} == ({graph} if graph else set())
    assert report.bbox_iou_min == 1 if graph != "head_1" else report.bbox_iou_min < 1
    assert report.num_crops == 4


def test_the_other_engines_may_exit_by_thresholds_of_their_own(
    shipped_bundle: Bundle, exact: EngineRunner
) -> None:
    crops = record_inputs(shipped_bundle.crops)
    first, last = (ExitPolicy.fixed(k, num_exits=shipped_bundle.num_exits) for k in (0, 2))

    report = compare(shipped_bundle, exact, exact, crops, policy=first, other_policy=last)

    assert report.exit_agreement == 0
    assert compare(shipped_bundle, exact, exact, crops, policy=first).exit_agreement == 1


def test_all_exits_are_asked_on_every_crop(shipped_bundle: Bundle, exact: EngineRunner) -> None:
    crops = record_inputs(shipped_bundle.crops)
    chain = chain_on(OnnxRuntimeBackend(), shipped_bundle)

    answers = ask_exits(shipped_bundle, exact, crops)

    for index, crop in enumerate(crops):
        for k, expected in enumerate(chain_answers(chain, shipped_bundle, crop)):
            np.testing.assert_allclose(answers.bbox_cxcywh[index, k], expected["bbox_cxcywh"][0])
            assert answers.uncertainty[index, k] == expected["uncertainty"][0]
            assert answers.score[index, k] == expected["score"][0]
    fixed = ExitPolicy.fixed(1, num_exits=shipped_bundle.num_exits)
    assert answers.exits_taken(fixed).tolist() == [1] * len(crops)
    assert answers.on(slice(2, 4)).score.tolist() == answers.score[2:4].tolist()
    assert answers.box_iou(answers) == pytest.approx(np.ones((len(crops), 3)))


class Broken:
    """An engine set whose answers are not numbers."""

    def __init__(self, runner: EngineRunner) -> None:
        self.runner = runner

    def run(self, index: int, inputs: Any) -> dict[str, npt.NDArray[Any]]:
        return {k: v * np.float32(np.nan) for k, v in self.runner.run(index, inputs).items()}

    def close(self) -> None:
        self.runner.close()


def test_what_is_no_number_departs(shipped_bundle: Bundle, exact: EngineRunner) -> None:
    report = compare(shipped_bundle, exact, Broken(exact), record_inputs(shipped_bundle.crops))

    assert report.first_departing == report.tensors[0]
    assert report.bbox_iou_mean == 0


def test_nothing_to_compare_on_is_refused(shipped_bundle: Bundle, exact: EngineRunner) -> None:
    with pytest.raises(ValueError, match=r"^parity: expected crops to compare on, got none"):
        compare(shipped_bundle, exact, exact, [])


def test_engines_of_another_bundle_are_refused(
    toy: Bundle, shipped_bundle: Bundle, tmp_path: Path
) -> None:
    engines = build(toy, backend="onnxruntime", output=tmp_path)

    with pytest.raises(
        EngineMismatchError, match=r"expected engines of early_exit_vit-tiny .* toy"
    ):
        open_runner(shipped_bundle, OnnxRuntimeBackend(), engines=engines)
