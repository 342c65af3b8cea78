"""The house keeps its layers: imports go down, and heavy packages live where they are said to."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "edgetrack"

# A unit may import units of lower rank, and itself.
RANKS = {
    "__main__": 8,
    "cli": 7,
    "__init__": 6,  # the face: only the command line may import it
    **dict.fromkeys(["train", "build", "evaluate", "bench", "doctor"], 6),
    "gate": 5,  # what INT8 is worth here: runs trackers, for ``build``
    **dict.fromkeys(["tracker", "parity"], 4),
    **dict.fromkeys(["runtime", "export", "quantize", "power"], 3),
    **dict.fromkeys(["models", "data", "crops", "backends"], 2),
    **dict.fromkeys(["boxes", "bundle", "frames", "viz"], 1),
    "errors": 0,
}
# Argued exceptions.
ALLOWED_SIDEWAYS = {
    ("backends", "models"),  # eager runs the model itself, from its weights
}
HOMES = {
    "torch": ("models/", "train/", "export.py", "backends/eager.py"),
    "safetensors": ("models/", "export.py"),
    "tensorrt": ("backends/trt/",),
    "tensorrt_rtx": ("backends/trt/",),
    "pycuda": ("backends/cuda/context.py",),
    "cuda": (),  # ctypes calls what PyCUDA lacks: cuda-python has no wheels for CUDA 12.6
    "onnx": ("export.py", "quantize/"),
    "onnx_graphsurgeon": ("export.py", "quantize/"),
    "onnxruntime": ("backends/ort.py", "quantize/calibrate.py"),
    "cv2": (
        *("crops.py", "frames/", "viz.py"),
        *("data/folder.py", "data/sprites.py", "data/synthetic.py"),  # pictures are their matter
        *("data/lazy.py", "data/pseudo_tracks.py"),
        *("train/image_store.py", "train/pseudo_tracks.py", "train/targets.py"),
    ),
    "matplotlib": ("viz.py",),
    "typer": ("cli/",),
    "rich": ("cli/",),
}
FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTERS = ("import_module", "import_package", "__import__")


def imports_of(path: Path) -> list[str]:
    """All that a file imports, inside functions and by name too, but not for type checking only."""
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(IMPORTERS):
            names += [a.value for a in node.args if isinstance(a, ast.Constant)]
    return names


def unit_named(name: str, *, importer: str) -> str:
    """The unit of this package that an imported name lies in; the importer's own for others."""
    if name.split(".")[0] != "edgetrack":
        return importer
    unit = name.split(".")[1] if "." in name else "__init__"
    return unit if unit in RANKS else "__init__"


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    unit = unit_of(path)
    if unit == "__init__":
        return

    wrong = []
    for name in imports_of(path):
        target = unit_named(name, importer=unit)
        is_down = target == unit or RANKS[target] < RANKS[unit]
        if not is_down and (unit, target) not in ALLOWED_SIDEWAYS:
            wrong.append(name)

    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_live_in_their_homes(path: Path) -> None:
    relative = path.relative_to(PACKAGE).as_posix()

    wrong = [
        name
        for name in imports_of(path)
        if name.split(".")[0] in HOMES and not relative.startswith(HOMES[name.split(".")[0]])
    ]

    assert wrong == []


def test_every_unit_has_a_layer() -> None:
    assert {unit_of(p) for p in FILES} <= set(RANKS)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import torch.nn", ["torch.nn"]),
        ("from edgetrack.bundle import Bundle", ["edgetrack.bundle.Bundle"]),
        ("from edgetrack import tracker", ["edgetrack.tracker"]),
        ("def f():\n    import cv2", ["cv2"]),
        ("import importlib\nimportlib.import_module('onnx')", ["importlib", "onnx"]),
        ("if TYPE_CHECKING:\n    import onnx", []),
    ],
)
def test_every_way_to_import_is_seen(tmp_path: Path, line: str, found: list[str]) -> None:
    (tmp_path / "module.py").write_text(line)

    assert imports_of(tmp_path / "module.py") == found
