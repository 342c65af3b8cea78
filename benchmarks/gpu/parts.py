"""Files in parts of a limited size, with the SHA-256 of each."""

import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetrack.bundle import sha256_of
from edgetrack.errors import DataError

MIB = 1 << 20
PARTS_NAME = "parts.json"
PSEUDO_NAME = "pseudo_tracks.jsonl"
# Of a zip file: the headers of a member beside its name, and the record at the end.
_MEMBER_BYTES, _END_BYTES = 76, 22
_DATE = (1980, 1, 1, 0, 0, 0)  # the same data make the same bytes


def describe(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of each file."""
    return [{"name": f.name, "bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in files]


def check(folder: Path, entries: Sequence[Mapping[str, Any]]) -> list[Path]:
    """The parts in a folder, if all are there and as they were written.

    Raises:
        DataError: One is missing or differs.
    """
    files = [folder / str(entry["name"]) for entry in entries]
    for file, entry in zip(files, entries, strict=True):
        if not file.is_file():
            raise DataError(f"{file}: expected part of {len(files)} parts, got none; fetch it")
        if sha256_of(file) != entry["sha256"]:
            raise DataError(
                f"{file}: expected {entry['bytes']} bytes with SHA-256 {entry['sha256'][:12]}…, "
                f"got {file.stat().st_size} bytes with another; it was cut off or changed: fetch "
                "it again"
            )
    return files


def split(file: Path, folder: Path, *, part_bytes: int) -> list[dict[str, Any]]:
    """Write a file as ``<name>.part00`` and so on, in the place of older parts."""
    for old in folder.glob(f"{file.name}.part*"):
        old.unlink()
    written = []
    with file.open("rb") as source:
        while content := source.read(part_bytes):
            written.append(folder / f"{file.name}.part{len(written):02d}")
            written[-1].write_bytes(content)
    return describe(written)


def join(folder: Path, entries: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Put the parts in a folder together, whole or not at all.

    Raises:
        DataError: A part is missing or differs.
    """
    files = check(folder, entries)
    partial = target.with_name(f".{target.name}.partial")
    with partial.open("wb") as joined:
        for file in files:
            joined.write(file.read_bytes())
    partial.replace(target)


class ZipParts:
    """Zip files that are begun one after the other, as their size allows."""

    def __init__(self, folder: Path, *, part_bytes: int) -> None:
        self.folder, self.part_bytes = folder, part_bytes
        self.files: list[Path] = []
        self.kinds: Counter[str] = Counter()
        self._zip: zipfile.ZipFile | None = None
        self._bytes = 0

    def add(self, name: str, content: bytes) -> None:
        is_text = name.endswith((".json", ".jsonl", ".txt"))
        added = len(content) + 2 * len(name.encode()) + _MEMBER_BYTES
        if added + _END_BYTES > self.part_bytes:
            raise DataError(f"{name}: expected less than a part, got {added} bytes; raise "
                            "--part-mib")  # fmt: skip
        if self._zip is None or self._bytes + added + _END_BYTES > self.part_bytes:
            self.close()
            self.files.append(self.folder / f"data{len(self.files):02d}.zip")
            self._zip, self._bytes = zipfile.ZipFile(self.files[-1], "w"), 0
        member = zipfile.ZipInfo(name, _DATE)
        member.compress_type = zipfile.ZIP_DEFLATED if is_text else zipfile.ZIP_STORED
        self._zip.writestr(member, content)
        self._bytes += added - len(content) + member.compress_size
        self.kinds[Path(name).suffix[1:]] += member.compress_size

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()
            self._zip = None


def unpack(folder: Path, target: Path) -> None:
    """Check the parts in a folder and unpack them; ``target`` is whole or not there.

    Raises:
        DataError: The list or a part is missing or damaged.
    """
    files = check(folder, read_list(folder)["parts"])
    partial = target.with_name(f".{target.name}.partial")
    for old in (partial, target):
        shutil.rmtree(old, ignore_errors=True)
    for file in files:
        with zipfile.ZipFile(file) as content:
            content.extractall(partial)
    partial.rename(target)


def read_list(folder: Path) -> dict[str, Any]:
    """The list of the parts in a folder.

    Raises:
        DataError: There is none, or it is damaged.
    """
    try:
        content: dict[str, Any] = json.loads((folder / PARTS_NAME).read_text("utf-8"))
        names = [part["name"] for part in content["parts"]]
        if any(Path(name).name != name for name in names):
            raise ValueError(f"names {names}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / PARTS_NAME}: expected the list that pack_data.py writes, got: {error!r}; "
            "pack the data again"
        ) from error
    return content
