"""What the shell completes, and that neither that nor help nor the version imports the library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_erasure import __version__
from diffusers_erasure.lists import list_names
from diffusers_erasure.methods import get_method, method_names


# Runs the command line as its entry point does, and tells which of these it imported.
RUN = """
import json, sys
from diffusers_erasure_cli.app import main
sys.argv[0] = "diffusers-erasure"
try:
    main()
except SystemExit:
    pass
heavy = {"diffusers", "diffusers_erasure", "huggingface_hub", "numpy", "torch", "transformers"}
print("\\n" + json.dumps(sorted(heavy & sys.modules.keys())))
"""


def run(*arguments: str, **environment: str) -> tuple[str, list[str]]:
    """What it prints, on standard error too, and what it imported."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **environment},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    output, _, imported = done.stdout.rstrip().rpartition("\n")
    return output + done.stderr, json.loads(imported)


def complete(*words: str) -> list[str]:
    """What bash gets for a line of words, the last of which is incomplete."""
    typed = " ".join(["diffusers-erasure", *words])
    name = "_DIFFUSERS_ERASURE_COMPLETE"
    output, imported = run(COMP_WORDS=typed, COMP_CWORD=str(len(words)), **{name: "complete_bash"})
    assert imported == []
    return output.split()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--help",), "erase"),
        (("erase", "--help"), "--overwrite"),
        (("push", "--help"), "repository"),
        (("--version",), __version__),
        (("methods",), "SPEED"),
        (("methods", "esd"), "optimiser steps"),
        (("erase",), "Missing option"),
    ],
)
def test_what_needs_no_library_imports_none(arguments: tuple[str, ...], text: str) -> None:
    output, imported = run(*arguments)
    assert imported == [] and text in output


def test_methods_lists_and_settings() -> None:
    assert complete("methods", "") == list(method_names())
    assert complete("erase", "cat", "--method", "s") == ["sdd", "speed"]
    assert complete("lists", "") == list_names()
    known = [name for name in get_method("speed").config.__dataclass_fields__ if name.startswith("re")]
    assert complete("erase", "cat", "--method", "speed", "--set", "re") == [
        f"{name}=" for name in known if name != "retain"
    ]
    assert "epochs=" not in complete(
        "erase", "cat", "--set", "e"
    )  # gated and uce, of which one is the default, have none
    assert complete("generate", "cat", "--offload", "") == ["none", "model", "sequential"]
    assert complete("convert", "dumo", "--base", "demo-s") == ["demo-sdxl", "demo-sd3"]


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / "artists.txt").write_text("Monet\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for typed, expected in (("na", "names/"), ("./na", "./names/"), ("names/a", "names/artists.txt")):
        assert complete("erase", "--retain", typed) == [expected]
    assert complete("erase", "~/") == ["~/names/"]


def test_what_bash_takes_apart_at_colons_and_equals_signs() -> None:
    assert complete("erase", "--retain", "list", ":") == list_names()
    assert complete("erase", "--retain", "list", ":", "ar") == ["artists"]
    assert complete("erase", "'Van Gogh'", "--retain", "list", ":", "ar") == ["artists"]
    assert complete("erase", "--method", "rece", "--set", "layer", "=") == ["both", "text_map", "lora"]
    assert complete("erase", "--method", "rece", "--set", "layer", "=", "l") == ["lora"]
