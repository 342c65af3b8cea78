"""Evaluate over many sequences, keep each result as it finishes, resume, sum up.

An output folder holds two files per finished sequence: ``<name>.csv``, what the tracker said per
frame, and ``<name>.json``, its metrics and the key of the run, written last.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetrack.data.sequences import Sequence
from edgetrack.errors import DataError
from edgetrack.evaluate.metrics import Metrics, mean_metrics, spearman_rho
from edgetrack.evaluate.protocols import (
    FrameRow,
    ProtocolName,
    SequenceResult,
    SingleObjectTracker,
    evaluate_sequence,
)

__all__ = ["Evaluation", "evaluate", "read_rows", "write_rows"]

COLUMNS = ("frame", "x", "y", "w", "h", "score", "exit", "uncertainty", "ms")


@dataclass(frozen=True)
class Evaluation:
    """Results over sequences.

    Attributes:
        sequences: One result per sequence, in the order given.
    """

    sequences: tuple[SequenceResult, ...]

    @property
    def mean(self) -> Metrics:
        """Mean over sequences: each counts the same, however long it is."""
        return mean_metrics([s.metrics for s in self.sequences])

    @property
    def fps(self) -> float:
        """All updates over all seconds spent in them."""
        num_updates = sum(len(s.rows) - 1 for s in self.sequences)
        return num_updates / max(sum(s.seconds for s in self.sequences), 1e-9)

    @property
    def exit_histogram(self) -> tuple[int, ...]:
        """Frames of all sequences that stopped at each exit."""
        histograms = [s.exit_histogram for s in self.sequences]
        num_exits = max(map(len, histograms))
        return tuple(sum(h[k] for h in histograms if k < len(h)) for k in range(num_exits))

    @property
    def uncertainty_rho(self) -> tuple[float, ...]:
        """Spearman's rho of uncertainty and overlap, over the scored frames of each exit.

        Below 0 where the uncertainty tells good boxes from bad ones; NaN where nothing can be
        said.
        """
        pairs: list[list[tuple[float, float]]] = [[] for _ in self.exit_histogram]
        for result in self.sequences:
            for row, overlap in zip(result.rows, result.overlaps.tolist(), strict=True):
                if row.exit_index is not None and row.uncertainty is not None:
                    pairs[row.exit_index].append((row.uncertainty, overlap))
        return tuple(spearman_rho(*np.reshape(p, (-1, 2)).T) for p in pairs)

    def as_dict(self) -> dict[str, Any]:
        """The summary as JSON takes it: metrics per sequence and their mean; NaN is ``None``."""
        return {
            "protocol": self.sequences[0].protocol,
            "sequences": [_summary(s) for s in self.sequences],
            "mean": dataclasses.asdict(self.mean),
            "fps": self.fps,
            "exit_histogram": list(self.exit_histogram),
            "uncertainty_rho": [None if math.isnan(v) else v for v in self.uncertainty_rho],
        }


def evaluate(
    tracker: SingleObjectTracker,
    sequences: Iterable[Sequence],
    *,
    protocol: ProtocolName = "ope",
    output: str | os.PathLike[str] | None = None,
    fingerprint: str = "",
    on_sequence: Callable[[SequenceResult], None] | None = None,
) -> Evaluation:
    """Evaluate a tracker over sequences; an interrupted run goes on where it stopped.

    Args:
        tracker: See ``SingleObjectTracker``; started anew on each sequence.
        sequences: At least one.
        protocol: ``ope`` or ``otb``.
        output: Folder for the results, made if it is missing; ``None`` keeps nothing.
        fingerprint: Names all that decides what the tracker says: bundle, thresholds, precision
            … A sequence finished under the same fingerprint, protocol and truth is not run again.
        on_sequence: Called after each sequence, resumed ones too.

    Raises:
        SourceError: A picture cannot be read.
        ValueError: There is no sequence, or see ``evaluate_sequence``.
    """
    folder = None if output is None else Path(output)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    results = []
    for sequence in sequences:
        key = _key(fingerprint, protocol, sequence)
        result = None if folder is None else _finished(folder, sequence, protocol, key)
        if result is None:
            result = evaluate_sequence(tracker, sequence, protocol=protocol)
            if folder is not None:
                _keep(folder, result, key)
        results.append(result)
        if on_sequence is not None:
            on_sequence(result)
    if not results:
        raise ValueError("sequences: expected at least one sequence, got none")
    return Evaluation(tuple(results))


def write_rows(path: str | os.PathLike[str], rows: Iterable[FrameRow]) -> None:
    """Write what a tracker said per frame as CSV; a cell is empty where it said nothing.

    Columns: frame, x, y, w, h, score, exit, uncertainty, ms. The file appears whole.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(dataclasses.astuple(row) for row in rows)
    _write_whole(Path(path), text.getvalue())


def read_rows(path: str | os.PathLike[str]) -> tuple[FrameRow, ...]:
    """Read what ``write_rows`` wrote, digit for digit.

    Raises:
        DataError: The file is missing or malformed; the message names file and line.
    """
    where = os.fspath(path)
    try:
        header, *lines = csv.reader(io.StringIO(Path(path).read_text("utf-8")))
        if tuple(header) != COLUMNS:
            raise ValueError(f"columns {','.join(header)}")
        rows = []
        for number, cells in enumerate(lines, 2):
            where = f"{os.fspath(path)}:{number}"
            rows.append(_parse(cells))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{where}: expected columns {','.join(COLUMNS)}, got: {error}; evaluate again"
        ) from error
    return tuple(rows)


def _parse(cells: list[str]) -> FrameRow:
    frame, x, y, w, h, score, exit_index, uncertainty, ms = cells
    return FrameRow(
        int(frame),
        *(float(x), float(y), float(w), float(h)),
        score=float(score) if score else None,
        exit_index=int(exit_index) if exit_index else None,
        uncertainty=float(uncertainty) if uncertainty else None,
        latency_ms=float(ms) if ms else None,
    )


def _key(fingerprint: str, protocol: str, sequence: Sequence) -> str:
    digest = hashlib.sha256(f"{fingerprint}\n{protocol}\n{sequence.name}\n".encode())
    digest.update(sequence.boxes_xywh.tobytes())
    return digest.hexdigest()


def _finished(
    folder: Path, sequence: Sequence, protocol: ProtocolName, key: str
) -> SequenceResult | None:
    """The result of an earlier run with this key, if it is there and whole."""
    try:
        kept = json.loads((folder / f"{sequence.name}.json").read_text("utf-8"))
        rows = read_rows(folder / f"{sequence.name}.csv")
    except (OSError, ValueError, DataError):
        return None
    if (
        not isinstance(kept, dict)
        or kept.get("key") != key
        or len(rows) != len(sequence.boxes_xywh)
    ):
        return None
    return SequenceResult.score(rows, sequence, protocol=protocol)


def _keep(folder: Path, result: SequenceResult, key: str) -> None:
    write_rows(folder / f"{result.name}.csv", result.rows)
    content = {"key": key, "protocol": result.protocol, **_summary(result)}
    _write_whole(folder / f"{result.name}.json", json.dumps(content, indent=1) + "\n")


def _summary(result: SequenceResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "num_frames": len(result.rows),
        "num_scored": int(np.isfinite(result.overlaps).sum()),
        **dataclasses.asdict(result.metrics),
        "fps": result.fps,
        "exit_histogram": list(result.exit_histogram),
    }


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise DataError(
            f"{path}: expected to write it, got: {error.strerror}; free some room or choose "
            "another folder"
        ) from error
