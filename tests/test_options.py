"""The options of reading, saving and pushing: the same by every door, shown by `help()`, and no others."""

import inspect
import pydoc
from collections.abc import Callable
from typing import Any

import pytest
from diffusers import DiffusionPipeline, ModularPipeline

import diffusers_erasure
from diffusers_erasure import Erasure
from diffusers_erasure.hub.options import CommitOptions, PushOptions, ReadOptions, SaveOptions
from diffusers_erasure_cli import hub


READ = ["subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only"]
SAVE = ["dtype", "redact_concepts", "card"]
COMMIT = ["private", "token", "create_pr", "commit_message"]
PUSH = [*COMMIT, *SAVE, "revision", "grid", "license", "base_model"]
DOORS: list[tuple[Callable[..., Any], list[str]]] = [
    (Erasure.from_pretrained, READ),
    (diffusers_erasure.load_erasure, READ),
    (Erasure.save_pretrained, SAVE),
    (diffusers_erasure.save_erasure, SAVE),
    (Erasure.push_to_hub, PUSH),
    (diffusers_erasure.push_erasure_to_hub, PUSH),
    (diffusers_erasure.push_erased_model, COMMIT),
]
IDS = [door.__qualname__ for door, _ in DOORS]


def test_the_options() -> None:
    kinds = {ReadOptions: READ, SaveOptions: SAVE, CommitOptions: COMMIT, PushOptions: PUSH}
    assert all(sorted(kind.__annotations__) == sorted(names) for kind, names in kinds.items())


@pytest.mark.parametrize(("door", "names"), DOORS, ids=IDS)
def test_help_shows_each_with_its_meaning(door: Callable[..., Any], names: list[str]) -> None:
    bases = () if "." in door.__qualname__ else (DiffusionPipeline, ModularPipeline)
    for each in (door, *(vars(base)[door.__name__] for base in bases)):
        parameters = inspect.signature(each).parameters
        assert list(parameters)[-len(names) :] == names and "options" not in parameters
        for name in names:
            kind = parameters[name].annotation
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            assert parameters[name].default is (False if kind is bool else None)
        shown = pydoc.plain(pydoc.render_doc(each))
        documented = inspect.getdoc(each) or ""
        for name in names:
            assert f"{name}: " in shown and f"\n    {name} (`" in documented
        assert "options: see" not in documented


@pytest.mark.parametrize(("door", "names"), DOORS, ids=IDS)
def test_another_name_is_told_before_anything_happens(door: Callable[..., Any], names: list[str]) -> None:
    arguments = [object()] * sum(
        each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
        for each in inspect.signature(door).parameters.values()
    )
    with pytest.raises(TypeError, match="revison"):
        door(*arguments, revison="main")
    with pytest.raises(TypeError, match="missing"):
        door(*arguments[1:])


def test_the_command_line_has_each() -> None:
    flags = {"message": "commit_message", "half": "dtype", "redact": "redact_concepts"}
    pushing, pulling = (list(inspect.signature(each).parameters) for each in (hub.push, hub.pull))
    assert {flags.get(name, name) for name in pushing} >= set(PUSH)
    assert set(pulling) >= {"subfolder", "revision", "token", "card", "force"}
