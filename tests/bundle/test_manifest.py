import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manifests import Manifest, change_manifest, put
from toy_bundle import write_toy_bundle

from edgetrack.bundle import (
    FORMAT_VERSION,
    Bundle,
    default_bundle_path,
    sha256_of,
)
from edgetrack.errors import BundleError, BundleFormatError, BundleTamperedError

KEYS = (
    "name",
    "family",
    "paper",
    "config",
    "crops",
    "template",
    "segments",
    "operating_points",
    "operating_point",
    "criterion",
    "rules",
    "provenance",
    "licence",
    "files",
)


def test_what_is_written_is_loaded(pristine: Path, tmp_path: Path) -> None:
    written = write_toy_bundle(tmp_path / "toy", name="another name")

    loaded = Bundle.load(written.path)

    assert loaded == written
    assert loaded.name == "another name"
    assert loaded.segments[0].inputs[0].shape == (1, 64, 64, 3)
    assert loaded.operating_points["fast"] == (0.9, 0.9)
    assert loaded.files["template.onnx"] == sha256_of(written.path / "template.onnx")


def test_a_bundle_is_found_by_a_path_as_text(pristine: Path) -> None:
    assert Bundle.load(os.fspath(pristine)) == Bundle.load(pristine)


def test_the_bundle_that_ships_is_package_data() -> None:
    assert default_bundle_path().parent.name == "zoo"


def test_the_graphs_are_in_the_order_in_which_they_run(pristine: Path) -> None:
    bundle = Bundle.load(pristine)

    assert [g.name for g in bundle.graphs] == ["template", "segment_0", "segment_1", "segment_2"]
    assert bundle.num_exits == 3
    assert bundle.graph_path(bundle.template) == pristine / "template.onnx"


def test_heads_and_updates_are_written_and_loaded(tmp_path: Path) -> None:
    written = write_toy_bundle(tmp_path / "toy", heads=True, memory=True)

    loaded = Bundle.load(written.path)

    heads = ("head_0", "head_1", "head_2")
    segments = ("segment_0", "segment_1", "segment_2")
    assert loaded == written
    assert tuple(g.name for g in loaded.graphs) == ("template", *segments, *heads, "update")
    in_turn = [name for pair in zip(segments, heads, strict=True) for name in pair]
    assert [g.name for g in loaded.graphs_in_turn] == ["template", *in_turn, "update"]
    assert loaded.carried == {"memory": "next_memory", "age": "next_age"}


def test_what_a_frame_is_recorded_under_is_told_apart(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "toy", heads=True, memory=True)

    recorded = {
        g.name: {name: spec.name for name, spec in bundle.recorded_inputs(g).items()}
        for g in bundle.graphs
    }

    crops = ("template", "template_bbox_cxcywh")
    assert recorded["template"] == {name: name for name in crops}
    assert recorded["segment_0"] == {"search_region": "search_region", "memory": "memory"}
    assert recorded["head_1"] == {}
    fresh = {f"update.{name}": name for name in crops}
    assert recorded["update"] == {**fresh, "memory": "memory", "age": "age"}


def test_the_cost_of_an_exit_is_of_all_that_runs_up_to_it(tmp_path: Path) -> None:
    plain = write_toy_bundle(tmp_path / "plain")
    full = write_toy_bundle(tmp_path / "full", heads=True, memory=True)

    assert full.update is not None
    first, second, third = (segment.macs for segment in plain.segments)
    assert plain.exit_macs == (first, first + second, first + second + third)
    head, update = full.heads[0].macs, full.update.macs
    assert full.exit_macs == tuple(macs + head + update for macs in plain.exit_macs)


@pytest.mark.parametrize("name", ["head_1", "update"])
def test_the_digest_is_of_heads_and_update_too(tmp_path: Path, name: str) -> None:
    bundle = write_toy_bundle(tmp_path / "toy", heads=True, memory=True)

    (bundle.path / f"{name}.onnx").write_bytes(b"another graph")

    assert bundle.write().digest != bundle.digest


def test_the_digest_is_of_the_graphs_alone(folder: Path) -> None:
    bundle = Bundle.load(folder)
    (folder / "weights.safetensors").write_bytes(b"trained further")
    retuned = dataclasses.replace(bundle, operating_points={"balanced": (0.1, 0.2)}).write()
    (folder / "segment_1.onnx").write_bytes(b"another graph")

    rebuilt = retuned.write()

    assert retuned.digest == bundle.digest
    assert rebuilt.digest != bundle.digest


def test_thresholds_are_those_of_an_operating_point_or_the_default_one(pristine: Path) -> None:
    bundle = Bundle.load(pristine)

    assert bundle.thresholds() == (0.5, 0.5)
    assert bundle.thresholds("accurate") == (0.1, 0.1)


def test_an_unknown_operating_point_is_refused(pristine: Path) -> None:
    message = r"^operating_point: expected one of \['accurate', 'balanced', 'fast'\], got 'quick'"
    with pytest.raises(ValueError, match=message):
        Bundle.load(pristine).thresholds("quick")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere: expected a bundle .*, got nothing; make"):
        Bundle.load(tmp_path / "nowhere")


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="got a folder without one; make one with: edgetrack"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(folder: Path, key: str) -> None:
    change_manifest(folder, lambda manifest: manifest.pop(key))

    with pytest.raises(BundleFormatError, match=f"manifest.json: expected the key {key!r}, got n"):
        Bundle.load(folder)


def test_every_key_of_the_manifest_is_among_those_tested(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())

    assert manifest.keys() == {*KEYS, "format_version"}


@pytest.mark.parametrize("key", ["name", "file", "inputs", "outputs", "macs"])
def test_a_missing_key_of_a_graph_is_named(folder: Path, key: str) -> None:
    change_manifest(folder, lambda manifest: manifest["segments"][1].pop(key))

    with pytest.raises(BundleFormatError, match=f"expected the key {key!r}, got none"):
        Bundle.load(folder)


@pytest.mark.parametrize("key", ["name", "dtype", "shape"])
def test_a_missing_key_of_a_tensor_is_named(folder: Path, key: str) -> None:
    change_manifest(folder, lambda manifest: manifest["segments"][1]["inputs"][0].pop(key))

    with pytest.raises(BundleFormatError, match=f"expected the key {key!r}, got none"):
        Bundle.load(folder)


@pytest.mark.parametrize(
    "key", ["template_size_px", "template_factor", "search_size_px", "search_factor"]
)
def test_a_missing_key_of_the_crops_is_named(folder: Path, key: str) -> None:
    change_manifest(folder, lambda manifest: manifest["crops"].pop(key))

    with pytest.raises(BundleFormatError, match=f"expected the key {key!r}, got none"):
        Bundle.load(folder)


def test_a_newer_format_asks_for_an_update(folder: Path) -> None:
    change_manifest(folder, put("format_version", value=FORMAT_VERSION + 1))

    with pytest.raises(BundleFormatError, match=r"version <= 1, got 2; update edgetrack: pip"):
        Bundle.load(folder)


@pytest.mark.parametrize("value", [None, "1", 1.5, True, 0, -1])
def test_a_format_that_is_no_number_is_refused(folder: Path, value: Any) -> None:
    change_manifest(folder, put("format_version", value=value))

    with pytest.raises(BundleFormatError, match="expected a whole number under 'format_version'"):
        Bundle.load(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"hello", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut off", "text", "binary", "nested", "huge number"],
)
def test_a_manifest_that_is_no_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)

    with pytest.raises(BundleFormatError, match=r"manifest\.json: expected"):
        Bundle.load(folder)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_a_manifest_that_is_no_object_is_refused(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)

    with pytest.raises(BundleFormatError, match="expected a JSON object, got"):
        Bundle.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        put("crops", value=None),
        put("crops", "margin", value=1),
        put("crops", "search_factor", value="4"),
        put("crops", "search_factor", value=-4.0),
        put("crops", "search_factor", value=float("nan")),
        put("template", value=[]),
        put("segments", value=7),
        put("segments", 0, "inputs", value=None),
        put("segments", 0, "file", value=5),
        put("files", value=None),
        put("files", value=["template.onnx"]),
        put("operating_points", value=[]),
        put("operating_points", "fast", value=0.5),
        put("operating_points", "fast", value=["0.5", "0.5"]),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(
    folder: Path, change: Callable[[Manifest], None]
) -> None:
    change_manifest(folder, change)

    with pytest.raises(BundleFormatError, match=r"manifest\.json: .*expected"):
        Bundle.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("name", value=5), "'name': expected a text, got 5"),
        (put("name", value=""), "'name': expected a name without path separators, got ''"),
        (put("name", value="../evil"), "'name': expected a name .*, got '../evil'"),
        (put("family", value=None), "'family': expected a text, got None"),
        (put("paper", value=[]), r"'paper': expected a text, got \[\]"),
        (put("licence", value=1.5), "'licence': expected a text, got 1.5"),
        (put("config", value=[]), r"'config': expected an object, got \[\]"),
        (put("provenance", value="data"), "'provenance': expected an object, got 'data'"),
        (put("template", "macs", value=True), "'macs': expected a whole number, got True"),
        (put("template", "macs", value="7"), "'macs': expected a whole number, got '7'"),
        (put("template", "macs", value=-1), "template: expected 'macs' of at least 0, got -1"),
        (put("segments", 1, "inputs", 0, value=3), "tensors: expected an object, got 3"),
        (put("segments", 1, "inputs", 0, "shape", value=["1"]), "shape: expected a whole number"),
        (put("files", "template.onnx", value=5), "hash of 'template.onnx': expected a text, got 5"),
        (put("operating_points", "fast", value=["0.5", 1]), "'fast': expected a number, got '0.5'"),
        (put("operating_points", "fast", value=7), "'fast': expected a list, got 7"),
        (put("criterion", value=3), "'criterion': expected a text, got 3"),
        (put("rules", value=[]), r"'rules': expected an object, got \[\]"),
        (put("rules", value={"patience": "two"}), "rule 'patience': expected a number, got 'two'"),
        (put("operating_point", value=[]), r"'operating_point': expected a text, got \[\]"),
        (put("heads", value={}), r"'heads': expected a list, got {}"),
        (put("heads", value=[3]), "heads: expected an object, got 3"),
        (put("update", value=None), "'update': expected an object, got None"),
        (put("carried", value=[]), r"'carried': expected an object, got \[\]"),
        (put("carried", value={"bank": 1}), "carried 'bank': expected a text, got 1"),
        (put("crops", "search_factor", value="4"), "'search_factor': expected a number, got '4'"),
        (put("crops", "geometry", value=4), "'geometry': expected a text, got 4"),
        (put("crops", "geometry", value="x"), "crops: expected a geometry among .*got 'x'"),
        (put("crops", "margin", value=1), r"crops: expected the keys .*, got \['margin'\] besides"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_what_to_do(
    folder: Path, change: Callable[[Manifest], None], message: str
) -> None:
    change_manifest(folder, change)

    with pytest.raises(
        BundleFormatError, match=rf"manifest\.json: .*{message}.*; export the bundl"
    ):
        Bundle.load(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "sub/../x"])
def test_files_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "x").write_text("outside")
    change_manifest(folder, put("files", name, value=sha256_of(folder.parent / "x")))

    with pytest.raises(BundleFormatError, match="expected names of files in this folder"):
        Bundle.load(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "elsewhere.onnx", ""])
def test_graphs_that_are_not_among_the_files_are_refused(folder: Path, name: str) -> None:
    change_manifest(folder, put("segments", 1, "file", value=name))

    with pytest.raises(BundleFormatError, match=f"segment_1: expected a file listed .*{name!r}"):
        Bundle.load(folder)


def test_a_changed_file_is_refused(folder: Path) -> None:
    file = folder / "segment_1.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")

    with pytest.raises(BundleTamperedError, match=r"segment_1\.onnx: expected SHA-256 .*changed"):
        Bundle.load(folder)


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "segment_1.onnx").unlink()

    with pytest.raises(BundleTamperedError, match=r"segment_1\.onnx: expected a file .*got none"):
        Bundle.load(folder)


def test_a_changed_hash_is_refused(folder: Path) -> None:
    change_manifest(folder, put("files", "segment_1.onnx", value="0" * 64))

    with pytest.raises(BundleTamperedError, match=r"expected SHA-256 000000000000…"):
        Bundle.load(folder)


def test_verifying_can_wait(folder: Path) -> None:
    (folder / "segment_1.onnx").unlink()

    bundle = Bundle.load(folder, verify=False)

    with pytest.raises(BundleTamperedError):
        bundle.verify()


def test_the_default_operating_point_must_be_one(folder: Path) -> None:
    change_manifest(folder, put("operating_point", value="quick"))

    with pytest.raises(BundleFormatError, match=r"among \['accurate', .*got 'quick'"):
        Bundle.load(folder)


def test_a_bundle_that_does_not_fit_is_not_written(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    bundle = dataclasses.replace(Bundle.load(folder), operating_point="quick")

    with pytest.raises(BundleFormatError):
        bundle.write()

    assert (folder / "manifest.json").read_bytes() == before
