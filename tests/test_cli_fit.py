"""The commands `combine`, `lists` and `cache`, and lists given to `erase`, as a user meets them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_erasure import Erasure, cache
from diffusers_erasure.lists import list_names, read_list
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.schema import LORA_FILE
from tests.commands import answer, fails, invoke


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's; and the current folder is an empty one."""
    work, place = tmp_path / "work", tmp_path / "cache"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv(cache.VARIABLE, str(place))
    return place


# --------------------------------------------------------------------------------------------------------- lists


def test_lists() -> None:
    counts = answer("lists")
    assert counts == {name: len(read_list(name)) for name in list_names()}
    shown = invoke("lists").stdout
    for name, count in counts.items():
        assert f"list:{name}  {count} entries" in shown


def test_one_list() -> None:
    entries = read_list("objects")
    assert invoke("lists", "objects").stdout.splitlines() == entries
    assert invoke("lists", "list:artists").stdout.splitlines() == read_list("artists")
    assert answer("lists", "artists") == read_list("artists")
    assert "Dürer" in invoke("lists", "artists", "--json").stdout


def test_an_unknown_list(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    message = fails(monkeypatch, capfd, "lists", "painters")
    assert "no list 'painters'" in message and "list:artists" in message


# --------------------------------------------------------------------------------------------------------- cache


def test_cache_show_and_clear(folder: Path) -> None:
    empty = "".join(invoke("cache").stdout.split())  # long paths are wrapped
    assert str(folder) in empty and "0entries" in empty and "kind" not in empty
    assert answer("cache") == {"folder": str(folder), "entries": []}
    assert answer("cache", "clear") == {"deleted": 0, "bytes": 0}

    for kind, key in (("rows", "a"), ("rows", "b"), ("gram", "a")):
        cache.fetch(kind, lambda key=key: [key], lambda: {"rows": torch.ones(300, 300, dtype=torch.float64)})
    found = answer("cache")["entries"]
    assert [entry["kind"] for entry in found] == ["gram", "rows", "rows"]
    assert all(Path(entry["path"]).stat().st_size == entry["size"] for entry in found)
    shown = invoke("cache").stdout
    assert "3 entries, 1.1 MB" in shown.replace("\n", "")
    for text in (cache.KINDS["rows"], cache.KINDS["gram"], "0.7"):
        assert text in shown
    assert cache.KINDS["pooled"] not in shown

    assert answer("cache", "clear", "--kind", "rows") == {"deleted": 2, "bytes": 2 * found[1]["size"]}
    assert [entry["kind"] for entry in answer("cache")["entries"]] == ["gram"]
    assert invoke("cache", "clear").stdout.strip() == "1 entries, 0.4 MB"
    assert list(folder.iterdir()) == []


def test_the_cache_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, "off")
    assert f"The cache is off (${cache.VARIABLE})" in invoke("cache").stdout
    assert answer("cache") == {"folder": None, "entries": []}
    assert answer("cache", "clear")["deleted"] == 0


def test_an_unknown_kind(folder: Path) -> None:
    cache.fetch("rows", lambda: ["a"], lambda: {"rows": torch.ones(2, dtype=torch.float64)})
    wrong = invoke("cache", "clear", "--kind", "row", code=2)
    assert "'row'" in wrong.output and all(kind in wrong.output for kind in cache.KINDS)
    assert len(cache.entries()) == 1


# --------------------------------------------------------------------------------------------------------- erase


def test_erase_with_lists(folder: Path) -> None:
    Path("targets.csv").write_text("id,concept\n1,cat\n2,pizza\n3,cat\n", encoding="utf-8-sig")
    command = (
        "erase",
        "targets.csv",
        "--retain",
        "list:objects",
        "--retain",
        "my dog",
        "--anchor",
        "",
        "--set",
        "rank=4",
        "--method",
        "uce",
    )
    made = answer(*command, "-o", "out")
    assert set(made["diagnostics"]["completeness"]) == {"cat", "pizza"}
    assert {entry["kind"] for entry in answer("cache")["entries"]} == {"gram", "null", "rows"}
    erasure = Erasure.from_pretrained("out")
    assert [(concept.target, concept.anchor) for concept in erasure.concepts] == [("cat", ""), ("pizza", "")]
    settings = erasure.config.method.settings
    assert settings["retain"] == ["list:objects", "my dog"] and settings["retain_excluded"] == ["cat", "pizza"]
    assert settings["retain_prompts"] == len(read_list("objects")) + 1 - 2
    # What an artefact records can be given again.
    again = answer(
        "erase", "cat", "pizza", *(f"--retain={r}" for r in settings["retain"]), *command[6:], "-o", "again"
    )
    assert again["files"] == made["files"]
    assert Erasure.from_pretrained("again").content_hash == erasure.content_hash


def test_erase_with_a_cache_that_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is made all the same, to the same bytes, with one warning."""
    folder.write_text("in the way")
    command = ("erase", "cat", "--retain", "list:characters", "--set", "retain_rows=last", "-o")
    answer(*command, "out")
    (message,) = [text for record in caplog.records if "cache entry" in (text := record.getMessage())]
    assert "cache clear" in message and folder.read_text() == "in the way"
    monkeypatch.setenv(cache.VARIABLE, "off")
    answer(*command, "again")
    config = "erasure_config.json"
    assert (Path("out") / config).read_bytes() == (Path("again") / config).read_bytes()


# ------------------------------------------------------------------------------------------------------- combine


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Erasures, made by the command line, by name."""
    place = tmp_path_factory.mktemp("parts")
    made = {
        "cat": ("cat", "--anchor", "animal", "--retain", "dog"),
        "pizza": ("pizza", "--anchor", "food", "--retain", "list:objects"),
        "secret": ("tree", "--redact", "--retain", "list:objects"),
        "lamb": ("house", "--set", "lamb=0.1"),
    }
    for name, arguments in made.items():
        invoke("erase", *arguments, "--method", "uce", "-o", str(place / name))
    return {name: str(place / name) for name in made}


def names(erasure: Erasure) -> list[Any]:
    return [(concept.target, concept.anchor) for concept in erasure.concepts]


def test_combine_jointly(parts: dict[str, str]) -> None:
    made = answer("combine", parts["cat"], parts["pizza"], "-o", "both", "--rank", "12")
    assert made["output"] == "both" and set(made["files"]) == {path.name for path in Path("both").iterdir()}
    assert all(Path("both", name).stat().st_size == size for name, size in made["files"].items())
    assert all(share > 0.5 for share in made["diagnostics"]["completeness"].values())
    both = Erasure.from_pretrained("both")
    assert names(both) == [("cat", "animal"), ("pizza", "food")]
    assert both.config.method.name == "uce"
    assert set(made["diagnostics"]["completeness"]) == {"cat", "pizza"}
    # What either retained is retained, without what the other removes.
    settings = both.config.method.settings
    assert settings["retain"] == ["dog", "list:objects"] and settings["rank"] == 12
    assert set(settings["retain_excluded"]) == {"cat", "pizza"}
    assert settings["retain_prompts"] == len(read_list("objects")) - 2

    command = ("combine", parts["cat"], parts["pizza"], "--retain", "dog", "--retain", "tree", "--half")
    assert answer(*command, "-o", "own")["files"].keys() == made["files"].keys()
    found = Erasure.from_pretrained("own")
    assert found.config.method.settings["retain"] == ["dog", "tree"]
    assert all(str(value.dtype) == "torch.float16" for items in found.tensors.values() for value in items.values())


def test_combine_as_a_sum(parts: dict[str, str]) -> None:
    made = answer("combine", parts["cat"], parts["lamb"], "--mode", "sum", "-o", "both")
    assert made["stock"]["error"] < 1e-5
    both = Erasure.from_pretrained("both")
    assert names(both) == [("cat", "animal"), ("house", "")]
    assert both.config.method.name == "sum"
    # Nothing of what the parts do is lost: each site's product is the sum of theirs.
    products = []
    for source in (parts["cat"], parts["lamb"], "both"):
        erasure = Erasure.from_pretrained(source)
        tensors = erasure.tensors[LORA_FILE]
        sites = [name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
        products.append({s: tensors[s + UP].double() @ tensors[s + DOWN].double() for s in sites})
    one, two, summed = products
    assert one.keys() == two.keys() == summed.keys()
    assert all(((one[s] + two[s]) - summed[s]).norm() <= 1e-6 * summed[s].norm() for s in summed)
    # And as text.
    shown = "".join(invoke("combine", parts["cat"], parts["lamb"], "--mode", "sum", "-o", "text").stdout.split())
    assert "erasure_config.json" in shown and "pytorch_lora_weights.safetensors" in shown


def test_a_redacted_part_makes_the_whole_redacted(parts: dict[str, str]) -> None:
    for mode in ("joint", "sum"):
        # Of the list that it retained the secret one no longer says which entries name its target.
        further = ("--retain", "dog") if mode == "joint" else ()
        made = invoke(
            "combine", parts["pizza"], parts["secret"], "--mode", mode, *further, "-o", mode, "--json"
        ).stdout
        assert not any(word in made for word in ("pizza", "food", "tree"))
        assert json.loads(made)["diagnostics"] == {}
        both = Erasure.from_pretrained(mode)
        assert both.config.redacted and names(both) == [(None, None)] * 2
        text = Path(mode, "erasure_config.json").read_text() + Path(mode, "README.md").read_text()
        assert not any(word in text for word in ("pizza", "tree"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cat",), "two or more"),
        (("cat", "cat"), "'cat'"),
        (("cat", "lamb"), "`lamb`"),
        (("cat", "./missing"), "missing"),
        (("cat", "pizza", "--mode", "add"), "'add'"),
        (("cat", "pizza", "--mode", "sum", "--retain", "dog"), "joint"),
        (("cat", "pizza", "--retain", "Pizza"), "both a target and a prompt to retain"),
        (("cat", "pizza", "--retain", "list:trees"), "no list 'trees'"),
        (("cat", "pizza", "--base", "./missing"), "no folder"),
        (("cat", "pizza", "--max-error", "2"), "max_error"),
    ],
)
def test_what_combine_refuses(
    arguments: tuple[str, ...], message: str, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    given = [parts.get(argument, argument) for argument in arguments]
    assert message in fails(monkeypatch, capfd, "combine", *given, "-o", "out")
    assert list(Path.cwd().iterdir()) == []


def test_wrong_usage_and_help(parts: dict[str, str]) -> None:
    for arguments in (
        ("combine", "-o", "x"),
        ("combine", parts["cat"]),
        ("combine", "a", "b", "-o", "x", "--rank", "-1"),
    ):
        invoke(*arguments, code=2)
    invoke("cache", "empty", code=2)
    for command, words in (("combine", "erasure of several"), ("lists", "lists that"), ("cache", "kept on disk")):
        assert words in invoke(command, "--help").stdout


# ------------------------------------------------------------------------------------------- repeating, training


@pytest.mark.parametrize(
    "how",
    [
        ("--method", "uce", "--set", "templates=style", "--retain", "dog", "--retain", "fox"),
        ("--method", "speed", "--retain", "list:objects", "--set", "preset=celebrity", "--set", "published=true"),
        ("--method", "rece", "--retain", "dog", "--set", "epochs=2"),
    ],
)
def test_config_repeats_a_closed_form_to_the_byte(how: tuple[str, ...]) -> None:
    invoke("erase", "cat", "--anchor", "animal", "-o", "first", *how)
    invoke("erase", "--config", "first", "-o", "second")
    files = [{path.name: path.read_bytes() for path in Path(name).iterdir()} for name in ("first", "second")]
    assert files[0] == files[1]
    invoke("erase", "--config", "first", "-o", "third", "--set", "max_error=0.5")
    assert Erasure.from_pretrained("third").config.method.settings["max_error"] == 0.5


def test_what_cannot_be_repeated_or_is_no_option(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    invoke("erase", "cat", "--anchor", "animal", "-o", "named")
    invoke("erase", "cat", "--anchor", "animal", "-o", "redacted", "--redact")
    Erasure.from_pretrained("named").rescaled(0.5).save_pretrained("half")
    for arguments, message in (
        (("--config", "redacted"), "redacted"),
        (("--config", "half"), "0.5 of its strength"),
        (("cat", "--resume"), "gated does not train"),
        (("cat", "--set", "retain=dog"), "an option of its own"),
        (("cat", "--method", "esd", "--set", "rank=9999"), "`rank`"),
    ):
        assert message in fails(monkeypatch, capfd, "erase", "-o", "no", *arguments)
    for arguments, message in (
        (("--config", "named", "--anchor", "dog"), "--config"),
        (("cat", "--config", "named"), "--config"),
        ((), "name the concepts"),
        (("cat", "--method", "esd", "--sample-prompt", "x"), "--sample-every"),
    ):
        assert message in invoke("erase", "-o", "no", *arguments, code=2).output
    assert not Path("no").exists() and not Path("no.checkpoints").exists()
