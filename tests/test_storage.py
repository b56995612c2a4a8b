"""What is written appears whole or not at all, and where it fails or is interrupted, all is as it was."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import diffusers_erasure
from diffusers_erasure.storage import new_folder, write_file


PACKAGE = Path(diffusers_erasure.__file__).parent
FULL, INTERRUPTED = OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [FULL, INTERRUPTED], ids=["full", "interrupted"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("before", [{}, {"a.bin": b"old"}], ids=["new", "replaced"])
def test_a_file_that_cannot_be_written(
    before: dict[str, bytes], step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, failing(error))
        with pytest.raises(type(error)):
            write_file(tmp_path / "a.bin", b"new")
    assert contents(tmp_path) == before
    write_file(tmp_path / "a.bin", b"new")
    assert contents(tmp_path) == {"a.bin": b"new"}


def test_a_file_is_hidden_and_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, replace, fsync = [], os.replace, os.fsync

    def flushed(handle: int) -> None:
        steps.append("flushed")
        fsync(handle)

    def replaced(source: Path, target: Path) -> None:
        (there,) = tmp_path.iterdir()
        assert there == source and there.name.startswith(".") and there.read_bytes() == b"new"
        steps.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    write_file(tmp_path / ("n" * 250), b"new")  # a name as long as file systems allow
    assert steps == ["flushed", "renamed"]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX's permissions")
def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", b"")
        with new_folder(tmp_path / "b") as fresh:
            (fresh / "c").write_bytes(b"")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "b", "b/c")]
    assert modes == [0o640, 0o750, 0o640]


@pytest.mark.parametrize("error", [FULL, INTERRUPTED], ids=["full", "interrupted"])
@pytest.mark.parametrize("step", ["within", "fsync", "replace"])
def test_a_folder_that_cannot_be_written(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if step != "within":
            patch.setattr(os, step, failing(error))
        with pytest.raises(type(error)), new_folder(tmp_path / "a") as fresh:
            (fresh / "part").mkdir()
            (fresh / "part" / "file").write_bytes(b"new")
            assert fresh.relative_to(tmp_path).parts[0].startswith(".")
            if step == "within":
                raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_filled_meanwhile_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with new_folder(tmp_path / "a") as fresh:
        (fresh / "file").write_bytes(b"new")
    assert contents(tmp_path) == {"a/file": b"new"}
    with pytest.raises(OSError), new_folder(tmp_path / "a") as fresh:
        (fresh / "file").write_bytes(b"newer")
    assert contents(tmp_path) == {"a/file": b"new"}


def test_nothing_else_renames_a_file_into_place() -> None:
    by_hand = re.compile(r"os\.(replace|rename)\(|\.(replace|rename)\([^,()\n]*\)|mkstemp|mkdtemp|NamedTemporaryFile")
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.with_name("diffusers_erasure_cli").rglob("*.py")]
    found = [path.name for path in files if by_hand.search(path.read_text(encoding="utf-8"))]
    assert found == ["storage.py"]
