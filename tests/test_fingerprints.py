"""Fingerprints: as the format says, also those of older artefacts; and what is kept of a tokenizer is never another one's."""

import base64
import copy
import dataclasses
import gc
import hashlib
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.models import BPE
from torch import nn
from transformers import CLIPTokenizer

from diffusers_erasure import ErasureCompatibilityError, demo, fingerprints
from diffusers_erasure.fingerprints import compare_component, describe_model, describe_tokenizer
from diffusers_erasure.schema import CONFIG_FILE, Component, ErasureConfig
from tests.helpers import TOKENIZER, random_erasure, tiny_sd_pipe


OLD = Path(__file__).parent / "data" / "schema_1_0"
TEXT = ("text_encoder", "tokenizer")


@pytest.fixture
def tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def as_before(component: Component) -> Component:
    """As it was recorded before tokenizers had a second hash."""
    return dataclasses.replace(component, serialised=None)


def refuses(stored: Component, tokenizer: Any) -> bool:
    """Whether a tokenizer is refused, whichever of the two hashes was recorded; both must say the same."""
    found = []
    for each in (stored, as_before(stored)):
        try:
            found.append(compare_component("tokenizer", each, tokenizer) != "same")
        except ErasureCompatibilityError as error:
            assert "vocabulary" in str(error)
            found.append(True)
    assert found[0] == found[1]
    return found[0]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows each time a tokenizer's vocabulary is read whole."""
    calls: list[int] = []
    read = fingerprints._in_order

    def in_order(tokenizer: Any) -> tuple[list[str], list[int]]:
        calls.append(1)
        return read(tokenizer)

    monkeypatch.setattr(fingerprints, "_in_order", in_order)
    return calls


# ------------------------------------------------------------------------------------------------- as the format says


@pytest.mark.parametrize("odd", ["", " ", "a piece of several words"], ids=["none", "a space", "spaces"])
@pytest.mark.parametrize("first", [0, 7], ids=["without gaps", "from another number"])
def test_a_vocabulary_is_hashed_as_the_format_says(odd: str, first: int) -> None:
    pieces = ["b", "a</w>", "é", "Ġ</w>", "猫</w>", '"', "\\", ",", "\\u0020", "\n", "\x7f", "🐈"]
    pieces += [odd] * bool(odd) + ["<|startoftext|>", "<|endoftext|>"]
    ids = {piece: first + i for i, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=ids, merges=[])
    tokens = sorted(pieces[:-2])  # the last two are added tokens too
    assert set(tokenizer.get_added_vocab()) == set(pieces[-2:])
    text = json.dumps([tokens, [ids[token] for token in tokens]])
    assert describe_tokenizer(tokenizer).architecture == hashlib.sha256(text.encode()).hexdigest()


def test_values_are_sampled_as_the_format_says() -> None:
    """Dtypes side by side, sizes that occur twice, and an embedding that is longer than what is read of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(6, 5), nn.Conv2d(2, 3, 3))
    model[1].to(torch.bfloat16)
    model[4].to(torch.float16)
    named = sorted(model.named_parameters(), key=lambda item: item[0])
    k = 4096 // len(named)
    lines, expected = ["Sequential"], []
    for name, parameter in named:
        flat = parameter.detach()[:256].float().reshape(-1)
        expected += [float(flat[(2 * j + 1) * len(flat) // (2 * k)]) for j in range(k)]
        lines.append(f"{name} {['*', 6] if name == '0.weight' else list(parameter.shape)}")
    found = describe_model(model)
    assert found.architecture == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert np.array_equal(np.frombuffer(base64.b64decode(found.values or ""), "<f4"), np.float32(expected))
    assert found.dtype == "bfloat16" and found.serialised is None


@pytest.mark.parametrize("name", ["lora", "text_map"])
def test_fingerprints_of_older_artefacts_are_those_of_today(name: str) -> None:
    """In the form of before schema 1.1; values of the embedded model, which any other way of taking them would change."""
    components = ErasureConfig.from_json((OLD / name / CONFIG_FILE).read_bytes()).base_model.components
    assert set(components) == {"unet", *TEXT} and all(each.serialised is None for each in components.values())
    pipe = demo.load_pipeline()
    for part, stored in components.items():
        live = getattr(pipe, part)
        now = describe_model(live) if isinstance(live, nn.Module) else describe_tokenizer(live)
        assert (now.architecture, now.values, now.dtype) == (stored.architecture, stored.values, stored.dtype)
        assert compare_component(part, stored, live) == "same"


# ----------------------------------------------------------------------------------------------- a tokenizer's two hashes


def test_a_vocabulary_that_is_known_is_not_read(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, other = describe_tokenizer(tokenizer), CLIPTokenizer.from_pretrained(TOKENIZER)
    calls = counted(monkeypatch)
    assert compare_component("tokenizer", stored, other) == "same" and not calls
    assert compare_component("tokenizer", as_before(stored), other) == "same" and len(calls) == 1


def test_another_form_of_the_same_vocabulary_is_accepted(tokenizer: Any) -> None:
    """As another version of `tokenizers` may write it; and one with other merges, which no artefact has recorded."""
    stored = dataclasses.replace(describe_tokenizer(tokenizer), serialised="0" * 64)
    assert compare_component("tokenizer", stored, tokenizer) == "same"
    stored = describe_tokenizer(tokenizer)
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if i < tokenizer.vocab_size}
    other = CLIPTokenizer(vocab=vocabulary, merges=[])
    assert describe_tokenizer(other).serialised != stored.serialised
    assert not refuses(stored, other)


def test_a_tokenizer_without_a_backend_is_read() -> None:
    class Plain:
        words = {"a": 0, "b": 1, "<new>": 2}

        def get_vocab(self) -> dict[str, int]:
            return dict(self.words)

        def get_added_vocab(self) -> dict[str, int]:
            return {"<new>": 2}

    plain = Plain()
    stored = describe_tokenizer(plain)
    assert stored.serialised is None
    assert stored.architecture == hashlib.sha256(json.dumps([["a", "b"], [0, 1]]).encode()).hexdigest()
    assert compare_component("tokenizer", stored, plain) == "same"
    plain.words = {"a": 1, "b": 0, "<new>": 2}
    assert refuses(stored, plain)


# ------------------------------------------------------------------------------------------- what is kept goes stale nowhere


def test_a_vocabulary_is_read_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    stored = describe_tokenizer(tokenizer)
    assert describe_tokenizer(tokenizer) == stored and not refuses(stored, tokenizer) and len(calls) == 1
    tokenizer.add_tokens(["<toy>", "<hat>"])  # as a textual inversion does
    tokenizer(["a cat", "dog"], padding="max_length", truncation=True)
    assert describe_tokenizer(tokenizer) == stored and not refuses(stored, tokenizer) and len(calls) == 1


def a_token_that_is_there(tokenizer: Any) -> None:
    assert "cat</w>" in tokenizer.get_vocab()
    tokenizer.add_tokens(["cat</w>"])


def swapped(tokenizer: Any) -> dict[str, int]:
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if i < tokenizer.vocab_size}
    vocabulary["cat</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["cat</w>"]
    return vocabulary


def another_model(tokenizer: Any) -> None:
    """Of the same size, in the same tokenizer."""
    tokenizer.backend_tokenizer.model = BPE(vocab=swapped(tokenizer), merges=[], end_of_word_suffix="</w>")


def a_larger_model(tokenizer: Any) -> None:
    vocabulary = {**tokenizer.get_vocab(), "zzz</w>": len(tokenizer)}
    tokenizer.backend_tokenizer.model = BPE(vocab=vocabulary, merges=[], end_of_word_suffix="</w>")


@pytest.mark.parametrize("change", [a_token_that_is_there, another_model, a_larger_model])
def test_a_change_of_the_vocabulary_is_noticed(tokenizer: Any, change: Callable[[Any], None]) -> None:
    stored = describe_tokenizer(tokenizer)
    assert not refuses(stored, tokenizer)
    change(tokenizer)
    assert refuses(stored, tokenizer)
    now = describe_tokenizer(tokenizer)
    assert now.architecture != stored.architecture and now.serialised != stored.serialised
    assert not refuses(now, tokenizer)


def test_another_tokenizer_of_the_same_name_is_noticed(tokenizer: Any) -> None:
    pipe = tiny_sd_pipe()
    erasure = random_erasure(pipe, "text_map", derived_from=TEXT)
    pipe.load_erasure(erasure, "it", strict_base="error")
    pipe.unload_erasure("it")
    other = CLIPTokenizer(vocab=swapped(tokenizer), merges=[], model_max_length=tokenizer.model_max_length)
    other.name_or_path = pipe.tokenizer.name_or_path
    pipe.tokenizer = other
    with pytest.raises(ErasureCompatibilityError, match=r"tokenizer.*vocabulary"):
        pipe.load_erasure(erasure)
    pipe.tokenizer = copy.deepcopy(tokenizer)
    assert pipe.load_erasure(erasure, strict_base="error").base_match["tokenizer"] == "same"


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.5)


def through_data(weight: nn.Parameter) -> None:
    weight.data += 0.1  # which no version counter of PyTorch tells


@pytest.mark.parametrize("change", [in_place, through_data])
def test_a_changed_weight_is_noticed(change: Callable[[nn.Parameter], None]) -> None:
    pipe = tiny_sd_pipe()
    erasure = random_erasure(pipe, "text_map")
    assert set(pipe.load_erasure(erasure, "it").base_match.values()) == {"same"}
    pipe.unload_erasure("it")
    change(pipe.unet.mid_block.attentions[0].proj_in.weight)
    assert pipe.load_erasure(erasure, strict_base="ignore").base_match["unet"] == "different weights"


def test_other_weights_in_the_same_model_are_noticed() -> None:
    pipe = tiny_sd_pipe()
    erasure = random_erasure(pipe, "text_map")
    before = copy.deepcopy(pipe.text_encoder.state_dict())
    for state, match in ((tiny_sd_pipe(text_seed=9).text_encoder.state_dict(), "different weights"), (before, "same")):
        pipe.text_encoder.load_state_dict(state)
        assert pipe.load_erasure(erasure, "it", strict_base="ignore").base_match["text_encoder"] == match
        pipe.unload_erasure("it")


def test_nothing_is_kept_alive(tokenizer: Any) -> None:
    describe_tokenizer(tokenizer)
    other = CLIPTokenizer.from_pretrained(TOKENIZER)
    describe_tokenizer(other)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
