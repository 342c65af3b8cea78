"""What `import edgetrack` gives, and what it costs."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import edgetrack

MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(edgetrack.__path__, "edgetrack.")
    if not m.name.endswith("__main__")
)


def test_import_loads_nothing_heavy() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "cv2", "matplotlib",
             "typer", "rich", "safetensors")  # fmt: skip
    code = f"import edgetrack, sys; print([m for m in {heavy!r} if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_build_stays_a_function_after_its_module_was_imported() -> None:
    code = "import edgetrack.build, edgetrack; assert callable(edgetrack.build)"

    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", edgetrack.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(edgetrack, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = edgetrack.nothing


@pytest.mark.parametrize("module", MODULES)
def test_all_is_sorted_and_its_names_are_documented(module: str) -> None:
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", [])

    # ruff's order: constants, then classes, then functions, each by name
    assert list(names) == sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert loaded.__doc__
    for name in names:
        assert hasattr(loaded, name), name
        value = getattr(loaded, name)
        if getattr(value, "__module__", None) == module:
            assert value.__doc__, f"{module}.{name}"
