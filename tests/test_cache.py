"""The cache on disk: the same values to the last bit, whole entries or none, and what goes wrong on disks."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_erasure import cache, demo, encoding, erase
from diffusers_erasure import tensors as tensor_io
from diffusers_erasure.lists import read_list


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "not yet there" / "cache"
    monkeypatch.setenv(cache.VARIABLE, str(place))
    return place


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    """Values of which float32 alone would lose most bits, in two layouts."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(20, 7, generator=generator, dtype=torch.float64)
    return {"rows": wide, "turned": wide.T, "small": wide[:2] * 1e-20, "number": wide[0, 0]}


class Counted:
    """`make`, and how often it was called."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.calls = seed, 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return values(self.seed)


def get(make: Callable[[], Any] | None = None, key: str | None = "key", kind: str = "rows") -> dict[str, torch.Tensor]:
    return cache.fetch(kind, lambda: ["model", key], make or values)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """To the last bit, and in the same layout: a sum over another one may round in another order."""
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].stride() == b[n].stride() for n in a)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# -------------------------------------------------------------------------------------------------------- values


def test_cold_warm_and_off_are_the_same_to_the_last_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cold, warm = get(), get()
    assert len(files(folder)) == 1
    monkeypatch.setenv(cache.VARIABLE, " OFF ")
    off = get()
    monkeypatch.setenv(cache.VARIABLE, str(folder))
    unknown = get(key=None)
    assert len(files(folder)) == 1
    assert same(cold, warm) and same(cold, off) and same(cold, unknown)
    assert list(cold) == sorted(values())
    for name, exact in values().items():
        assert cold[name].dtype == torch.float64
        # 48 bits: two float32 halves, where these do not fall below float32's range.
        assert ((cold[name] - exact).abs() <= 2.0**-47 * exact.abs() + 1e-45).all()
        assert not torch.equal(cold[name], exact.float().double())


def test_what_is_kept_is_not_made_again() -> None:
    make = Counted()
    first, second = get(make), get(make)
    assert make.calls == 1 and same(first, second)


def test_nothing_is_asked_or_written_where_the_cache_is_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, "off")

    def key() -> list[str]:
        raise AssertionError("a fingerprint costs time")

    make = Counted()
    for _ in range(2):
        cache.fetch("rows", key, make)
    assert make.calls == 2 and not folder.exists()
    assert cache.cache_dir() is None and cache.entries() == [] and cache.clear() == []


def test_another_key_or_kind_is_another_entry(folder: Path) -> None:
    for i, (key, kind) in enumerate((("key", "rows"), ("other", "rows"), ("key", "gram"), ("", "rows"))):
        make = Counted(i)
        assert same(get(make, key, kind), get(make, key, kind)) and make.calls == 1
        assert torch.equal(get(make, key, kind)["rows"].float(), values(i)["rows"].float())
    assert len(files(folder)) == 4
    # The parts of a key stay apart.
    make = Counted()
    cache.fetch("rows", lambda: ["a", "bc"], make)
    cache.fetch("rows", lambda: ["ab", "c"], make)
    assert make.calls == 2


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    default = cache.cache_dir()
    assert default is not None and default.is_relative_to(os.environ["HF_HOME"])
    monkeypatch.setenv(cache.VARIABLE, "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / "mine"


# ------------------------------------------------------------------------------------------------ damaged entries


def flipped(data: bytes) -> bytes:
    """One bit of one value, which no header tells."""
    place = len(data) - 5
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\0" * len(data),
        lambda data: data[:1500].ljust(len(data), b"\0"),  # the rest never reached the disk
        flipped,
        lambda data: b"<html>not found</html>" * 9,
        lambda data: tensor_io.dump({"rows.high": torch.ones(2)}),
        lambda data: tensor_io.dump({"other": torch.ones(2)}),
        lambda data: tensor_io.dump({"rows.high": torch.ones(2), "rows.low": torch.full((2,), torch.nan)}),
    ],
    ids=str.split("empty start half short long zeros torn bit page no-low other nan"),
)
def test_a_damaged_entry_is_made_again_and_replaced(
    damage: Callable[[bytes], bytes], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = get()
    (entry,) = folder.iterdir()
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    make = Counted()
    assert same(get(make), expected)
    assert make.calls == 1 and "cannot be used and is made again" in caplog.text and str(entry) in caplog.text
    assert entry.read_bytes() == good and files(folder) == [entry.name]
    assert same(get(make), expected) and make.calls == 1


# ------------------------------------------------------------------------------------------------ full and locked


def refuse(number: int) -> Callable[..., Any]:
    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refused


class FullDisk:
    """A file that takes some bytes, and then no more."""

    def __init__(self, path: Path, mode: str) -> None:
        self.file = path.open(mode)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[:100])
        refuse(errno.ENOSPC)()


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("os.replace", refuse(errno.ENOSPC)),
        ("os.fsync", refuse(errno.ENOSPC)),
        ("diffusers_erasure.storage.open", FullDisk),
        ("diffusers_erasure.storage.open", refuse(errno.EROFS)),
        ("pathlib.Path.mkdir", refuse(errno.EACCES)),
    ],
)
def test_a_full_or_locked_disk_is_told_once(
    name: str, broken: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on without the cache, to the same values; however many entries there are, one warning."""
    monkeypatch.setenv(cache.VARIABLE, "off")
    expected = get()
    monkeypatch.setenv(cache.VARIABLE, str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(name, broken, raising=False)
        assert all(same(get(key=key), expected) for key in ("key", "key", "another"))
    (message,) = [record.getMessage() for record in caplog.records]
    assert str(folder / "rows-") in message and "\n" not in message
    for what_to_do in ("diffusers-erasure cache clear", f"${cache.VARIABLE}", "`off`"):
        assert what_to_do in message
    assert files(folder) == []
    make = Counted()
    assert same(get(make), expected) and same(get(make), expected)  # there is room again
    assert make.calls == 1 and len(files(folder)) == 1


def test_what_is_there_is_read_from_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = get()
    monkeypatch.setattr(os, "replace", refuse(errno.ENOSPC))
    monkeypatch.setattr("diffusers_erasure.storage.open", refuse(errno.ENOSPC), raising=False)
    assert same(get(), expected)


def test_a_file_in_the_place_of_the_folder_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "mine.txt"))
    assert torch.equal(get()["rows"].float(), values()["rows"].float())
    assert "mine.txt" in caplog.text
    assert (tmp_path / "mine.txt").read_text() == "keep" and cache.entries() == [] and cache.clear() == []


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX's permissions")
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_that_cannot_be_used_is_told_once(
    mode: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with tempfile.TemporaryDirectory() as name:  # not in pytest's own folder, which is its user's alone
        monkeypatch.setenv(cache.VARIABLE, name)
        kept = get()
        (entry,) = cache.entries()
        os.chmod(name, mode)
        root = os.geteuid() == 0
        try:
            if root:  # who may write everywhere
                os.chmod(entry.path, 0o444)
                os.seteuid(65534)
            unused = Counted()
            assert same(get(unused), kept) and unused.calls == (mode == 0)
            assert all(same(get(key=key), kept) for key in ("other", "another"))
            (message,) = [record.getMessage() for record in caplog.records]
            assert "Permission denied" in message and "cache clear" in message
        finally:
            if root:
                os.seteuid(0)
            os.chmod(name, 0o700)
        assert len(files(Path(name))) == 1


# ------------------------------------------------------------------------------------------------ other processes


WORKER = """
import hashlib, os, sys, time, types
import torch

package = types.ModuleType("diffusers_erasure")  # the package without its `__init__`, which imports for ten seconds
package.__path__ = [sys.argv[2]]
sys.modules["diffusers_erasure"] = package
from diffusers_erasure import cache

def make():
    print("making", flush=True)
    sys.stdin.readline()  # both writers stand here before either writes
    generator = torch.Generator().manual_seed(0)
    return {"rows": torch.randn(700, 700, generator=generator, dtype=torch.float64)}

if sys.argv[1] == "stuck":
    def replace(*_):
        print("writing", flush=True)
        time.sleep(100)
    os.replace = replace
found = cache.fetch("rows", lambda: ["model", "key"], make)
print(hashlib.sha256(found["rows"].numpy().tobytes()).hexdigest(), flush=True)
"""


class Worker:
    """A process that writes an entry."""

    def __init__(self, mode: str = "writes") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, mode, str(Path(cache.__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def test_two_processes_may_write_one_entry_and_a_killed_one_leaves_none(folder: Path) -> None:
    def make() -> dict[str, torch.Tensor]:
        other.go_on()  # so that both write now
        return {"rows": torch.randn(700, 700, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}

    with Worker("stuck") as stuck, Worker() as other:
        assert stuck.says() == other.says() == "making"
        stuck.go_on()
        assert stuck.says() == "writing"
        stuck.process.send_signal(signal.SIGKILL)
        assert stuck.process.wait(30) == -signal.SIGKILL
        (left,) = files(folder)
        assert left.endswith(".tmp") and cache.entries() == []

        own = get(make)
        assert other.says() == hashlib.sha256(own["rows"].numpy().tobytes()).hexdigest()
        assert other.process.wait(30) == 0
    (entry,) = cache.entries()
    assert files(folder) == [left, entry.path.name]
    unused = Counted()
    assert same(get(unused), own) and unused.calls == 0

    assert cache.clear("gram") == [] and files(folder) == [left, entry.path.name]
    assert cache.clear() == [entry] and files(folder) == []


def test_clearing_while_somebody_writes_does_no_harm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary file goes with the rest; the value is there all the same."""
    replace = os.replace

    def cleared_before(*arguments: Any) -> None:
        cache.clear()
        replace(*arguments)

    monkeypatch.setattr(os, "replace", cleared_before)
    make = Counted()
    assert torch.equal(get(make)["rows"].float(), values()["rows"].float())
    assert make.calls == 1 and files(folder) == []


# ------------------------------------------------------------------------------------------------ show and clear


def test_entries_and_clear(folder: Path) -> None:
    assert cache.entries() == cache.clear() == []
    for key, kind in (("a", "rows"), ("b", "rows"), ("a", "gram"), ("a", "weights")):
        get(key=key, kind=kind)
    found = cache.entries()
    assert [entry.kind for entry in found] == ["gram", "rows", "rows", "weights"]
    assert all(entry.path.parent == folder and entry.size == entry.path.stat().st_size > 1000 for entry in found)
    assert [entry.kind for entry in cache.clear("rows")] == ["rows", "rows"]
    assert [entry.kind for entry in cache.entries()] == ["gram", "weights"]
    assert cache.clear("pooled") == [] and len(cache.clear()) == 2
    assert files(folder) == []
    make = Counted()
    get(make)
    assert make.calls == 1


def test_what_others_keep_in_the_folder_stays(folder: Path) -> None:
    get()
    (own,) = files(folder)
    others = [
        "model.safetensors",
        "weights-sdxl.safetensors",
        "rows-1.safetensors",
        f"{own}.bak",
        f"mine-{own}",
        own.replace("rows", "columns"),
        ".download.tmp",
        "rows.tmp",
        "notes.txt",
    ]
    for name in others:
        (folder / name).write_bytes(b"mine")
    (folder / own.replace("rows", "gram")).mkdir()  # no file of the cache either
    (folder / "rows").mkdir()
    assert [entry.path.name for entry in cache.entries()] == [own]
    assert [entry.path.name for entry in cache.clear()] == [own]
    assert files(folder) == sorted([*others, own.replace("rows", "gram"), "rows"])
    assert all((folder / name).read_bytes() == b"mine" for name in others)


# ---------------------------------------------------------------------------------------------------- end to end


def test_a_list_is_encoded_once_for_an_encoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = demo.load_pipeline()
    encoded: list[int] = []
    pipe.text_encoder.register_forward_pre_hook(lambda _, given: encoded.append(len(given[0])))

    def fit(target: str = "cat") -> tuple[dict[str, bytes], int]:
        encoded.clear()
        how: dict[str, Any] = {"templates": "object", "retain_templates": False, "retain_rows": "last"}
        erasure = erase(pipe, target, retain="list:objects", **how)
        return erasure.to_files(), sum(encoded)

    size = len(read_list("objects")) + len(read_list("things"))  # what is retained, and what is compared afterwards
    cold, all_of_it = fit()
    assert all_of_it > size and [entry.kind for entry in cache.entries()] == ["null", "rows", "rows"]
    warm, targets_alone = fit()
    assert targets_alone == all_of_it - size - 1  # nor is the empty prompt
    assert warm == cold
    # Other targets leave out other entries of the list; what is kept serves them too.
    assert fit("dog")[1] < 30
    monkeypatch.setenv(cache.VARIABLE, "off")
    off, again = fit()
    assert again == all_of_it and off == cold
    monkeypatch.setenv(cache.VARIABLE, str(folder))

    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[530, 100] += 1e-3  # a token that no prompt has
    assert fit()[1] == all_of_it and len(cache.entries()) == 6


@pytest.mark.parametrize("kind", ["rows", "gram"])
def test_rows_from_the_cache_are_those_that_were_encoded(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, make = demo.load_pipeline(), {"rows": encoding.last_rows, "gram": encoding.gram}[kind]
    short, listed = list(demo.OBJECTS[: encoding.CACHED_FROM - 1]), list(demo.OBJECTS[: encoding.CACHED_FROM])
    make(pipe, short)
    assert cache.entries() == []  # a few prompts are encoded faster than their encoder is recognised
    cold, warm = make(pipe, listed), make(demo.load_pipeline(), listed)
    assert [entry.kind for entry in cache.entries()] == [kind]
    make(pipe, listed[::-1])
    assert len(cache.entries()) == 2  # rows come in the order of the prompts
    monkeypatch.setenv(cache.VARIABLE, "off")
    assert torch.equal(cold, warm) and torch.equal(cold, make(pipe, listed))
