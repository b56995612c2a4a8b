"""Rows that did not go through an erased text encoder are refused, in every pipeline that shares it."""

import copy
import pickle
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)

from diffusers_erasure import Erasure, ErasureInactiveError, prompt_embeds_are_erased
from diffusers_erasure.live.prompt_guard import SEEN
from tests.helpers import (
    PROMPT,
    TEXT_SITES,
    UNET_SITES,
    assert_like,
    dense_edit,
    equal,
    images,
    random_erasure,
    roundings,
    rows_of,
    tiny_sd_pipe,
    tiny_sdxl_pipe,
)


Step = Callable[[Any], Any]
KNOWN, UNTRUSTED = "disabled or at strength 0", "prompt_embeds_are_erased"


@cache
def made() -> Erasure:
    return random_erasure(tiny_sd_pipe(), "lora", (*TEXT_SITES, *UNET_SITES[:2]), size=0.5)


def given(rows: torch.Tensor) -> dict[str, Any]:
    return {"prompt_embeds": rows, "negative_prompt_embeds": torch.zeros_like(rows)}


TWINS: dict[str, Step] = {
    "from_pipe": StableDiffusionImg2ImgPipeline.from_pipe,
    "components": lambda pipe: StableDiffusionPipeline(**pipe.components, requires_safety_checker=False),
    "one component": lambda pipe: StableDiffusionPipeline(
        **{**tiny_sd_pipe().components, "text_encoder": pipe.text_encoder}, requires_safety_checker=False
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("share", list(TWINS))
def test_pipelines_that_share_the_encoder(pipe: Any, share: str, when: str) -> None:
    rows = rows_of(pipe)
    if when == "before":
        twin = TWINS[share](pipe)
        pipe.load_erasure(made())
    else:
        pipe.load_erasure(made())
        twin = TWINS[share](pipe)
    for each in (pipe, twin):
        with pytest.raises(ErasureInactiveError, match=UNTRUSTED):
            each.encode_prompt(None, "cpu", 1, False, prompt_embeds=rows)
        with prompt_embeds_are_erased(each):
            assert equal(each.encode_prompt(None, "cpu", 1, False, prompt_embeds=rows)[0].numpy(), rows.numpy())
    assert equal(rows_of(twin).numpy(), rows_of(pipe).numpy()) and not equal(rows_of(pipe).numpy(), rows.numpy())
    with twin.erasures_disabled():
        unerased = rows_of(twin)
    with prompt_embeds_are_erased(pipe), pytest.raises(ErasureInactiveError, match=KNOWN):
        pipe.encode_prompt(None, "cpu", 1, False, prompt_embeds=unerased)
    pipe.unload_erasure()
    assert equal(twin.encode_prompt(None, "cpu", 1, False, prompt_embeds=rows)[0].numpy(), rows.numpy())


def test_an_acknowledged_draw_is_erased(pipe: Any) -> None:
    pipe.load_erasure(made())
    oracle = dense_edit(tiny_sd_pipe(), made())
    with prompt_embeds_are_erased(pipe):
        drawn = images(pipe, **given(rows_of(pipe)))
    assert_like(
        drawn, images(oracle, **given(rows_of(oracle))), images(tiny_sd_pipe(), **given(rows_of(tiny_sd_pipe())))
    )


def test_rows_that_were_encoded_without_it(pipe: Any) -> None:
    """Disabled and at strength 0, cast since, with other rows in the batch, and for guidance."""
    pipe.load_erasure(made())
    with pipe.erasures_disabled():
        disabled = rows_of(pipe)
        repeated, negative = pipe.encode_prompt("a cat", "cpu", 2, True)
    pipe.set_erasures("random", 0)
    weak = rows_of(pipe, "a dog")
    pipe.set_erasures("random", 1)
    erased = rows_of(pipe)
    refused = [disabled, weak, disabled.half(), disabled.bfloat16(), torch.cat([erased, disabled]), repeated, negative]
    with prompt_embeds_are_erased(pipe):
        for rows in refused:
            with pytest.raises(ErasureInactiveError, match=KNOWN):
                images(pipe, **given(rows))
        pipe.encode_prompt(None, "cpu", 1, False, prompt_embeds=erased)
        pipe.encode_prompt(None, "cpu", 1, False, prompt_embeds=disabled * 1.01)  # the user's own now
    with pipe.erasures_disabled():
        pipe.encode_prompt(None, "cpu", 1, False, prompt_embeds=erased)  # makes them no rows without the erasure
    twin = copy.deepcopy(pipe)
    with prompt_embeds_are_erased(twin):
        twin.encode_prompt(None, "cpu", 1, False, prompt_embeds=erased)
        with pytest.raises(ErasureInactiveError, match=KNOWN):
            twin.encode_prompt(None, "cpu", 1, False, prompt_embeds=disabled)


def test_each_erasure_remembers_for_itself(pipe: Any) -> None:
    pipe.load_erasure(made(), "one")
    pipe.load_erasure(random_erasure(tiny_sd_pipe(), "lora", TEXT_SITES, seed=1), "two")
    pipe.set_erasures("one", 0)
    without_one = rows_of(pipe)
    with prompt_embeds_are_erased(pipe):
        pipe.encode_prompt(None, "cpu", 1, False, prompt_embeds=without_one)
        pipe.set_erasures("one", 1)
        with pytest.raises(ErasureInactiveError, match="'one' was disabled"):
            pipe.encode_prompt(None, "cpu", 1, False, prompt_embeds=without_one)


def test_rows_that_are_the_same_with_it(pipe: Any) -> None:
    """Where the erased encoder gives the very same rows, they are erased rows."""
    still = random_erasure(tiny_sd_pipe(), "lora", TEXT_SITES, size=1e-30)
    pipe.load_erasure(still)
    with pipe.erasures_disabled():
        rows = rows_of(pipe)
    assert equal(rows_of(pipe).numpy(), rows.numpy())
    with prompt_embeds_are_erased(pipe):
        pipe.encode_prompt(None, "cpu", 1, False, prompt_embeds=rows)


def test_so_many_are_remembered(pipe: Any) -> None:
    pipe.load_erasure(made())
    with pipe.erasures_disabled():
        first, second = rows_of(pipe, "1"), rows_of(pipe, "2")
        pipe.encode_prompt([f"a {index}" for index in range(SEEN - 1)], "cpu", 1, False)
    with prompt_embeds_are_erased(pipe):
        pipe.encode_prompt(None, "cpu", 1, False, prompt_embeds=first)
        with pytest.raises(ErasureInactiveError, match=KNOWN):
            pipe.encode_prompt(None, "cpu", 1, False, prompt_embeds=second)


def test_two_encoders() -> None:
    pipe = tiny_sdxl_pipe()
    site = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
    pipe.load_erasure(random_erasure(pipe, "lora", (site,)))

    def encode(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows, _, pooled, _ = pipe.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False, **arguments)
        return rows, pooled

    with torch.no_grad(), pipe.erasures_disabled():
        (rows, pooled), (skipped, _) = encode(), encode(clip_skip=1)
    with torch.no_grad():
        erased, erased_pooled = encode()

    def give(rows: torch.Tensor, pooled: torch.Tensor) -> None:
        pipe.encode_prompt(
            None,
            device="cpu",
            do_classifier_free_guidance=False,
            prompt_embeds=rows,
            pooled_prompt_embeds=pooled,
        )

    with pytest.raises(ErasureInactiveError, match=r"text_encoder_2.*will not run"):
        give(erased, erased_pooled)
    with prompt_embeds_are_erased(pipe):
        give(erased, erased_pooled)
        for refused in ((rows, erased_pooled), (skipped, erased_pooled), (erased, pooled)):
            with pytest.raises(ErasureInactiveError, match=KNOWN):
                give(*refused)


# --------------------------------------------------------------------------------- pipelines of other kinds


def test_classes_that_come_later(pipe: Any) -> None:
    rows = rows_of(pipe)
    pipe.load_erasure(made())

    class OwnFunction(StableDiffusionPipeline):
        def encode_prompt(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            """Weighs, as users' subclasses do, and hands its own rows on."""
            if kwargs.get("prompt_embeds") is None:
                kwargs["prompt_embeds"] = super().encode_prompt(prompt, *args, **kwargs)[0] * 1.1
            return super().encode_prompt(prompt, *args, **kwargs)

    later = OwnFunction(**pipe.components, requires_safety_checker=False)
    assert roundings(rows_of(later), rows_of(pipe) * 1.1) <= 1
    with pytest.raises(ErasureInactiveError, match=UNTRUSTED):
        later.encode_prompt(PROMPT, "cpu", 1, False, prompt_embeds=rows)


@pytest.mark.parametrize("name", ["editing_prompt_embeddings", "editing_prompt_embeds", "prompt_embeddings_2"])
def test_rows_of_other_names(pipe: Any, name: str) -> None:
    """LEdits++ takes rows of what is edited."""

    class Edits(StableDiffusionPipeline):
        def encode_prompt(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            rows = kwargs.pop(name, None)
            return super().encode_prompt(prompt, *args, **kwargs) if rows is None else rows

    own = Edits(**pipe.components, requires_safety_checker=False)
    rows = rows_of(pipe)
    pipe.load_erasure(made())
    with torch.no_grad():
        own.encode_prompt(PROMPT, "cpu", 1, False, **{name: None})
    with pytest.raises(ErasureInactiveError, match=UNTRUSTED):
        own.encode_prompt(PROMPT, "cpu", 1, False, **{name: rows})


def test_the_former_name(pipe: Any) -> None:
    """InstructPix2Pix has nothing but `_encode_prompt`; elsewhere it calls the other, and the check is made once."""
    rows = rows_of(pipe)
    edits = StableDiffusionInstructPix2PixPipeline(**pipe.components, requires_safety_checker=False)
    edits.load_erasure(made())
    for each in (edits, pipe):
        with pytest.raises(ErasureInactiveError, match=UNTRUSTED):
            each._encode_prompt(None, "cpu", 1, False, prompt_embeds=rows)
    with torch.no_grad():
        assert roundings(edits._encode_prompt(PROMPT, "cpu", 1, False), rows_of(pipe)) == 0


def test_without_an_encoder(pipe: Any) -> None:
    """The encoder is taken off once the rows are there, to save memory: the denoiser still tells of the erasure."""
    pipe.load_erasure(made())
    erased, encoder = rows_of(pipe), pipe.text_encoder
    with pipe.erasures_disabled():
        unerased = rows_of(pipe)
    pipe.text_encoder = None
    with pytest.raises(ErasureInactiveError, match=UNTRUSTED):
        images(pipe, **given(erased))
    with prompt_embeds_are_erased(pipe):
        images(pipe, **given(erased))
        with pytest.raises(ErasureInactiveError, match=KNOWN):
            images(pipe, **given(unerased))
    pipe.text_encoder = tiny_sd_pipe().text_encoder
    with pytest.raises(ErasureInactiveError, match="'text_encoder' is another one"):
        images(pipe)
    pipe.text_encoder = encoder
    images(pipe)


def test_unpickled_where_no_erasure_was_loaded(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(pipe)
    pipe.load_erasure(made())
    with prompt_embeds_are_erased(pipe):
        data = pickle.dumps(pipe)
    plain = StableDiffusionPipeline.encode_prompt.__wrapped__
    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", plain)  # as in another process
    images(pipe, **given(rows))
    with pytest.raises(ErasureInactiveError, match=UNTRUSTED):
        images(pickle.loads(data), **given(rows))


def test_pipelines_are_not_kept_alive(pipe: Any) -> None:
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.load_erasure(made())
    rows_of(other)
    held = weakref.ref(other)
    del other
    assert held() is None
    with pytest.raises(ErasureInactiveError, match=UNTRUSTED):
        images(pipe, **given(rows_of(tiny_sd_pipe())))
