"""A base that reads other channels beside the latents (inpainting's 9, depth's 5) is another weight, not another model."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from torch import nn

from diffusers_erasure import ErasureCompatibilityError, ErasureInputError, erase
from tests.helpers import (
    CONV_SITES,
    TEXT_SITES,
    UNET_SITES,
    assert_like,
    base_images,
    dense_edit,
    equal,
    images,
    random_erasure,
    tiny_sd_pipe,
)


SITES = UNET_SITES + CONV_SITES[1:] + TEXT_SITES[:1]


def with_channels(channels: int) -> Any:
    """`tiny_sd_pipe`, reading more channels: the first four with its own weights, as such models are made."""
    pipe = tiny_sd_pipe()
    former = pipe.unet.conv_in
    wider = nn.Conv2d(channels, former.out_channels, 3, padding=1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        wider.weight.normal_(std=0.2)
        wider.weight[:, :4] = former.weight
        wider.bias.copy_(former.bias)
    pipe.unet.conv_in = wider
    pipe.unet.register_to_config(in_channels=channels)
    return pipe


def inpainting(pipe: Any) -> Any:
    result = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    result.set_progress_bar_config(disable=True)
    return result


def inpainted(pipe: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    picture, mask = torch.rand(1, 3, 16, 16, generator=generator), torch.zeros(1, 1, 16, 16)
    mask[..., 4:] = 1
    return images(pipe, image=picture, mask_image=mask, strength=1.0, height=16, width=16)


@pytest.mark.parametrize("backend", ["hook", "merge"])
def test_inpainting_draws_erased(backend: Any, caplog: pytest.LogCaptureFixture) -> None:
    erasure = random_erasure(tiny_sd_pipe(), "lora", SITES, size=0.5)
    pipe = inpainting(with_channels(9))
    base = inpainted(pipe)
    with caplog.at_level("WARNING", logger="diffusers_erasure"):
        info = pipe.load_erasure(erasure, backend=backend)
    assert info.base_match == {"unet": "different weights", "text_encoder": "same", "tokenizer": "same"}
    assert "input channels" in caplog.text
    assert_like(inpainted(pipe), inpainted(dense_edit(inpainting(with_channels(9)), erasure)), base)
    pipe.unload_erasure()
    assert equal(inpainted(pipe), base)


def test_made_on_inpainting(pipe: Any) -> None:
    erasure = random_erasure(with_channels(9), "lora", SITES, size=0.5)
    pipe.load_erasure(erasure, strict_base="ignore")
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), erasure)), base_images())
    fitted = erase(inpainting(with_channels(9)), "cat", anchors="animal", retain=["dog"], method="uce")
    assert tiny_sd_pipe().load_erasure(fitted, strict_base="ignore").base_match["unet"] == "different weights"


@pytest.mark.parametrize("channels", [5, 8])
def test_strict_base_decides(channels: int) -> None:
    erasure = random_erasure(tiny_sd_pipe())
    with pytest.raises(ErasureCompatibilityError, match="input channels"):
        with_channels(channels).load_erasure(erasure, strict_base="error")
    assert with_channels(channels).load_erasure(erasure, strict_base="ignore").strength == 1


def test_what_is_still_another_architecture() -> None:
    on_first_layer = random_erasure(tiny_sd_pipe(), "lora", CONV_SITES[:1])
    pipe = with_channels(9)
    with pytest.raises(ErasureCompatibilityError, match=r"conv_in.*(shape|channels|\[)"):
        pipe.load_erasure(on_first_layer, strict_base="ignore")
    assert pipe.list_erasures() == [] and not hasattr(pipe.unet, "erasure_modules")
    with pytest.raises(ErasureCompatibilityError, match="another architecture"):
        other = tiny_sd_pipe(levels=1)
        other.load_erasure(random_erasure(with_channels(9)), strict_base="ignore")
    narrow = tiny_sd_pipe()
    narrow.unet.conv_in = nn.Conv2d(9, 16, 3, padding=1)
    with pytest.raises(ErasureCompatibilityError, match="another architecture"):
        narrow.load_erasure(random_erasure(tiny_sd_pipe()), strict_base="ignore")


def test_contained_in_a_base_of_other_channels() -> None:
    """The erasure is known again in weights that were fused before the first layer was widened."""
    erasure = random_erasure(tiny_sd_pipe(), "lora", SITES, size=0.5)
    fused = dense_edit(with_channels(9), erasure)
    with pytest.raises(ErasureInputError, match="already contained"):
        fused.load_erasure(erasure, strict_base="ignore")


def test_transformers_that_embed_patches() -> None:
    """Flux reads 64 channels, Fill 384, Control 128."""
    from diffusers import FluxTransformer2DModel

    from diffusers_erasure.fingerprints import compare_component, describe_model

    def flux(channels: int, width: int = 4) -> Any:
        sizes = {"attention_head_dim": width, "num_attention_heads": 1, "joint_attention_dim": 8}
        layers = {"num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 8, "axes_dims_rope": (0, 2, 2)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return FluxTransformer2DModel(in_channels=channels, out_channels=64, **sizes, **layers)

    stored = describe_model(flux(64))
    assert compare_component("transformer", stored, flux(64)) == "same"
    for channels in (128, 384):
        assert compare_component("transformer", stored, flux(channels)) == "different weights"
    with pytest.raises(ErasureCompatibilityError):
        compare_component("transformer", stored, flux(384, width=8))
