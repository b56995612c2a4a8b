"""Gates by the probes of a gated edit: open or shut, on layers of other kinds, each concept's own."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_erasure import (
    Erasure,
    ErasureConfigError,
    ErasureFileError,
    ErasureInputError,
    demo,
    erase,
    with_gate,
    without_gate,
)
from diffusers_erasure.layers.probe_gate import ProbeGate
from diffusers_erasure.schema import ErasureConfig, GateSpec
from tests.commands import invoke
from tests.helpers import equal


KEPT = ["dog", "whale", "bird", "horse", "car", "tree", "house", "pizza"]
FEW: dict[str, Any] = {"num_pairs": 4, "num_inference_steps": 4, "guidance_scale": 3.0, "compare": False}
CAT, ROSE, DOG = "a cat on a table", "a rose on a table", "a dog on a table"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return demo.load_pipeline()


@pytest.fixture(scope="module")
def probes(pipe: Any) -> Erasure:
    """In the other order, with a concept more."""
    return erase(
        pipe, ["rose", "bus", "cat"], method="gated", retain=KEPT, retain_default="none", stock="none", compare=False
    )


@pytest.fixture(scope="module")
def patches(pipe: Any) -> Erasure:
    """Of two concepts, a layer each."""
    return erase(pipe, ["cat", "rose"], anchors=["animal", "plant"], method="acterase", **FEW)


@pytest.fixture(autouse=True)
def unloaded(pipe: Any) -> Any:
    yield
    pipe.unload_erasure()


def latents(pipe: Any, prompt: str | list[str]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt, num_inference_steps=3, guidance_scale=3.0, output_type="latent", generator=generator).images


def test_each_concept_has_its_own_gate(pipe: Any, patches: Erasure, probes: Erasure) -> None:
    """Where one opens the picture is that of its layer alone on the prompt's branch; where none does it is the base's, bit for bit."""
    base = {prompt: latents(pipe, prompt) for prompt in (CAT, ROSE, DOG)}
    gated = with_gate(patches, pipe, by=probes)
    assert [layer.gate is not None and layer.gate.probes for layer in gated.config.layers] == [True, True]
    pipe.load_erasure(gated, "no-both")
    found = {prompt: latents(pipe, prompt) for prompt in base}
    pipe.unload_erasure()
    assert torch.equal(found[DOG], base[DOG])
    assert not torch.allclose(found[CAT], base[CAT], atol=1e-2) and not torch.allclose(
        found[ROSE], base[ROSE], atol=1e-2
    )
    # the layer of the other concept alone, by its strength: nothing of it is in the picture
    for place, prompt in enumerate((CAT, ROSE)):
        config = dataclasses.replace(
            gated.config, layers=gated.config.layers[place : place + 1], concepts=gated.concepts[place : place + 1]
        )
        names = {name for layer in config.layers for name in layer.modifier_names}
        own = {
            name: value
            for name, value in gated.tensors["erasure.safetensors"].items()
            if name.startswith(config.layers[0].prefix) or name in names
        }
        pipe.load_erasure(Erasure(config, {"erasure.safetensors": own}), "one")
        assert torch.equal(latents(pipe, prompt), found[prompt])
        pipe.unload_erasure()


def test_rows_of_a_batch_have_gates_of_their_own(pipe: Any, patches: Erasure, probes: Erasure) -> None:
    """The row that opens none is the base's in the same batch, bit for bit; the other is what it is alone, up to the
    roundings of another batch size, which some CPUs' convolutions carry to 2e-4 on the base too."""

    def both() -> torch.Tensor:
        generator = [torch.Generator().manual_seed(3) for _ in range(2)]
        prompts = [CAT, DOG]
        return pipe(
            prompts, num_inference_steps=3, guidance_scale=3.0, output_type="latent", generator=generator
        ).images

    base = both()
    pipe.load_erasure(with_gate(patches, pipe, by=probes), "no-both")
    gated = both()
    assert torch.equal(gated[1:], base[1:])
    assert torch.allclose(gated[:1], latents(pipe, CAT), atol=2e-3)
    assert not torch.allclose(gated[:1], base[:1], atol=1e-2)


def test_a_lora_opens_for_any_of_its_concepts(pipe: Any, probes: Erasure) -> None:
    lora = erase(pipe, ["cat", "rose"], method="uce", layer="lora", retain=KEPT, retain_default="none", compare=False)
    base, gated = {prompt: latents(pipe, prompt) for prompt in (CAT, ROSE, DOG)}, with_gate(lora, pipe, by=probes)
    pipe.load_erasure(gated, "no-both")
    assert torch.equal(latents(pipe, DOG), base[DOG])
    for prompt in (CAT, ROSE):
        assert not torch.allclose(latents(pipe, prompt), base[prompt], atol=1e-2)


def test_a_copy_a_pickle_and_another_dtype_gate_alike(pipe: Any, patches: Erasure, probes: Erasure) -> None:
    """Probes stay in float32, whatever the model is cast to."""
    fresh = demo.load_pipeline()
    fresh.load_erasure(with_gate(patches, fresh, by=probes), "no-both")
    gated = {prompt: latents(fresh, prompt) for prompt in (CAT, DOG)}
    unet = fresh.unet
    for again in (
        copy.deepcopy(unet),
        pickle.loads(pickle.dumps(unet)),
        copy.deepcopy(unet).to(torch.bfloat16).float(),
    ):
        found = [each for each in again.modules() if isinstance(each, ProbeGate)]
        text = fresh.encode_prompt([CAT, DOG], "cpu", 1, False)[0]
        assert sorted(each(text).tolist() for each in found) == [[0.0, 0.0], [1.0, 0.0]]
    fresh.unet = copy.deepcopy(unet)
    assert all(torch.equal(latents(fresh, prompt), before) for prompt, before in gated.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_saved_read_shown_and_taken_off(
    pipe: Any, patches: Erasure, probes: Erasure, dtype: torch.dtype, tmp_path: Path
) -> None:
    gated = with_gate(patches, pipe, by=probes)
    gated.save_pretrained(tmp_path / "gated", dtype=dtype)
    again = Erasure.from_pretrained(tmp_path / "gated")
    assert again.config.layers == gated.config.layers
    base = latents(pipe, DOG)
    pipe.load_erasure(again, "no-both")
    assert torch.equal(latents(pipe, DOG), base)
    assert not torch.allclose(latents(pipe, CAT), latents(demo.load_pipeline(), CAT), atol=1e-2)
    assert "by prompt" in invoke("info", str(tmp_path / "gated")).stdout
    off = without_gate(gated)
    assert off.config.layers == patches.config.layers
    for name, value in patches.tensors["erasure.safetensors"].items():
        assert equal(value, off.tensors["erasure.safetensors"][name])


def test_what_does_not_go_together(pipe: Any, patches: Erasure, probes: Erasure) -> None:
    with pytest.raises(ErasureInputError, match='by "gated"'):
        with_gate(patches, pipe, by=patches)
    with pytest.raises(ErasureInputError, match="belong to a gate without"):
        with_gate(patches, pipe, "cat", by=probes)
    with pytest.raises(ErasureInputError, match="takes an `Erasure`.*not str"):
        with_gate(patches, pipe, by="user/no-cat")  # type: ignore[arg-type]
    with pytest.raises(ErasureInputError, match="redacted"):
        with_gate(patches.redacted(), pipe, by=probes)
    fewer = erase(pipe, "cat", method="gated", retain=KEPT, retain_default="none", stock="none", compare=False)
    with pytest.raises(ErasureInputError, match="none for 'rose'"):
        with_gate(patches, pipe, by=fewer)
    with pytest.raises(ErasureConfigError, match="no `tokens`"):
        GateSpec("modifiers.0.gate", tokens=((1,),), probes=True)


def test_files_are_checked(pipe: Any, patches: Erasure, probes: Erasure) -> None:
    gated = with_gate(patches, pipe, by=probes)
    name = gated.config.layers[0].modifier_names[0]
    for wrong in (torch.zeros(0, 130), torch.zeros(2, 2), torch.zeros(1, 2, 130)):
        files = {**gated.tensors["erasure.safetensors"], name: wrong}
        with pytest.raises(ErasureFileError, match="probes"):
            Erasure(gated.config, {"erasure.safetensors": files})
    # what was written before there were such gates
    config = json.loads(gated.config.to_json())
    for layer in config["layers"]:
        del layer["gate"]["probes"]
    assert ErasureConfig.from_json(json.dumps(config).encode()).layers[0].gate == GateSpec(name)
