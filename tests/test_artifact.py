"""The artefact on disk: deterministic, all or nothing, redacted for good, and read without trust."""

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from diffusers_erasure import (
    Erasure,
    ErasureConfigError,
    ErasureError,
    ErasureFileError,
    ErasureInputError,
    ErasureNotFoundError,
    artifact,
)
from diffusers_erasure.schema import (
    CARD_FILE,
    CONFIG_FILE,
    LORA_FILE,
    MAX_CONFIG_BYTES,
    TENSOR_FILE,
    Concept,
    Method,
    Stock,
)
from tests.helpers import (
    CONV_SITES,
    TEXT_SITES,
    UNET_SITES,
    assert_like,
    base_images,
    contents,
    counting,
    dense_edit,
    far,
    images,
    random_erasure,
    tiny_sd_pipe,
)


@pytest.fixture(scope="module")
def erasure() -> Erasure:
    return random_erasure(tiny_sd_pipe(), "lora", UNET_SITES[:2] + CONV_SITES[:1] + TEXT_SITES[:1])


def same(a: Erasure, b: Erasure) -> bool:
    return a.content_hash == b.content_hash and {**vars(a.config), "files": 0} == {**vars(b.config), "files": 0}


# ------------------------------------------------------------------------------------------------------- writing


def test_round_trip(erasure: Erasure, tmp_path: Path) -> None:
    files = erasure.save_pretrained(tmp_path / "a")
    assert sorted(path.name for path in files) == sorted([CARD_FILE, CONFIG_FILE, LORA_FILE])
    assert sorted(contents(tmp_path / "a")) == sorted(path.name for path in files)
    back = Erasure.from_pretrained(tmp_path / "a")
    assert same(back, erasure)
    assert back.source == str(tmp_path / "a")
    for name, tensor in erasure.tensors[LORA_FILE].items():
        assert torch.equal(back.tensors[LORA_FILE][name], tensor)
    text_map = random_erasure(tiny_sd_pipe(), "text_map")
    text_map.save_pretrained(str(tmp_path / "b"))
    assert sorted(contents(tmp_path / "b")) == sorted([CARD_FILE, CONFIG_FILE, TENSOR_FILE])
    assert same(Erasure.from_pretrained(tmp_path, subfolder="b"), text_map)


def test_two_saves_are_the_same_bytes(erasure: Erasure, tmp_path: Path) -> None:
    """Also read back and saved by another process, whose sets and dicts have another order."""
    erasure.save_pretrained(tmp_path / "one")
    Erasure.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    shuffled = dict(reversed(erasure.tensors[LORA_FILE].items()))
    Erasure(erasure.config, {LORA_FILE: shuffled}).save_pretrained(tmp_path / "three")
    code = (
        "import sys; from diffusers_erasure import Erasure;"
        "Erasure.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    for seed in ("1",):
        target = tmp_path / f"seed{seed}"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, tmp_path / "one", target], env=environment, check=True)
    for other in ("two", "three", "seed1"):
        assert contents(tmp_path / other) == contents(tmp_path / "one"), other


def test_no_timestamps_and_no_paths(erasure: Erasure, tmp_path: Path) -> None:
    erasure.save_pretrained(tmp_path / "a")
    text = (tmp_path / "a" / CONFIG_FILE).read_text()
    assert str(tmp_path) not in text
    assert "20" + "26" not in text


def test_saving_over_an_erasure_keeps_foreign_files(erasure: Erasure, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    random_erasure(tiny_sd_pipe(), "text_map").save_pretrained(folder)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / ".gitattributes").write_text("lfs")
    erasure.save_pretrained(folder)
    assert same(Erasure.from_pretrained(folder), erasure)
    files = contents(folder)
    assert sorted(files) == sorted([".gitattributes", CARD_FILE, CONFIG_FILE, "notes/mine.txt", LORA_FILE])
    assert (files["notes/mine.txt"], files[".gitattributes"]) == (b"mine", b"lfs")
    assert os.listdir(tmp_path) == ["a"]


def test_each_thing_is_done_once(erasure: Erasure, tmp_path: Path) -> None:
    """The files are of another process when they are read, so that all of it is done, but nothing twice."""
    once = {"configs parsed": 1, "files hashed": 1, "tensors checked": len(erasure.tensors[LORA_FILE])}
    with counting() as saving:
        erasure.save_pretrained(tmp_path / "a")
    assert saving == {**once, "cards rendered": 1}
    with counting() as serialising:
        files = erasure.to_files()
    assert serialising == {**once, "cards rendered": 1}
    for read in (lambda: Erasure.from_pretrained(tmp_path / "a"), lambda: Erasure.from_files(files)):
        with counting() as reading:
            back = read()
        assert reading == once and same(back, erasure)
    pipe = tiny_sd_pipe()
    with counting() as loading:
        pipe.load_erasure(tmp_path / "a")
    assert loading == {**once, "contents hashed": 1}


@pytest.mark.parametrize("write", ["in place", "past autograd", "through NumPy", "another tensor"])
def test_tensors_that_are_changed_have_another_hash_and_are_saved_as_they_are(write: str, tmp_path: Path) -> None:
    erasure = random_erasure(tiny_sd_pipe())
    erasure.save_pretrained(tmp_path)
    erasure = Erasure.from_pretrained(tmp_path)
    before, items = erasure.content_hash, erasure.tensors[LORA_FILE]
    name = next(iter(items))

    def fill(value: float) -> None:
        if write == "in place":
            items[name].fill_(value)
        elif write == "past autograd":
            items[name].data.fill_(value)
        elif write == "through NumPy":
            items[name].numpy()[:] = value
        else:
            items[name] = torch.full_like(items[name], value)

    fill(2.0)
    assert erasure.content_hash != before
    erasure.save_pretrained(tmp_path)
    back = Erasure.from_pretrained(tmp_path)
    assert same(back, erasure) and torch.equal(back.tensors[LORA_FILE][name], torch.full_like(items[name], 2.0))
    fill(float("nan"))
    saved = contents(tmp_path)
    with pytest.raises(ErasureFileError, match="not finite"):
        erasure.save_pretrained(tmp_path)
    assert contents(tmp_path) == saved


class Interrupted(BaseException):
    """Like a KeyboardInterrupt."""


@pytest.mark.parametrize("failing", ["fsync", "first rename", "moving a foreign file", "last rename", "read back"])
@pytest.mark.parametrize("failure", [OSError("disk full"), Interrupted()], ids=["OSError", "interrupt"])
def test_a_failed_save_leaves_everything_as_it_was(
    erasure: Erasure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, failure: BaseException
) -> None:
    folder = tmp_path / "a"
    random_erasure(tiny_sd_pipe(), "text_map").save_pretrained(folder)
    (folder / "a.txt").write_text("foreign")
    (folder / "z.txt").write_text("foreign too")
    before = contents(tmp_path)
    rename, calls = os.rename, {"rename": 0, "fsync": 0}

    def failing_rename(source: Any, target: Any) -> None:
        calls["rename"] += 1
        wanted = {"first rename": 1, "moving a foreign file": 3, "last rename": 4}.get(failing)
        if calls["rename"] == wanted:
            raise failure
        rename(source, target)

    def failing_fsync(handle: int) -> None:
        calls["fsync"] += 1
        if calls["fsync"] == 2:
            raise failure

    def failing_read(path: Path) -> bytes:
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(artifact.os, "rename", failing_rename)
        if failing == "fsync":
            patched.setattr(artifact.os, "fsync", failing_fsync)
        if failing == "read back":
            patched.setattr(Path, "read_bytes", failing_read)
        expected = Interrupted if isinstance(failure, Interrupted) else ErasureError
        with pytest.raises(expected):
            erasure.save_pretrained(folder)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_first_save_leaves_nothing(erasure: Erasure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(artifact.os, "fsync", full)
    with pytest.raises(ErasureError, match="disk full"):
        erasure.save_pretrained(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_writing_verifies_itself(erasure: Erasure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that read back as something else are never put in place."""
    dump = artifact.tensor_io.dump
    monkeypatch.setattr(
        artifact.tensor_io, "dump", lambda tensors: dump({name: tensor * 2 for name, tensor in tensors.items()})
    )
    with pytest.raises(ErasureFileError, match="does not read back"):
        erasure.save_pretrained(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_where_an_erasure_cannot_be_saved(erasure: Erasure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ErasureInputError, match="file"):
        erasure.save_pretrained(tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ErasureInputError, match="current folder"):
        erasure.save_pretrained(".")


def test_saving_through_a_link_to_a_folder(erasure: Erasure, tmp_path: Path) -> None:
    """The folder behind the link gets the files, and the link stays."""
    random_erasure(tiny_sd_pipe(), "text_map").save_pretrained(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    erasure.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert same(Erasure.from_pretrained(tmp_path / "real"), erasure)


def test_half_precision_files_state_their_error(erasure: Erasure, tmp_path: Path) -> None:
    import dataclasses

    pipe = tiny_sd_pipe()
    stock = Erasure(dataclasses.replace(erasure.config, stock=Stock(LORA_FILE, 1e-7)), erasure.tensors)
    base, exact = images(pipe), images(dense_edit(pipe, stock))
    for dtype, eps in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        stock.save_pretrained(tmp_path / str(dtype), dtype=dtype)
        back = Erasure.from_pretrained(tmp_path / str(dtype))
        assert {tensor.dtype for tensor in back.tensors[LORA_FILE].values()} == {dtype}
        assert back.config.stock is not None
        # Two factors, each rounded by at most eps relative, in random directions.
        assert 0.2 * eps < back.config.stock.error < 2 * eps
        live = tiny_sd_pipe()
        live.load_erasure(back)
        assert 0 < far(images(live), exact) < 0.2 * far(exact, base)
    with pytest.raises(ErasureInputError, match="float64"):
        stock.save_pretrained(tmp_path / "x", dtype=torch.float64)
    large = Erasure(stock.config, {LORA_FILE: {k: v * 1e6 for k, v in stock.tensors[LORA_FILE].items()}})
    with pytest.raises(ErasureInputError, match="too large for torch.float16"):
        large.save_pretrained(tmp_path / "x", dtype=torch.float16)


def test_redaction_drops_all_names(tmp_path: Path) -> None:
    method = Method(
        "uce",
        settings={"retain": ["Sonnenblume"], "templates": ["a Regenwurm of {}"], "lamb": 0.5},
        concept_settings=("retain", "templates"),
    )
    concepts = (Concept("Zwiebelturm", "Kirchdach"), Concept("Quittenbaum", ""))
    named = random_erasure(tiny_sd_pipe(), concepts=concepts, method=method)
    import dataclasses

    diagnostics, results = {"completeness": {"Zwiebelturm": 0.9}}, {"Quittenbaum": {"accuracy": 0.1}}
    config = dataclasses.replace(named.config, diagnostics=diagnostics, results=results)
    named = Erasure(config, named.tensors)
    named.save_pretrained(tmp_path / "named")
    named.save_pretrained(tmp_path / "redacted", redact_concepts=True)
    words = [b"Zwiebelturm", b"Kirchdach", b"Quittenbaum", b"Sonnenblume", b"Regenwurm"]
    for name, data in contents(tmp_path / "named").items():
        if name == CONFIG_FILE:
            assert all(word in data for word in words)
    for data in contents(tmp_path / "redacted").values():
        assert [word for word in words if word.lower() in data.lower()] == []
        assert not any(hashlib.sha256(word).hexdigest().encode() in data for word in words)
    back = Erasure.from_pretrained(tmp_path / "redacted")
    assert back.config.redacted
    assert back.concepts == (Concept(None), Concept(None))
    assert back.config.method.settings == {"lamb": 0.5}
    assert back.content_hash == named.content_hash
    assert named.concepts == concepts, "the erasure in memory keeps its names"
    pipe = tiny_sd_pipe()
    assert pipe.load_erasure(back).concepts == (Concept(None), Concept(None))


@pytest.mark.parametrize("kind", ["lora", "text_map"])
def test_publishing_another_strength(kind: str, tmp_path: Path) -> None:
    erasure = random_erasure(tiny_sd_pipe(), kind)
    pipe = tiny_sd_pipe()
    pipe.load_erasure(erasure, strength=0.5)
    drawn = images(pipe)
    pipe.save_erasure(tmp_path / "half")
    half = Erasure.from_pretrained(tmp_path / "half")
    assert half.config.published_strength == 0.5
    fresh = tiny_sd_pipe()
    fresh.load_erasure(half)
    assert_like(images(fresh), drawn, base_images())
    fresh.set_erasures("half", 3.0)
    fresh.save_erasure(tmp_path / "more", "half")
    assert Erasure.from_pretrained(tmp_path / "more").config.published_strength == 1.5
    fresh.set_erasures("half", 0)
    with pytest.raises(ErasureInputError, match="above 0"):
        fresh.save_erasure(tmp_path / "zero")
    with pytest.raises(ErasureNotFoundError, match="nobody"):
        fresh.save_erasure(tmp_path / "zero", "nobody")
    assert not (tmp_path / "zero").exists()


# ------------------------------------------------------------------------------------------- reading: the config


@pytest.fixture
def saved(erasure: Erasure, tmp_path: Path) -> Path:
    erasure.save_pretrained(tmp_path / "erasure")
    return tmp_path / "erasure"


def refused(folder: Path, kind: type[ErasureError], culprit: str, **arguments: Any) -> None:
    with pytest.raises(ErasureError) as caught:
        Erasure.from_pretrained(folder, **arguments)
    assert type(caught.value) is kind, caught.value
    assert culprit in str(caught.value)
    pipe = tiny_sd_pipe()
    with pytest.raises(kind):
        pipe.load_erasure(folder, **arguments)
    assert pipe.list_erasures() == []


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        config = json.loads(data)
        change(config)
        return json.dumps(config).encode()

    return edit


def put(path: str, value: Any) -> Callable[[bytes], bytes]:
    """Replace one entry of the config, or add it: `layers.0.kind`."""

    def change(config: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        for part in parents:
            config = config[part]
        config[last] = value

    return edited(change)


def drop(path: str) -> Callable[[bytes], bytes]:
    def change(config: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        for part in parents:
            config = config[part]
        del config[last]

    return edited(change)


def text(old: str, new: str) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert old.encode() in data
        return data.replace(old.encode(), new.encode(), 1)

    return change


DEEP = "[" * 40 + "]" * 40
BAD_CONFIGS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "unknown key": (put("surprise", 1), "surprise"),
    "unknown key within": (put("layers/0/command", "rm"), "command"),
    "missing key": (drop("layers"), "layers"),
    "missing key within": (drop("layers/0/prefix"), "prefix"),
    "higher major": (put("schema", "2.0"), "2.0"),
    "odd schema": (put("schema", "1"), "'1'"),
    "schema is a number": (put("schema", 1.0), "1.0"),
    "deep nesting": (text('"seed": 0\n', f'"seed": {DEEP}\n'), "deep"),
    "very deep nesting": (lambda data: b"[" * 100_000, CONFIG_FILE),
    "duplicate key": (text('"schema": "1.1"', '"schema": "1.1", "schema": "1.1"'), "twice"),
    "NaN": (text('"published_strength": 1.0', '"published_strength": NaN'), "NaN"),
    "Infinity": (text('"published_strength": 1.0', '"published_strength": Infinity'), "Infinity"),
    "a float that overflows": (text('"published_strength": 1.0', '"published_strength": 1e999'), "not finite"),
    "a huge number": (text('"published_strength": 1.0', '"published_strength": ' + "9" * 400), "too large"),
    "strength 0": (put("published_strength", 0), "published_strength"),
    "bool as int": (put("method/seed", True), "method.seed"),
    "int as bool": (put("redacted", 1), "redacted"),
    "number as string": (put("files/" + LORA_FILE + "/size", "12"), "size"),
    "negative size": (put("files/" + LORA_FILE + "/size", -1), "bytes"),
    "no layers": (put("layers", []), "layers"),
    "layers as an object": (put("layers", {}), "layers"),
    "null": (lambda data: b"null", "object"),
    "a list": (lambda data: b"[]", "object"),
    "not JSON": (lambda data: data[:-20], CONFIG_FILE),
    "not UTF-8": (lambda data: b"\xff\xfe" + data, CONFIG_FILE),
    "empty": (lambda data: b"", CONFIG_FILE),
    "unknown kind": (put("layers/0/kind", "os.system"), "os.system"),
    "unknown schedule": (put("layers/0/schedule", {"kind": "x"}), "layers[0].schedule"),
    "unknown gate": (put("layers/0/gate", "eval"), "layers[0].gate"),
    "solve": (put("solve", {}), "solve"),
    "unknown component": (put("layers/0/component", "vae"), "vae"),
    "component is a dunder": (put("layers/0/component", "__class__"), "__class__"),
    "unknown base component": (put("base_model/components/vae", {"class_name": "x", "architecture": "0" * 64}), "vae"),
    "another file": (put("layers/0/file", "../../etc/passwd"), "passwd"),
    "a pickle": (put("layers/0/file", "pytorch_model.bin"), "pytorch_model.bin"),
    "file outside": (put("files/..~x", {"sha256": "0" * 64, "size": 1}), "files"),
    "site is a dunder": (put("layers/0/sites/0", "x.__class__"), "x.__class__"),
    "site is ours": (put("layers/0/sites/0", "erasure_modules.x"), "erasure_modules.x"),
    "site is peft's": (put("layers/0/sites/0", "conv_in.base_layer"), "conv_in.base_layer"),
    "site is a path": (put("layers/0/sites/0", "../x"), "../x"),
    "site is empty": (put("layers/0/sites/0", ""), "''"),
    "site is a pattern": (put("layers/0/sites/0", ".*to_k"), ".*to_k"),
    "site with a newline": (put("layers/0/sites/0", "conv_in\n"), "conv_in"),
    "site in other letters": (put("layers/0/sites/0", "сonv_in"), "сonv_in"),
    "site twice": (put("layers/0/sites/0", UNET_SITES[1].removeprefix("unet.")), "twice"),
    "no sites": (put("layers/0/sites", []), "sites"),
    "prefix is a path": (put("layers/0/prefix", "../"), "prefix"),
    "bad hash": (put("files/" + LORA_FILE + "/sha256", "xyz"), "sha256"),
    "bad fingerprint": (put("base_model/components/unet/architecture", "xyz"), "architecture"),
    "bad second hash": (put("base_model/components/tokenizer/serialised", "xyz"), "serialised"),
    "second hash of a model": (put("base_model/components/unet/serialised", "0" * 64), "serialised"),
    "redacted but named": (put("redacted", True), "redacted"),
    "stock for another file": (put("stock", {"file": TENSOR_FILE, "error": 0.0}), "stock"),
    "stock of the old schema": (put("stock", {"file": LORA_FILE, "max_error": 0.0}), "max_error"),
    "stock of another form": (put("stock", {"file": LORA_FILE, "error": 0.0, "form": "nearly"}), "stock.form"),
    "stock that is far from exact": (put("stock", {"file": LORA_FILE, "error": 1.0}), "stock.error"),
    "stock of a negative error": (
        put("stock", {"file": LORA_FILE, "error": -0.1, "form": "approximate"}),
        "stock.error",
    ),
    "too many concepts": (put("concepts", [{"target": "x", "anchor": None}] * 100_000), "bytes"),
    "no file record": (put("files", {}), "files"),
}


@pytest.mark.parametrize("case", list(BAD_CONFIGS))
def test_bad_configs_are_refused(saved: Path, case: str) -> None:
    change, culprit = BAD_CONFIGS[case]
    path = saved / CONFIG_FILE
    data = change(path.read_bytes())
    assert data != path.read_bytes()
    path.write_bytes(data)
    with pytest.raises(ErasureError) as caught:
        Erasure.from_pretrained(saved)
    expected = ErasureFileError if len(data) > MAX_CONFIG_BYTES else ErasureConfigError
    assert type(caught.value) is expected, caught.value
    assert culprit in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_newer_minor_schemas_are_read(saved: Path) -> None:
    path = saved / CONFIG_FILE
    path.write_bytes(put("schema", "1.7")(path.read_bytes()))
    assert Erasure.from_pretrained(saved).config.schema == "1.7"


def test_a_config_that_is_too_large_is_not_read(saved: Path) -> None:
    path = saved / CONFIG_FILE
    path.write_bytes(path.read_bytes() + b" " * MAX_CONFIG_BYTES)
    refused(saved, ErasureFileError, CONFIG_FILE)


# ----------------------------------------------------------------------------------------- reading: the tensors


def rewrite(folder: Path, data: bytes) -> None:
    """Put another tensor file in place, with a config that vouches for it."""
    (folder / LORA_FILE).write_bytes(data)
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    config["files"][LORA_FILE] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        tensors = safetensors.torch.load(data)
        change(tensors)
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})

    return edit


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change(header)
        raw = json.dumps(header).encode()
        return struct.pack("<Q", len(raw)) + raw + data[8 + size :]

    return edit


DOWN = UNET_SITES[0] + ".lora_A.weight"
UP = UNET_SITES[0] + ".lora_B.weight"


def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][1, 1] = value

    return change


def rank_zero(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name] = tensors[name][:0] if "lora_A" in name else tensors[name][:, :0]


BAD_TENSORS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda data: data[:-8], LORA_FILE),
    "only a length": (lambda data: data[:8], LORA_FILE),
    "empty": (lambda data: data[:1], LORA_FILE),
    "a huge header": (lambda data: struct.pack("<Q", 2**60) + data[8:], LORA_FILE),
    "a header that is no JSON": (lambda data: data[:8] + b"x" * (len(data) - 8), LORA_FILE),
    "trailing bytes": (lambda data: data + b"\0" * 8, LORA_FILE),
    "a pickle": (lambda data: b"\x80\x04K\x01.", LORA_FILE),
    "overlapping offsets": (with_header(lambda h: h[DOWN].update(data_offsets=h[UP]["data_offsets"])), LORA_FILE),
    "a lying shape": (with_header(lambda h: h[DOWN].update(shape=[10**6, 10**6])), LORA_FILE),
    "an unknown dtype": (with_header(lambda h: h[DOWN].update(dtype="OBJECT")), LORA_FILE),
    "negative offsets": (with_header(lambda h: h[DOWN].update(data_offsets=[-4, 0])), LORA_FILE),
    "extra tensor": (with_tensors(lambda t: t.update({"unet.extra": torch.ones(2)})), "extra"),
    "extra tensor elsewhere": (with_tensors(lambda t: t.update(zzz=torch.ones(2))), "zzz"),
    "missing tensor": (with_tensors(lambda t: t.pop(UP)), UP.removeprefix("unet.")),
    "NaN": (with_tensors(spoil(float("nan"))), UP),
    "infinity": (with_tensors(spoil(float("inf"))), UP),
    "int64": (with_tensors(lambda t: t.update({UP: t[UP].long()})), "int64"),
    "float64": (with_tensors(lambda t: t.update({UP: t[UP].double()})), "float64"),
    "bool": (with_tensors(lambda t: t.update({UP: t[UP] > 0})), "bool"),
    "rank 0": (with_tensors(rank_zero), "shape"),
    "ranks differ": (with_tensors(lambda t: t.update({UP: t[UP][:, :1]})), UP.removesuffix(".lora_B.weight")[5:]),
    "one dimension": (with_tensors(lambda t: t.update({UP: t[UP].flatten()})), "shapes"),
    "five dimensions": (with_tensors(lambda t: t.update({UP: t[UP][None, None, None]})), "shape"),
}


@pytest.mark.parametrize("case", list(BAD_TENSORS))
def test_bad_tensor_files_are_refused(saved: Path, case: str) -> None:
    change, culprit = BAD_TENSORS[case]
    rewrite(saved, change((saved / LORA_FILE).read_bytes()))
    refused(saved, ErasureFileError, culprit)


def test_another_tensor_file_is_refused(saved: Path) -> None:
    """One bit is enough, and so is one byte less."""
    path = saved / LORA_FILE
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(saved, ErasureFileError, "SHA-256")
    path.write_bytes(data[:-1])
    refused(saved, ErasureFileError, f"{len(data) - 1} bytes")
    path.write_bytes(data + b"\0")
    refused(saved, ErasureFileError, LORA_FILE)
    path.unlink()
    refused(saved, ErasureFileError, LORA_FILE)


def test_text_maps_are_validated(tmp_path: Path) -> None:
    good = random_erasure(tiny_sd_pipe(), "text_map")

    def build(**tensors: torch.Tensor) -> Erasure:
        return Erasure(good.config, {TENSOR_FILE: {f"text_map.{name}": value for name, value in tensors.items()}})

    rows = torch.ones(2, 32)
    for tensors in ({"A": rows}, {"A": rows, "D": rows, "E": rows}, {"A": rows, "D": rows[:1]}):
        with pytest.raises(ErasureFileError, match=r"A.*D"):
            build(**tensors)
    with pytest.raises(ErasureFileError, match="n <= C"):
        build(A=torch.ones(33, 32), D=torch.ones(33, 32))
    build(A=rows, D=rows)


# ------------------------------------------------------------------------------------------------ reading: places


def test_links_out_of_the_folder_are_refused(saved: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (LORA_FILE, CONFIG_FILE):
        os.rename(saved / name, outside / name)
        (saved / name).symlink_to(outside / name)
        refused(saved, ErasureFileError, "link")
        (saved / name).unlink()
        os.rename(outside / name, saved / name)
    Erasure.from_pretrained(saved)


@pytest.mark.parametrize("subfolder", ["..", "../other", "a/../..", "/etc"])
def test_subfolders_lie_inside(saved: Path, tmp_path: Path, subfolder: str, erasure: Erasure) -> None:
    erasure.save_pretrained(tmp_path / "other")
    refused(saved, ErasureInputError, subfolder, subfolder=subfolder)


def test_folders_without_an_erasure(tmp_path: Path) -> None:
    refused(tmp_path, ErasureNotFoundError, CONFIG_FILE)
    refused(tmp_path, ErasureNotFoundError, "no/such", subfolder="no/such")


def test_other_files_of_the_folder_are_never_read(saved: Path) -> None:
    (saved / "pytorch_model.bin").write_bytes(b"not even a pickle")
    (saved / TENSOR_FILE).write_bytes(b"no safetensors")
    assert list(Erasure.from_pretrained(saved).tensors) == [LORA_FILE]


def test_a_redacted_copy_takes_along_nothing_written_by_hand(tmp_path: Path) -> None:
    """The card that was edited, its pictures and the record of it may name the concepts; the licence does not."""
    folder, picture = tmp_path / "no-zebra", io.BytesIO()
    random_erasure(tiny_sd_pipe()).save_pretrained(folder)
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    (folder / "before_after.png").write_bytes(picture.getvalue())
    card = (folder / "README.md").read_text(encoding="utf-8")
    card = card.replace("## Limits", "I removed the zebra. ![](before_after.png)\n\n## Limits")
    (folder / "README.md").write_text(card.replace("---\n", "---\nlicense: mit\n", 1), encoding="utf-8")
    copy = Erasure.from_pretrained(folder).redacted()
    copy.cast(torch.float16).save_pretrained(tmp_path / "quiet")
    assert not (tmp_path / "quiet" / "before_after.png").exists()
    written = {path.name: path.read_bytes() for path in (tmp_path / "quiet").iterdir()}
    assert not any(b"zebra" in data for data in written.values()) and b"license: mit" in written["README.md"]
    with pytest.raises(ErasureInputError, match="edited by hand"):
        copy.save_pretrained(folder)
    again = Erasure.from_pretrained(tmp_path / "quiet").redacted()  # redacted already: its own card is kept
    (tmp_path / "quiet" / "README.md").write_text("Mine.", encoding="utf-8")
    again.save_pretrained(tmp_path / "again")
    assert "Mine." in (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
