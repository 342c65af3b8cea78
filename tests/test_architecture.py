"""The house keeps its layers: imports go down, and heavy packages live where they are said to."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "edgetrack"

# A unit may import units of lower rank, and itself.
RANKS = {
    "__main__": 7,
    "cli": 6,
    **dict.fromkeys(["train", "build", "evaluate", "bench", "doctor"], 5),
    **dict.fromkeys(["tracker", "parity"], 4),
    **dict.fromkeys(["runtime", "export", "quantize"], 3),
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
    "tensorrt": ("backends/__init__.py",),
    "tensorrt_rtx": ("backends/__init__.py",),
    "onnx": ("export.py", "quantize/"),
    "onnxruntime": ("backends/ort.py", "backends/__init__.py"),
    "cv2": (
        *("crops.py", "frames.py", "viz.py"),
        *("data/folder.py", "data/sprites.py", "data/synthetic.py"),  # pictures are their matter
        *("train/augment.py", "train/sampling.py", "train/run.py"),
    ),
    "matplotlib": ("viz.py",),
    "typer": ("cli/",),
    "rich": ("cli/",),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> list[str]:
    """All modules that a file imports, inside functions too, but not for type checking only."""
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
            names.append(node.module or "")
    return names


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    unit = unit_of(path)
    if unit == "__init__":
        return

    wrong = []
    for name in imports_of(path):
        target = name.split(".")[1] if name.startswith("edgetrack.") else unit
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
    assert {unit_of(p) for p in FILES} - {"__init__"} <= set(RANKS)
