"""SDXL's two prompts: closed forms act on each text encoder's half of a row by itself, and what does not is refused."""

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from diffusers_erasure import (
    Erasure,
    ErasureInactiveError,
    combine,
    erase,
    erasures_disabled,
    with_gate,
)
from diffusers_erasure.base_model import text_readers
from diffusers_erasure.encoding import all_rows, last_rows
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.live.second_prompt import maps_together
from diffusers_erasure.low_rank import DOWN, UP, compress, svd, truncated, written
from diffusers_erasure.schema import LORA_FILE
from tests.flow_pipes import tiny_flux_pipe, tiny_sd3_pipe
from tests.helpers import ROUNDINGS, images, normal, roundings, tiny_sd_pipe, tiny_sdxl_pipe


COMMON: dict[str, Any] = {"anchors": "animal", "retain": ["dog"], "retain_default": "none"}
SECOND = (None, "a photograph, best quality", "dog")
HALVES = slice(0, 32), slice(32, 80)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_sdxl_pipe()


@pytest.fixture(autouse=True)
def nothing_stays_loaded(pipe: Any) -> Any:
    yield
    pipe.unload_erasure()


def fed(pipe: Any, prompt: str, second: str | None = None) -> torch.Tensor:
    """The row at a prompt's last word piece as the pipeline itself makes it."""
    place = len(pipe.tokenizer(prompt).input_ids) - 2
    with torch.no_grad():
        rows = pipe.encode_prompt(prompt, prompt_2=second, device="cpu", do_classifier_free_guidance=False)[0]
    return rows[0, place].double()


def mapped(erasure: Erasure) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = erasure.layer_tensors(erasure.config.layers[0])
    return tensors["A"].double(), tensors["D"].double()


@pytest.mark.parametrize("method", ["uce", "rece"])
@pytest.mark.parametrize("rows", ["last", "window", "whole"])
def test_each_half_moves_as_reported_whatever_the_other_is(pipe: Any, method: str, rows: str) -> None:
    erasure = erase(pipe, "cat", **COMMON, method=method, rows=rows, push=0.0, layer="text_map")
    reported = erasure.config.diagnostics["completeness"]["cat"]
    a, d = mapped(erasure)
    goal = fed(pipe, "animal")
    shares = []
    for half, others in zip(
        HALVES, ([("cat", each) for each in SECOND], [("dog", "cat"), ("cat", None)]), strict=True
    ):
        found = []
        for prompt, second in others:
            row, way = fed(pipe, prompt, second), goal - fed(pipe, "cat")
            moved = ((row @ a.T) @ d)[half]
            found.append(float(moved @ way[half] / way[half].square().sum()))
        assert max(found) - min(found) < 1e-4  # the rows are encoded in float32
        shares.append(found[0])
    assert min(shares) == pytest.approx(reported, abs=1e-3)


def test_a_map_is_the_closed_form_of_each_half(pipe: Any) -> None:
    settings: dict[str, Any] = {"templates": "none", "absolute": True, "lamb": 0.3, "retain_scale": 0.2, "push": 0.0}
    settings["retain_default"] = "none"
    erasure = erase(pipe, "cat", anchors="animal", retain=["dog", "tree"], layer="text_map", **settings)
    e, g = last_rows(pipe, ["cat", "animal"]).split(1)
    kept = all_rows(pipe, ["", "dog", "tree"])[0].flatten(0, 1)
    expected = torch.zeros(80, 80, dtype=torch.float64)
    for half in HALVES:
        x, r = e[:, half], kept[:, half]
        m = 0.3 * torch.eye(x.shape[1]) + x.T @ x + 0.2 * r.T @ r
        expected[half, half] = (g - e)[:, half].T @ x @ torch.linalg.inv(m)
    a, d = mapped(erasure)
    assert roundings(d.T @ a, expected) <= ROUNDINGS
    lora = erase(pipe, "cat", anchors="animal", retain=["dog", "tree"], **settings, method="uce")
    site, linear = next(iter(text_readers(pipe).items()))
    factors = lora.tensors[LORA_FILE]
    found = factors[f"unet.{site}{UP}"].double() @ factors[f"unet.{site}{DOWN}"].double()
    assert roundings(found, linear.weight.detach().double() @ expected) <= ROUNDINGS


HALF_WISE: list[dict[str, Any]] = [
    {"method": "uce"},
    {"method": "uce", "layer": "both", "rank": 5},
    {"method": "uce", "rows": "window", "rank": 12},
    {"method": "rece", "layer": "lora", "max_error": 0.1},
    {"method": "dp"},
    {"method": "oce", "rank": 3},
    {"method": "speed"},
    {"method": "speed", "rows": "last", "params": "KV", "adversarial": 1, "rank": 3},
]


@pytest.mark.parametrize("settings", HALF_WISE, ids=lambda s: "-".join(map(str, s.values())))
def test_halves_stay_apart_however_the_erasure_is_written(pipe: Any, settings: dict[str, Any]) -> None:
    erasure = erase(pipe, "cat", **COMMON, **settings)
    assert not maps_together(pipe, erasure)
    for copied in (erasure.cast("bfloat16"), erasure.rescaled(0.5), erasure.redacted()):
        assert not maps_together(pipe, copied)
    assert maps_together(pipe, erase(pipe, "cat", **COMMON, **settings, per_encoder=False))
    other = erase(pipe, "house", anchors="", **settings)
    assert not maps_together(pipe, combine([erasure, other], mode="sum", rank=6))


@pytest.mark.parametrize("method", ["uce", "rece", "speed", "dp"])
@pytest.mark.parametrize("truncate", [{"rank": 1}, {"max_error": 0.9}], ids=["rank", "error"])
def test_no_half_is_dropped_however_much_is_truncated(pipe: Any, method: str, truncate: dict[str, Any]) -> None:
    """Beside each of the forms a sum, in which the halves are of unlike weight."""
    form: dict[str, Any] = {} if method == "speed" else {"layer": "lora"}
    one, other = (erase(pipe, name, **COMMON, method=method, **form) for name in ("cat", "house"))
    cut = erase(pipe, "cat", **COMMON, method=method, **form, **truncate)
    light = unlike(one), unlike(other)
    found = [cut, combine([one, other], mode="sum", **truncate), combine(light, mode="sum", **truncate)]
    if "layer" in form:
        maps = [erase(pipe, name, **COMMON, method=method, layer="text_map") for name in ("cat", "house")]
        found.append(erase(pipe, "cat", **COMMON, method=method, layer="text_map", **truncate))
        found.append(combine([unlike(each) for each in maps], mode="sum", **truncate))
    row = fed(pipe, "cat")
    for erasure in found:
        assert not maps_together(pipe, erasure)
        for layer in erasure.config.layers:
            tensors = erasure.layer_tensors(layer)
            pairs = [(site, (tensors["A"], tensors["D"].T)) for site in layer.sites if "A" in tensors]
            pairs = pairs or [(site, (tensors[site + DOWN], tensors[site + UP])) for site in layer.sites]
            for site, (a, b) in pairs:
                if site not in ("encoder_hidden_states", *text_readers(pipe)):
                    continue
                a, b = a.double(), b.double()
                for half in HALVES:
                    if "rank" in truncate:
                        assert int((a[:, half] != 0).any(1).sum()) == 1
                    moved = b @ (a[:, half] @ row[half])
                    assert moved.norm() > 1e-6 * b.norm() * a[:, half].norm() * row[half].norm()


def unlike(erasure: Erasure) -> Erasure:
    """The same with a first half that is a hundredth of it."""
    (layer, *others) = erasure.config.layers
    tensors = {name: value.clone() for name, value in erasure.layer_tensors(layer).items()}
    for name, value in tensors.items():
        if name == "A" or name.endswith(DOWN) and value.shape[1] == HALVES[1].stop:
            value[:, HALVES[0]] *= 0.01
    made = Layer(layer.kind, layer.sites, tensors, layer.component, layer.derived_from)
    rest = [Layer(each.kind, each.sites, erasure.layer_tensors(each), each.component) for each in others]
    return Erasure.from_layers([made, *rest], base=erasure.config.base_model, concepts=erasure.concepts)


def test_speed_leaves_alone_what_each_half_retains(pipe: Any) -> None:
    """Without any softening the null space holds, half by half: nothing of the empty prompt's first row is moved."""
    erasure = erase(pipe, "cat", **COMMON, method="speed", rows="last", retain_rows="last", max_error=0.0)
    start = all_rows(pipe, [""])[0][0, 0]
    cat = fed(pipe, "cat")
    tensors = erasure.tensors[LORA_FILE]
    for site in erasure.config.layers[0].sites[:-1]:  # the last reads the pooled vector
        a, b = tensors[f"unet.{site}{DOWN}"].double(), tensors[f"unet.{site}{UP}"].double()
        for half in HALVES:
            moved, kept = b @ (a[:, half] @ cat[half]), b @ (a[:, half] @ start[half])
            assert kept.norm() < 1e-4 * moved.norm()


def test_published_settings_map_the_halves_together(pipe: Any) -> None:
    for method in ("uce", "rece"):
        assert maps_together(pipe, erase(pipe, "cat", **COMMON, method=method, published=True))
    plain = tiny_sd_pipe(levels=1)
    assert not maps_together(plain, erase(plain, "cat", published=True))


# ---------------------------------------------------------------------------------------------------------- the guard


def draw(pipe: Any, **arguments: Any) -> Any:
    return images(pipe, height=16, width=16, **{"num_inference_steps": 1, **arguments})


REFUSED: list[dict[str, Any]] = [
    {"prompt": "a cat", "prompt_2": "a photograph"},
    {"prompt": ["a cat", "a dog"], "prompt_2": ["a cat", "a cat"]},
    {"prompt": "a cat", "negative_prompt": "dog", "negative_prompt_2": "tree"},
]
PASSED: list[dict[str, Any]] = [
    {"prompt": "a cat"},
    {"prompt": "a cat", "prompt_2": "a cat"},
    {"prompt": ["a cat", "a dog"], "prompt_2": ["a cat", "a dog"]},
    {"prompt": "a cat", "prompt_2": "", "negative_prompt": "dog"},
    {"prompt": "a cat", "negative_prompt": "dog", "negative_prompt_2": "dog"},
    {"prompt": "a cat", "negative_prompt": "dog", "negative_prompt_2": "tree", "guidance_scale": 1.0},
    {"prompt": "a cat", "negative_prompt_2": "dog"},  # without `negative_prompt` SDXL feeds zeros
]


@pytest.mark.parametrize("layer", ["lora", "text_map"])
def test_another_second_prompt_is_refused_where_halves_are_mapped_together(pipe: Any, layer: str) -> None:
    pipe.load_erasure(
        Erasure.from_files(erase(pipe, "cat", **COMMON, layer=layer, per_encoder=False).to_files()), "it"
    )
    for arguments in REFUSED:
        with pytest.raises(ErasureInactiveError, match=r"prompt_2`.*'it'.*per_encoder"):
            draw(pipe, **arguments)
    for arguments in PASSED:
        draw(pipe, **arguments)
    with erasures_disabled(pipe):
        draw(pipe, **REFUSED[0])
    pipe.set_erasures("it", 0.0)
    draw(pipe, **REFUSED[0])
    pipe.set_erasures("it", 1.0)
    with pytest.raises(ErasureInactiveError):
        draw(pipe, **REFUSED[0])
    pipe.unload_erasure("it")
    draw(pipe, **REFUSED[0])


def test_pipelines_that_share_or_copy_the_denoiser_are_looked_at_too(pipe: Any) -> None:
    pipe.load_erasure(erase(pipe, "cat", **COMMON, per_encoder=False), "it")
    shared = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    copied = copy.copy(pipe)
    copied.unet = pickle.loads(pickle.dumps(pipe.unet))
    for other in (shared, copied, copy.deepcopy(pipe)):
        with pytest.raises(ErasureInactiveError, match="'it'"):
            other.encode_prompt("a cat", prompt_2="a dog", device="cpu")
        other.encode_prompt("a cat", device="cpu")
    pipe.unload_erasure()
    shared.encode_prompt("a cat", prompt_2="a dog", device="cpu")


def test_where_the_first_encoder_is_not_there_the_factors_tell(pipe: Any) -> None:
    apart, together = (erase(pipe, "cat", **COMMON, per_encoder=each) for each in (True, False))
    without = copy.copy(pipe)
    without.text_encoder = None
    assert maps_together(without, together) and not maps_together(without, apart)


def test_nothing_is_refused_where_each_half_is_mapped_by_itself(pipe: Any) -> None:
    pipe.load_erasure(erase(pipe, "cat", **COMMON, method="uce"), "it")
    for arguments in (*REFUSED, *PASSED):
        draw(pipe, **arguments)


def test_gates_and_what_was_trained_with_both_encoders_need_one_prompt(pipe: Any) -> None:
    gated = with_gate(erase(pipe, "cat", **COMMON, method="uce"), pipe, ["cat"])
    assert maps_together(pipe, gated)
    site = next(iter(text_readers(pipe)))
    both = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    factors = {site + DOWN: normal(2, 80, seed=0), site + UP: normal(32, 2, seed=1)}
    trained = Layer("lora", (site,), factors, "unet", both)
    assert maps_together(pipe, Erasure.from_layers([trained], base=pipe, concepts="cat"))
    unbound = Layer("lora", (site,), factors)
    assert not maps_together(pipe, Erasure.from_layers([unbound], base=pipe, concepts="cat"))


# -------------------------------------------------------------------------------------------------------- the algebra


def test_groups_of_columns_are_factored_by_themselves() -> None:
    left = normal(9, 7, seed=0)
    right = torch.block_diag(normal(3, 5, seed=1), normal(4, 6, seed=2))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    u, s, vh = svd(left[:, order], right[order])
    assert roundings(u * s @ vh, left @ right, torch.float64) <= ROUNDINGS
    assert bool((s.diff() <= 0).all())
    assert not bool(((vh[:, :5] != 0).any(1) & (vh[:, 5:] != 0).any(1)).any())
    lost = ((u * s)[:, :4] @ vh[:4] - left @ right).norm()
    assert float(lost) == pytest.approx(float(s[4:].norm()), rel=1e-12)  # what is left out adds up
    whole = svd(left, normal(7, 11, seed=3))
    assert len(whole[1]) == 7


def test_truncation_holds_for_each_group_of_columns() -> None:
    first, second = normal(3, 5, seed=1), 1e-3 * normal(4, 6, seed=2)
    a, d = torch.block_diag(first, second), torch.block_diag(normal(3, 5, seed=3), normal(4, 6, seed=4))
    exact = d.T @ a
    for rank, error in ((1, None), (2, None), (None, 0.3), (2, 0.3)):
        cut_a, cut_d, lost = truncated(a, d, rank, error)
        (down, up), lost_too = written(a, d.T, rank, error)
        for found, stated in ((cut_d.T @ cut_a, lost), (up.double() @ down.double(), lost_too)):
            assert float((found - exact).norm() / exact.norm()) == pytest.approx(stated, rel=1e-4)
            for part in (slice(0, 5), slice(5, 11)):
                u, s, vh = torch.linalg.svd(exact[part, part])
                least = (error or 1e-12) * s.norm()
                count = min(rank or 9, next(k for k in range(1, len(s) + 1) if s[k:].norm() <= least))
                best = u[:, :count] * s[:count] @ vh[:count]
                assert roundings(found[part, part], best) <= ROUNDINGS


def test_edits_of_zeros() -> None:
    a = torch.block_diag(normal(1, 5, seed=1), normal(1, 6, seed=2))
    for d in (torch.zeros(2, 11, dtype=torch.float64), torch.block_diag(normal(1, 5, seed=1), torch.zeros(1, 6))):
        small = compress(a, d)
        cut = truncated(a, d, 1, None)
        (down, up), _ = written(a, d.T, 1, 0.1)
        for x, y in (small, cut[:2], (down.double(), up.double().T)):
            assert len(x) == 1 and roundings(y.T @ x, d.T @ a) <= ROUNDINGS
            assert not bool((x[:, :5] != 0).any() and (x[:, 5:] != 0).any())


def test_rows_made_of_two_prompts_are_the_users_own(pipe: Any) -> None:
    """As the documentation says: the rows do not tell."""
    rows, negative, pooled, negative_pooled = pipe.encode_prompt("a cat", prompt_2="a dog", device="cpu")
    pipe.load_erasure(erase(pipe, "cat", **COMMON, per_encoder=False), "it")
    draw(
        pipe,
        prompt=None,
        prompt_embeds=rows,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
    )


def test_clips_of_sd3_that_are_mapped_together_need_one_prompt() -> None:
    """Which of its maps are made so no factor says, as T5's rows lie in the same columns; T5's own prompt may be any."""
    pipe = tiny_sd3_pipe()
    call: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "max_sequence_length": 12}
    apart, together = (erase(pipe, "cat", **COMMON, per_encoder=each, compare=False) for each in (True, False))
    assert not maps_together(pipe, apart) and maps_together(pipe, together)
    pipe.load_erasure(apart, "one")
    pipe("cat", prompt_2="dog", prompt_3="tree", **call)
    pipe.unload_erasure()
    pipe.load_erasure(together, "one")
    pipe("cat", prompt_3="tree", **call)
    with pytest.raises(ErasureInactiveError, match="prompt_2"):
        pipe("cat", prompt_2="dog", **call)
    with erasures_disabled(pipe):
        pipe("cat", prompt_2="dog", **call)
    flux = tiny_flux_pipe()
    assert not maps_together(flux, erase(flux, "cat", **COMMON, per_encoder=False, compare=False))
