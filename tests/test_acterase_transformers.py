"""ActErase on FLUX.1's and Stable Diffusion 3's transformers: calibrated as their pipelines draw, by timestep, at their own sites."""

from typing import Any

import pytest
import torch

from diffusers_erasure import ErasureInputError, erase
from diffusers_erasure.layers.activation import TIMESTEPS
from diffusers_erasure.methods.acterase import SOURCE, TARGET, Calibration, Config, Settings
from diffusers_erasure.methods.acterase_sites import find_sites
from diffusers_erasure.methods.probes import inputs_seen
from diffusers_erasure.settings import resolve
from tests.helpers import EFFECT, ROUNDINGS, equal, far, roundings
from tests.tiny_transformers import PIPES, drawn, tiny_flux_pipe


PAIRS = [("a photo", "a photo of a zebra"), ("a table", "a zebra on a table")]
SITE = {"flux": "single_transformer_blocks.1.proj_out", "sd3": "transformer_blocks.1.ff_context.net.2"}
QUICK: dict[str, Any] = {"method": "acterase", "num_pairs": 2, "num_inference_steps": 3, "batch_size": 2, "top": 0.5}


def packed(latents: torch.Tensor) -> torch.Tensor:
    """As `FluxPipeline` packs them: [B, 4, 8, 8] to [B, 16, 16]."""
    return latents.reshape(len(latents), 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(len(latents), 16, 16)


@pytest.mark.parametrize("kind", ["flux", "flux with guidance", "sd3"])
def test_the_calibration_against_a_pipelines_own_run(kind: str) -> None:
    """The means are those of the pipeline's own modules; SD3's first half of a batch is the empty prompt's."""
    name = kind.split()[0]
    pipe = tiny_flux_pipe(guidance_embeds=True) if "guidance" in kind else PIPES[name]()
    settings = {"num_pairs": 2, "num_inference_steps": 3, "timesteps": 3, "guidance_scale": 3.0}
    settings["max_sequence_length"] = 16
    calibration = Calibration(pipe, resolve(Config(pairs=PAIRS, **settings), Settings), [PAIRS])
    with inputs_seen(calibration.model, calibration.modules, calibration.see):
        calibration.batch(0, 0)
    times: list[float] = []
    seen: list[torch.Tensor] = []
    module = pipe.transformer.get_submodule(SITE[name])
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for side in (SOURCE, TARGET):
        seen.clear()
        noise = torch.stack([calibration.sampler.noise(0, ("pair", i), (4, 8, 8)) for i in range(2)])
        drawn(
            pipe,
            prompt=[pair[side] for pair in PAIRS],
            latents=packed(noise) if name == "flux" else noise,
            guidance_scale=3.0,
            max_sequence_length=16,
            callback_on_step_end=lambda _, step, time, given: times.append(float(time)) or given,
        )
        assert len(seen) == 3
        for step, hidden in enumerate(seen):
            own = (hidden[2:] if name == "sd3" else hidden).flatten(0, 1).double()
            assert roundings(calibration.moments[side].mean(SITE[name])[step], own.mean(0)) <= ROUNDINGS
    assert calibration.tensors()[TIMESTEPS].tolist() == pytest.approx(times[:3])


@pytest.mark.parametrize("kind", list(PIPES))
def test_an_erasure_acts_as_it_was_observed(kind: str) -> None:
    """It changes pictures, less at half its strength, and not at 0; the pipeline was not touched by the fit."""
    pipe = PIPES[kind]()
    base = drawn(pipe)
    erasure = erase(pipe, "zebra", anchors="horse", sites="all", **QUICK)
    assert equal(drawn(pipe), base)
    (layer,) = erasure.config.layers
    assert layer.component == "transformer" and layer.kind == "activation"
    ends = {site.split(".", 2)[-1] for site in layer.sites}
    assert {"ff.net.2", "ff_context.net.2", "attn.to_out.0", "attn.to_add_out"} <= ends
    assert ("proj_out" in ends) == (kind == "flux") and ("attn2.to_out.0" in ends) == (kind == "sd3")
    pipe.load_erasure(erasure, "e")
    whole = far(drawn(pipe), base)
    pipe.set_erasures("e", 0.05)
    assert EFFECT < whole and 0 < far(drawn(pipe), base) < whole
    pipe.set_erasures("e", 0.0)
    assert equal(drawn(pipe), base)


def test_one_for_all_timesteps_is_fused() -> None:
    pipe = tiny_flux_pipe()
    base = drawn(pipe)
    pipe.load_erasure(erase(pipe, "zebra", anchors="horse", by_timestep=False, **QUICK), "e")
    whole = drawn(pipe)
    pipe.fuse_erasures()
    assert far(drawn(pipe), whole) < 1e-4 < EFFECT < far(whole, base)
    pipe.unfuse_erasures()
    assert equal(drawn(pipe), whole)


@pytest.mark.parametrize("blocks", ["double", "single"])
def test_the_blocks_of_flux(blocks: str) -> None:
    """Those of two streams have attentions and feed-forwards, those of one a Linear for both."""
    found = {}
    for sites in ("attn", "all"):
        settings = resolve(Config(sites=sites, blocks=blocks), Settings)
        found[sites] = find_sites(tiny_flux_pipe().transformer, settings)
    attentions = [f"transformer_blocks.{i}.attn.{end}" for i in (0, 1) for end in ("to_out.0", "to_add_out")]
    singles = [f"single_transformer_blocks.{i}.proj_out" for i in (0, 1)]
    assert sorted(found["attn"]) == sorted(attentions if blocks == "double" else singles)
    assert len(found["all"]) == (8 if blocks == "double" else 2)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        *(("flux", setting) for setting in ({"sites": "attn1"}, {"sites": "ff+attn2"}, {"blocks": "mid"})),
        ("sd3", {"blocks": "double"}),
    ],
)
def test_parts_of_other_denoisers_are_refused(kind: str, setting: dict[str, Any]) -> None:
    with pytest.raises(ErasureInputError, match="parts of this denoiser. For .* `sites` may be 'ff', 'attn', 'all'"):
        find_sites(PIPES[kind]().transformer, resolve(Config(**setting), Settings))
