"""Hostile input: mutants of valid configs, of safetensors files and of plain LoRAs, for tests/test_security.py."""

import copy
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from diffusers_erasure.schema import CONFIG_FILE


# ------------------------------------------------------------------------------------------------------- files


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: Any, data: bytes, size: int | None = None) -> bytes:
    """A safetensors file of any header, with a header length that may lie."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


def vouch(folder: Path, name: str, data: bytes, *, size: int | None = None) -> None:
    """Put a tensor file in place, with a config that states its size and hash."""
    (folder / name).write_bytes(data)
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    config["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data) if size is None else size}
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    """A file that claims `size` bytes and takes none on the disk."""
    with open(path, "wb") as handle:
        handle.write(start)
        handle.truncate(size)


def header_bomb(entries: int) -> bytes:
    """A valid header of many empty tensors."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return join({f"{i}": entry for i in range(entries)}, b"")


def lora(sites: dict[str, tuple[int, int, int]], metadata: Any = None) -> bytes:
    """A plain LoRA file: for each site rank, inputs and outputs. `metadata` goes in as it is if it is a string."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for site, (rank, inputs, outputs) in sites.items():
        tensors[site + ".lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[site + ".lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    text = metadata if isinstance(metadata, str) or metadata is None else json.dumps(metadata)
    return save(tensors, None if text is None else {"format": "pt", "lora_adapter_metadata": text})


class Trap:
    """Unpickling it makes a file: whoever finds that file has unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (str(self.marker), "w")


# ----------------------------------------------------------------------------------------------------- strategies

WORDS = (
    *("", "x", "..", "../../etc/passwd", "/etc/passwd", "\0", "\n", "\x1b[2J", "\u202e", "сonv_in", "conv_in\u200b"),
    *(
        "__class__",
        "erasure_modules",
        "lora_A",
        "a.b.c",
        ".",
        "(a+)+$",
        ".*",
        "nn",
        "load",
        "float32",
        "NaN",
        "A" * 5000,
    ),
    *("lora", "text_map", "unet", "text_encoder", "tokenizer", "vae", "transformer", "1.0", "1.9", "2.0", "0" * 64),
    *("encoder_hidden_states", "text_embeds", "pooled_projections", "erasure.safetensors", "AAAAAA==", "{{ 7*7 }}"),
)
NUMBERS = (0, 1, -1, 2, 2**31, 2**53, 2**63 - 1, -(2**63), 2**64, 10**30, 0.0, -0.0, 0.5, 1e308, -1e308, 5e-324)
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(NUMBERS),
    st.sampled_from([None, True, False, [], {}, [[]], [{}], {"": None}, [None] * 300, {"kind": "x"}]),
    st.text(max_size=8),
    st.integers(),
    st.floats(),
).map(copy.deepcopy)  # as further changes may go into it


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value within a JSON document stands."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [path for key, item in items for path in paths(item, (*at, key))]


def _parent(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


@st.composite
def documents(draw: st.DrawFn, original: Any) -> Any:
    """One to three changes of a JSON document: values replaced, dropped, added, copied elsewhere, lists repeated."""
    document = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        places = paths(document)
        if not places:
            break
        path = draw(st.sampled_from(places))
        parent, key = _parent(document, path), path[-1]
        action = draw(st.sampled_from(["replace", "replace", "nudge", "drop", "add", "copy", "repeat", "rename"]))
        value = parent[key]
        if action == "replace":
            parent[key] = draw(VALUES)
        elif action == "drop":
            del parent[key]
        elif action == "copy":
            parent[key] = copy.deepcopy(_at(document, draw(st.sampled_from(places))))
        elif action == "repeat" and isinstance(value, list):
            parent[key] = value * draw(st.integers(0, 3))
        elif action == "add" and isinstance(value, dict):
            value[draw(st.one_of(st.sampled_from(WORDS), st.text(max_size=5)))] = draw(VALUES)
        elif action == "add" and isinstance(value, list):
            value.append(draw(VALUES))
        elif action == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(WORDS))] = parent.pop(key)
        elif isinstance(value, bool):
            parent[key] = not value
        elif isinstance(value, int | float):
            parent[key] = value + draw(st.sampled_from([-1, 1, 0.5, 1e300]))
        elif isinstance(value, str):
            cut = draw(st.integers(0, len(value)))
            parent[key] = value[:cut] + draw(st.one_of(st.text(max_size=2), st.sampled_from(WORDS))) + value[cut + 1 :]
    return document


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    return _parent(document, path)[path[-1]]


@st.composite
def spoilt_bytes(draw: st.DrawFn, original: bytes, focus: int) -> bytes:
    """Flips, cuts and insertions; half of them in the first `focus` bytes."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        end = min(focus, len(data)) if draw(st.booleans()) else len(data)
        at = draw(st.integers(0, max(0, end - 1)))
        action = draw(st.sampled_from(["flip", "flip", "set", "insert", "delete", "cut", "zero", "append"]))
        if action == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "set":
            data[at : at + 8] = draw(st.binary(min_size=1, max_size=8))
        elif action == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif action == "delete":
            del data[at : at + draw(st.integers(1, 64))]
        elif action == "cut":
            del data[at:]
        elif action == "zero":
            data[at : at + 16] = bytes(16)
        else:
            data += draw(st.binary(min_size=1, max_size=16))
    return bytes(data)


def configs(original: bytes) -> st.SearchStrategy[bytes]:
    """Mutants of a config: mostly of its structure, some of its bytes."""
    structured = documents(json.loads(original)).map(lambda document: json.dumps(document).encode())
    return st.one_of(structured, structured, structured, spoilt_bytes(original, len(original)))


def files(original: bytes) -> st.SearchStrategy[bytes]:
    """Mutants of a safetensors file: of its header's structure, of the header's length, and of its bytes."""
    header, data = split(original)
    focus = len(original) - len(data)
    edited = documents(header).map(lambda document: join(document, data))
    lengths = st.one_of(st.integers(0, 2**64 - 1), st.integers(focus - 20, focus + 20))
    lied = lengths.map(lambda size: join(header, data, size))
    return st.one_of(edited, edited, spoilt_bytes(original, focus), spoilt_bytes(original, focus), lied)
