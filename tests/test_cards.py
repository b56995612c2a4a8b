"""Cards: the rendered examples, hostile text, and what the Hub's own parser makes of them."""

import copy
import dataclasses
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from diffusers_erasure import Erasure, ErasureHubError, ErasureInputError, demo
from diffusers_erasure.base_model import describe_base
from diffusers_erasure.cards import escape_markdown, is_edited, merge_card, render_card
from diffusers_erasure.compat import hub_transport_error
from diffusers_erasure.hub.beside import (
    MAX_CARD_BYTES,
    MAX_PICTURE_BYTES,
    MAX_PICTURES,
    RECORD_FILE,
    Beside,
    FolderOrigin,
    Record,
    Sight,
    keep_record,
    linked_pictures,
)
from diffusers_erasure.hub.client import TIMEOUT, TIMEOUT_CACHED
from diffusers_erasure.hub.joining import join, pushed_card
from diffusers_erasure.hub.transfer import Snapshot
from diffusers_erasure.registry import BUILT_IN
from diffusers_erasure.schema import (
    LORA_FILE,
    SCHEMA,
    TENSOR_FILE,
    BaseModel,
    Concept,
    ErasureConfig,
    LayerSpec,
    Library,
    Method,
    Stock,
)
from diffusers_erasure_cli.demo import Accuracy, with_results
from tests.helpers import images, random_erasure, style_lora, tiny_sd_pipe


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
        "schema": SCHEMA,
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


GATES: dict[str, Any] = {
    "names": 5,
    "contexts": {"fitting": 20, "setting": 10, "testing": 10},
    "missed": {"cat": 0.05, "Van Gogh": 0.0},
    "kept_tested": 384,
    "kept_opened": 2,
}


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
    gated_map = LayerSpec("gated_map", "unet", ("encoder_hidden_states",), TENSOR_FILE, "gated_map.")
    gated = config(
        method=Method("gated", settings={"preset": "object", "contexts": 40}),
        layers=(gated_map,),
        stock=Stock(LORA_FILE, 0.069, "approximate", {"uce": {"completeness": {"cat": 0.935, "Van Gogh": 0.931}}}),
        diagnostics={"completeness": {"cat": 1.0, "Van Gogh": 0.934}, "gates": GATES},
        results={},
    )
    local = config(base_model=BaseModel("stable-diffusion"), layers=(text_map,), stock=None, results={})
    return {
        "example_lora.md": render_card(full, "user/no-cat"),
        "example_text_map.md": render_card(local),
        "example_redacted.md": render_card(redacted, "user/redacted"),
        "example_gated.md": render_card(gated, "user/gated"),
    }


@pytest.mark.parametrize("name", ["example_lora.md", "example_redacted.md", "example_text_map.md", "example_gated.md"])
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


def test_what_is_told_of_gates() -> None:
    text = " ".join(examples()["example_gated.md"].split())
    for part in (
        "act in diffusers-erasure alone; no LoRA has them",
        "Calibrated for 5 name(s) on 40 contexts",
        "missed 5 % of a target's prompts at most, and opened for 2 of 384 prompts",
        "UCE's linear edit of the same concepts",
        "0.931 at least",
        "so that no probe sees the concept's name",
    ):
        assert part in text, part
    assert "## Citation" not in text and "## Gates" not in examples()["example_lora.md"]
    layer = LayerSpec("gated_map", "unet", ("encoder_hidden_states",), TENSOR_FILE, "gated_map.")
    # What a file tells may be anything.
    for told in (
        None,
        [],
        "x",
        {"names": "5", "contexts": 3, "missed": [1]},
        {"contexts": {"a": True}, "kept_tested": None},
    ):
        card = render_card(config(layers=(layer,), stock=None, diagnostics={"gates": told}))
        assert "## Gates" in card and "Calibrated" not in card and "held out" not in card
    few = {**GATES, "contexts": dict.fromkeys(("fitting", "setting", "testing"), 1)}
    assert "on 1 contexts" in render_card(config(layers=(layer,), stock=None, diagnostics={"gates": few}))


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
    names = [method for text in HOSTILE if (method := f"m{text}"[:64]).isprintable()]
    assert len(names) > 5
    for method in names:
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
    assert merge_card(old, new) == (new, False)
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
    """But for the library's own, whose cards have no such section."""
    assert [declared.name for declared in BUILT_IN if declared.citation is None] == ["gated"]
    for declared in BUILT_IN:
        citation = declared.citation
        if citation is None:
            card = render_card(config(method=Method(declared.name)))
            assert "Citation" not in card and declared.summary.split(":")[0] in card
            continue
        assert citation.url.startswith("https://") and citation.bibtex.startswith("@") and str(citation.year)
        assert citation.title in citation.bibtex


# ------------------------------------------------------------------------------------- what lies beside an erasure


def beside(card: str | None, **more: Any) -> Beside:
    return Beside(card, **{"where": "there", **more})


def text_of(card: str) -> str:
    return re.sub(r"<!--.*?-->", "", ModelCard(card).text).strip()


FRESH = render_card(config(), "user/a")
MINE, THEIRS, OLD = (FRESH.replace("## Limits", f"{who} words.\n\n## Limits") for who in ("My", "Their", "Old"))


@pytest.mark.parametrize(
    ("local", "hub", "then", "expected"),
    [
        (None, None, None, FRESH),
        (FRESH, None, None, FRESH),
        (None, THEIRS, None, THEIRS),
        (MINE, None, None, MINE),
        (MINE, FRESH, None, MINE),
        (FRESH, THEIRS, None, THEIRS),
        (MINE, MINE, None, MINE),
        (MINE, THEIRS, None, None),
        (MINE, THEIRS, (MINE, MINE), THEIRS),
        (MINE, THEIRS, (THEIRS, THEIRS), MINE),
        (MINE, THEIRS, (OLD, OLD), None),
        (FRESH, THEIRS, (THEIRS, THEIRS), FRESH),  # taken out here
        (MINE, FRESH, (MINE, MINE), FRESH),  # taken out there
        (MINE, THEIRS, (MINE, OLD), THEIRS),
    ],
)
def test_which_text_holds(
    local: str | None, hub: str | None, then: tuple[str, str] | None, expected: str | None
) -> None:
    record = None if then is None else Record("user/a@main", Sight(then[0], {}), Sight(then[1], {}))
    sides = beside(local, record=record, where="mine"), beside(hub, place="user/a@main")
    if expected is None:
        with pytest.raises(ErasureInputError, match='of mine and of there.*the text.*card="local".*--card'):
            join(FRESH, *sides)
        assert join(FRESH, *sides, card="local").card == MINE and join(FRESH, *sides, card="hub").card == THEIRS
    else:
        assert join(FRESH, *sides).card == expected
    if then == (MINE, MINE) and hub == THEIRS:  # of another repository nothing is known
        with pytest.raises(ErasureInputError):
            join(FRESH, sides[0], beside(hub, place="user/b@main"))


def test_which_metadata_holds() -> None:
    def card(extra: str, tag: str = "") -> str:
        text = FRESH.replace("pipeline_tag:", f"{extra}pipeline_tag:")
        return text.replace("- lora\n", f"- lora\n- {tag}\n") if tag else text

    def joined(local: str, hub: str, then: str | None = None, **more: Any) -> dict[str, Any]:
        record = None if then is None else Record("user/a@main", Sight(then, {}), Sight(then, {}))
        result = join(FRESH, beside(local, record=record), beside(hub, place="user/a@main"), **more)
        assert text_of(result.card) == text_of(FRESH)
        return ModelCard(result.card).data.to_dict()

    both = joined(card("license: mit\n", "mine"), card("language: en\n", "theirs"))
    assert (both["license"], both["language"]) == ("mit", "en") and both["tags"][-2:] == ["theirs", "mine"]
    mit, apache = card("license: mit\n"), card("license: apache-2.0\n")
    with pytest.raises(ErasureInputError, match="`license` of the metadata"):
        joined(mit, apache)
    assert joined(mit, apache, card="local")["license"] == "mit"
    assert joined(mit, apache, card="hub")["license"] == "apache-2.0"
    assert joined(mit, apache, then=mit)["license"] == "apache-2.0"
    assert joined(mit, apache, then=apache)["license"] == "mit"
    assert "license" not in joined(FRESH, mit, then=mit)  # taken out here
    assert "license" not in joined(mit, FRESH, then=mit)  # taken out there
    assert "mine" not in joined(card("", "mine"), FRESH, then=card("", "mine"))["tags"]
    assert join(FRESH, beside(mit), beside(mit)).card == mit  # to the byte


def test_which_pictures_hold() -> None:
    def joined(
        local: dict[str, bytes], hub: dict[str, bytes], then: dict[str, bytes] | None = None
    ) -> dict[str, bytes]:
        seen = None if then is None else Beside(FRESH, then).sight()
        record = None if seen is None else Record("user/a@main", seen, seen)
        sides = beside(FRESH, pictures=local, record=record), beside(FRESH, pictures=hub, place="user/a@main")
        return join(FRESH, *sides).pictures

    assert joined({"a.png": b"1"}, {"b.png": b"2"}) == {"a.png": b"1", "b.png": b"2"}
    assert joined({"a.png": b"1"}, {"a.png": b"2"}, {"a.png": b"1"}) == {"a.png": b"2"}
    assert joined({"a.png": b"1"}, {"a.png": b"2"}, {"a.png": b"2"}) == {"a.png": b"1"}
    assert joined({}, {"a.png": b"2"}, {"a.png": b"2"}) == {"a.png": b"2"}  # none is taken away
    with pytest.raises(ErasureInputError, match=r"picture a\.png"):
        joined({"a.png": b"1"}, {"a.png": b"2"})


PNG = b"\x89PNG\r\n\x1a\n"


def test_pictures_that_a_card_may_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["a.png", "b.JPG", "c.webp", "d.jpeg", "e.png"]
    card = """![x](a.png) [y](./b.JPG "title") <img width=3 src="c.webp"> [z]: d.jpeg
    ![no](../secret.png) ![no](/etc/x.png) ![no](sub/x.png) ![no](https://127.0.0.1/x.png) [e](e.png) [f](f.gif) e.txt"""
    assert linked_pictures(card + " ") == ["before_after.png", *names]
    folder = tmp_path / "erasure"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "README.md").write_text(card)
    (folder / "a.png").write_bytes(PNG)
    (folder / "b.JPG").symlink_to(tmp_path / "secret.png")  # leads out
    (folder / "c.webp").write_bytes(b"RIFFxxxxWEBP")
    (folder / "d.jpeg").write_bytes(b"no picture")
    with open(folder / "e.png", "wb") as file:
        file.write(PNG)
        file.truncate(MAX_PICTURE_BYTES + 1)
    found = FolderOrigin(folder).beside()
    assert set(found.pictures) == {"a.png", "c.webp"} and found.card == card
    assert all(name in caplog.text for name in ("b.JPG", "d.jpeg", "e.png"))
    many = "".join(f"![x](p{i}.png) " for i in range(100))
    (folder / "README.md").write_text(many)
    for i in range(100):
        (folder / f"p{i}.png").write_bytes(PNG)
    assert len(FolderOrigin(folder).beside().pictures) == MAX_PICTURES - 1  # there is no before_after.png


@pytest.mark.parametrize("odd", [b"---\n- a: [\n---\n", b"\xff\xfe", b"x" * (MAX_CARD_BYTES + 1)])
def test_an_odd_card_is_no_obstacle_and_is_not_lost(odd: bytes, tmp_path: Path) -> None:
    random_erasure(tiny_sd_pipe()).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_bytes(odd)
    (tmp_path / "a" / RECORD_FILE).write_bytes(odd)
    erasure = Erasure.from_pretrained(tmp_path / "a")
    erasure.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_bytes() == odd
    erasure.save_pretrained(tmp_path / "b")
    assert not is_edited((tmp_path / "b" / "README.md").read_text(encoding="utf-8"))
    with pytest.raises(ErasureInputError, match="cannot be kept"):
        erasure.push_to_hub("user/a", base_model="user/base")


def test_a_record_that_is_none() -> None:
    good = Record("user/a@main", Sight("card", {"a.png": "0"}), Sight(None, {}))
    assert Record.from_bytes(good.to_bytes()) == good
    for odd in (b"", b"[]", b"{}", b'{"place": 1, "local": 2, "hub": 3}', b"[" * 100_000, b"\xff"):
        assert Record.from_bytes(odd) is None


def test_the_embedded_model_is_recognised() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert demo.is_embedded(describe_base(demo.load_pipeline(dtype)))
    pipe = demo.load_pipeline()
    text = render_card(config(base_model=describe_base(pipe)))
    assert "pipe = demo.load_pipeline()" in text and "BASE_MODEL" not in text and "embedded model" in text
    with torch.no_grad():
        pipe.unet.conv_in.weight += 1
    assert not demo.is_embedded(describe_base(pipe)) and not demo.is_embedded(BaseModel("stable-diffusion"))
    assert "BASE_MODEL" in render_card(config(base_model=describe_base(pipe)))


def test_a_base_model_from_a_folder_has_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder "models/base" looks like a repository's id."""
    demo.load_pipeline().save_pretrained(tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    pipe = DiffusionPipeline.from_pretrained("models/base")
    assert describe_base(pipe).repo is None
    monkeypatch.chdir(tmp_path / "models")
    assert describe_base(pipe).repo == "models/base"  # no such folder here, so an id


def test_a_plain_lora_says_that_it_is_one(tmp_path: Path) -> None:
    pipe = tiny_sd_pipe()
    (tmp_path / "lora").mkdir()
    save_file(style_lora(pipe), tmp_path / "lora" / LORA_FILE)
    pipe.load_erasure(tmp_path / "lora", "style", method="lora")
    drawn = images(pipe)
    pipe.save_erasure(tmp_path / "erasure")
    card = (tmp_path / "erasure" / "README.md").read_text(encoding="utf-8")
    assert "# A plain LoRA" in card and "were not recorded" in card and "layers that are no LoRA" not in card
    assert 'weight_name="pytorch_lora_weights.safetensors"' in card and 'pipe.load_erasure("PATH_OR_REPO")' in card
    assert (
        "the concepts below" not in card and "It lowers the chance" not in card and "lora" in ModelCard(card).data.tags
    )
    stock = tiny_sd_pipe()  # and what the card says of diffusers alone is true
    stock.load_lora_weights(tmp_path / "erasure", weight_name="pytorch_lora_weights.safetensors")
    assert abs(images(stock) - drawn).max() < 1e-4 and abs(images(tiny_sd_pipe()) - drawn).max() > 0.01
    named = Erasure.from_pretrained(tmp_path / "erasure").with_base_model("user/base")
    assert "as its publisher states" in pushed_card(named, "user/style")
    assert 'from_pretrained("user/base")' in pushed_card(named, "user/style")


def test_what_the_demo_measured_is_recorded() -> None:
    erasure = random_erasure(tiny_sd_pipe())
    found = with_results(erasure, Accuracy(1.0, 0.99), Accuracy(0.125, 0.98), 200)
    assert found.config.results["erased_accuracy"] == {"before": 1.0, "after": 0.125}
    card = render_card(found.config)
    assert "| erased\\_accuracy, after | 0.125 |" in card and "| images | 200 |" in card
    assert "No measurements" not in card
    assert found.to_files() == with_results(erasure, Accuracy(1.0, 0.99), Accuracy(0.125, 0.98), 200).to_files()


def test_a_redacted_folder_keeps_no_record(tmp_path: Path) -> None:
    erasure = random_erasure(tiny_sd_pipe())
    erasure.save_pretrained(tmp_path / "a")
    keep_record(tmp_path / "a", Record("user/a@main", Sight(FRESH, {}), Sight(FRESH, {})))
    erasure.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / RECORD_FILE).is_file()
    erasure.save_pretrained(tmp_path / "a", redact_concepts=True)
    assert not (tmp_path / "a" / RECORD_FILE).exists()
    assert b"zebra" not in b"".join(path.read_bytes() for path in (tmp_path / "a").iterdir())


@pytest.mark.parametrize("edit", [False, True])
def test_a_new_erasure_over_another_ones_card(edit: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_sd_pipe()
    old, new = random_erasure(pipe), random_erasure(pipe, seed=1, concepts=(Concept("yak", "cow"),))
    assert old.config.concepts != new.config.concepts
    readme, picture = tmp_path / "README.md", tmp_path / "before_after.png"
    old.save_pretrained(tmp_path)
    picture.write_bytes(PNG)
    if edit:
        readme.write_text(readme.read_text(encoding="utf-8").replace("## Limits", "My zebra.\n\n## Limits"), "utf-8")
    old.save_pretrained(tmp_path)  # the same one: its own text and picture
    old.save_pretrained(tmp_path, dtype="float16")
    text = readme.read_text(encoding="utf-8")
    assert ("(before_after.png)" in text, "My zebra." in text) == (not edit, edit)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    new.save_pretrained(tmp_path)
    told = " ".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "before_after.png" in told and picture.read_bytes() == PNG
    assert ("check it" in told) == edit
    text = readme.read_text(encoding="utf-8")
    assert ("My zebra." in text) == edit and "(before_after.png)" not in text


@pytest.mark.parametrize(("strict", "asked", "limit"), [(False, 1, TIMEOUT_CACHED), (True, 3, TIMEOUT)])
def test_a_card_that_can_be_done_without_is_not_waited_for(
    strict: bool, asked: int, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def hang(*_: Any, timeout: float, **__: Any) -> None:
        limits.append(timeout)
        raise hub_transport_error()("timed out")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", hang)
    monkeypatch.setattr("diffusers_erasure.hub.client.WAITS", (0.0, 0.0))
    there = Snapshot("user/a", "0" * 40, "user/a@main", cache_dir=str(tmp_path))
    if strict:
        with pytest.raises(ErasureHubError):
            there.beside(strict=True)
    else:
        assert there.beside() == Beside(where="user/a", place="user/a@main")
    assert limits == [limit] * asked


def test_a_token_is_in_no_copy() -> None:
    there = Snapshot("user/a", "0" * 40, "user/a@main", token="hf_secret")
    for copied in (copy.deepcopy(there), pickle.loads(pickle.dumps(there))):
        assert copied == dataclasses.replace(there, token=None)
    assert there.token == "hf_secret" and "hf_secret" not in repr(there)
