"""Closed-form fits for each family whose prompts stand in templates and behind masks: from the pipeline to the picture."""

import functools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffusers_erasure import Erasure, ErasureCompatibilityError, ErasureInputError, collateral, erase
from diffusers_erasure.encoding import row_sources
from diffusers_erasure.encoding.sources import reads_directly
from diffusers_erasure.families import FAMILIES as TABLE
from tests.helpers import ROUNDINGS, far, roundings
from tests.tiny_families import EXACT, apart, edit
from tests.tiny_texts import TOLD
from tests.tiny_transformers import PIPES, drawn


PROMPT = "a photo of a {} on mat"
# Each row of the word goes to that of the anchor, and what is kept stays: as sharp as the algebra allows.
SHARP: dict[str, Any] = {
    **{
        "anchors": "animal",
        "retain": ["animal", "dog", "a photo of a tree"],
        "retain_default": "none",
        "compare": False,
    },
    **{
        "absolute": True,
        "lamb": 1e-6,
        "push": 0.0,
        "retain_scale": 1e-3,
        "directions": 0,
        "layer": "text_map",
        "templates": "none",
    },
}
NO_GUIDANCE = {"qwen-image": {"true_cfg_scale": 1.0}}


@pytest.fixture(params=TOLD)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(autouse=True)
def nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ERASURE_CACHE", "off")


@functools.cache
def made(name: str) -> Any:
    """A pipeline that is not changed."""
    return TOLD[name].make()


def given(name: str, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that a pipeline gives its denoiser for a prompt [L, C], behind the norm, and which of them are read [L]."""
    told, pipe, calls = TOLD[name], made(name), list[dict[str, Any]]()
    handle = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    handle_args = pipe.transformer.register_forward_pre_hook(
        lambda _, args: calls.append({"positional": args}) if len(args) > 2 else None
    )
    more = NO_GUIDANCE.get(told.tiny.family, {"guidance_scale": 1.0})
    try:
        told.draw(pipe, prompt, **more)
    finally:
        handle.remove()
        handle_args.remove()
    row = TABLE[told.tiny.family]
    argument = {**calls[0], **calls[1]}.get(row.argument)
    text = calls[1]["positional"][2] if argument is None else argument  # Z-Image's stands third
    rows = text[0]
    mask = next((value for key, value in calls[0].items() if "mask" in key and value is not None), None)
    read = torch.ones(len(rows)) if mask is None else mask[0].flatten()[: len(rows)]
    with torch.no_grad():
        rows = rows if row.norm is None else pipe.transformer.get_submodule(row.norm)(rows)
    return rows.double(), (read > 0) & rows.any(1)


def mapped(erasure: Erasure) -> torch.Tensor:
    """D^T A, what a map adds to a row, [C, C]."""
    (layer,) = erasure.config.layers
    tensors = erasure.layer_tensors(layer)
    return tensors["D"].double().T @ tensors["A"].double()


def test_every_family_is_here() -> None:
    told = {each.tiny.family for each in TOLD.values()}
    assert told == {family.name for family in TABLE.values() if not reads_directly(family)}


def test_rows_are_those_that_the_denoiser_is_given(name: str) -> None:
    told = TOLD[name]
    (rows, read), (others, also) = given(name, PROMPT.format("cat")), given(name, PROMPT.format("dog"))
    assert torch.equal(read, also)
    differ = torch.nonzero(read & (rows != others).any(1)).flatten().tolist()
    (source,) = row_sources(made(name))
    prompt, other = PROMPT.format("cat"), PROMPT.format("dog")
    (found,), (last,) = source.all([prompt])
    # Each row that was found is one that the denoiser reads, in the same order.
    places, start = list[int](), 0
    for row in found:
        near = (rows[start:] - row).abs().amax(1) <= ROUNDINGS * torch.finfo(torch.float32).eps * row.abs().max()
        near &= read[start:]
        assert near.any()
        start += int(near.float().argmax()) + 1
        places.append(start - 1)
    if told.padded:
        assert len(rows) == 512 > len(found) and bool(read.all())
    else:
        assert places == torch.nonzero(read).flatten().tolist()
    word = differ[0] if told.causal else 4  # T5 has no start token
    ids = source.ids([prompt])[0]
    assert places[last] == word + 2  # "on mat"
    assert torch.equal(source.last([prompt])[0], found[last])
    # Tokens stand where their rows do: behind the last word stands the end of a template, or an end token.
    assert len(ids) - 1 - last == source.fed.suffix == told.tail
    assert [i for i, (a, b) in enumerate(zip(ids, source.ids([other])[0], strict=True)) if a != b] == [last - 2]
    # What follows on the word holds it, padding that is read too.
    assert (len(found) > len(ids)) == (name in ("FLUX.2 Klein", "Chroma"))
    assert set(places[last - 2 :]) <= set(differ)


def test_a_fit_acts_on_its_word_and_is_kept(name: str, tmp_path: Path) -> None:
    told = TOLD[name]
    texts = ("cat", "animal", "dog")
    base = {text: told.draw(made(name), text) for text in texts}
    erasure = erase(made(name), "cat", method="uce", **SHARP)
    assert [(layer.component, layer.sites) for layer in erasure.config.layers] == [
        ("transformer", (TABLE[told.tiny.family].input,))
    ]
    erasure.save_pretrained(tmp_path)
    pipe = told.make()
    pipe.load_erasure(tmp_path, "no-cat")
    now = {text: told.draw(pipe, text) for text in texts}
    # As the anchor, which stays, as does what is kept; and as a weight of the door that has the map in it.
    # Where padding is read some of it stands for all.
    effect, share = apart(base["cat"], base["animal"]), 0.2 if told.padded else 0.1
    assert effect > 20 * EXACT and apart(now["cat"], base["cat"]) > effect / 2
    assert apart(now["cat"], base["animal"]) < share * effect
    assert max(apart(now[text], base[text]) for text in ("animal", "dog")) < share * effect
    tensors = erasure.layer_tensors(erasure.config.layers[0])
    edited = edit(told.wide, told.make(), {erasure.config.layers[0].sites[0]: (tensors["A"], tensors["D"])})
    assert apart(told.draw(edited, "cat"), now["cat"]) < EXACT
    pipe.set_erasures("no-cat", 0.0)
    assert torch.equal(told.draw(pipe, "cat"), base["cat"])


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=[pytest.mark.slow] * (told.padded or method != "uce"))
        for name, told in TOLD.items()
        for method in ("uce", "rece", "speed", "dp", "oce")
    ],
)
def test_methods_fit_by_default(name: str, method: str) -> None:
    """With their own settings."""
    settings: dict[str, Any] = {"anchors": "animal", "retain": ["dog"], "retain_default": "none", "compare": False}
    told = TOLD[name]
    pipe = told.make()
    erasure = erase(pipe, "cat", method=method, **settings)
    assert set(erasure.config.diagnostics["completeness"]) == {"cat"}
    pipe.load_erasure(erasure, "no-cat")
    changed, other = (apart(told.draw(pipe, text), told.draw(made(name), text)) for text in ("cat", ""))
    # OCE reverses directions of what the door puts out, in which random encoders' template rows lie too, and UCE retains weakly there.
    assert changed > max(20 * EXACT, (1.0 if method in ("oce", "uce") else 1.5) * other)


@pytest.mark.parametrize("kind", PIPES)
def test_a_fit_acts_on_its_word_on_the_families_with_two_doors(kind: str, tmp_path: Path) -> None:
    """Stable Diffusion 3 and FLUX.1, of whose rows and pooled vector tests/test_doors_fit.py has the algebra."""
    pipe, texts = PIPES[kind](), ("cat", "house", "dog")
    base = {text: drawn(pipe, prompt=text) for text in texts}
    settings = {**SHARP, "anchors": "house", "retain": ["house", "dog"], "rows": "all", "max_sequence_length": 12}
    erase(pipe, "cat", **settings, method="uce").save_pretrained(tmp_path)
    pipe.load_erasure(tmp_path, "no-cat")
    now = {text: drawn(pipe, prompt=text) for text in texts}
    effect = far(base["cat"], base["house"])
    assert effect > 0.1 and far(now["cat"], base["cat"]) > effect / 2
    # Rows of CLIP and T5 are many for 56 coordinates.
    assert max(far(now["cat"], base["house"]), *(far(now[text], base[text]) for text in texts[1:])) < 0.2 * effect


@pytest.mark.parametrize(
    "name", ["SANA", "Lumina 2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("FLUX.2 Klein", "Wan"))]
)
def test_a_fit_needs_no_denoiser(name: str, tmp_path: Path) -> None:
    """What stands before the door is read from its files."""
    told = TOLD[name]
    pipe = told.make()
    pipe.save_pretrained(tmp_path)
    none = dict.fromkeys(part for part, value in pipe.components.items() if value is None)
    light = type(pipe).from_pretrained(tmp_path, **none, transformer=None)
    maps = [mapped(erase(each, "cat", **SHARP, method="uce")) for each in (pipe, light)]
    assert roundings(maps[1], maps[0]) <= ROUNDINGS


@pytest.mark.parametrize("name", ["FLUX.2", pytest.param("SANA", marks=pytest.mark.slow)])
def test_what_else_moved_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["dog", "mat", "on", "tree"]
    monkeypatch.setattr(collateral, "read_list", lambda _: words)
    found = erase(TOLD[name].make(), "cat", **{**SHARP, "compare": True}, method="uce").config.diagnostics[
        "collateral"
    ]
    assert found["words"] == len(words)


# -------------------------------------------------------------------------------------------- what cannot be fitted


@pytest.mark.parametrize("name", ["Qwen-Image", "SANA", "Lumina 2", "LTX-Video", "FLUX.2 Klein"])
def test_a_prompt_that_is_cut_is_refused(name: str) -> None:
    """What the pipeline puts around it counts; one that just fits is read whole."""
    pipe, prompt = made(name), "a photo of a cat"
    (source,) = row_sources(pipe)
    own = source.fed.of("").own
    (fits,) = row_sources(pipe, length=own + 5)
    assert len(fits.ids([prompt])[0]) == own + 5 and fits.too_long([prompt, prompt + " on"]) == {prompt + " on"}
    settings = {**SHARP, "retain": ["dog"]}
    with pytest.raises(ErasureInputError, match="longer than the text encoder reads"):
        erase(pipe, prompt, **settings, max_sequence_length=own + 4, method="uce")


def test_prompts_with_pictures_are_refused() -> None:
    """They are in the same rows."""
    pipe = made("Qwen-Image")
    edits = diffusers.QwenImageEditPipeline(**{**pipe.components, "processor": None})
    with pytest.raises(ErasureCompatibilityError, match="together with pictures.*Qwen-Image that draws from text"):
        erase(edits, "cat", **SHARP, method="uce")


def test_two_transformers_that_take_turns_are_refused() -> None:
    """Before anything is fitted: it could not be loaded."""
    pipe = TOLD["Wan"].make()
    pipe.register_modules(transformer_2=pipe.transformer)
    with pytest.raises(ErasureCompatibilityError, match="transformer_2"):
        erase(pipe, "cat", **SHARP, method="uce")


def test_a_missing_encoder_is_told(name: str) -> None:
    for part in ("text_encoder", "tokenizer"):
        pipe = TOLD[name].make()
        pipe.register_modules(**{part: None})
        with pytest.raises(ErasureCompatibilityError, match=f"needs the pipeline's {part}"):
            erase(pipe, "cat", **SHARP, method="uce")


def test_rows_that_are_cached_are_those_of_the_template(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pipeline with another system prompt makes other rows of a list, by the same encoder."""
    monkeypatch.setenv("DIFFUSERS_ERASURE_CACHE", str(tmp_path))
    pipe = TOLD["Lumina 2"].make()
    words = "cat animal dog photo of on mat tree".split()
    (source,) = row_sources(pipe)
    first = source.last(words)
    again = row_sources(pipe)[0].last(words)
    pipe.system_prompt = "animal photo"
    (other,) = row_sources(pipe)
    assert torch.equal(first, again)
    assert roundings(other.last(words), first) > 1000
    assert roundings(other.last(["dog"]), other.last(words)[2:3]) <= ROUNDINGS


def test_encoders_are_asked_once_in_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, asked = TOLD["Lumina 2"].make(), list[str]()
    encode = diffusers.Lumina2Pipeline.encode_prompt

    @functools.wraps(encode)
    def noted(self: Any, prompt: str, **arguments: Any) -> Any:
        found = encode(self, prompt, **arguments)
        asked.append(prompt)  # not where only the tokens were asked for
        return found

    monkeypatch.setattr(diffusers.Lumina2Pipeline, "encode_prompt", noted)
    erase(pipe, "cat", **SHARP, method="uce")
    assert sorted(asked) == sorted(set(asked))
