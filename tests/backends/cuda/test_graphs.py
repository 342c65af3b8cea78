"""The structures that are passed to the driver; tests/emulated has what is done with them."""

import ctypes
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from edgetrack.backends.cuda import graphs
from edgetrack.backends.cuda.graphs import supports_conditional_nodes

# Name there → name here, as an offset in bytes; constants as themselves.
LAYOUT = {
    "sizeof(CUgraphNodeParams)": 256,
    "offsetof(CUgraphNodeParams, type)": 0,
    "offsetof(CUgraphNodeParams, conditional)": 16,
    "offsetof(CUgraphNodeParams, reserved2)": 248,
    "sizeof(CUDA_CONDITIONAL_NODE_PARAMS)": 32,
    "offsetof(CUDA_CONDITIONAL_NODE_PARAMS, handle)": 0,
    "offsetof(CUDA_CONDITIONAL_NODE_PARAMS, type)": 8,
    "offsetof(CUDA_CONDITIONAL_NODE_PARAMS, size)": 12,
    "offsetof(CUDA_CONDITIONAL_NODE_PARAMS, phGraph_out)": 16,
    "offsetof(CUDA_CONDITIONAL_NODE_PARAMS, ctx)": 24,
}
CONSTANTS = {
    "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": graphs._CAPTURE_THREAD_LOCAL,
    "CU_STREAM_CAPTURE_STATUS_ACTIVE": graphs._CAPTURE_ACTIVE,
    "CU_STREAM_SET_CAPTURE_DEPENDENCIES": graphs._SET_DEPENDENCIES,
    "CU_GRAPH_COND_ASSIGN_DEFAULT": graphs._ASSIGN_DEFAULT,
    "CU_GRAPH_COND_TYPE_IF": graphs._CONDITION_IF,
    "CU_GRAPH_NODE_TYPE_GRAPH": graphs._NODE_GRAPH,
    "CU_GRAPH_NODE_TYPE_CONDITIONAL": graphs._NODE_CONDITIONAL,
    "CU_GRAPH_NODE_TYPE_HOST": 3,
    "CU_GRAPH_NODE_TYPE_MEM_ALLOC": 10,
    "CU_GRAPH_NODE_TYPE_MEM_FREE": 11,
    "CU_GRAPH_NODE_TYPE_BATCH_MEM_OP": 12,
}
OLDEST = {  # calls that had another form before CUDA 12.4, with that of the header's prototypes
    "cuStreamGetCaptureInfo": "cuStreamGetCaptureInfo_v3",
    "cuStreamUpdateCaptureDependencies": "cuStreamUpdateCaptureDependencies_v2",
    "cuGraphAddNode": "cuGraphAddNode_v2",
}


def find_header() -> Path:
    """``cuda.h`` of a toolkit, or of NVIDIA's wheel."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    folders += sorted(Path("/usr/local").glob("cuda*/include"))
    folders += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"))
    for folder in folders:
        header = folder / "cuda.h"
        if header.is_file() and "CUDA_CONDITIONAL_NODE_PARAMS" in header.read_text("utf-8"):
            return header
    pytest.skip("needs cuda.h: a CUDA toolkit, or pip install nvidia-cuda-runtime")


def test_structures_are_laid_out_as_the_driver_reads_them() -> None:
    params, node = graphs._ConditionalParams, graphs._NodeParams

    assert list(LAYOUT.values()) == [
        ctypes.sizeof(node),
        node.type.offset,
        node.of_type.offset,
        node.reserved2.offset,
        ctypes.sizeof(params),
        *(getattr(params, name).offset for name, *_ in params._fields_),
    ]


def test_the_layout_is_that_of_the_header(tmp_path: Path) -> None:
    header = find_header()
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    checks = "".join(
        f'_Static_assert({there} == {here}, "{there}");\n'
        for there, here in {**LAYOUT, **CONSTANTS}.items()
    )
    (tmp_path / "layout.c").write_text(f"#include <stddef.h>\n#include <cuda.h>\n{checks}")

    done = subprocess.run(
        ["gcc", f"-I{header.parent}", "-fsyntax-only", tmp_path / "layout.c"],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr


def test_the_header_still_has_the_forms_that_are_called() -> None:
    text = find_header().read_text("utf-8")
    version = int(re.findall(r"#define CUDA_VERSION (\d+)", text)[0])

    for name, form in OLDEST.items():
        if version >= 13000:
            assert re.search(rf"#define {name}\s+\S*\b{form}\b", text), name
        assert form in text


def test_without_a_driver_there_are_no_conditional_nodes() -> None:
    if graphs.load_driver() is not None:
        pytest.skip("this machine has a CUDA driver")

    assert not supports_conditional_nodes()
