"""Do the parts of a bundle fit together? What graphs read, write and carry, files, thresholds."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgetrack.bundle.specs import ANSWERS, GraphSpec, TensorSpec, host_tensors

if TYPE_CHECKING:
    from edgetrack.bundle.manifest import Bundle

__all__ = ["find_problem"]


def find_problem(bundle: "Bundle") -> str | None:
    """The first thing that does not fit: what was expected, and what there is."""
    problems = itertools.chain(
        _value_problems(bundle),
        _file_problems(bundle),
        _name_problems(bundle),
        _answer_problems(bundle),
        _dataflow_problems(bundle),
        _carried_problems(bundle),
        _threshold_problems(bundle),
    )
    return next(problems, None)


def _value_problems(bundle: "Bundle") -> Iterator[str]:
    """The name becomes part of file names; shares of the work are counted in MACs."""
    if bundle.name in ("", ".", "..") or "/" in bundle.name or "\\" in bundle.name:
        yield f"'name': expected a name without path separators, got {bundle.name!r}"
    for graph in bundle.graphs:  # a graph without products has none
        if graph.macs < 0:
            yield f"{graph.name}: expected 'macs' of at least 0, got {graph.macs}"


def _file_problems(bundle: "Bundle") -> Iterator[str]:
    """Files lie in the bundle's own folder, whatever a manifest from elsewhere says."""
    for name in bundle.files:
        if name == ".." or Path(name).name != name:
            yield f"expected names of files in this folder under 'files', got {name!r}"
    for graph in bundle.graphs:
        if graph.file not in bundle.files:
            yield f"{graph.name}: expected a file listed under 'files', got {graph.file!r}"


def _name_problems(bundle: "Bundle") -> Iterator[str]:
    """There is a segment per exit, and a head for each or for none."""
    names = [graph.name for graph in bundle.graphs]
    exits = range(max(bundle.num_exits, 1))
    expected = ["template", *(f"segment_{k}" for k in exits)]
    expected += [f"head_{k}" for k in exits if bundle.heads]
    expected += ["update"] if bundle.update is not None else []
    if names != expected:
        yield f"expected the graphs {expected}, got {names}"


def _dataflow_problems(bundle: "Bundle") -> Iterator[str]:
    """Every tensor that a graph reads is written before it, with the same dtype and shape."""
    known: dict[str, TensorSpec] = {}
    for graph in bundle.graphs:
        before = _written_before(bundle, graph) | host_tensors(graph.name, bundle.crops)
        for spec in graph.inputs:
            if before.get(spec.name) != spec:
                yield (
                    f"{graph.name}: expected input {spec} to be written before, got "
                    f"{before.get(spec.name)}"
                )
        for spec in graph.outputs:
            if known.setdefault(spec.name, spec) != spec:
                yield f"{graph.name}: expected output {known[spec.name]} as before, got {spec}"
    for graph in bundle.graphs:  # a name is one buffer
        if names := [spec.name for spec in graph.outputs if spec in graph.inputs]:
            yield f"{graph.name}: expected outputs that it does not read, got {names}"


def _written_before(bundle: "Bundle", graph: GraphSpec) -> dict[str, TensorSpec]:
    """What graphs that surely ran in this frame, or the template graph, wrote before a graph."""
    if graph is bundle.template:
        return {}
    if graph is bundle.update:  # whichever exit was taken
        paths = [
            _outputs(bundle.template, *bundle.segments[: k + 1], *bundle.heads[k : k + 1])
            for k in range(bundle.num_exits)
        ]
        return {name: spec for name, spec in paths[0].items() if all(name in p for p in paths)}
    index = int(graph.name.rpartition("_")[2])
    return _outputs(bundle.template, *bundle.segments[: index + (graph in bundle.heads)])


def _outputs(*graphs: GraphSpec) -> dict[str, TensorSpec]:
    return {spec.name: spec for graph in graphs for spec in graph.outputs}


def _answer_problems(bundle: "Bundle") -> Iterator[str]:
    """The answer is one buffer for all exits, so all must agree on it."""
    box, *decision = ANSWERS
    in_segments = {t.name for g in bundle.segments for t in (*g.inputs, *g.outputs)}
    for graph in (*bundle.segments, *bundle.heads):
        outputs, is_head = _outputs(graph), graph in bundle.heads
        expected = [box] if is_head else decision if bundle.heads else [box, *decision]
        for spec in expected:
            if outputs.get(spec.name) != spec:
                yield f"{graph.name}: expected output {spec}, got {outputs.get(spec.name)}"
        if is_head and (extra := [s.name for s in decision if s.name in outputs]):
            yield f"{graph.name}: expected what the exit decides by of its segment, got {extra}"
        if is_head and (shared := sorted(outputs.keys() & in_segments - {box.name})):
            yield f"{graph.name}: expected outputs that no segment reads or writes, got {shared}"


def _carried_problems(bundle: "Bundle") -> Iterator[str]:
    """What is carried is written by the template graph first, and then by the update graph."""
    if bundle.update is None:
        if bundle.carried:
            yield f"carried {sorted(bundle.carried)}: expected an update graph, got none"
        return
    if not bundle.carried:
        yield "update: expected tensors that are carried to the next frame, got none"
    first, later = _outputs(bundle.template), _outputs(bundle.update)
    others = {t.name for g in bundle.graphs[:-1] for t in (*g.inputs, *g.outputs)}
    if shared := sorted(later.keys() & others):
        yield f"update: expected outputs that no other graph reads or writes, got {shared}"
    for name, source in bundle.carried.items():
        old, new = first.get(name), later.get(source)
        if old is None:
            yield f"carried {name!r}: expected its first value of the template graph, got none"
        elif new is None:
            yield f"carried {name!r}: expected {source!r} of the update graph, got none"
        elif (old.dtype, old.shape) != (new.dtype, new.shape):
            yield f"carried {name!r}: expected {old}, as the template graph has it, got {new}"
        if writers := [g.name for g in bundle.graphs[1:] if name in _outputs(g)]:
            yield f"carried {name!r}: expected the template graph alone to write it, got {writers}"


def _threshold_problems(bundle: "Bundle") -> Iterator[str]:
    """Every operating point has a threshold for each exit but the last."""
    count = bundle.num_exits - 1
    for name, thresholds in bundle.operating_points.items():
        if len(thresholds) != count or not all(t >= 0 for t in thresholds):
            yield (
                f"operating point {name!r}: expected {count} thresholds of at least 0, got "
                f"{list(thresholds)}"
            )
    if bundle.operating_point not in bundle.operating_points:
        yield (
            f"expected operating_point among {sorted(bundle.operating_points)}, got "
            f"{bundle.operating_point!r}"
        )
