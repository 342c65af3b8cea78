import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from recorded import record_inputs
from toy_bundle import write_toy_bundle

from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.errors import CalibrationError
from edgetrack.quantize.cache import CalibrationCache
from edgetrack.quantize.calibrate import (
    MIN_CROPS,
    GraphRun,
    calibrate,
    chain_states,
    smoothed_graphs,
)
from edgetrack.quantize.ranges import METHODS
from edgetrack.quantize.smooth import smoothable_tensors
from edgetrack.runtime.recording import record_crops

NamedCrops = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def toy_crops(toy: Bundle) -> NamedCrops:
    recorded = record_inputs(toy.crops, num_frames=MIN_CROPS)
    return [(f"clip/{k:06d}", inputs) for k, inputs in enumerate(recorded)]


def test_the_same_crops_give_the_same_bytes(
    shipped_bundle: Bundle, cache: CalibrationCache, crops: NamedCrops, tmp_path: Path
) -> None:
    cache.write(tmp_path / "first.json")

    calibrate(shipped_bundle, crops).write(tmp_path / "second.json")

    first, second = ((tmp_path / f"{n}.json").read_bytes() for n in ("first", "second"))
    assert first == second


def test_the_order_of_the_crops_does_not_matter(
    shipped_bundle: Bundle, cache: CalibrationCache, crops: NamedCrops
) -> None:
    other = calibrate(shipped_bundle, crops[::-1])

    assert other.ranges == cache.ranges
    assert other.channel_maxima == cache.channel_maxima


def test_ranges_of_max_are_the_largest_magnitudes(
    shipped_bundle: Bundle, crops: NamedCrops
) -> None:
    cache = calibrate(shipped_bundle, crops, method="max", smoothing=0)

    watched = {name: list(ranges) for name, ranges in cache.ranges.items()}
    runs = {
        g.name: GraphRun(onnx.load(shipped_bundle.graph_path(g)), watched[g.name])
        for g in shipped_bundle.graphs
    }
    largest: dict[tuple[str, str], float] = {}
    for _, graph, state in chain_states(shipped_bundle, runs, crops):
        for name in watched[graph]:
            amax = float(np.abs(state[name]).max())
            largest[graph, name] = max(amax, largest.get((graph, name), 0))
    got = {(g, n): r for g, ranges in cache.ranges.items() for n, r in ranges.items()}
    assert got == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "max"])
def test_other_methods_clip(shipped_bundle: Bundle, crops: NamedCrops, method: str) -> None:
    whole = calibrate(shipped_bundle, crops[:MIN_CROPS], method="max")

    cache = calibrate(shipped_bundle, crops[:MIN_CROPS], method=method)

    pairs = [(r, whole.ranges[g][n]) for g, rs in cache.ranges.items() for n, r in rs.items()]
    assert all(r <= largest * (1 + 1e-5) for r, largest in pairs)
    assert any(r < 0.9 * largest for r, largest in pairs)


def test_what_the_cache_came_from_is_in_it(
    shipped_bundle: Bundle, cache: CalibrationCache, crops: NamedCrops
) -> None:
    assert (cache.model, cache.bundle_digest) == (shipped_bundle.name, shipped_bundle.digest)
    assert (cache.method, cache.percentile) == ("percentile", 99.99)
    assert [name for name, _ in cache.frames] == [name for name, _ in crops]
    assert len({digest for _, digest in cache.frames}) == len(crops)
    assert cache.tools.keys() == {"numpy", "onnx", "onnxruntime"}


def test_smoothed_graphs_compute_what_the_bundle_computes(
    shipped_bundle: Bundle, cache: CalibrationCache, crops: NamedCrops
) -> None:
    models = smoothed_graphs(shipped_bundle, cache)

    before = {
        g.name: GraphRun(onnx.load(shipped_bundle.graph_path(g))) for g in shipped_bundle.graphs
    }
    after = {name: GraphRun(model) for name, model in models.items()}
    pairs = zip(
        chain_states(shipped_bundle, before, crops[:2]),
        chain_states(shipped_bundle, after, crops[:2]),
        strict=True,
    )
    for (_, graph, expected), (_, _, got) in pairs:
        for spec in next(g for g in shipped_bundle.graphs if g.name == graph).outputs:
            np.testing.assert_allclose(got[spec.name], expected[spec.name], atol=1e-3)


def test_smoothing_evens_out_the_channels(shipped_bundle: Bundle, cache: CalibrationCache) -> None:
    model = onnx.load(shipped_bundle.graph_path(shipped_bundle.segments[2]))
    smoothed = smoothed_graphs(shipped_bundle, cache)["segment_2"]
    (first, *_) = smoothable_tensors(model)

    gammas = [
        numpy_helper.to_array(next(i for i in m.graph.initializer if i.name == n.input[1]))
        for m in (model, smoothed)
        for n in m.graph.node
        if first in n.output
    ]

    assert not np.allclose(gammas[0], gammas[1])


def test_a_template_is_run_once(shipped_bundle: Bundle, crops: NamedCrops) -> None:
    runs = {
        g.name: GraphRun(onnx.load(shipped_bundle.graph_path(g))) for g in shipped_bundle.graphs
    }

    graphs = [graph for _, graph, _ in chain_states(shipped_bundle, runs, crops)]

    assert graphs.count("template") == 1
    assert graphs.count("segment_2") == len(crops)


@pytest.fixture(scope="module")
def carried_crops(toy_with_memory: Bundle) -> NamedCrops:
    clip = list(render_clip(num_frames=MIN_CROPS + 1, width=160, height=120))
    frames = [frame for frame, _ in clip]
    return list(record_crops(toy_with_memory, frames, clip[0][1].tolist(), name="clip"))


def test_heads_and_updates_run_on_what_was_carried_into_their_frame(
    toy_with_memory: Bundle, carried_crops: NamedCrops
) -> None:
    bundle = toy_with_memory
    runs = {g.name: GraphRun(onnx.load(bundle.graph_path(g))) for g in bundle.graphs}

    states = list(chain_states(bundle, runs, carried_crops))

    exits = [f"{kind}_{k}" for k in range(3) for kind in ("segment", "head")]
    assert [graph for _, graph, _ in states] == ["template", *[*exits, "update"] * MIN_CROPS]
    updates = [state for _, graph, state in states if graph == "update"]
    for before, (_, after) in zip(updates, carried_crops[1:], strict=False):
        np.testing.assert_allclose(before["next_memory"], after["memory"], atol=1e-6)
        np.testing.assert_array_equal(before["next_age"], after["age"])


def test_heads_and_updates_have_ranges(toy_with_memory: Bundle, carried_crops: NamedCrops) -> None:
    cache = calibrate(toy_with_memory, carried_crops)

    assert {name for name, ranges in cache.ranges.items() if ranges} == {
        graph.name for graph in toy_with_memory.graphs
    }


def test_crops_without_what_was_carried_are_refused(
    toy_with_memory: Bundle, carried_crops: NamedCrops
) -> None:
    crops = [(name, {**tensors}) for name, tensors in carried_crops]
    del crops[3][1]["update.template"]

    message = r"clip/000004: expected 'update.template' as uint8 .*, got none; record the crops wi"
    with pytest.raises(CalibrationError, match=message):
        calibrate(toy_with_memory, crops)


def test_progress_ends_at_one(toy: Bundle, toy_crops: NamedCrops) -> None:
    fractions: list[float] = []

    calibrate(toy, toy_crops, on_progress=fractions.append)

    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_memory_does_not_grow_with_the_crops(toy: Bundle, toy_crops: NamedCrops) -> None:
    peaks = []
    for count in (1, 10):
        tracemalloc.start()
        calibrate(toy, toy_crops * count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    activations = sum(r.nbytes for _, inputs in toy_crops for r in inputs.values())
    assert peaks[1] - peaks[0] < activations


@pytest.mark.parametrize("count", [0, MIN_CROPS - 1])
def test_too_few_crops_are_refused(toy: Bundle, toy_crops: NamedCrops, count: int) -> None:
    with pytest.raises(CalibrationError, match=f"expected at least {MIN_CROPS} crops.*{count};"):
        calibrate(toy, toy_crops[:count])


@pytest.mark.parametrize("grey", [0, 128])
def test_crops_of_one_colour_are_refused(toy: Bundle, toy_crops: NamedCrops, grey: int) -> None:
    plain = [
        (name, {**inputs, "search_region": np.full_like(inputs["search_region"], grey)})
        for name, inputs in toy_crops
    ]

    with pytest.raises(CalibrationError, match="show something, got 8 of one colour"):
        calibrate(toy, plain)


def test_activations_that_are_not_finite_are_refused_by_name(
    toy_crops: NamedCrops, tmp_path: Path
) -> None:
    bundle = write_toy_bundle(tmp_path / "toy")
    path = bundle.graph_path(bundle.segments[1])
    model = onnx.load(path)
    weight = next(i for i in model.graph.initializer if i.name == "identity")
    values = numpy_helper.to_array(weight).copy()
    values[0, 0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, "identity"))
    onnx.save(model, path)

    expected = r"segment_2: expected finite activations, got nan at 'tokens_1' on 'clip/000000'"
    with pytest.raises(CalibrationError, match=expected):
        calibrate(bundle, toy_crops)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        ("NoSuchOperator", "expected one that ONNX Runtime runs, got: .*NoSuchOperator"),
        ("If", r"segment_1\.onnx: expected a graph without control flow, got \['If'\]; export"),
    ],
)
def test_a_graph_that_cannot_be_run_or_quantised_is_refused(
    toy_crops: NamedCrops, tmp_path: Path, operator: str, message: str
) -> None:
    bundle = write_toy_bundle(tmp_path / "toy")
    path = bundle.graph_path(bundle.segments[1])
    model = onnx.load(path)
    model.graph.node.add(op_type=operator, input=["score"], output=["unread"])
    onnx.save(model, path)

    with pytest.raises(CalibrationError, match=message):
        calibrate(bundle, toy_crops)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"search_region": np.zeros((1, 32, 32, 3), np.uint8)}, r"uint8 \(1, 32, 32, 3\)"),
        ({"template": np.zeros((1, 32, 32, 3), np.float32)}, "float32"),
        ({"template_bbox_cxcywh": None}, "none"),
    ],
)
def test_crops_of_another_model_are_refused(
    toy: Bundle, toy_crops: NamedCrops, change: dict[str, Any], got: str
) -> None:
    other = [(n, {k: change.get(k, v) for k, v in x.items()}) for n, x in toy_crops]

    with pytest.raises(CalibrationError, match=f"clip/000000: expected .* got {got}"):
        calibrate(toy, other)


def test_wrong_arguments_are_refused(toy: Bundle, toy_crops: NamedCrops) -> None:
    with pytest.raises(ValueError, match="method: expected one of"):
        calibrate(toy, toy_crops, method="kl")
    with pytest.raises(ValueError, match="smoothing: expected a number from 0 to 1, got 2"):
        calibrate(toy, toy_crops, smoothing=2)
    with pytest.raises(ValueError, match="percentile: expected a number"):
        calibrate(toy, toy_crops, percentile=200)
