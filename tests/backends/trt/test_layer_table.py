from pathlib import Path

from edgetrack.backends.trt.layer_table import (
    LayerRow,
    layer_table,
    read_layer_table,
    write_layer_table,
)

# As TensorRT-RTX 1.7.1 writes it, the tensors' dimensions and strides left out.
LOG = """Layers:
Name: __myl_FcAdd_myl0_1, LayerType: runtime_fusion, Inputs: [ { Name: a, Datatype: Half, Format: \
(Linear) Row major linear format }], Constants: [], Outputs: [ { Name: b, Datatype: Float }], \
TacticName: , StreamId: 0, Metadata: [ONNX Layer: node_MatMul_1][ONNX Layer: node_linear]
Name: node_MatMul_50_myl0_3, LayerType: gemm, Inputs: [ { Name: b, Datatype: Float }], \
Outputs: [ { Name: c, Datatype: Float }], TacticName: __myelin_CASK_STUB, StreamId: 0, \
Metadata: [ONNX Layer: node_MatMul_50]

I/O Tensors:
Name: tokens, LayerType: none"""

ROWS = (
    LayerRow(
        name="__myl_FcAdd_myl0_1",
        type="runtime_fusion",
        precision="Half",
        tactic="",
        onnx_nodes=("node_MatMul_1", "node_linear"),
    ),
    LayerRow(
        name="node_MatMul_50_myl0_3",
        type="gemm",
        precision="Float",
        tactic="__myelin_CASK_STUB",
        onnx_nodes=("node_MatMul_50",),
    ),
)


def test_the_table_is_found_among_other_messages() -> None:
    assert layer_table(["Building engine", LOG, "Total Weights Memory: 1 bytes"]) == ROWS


def test_a_log_without_a_table_has_no_rows() -> None:
    assert layer_table(["Building engine"]) == ()


def test_a_written_table_is_read_back(tmp_path: Path) -> None:
    engine = tmp_path / "segment_0.plan"

    write_layer_table(engine, ROWS)

    assert read_layer_table(engine) == ROWS


def test_an_engine_without_a_table_has_no_rows(tmp_path: Path) -> None:
    assert read_layer_table(tmp_path / "segment_0.onnx") == ()
