"""The command line as a user meets it: output, JSON, exit codes, errors without tracebacks."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffusers_erasure import ErasureInputError, ErasureNotFoundError, __version__, cli
from tests.commands import fails, invoke, run


@pytest.mark.timeout(600)
def test_demo_erases_the_concept_and_keeps_the_others(tmp_path: Path) -> None:
    """Over 200 images, an object on which nothing was tuned: at most 5 % on the erased, 99 % of before on the kept."""
    done = run("demo", "--json", "--output", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    before, after = report["before"], report["after"]
    assert report["images"] >= 200
    assert before["erased_accuracy"] >= 0.9 and before["kept_accuracy"] >= 0.9
    assert after["erased_accuracy"] <= 0.05
    assert after["kept_accuracy"] >= 0.99 * before["kept_accuracy"]
    assert report["output"] == "here"
    with Image.open(tmp_path / "here" / "before_after.png") as grid:
        assert grid.size[0] > 500
    assert json.loads((tmp_path / "here" / "report.json").read_text()) == report
    assert (tmp_path / "here" / "erasure" / "pytorch_lora_weights.safetensors").is_file()
    card = (tmp_path / "here" / "erasure" / "README.md").read_text()  # what was measured is recorded, and shown
    assert f"| erased\\_accuracy, after | {after['erased_accuracy']:.4g} |" in card and "](before_after.png)" in card
    shown = invoke("info", str(tmp_path / "here" / "erasure")).stdout
    assert f"{after['kept_accuracy']:.4g}" in shown and "demo (stable-diffusion)" in shown


def test_demo_refuses_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert "zeppelin" in fails(monkeypatch, capfd, "demo", "--concept", "zeppelin")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    assert "not an empty folder" in fails(monkeypatch, capfd, "demo", "--output", "full")


def test_erase_info_generate(tmp_path: Path) -> None:
    folder = tmp_path / "no-cat"
    made = invoke(
        *("erase", "cat", "--anchor", "animal", "--retain", "dog", "--method", "uce"),
        *("--set", "rank=2", "--json", "-o", str(folder)),
    )
    result = json.loads(made.stdout)
    assert set(result["files"]) == {
        "README.md",
        "erasure.safetensors",
        "erasure_config.json",
        "pytorch_lora_weights.safetensors",
    }
    assert 0 < result["diagnostics"]["completeness"]["cat"] <= 1

    shown = invoke("info", str(folder))
    assert shown.exit_code == 0
    for text in ("cat → animal", "uce", "text_map", "yes, the same edit", "stable-diffusion"):
        assert text in shown.stdout
    assert json.loads(invoke("info", str(folder), "--json").stdout)["concepts"] == [
        {"anchor": "animal", "target": "cat"}
    ]

    drawn = invoke(
        "generate", "a cat", "a dog", "-e", f"{folder}=0.5", "--steps", "2", "--json", "-o", str(tmp_path / "images")
    )
    answer = json.loads(drawn.stdout)
    assert answer["erasures"] == [
        {
            "base_match": {"text_encoder": "same", "tokenizer": "same", "unet": "same"},
            "name": "no-cat",
            "revision": None,
            "source": str(folder),
            "strength": 0.5,
        }
    ]
    for item in answer["images"]:
        with Image.open(item["file"]) as image:
            assert image.size == (64, 64)
    bare = invoke("generate", "a cat", "--steps", "2", "--json", "-o", str(tmp_path / "bare"))
    with Image.open(json.loads(bare.stdout)["images"][0]["file"]) as image:
        with Image.open(answer["images"][0]["file"]) as erased:
            assert image.tobytes() != erased.tobytes()


def test_redacted_output_names_nothing(tmp_path: Path) -> None:
    made = invoke("erase", "pizza", "--anchor", "food", "--redact", "--half", "--json", "-o", str(tmp_path / "secret"))
    assert made.exit_code == 0
    assert "pizza" not in made.stdout.replace(str(tmp_path), "")
    assert "not named" in invoke("info", str(tmp_path / "secret")).stdout
    (tmp_path / "secret" / "README.md").write_text("It was pizza.", encoding="utf-8")
    again = ("erase", "pizza", "--redact", "--overwrite", "--base", "./missing", "-o", str(tmp_path / "secret"))
    with pytest.raises(ErasureInputError, match="edited by hand"):  # before the base model is looked for
        invoke(*again)


def test_methods_lists_the_settings() -> None:
    assert "lamb" in invoke("methods", "uce").stdout
    assert json.loads(invoke("methods", "--json").stdout)["uce"]["settings"]["rows"]["presets"]["object"] == "last"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("erase", "cat", "--method", "magic", "-o", "x"), "no method 'magic'"),
        (("erase", "cat", "--base", "./missing", "-o", "x"), "no folder"),
        (("erase", "cat", "--device", "toaster", "-o", "x"), "toaster"),
        (("erase", "cat", "--device", "meta", "-o", "x"), "on the device 'meta'"),
        (("erase", "cat", "--device", "hpu", "-o", "x"), "on the device 'hpu'"),
        pytest.param(
            ("generate", "a cat", "--device", "cuda", "-o", "x"),
            "on the device 'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it can be computed on here"),
        ),
        (("erase", "cat", "--dtype", "int3", "-o", "x"), "--dtype"),
        (("erase", "cat", "--offload", "yes", "-o", "x"), "--offload"),
        (("info", "./missing"), "missing"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(monkeypatch, capfd, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_version_and_debug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke("--version").stdout.strip() == __version__
    invoke("erase", code=2)  # no output folder
    invoke("nonsense", code=2)
    for arguments, message in (
        (("erase", "cat", "--set", "lamb", "-o", str(tmp_path / "x")), "name=value"),
        (("generate", "a cat", "-e", "x=high", "-o", str(tmp_path / "x")), "NAME=STRENGTH"),
        (("generate", "a cat", "-e", "a/b@v1=0.5@v2", "-o", str(tmp_path / "x")), "NAME=STRENGTH"),
        (("info", "user/no-cat@v2", "--revision", "v1"), "another one"),
    ):
        assert message in invoke(*arguments, code=2).output
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(sys, "argv", ["diffusers-erasure", "--debug", "info", "./missing"])
    with pytest.raises(ErasureNotFoundError):
        cli.main()


def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusers_erasure_cli.completion.catalogue", interrupted)
    invoke("methods", code=130)
