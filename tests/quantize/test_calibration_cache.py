import contextlib
import dataclasses
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgetrack.bundle import Bundle
from edgetrack.errors import CalibrationError
from edgetrack.quantize.cache import CACHE_FORMAT_VERSION, CalibrationCache, find_cache
from edgetrack.quantize.calibrate import smoothed_graphs
from edgetrack.quantize.int8 import quantize_bundle

COMMITTED = Path(__file__).parents[2] / "calibration"


@pytest.fixture
def file(cache: CalibrationCache, tmp_path: Path) -> Path:
    path = tmp_path / cache.file_name
    cache.write(path)
    return path


def rewrite(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(content | changes), "utf-8")


@contextlib.contextmanager
def limited_file_size(size_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_written_is_read(cache: CalibrationCache, file: Path) -> None:
    assert CalibrationCache.read(file) == cache


def test_a_cache_read_and_written_has_the_same_bytes(file: Path, tmp_path: Path) -> None:
    CalibrationCache.read(file).write(tmp_path / "again.json")

    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


def test_its_name_says_model_and_content(cache: CalibrationCache) -> None:
    other = dataclasses.replace(cache, float_layers=("segment_1/a",))

    assert cache.file_name.startswith("early_exit_vit-tiny-")
    assert other.file_name != cache.file_name


def test_another_model_is_refused(cache: CalibrationCache, toy: Bundle) -> None:
    with pytest.raises(
        CalibrationError, match=r"expected one of toy with .* got one of early_exit_vit-tiny with"
    ):
        cache.check(toy)


def test_other_weights_are_refused(cache: CalibrationCache, shipped_bundle: Bundle) -> None:
    other = dataclasses.replace(cache, bundle_digest="0" * 64)

    with pytest.raises(CalibrationError, match="got one of early_exit_vit-tiny with 000000000000"):
        quantize_bundle(shipped_bundle, other)


def test_a_newer_format_is_refused(file: Path) -> None:
    rewrite(file, format_version=CACHE_FORMAT_VERSION + 1)

    with pytest.raises(CalibrationError, match="expected format version <= 1, got 2; update"):
        CalibrationCache.read(file)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "nonsense", '{"format_version": 1}', '{"format_version": 1, "other": 2}'],
)
def test_what_is_no_cache_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "cache.json"
    file.write_text(content)

    with pytest.raises(CalibrationError, match=r"cache\.json: expected a calibration cache, got"):
        CalibrationCache.read(file)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, "wide", None])
def test_a_range_that_is_no_magnitude_is_refused(file: Path, bad: Any) -> None:
    rewrite(file, ranges={"segment_1": {"tokens": bad}})

    with pytest.raises(CalibrationError, match="expected a calibration cache"):
        CalibrationCache.read(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"got: No such file.*make another with"):
        CalibrationCache.read(tmp_path / "none.json")


def test_a_missing_tensor_is_named(cache: CalibrationCache, shipped_bundle: Bundle) -> None:
    ranges = {graph: dict(of_graph) for graph, of_graph in cache.ranges.items()}
    del ranges["segment_2"]["layer_norm"]
    without = dataclasses.replace(cache, ranges=ranges)

    with pytest.raises(
        CalibrationError, match="expected a range for 'layer_norm' of segment_2, got none"
    ):
        quantize_bundle(shipped_bundle, without)


def test_a_missing_output_of_a_convolution_is_named(
    cache: CalibrationCache, shipped_bundle: Bundle
) -> None:
    ranges = {graph: dict(of_graph) for graph, of_graph in cache.ranges.items()}
    del ranges["segment_0"]["relu_4"]
    without = dataclasses.replace(cache, ranges=ranges)

    with pytest.raises(CalibrationError, match="expected a range for 'relu_4' of segment_0"):
        quantize_bundle(shipped_bundle, without, runtime="onnxruntime")


def test_missing_channel_maxima_are_named(cache: CalibrationCache, shipped_bundle: Bundle) -> None:
    without = dataclasses.replace(cache, channel_maxima={})

    with pytest.raises(CalibrationError, match=r"expected maxima for 'layer_norm.*' of segment_1"):
        smoothed_graphs(shipped_bundle, without)


def test_an_interrupted_write_leaves_what_was_there(
    cache: CalibrationCache, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(cache, float_layers=("segment_1/a",)).write(file)

    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_full_disk_is_told_and_leaves_what_was_there(cache: CalibrationCache, file: Path) -> None:
    before = file.read_bytes()

    with limited_file_size(1000), pytest.raises(CalibrationError, match="expected room and leave"):
        dataclasses.replace(cache, float_layers=("segment_1/a",)).write(file)

    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_place_that_is_no_folder_is_told(cache: CalibrationCache, file: Path) -> None:
    with pytest.raises(CalibrationError, match="expected room and leave to write"):
        cache.write(file / "below.json")


def test_a_folder_is_made_where_there_is_none(cache: CalibrationCache, tmp_path: Path) -> None:
    cache.write(tmp_path / "new" / "cache.json")

    assert CalibrationCache.read(tmp_path / "new" / "cache.json") == cache


def test_the_cache_of_a_bundle_is_found(
    cache: CalibrationCache, file: Path, shipped_bundle: Bundle, toy: Bundle
) -> None:
    other = dataclasses.replace(cache, bundle_digest="0" * 64)
    other.write(file.parent / other.file_name)

    assert find_cache(shipped_bundle, file.parent) == file
    assert find_cache(toy, file.parent) is None
    assert find_cache(shipped_bundle, file.parent / "none") is None


def test_of_several_caches_the_newest_is_found(
    cache: CalibrationCache, shipped_bundle: Bundle, tmp_path: Path
) -> None:
    names = ("b", "a", "c")
    for age, name in enumerate(names):
        path = tmp_path / f"{cache.model}-{name}.json"
        cache.write(path)
        os.utime(path, (1_000_000 - age, 1_000_000 - age))

    found = find_cache(shipped_bundle, tmp_path)

    assert found is not None
    assert found.name.endswith("-b.json")


def test_the_committed_cache_fits_the_bundle_that_ships(shipped_bundle: Bundle) -> None:
    path = find_cache(shipped_bundle, COMMITTED)

    assert path is not None
    cache = CalibrationCache.read(path)
    assert path.name == cache.file_name
    assert len(cache.frames) >= 200
    assert all(name.startswith("synthetic-") for name, _ in cache.frames)
    assert cache.losses
