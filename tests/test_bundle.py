import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_bundle import write_toy_bundle

from edgetrack.bundle import (
    FORMAT_VERSION,
    Bundle,
    CropSpec,
    default_bundle_path,
    sha256_of,
    whole_folder,
)
from edgetrack.errors import BundleError, BundleFormatError, BundleTamperedError

Manifest = dict[str, Any]
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


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("pristine") / "bundle").path


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A bundle's folder to spoil."""
    return shutil.copytree(pristine, tmp_path / "bundle")


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
        (put("crops", "search_factor", value="4"), "'search_factor': expected a number, got '4'"),
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


@pytest.mark.parametrize("thresholds", [[], [0.5], [0.5, 0.5, 0.5], [0.5, -0.1], [0.5, None]])
def test_operating_points_need_a_threshold_per_exit_but_the_last(
    folder: Path, thresholds: list[Any]
) -> None:
    change_manifest(folder, put("operating_points", "fast", value=thresholds))

    with pytest.raises(BundleFormatError, match=r"manifest\.json: .*expected"):
        Bundle.load(folder)


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


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_crops_of_no_size_are_refused(value: float) -> None:
    sizes = {"template_size_px": 64, "search_size_px": 128, "search_factor": 4.0}

    with pytest.raises(ValueError, match=r"^crops: expected positive sizes and factors"):
        CropSpec(**sizes, template_factor=value)  # type: ignore[arg-type]  # sizes are whole


def test_a_whole_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"

    with whole_folder(target) as folder:
        (folder / "a").write_text("new")
        assert not target.exists()

    assert (target / "a").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_whole_folder_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")

    with whole_folder(target) as folder:
        (folder / "a").write_text("new")
        assert (target / "old").read_text() == "old"

    assert [file.name for file in target.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [target]


def write_half(target: Path, error: type[BaseException]) -> None:
    with whole_folder(target) as folder:
        (folder / "a").write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_writer_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write_half(tmp_path / "target", error)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_writer_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")

    with pytest.raises(error):
        write_half(target, error)

    assert list(tmp_path.rglob("*")) == [target, target / "old"]


def test_ctrl_c_as_folders_are_swapped_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "target", Path.rename
    target.mkdir()
    (target / "old").write_text("old")

    def interrupted(path: Path, to: Path) -> Path:
        if to == target and not path.name.endswith(".old"):
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", interrupted)

    with pytest.raises(KeyboardInterrupt), whole_folder(target):
        pass

    assert list(tmp_path.rglob("*")) == [target, target / "old"]
