"""The calibration cache: what INT8 needs to know of a model's activations, as JSON.

Written by ``calibrate``, read by every backend's build. It belongs to the graphs of one bundle.
The same crops give the same bytes: it holds no times.
"""

import dataclasses
import hashlib
import json
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetrack.bundle import Bundle
from edgetrack.errors import CalibrationError

__all__ = ["CACHE_FORMAT_VERSION", "CalibrationCache", "find_cache", "load_cache"]

FOLDER_NAME = "calibration"

CACHE_FORMAT_VERSION = 1
_DO = "make another with: edgetrack calibrate"


@dataclass(frozen=True, kw_only=True)
class CalibrationCache:
    """Ranges of a bundle's activations, and how they were found.

    Attributes:
        model: Name of the bundle.
        bundle_digest: ``Bundle.digest`` of the graphs that ran.
        method: How ranges were chosen, one of ``ranges.METHODS``.
        percentile: The share that the method ``percentile`` does not clip, in percent.
        smoothing: Strength of SmoothQuant, 0 to 1; 0 is none.
        ranges: Graph → activation → the largest magnitude that INT8 represents. Of the smoothed
            graphs, where smoothing is on.
        channel_maxima: Graph → smoothable activation → largest magnitude per channel, unsmoothed.
        frames: Name and SHA-256 of the crops of each frame that was seen.
        tools: Package → version.
        losses: ``<graph>/<layer>`` → what quantising it alone costs (see ``sensitivity``).
        float_layers: ``<graph>/<layer>`` that stay in float.
    """

    model: str
    bundle_digest: str
    method: str
    percentile: float
    smoothing: float
    ranges: Mapping[str, Mapping[str, float]]
    channel_maxima: Mapping[str, Mapping[str, tuple[float, ...]]]
    frames: tuple[tuple[str, str], ...]
    tools: Mapping[str, str]
    losses: Mapping[str, float] = field(default_factory=dict)
    float_layers: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """``<model>-<hash>.json``, the hash over all of the cache."""
        return f"{self.model}-{hashlib.sha256(self._text().encode()).hexdigest()[:8]}.json"

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "CalibrationCache":
        """Read a cache.

        Raises:
            CalibrationError: There is none at ``path``, it is of a newer format, or damaged.
        """
        file = Path(path)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version = content.pop("format_version")
            if isinstance(version, int) and version > CACHE_FORMAT_VERSION:
                raise CalibrationError(
                    f"{file}: expected format version <= {CACHE_FORMAT_VERSION}, got {version}; "
                    "update edgetrack: pip install --upgrade edgetrack"
                )
            return _parsed(content)
        except OSError as error:
            raise CalibrationError(
                f"{file}: expected a calibration cache, got: {error.strerror}; {_DO}"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CalibrationError(
                f"{file}: expected a calibration cache, got: {reprlib.repr(str(error))}; {_DO}"
            ) from error

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the cache, and its folder; an interrupted or failed write leaves what was there.

        Raises:
            CalibrationError: There is no room for it, or no leave to write there.
        """
        file = Path(path)
        partial = file.with_name(f".{file.name}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_text(self._text(), encoding="utf-8")
                partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise CalibrationError(
                f"{file}: expected room and leave to write the calibration cache, got: "
                f"{error.strerror}; free some space, or choose another folder"
            ) from error

    def check(self, bundle: Bundle) -> None:
        """Refuse a bundle that was not calibrated.

        Raises:
            CalibrationError: The cache is of another model, or of other weights.
        """
        if (self.model, self.bundle_digest) != (bundle.name, bundle.digest):
            raise CalibrationError(
                f"calibration cache: expected one of {bundle.name} with the graphs "
                f"{bundle.digest[:12]}…, got one of {self.model} with {self.bundle_digest[:12]}…; "
                f"{_DO}"
            )

    def ranges_of(self, graph: str, tensors: Iterable[str]) -> Mapping[str, float]:
        """Ranges of a graph's activations.

        Raises:
            CalibrationError: One is missing.
        """
        ranges = self.ranges.get(graph, {})
        if missing := sorted(set(tensors) - ranges.keys()):
            raise CalibrationError(
                f"calibration cache of {self.model}: expected a range for {missing[0]!r} of "
                f"{graph}, got none; {_DO}"
            )
        return ranges

    def _text(self) -> str:
        content = {"format_version": CACHE_FORMAT_VERSION, **dataclasses.asdict(self)}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"


def find_cache(bundle: Bundle, folder: str | os.PathLike[str]) -> Path | None:
    """The cache of a bundle in a folder, the newest; ``None`` if there is none."""
    files = sorted(Path(folder).glob(f"{bundle.name}-*.json"), key=_age)
    return next((f for f in files if CalibrationCache.read(f).bundle_digest == bundle.digest), None)


def _age(file: Path) -> tuple[int, str]:
    return -file.stat().st_mtime_ns, file.name


def load_cache(bundle: Bundle, path: Path | None) -> CalibrationCache:
    """The cache of a bundle.

    Args:
        bundle: What will be quantised.
        path: A cache, or a folder of them; ``None`` looks into ``calibration`` in the working
            directory, then beside the bundle's graphs.

    Raises:
        CalibrationError: There is none, or it is of another bundle.
    """
    folders = (Path(FOLDER_NAME), bundle.path / FOLDER_NAME) if path is None else (path,)
    for folder in folders:
        file = folder if folder.is_file() else find_cache(bundle, folder)
        if file is not None:
            cache = CalibrationCache.read(file)
            cache.check(bundle)
            return cache
    raise CalibrationError(
        f"{folders[-1]}: expected a calibration cache of {bundle.name} ({bundle.digest[:12]}…), "
        "got none; make one with: edgetrack calibrate --frames VIDEO --bbox x,y,w,h"
    )


def _parsed(content: Mapping[str, Any]) -> CalibrationCache:
    """The cache that JSON describes.

    Raises:
        KeyError, TypeError, ValueError: A value is missing or of another kind.
    """
    cache = CalibrationCache(**content)
    return dataclasses.replace(
        cache,
        percentile=float(cache.percentile),
        smoothing=float(cache.smoothing),
        ranges={
            graph: {name: _positive(value) for name, value in ranges.items()}
            for graph, ranges in cache.ranges.items()
        },
        channel_maxima={
            graph: {name: tuple(_positive(v) for v in values) for name, values in maxima.items()}
            for graph, maxima in cache.channel_maxima.items()
        },
        frames=tuple((str(name), str(digest)) for name, digest in cache.frames),
        float_layers=tuple(cache.float_layers),
    )


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{number} as the range of an activation")
    return number
