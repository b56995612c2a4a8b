"""Settings of the methods: what each may be, what it is told where it is something else, and what stands about it in the files."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from diffusers_erasure import ErasureInputError, cli, erase, loading
from diffusers_erasure.methods import get_method, make_config, method_names
from diffusers_erasure.training import TrainConfig


# ------------------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize("method", ["uce", "esd"])
@pytest.mark.parametrize(
    "template",
    ["no place", "{} in {style}", "{} and {}", "{0}", "{} {0}", "{!r}", "{:>9}", "a {{}}", "{} {", "{} }", 3, None],
)
def test_a_template_that_cannot_be_filled_is_told(method: str, template: Any) -> None:
    with pytest.raises(ErasureInputError, match=r"must hold {} once.*doubled") as told:
        make_config(get_method(method), {"templates": ("{}", template)})
    assert repr(template) in str(told.value)


def test_braces_of_a_prompt_are_doubled() -> None:
    config = make_config(get_method("uce"), {"templates": ["a {}, {{style}}"]})
    assert [template.format("cat") for template in config.template_list()] == ["a cat, {style}"]


# --------------------------------------------------------------------------------------------- what a method declares


@pytest.mark.parametrize("name", method_names())
def test_what_a_method_declares_is_what_it_is(name: str) -> None:
    """Whether it takes a run and retained prompts is read off its code; that it trains, off what its settings are made of."""
    entry = get_method(name)
    assert entry.resumable == ("run" in inspect.signature(entry.fit).parameters)
    assert entry.retains == ("retain" in {item.name for item in dataclasses.fields(entry.config)})
    assert entry.trains == issubclass(entry.config, TrainConfig)


def test_retained_prompts_where_a_method_takes_none(tmp_path: Path) -> None:
    """Told before anything is read or computed, by the function and by the settings; with what there is instead."""
    for told in (
        lambda: erase(object(), "cat", retain=tmp_path / "missing.txt", method="acterase"),
        lambda: make_config(get_method("acterase"), {"retain": ["dog"]}),
    ):
        with pytest.raises(ErasureInputError, match="'acterase' takes no retained prompts.*`top`.*`tau`.*`blend`"):
            told()


@pytest.mark.parametrize(
    ("method", "half"), [("acterase", torch.float16), ("sdd", torch.bfloat16), ("uce", torch.float16)]
)
def test_the_command_line_takes_bfloat16_for_training_alone(
    method: str, half: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def no_model(*_: Any, **options: Any) -> None:
        asked.append(options["half"])
        raise ErasureInputError("no model")

    monkeypatch.setattr(loading, "load_base", no_model)
    done = CliRunner().invoke(cli.app, ["erase", "cat", "--method", method, "-o", str(tmp_path / "e")])
    assert "no model" in str(done.exception) and asked == [half]
