"""Cards: the rendered examples, hostile text, and what the Hub's own parser makes of them."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from diffusers_erasure.cards import escape_markdown, is_edited, merge_card, render_card
from diffusers_erasure.methods import method_names
from diffusers_erasure.methods.citations import CITATIONS
from diffusers_erasure.schema import (
    LORA_FILE,
    TENSOR_FILE,
    BaseModel,
    Concept,
    ErasureConfig,
    LayerSpec,
    Library,
    Method,
    Stock,
)


CARDS = Path(__file__).resolve().parents[1] / "hub_cards"
HOSTILE = [
    "a\nb",
    "\n---\nlicense: stolen\n---\n",
    "--- ",
    "'\"quoted\"'",
    "x | y | z",
    "<script>alert(1)</script>",
    "<!-- hidden",
    "-->",
    "```python\nimport os\n```",
    "`code`",
    "{{ config.library }}",
    "{% raw %}",
    "![i](http://127.0.0.1/x.png)",
    "[l](javascript:alert(1))",
    "# heading",
    "&lt;b&gt;",
    "https://127.0.0.1/x",
    "www.x.y",
    "\u202egnp\u202c",
    "nul\x00 bell\x07",
    "\u2028line\u2029",
    "x" * 5000,
    "*bold* _it_ ~~s~~",
    "\\| \\",
    "😀 é 漢",
    "- lora\n- not-for-all-audiences",
    "null",
    "!!python/object:os.system",
]


def config(**changes: Any) -> ErasureConfig:
    layer = LayerSpec(
        "lora", "unet", ("mid_block.attentions.0.to_k", "mid_block.attentions.0.to_v"), LORA_FILE, "unet."
    )
    values: dict[str, Any] = {
        "schema": "1.0",
        "library": Library("diffusers_erasure", "0.1.0"),
        "method": Method(
            "uce",
            settings={
                "rows": "last",
                "templates": "object",
                "retain": ["a dog", "a horse"],
                "rank": None,
                "lamb": 1e-3,
            },
            versions={"torch": "2.13.0"},
            concept_settings=("retain", "templates"),
        ),
        "base_model": BaseModel("stable-diffusion", "CompVis/stable-diffusion-v1-4", "0" * 40),
        "concepts": (Concept("cat", "animal"), Concept("Van Gogh", None)),
        "layers": (layer,),
        "stock": Stock(LORA_FILE, 3.8e-8),
        "diagnostics": {"completeness": {"cat": 0.9899, "Van Gogh": 0.97}, "retained_change": {"median": 0.0252}},
        "results": {"erased_accuracy": {"before": 0.98, "after": 0.03}, "images": 400},
    }
    return ErasureConfig(**{**values, **changes})


def examples() -> dict[str, str]:
    full = config()
    text_map = LayerSpec("text_map", "unet", ("encoder_hidden_states",), TENSOR_FILE, "text_map.")
    redacted = dataclasses.replace(
        full,
        method=Method("uce", settings={"rows": "last"}, versions={"torch": "2.13.0"}),
        concepts=(Concept(None, None),) * 2,
        diagnostics={},
        results={},
        redacted=True,
    )
    local = config(base_model=BaseModel("stable-diffusion"), layers=(text_map,), stock=None, results={})
    return {
        "example_lora.md": render_card(full, "user/no-cat"),
        "example_text_map.md": render_card(local),
        "example_redacted.md": render_card(redacted, "user/redacted"),
    }


@pytest.mark.parametrize("name", ["example_lora.md", "example_redacted.md", "example_text_map.md"])
def test_the_examples_are_what_the_template_renders(name: str) -> None:
    """`UPDATE_CARDS=1 pytest tests/test_cards.py` writes them anew."""
    if os.environ.get("UPDATE_CARDS") == "1":
        (CARDS / name).write_text(examples()[name], encoding="utf-8")
    assert (CARDS / name).read_text(encoding="utf-8") == examples()[name]
    # the erased model's own example is kept in step by tests/test_exporting.py
    assert {*examples(), "example_erased_model.md"} == {path.name for path in CARDS.glob("example_*.md")}


def test_what_the_hub_reads() -> None:
    data = ModelCard(examples()["example_lora.md"]).data.to_dict()
    assert data == {
        "library_name": "diffusers",
        "base_model": "CompVis/stable-diffusion-v1-4",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-to-image",
        "tags": [
            "diffusers",
            "text-to-image",
            "stable-diffusion",
            "stable-diffusion-diffusers",
            "concept-erasure",
            "diffusers-erasure",
            "erasure-method:uce",
            "lora",
        ],
    }
    other = ModelCard(examples()["example_text_map.md"]).data.to_dict()
    assert "lora" not in other["tags"] and not {"base_model", "base_model_relation"} & set(other)
    for text in examples().values():
        card = ModelCard(text)
        assert ModelCard(str(card)).data.to_dict() == card.data.to_dict() and ModelCard(str(card)).text == card.text
    redacted = examples()["example_redacted.md"]
    assert not re.search(r"cat\b|Gogh|animal|dog", redacted.split("## Citation")[0])


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(text: str) -> None:
    plain = render_card(config())
    safe = dataclasses.replace(config().method, settings={"retain": [text], text: text}, versions={text: text})
    card = render_card(
        config(
            concepts=(Concept(text, text),),
            method=safe,
            diagnostics={"completeness": {text: text}},
            results={text: {text: [text, {"a": text}]}},
            base_model=BaseModel("stable-diffusion", text if text.isprintable() and len(text) <= 200 else "x y"),
        )
    )
    data = ModelCard(card).data.to_dict()
    expected = ModelCard(plain).data.to_dict()
    del expected["base_model"], expected["base_model_relation"]
    assert data == expected  # nothing entered the metadata
    body = ModelCard(card).text
    code = [line for line in body.splitlines() if line.startswith(("```", "~~~"))]
    assert code == [line for line in ModelCard(plain).text.splitlines() if line.startswith("```")]
    headings = [line for line in body.splitlines() if re.match(r"#{1,6} ", line)]
    assert headings[1:] == [line for line in ModelCard(plain).text.splitlines() if re.match(r"#{1,6} ", line)][1:]
    assert body.count("<") == 1 and body.count("<!--") == 1  # the seal alone
    assert "\x00" not in card and "\u202e" not in card and "---\nlicense" not in card
    for line in body.splitlines():  # every row of every table has two cells
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3, line
    assert not is_edited(card)


def test_hostile_method_and_base_names_in_yaml() -> None:
    for text in HOSTILE:
        method = f"m{text}"[:64]
        if not method.isprintable():
            continue
        card = render_card(config(method=Method(method)))
        assert f"erasure-method:{method}" in yaml.safe_load(card.split("---\n")[1])["tags"]


def test_escaped_markdown_is_one_short_line() -> None:
    for text in HOSTILE:
        assert "\n" not in escape_markdown(text) and len(escape_markdown(text)) < 1300
    assert escape_markdown("a photo of a cat, 0.5") == "a photo of a cat, 0.5"
    many = render_card(config(concepts=tuple(Concept(f"c{i}") for i in range(10_000))))
    assert len(many) < 20_000 and "9950 more are listed" in many


def test_merging() -> None:
    old, new = render_card(config(), "user/a"), render_card(config(concepts=(Concept("dog", "animal"),)), "user/a")
    assert not is_edited(old) and merge_card(old, old) == (old, False)
    assert merge_card(old, new)[0] == ModelCard(new).content  # the keys keep their order too
    windows = old.replace("\n", "\r\n")
    assert not is_edited(windows)
    edited = old.replace("## Limits", "## My limits")
    assert is_edited(edited)
    text, kept = merge_card(edited, new)
    assert kept and "## My limits" in text and ModelCard(text).data.to_dict() == ModelCard(new).data.to_dict()
    assert merge_card(text, new) == (text, True)  # a second time changes nothing
    assert merge_card("", new)[1] is False and merge_card("just text", new)[1] is True
    added, _ = merge_card("---\nlicense: mit\ntags: mine\nlanguage: en\n---\n", new)
    data = ModelCard(added).data.to_dict()
    assert data["license"] == "mit" and data["tags"][-1] == "mine" and data["language"] == "en"
    local, _ = merge_card(old, examples()["example_text_map.md"])
    assert "base_model" not in ModelCard(local).data.to_dict() and "lora" not in ModelCard(local).data.tags
    for broken in (
        "---\n- a: [\n---\n",
        "---\n- a\n---\n",
        "---\n1: 2\n---\n",
        "---\na: !!python/name:os.system\n---\n",
    ):
        with pytest.raises(ValueError):
            merge_card(broken, new)


def test_each_method_has_its_citation() -> None:
    for name in method_names():
        citation = CITATIONS[name]
        assert citation.url.startswith("https://") and citation.bibtex.startswith("@") and str(citation.year)
        assert citation.title in citation.bibtex
