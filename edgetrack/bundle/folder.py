"""Folders that are written whole or not at all, and hashes of files."""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["sha256_of", "whole_folder"]


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that becomes ``target`` only if the block succeeds.

    A killed or failed writer leaves no half-written ``target``, and the old one stays until the
    new one is complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = partial.with_name(partial.name + ".old")
    try:
        yield partial
        partial.chmod(0o755)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)  # interrupted between the two renames
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)
