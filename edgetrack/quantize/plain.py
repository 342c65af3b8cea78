"""A plain copy of a graph to work on: no functions, no control flow, no ``Constant`` nodes."""

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetrack.errors import BackendUnavailableError

if TYPE_CHECKING:
    import onnx

__all__ = ["import_graphsurgeon", "plain_copy", "require_packages"]

_CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})


def plain_copy(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Copy a model, with its functions inlined and its float constants as initialisers.

    Raises:
        ValueError: The graph holds control flow.
        BackendUnavailableError: The package onnx is not installed.
    """
    require_packages("onnx")
    import onnx.inliner

    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    if plain.functions:
        plain = onnx.inliner.inline_local_functions(plain)
    if flow := sorted({n.op_type for n in plain.graph.node if n.op_type in _CONTROL_FLOW}):
        raise ValueError(f"expected a graph without control flow, got {flow}")
    _constants_to_initializers(plain.graph)
    return plain


def import_graphsurgeon() -> Any:
    """The package onnx_graphsurgeon, which else prints remarks of its own.

    Raises:
        BackendUnavailableError: It is not installed.
    """
    require_packages("onnx", "onnx_graphsurgeon")
    import onnx_graphsurgeon

    logger = onnx_graphsurgeon.logger.G_LOGGER
    logger.severity = logger.ERROR
    return onnx_graphsurgeon


def require_packages(*packages: str) -> None:
    """Refuse to go on without packages that edit graphs.

    Raises:
        BackendUnavailableError: One of them is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise BackendUnavailableError(
                f"precision fp16 or int8: expected the package {package}, got none; "
                'run: pip install "edgetrack[onnx]"'
            )


def _constants_to_initializers(graph: "onnx.GraphProto") -> None:
    """Turn float ``Constant`` nodes into initialisers of the same name."""
    import onnx

    kept = []
    for node in graph.node:
        value = node.attribute[0] if node.op_type == "Constant" else None
        if value is not None and value.name == "value":
            graph.initializer.add().CopyFrom(value.t)
        elif value is not None and value.name in ("value_float", "value_floats"):
            content = value.f if value.name == "value_float" else list(value.floats)
            array = np.asarray(content, np.float32)
            graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(array))
        else:
            kept.append(node)
            continue
        graph.initializer[-1].name = node.output[0]
    del graph.node[:]
    graph.node.extend(kept)
