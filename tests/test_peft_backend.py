"""`backend="peft"`: an adapter under the user's `set_adapters`, which the guard does not let be switched off."""

import copy
import logging
import re
from typing import Any

import peft
import pytest
import transformers

from diffusers_erasure import Erasure, ErasureCompatibilityError, ErasureError, ErasureInactiveError, ErasureInputError
from tests.helpers import (
    CONV_SITES,
    ROUNDINGS,
    TEXT_SITES,
    UNET_SITES,
    assert_like,
    base_images,
    cast_to_float8,
    dense_edit,
    equal,
    images,
    load_style,
    random_erasure,
    roundings,
    style_lora,
    tiny_sd_pipe,
    unchanged_by,
)


SITES = UNET_SITES + CONV_SITES[:2] + TEXT_SITES[1:]


@pytest.fixture
def erasure() -> Erasure:
    return random_erasure(tiny_sd_pipe(), "lora", SITES, size=0.5)


def with_style(erasure: Erasure | None = None) -> Any:
    pipe = tiny_sd_pipe() if erasure is None else dense_edit(tiny_sd_pipe(), erasure)
    load_style(pipe)
    return pipe


def test_it_acts_and_goes(erasure: Erasure, pipe: Any) -> None:
    base = images(pipe)
    info = pipe.load_erasure(erasure, "no", strength=0.8, backend="peft")
    assert info.backend == "peft" and pipe.list_erasures() == [info]
    assert "no" in pipe.get_active_adapters()
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), (erasure, 0.8))), base)
    pipe.set_erasures("no", 0.5)
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), (erasure, 0.5))), base)
    with pipe.erasures_disabled():
        assert equal(images(pipe), base)
    twin = copy.deepcopy(pipe)
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), (erasure, 0.5))), base)
    pipe.unload_erasure("no")
    assert equal(images(pipe), base)
    assert pipe.list_erasures() == [] and pipe.get_active_adapters() == []
    assert not any(hasattr(module, "base_layer") for module in pipe.unet.modules())
    assert_like(images(twin), images(dense_edit(tiny_sd_pipe(), (erasure, 0.5))), base)


SWITCHED_OFF = {
    "another LoRA": load_style,
    "set_adapters": lambda pipe: (load_style(pipe), pipe.set_adapters("style")),
    "weight 0": lambda pipe: (load_style(pipe), pipe.set_adapters(["style", "no"], [1.0, 0.0])),
}


@pytest.mark.parametrize("step", list(SWITCHED_OFF))
def test_reactivated_with_one_warning(
    erasure: Erasure, pipe: Any, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "diffusers_erasure")
    pipe.load_erasure(erasure, "no", backend="peft")
    SWITCHED_OFF[step](pipe)
    drawn = images(pipe)
    assert_like(drawn, images(with_style(erasure)), images(with_style()))
    pipe.set_adapters("style")
    assert equal(images(pipe), drawn)
    assert sum("switched off" in record.message for record in caplog.records) <= 2  # one a component
    assert any("switched off" in record.message for record in caplog.records)


def test_disabled_loras_stay_off(erasure: Erasure, pipe: Any) -> None:
    load_style(pipe)
    pipe.load_erasure(erasure, "no", backend="peft")
    both = images(pipe)
    assert_like(both, images(with_style(erasure)), images(with_style()))  # the style stayed active
    pipe.disable_lora()
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), erasure)), base_images())
    pipe.unload_erasure("no")
    assert equal(images(pipe), base_images())  # by itself peft would make the style active where the erasure was
    pipe.enable_lora()
    assert roundings(images(pipe), images(with_style())) <= ROUNDINGS


def test_loras_enabled_since_stay_on(erasure: Erasure, pipe: Any) -> None:
    load_style(pipe)
    pipe.load_erasure(erasure, "no", backend="peft")
    pipe.disable_lora()
    images(pipe)
    pipe.enable_lora()
    pipe.unload_erasure("no")
    assert roundings(images(pipe), images(with_style())) <= ROUNDINGS


def test_the_user_sets_the_weight(erasure: Erasure, pipe: Any) -> None:
    pipe.load_erasure(erasure, "no", backend="peft")
    pipe.set_adapters(["no"], [0.5])
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), (erasure, 0.5))), base_images())


@pytest.mark.parametrize("step", list(SWITCHED_OFF))
def test_policy_error(erasure: Erasure, pipe: Any, step: str) -> None:
    pipe.load_erasure(erasure, "no", backend="peft", peft_guard="error")
    SWITCHED_OFF[step](pipe)
    with pytest.raises(ErasureInactiveError, match="set_adapters"):
        images(pipe)
    pipe.set_adapters(["style", "no"])
    assert_like(images(pipe), images(with_style(erasure)), images(with_style()))


@pytest.mark.parametrize("policy", ["reactivate", "error"])
def test_gone_or_scaled(erasure: Erasure, pipe: Any, policy: Any) -> None:
    pipe.load_erasure(erasure, "no", backend="peft", peft_guard=policy)
    with pytest.raises(ErasureInactiveError, match="scale"):
        images(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.unload_lora_weights()
    with pytest.raises(ErasureInactiveError, match="gone"):
        images(pipe)
    pipe.unload_erasure("no")
    assert equal(images(pipe), base_images())


def test_fused_by_diffusers(erasure: Erasure, pipe: Any) -> None:
    pipe.load_erasure(erasure, "no", backend="peft")
    pipe.fuse_lora()
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), erasure)), base_images())
    for action in (pipe.unload_erasure, lambda: pipe.set_erasures("no", 0.5), pipe.erasures_disabled().__enter__):
        with pytest.raises(ErasureError, match="unfuse_lora"):
            action()
    pipe.unfuse_lora()
    pipe.unload_erasure()
    assert roundings(images(pipe), base_images()) <= ROUNDINGS


@pytest.mark.parametrize("policy", ["reactivate", "error"])
def test_others_fused_by_diffusers(erasure: Erasure, pipe: Any, policy: Any) -> None:
    pipe.load_erasure(erasure, "no", backend="peft", peft_guard=policy)
    pipe.load_lora_weights(style_lora(tiny_sd_pipe(), endings=("attn2.to_k",)), adapter_name="style")
    pipe.set_adapters(["style", "no"])
    pipe.fuse_lora(adapter_names=["style"])
    with pytest.raises(ErasureInactiveError):
        images(pipe)
    pipe.unfuse_lora()
    pipe.set_adapters(["style", "no"])
    images(pipe)


def test_refused(erasure: Erasure, pipe: Any) -> None:
    base = images(pipe)
    with pytest.raises(ErasureInputError, match="text_map"):
        pipe.load_erasure(random_erasure(pipe, "text_map"), backend="peft")
    load_style(pipe)
    with pytest.raises(ErasureInputError, match="loaded already"):
        pipe.load_erasure(erasure, "style", backend="peft")
    assert equal(images(pipe), images(with_style()))
    pipe.load_erasure(erasure, "no", backend="peft")
    with pytest.raises(ErasureInputError, match="peft fuses"):
        pipe.fuse_erasures()
    pipe.unload_erasure()
    pipe.unload_lora_weights()
    assert equal(images(pipe), base)


def test_versions_that_refuse_adapters_are_named(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24 wants peft 0.22 for its own models; the UNet, which is diffusers', and hooks want nothing."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    on_text = random_erasure(tiny_sd_pipe(), "lora", TEXT_SITES, size=0.5)
    message = (
        f"transformers {re.escape(transformers.__version__)} wants peft 99.0.* peft {re.escape(peft.__version__)} is"
    )
    with pytest.raises(ErasureCompatibilityError, match=message):
        unchanged_by(pipe, lambda: pipe.load_erasure(on_text, "no", backend="peft"))
    assert pipe.list_erasures() == []
    pipe.load_erasure(random_erasure(tiny_sd_pipe(), "lora", UNET_SITES, size=0.5), "unet", backend="peft")
    pipe.load_erasure(on_text, "hooks")
    assert [item.backend for item in pipe.list_erasures()] == ["peft", "hook"]


def test_what_diffusers_cannot_load(pipe: Any) -> None:
    """A LoRA on nothing but a text encoder's feed-forward is refused in words, and so is one on weights in float8."""
    erasure = random_erasure(tiny_sd_pipe(), "lora", (*UNET_SITES, *TEXT_SITES[:1]))
    with pytest.raises(ErasureCompatibilityError, match="diffusers could not load"):
        unchanged_by(pipe, lambda: pipe.load_erasure(erasure, backend="peft"))
    cast_to_float8(pipe)
    with pytest.raises(ErasureCompatibilityError, match="float8"):
        pipe.load_erasure(random_erasure(tiny_sd_pipe(), "lora", UNET_SITES), backend="peft", strict_base="ignore")
    assert pipe.list_erasures() == []
