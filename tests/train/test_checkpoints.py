import io
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetrack.errors import CheckpointError
from edgetrack.train.checkpoints import find_checkpoint, read_checkpoint, write_checkpoint

RECIPE = {"name": "one", "seed": 0}


def content_of(**changes: Any) -> dict[str, Any]:
    weights = {"layer": torch.arange(500.0)}
    content = {
        "recipe": RECIPE,
        "stage": 1,
        "step": 7,
        "model": weights,
        "average": weights,
        "optimizer": {},
        "rng": torch.get_rng_state(),
    }
    return content | changes


def saved_bytes(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def zip_bytes() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", "text")
    return stream.getvalue()


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, content_of())

    saved = find_checkpoint(tmp_path, recipe=RECIPE)

    assert saved is not None
    assert saved["step"] == 7
    assert torch.equal(saved["model"]["layer"], torch.arange(500.0))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, recipe=RECIPE) is None


def test_a_checkpoint_of_another_recipe_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, content_of())

    with pytest.raises(CheckpointError, match="expected a run of this recipe, got one of 'one'"):
        find_checkpoint(tmp_path, recipe={**RECIPE, "seed": 1})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello world",
        b"\0" * 100,
        b"\x80\x04" + b"\xff" * 50,
        zip_bytes(),
        saved_bytes(content_of())[:3000],
        saved_bytes(content_of()).replace(b"recipe", b"\xff" * 6),
        saved_bytes({"path": Path("of a class that must not be made")}),
        saved_bytes({"average": {}}),
        saved_bytes([1, 2, 3]),
    ],
    ids=[
        "empty",
        "text",
        "zeros",
        "pickle",
        "zip",
        "cut off",
        "overwritten",
        "of a class",
        "without keys",
        "list",
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: expected a checkpoint") as caught:
        read_checkpoint(tmp_path)

    assert "weights_only" not in str(caught.value)  # torch's advice is to read it unsafely


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    content = saved_bytes(content_of(optimizer=Malicious(tmp_path / "made")))
    (tmp_path / "checkpoint.pt").write_bytes(content)

    with pytest.raises(CheckpointError, match="damaged or foreign file"):
        read_checkpoint(tmp_path)

    assert not (tmp_path / "made").exists()
