"""What TensorRT made of a graph: the kernels of an engine, read from the verbose build log.

The engine inspector needs a GPU; the log does not, so plans can be looked at and tested anywhere.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LayerRow", "layer_table", "read_layer_table", "write_layer_table"]

_PRODUCT_TYPES = frozenset({"gemm", "runtime_fusion", "correlation", "conv"})
_FIRST_LINE = "Layers:"
_END = "I/O Tensors:"


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One kernel of an engine.

    Attributes:
        name: TensorRT's name.
        type: Kind of kernel: ``gemm``, ``runtime_fusion`` (a GEMM with what follows it),
            ``correlation`` (a convolution), ``kgen`` (generated) …
        precision: Type of its first input, in which a GEMM multiplies: ``Half``, ``Float`` …
        tactic: The implementation chosen.
        onnx_nodes: The ONNX nodes that it computes.
    """

    name: str
    type: str
    precision: str
    tactic: str
    onnx_nodes: tuple[str, ...]

    @property
    def is_attention(self) -> bool:
        """Whether it computes a whole attention, both products and the softmax."""
        return "_mha_" in self.name

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices: GEMMs, convolutions, fused attention."""
        return self.type in _PRODUCT_TYPES or "_gemm_" in self.name or "_myl_Fc" in self.name


def layer_table(log_lines: Iterable[str]) -> tuple[LayerRow, ...]:
    """Read the layer table out of a verbose build log.

    Args:
        log_lines: Messages of the log, one or more lines each.

    Returns:
        One row per kernel, in the order of running; none if the log has no table, which
        TensorRT writes only at ``ProfilingVerbosity.DETAILED``.
    """
    text = "\n".join(log_lines)
    start = text.find(_FIRST_LINE)
    if start < 0:
        return ()
    table = text[start + len(_FIRST_LINE) :].partition(_END)[0]
    return tuple(_row(line) for line in table.splitlines() if line.startswith("Name: "))


def read_layer_table(engine_path: Path) -> tuple[LayerRow, ...]:
    """The table that was written beside an engine; no rows if there is none."""
    file = _table_path(engine_path)
    if not file.is_file():
        return ()
    rows = json.loads(file.read_text(encoding="utf-8"))
    return tuple(LayerRow(**{**r, "onnx_nodes": tuple(r["onnx_nodes"])}) for r in rows)


def write_layer_table(engine_path: Path, rows: Iterable[LayerRow]) -> None:
    """Write a table beside its engine, as ``<engine>.layers.json``."""
    text = json.dumps([dataclasses.asdict(row) for row in rows], indent=0)
    _table_path(engine_path).write_text(text + "\n", encoding="utf-8")


def _table_path(engine_path: Path) -> Path:
    return engine_path.with_suffix(".layers.json")


def _row(line: str) -> LayerRow:
    types = re.findall(r"Datatype: (\w+)", line)
    return LayerRow(
        name=_field("Name", line),
        type=_field("LayerType", line),
        precision=types[0] if types else "",
        tactic=_field("TacticName", line),
        onnx_nodes=tuple(re.findall(r"\[ONNX Layer: ([^\]]+)\]", line)),
    )


def _field(name: str, line: str) -> str:
    match = re.search(rf"(?:^|, ){name}: ([^,]*)", line)
    return match.group(1).strip() if match else ""
