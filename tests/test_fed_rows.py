"""Rows of families whose prompts stand in templates and behind masks, against what their pipelines' own functions give."""

import functools
from typing import Any

import diffusers
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffusers_erasure import ErasureInputError, erase
from diffusers_erasure.encoding import row_sources
from tests.helpers import ROUNDINGS, roundings
from tests.tiny_families import FAMILIES


WIDTH = 20
WORDS = "a cat animal dog photo of on mat user assistant".split()
COMMON: dict[str, Any] = {
    **{"anchors": "animal", "retain": ["dog"], "retain_default": "none", "templates": "none", "compare": False},
    **{"absolute": True, "lamb": 1e-3, "retain_scale": 0.0, "layer": "text_map"},
}
TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}assistant"


@pytest.fixture(autouse=True)
def nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ERASURE_CACHE", "off")


def with_t5(name: str) -> Any:
    pipe = FAMILIES[name].make()
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [("▁" + word, -3.0) for word in WORDS]
    vocabulary += [(letter, -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, additional_special_tokens=[], eos_token="</s>")
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.register_modules(tokenizer=tokenizer, text_encoder=T5EncoderModel(config).eval())
    return pipe


def z_image() -> Any:
    """With a causal language model that reads a chat, of which the end follows each prompt."""
    pipe = FAMILIES["Z-Image"].make()
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    config = Qwen3Config(
        **{"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.5},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.register_modules(tokenizer=tokenizer, text_encoder=Qwen3Model(config).eval())
    return pipe


def mapped(erasure: Any) -> torch.Tensor:
    tensors = erasure.layer_tensors(erasure.config.layers[0])
    return tensors["D"].double().T @ tensors["A"].double()


@pytest.mark.parametrize("name", ["PixArt-Σ", "AuraFlow"])
def test_rows_behind_a_mask_are_left_out(name: str) -> None:
    pipe = with_t5(name)
    with torch.no_grad():
        rows, mask, *_ = pipe.encode_prompt("a photo of a cat", do_classifier_free_guidance=False)
    on = mask.reshape(*rows.shape[:2], -1)[..., 0]  # AuraFlow's is as wide as its rows
    assert int(on.sum()) == 6 < rows.shape[1]  # five words and the end token
    (source,) = row_sources(pipe)
    (found,), last = source.all(["a photo of a cat"])
    assert roundings(found, rows[0, :6].double()) <= ROUNDINGS and last == [4]
    assert roundings(source.last(["a photo of a cat", "cat"])[0], rows[0, 4].double()) <= ROUNDINGS
    assert len(source.null()) == 1
    erasure = erase(pipe, "cat", **COMMON, directions=0, push=0.0)
    assert [(layer.component, layer.sites) for layer in erasure.config.layers] == [
        ("transformer", ("encoder_hidden_states",))
    ]
    target, anchor = source.last(["cat", "animal"])
    assert float((target + mapped(erasure) @ target - anchor).norm()) < 0.1 * float((target - anchor).norm())
    with pytest.raises(ErasureInputError, match="longer than the text encoder reads"):
        erase(pipe, "a photo of a cat", **COMMON, max_sequence_length=3, method="uce")


def test_rows_of_a_chat_stand_behind_the_denoisers_norm() -> None:
    pipe = z_image()
    with torch.no_grad():
        (rows,), _ = pipe.encode_prompt("a cat", do_classifier_free_guidance=False)
        expected = pipe.transformer.cap_embedder[0](rows).double()
    (source,) = row_sources(pipe)
    (found,), last = source.all(["a cat"])
    assert len(found) == 4 and last == [2]  # user, a, cat, assistant
    assert roundings(found, expected) <= ROUNDINGS
    assert roundings(source.last(["a cat"]), expected[2:3]) <= ROUNDINGS
    erasure = erase(pipe, "cat", **COMMON, directions=0)
    assert erasure.config.layers[0].sites == ("door_input",)
    # What follows the word, the end of the chat, holds it too, and goes along.
    (target, anchor), _ = source.all(["cat", "animal"])
    way = anchor[1:] - target[1:]
    share = ((target[1:] @ mapped(erasure).T) * way).sum(1) / way.square().sum(1)
    assert float(way.norm(dim=1).min()) > 0.1 and float(share.min()) > 0.9


def test_what_a_call_gives_by_default_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SANA's instruction before each prompt, on which the rows depend."""
    pipe, given = with_t5("PixArt-Σ"), []
    encode = diffusers.PixArtSigmaPipeline.encode_prompt

    @functools.wraps(encode)
    def noted(self: Any, prompt: str, **arguments: Any) -> Any:
        given.append(arguments)
        return encode(self, prompt, **arguments)

    monkeypatch.setattr(diffusers.PixArtSigmaPipeline, "encode_prompt", noted)
    (source,) = row_sources(pipe, length=9)
    source.last(["cat"])
    assert given[0]["max_sequence_length"] == 9 and given[0]["do_classifier_free_guidance"] is False
