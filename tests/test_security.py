"""Hostile input is refused with a typed error, in bounded time and memory, and nothing of it is ever attached."""

import base64
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from diffusers_erasure import Erasure, ErasureConfigError, ErasureError, ErasureFileError, ErasureNotFoundError
from diffusers_erasure.schema import CONFIG_FILE, LORA_FILE, MAX_FILE_BYTES, TENSOR_FILE, ErasureConfig
from tests import hostile
from tests.helpers import TEXT_SITES, UNET_SITES, models, random_erasure, tiny_sd_pipe, tree, unchanged_by, weights


SITES = UNET_SITES[:2] + TEXT_SITES[:1]
SITE = UNET_SITES[0]
Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def pipe() -> Any:
    """One for all: every test leaves it as it was."""
    return tiny_sd_pipe()


@pytest.fixture(scope="module")
def saved_files(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valid") / "erasure"
    random_erasure(pipe, sites=SITES, derived_from=("text_encoder",)).save_pretrained(folder)
    return folder


@pytest.fixture
def saved(saved_files: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_files, tmp_path / "erasure"))


def refused(pipe: Any, source: Path, kind: type[ErasureError], culprit: str = "", **arguments: Any) -> str:
    """Loading is refused by exactly this error, soon and in few words, and the pipeline is as it was bit for bit."""

    def load() -> str:
        start = time.monotonic()
        with pytest.raises(ErasureError) as caught:
            pipe.load_erasure(source, **arguments)
        assert time.monotonic() - start < 10
        assert type(caught.value) is kind, repr(caught.value)
        return str(caught.value)

    message = unchanged_by(pipe, load)
    assert culprit in message
    assert len(message) < 1500, len(message)
    assert "\x1b" not in message
    assert pipe.list_erasures() == []
    return message


def change(path: str, value: Any) -> Edit:
    """Replace one value of the config."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("|")]
        place = config
        for part in parents:
            place = place[part]
        place[last] = value
        (folder / CONFIG_FILE).write_text(json.dumps(config))

    return edit


def raw(edit: Callable[[bytes], bytes]) -> Edit:
    return lambda folder: (folder / CONFIG_FILE).write_bytes(edit((folder / CONFIG_FILE).read_bytes()))


def numbers(*values: float) -> str:
    return base64.b64encode(np.array(values, "<f4").tobytes()).decode()


# ------------------------------------------------------------------------------------------------------- configs

DEEP = b'{"a":' * 30_000 + b"1" + b"}" * 30_000
SEED = b'"seed": 0'
UNET = "base_model|components|unet|"
BOMBS: dict[str, tuple[Edit, str]] = {
    "deep recursion": (raw(lambda data: DEEP), CONFIG_FILE),
    "deep within": (raw(lambda data: data.replace(SEED, b'"seed": ' + b"[" * 5000 + b"]" * 5000, 1)), CONFIG_FILE),
    "wide": (raw(lambda data: data.replace(SEED, b'"seed": [' + b"0," * 90_000 + b"0]", 1)), "method.seed"),
    "a huge integer": (raw(lambda data: data.replace(SEED, b'"seed": ' + b"9" * 200_000, 1)), CONFIG_FILE),
    "a large integer": (change("method|seed", 2**63), "too large"),
    "a negative integer": (change("method|seed", -(10**40)), "too large"),
    "a huge exponent": (raw(lambda data: data.replace(SEED, b'"seed": 1e99999', 1)), "finite"),
    "duplicate keys": (raw(lambda data: data.replace(SEED, SEED + b', "seed": 1', 1)), "twice"),
    "duplicate keys by escape": (raw(lambda data: data.replace(SEED, SEED + b', "se\\u0065d": 1', 1)), "twice"),
    "an unknown key": (change("auto_map", {"AutoPipeline": "evil.Pipeline"}), "auto_map"),
    "a long unknown key": (change("k" * 90_000, 1), "unknown key"),
    "a dunder key": (change("__class__", "os.system"), "__class__"),
    "invalid UTF-8": (raw(lambda data: data.replace(b"zebra", b"\xc3\x28", 1)), CONFIG_FILE),
    "overlong UTF-8": (raw(lambda data: data.replace(b"zebra", b"\xc0\xaf", 1)), CONFIG_FILE),
    "a raw surrogate": (raw(lambda data: data.replace(b"zebra", b"\xed\xa0\x80", 1)), CONFIG_FILE),
    "an escaped surrogate": (raw(lambda data: data.replace(b"zebra", b"\\ud800", 1)), "Unicode"),
    "an escaped surrogate in a key": (change("method|settings", {"\udfff": 1}), "Unicode"),
    "a byte order mark": (raw(lambda data: b"\xef\xbb\xbf" + data), CONFIG_FILE),
    "UTF-16": (raw(lambda data: data.decode().encode("utf-16")), CONFIG_FILE),
    "a NUL": (raw(lambda data: data.replace(b"zebra", b"\0", 1)), CONFIG_FILE),
    "values that are no base64": (change(UNET + "values", "*" * 16), "base64"),
    "values in other letters": (change(UNET + "values", "ａａａａ"), "base64"),
    "values of a wrong length": (change(UNET + "values", "AAAAAA"), "base64"),
    "values cut in a number": (change(UNET + "values", "AAAA"), "base64"),
    "too many values": (change(UNET + "values", "A" * 100_000), "samples"),
    "values without a dtype": (change(UNET + "dtype", None), "dtype"),
    "a long component": (change("layers|0|component", "x" * 90_000), "component"),
    "a long file": (change("layers|0|file", "x" * 90_000), "file"),
    "a long site": (change("layers|0|sites|0", "x" * 90_000), "site"),
    "a long schema": (change("schema", "1" * 90_000), "schema"),
    "a class name for the terminal": (change(UNET + "class_name", "\x1b[2Jgone"), "printable"),
    "a repository for the terminal": (change("base_model|repo", "\x1b]0;owned\x07"), "printable"),
    "a family with a line of its own": (change("base_model|family", "sd\nERROR: loaded"), "printable"),
    "a method right to left": (change("method|name", "\u202euce"), "printable"),
    "10 GB": (change(f"files|{LORA_FILE}|size", 10**10), "bytes"),
    "a bool as a size": (change(f"files|{LORA_FILE}|size", True), "size"),
    "65 layers": (
        raw(lambda data: json.dumps({**json.loads(data), "layers": json.loads(data)["layers"] * 65}).encode()),
        "layers",
    ),
    "8,193 sites": (change("layers|0|sites", [f"s{i}" for i in range(8193)]), "sites"),
    **{
        f"the dtype {name}": (change(UNET + "dtype", name), "dtype")
        for name in ("nn", "load", "__class__", "int8", "complex64", "bits8", "float4_e2m1fn_x2", "float8_e8m0fnu", "")
    },
}


@pytest.mark.parametrize("case", list(BOMBS))
def test_config_bombs(pipe: Any, saved: Path, case: str) -> None:
    edit, culprit = BOMBS[case]
    edit(saved)
    refused(pipe, saved, ErasureConfigError, culprit)


def test_large_configs_are_not_read(pipe: Any, saved: Path) -> None:
    hostile.sparse(saved / CONFIG_FILE, 10**10)
    refused(pipe, saved, ErasureFileError, "10000000000 bytes")


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3.4e38])
def test_fingerprints_that_lie_never_match(pipe: Any, saved: Path, value: float) -> None:
    """Neither NaN (nothing to compare) nor infinity (close to everything) counts as the same weights."""
    config = ErasureConfig.from_json((saved / CONFIG_FILE).read_bytes())
    stored = config.base_model.components["unet"].values
    assert stored is not None
    count = len(base64.b64decode(stored)) // 4
    change(UNET + "values", numbers(*[value] * count))(saved)
    info = pipe.load_erasure(saved)
    pipe.unload_erasure()
    assert info.base_match["unet"] == ("different weights" if value == 3.4e38 else "unverified")
    change(UNET + "values", numbers(1.0))(saved)
    assert pipe.load_erasure(saved).base_match["unet"] == "unverified"
    pipe.unload_erasure()


def test_a_fingerprint_may_lack_its_values(pipe: Any, saved: Path) -> None:
    change(UNET + "values", None)(saved)
    change(UNET + "dtype", None)(saved)
    assert pipe.load_erasure(saved).base_match["unet"] == "unverified"
    pipe.unload_erasure()


NAMES = (
    *("__class__", "conv_in.__class__", "__init__.__globals__", "erasure_modules", "erasure_modules.layers.lora"),
    *("conv_in.base_layer", "conv_in.lora_A", "mid_block.lora_B.default", "_orig_mod.conv_in", "a.processor.to_k_ip"),
    *(
        "сonv_in",
        "conv_in\u200b",
        "ｃonv_in",
        "conv_\u0131n",
        "conv_in\n",
        "conv_in ",
        " conv_in",
        "conv_in\0",
        "conv-in",
    ),
    *("conv_in.", ".conv_in", "a..b", "../conv_in", "conv_in/weight", ".*", "(a+)+$", "[", "\\", "", "."),
)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_are_no_sites(pipe: Any, saved: Path, name: str) -> None:
    change("layers|0|sites|0", name)(saved)
    refused(pipe, saved, ErasureConfigError)


def renamed(erasure: Erasure, site: str) -> Erasure:
    """The erasure with its first site under another name, tensors and all."""
    layer = erasure.config.layers[0]
    old = layer.sites[0]
    layers = (dataclasses.replace(layer, sites=(site, *layer.sites[1:])), *erasure.config.layers[1:])
    names = {"unet." + old + half: "unet." + site + half for half in (".lora_A.weight", ".lora_B.weight")}
    tensors = {names.get(name, name): value for name, value in erasure.tensors[LORA_FILE].items()}
    return Erasure(dataclasses.replace(erasure.config, layers=layers, files={}), {LORA_FILE: tensors})


def test_sites_that_are_no_layers(pipe: Any, saved_files: Path) -> None:
    """A third of the denoiser's attributes and of its modules that are no Linear or Conv2d, as a site."""
    erasure, before = Erasure.from_pretrained(saved_files), tree(pipe)
    linear = {
        name for name, module in pipe.unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    names = {name for name in dir(pipe.unet) if not name.startswith("__")} - linear - {"base_layer"}
    names |= {name for name, _ in pipe.unet.named_modules() if name and "processor" not in name} - linear
    assert len(names) > 200
    for name in sorted(names)[::3]:
        with pytest.raises(ErasureError):
            pipe.load_erasure(renamed(erasure, name))
    assert tree(pipe) == before


# --------------------------------------------------------------------------------------------------------- places


def test_links_to_files(pipe: Any, saved: Path, tmp_path: Path) -> None:
    for name in (CONFIG_FILE, LORA_FILE):
        os.rename(saved / name, tmp_path / name)
        (saved / name).symlink_to(tmp_path / name)
        refused(pipe, saved, ErasureFileError, "link")
        (saved / name).unlink()
        (saved / name).symlink_to(f"../{name}")
        refused(pipe, saved, ErasureFileError, "link")
        (saved / name).unlink()
        os.rename(tmp_path / name, saved / name)


@pytest.mark.parametrize("place", ["blobs", "x/blobs", "models--a--b/blobs", "snapshots/blobs", "blobs/x"])
def test_a_folder_called_blobs_is_no_pass(pipe: Any, saved: Path, tmp_path: Path, place: str) -> None:
    """Only a snapshot of the Hub's cache may link to blobs, and only to its own."""
    (tmp_path / place).mkdir(parents=True)
    os.rename(saved / LORA_FILE, tmp_path / place / "secret")
    (saved / LORA_FILE).symlink_to(tmp_path / place / "secret")
    refused(pipe, saved, ErasureFileError, "link")
    snapshot = tmp_path / "models--x--y" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    os.rename(saved, snapshot)
    refused(pipe, snapshot, ErasureFileError, "link")
    (tmp_path / "models--x--y" / "blobs").symlink_to(tmp_path / place)  # nor where its blobs are elsewhere
    refused(pipe, snapshot, ErasureFileError, "link")


@pytest.mark.parametrize("subfolder", [None, "a/b"])
def test_the_hubs_cache_is_read(pipe: Any, saved: Path, tmp_path: Path, subfolder: str | None) -> None:
    repo = tmp_path / "models--x--y"
    snapshot = repo / "snapshots" / ("0" * 40)
    place = snapshot / (subfolder or "")
    (repo / "blobs").mkdir(parents=True)
    place.mkdir(parents=True)
    for index, path in enumerate(saved.iterdir()):
        os.rename(path, repo / "blobs" / str(index))
        (place / path.name).symlink_to(os.path.relpath(repo / "blobs" / str(index), place))
    assert pipe.load_erasure(snapshot, subfolder=subfolder).method == "random"
    pipe.unload_erasure()


def test_links_to_folders(pipe: Any, saved: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere"
    os.rename(saved, outside)
    saved.mkdir()
    (saved / "sub").symlink_to(outside)
    for subfolder in ("sub", "sub/.", "../elsewhere", str(outside)):
        with pytest.raises(ErasureError, match="inside"):
            pipe.load_erasure(saved, subfolder=subfolder)
    assert pipe.list_erasures() == []
    pipe.load_erasure(saved / "sub", "named")  # that the user named it is another matter
    pipe.unload_erasure()


def test_links_in_circles(pipe: Any, saved: Path) -> None:
    (saved / LORA_FILE).unlink()
    (saved / LORA_FILE).symlink_to(LORA_FILE)
    refused(pipe, saved, ErasureFileError, LORA_FILE)
    (saved / CONFIG_FILE).unlink()
    (saved / CONFIG_FILE).symlink_to(CONFIG_FILE)
    refused(pipe, saved, ErasureNotFoundError, CONFIG_FILE)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [CONFIG_FILE, LORA_FILE])
@pytest.mark.parametrize("what", ["fifo", "folder", "device"])
def test_what_is_no_file_is_not_opened(pipe: Any, saved: Path, name: str, what: str) -> None:
    (saved / name).unlink()
    if what == "fifo":
        os.mkfifo(saved / name)
    elif what == "folder":
        (saved / name).mkdir()
    else:
        (saved / name).symlink_to("/dev/zero")
    refused(pipe, saved, ErasureNotFoundError if name == CONFIG_FILE else ErasureFileError, name)
    os.rename(saved, saved.parent / "lora")
    with pytest.raises(ErasureError):
        pipe.load_erasure(saved.parent / "lora", method="lora", weight_name=LORA_FILE if name == LORA_FILE else "x.y")


def test_contents_that_lack_files(saved: Path) -> None:
    with pytest.raises(ErasureNotFoundError, match=CONFIG_FILE):
        Erasure.from_files({})
    with pytest.raises(ErasureFileError, match=LORA_FILE):
        Erasure.from_files({CONFIG_FILE: (saved / CONFIG_FILE).read_bytes()})


# ---------------------------------------------------------------------------------------------------- tensor files


def header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        head, rest = hostile.split(data)
        edit(head)
        return hostile.join(head, rest)

    return apply


DOWN, UP = SITE + ".lora_A.weight", SITE + ".lora_B.weight"
LIES: dict[str, Callable[[bytes], bytes]] = {
    "8 bytes": lambda data: data[:8],
    "8 bytes of zeros": lambda data: bytes(8),
    "zeros": lambda data: bytes(len(data)),
    "1 byte": lambda data: b"\0",
    "an empty header": lambda data: hostile.join({}, b""),
    "metadata alone": lambda data: hostile.join({"__metadata__": {"a": "b"}}, b""),
    "a header of 2^64-1 bytes": lambda data: b"\xff" * 8 + data[8:],
    "a header of 2^63 bytes": lambda data: hostile.join(b"", data, 2**63),
    "a header as long as the file": lambda data: hostile.join(b"", data[8:], len(data)),
    "a header that is no JSON": lambda data: hostile.join(b"x" * 64, data),
    "a header that is a list": lambda data: hostile.join([], b""),
    "a deep header": lambda data: hostile.join(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "a header that is no UTF-8": lambda data: hostile.join(b'{"\xff":1}', b""),
    "a huge header": lambda data: hostile.join(b"{" + b" " * (9 * 2**20) + b"}", b""),
    "very many tensors": lambda data: hostile.header_bomb(66_000),
    "a shape that overflows": header(lambda h: h[DOWN].update(shape=[2**62, 2**62])),
    "a huge empty shape": header(lambda h: h[DOWN].update(shape=[0, 2**62])),
    "a negative shape": header(lambda h: h[DOWN].update(shape=[-3, -32])),
    "a shape of floats": header(lambda h: h[DOWN].update(shape=[3.0, 32.0])),
    "a swapped shape": header(lambda h: h[DOWN].update(shape=h[DOWN]["shape"][::-1])),
    "a scalar": header(lambda h: h[DOWN].update(shape=[])),
    "another dtype": header(lambda h: h[DOWN].update(dtype="I32")),
    "a smaller dtype": header(lambda h: h[DOWN].update(dtype="F16")),
    "an unknown dtype": header(lambda h: h[DOWN].update(dtype="object")),
    "complex": header(lambda h: h[DOWN].update(dtype="C64", shape=[h[DOWN]["shape"][0], h[DOWN]["shape"][1] // 2])),
    "overlap": header(lambda h: h[DOWN].update(data_offsets=h[SITES[1] + ".lora_A.weight"]["data_offsets"])),
    "a hole": header(lambda h: h.pop(DOWN)),
    "offsets past the end": header(lambda h: h[DOWN].update(data_offsets=[10**9, 10**9 + 384])),
    "offsets backwards": header(lambda h: h[DOWN].update(data_offsets=h[DOWN]["data_offsets"][::-1])),
    "an entry without a shape": header(lambda h: h[DOWN].pop("shape")),
    "an entry that is null": header(lambda h: h.update({DOWN: None})),
    "a look-alike": header(lambda h: h.update({DOWN.replace("a", "а"): h.pop(DOWN)})),
    "a stranger": header(lambda h: h.update({"unet.__class__": h.pop(DOWN)})),
    "an empty stranger": header(lambda h: h.update({"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})),
    "NaN": lambda data: data[:-4] + b"\xff\xff\xff\x7f",
    "infinity": lambda data: data[:-4] + b"\x00\x00\x80\x7f",
    "trailing bytes": lambda data: data + b"MZ",
    "a zip file": lambda data: b"PK\x03\x04" + data,
}


@pytest.mark.parametrize("case", list(LIES))
def test_tensor_files_that_lie(pipe: Any, saved: Path, case: str) -> None:
    hostile.vouch(saved, LORA_FILE, LIES[case]((saved / LORA_FILE).read_bytes()))
    refused(pipe, saved, ErasureFileError)


def test_a_rank_beyond_the_limit(pipe: Any, saved: Path) -> None:
    ranks = dict.fromkeys(SITES, (4097, 32, 64))
    hostile.vouch(saved, LORA_FILE, hostile.lora(ranks))
    refused(pipe, saved, ErasureFileError, "4096")


def test_a_pickle_by_another_name(pipe: Any, saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    data = pickle.dumps(hostile.Trap(marker))
    hostile.vouch(saved, LORA_FILE, data)
    refused(pipe, saved, ErasureFileError, LORA_FILE)
    assert not marker.exists()
    pickle.loads(data).close()
    assert marker.exists(), "the trap works"


# ----------------------------------------------------------------------------------------------------- plain LoRAs

RANKS = {SITE: (2, 32, 64)}
METADATA: dict[str, Any] = {
    **{
        f"initialised by {how}": {"unet.init_lora_weights": how}
        for how in ("pissa", "olora", "corda", "loftq", "x", 2)
    },
    "initialised by an object": {"unet.init_lora_weights": {"a": 1}},
    "a rank pattern": {"unet.rank_pattern": {"(a+)+$": 4}},
    "an alpha pattern": {"unet.alpha_pattern": {"(.*)*x": 4}},
    "DoRA": {"unet.use_dora": True},
    "rsLoRA": {"unet.use_rslora": "yes"},
    "an alpha of text": {"unet.lora_alpha": "__import__('os')"},
    "an alpha of digits": {"unet.lora_alpha": "8"},
    "a list as alpha": {"unet.lora_alpha": [8]},
    "no alpha": {"unet.lora_alpha": None},
    "a true alpha": {"unet.lora_alpha": True},
    "a huge alpha": {"unet.lora_alpha": 1e300},
    "an alpha that overflows": {"unet.lora_alpha": 10**400},
    "a NaN alpha": '{"unet.lora_alpha": NaN}',
    "an infinite alpha": '{"unet.lora_alpha": -Infinity}',
    "a list": [1, 2],
    "a number": "7",
    "no JSON": "{",
    "deep": "[" * 100_000,
    "a very long number": '{"unet.lora_alpha": ' + "9" * 10_000 + "}",
}


@pytest.mark.parametrize("case", list(METADATA))
def test_metadata_of_plain_loras(pipe: Any, tmp_path: Path, case: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(hostile.lora(RANKS, METADATA[case]))
    refused(pipe, tmp_path, ErasureFileError, method="lora", weight_name="x.safetensors")


def test_metadata_reaches_no_regex_and_no_peft(pipe: Any, tmp_path: Path) -> None:
    """What is not needed is ignored: a pattern that would take for ever, an import path, an unknown key."""
    metadata = {
        "unet.target_modules": "(a+)+$" * 20,
        "unet.exclude_modules": "(.*)*x",
        "unet.auto_mapping": {"parent_library": "os"},
        "unet.surprise": 1,
        "unet.r": 10**9,
        "unet.lora_alpha": 2,
    }
    (tmp_path / "x.safetensors").write_bytes(hostile.lora(RANKS, metadata))
    values = weights(pipe)
    pipe.load_erasure(tmp_path, method="lora")
    assert not hasattr(pipe.unet, "peft_config")
    pipe.unload_erasure()
    assert all(torch.equal(value, values[name]) for name, value in weights(pipe).items())


def kohya(**extra: torch.Tensor) -> bytes:
    site = "lora_unet_" + SITE.removeprefix("unet.").replace(".", "_")
    tensors = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(64, 2), **extra}
    return hostile.save({f"{site}.{name}": value for name, value in tensors.items()})


def peft(**extra: torch.Tensor) -> bytes:
    tensors = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(64, 2), **extra}
    return hostile.save({f"{SITE}.{name.replace('__', '.')}": value for name, value in tensors.items()})


PLAIN: dict[str, bytes] = {
    "kohya DoRA": kohya(dora_scale=torch.ones(64, 1)),
    "peft DoRA": peft(lora_magnitude_vector=torch.ones(64)),
    "a bias": peft(lora_B__bias=torch.ones(64)),
    "kohya NaN alpha": kohya(alpha=torch.tensor(float("nan"))),
    "kohya huge alpha": kohya(alpha=torch.tensor(1e30)),
    "kohya alphas": kohya(alpha=torch.ones(3)),
    "kohya rank 0": kohya(**{"lora_down.weight": torch.ones(0, 32), "lora_up.weight": torch.ones(64, 0)}),
    "one half": hostile.save({DOWN: torch.ones(2, 32)}),
    "scalars": hostile.save({DOWN: torch.tensor(1.0), UP: torch.tensor(1.0)}),
    "vectors": hostile.save({DOWN: torch.ones(2), UP: torch.ones(2)}),
    "five dimensions": hostile.save({DOWN: torch.ones(2, 2, 2, 2, 2), UP: torch.ones(2, 2, 2, 2, 2)}),
    "ranks differ": hostile.save({DOWN: torch.ones(2, 32), UP: torch.ones(64, 3)}),
    "integers": hostile.save({DOWN: torch.ones(2, 32, dtype=torch.int32), UP: torch.ones(64, 2, dtype=torch.int32)}),
    "NaN": hostile.save({DOWN: torch.full((2, 32), torch.nan), UP: torch.ones(64, 2)}),
    "a whole model": hostile.save({SITE + ".weight": torch.ones(64, 32)}),
    "nothing": hostile.save({}),
    "rank 5,000": hostile.lora({SITE: (5000, 32, 64)}),
    "uneven ranks": hostile.lora(
        {SITE: (4096, 2, 2), **{f"unet.down_blocks.{i}.attn2.to_k": (1, 64, 64) for i in range(800)}}
    ),
    "no safetensors": b"x" * 100,
    "a header of 2^63 bytes": b"\xff" * 7 + b"\x7f" + b"x" * 100,
}


@pytest.mark.parametrize("case", list(PLAIN))
def test_plain_loras_that_are_none(pipe: Any, tmp_path: Path, case: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(PLAIN[case])
    refused(pipe, tmp_path, ErasureFileError, method="lora", weight_name="x.safetensors")


@pytest.mark.parametrize("name", ["__class__", "erasure_modules.x", "conv_in.base_layer", "сonv_in", "a.processor.b"])
def test_plain_loras_name_sites(pipe: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(hostile.lora({f"unet.{name}": (2, 32, 64)}))
    with pytest.raises(ErasureError):
        pipe.load_erasure(tmp_path, method="lora")
    refused(pipe, tmp_path, ErasureConfigError, method="lora", weight_name="x.safetensors")


def test_pickles_are_never_loaded(pipe: Any, tmp_path: Path) -> None:
    marker, folder = tmp_path / "executed", tmp_path / "repo"
    folder.mkdir()
    for name in ("pytorch_lora_weights.bin", "x.pt", "adapter_model.bin", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(hostile.Trap(marker)))
    refused(pipe, folder, ErasureNotFoundError)
    refused(pipe, folder, ErasureNotFoundError, method="lora")
    for name in ("pytorch_lora_weights.bin", "x.pt"):
        with pytest.raises(ErasureError, match="safetensors"):
            pipe.load_erasure(folder, method="lora", weight_name=name)
        refused(pipe, folder / name, ErasureFileError, method="lora")
    shutil.copy(folder / "x.pt", folder / "x.safetensors")
    refused(pipe, folder, ErasureFileError, method="lora", weight_name="x.safetensors")
    assert not marker.exists()


# ----------------------------------------------------------------------------------------------- bounded resources

REFUSE = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import diffusers_erasure
from diffusers_erasure import ErasureError
from tests.helpers import tiny_sd_pipe

pipe = tiny_sd_pipe()
pipe.load_erasure(sys.argv[1])
pipe.unload_erasure()
# Not ru_maxrss: it starts at what the parent process had.
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
before = peak()
for folder in sorted(Path(sys.argv[2]).iterdir()):
    for method in (None, "lora"):
        start = time.monotonic()
        try:
            pipe.load_erasure(folder, method=method)
            outcome = "loaded"
        except ErasureError as error:
            outcome = type(error).__name__
        print(json.dumps([folder.name, method, outcome, peak() - before, time.monotonic() - start]))
"""


def test_refusing_takes_little_memory_and_time(
    saved_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own; peak memory beyond what loading a valid erasure took."""
    root = tmp_path / "bombs"

    def bomb(name: str) -> Path:
        return Path(shutil.copytree(saved_files, root / name))

    folder = bomb("10 GB")
    hostile.sparse(folder / LORA_FILE, 10**10)
    change(f"files|{LORA_FILE}|size", 10**10)(folder)
    hostile.sparse(bomb("10 GB, stated as few") / LORA_FILE, 10**10)
    hostile.sparse(bomb("a config of 10 GB") / CONFIG_FILE, 10**10)
    (root / "a config of 10 GB" / LORA_FILE).write_bytes(bytes(64))
    folder = bomb("a tensor of 10 GB")
    entry = {"dtype": "F32", "shape": [10**9, 2], "data_offsets": [0, 8 * 10**9]}
    start = hostile.join({DOWN: entry}, b"")
    hostile.sparse(folder / LORA_FILE, len(start) + 8 * 10**9, start)
    change(f"files|{LORA_FILE}|size", len(start) + 8 * 10**9)(folder)
    hostile.vouch(bomb("very many tensors"), LORA_FILE, hostile.header_bomb(250_000))
    hostile.vouch(bomb("60,000 tensors"), LORA_FILE, hostile.header_bomb(60_000))
    hostile.vouch(bomb("a header of 50 MB"), LORA_FILE, hostile.join(b"{" + b" " * 50_000_000 + b"}", b""))
    metadata = {"__metadata__": {str(i): "" for i in range(400_000)}}
    hostile.vouch(bomb("much metadata"), LORA_FILE, hostile.join(metadata, b""))
    hostile.vouch(bomb("uneven ranks"), LORA_FILE, PLAIN["uneven ranks"])
    folder = bomb("a deep config")
    (folder / CONFIG_FILE).write_bytes(DEEP)
    (folder / LORA_FILE).write_bytes(bytes(64))
    result = subprocess.run(
        [sys.executable, "-c", REFUSE, saved_files, root], capture_output=True, text=True, check=True, timeout=200
    )
    outcomes = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(outcomes) == 2 * len(list(root.iterdir()))
    loaded = [outcome[:2] for outcome in outcomes if outcome[2] == "loaded"]
    assert loaded == []
    memory, seconds = max(outcome[3] for outcome in outcomes), max(outcome[4] for outcome in outcomes)
    with capsys.disabled():
        print(f"\nrefused: {len(outcomes)} bombs; peak memory +{memory} MiB, at most {seconds:.2f} s each")
    assert memory < 400, outcomes
    assert seconds < 20, outcomes


def test_the_largest_file_is_4_gib() -> None:
    assert MAX_FILE_BYTES == 4 * 2**30


# -------------------------------------------------------------------------------------------------------- fuzzing


class Fuzz:
    """Loads mutants into one pipeline, and checks that nothing of them stayed: what did would be there at the end."""

    def __init__(self, pipe: Any, folder: Path) -> None:
        self.pipe, self.folder = pipe, folder
        self.outcomes: Counter[str] = Counter()
        self.slowest = 0.0
        self.before, self.values, self.versions = tree(pipe), weights(pipe), self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        tensors = [
            value for model in models(self.pipe).values() for value in model.state_dict(keep_vars=True).values()
        ]
        return [(id(value), value._version) for value in tensors]

    def load(self, **arguments: Any) -> None:
        start = time.monotonic()
        try:
            info = self.pipe.load_erasure(self.folder, strict_base="ignore", **arguments)
        except ErasureError as error:
            self.outcomes["refused"] += 1
            assert len(str(error)) < 2000
        else:
            self.outcomes["accepted"] += 1
            assert [item.name for item in self.pipe.list_erasures()] == [info.name]
            self.pipe.unload_erasure()
        self.slowest = max(self.slowest, time.monotonic() - start)
        assert self.slowest < 20
        assert self.pipe.list_erasures() == []
        if self.outcomes.total() % 25 == 0:
            self.check()

    def check(self) -> None:
        assert tree(self.pipe) == self.before
        assert self._versions() == self.versions

    def report(self, what: str) -> str:
        self.check()
        assert all(torch.equal(value, self.values[name]) for name, value in weights(self.pipe).items())
        accepted, refused = self.outcomes["accepted"], self.outcomes["refused"]
        return (
            f"\nfuzzed: {accepted + refused:,} {what}; {accepted:,} accepted, {refused:,} refused; "
            f"0 untyped errors; at most {self.slowest:.2f} s each"
        )


SCALES = [
    pytest.param(1, id="default"),
    pytest.param(20, id="slow", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
]


def fuzz(examples: int, strategy: Any, attempt: Callable[[bytes], Any]) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(data: bytes) -> None:
        attempt(data)

    run()


@pytest.mark.parametrize("scale", SCALES)
def test_fuzzed_configs(pipe: Any, saved: Path, scale: int, capsys: pytest.CaptureFixture[str]) -> None:
    watched = Fuzz(pipe, saved)

    def attempt(data: bytes) -> None:
        (saved / CONFIG_FILE).write_bytes(data)
        watched.load()

    fuzz(500 * scale, hostile.configs((saved / CONFIG_FILE).read_bytes()), attempt)
    with capsys.disabled():
        print(watched.report("configs"))
    assert watched.outcomes["accepted"] > 10
    assert watched.outcomes["refused"] > 400


@pytest.mark.parametrize("scale", SCALES)
def test_fuzzed_tensor_files(pipe: Any, saved: Path, scale: int, capsys: pytest.CaptureFixture[str]) -> None:
    change("base_model|components", {})(saved)
    watched = Fuzz(pipe, saved)

    def attempt(data: bytes) -> None:
        hostile.vouch(saved, LORA_FILE, data)
        watched.load()

    fuzz(500 * scale, hostile.files((saved / LORA_FILE).read_bytes()), attempt)
    with capsys.disabled():
        print(watched.report("tensor files"))
    assert watched.outcomes["accepted"] > 10
    assert watched.outcomes["refused"] > 400


@pytest.mark.parametrize("scale", SCALES)
def test_fuzzed_plain_loras(pipe: Any, tmp_path: Path, scale: int, capsys: pytest.CaptureFixture[str]) -> None:
    watched = Fuzz(pipe, tmp_path)

    def attempt(data: bytes) -> None:
        (tmp_path / "x.safetensors").write_bytes(data)
        watched.load(method="lora", weight_name="x.safetensors")

    valid = hostile.lora(dict.fromkeys(SITES[:2], (2, 32, 64)), {"unet.r": 2, "unet.lora_alpha": 4})
    fuzz(300 * scale, hostile.files(valid), attempt)
    with capsys.disabled():
        print(watched.report("plain LoRAs"))
    assert watched.outcomes["accepted"] > 5
    assert watched.outcomes["refused"] > 100


def test_text_maps_that_do_not_fit(pipe: Any, tmp_path: Path) -> None:
    """A map on an input that this model never reads would be attached and never act."""
    random_erasure(pipe, "text_map").save_pretrained(tmp_path / "map")
    for site in ("text_embeds", "pooled_projections", "sample", "forward"):
        change("layers|0|sites|0", site)(tmp_path / "map")
        with pytest.raises(ErasureError):
            pipe.load_erasure(tmp_path / "map")
    assert (tmp_path / "map" / TENSOR_FILE).is_file()
    assert pipe.list_erasures() == []
