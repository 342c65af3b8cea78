import json
from pathlib import Path
from typing import Any

import pytest

from edgetrack.backends.engine import SIDECAR_NAME, BuiltGraph, EngineKey, EngineSet, find_engines
from edgetrack.bundle import sha256_of
from edgetrack.errors import EngineMismatchError

KEY = EngineKey(
    model="toy",
    bundle_digest="0",
    precision="fp32",
    backend="onnxruntime",
    backend_version="1",
    device="CPU",
    arch="x86_64",
)


@pytest.fixture
def engines(tmp_path: Path) -> EngineSet:
    """Engines of the graph ``template``, with a sidecar to spoil."""
    folder = tmp_path / KEY.folder_name
    folder.mkdir()
    file = folder / "template.onnx"
    file.write_bytes(b"engine")
    graph = BuiltGraph(
        file=file.name, sha256=sha256_of(file), size_bytes=6, build_s=0.5, precision="fp32"
    )
    engines = EngineSet(path=folder, key=KEY, graphs={"template": graph}, built_at="now")
    engines.write()
    return engines


def test_engines_are_found_by_their_key(engines: EngineSet) -> None:
    assert find_engines(engines.path.parent, KEY, graphs=["template"]) == engines


def test_a_graph_that_is_missing_is_named(engines: EngineSet) -> None:
    message = (
        r"engines\.json: expected the graphs .*, got none of \['segment_0'\]; run: edgetrack b"
    )
    with pytest.raises(EngineMismatchError, match=message + "uild --force"):
        find_engines(engines.path.parent, KEY, graphs=["template", "segment_0"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sha256", 5),
        ("sha256", None),
        ("size_bytes", "6"),
        ("size_bytes", True),
        ("build_s", []),
        ("precision", 8),
        ("file", 7),
    ],
)
def test_a_value_of_another_kind_is_refused(engines: EngineSet, field: str, value: Any) -> None:
    sidecar = engines.path / SIDECAR_NAME
    content = json.loads(sidecar.read_text(encoding="utf-8"))
    content["graphs"]["template"][field] = value
    sidecar.write_text(json.dumps(content), encoding="utf-8")

    with pytest.raises(
        EngineMismatchError, match=rf"got: .* as the {field} of template; run: edge"
    ):
        find_engines(engines.path.parent, KEY, graphs=["template"])
