from pathlib import Path

import pytest

from edgetrack.bundle import whole_folder


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
