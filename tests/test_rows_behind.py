"""The row of the end token as a further mapped row (`eot`), and the weight of rows behind the word (`after_weight`)."""

from typing import Any

import pytest
import torch

from diffusers_erasure import ErasureInputError, combine, demo, erase
from diffusers_erasure.encoding import row_sources
from diffusers_erasure.methods.rows import target_rows
from diffusers_erasure.methods.uce import Config, Settings
from diffusers_erasure.schema import Concept
from diffusers_erasure.settings import resolve
from tests.flow_pipes import tiny_flux_pipe, tiny_sd3_pipe
from tests.helpers import ROUNDINGS, edits, roundings, tiny_sdxl_pipe
from tests.test_doors_fit import fed, with_t5
from tests.test_uce import Rows, dense, live_rows
from tests.tiny_texts import TOLD


CLOSED = ["uce", "rece", "speed", "dp", "oce"]
PLAIN: dict[str, Any] = {
    "templates": "none",
    "lamb": 0.5,
    "absolute": True,
    "retain_scale": 0.3,
    "push": 0.0,
    "layer": "text_map",
}


@pytest.fixture(autouse=True)
def nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ERASURE_CACHE", "off")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return demo.load_pipeline()


def picked(pipe: Any, weight: float, *, every: bool = False) -> torch.Tensor:
    """UCE's map of the word's row and that behind it, or of all behind it, with their weight; nothing is retained."""
    (cat, ice, animal, empty), last = live_rows(pipe, ["cat", "ice cream", "animal", ""])
    e, g = [], []
    for target, f, anchor, h in ((cat, last[0], animal, last[2]), (ice, last[1], empty, 0)):
        count = len(target) - max(f, h) if every else 2
        roots = torch.tensor([1.0, *[weight**0.5] * (count - 1)], dtype=torch.float64)[:, None]
        e.append(roots * target[f : f + count])
        g.append(roots * anchor[h : h + count])
    rows = Rows(torch.cat(e), torch.cat(g), cat[:0])
    return dense(torch.eye(128, dtype=torch.float64), rows, 1.0, 0.0, 0.5)


@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("rows", ["eot", "window"])
def test_rows_behind_the_word_are_mapped_with_their_weight(pipe: Any, rows: str, weight: float) -> None:
    given = {"rows": "last", "eot": True} if rows == "eot" else {"rows": "window"}
    erasure = erase(
        pipe, ["cat", "ice cream"], anchors=["animal", ""], retain=(), retain_rows="last", compare=False, **PLAIN,
        **given, after_weight=weight,
    )  # fmt: skip
    expected = picked(pipe, weight, every=rows == "window")
    assert roundings(edits(erasure)["map"], expected) <= ROUNDINGS
    assert roundings(edits(erasure)["map"], picked(pipe, 0.5, every=rows == "window")) > 100 * ROUNDINGS
    recorded = erasure.config.method.settings
    assert (recorded["eot"], recorded["after_weight"]) == (rows == "eot", weight)


@pytest.mark.parametrize("method", CLOSED)
def test_the_default_weight_changes_no_bit(pipe: Any, method: str) -> None:
    common: dict[str, Any] = {"anchors": "animal", "retain": ["dog"], "method": method, "compare": False}
    for more in ({}, {"rows": "window"}, {"rows": "last", "eot": True}):
        plain, told = (erase(pipe, "cat", **common, **more, **given) for given in ({}, {"after_weight": 1.0}))
        assert plain.content_hash == told.content_hash
        for name, tensors in plain.tensors.items():
            assert all(torch.equal(value, told.tensors[name][key]) for key, value in tensors.items())
    off = erase(pipe, "cat", **common, eot=False, after_weight=1.0)
    assert off.content_hash == erase(pipe, "cat", **common).content_hash


@pytest.mark.parametrize("method", CLOSED)
def test_every_closed_form_maps_the_end_token_too(pipe: Any, method: str) -> None:
    """What is made of that row goes to the anchor's, where nothing like it is retained; OCE turns what it makes, this way or that."""
    common: dict[str, Any] = {"anchors": "animal", "retain": (), "method": method, "compare": False}
    more = {} if method == "oce" else {"max_error": 0.0, "rows": "last", "retain_rows": "last"}
    without, having = (erase(pipe, "cat", **common, **more, templates="none", eot=eot) for eot in (False, True))
    (cat, animal), last = live_rows(pipe, ["cat", "animal"])
    row, goal = cat[last[0] + 1], animal[last[1] + 1]
    shares = []
    for erasure in (without, having):
        site = next(name for name in edits(erasure) if name == "map" or name.endswith("to_v"))
        weight = (
            torch.eye(128, dtype=torch.float64)
            if site == "map"
            else pipe.unet.get_submodule(site.partition(".")[2]).weight.detach().double()
        )
        way = weight @ (goal - row)
        shares.append(float(edits(erasure)[site] @ row @ way / way.square().sum()))
    # SPEED's null space is that of the empty prompt's rows here, and those lie near.
    least = {"speed": 0.1, "oce": -1.0}.get(method, 0.8)
    assert shares[1] > least and abs(shares[1] - shares[0]) > 0.01
    rows = having.config.solve.rows["encoder_hidden_states"] if having.config.solve else None
    assert rows is not None and (rows.count, rows.prompts) == (2, 1)


def test_the_end_tokens_row_is_that_which_the_pipeline_feeds(pipe: Any) -> None:
    prompts = ["", "cat", "a photo of a cat", "ice cream"]
    rows, last = live_rows(pipe, prompts)
    places = [len(pipe.tokenizer(prompt).input_ids) - 1 for prompt in prompts]
    assert places[1:] == [each + 1 for each in last[1:]] and places[0] == 1
    (source,) = row_sources(pipe)
    assert (
        roundings(source.ends(prompts), torch.stack([row[i] for row, i in zip(rows, places, strict=True)]))
        <= ROUNDINGS
    )
    xl = tiny_sdxl_pipe()
    (source,) = row_sources(xl)
    every, last = source.all(["cat", "a photo of a cat"])
    expected = torch.stack([row[i + 1] for row, i in zip(every, last, strict=True)])
    assert roundings(source.ends(["cat", "a photo of a cat"]), expected) <= ROUNDINGS


@pytest.mark.parametrize("make", [tiny_flux_pipe, tiny_sd3_pipe], ids=["flux", "sd3"])
def test_of_t5_it_is_its_end_token(make: Any) -> None:
    pipe = with_t5(make())
    prompts = ["", "cat", "a photo of a cat on a mat"]
    source = row_sources(pipe)[-1]
    tokenizer = getattr(pipe, "tokenizer_3", None) or pipe.tokenizer_2
    offset = 24 if hasattr(pipe, "tokenizer_3") else 0  # CLIP's rows stand first
    for prompt, found in zip(prompts, source.ends(prompts), strict=True):
        ids = tokenizer(prompt).input_ids
        assert ids[-1] == tokenizer.eos_token_id
        width = found.shape[-1]
        longest = source.all([prompt])[0][0]
        assert roundings(found, longest[len(ids) - 1]) <= ROUNDINGS and width == longest.shape[-1]
        assert offset or roundings(found, row_of(pipe, prompt, len(ids) - 1)) <= ROUNDINGS
    settings = resolve(Config(rows="last", eot=True, templates="none"), Settings)
    found = target_rows(pipe, [Concept("cat", "animal")], settings)
    assert len(found["encoder_hidden_states"].targets) == 2 * len(row_sources(pipe, per_encoder=True))
    assert len(found["pooled_projections"].targets) == 1  # of which there is one for a prompt


def row_of(pipe: Any, prompt: str, place: int) -> torch.Tensor:
    """The pipeline's own row; the length of its rows matters, as T5 reads padding."""
    source = row_sources(pipe, length=20)[-1]
    assert roundings(source.all([prompt])[0][0], fed(pipe, prompt)[0]) <= ROUNDINGS
    return row_sources(pipe)[-1].all([prompt])[0][0][place]


@pytest.mark.parametrize("name", [name for name, told in TOLD.items() if not told.padded])
def test_where_prompts_end_in_no_such_token_it_is_an_error(name: str) -> None:
    """Chat templates and prompts without an end token; T5's have one."""
    pipe = TOLD[name].make()
    given: dict[str, Any] = {"anchors": "animal", "rows": "last", "eot": True, "templates": "none", "compare": False}
    given |= {"retain": ["dog"], "retain_default": "none", "directions": 0}
    if type(pipe.text_encoder).__name__ in ("T5EncoderModel", "UMT5EncoderModel"):
        found = erase(pipe, "cat", **given, method="uce").config.solve
        assert found is not None and [rows.count for rows in found.rows.values()] == [2]
        return
    with pytest.raises(ErasureInputError, match="ends in none. Leave `eot` out"):
        erase(pipe, "cat", **given, method="uce")


def test_parts_with_other_rows_are_not_joined(pipe: Any) -> None:
    common: dict[str, Any] = {"anchors": "animal", "retain": ["dog"], "compare": False}
    one, two, plain = (
        erase(pipe, word, **common, **more, method="uce")
        for word, more in (("cat", {"eot": True}), ("shark", {"eot": True}), ("shark", {}))
    )
    whole = erase(pipe, ["cat", "shark"], **common, eot=True)
    joint = combine([one, two], pipe=pipe)
    assert (edits(joint)["map"] - edits(whole)["map"]).norm() <= 1e-4 * edits(whole)["map"].norm()
    with pytest.raises(ErasureInputError, match="`eot` is True in the first erasure and False"):
        combine([one, plain], pipe=pipe)


@pytest.mark.parametrize("bad", [{"after_weight": 0.0}, {"after_weight": float("inf")}, {"eot": "yes"}], ids=str)
def test_bad_values_are_named(pipe: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(ErasureInputError, match=next(iter(bad))):
        erase(pipe, "cat", **bad)
