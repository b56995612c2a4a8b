"""Lists of prompts: what the library ships, files of the user's, and which entries a target excludes."""

import logging
import re
import unicodedata
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_erasure import ErasureInputError, lists
from diffusers_erasure.lists import expand, is_list, list_names, names_any, read_list, read_prompts, retained


LEAST = {"artists": 300, "characters": 200, "objects": 500, "public_figures": 200, "styles": 60, "things": 150}


# ------------------------------------------------------------------------------------------------- shipped lists


def test_these_lists_are_shipped() -> None:
    assert list_names() == sorted(LEAST)


@pytest.mark.parametrize("name", sorted(LEAST))
def test_a_shipped_list_is_clean(name: str) -> None:
    entries = read_list(name)
    assert len(entries) >= LEAST[name]
    assert len({entry.casefold() for entry in entries}) == len(entries)
    assert entries == sorted(entries, key=str.casefold)
    for entry in entries:
        assert entry.isprintable() and entry == " ".join(entry.split())
        assert any(sign.isalpha() for sign in entry) and 2 < len(entry) < 40
        # Anything else would be a slip: a bracket, a comma, a quotation mark, a letter in two pieces.
        assert re.fullmatch(r"[\w .'-]+", entry) and not re.search(r"[\d_]{3}", entry)
        assert unicodedata.normalize("NFC", entry) == entry
        assert not is_list(entry)  # it would be read as a path where it is given in place
    assert read_list(f"list:{name}") == entries == expand(f"list:{name}", "retain")


@pytest.mark.parametrize("name", sorted(LEAST))
def test_a_shipped_list_says_where_it_comes_from(name: str) -> None:
    lines = resources.files(lists).joinpath(f"{name}.txt").read_text(encoding="utf-8").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    head = " ".join(line.removeprefix("#").strip() for line in lines[:count])
    assert not any(line.startswith("#") for line in lines[count:])
    for words in ("Written from general knowledge", "no list of others was copied", "Chosen", "Apache-2.0"):
        assert words in head
    assert f'retain="list:{name}"' in head


def test_an_unknown_list_names_those_that_there_are() -> None:
    for name in ("list:painters", "painters", "list:", "list:../artists", "list:Artists"):
        with pytest.raises(ErasureInputError, match="There is no list") as caught:
            read_list(name)
        assert all(f"list:{each}" in str(caught.value) for each in LEAST)


# --------------------------------------------------------------------------------------------------------- files


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_files(tmp_path: Path, encoding: str, end: str) -> None:
    """A byte order mark, which Windows' editors write, is no part of the first prompt."""
    lines = ["Édouard Manet", "# a comment", "  a dog, running ", "  # another", "snow #1"]
    file = written(tmp_path / "mine.txt", end.join(lines), encoding)
    assert read_prompts(file) == read_prompts(str(file)) == ["Édouard Manet", "a dog, running", "snow #1"]


def test_tables(tmp_path: Path) -> None:
    table = 'id,artist,concept\n1,Monet,water lilies\n2,"Dürer, Albrecht",a hare\n'
    file = written(tmp_path / "a.csv", table, "utf-8-sig")
    assert read_prompts(file) == ["water lilies", "a hare"]  # `concept` goes before `artist`
    assert read_prompts(f"{file}#artist") == ["Monet", "Dürer, Albrecht"]
    assert read_prompts(f"{file}#id") == ["1", "2"]
    tabs = written(tmp_path / "a.tsv", "name\tnr, of\nMonet, Claude\t1\nDegas\t2\n")
    assert read_prompts(f"{tabs}#name") == ["Monet, Claude", "Degas"]
    assert read_prompts(f"{tabs}#nr, of") == ["1", "2"]
    assert read_prompts(written(tmp_path / "one.csv", "whatever\nMonet\n")) == ["Monet"]
    assert read_prompts(written(tmp_path / "b.csv", 'concept\n"two\nlines"\nshort\n')) == ["two\nlines", "short"]
    assert read_prompts(written(tmp_path / "LOUD.CSV", "id,artist\n1,Monet\n")) == ["Monet"]


def test_what_was_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = "artist,year\nMonet,1840\n,1841\nMonet,1840\n  ,1842\nMonet,1843\nDegas,1834\n"
    assert read_prompts(written(tmp_path / "artists.csv", table, "utf-8-sig")) == ["Monet", "Degas"]
    assert "2 empty and 2 repeated" in caplog.text
    caplog.clear()
    assert read_prompts(written(tmp_path / "kept.txt", "# a comment\ndog\n\ndog\n")) == ["dog"]
    assert "1 empty and 1 repeated" in caplog.text
    caplog.clear()
    read_prompts(written(tmp_path / "good.txt", "dog\ncat\n"))
    assert not caplog.records


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    file = written(tmp_path / "a.csv", "id,name\n1,Monet\n")
    for path, message in (
        (f"{file}#painter", r"columns \['id', 'name'\].*a\.csv#"),
        (file, "columns"),  # two, and neither has a usual name
        (written(tmp_path / "nothing.csv", ""), "columns"),
        (tmp_path / "missing.txt", "missing.txt cannot be read"),
        (tmp_path, "cannot be read"),
        (written(tmp_path / "latin.txt", "Dürer", "latin-1"), "cannot be read"),
        (written(tmp_path / "empty.txt", "\n# nothing\n"), "no prompts"),
        (written(tmp_path / "empty.csv", "artist\n"), "no prompts"),
        (written(tmp_path / "nested.txt", "dog\nlist:objects\n"), "name of a list, 'list:objects'"),
        (written(tmp_path / "nested.csv", "artist\nmore.TXT\n"), "name of a list"),
        (written(tmp_path / "endless.csv", 'artist\n"' + "x" * 200_000), "cannot be read"),
    ):
        with pytest.raises(ErasureInputError, match=message):
            read_prompts(path)


def test_a_number_sign_in_a_path_is_no_column(tmp_path: Path) -> None:
    folder = tmp_path / "C# and F.csv#s"
    folder.mkdir()
    text = written(folder / "mine.txt", "dog\n")
    table = written(folder / "mine.csv", "id,no#1\n1,dog\n")
    for value in (text, str(text), f"{table}#no#1", Path(f"{table}#no#1")):
        assert is_list(value) and expand(value, "retain") == ["dog"]


# -------------------------------------------------------------------------------------------------------- expand


def test_expand_reads_lists_in_their_place(tmp_path: Path) -> None:
    file = written(tmp_path / "mine.txt", "b\nc\n")
    (tmp_path / "OTHER.TXT").write_text("e\n")
    assert expand("a", "targets") == ["a"]
    assert expand(["a", file, "d", str(tmp_path / "OTHER.TXT")], "targets") == ["a", "b", "c", "d", "e"]
    assert expand(("list:objects", "z"), "targets") == [*read_list("objects"), "z"]
    assert expand("", "anchors", allow_empty=True) == [""]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "`what` is empty"),
        ("", "empty entry"),
        (["a", " \t"], "empty entry"),
        (3, "string"),
        (["a", None], "string"),
        ([["a"]], "string"),
        (b"cat", "string"),
        ("list:nothing", "no list 'nothing'"),
        ("./missing.csv#name", "missing.csv cannot be read"),
    ],
)
def test_expand_refuses(value: Any, message: str) -> None:
    with pytest.raises(ErasureInputError, match=message):
        expand(value, "what")


# ------------------------------------------------------------------------------------------------------ retained


@pytest.mark.parametrize(
    ("target", "named", "others"),
    [
        ("cat", ["cat", "CAT", "a cat on a mat", "cat's cradle", "a cat, a dog"], ["catalogue", "bobcat", "cats"]),
        ("van Gogh", ["Vincent van Gogh", "VAN GOGH's sunflowers"], ["van", "Gogh van", "vans Gogh", "van den Gogh"]),
        ("ice cream", ["ice cream cone", "ice-cream", "ice  cream"], ["ice", "cream ice", "ice, no cream"]),
        ("C++ (logo)", ["the C++ (logo) on a shirt"], ["a logo", "C", "cc logo"]),
        ("a.b*", ["a.b*", "one a.b* here"], ["axb", "abbb", "ab"]),
        (".*", ["a .* b"], ["anything", ""]),
        ("O'Keeffe", ["Georgia O'Keeffe", "Georgia O’Keeffe"], ["O. Keeffer", "Keeffe"]),
        ("STRASSE", ["Straße"], ["Strassen"]),
        ("🐱", ["a 🐱 there", "🐱"], ["a cat", "🐶"]),
        # The same letter in one piece and in two, as file names of macOS have it; and as a keyboard without it has it.
        ("Du\u0308rer", ["Albrecht D\u00fcrer", "Albrecht Durer"], ["Du", "rer"]),
        ("Salvador Dali", ["Salvador Dalí"], ["Salvador"]),
        ("Salvador Dalí", ["Salvador Dali"], []),
        ("", [], ["", "a cat"]),
        (" ", [], ["a cat"]),
    ],
)  # fmt: skip
def test_targets_are_named_as_whole_words(target: str, named: list[str], others: list[str]) -> None:
    for prompt in named:
        assert names_any(prompt, ["zebra", target])
    for prompt in others:
        assert not names_any(prompt, [target])
    assert not names_any("a cat", [])


def test_entries_that_name_a_target_are_excluded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "diffusers_erasure")
    found = retained("list:artists", ["van Gogh", "Claude Monet", "Salvador Dali"])
    assert found.excluded == ("Claude Monet", "Salvador Dalí", "Vincent van Gogh")
    assert found.prompts == tuple(entry for entry in read_list("artists") if entry not in found.excluded)
    assert "3 prompts are not retained" in caplog.text and "Vincent van Gogh" in caplog.text
    caplog.clear()
    file = written(tmp_path / "mine.txt", "".join(f"cat {i}\n" for i in range(9)) + "dog\n")
    assert retained(file, ["cat"]).prompts == ("dog",)
    assert "'cat 4', …" in caplog.text and "cat 5" not in caplog.text
    caplog.clear()
    assert retained(["dog", file], ["zebra"]).excluded == ()
    assert not caplog.records


def test_prompts_given_in_place_are_kept(tmp_path: Path) -> None:
    """Who writes them means them; only the target itself cannot be one of them."""
    assert retained("a cat on a mat", ["cat"]).prompts == ("a cat on a mat",)
    file = written(tmp_path / "mine.txt", "a cat on a mat\na cat\ndog\n")
    found = retained(["a cat on a mat", file, "dog"], ["cat"])
    assert found.prompts == ("a cat on a mat", "dog") and found.excluded == ("a cat",)
    assert retained("rosé", ["rose"]).prompts == ("rosé",)


@pytest.mark.parametrize(
    ("target", "prompt"), [("cat", "cat"), ("cat", " CAT "), ("van  Gogh", "Van Gogh"), ("C++", "c++"), ("🐱", "🐱 ")]
)
def test_a_target_cannot_be_retained(target: str, prompt: str) -> None:
    with pytest.raises(ErasureInputError, match="both a target and a prompt to retain") as caught:
        retained(["dog", prompt], ["zebra", target])
    assert repr(target) in str(caught.value)


def test_something_must_be_left(tmp_path: Path) -> None:
    file = written(tmp_path / "mine.txt", "a cat\ntwo cat\n")
    with pytest.raises(ErasureInputError, match="No prompt to retain is left"):
        retained(file, ["cat"])
    for value, message in (([], "`retain` is empty"), ([["dog", "cat"]], "string"), (["dog", ""], "empty entry")):
        with pytest.raises(ErasureInputError, match=message):
            retained(value, ["cat"])


def test_the_source_reads_back(tmp_path: Path) -> None:
    """What an artefact records must give the same prompts again where the files are gone."""
    file = written(tmp_path / "mine.csv", "artist\ncat\na cat on a mat\nLoïs Mailou Jones\n")
    first = retained(["list:objects", file, "my dog", "list:objects", "a cat there"], ["cat"])
    assert first.source == ("list:objects", "Loïs Mailou Jones", "my dog", "a cat there")
    assert set(first.excluded) == {"cat", "a cat on a mat"}
    file.unlink()
    second = retained(first.source, ["cat"])
    assert second.prompts == first.prompts and second.source == first.source
    assert second.excluded == ("cat",)  # the shipped list's own


WORD = st.sampled_from(
    ["cat", "Cat", "CATS", "van", "Gogh", "Dalí", "Dali", "ice", "cream", "a", "C++", "(x)", "*", "."]
)
TEXT = st.lists(WORD, min_size=1, max_size=4).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(
    entries=st.lists(TEXT | st.text(max_size=8), min_size=1, max_size=12),
    targets=st.lists(TEXT, min_size=1, max_size=3),
)
def test_no_kept_entry_names_a_target(
    tmp_path_factory: pytest.TempPathFactory, entries: list[str], targets: list[str]
) -> None:
    file = tmp_path_factory.getbasetemp() / "property.csv"
    quoted = ('"' + entry.replace('"', '""') + '"' for entry in entries)
    file.write_text("concept\n" + "\n".join(quoted) + "\n", encoding="utf-8", newline="")
    try:
        listed = read_prompts(file)
    except ErasureInputError:
        assert not "".join(entries).strip() or any(is_list(entry.strip()) for entry in entries)
        return
    try:
        found = retained(file, targets)
    except ErasureInputError:
        assert all(names_any(entry, targets) for entry in listed)
        return
    assert sorted((*found.prompts, *found.excluded)) == sorted(listed)
    assert list(found.prompts) == [entry for entry in listed if entry in found.prompts]  # in order
    for prompt in found.prompts:
        flat = f" {' '.join(spoken(prompt))} "
        assert not any(f" {' '.join(spoken(target))} " in flat for target in targets if spoken(target))
    assert all(names_any(prompt, targets) for prompt in found.excluded)
    assert retained(found.source, targets).prompts == found.prompts


def spoken(text: str) -> list[str]:
    """The words of a text, in small letters and without accents, told in another way than the library does."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()
    plain = unicodedata.normalize("NFKC", plain)
    return "".join(c if c.isalnum() or c == "_" else " " for c in plain).split()
