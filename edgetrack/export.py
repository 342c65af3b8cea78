"""A segmented model → a bundle: one ONNX graph per segment, the manifest, the weights."""

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edgetrack.bundle import (
    MANIFEST_NAME,
    WEIGHTS_NAME,
    Bundle,
    GraphSpec,
    TensorSpec,
    whole_folder,
)
from edgetrack.errors import BundleError
from edgetrack.models.segmented import SegmentedModel, State

__all__ = ["OPSET", "export_bundle"]

# TensorRT 10.3 to 11.x all parse it; FP16 Q/DQ scales need at least 19.
OPSET = 20
# Their output shapes depend on data, or they branch on the host: no engine of ours may hold them.
_FORBIDDEN_OPS = frozenset({"If", "Loop", "Scan", "NonZero", "Unique", "NonMaxSuppression"})


def export_bundle(
    model: SegmentedModel,
    output: Path,
    *,
    name: str,
    provenance: Mapping[str, Any],
    licence: str,
    operating_points: Mapping[str, Sequence[float]] = MappingProxyType({}),
    operating_point: str | None = None,
    criterion: str | None = None,
    rules: Mapping[str, float] = MappingProxyType({}),
) -> Bundle:
    """Write a bundle; a failed export leaves what was there before.

    Args:
        model: The model; it is put into eval mode.
        output: The bundle's folder, replaced if it exists.
        name: ``<family>-<variant>`` or another readable name.
        provenance: Data, recipe, samples seen, metrics: whatever JSON can hold.
        licence: What the weights may be used for.
        operating_points: Name → thresholds on the criterion, one per exit but the last; none of
            them is the model's own.
        operating_point: The default one; ``None`` is the first.
        criterion: What the thresholds are compared with (see ``runtime.policies``); ``None`` is
            what the model's own are.
        rules: How answers become the target's state (see ``runtime.target``).

    Raises:
        BundleError: A graph holds an operation that no engine of ours may hold, or ``output``
            holds something else than a bundle.
    """
    is_empty = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_empty and not (output / MANIFEST_NAME).is_file():
        raise BundleError(
            f"{output}: expected a new folder or a bundle to replace, got something else; "
            "choose another folder"
        )
    model.eval()
    own = {name: (t,) * (model.num_exits - 1) for name, t in model.operating_points.items()}
    points = {name: tuple(values) for name, values in (operating_points or own).items()}
    with whole_folder(output) as folder:
        graphs = _export_graphs(model, folder)
        weights = save({k: v.contiguous() for k, v in model.state_dict().items()})
        (folder / WEIGHTS_NAME).write_bytes(weights)  # ``save_file`` lets only its owner read it
        Bundle(
            path=folder,
            name=name,
            family=model.family,
            paper=model.paper,
            config=model.config_dict,
            crops=model.crops,
            template=graphs["template"],
            segments=tuple(graphs[f"segment_{k}"] for k in range(model.num_exits)),
            operating_points=points,
            operating_point=next(iter(points)) if operating_point is None else operating_point,
            criterion=model.criterion if criterion is None else criterion,
            rules=dict(rules),
            provenance=provenance,
            licence=licence,
            heads=tuple(graphs[f"head_{k}"] for k in range(model.num_exits) if model.has_heads),
            update=graphs.get("update"),
            carried=dict(model.carried),
        ).write()
    return Bundle.load(output)


class _Graph(nn.Module):
    """One graph of the bundle as a module with positional inputs and outputs."""

    def __init__(
        self, model: SegmentedModel, inputs: tuple[str, ...], run: Callable[[State], State]
    ) -> None:
        super().__init__()
        self.model, self.inputs, self.run = model, inputs, run

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.run(dict(zip(self.inputs, tensors, strict=True))).values())


def _graphs_of(model: SegmentedModel) -> dict[str, _Graph]:
    """All graphs by name, in the order in which they can run."""

    def embed(state: State) -> State:
        return model.embed_template(state["template"], state["template_bbox_cxcywh"])

    graphs = {"template": _Graph(model, ("template", "template_bbox_cxcywh"), embed)}
    for k in range(model.num_exits):
        run = functools.partial(model.run_segment, k)
        graphs[f"segment_{k}"] = _Graph(model, model.segment_inputs(k), run)
        if model.has_heads:
            run = functools.partial(model.run_head, k)
            graphs[f"head_{k}"] = _Graph(model, model.head_inputs(k), run)
    if model.update_inputs:
        graphs["update"] = _Graph(model, model.update_inputs, model.run_update)
    return graphs


@torch.no_grad()
def _export_graphs(model: SegmentedModel, folder: Path) -> dict[str, GraphSpec]:
    state = _example_inputs(model)
    specs = {}
    for name, graph in _graphs_of(model).items():
        inputs = graph.inputs
        # The counter knows the products of the plain kernel, not those inside a fused one.
        with FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]):
            written = graph.run({n: state[n] for n in inputs})
        path = folder / f"{name}.onnx"
        _export_graph(graph, tuple(state[n] for n in inputs), path, outputs=tuple(written))
        state |= written
        specs[name] = GraphSpec(
            name=name,
            file=path.name,
            inputs=_specs(_used(path, inputs), state),
            outputs=_specs(tuple(written), state),
            macs=counter.get_total_flops() // 2,
        )
    return specs


def _export_graph(
    graph: _Graph, examples: tuple[Tensor, ...], path: Path, *, outputs: tuple[str, ...]
) -> None:
    with _quiet_exporter():
        program = torch.onnx.export(
            graph.eval(),
            examples,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(outputs),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _strip(proto)
    if found := sorted({n.op_type for n in proto.graph.node} & _FORBIDDEN_OPS):
        raise BundleError(
            f"{path.name}: expected static shapes and no host branches, got {found}; "
            "rewrite that part of the model"
        )
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())


def _strip(proto: onnx.ModelProto) -> None:
    """Drop the exporter's notes: source paths of the exporting machine, stack traces."""
    proto.producer_name, proto.doc_string = "edgetrack", ""
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    proto.graph.doc_string = ""
    graph = proto.graph
    tensors = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for entry in (*graph.node, *tensors):
        del entry.metadata_props[:]
        entry.doc_string = ""
    used = {name for node in proto.graph.node for name in node.input}
    kept = [i for i in proto.graph.input if i.name in used]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)


def _used(path: Path, inputs: tuple[str, ...]) -> tuple[str, ...]:
    """The inputs that the graph reads: a family may ignore the template's box."""
    present = {i.name for i in onnx.load(path).graph.input}
    return tuple(name for name in inputs if name in present)


def _specs(names: tuple[str, ...], state: State) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=n, dtype=str(state[n].dtype).removeprefix("torch."), shape=tuple(state[n].shape)
        )
        for n in names
    )


def _example_inputs(model: SegmentedModel) -> State:
    generator = torch.Generator().manual_seed(0)

    def image(side: int) -> Tensor:
        return torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8, generator=generator)

    return {
        "template": image(model.crops.template_size_px),
        "template_bbox_cxcywh": torch.tensor([[0.5, 0.5, 0.5, 0.5]]),
        "search_region": image(model.crops.search_size_px),
    }


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter prints progress and warns of its own internals; neither is for our users."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
