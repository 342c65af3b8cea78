"""Manifests that a test changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Manifest = dict[str, Any]


def change_manifest(folder: Path, change: Callable[[Manifest], object]) -> None:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def put(*path: str | int, value: Any) -> Callable[[Manifest], None]:
    """A change that puts a value at a place in the manifest."""

    def change(manifest: Manifest) -> None:
        place: Any = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change
