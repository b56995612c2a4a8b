"""UCE, RECE, SPEED and DP at the doors of SD3 and FLUX.1, against dense formulas on rows that the pipelines themselves make."""

from typing import Any

import pytest
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from diffusers_erasure import Erasure, ErasureCompatibilityError, ErasureInputError, erase
from diffusers_erasure.encoding import pooled_source, row_sources
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.methods.rows import aligned
from diffusers_erasure.schema import LORA_FILE
from tests.flow_pipes import tiny_flux_pipe, tiny_sd3_pipe
from tests.helpers import ROUNDINGS, roundings


ROWS, POOLED, DOOR = "encoder_hidden_states", "pooled_projections", "context_embedder"
READER = "time_text_embed.text_embedder.linear_1"
LENGTH = 20  # rows of T5
CLIP_ROWS = 24  # of the embedded model's tokenizer, which these pipelines have
COMMON: dict[str, Any] = {"anchors": "animal", "push": 0.0, "retain_default": "none", "compare": False}
PLAIN: dict[str, Any] = {
    **COMMON,
    "templates": "none",
    "absolute": True,
    "lamb": 0.3,
    "retain_scale": 0.2,
    "directions": 0,
}
WORDS = "a cat animal dog photo of on mat tree an picture in artwork drawing paper two together image".split()


@pytest.fixture(autouse=True)
def nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ERASURE_CACHE", "off")


def with_t5(pipe: Any, seed: int = 0) -> Any:
    """A pipeline whose T5 has a tokenizer as T5's are: no start token, and one end token."""
    name = "_3" if hasattr(pipe, "tokenizer_3") else "_2"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [("▁" + word, -3.0) for word in WORDS]
    vocabulary += [(letter, -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(
        vocab=vocabulary, extra_ids=0, additional_special_tokens=[], model_max_length=LENGTH, eos_token="</s>"
    )
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = T5EncoderModel(config).eval()
        for parameter in encoder.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)
    setattr(pipe, f"tokenizer{name}", tokenizer)
    setattr(pipe, f"text_encoder{name}", encoder)
    return pipe


@pytest.fixture(scope="module")
def flux() -> Any:
    return with_t5(tiny_flux_pipe())


@pytest.fixture(scope="module")
def sd3() -> Any:
    return with_t5(tiny_sd3_pipe())


def fed(pipe: Any, prompt: str, *others: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [L, C] and pooled vector [p] as the pipeline's own function makes them; `others` are the second and third prompts."""
    arguments: dict[str, Any] = {"device": "cpu", "max_sequence_length": LENGTH}
    with torch.no_grad():
        if hasattr(pipe, "tokenizer_3"):
            second, third = others or (None, None)
            found = pipe.encode_prompt(prompt, second, third, do_classifier_free_guidance=False, **arguments)
            return found[0][0].double(), found[2][0].double()
        rows, pooled, _ = pipe.encode_prompt(prompt, None, **arguments)
    return rows[0].double(), pooled[0].double()


def mapped(erasure: Erasure, site: str = ROWS) -> torch.Tensor:
    """D^T A, what a map adds to a row, [C, C]."""
    (layer,) = (each for each in erasure.config.layers if each.sites == (site,))
    tensors = erasure.layer_tensors(layer)
    return tensors["D"].double().T @ tensors["A"].double()


def formula(targets: torch.Tensor, anchors: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """UCE's T - I with the weights of `PLAIN`, by a dense inverse."""
    m = 0.3 * torch.eye(targets.shape[1], dtype=torch.float64) + targets.T @ targets + 0.2 * kept.T @ kept
    return (anchors - targets).T @ targets @ torch.linalg.inv(m)


# ------------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_rows_are_those_that_the_pipeline_feeds_to_its_denoiser(name: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(name)
    prompts = ["", "cat", "a photo of a cat on a mat"]
    sources = row_sources(pipe)
    assert [source.causal for source in sources] == ([True, False] if name == "sd3" else [False])
    pooled = pooled_source(pipe)
    assert pooled is not None
    for index, prompt in enumerate(prompts):
        rows, vector = fed(pipe, prompt)
        ours = torch.cat([source.all(prompts)[0][index] for source in sources])
        assert ours.dtype == torch.float64 and roundings(ours, rows) <= ROUNDINGS
        assert roundings(pooled.last(prompts)[index], vector) <= ROUNDINGS
    for source in sources:
        rows, last = source.all(prompts)
        # CLIP's start token stands before the words; T5 has none.
        pieces = [len(pipe.tokenizer(prompt).input_ids) - 2 for prompt in prompts]
        assert last == (pieces if source.causal else [0, 0, 7])
        picked = torch.stack([each[place] for each, place in zip(rows, last, strict=True)])
        assert roundings(source.last(prompts), picked) <= ROUNDINGS


def test_the_padded_length_is_a_setting(flux: Any) -> None:
    """T5 reads the padding: rows of another length are other rows."""
    short, long = (row_sources(flux, length=length)[0] for length in (8, LENGTH))
    assert len(short.all(["cat"])[0][0]) == 8 and len(long.all(["cat"])[0][0]) == LENGTH
    assert roundings(short.last(["cat"]), long.last(["cat"])) > 1000
    by_length = [erase(flux, "cat", **PLAIN, max_sequence_length=length, method="uce") for length in (8, LENGTH, 0)]
    maps = [mapped(erasure) for erasure in by_length]
    assert roundings(maps[0], maps[1]) > 1000 and torch.equal(maps[1], maps[2])
    with pytest.raises(ErasureInputError, match="raise `max_sequence_length`"):
        erase(flux, "a photo of a cat on a mat", **PLAIN, max_sequence_length=4, method="uce")


def test_places_of_two_prompts_are_paired_from_both_ends() -> None:
    assert aligned([1, 2, 9, 3, 0], [1, 2, 8, 3, 0], (6, 6)) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    # Three pieces for one; what follows moves up, and one row of padding is left over.
    assert aligned([1, 7, 8, 9, 0], [1, 5, 0], (6, 6)) == ([0, 1, 2, 3, 4, 5], [0, 1, 1, 1, 2, 3])
    assert aligned([7, 0], [0], (4, 4)) == ([0, 1, 2, 3], [0, 0, 1, 2])  # the empty prompt


# ---------------------------------------------------------------------------------------------------- the algebra


@pytest.mark.parametrize("rows", ["last", "window"])
def test_a_map_is_the_closed_form_on_flux(flux: Any, rows: str) -> None:
    erasure = erase(flux, "cat", **PLAIN, retain=["dog", "tree"], rows=rows)
    (target, vector), (anchor, goal) = fed(flux, "cat"), fed(flux, "animal")
    kept = [fed(flux, prompt) for prompt in ("", "dog", "tree")]
    here = slice(0, 1) if rows == "last" else slice(0, None)  # the word is the first row of T5's
    expected = formula(target[here], anchor[here], torch.cat([each for each, _ in kept]))
    assert roundings(mapped(erasure), expected) <= ROUNDINGS
    expected_pooled = formula(vector[None], goal[None], torch.stack([each for _, each in kept]))
    assert roundings(mapped(erasure, POOLED), expected_pooled) <= ROUNDINGS
    lora = erasure.tensors[LORA_FILE]
    for site, change in ((DOOR, expected), (READER, expected_pooled)):
        weight = flux.transformer.get_submodule(site).weight.detach().double()
        found = lora[f"transformer.{site}{UP}"].double() @ lora[f"transformer.{site}{DOWN}"].double()
        assert roundings(found, weight @ change) <= ROUNDINGS
    assert erasure.config.stock is not None and erasure.config.stock.is_exact


@pytest.mark.parametrize("apart", [False, True])
def test_a_map_is_the_closed_form_on_sd3(sd3: Any, apart: bool) -> None:
    """Of the rows of CLIP and T5 in one space; apart, with zeros in place of the other CLIP's part."""
    erasure = erase(sd3, "cat", **PLAIN, retain=["dog"], rows="last", per_encoder=apart)

    def alphabets(prompt: str) -> list[torch.Tensor]:
        rows, _ = fed(sd3, prompt)
        clip, t5 = rows[:CLIP_ROWS], rows[CLIP_ROWS:]
        assert not clip[:, 32:].any()  # two encoders of width 16 in 32 columns, which are T5's width
        halves = [torch.zeros_like(clip) for _ in range(2)]
        halves[0][:, :16], halves[1][:, 16:] = clip[:, :16], clip[:, 16:]
        return [*(halves if apart else [clip]), t5]

    def last(prompt: str) -> torch.Tensor:
        parts = alphabets(prompt)
        return torch.stack([each[1] for each in parts[:-1]] + [parts[-1][0]])

    kept = torch.cat([part for prompt in ("", "dog") for part in alphabets(prompt)])
    expected = formula(last("cat"), last("animal"), kept)
    assert roundings(mapped(erasure), expected) <= ROUNDINGS


def test_rows_go_to_the_anchor_in_few_directions(flux: Any) -> None:
    """The map is that of anchors which lie only so far off as the leading directions of the way go; each concept has its own."""
    settings = {**PLAIN, "rows": "window", "directions": 2, "layer": "text_map"}
    erasure = erase(flux, "cat", **settings, method="uce")
    target, anchor = (fed(flux, prompt)[0] for prompt in ("cat", "animal"))
    leading = torch.linalg.svd(anchor - target).Vh[:2]
    near = target + (anchor - target) @ leading.T @ leading
    assert roundings(mapped(erasure), formula(target, near, fed(flux, "")[0])) <= ROUNDINGS
    assert len(erasure.layer_tensors(erasure.config.layers[0])["A"]) == 2
    two = erase(flux, ["cat", "dog"], **settings, method="uce")
    assert len(two.layer_tensors(two.config.layers[0])["A"]) == 4


def test_the_bias_is_no_part_of_what_is_solved(flux: Any) -> None:
    """With W g as the goal the edited door gives W g + b; with what the module gives, W g + b, it would give W g + 2 b."""
    pipe = with_t5(tiny_flux_pipe())
    for site in (DOOR, READER):
        pipe.transformer.get_submodule(site).bias.data.fill_(25.0)
    erasure = erase(pipe, "cat", **{**PLAIN, "lamb": 1e-9, "retain_scale": 0.0}, rows="last")
    door = pipe.transformer.get_submodule(DOOR).double().requires_grad_(False)
    target, anchor = (fed(pipe, prompt)[0][0] for prompt in ("cat", "animal"))
    goal = door(anchor)
    moved = door(target + mapped(erasure) @ target)
    assert float((moved - goal).norm() / goal.norm()) < 1e-4
    assert float((door(target) - goal).norm()) > 100 * float((moved - goal).norm())


def moved(erasure: Erasure, targets: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """How far each row goes of its way to the anchor's."""
    way = anchors - targets
    return ((targets @ mapped(erasure).T) * way).sum(1) / way.square().sum(1)


def test_every_row_of_t5_holds_the_word_and_all_of_them_are_mapped(flux: Any) -> None:
    template = "a photo of a {} on a mat"
    target, anchor = (fed(flux, template.format(word))[0] for word in ("cat", "animal"))
    far = (target - anchor).norm(dim=1) / target.norm(dim=1)
    assert float(far.min()) > 0.01  # the first word's row too, and the padding's
    settings = {**PLAIN, "templates": [template], "lamb": 1e-6, "retain_scale": 0.0}
    every, last = (erase(flux, "cat", **settings, rows=rows) for rows in ("all", "last"))
    assert float(moved(every, target, anchor).min()) > 0.9
    assert float(moved(last, target, anchor)[:4].min()) < 0.5


def test_both_alphabets_of_sd3_are_mapped(sd3: Any) -> None:
    """Rows of T5 alone leave CLIP's as they are, and the other way about."""
    settings = {**PLAIN, "lamb": 1e-3, "retain_scale": 0.0, "rows": "last"}
    (target, _), (anchor, _) = fed(sd3, "cat"), fed(sd3, "animal")
    places = [1, CLIP_ROWS]  # the word's row of CLIP, and of T5

    def shares(**missing: None) -> list[float]:
        pipe = with_t5(tiny_sd3_pipe())
        for name, value in missing.items():
            setattr(pipe, name, value)
        erasure = erase(pipe, "cat", **settings, method="uce")
        return moved(erasure, target, anchor)[places].tolist()

    both, no_t5 = shares(), shares(text_encoder_3=None)
    no_clip = shares(text_encoder=None, text_encoder_2=None)
    assert min(both) > 0.95
    assert no_t5[0] > 0.95 and no_t5[1] < 0.5
    assert no_clip[1] > 0.95 and no_clip[0] < 0.5


def test_without_the_encoders_that_make_rows_there_is_nothing_to_fit(caplog: pytest.LogCaptureFixture) -> None:
    pipe = with_t5(tiny_sd3_pipe())
    pipe.text_encoder_3 = None
    erase(pipe, "cat", **COMMON, method="uce")
    assert "text_encoder_3 is not loaded" in caplog.text
    pipe.text_encoder = None
    with pytest.raises(ErasureCompatibilityError, match="text_encoder"):  # the halves stand side by side
        erase(pipe, "cat", **COMMON, method="uce")
    pipe = with_t5(tiny_flux_pipe())
    pipe.text_encoder_2 = None
    with pytest.raises(ErasureCompatibilityError, match="text_encoder_2"):
        erase(pipe, "cat", **COMMON, method="uce")


def test_the_pooled_door_has_a_map_of_its_own(flux: Any) -> None:
    (_, target), (_, anchor) = fed(flux, "cat"), fed(flux, "animal")
    for method in ("uce", "rece", "speed", "dp"):
        erasure = erase(flux, "cat", **COMMON, method=method, directions=0)
        change, way = mapped(erasure, POOLED) @ target, anchor - target
        share = float(change @ way / way.square().sum())
        assert share > 0.8
        assert share == pytest.approx(erasure.config.diagnostics["pooled"]["completeness"]["cat"], abs=0.02)
        alone = erase(flux, "cat", **COMMON, method=method, pooled=False)
        assert [layer.sites for layer in alone.config.layers] == [(ROWS,)]


def test_an_encoder_that_cuts_otherwise_is_mapped_by_itself() -> None:
    """A word that one tokenizer knows whole and the other in pieces: side by side no row holds both of its last pieces."""
    pipe = with_t5(tiny_sd3_pipe())
    pipe.tokenizer.add_tokens(["zeppelinish"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with pytest.raises(ErasureCompatibilityError, match="different numbers of pieces"):
        erase(pipe, "zeppelinish", **COMMON, per_encoder=False)
    erasure = erase(pipe, "zeppelinish", **{**COMMON, "templates": "none"}, rows="last", retain=[], retain_scale=1.0)
    rows, goal = fed(pipe, "zeppelinish")[0], fed(pipe, "animal")[0]
    pieces = [len(tokenizer("zeppelinish").input_ids) - 2 for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)]
    assert pieces[0] == 1 < pieces[1]
    for place, columns in zip(pieces, (slice(0, 16), slice(16, 32)), strict=True):
        x, g = torch.zeros(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
        x[columns], g[columns] = rows[place, columns], goal[1, columns]
        assert float(moved(erasure, x[None], g[None])) > 0.5


@pytest.mark.parametrize("method", ["uce", "rece", "speed", "dp"])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_methods_report_and_move_what_they_should(name: str, method: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(name)
    erasure = erase(pipe, "cat", **{**COMMON, "compare": True}, retain=["dog"], method=method)
    found = erasure.config.diagnostics
    sources = row_sources(pipe, per_encoder=True)
    shares = [float(moved(erasure, source.last(["cat"]), source.last(["animal"]))) for source in sources]
    assert found["completeness"]["cat"] == pytest.approx(min(shares), abs=1e-3)
    assert ("start_token_change" in found) == (name == "sd3")
    assert found["collateral"]["words"] > 100 and found["collateral"]["quantiles"]["1"] > 0
    assert {layer.component for layer in erasure.config.layers} == {"transformer"}


def test_a_concept_takes_40_kilobytes_of_flux() -> None:
    """In half precision, of rows of width 4,096 and pooled vectors of 768, at the default's rank."""
    erasure = erase(with_t5(tiny_flux_pipe()), "cat", **COMMON, method="uce")
    ranks = [len(erasure.layer_tensors(layer)["A"]) for layer in erasure.config.layers]
    assert 2 * 2 * (ranks[0] * 4096 + ranks[1] * 768) <= 40_960
