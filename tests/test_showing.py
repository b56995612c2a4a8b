"""A bare erasure in a terminal or a notebook: what it removes and how, on a screen, escaped, without hashes."""

import dataclasses
import html
import re

import pytest

from diffusers_erasure import Erasure, with_schedule
from diffusers_erasure.schema import Concept
from tests.helpers import random_erasure, tiny_sd_pipe


HOSTILE = "<script>alert('x')</script>\n\x1b[31m\u202eevil & \"co\""


@pytest.fixture(scope="module")
def erasure() -> Erasure:
    return random_erasure(tiny_sd_pipe(), "lora", concepts=(Concept("zebra", "horse"), Concept("gnu", "")))


def is_a_screen(text: str) -> bool:
    """24 lines of at most 120 characters, but for the names of the concepts, which may wrap."""
    lines = text.splitlines()
    return len(lines) <= 24 and all(len(line) <= 120 for line in lines if "removes" not in line) and len(text) < 2400


def test_what_is_shown(erasure: Erasure) -> None:
    text = repr(erasure)
    for part in (
        "zebra → horse, gnu → (empty prompt)",
        "random",
        "a local model (stable-diffusion)",
        "lora on unet (6 sites)",
    ):
        assert part in text
    size = sum(tensor.numel() * 4 for tensor in erasure.tensors["pytorch_lora_weights.safetensors"].values())
    assert f"pytorch_lora_weights.safetensors  {size / 1e3:.1f} kB" in text
    assert is_a_screen(text) and "read from" not in text


def test_nothing_that_identifies_by_numbers(erasure: Erasure) -> None:
    """Neither fingerprints nor hashes, in any of the forms."""
    saved = Erasure.from_files(erasure.to_files(), source="user/no-zebra")
    saved.revision = "0123456789abcdef" * 3
    assert "user/no-zebra" in repr(saved)
    for thing in (saved, saved.config, saved.config.base_model, saved.config.base_model.components["unet"]):
        assert not re.search(r"[0-9a-f]{16}|[A-Za-z0-9+/]{40}", repr(thing)), repr(thing)
        assert len(repr(thing)) < 400
    assert "unet: UNet2DConditionModel" in repr(saved.config.base_model)
    assert repr(dataclasses.replace(saved.config.base_model, components={})).endswith("components unknown>")


def test_a_configuration_shows_the_same_but_its_tensors(erasure: Erasure) -> None:
    plain, saved = erasure.config, Erasure.from_files(erasure.to_files()).config
    assert "zebra → horse" in repr(plain) and "safetensors" not in repr(plain)
    assert "pytorch_lora_weights.safetensors" in repr(saved) and repr(saved).startswith("ErasureConfig\n")
    assert "zebra → horse" in saved._repr_html_()


def test_what_is_modified_hidden_and_rescaled(erasure: Erasure) -> None:
    assert "lora on unet (6 sites, by timestep)" in repr(with_schedule(erasure, [0.5, 1.0]))
    assert "2 concepts, not named" in repr(erasure.redacted()) and "zebra" not in repr(erasure.redacted())
    assert "0.5 of the original" in repr(erasure.rescaled(0.5))
    nameless = dataclasses.replace(erasure.config, concepts=())
    assert "not stated" in repr(nameless)


def test_many_concepts_and_layers_fit(erasure: Erasure) -> None:
    (layer,) = erasure.config.layers
    layers = tuple(dataclasses.replace(layer, prefix=f"p{i}.") for i in range(64))
    concepts = tuple(Concept("a very long name " * 50 + str(i), "b" * 900) for i in range(1000))
    config = dataclasses.replace(erasure.config, layers=layers, concepts=concepts)
    assert is_a_screen(repr(config)) and "and 60 more layers" in repr(config) and "and 995 more" in repr(config)


def test_a_hostile_name_is_shown_as_text() -> None:
    erasure = random_erasure(tiny_sd_pipe(), concepts=(Concept(HOSTILE, HOSTILE),))
    erasure.source = HOSTILE
    for page in (erasure._repr_html_(), erasure.config._repr_html_()):
        assert "<script" not in page and "&lt;script&gt;alert(" in page
        tags = set(re.findall(r"<[^>]*>", page))
        assert tags <= {f"<{end}{tag}>" for tag in ("table", "caption", "tr", "th", "td") for end in ("", "/")}
        assert html.unescape(page).isprintable()
    assert all(line.isprintable() for line in repr(erasure).split("\n"))
    assert len(repr(erasure).split("\n")) == 7
