from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manifests import Manifest, change_manifest, put
from toy_bundle import write_toy_bundle

from edgetrack.bundle import Bundle
from edgetrack.errors import BundleFormatError

ANSWER = [
    {"name": "bbox_cxcywh", "dtype": "float32", "shape": [1, 4]},
    {"name": "score", "dtype": "float32", "shape": [1]},
    {"name": "uncertainty", "dtype": "float32", "shape": [1]},
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("segments", value=[]), r"expected the graphs \['template', 'segment_0'\]"),
        (put("segments", 1, "name", value="segment_0"), "expected the graphs .*'segment_1'"),
        (put("template", "inputs", 0, "name", value="image"), "template: expected input .*image"),
        (
            put("template", "inputs", 0, "shape", value=[1, 48, 48, 3]),
            "template: expected input .*48, 48, 3.*got .*32, 32, 3",
        ),
        (put("crops", "search_size_px", value=128), "segment_0: expected input .*search_region"),
        (put("segments", 1, "inputs", 0, "name", value="tokens_7"), "segment_1: .*tokens_7.*None"),
        (
            put("segments", 1, "inputs", 0, "name", value="search_region"),
            "segment_1: expected input .*search_region",
        ),
        (
            put("segments", 1, "inputs", 0, "dtype", value="float16"),
            "segment_1: expected input .*float16.*got .*float32",
        ),
        (
            put("segments", 1, "inputs", 0, "shape", value=[1, 80, 9]),
            r"segment_1: expected input .*\(1, 80, 9\).*got .*\(1, 80, 8\)",
        ),
        (put("segments", 2, "outputs", value=ANSWER[:2]), "segment_2: .*'uncertainty'.*got None"),
        (
            put("segments", 0, "outputs", 3, "dtype", value="float16"),
            "segment_0: expected output .*'uncertainty'.*float32.*got .*float16",
        ),
        (
            put("segments", 1, "outputs", 0, "name", value="tokens_0"),
            "segment_2: expected input .*tokens_1.*got None",
        ),
        (
            put("segments", 1, "outputs", 0, value={**ANSWER[0], "name": "tokens_0"}),
            "segment_1: expected output .*tokens_0.* as before, got",
        ),
    ],
)
def test_graphs_that_do_not_fit_together_are_refused(
    folder: Path, change: Callable[[Manifest], None], message: str
) -> None:
    change_manifest(folder, change)

    with pytest.raises(BundleFormatError, match=message):
        Bundle.load(folder)


def tensor(name: str, *shape: int, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def add(*path: str | int, value: Any) -> Callable[[Manifest], None]:
    """A change that appends to a list of the manifest."""

    def change(manifest: Manifest) -> None:
        place: Any = manifest
        for key in path:
            place = place[key]
        place.append(value)

    return change


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """The folder of a bundle with heads and memory, to spoil."""
    return write_toy_bundle(tmp_path / "full", heads=True, memory=True).path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["heads"].pop(), r"expected the graphs .*'head_2', 'update'\], got .*'head_1'"),
        (put("update", "name", value="head_3"), "expected the graphs .*'update'.* got .*'head_3'"),
        (
            put("heads", 0, "inputs", 0, "name", value="tokens_1"),
            "head_0: expected input .*tokens_1.* to be written before, got None",
        ),
        (
            add("heads", 1, "inputs", value=tensor("bbox_cxcywh", 1, 4)),
            "head_1: expected input .*bbox_cxcywh.* to be written before, got None",
        ),
        (put("heads", 1, "outputs", value=[]), "head_1: expected output .*bbox_cxcywh.*got None"),
        (
            add("heads", 1, "outputs", value=tensor("score", 1)),
            r"head_1: expected what the exit decides by of its segment, got \['score'\]",
        ),
        (
            lambda m: m["segments"][1]["outputs"].pop(),
            "segment_1: expected output .*uncertainty.*got None",
        ),
        (
            add("update", "inputs", value=tensor("tokens_1", 1, 80, 8)),
            "update: expected input .*tokens_1.* to be written before, got None",
        ),
        (
            put("update", "inputs", 0, "shape", value=[1, 16, 16, 3]),
            "update: expected input .*16, 16, 3.* got .*32, 32, 3",
        ),
        (
            add("update", "outputs", value=tensor("template_tokens", 1, 16, 8)),
            r"update: expected outputs that no other graph .*, got \['template_tokens'\]",
        ),
        (
            put("update", "outputs", 1, "name", value="age"),
            r"update: expected outputs that it does not read, got \['age'\]",
        ),
        (
            put("carried", value={}),
            "update: expected tensors that are carried .*, got none",
        ),
        (lambda m: m.pop("update"), r"carried \['age', 'memory'\]: expected an update gr"),
        (
            put("carried", "tokens_0", value="next_age"),
            "carried 'tokens_0': expected its first value of the template graph, got none",
        ),
        (
            put("carried", "age", value="score"),
            "carried 'age': expected 'score' of the update graph, got none",
        ),
        (
            put("carried", "age", value="next_memory"),
            r"carried 'age': expected .*'age'.*, as the template graph has it, got .*next_memory",
        ),
        (
            add("segments", 0, "outputs", value=tensor("age", 1)),
            r"carried 'age': expected the template graph alone .*, got \['segment_0'\]",
        ),
    ],
)
def test_heads_and_updates_that_do_not_fit_are_refused(
    full: Path, change: Callable[[Manifest], None], message: str
) -> None:
    change_manifest(full, change)

    with pytest.raises(
        BundleFormatError, match=rf"manifest\.json: .*{message}.*; export the bundl"
    ):
        Bundle.load(full)


def test_an_update_may_read_what_every_exit_writes(full: Path) -> None:
    def change(manifest: Manifest) -> None:
        for head in manifest["heads"]:
            head["outputs"].append(tensor("features", 1, 8))
        manifest["update"]["inputs"] += [tensor("features", 1, 8), tensor("tokens_0", 1, 80, 8)]

    change_manifest(full, change)

    assert Bundle.load(full).update is not None


def test_an_update_may_not_read_what_one_exit_does_not_write(full: Path) -> None:
    def change(manifest: Manifest) -> None:
        for head in manifest["heads"][:2]:
            head["outputs"].append(tensor("features", 1, 8))
        manifest["update"]["inputs"].append(tensor("features", 1, 8))

    change_manifest(full, change)

    with pytest.raises(BundleFormatError, match=r"update: expected input .*features.* got None"):
        Bundle.load(full)


@pytest.mark.parametrize("thresholds", [[], [0.5], [0.5, 0.5, 0.5], [0.5, -0.1], [0.5, None]])
def test_operating_points_need_a_threshold_per_exit_but_the_last(
    folder: Path, thresholds: list[Any]
) -> None:
    change_manifest(folder, put("operating_points", "fast", value=thresholds))

    with pytest.raises(BundleFormatError, match=r"manifest\.json: .*expected"):
        Bundle.load(folder)
