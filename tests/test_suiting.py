"""What closed forms do by default with what is retained: in templates, where these fit and where it is not much."""

from typing import Any

import pytest

from diffusers_erasure import Erasure, demo, erase
from diffusers_erasure.lists import retained
from diffusers_erasure.methods import dp, rows, suiting, uce
from diffusers_erasure.settings import resolve
from tests.helpers import tiny_sdxl_pipe
from tests.test_uce import live_rows


LONG = "dog, bus, rose, bee, whale, corn, duck, pizza"  # in some templates more than 24 tokens
METHODS = ("uce", "dp", "rece", "speed")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return demo.load_pipeline()


def made(pipe: Any, **settings: Any) -> Erasure:
    return erase(pipe, "cat", anchors="animal", retain_default="none", compare=False, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_many_prompts_are_retained_as_they_are(pipe: Any, method: str) -> None:
    """Unless it is asked for; the artefact records which."""
    names = [f"thing {number}" for number in range(suiting.MANY + 1)]
    for retain, given, expected in ((names[:-1], None, True), (names, None, False), (["dog"], False, False)):
        how = {} if given is None else {"retain_templates": given}
        erasure = made(pipe, method=method, retain=retain, **how)
        assert erasure.config.method.settings["retain_templates"] is expected
    config = uce.Config(retain=retained(names, ["cat"]), retain_templates=True)
    assert suiting.suited(config, pipe, {}).retain_templates is True
    published = uce.Config(retain=retained(names, ["cat"]), published=True)
    assert suiting.suited(published, pipe, {"rows": "window"}) is published


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_that_is_too_long_in_templates_is_retained_without_them(pipe: Any, method: str) -> None:
    erasure = made(pipe, method=method, retain=["dog", LONG])
    assert erasure.config.diagnostics["retained_change"]["max"] < 0.5


def test_which_templates_a_prompt_stands_in(pipe: Any) -> None:
    settings = resolve(dp.Config(retain=retained(["dog", LONG], ["cat"])), dp.Settings)
    found = rows._in_templates(pipe, ["dog", LONG], settings)
    assert {"dog", "a dog", "a drawing of a dog on paper", LONG, f"a {LONG}"} <= found
    assert f"a drawing of a {LONG} on paper" not in found
    own = resolve(
        dp.Config(retain=retained([LONG], ["cat"]), templates=("a drawing of a {} on a sheet of paper",)), dp.Settings
    )
    assert rows._in_templates(pipe, [LONG], own) == {LONG}


def test_defaults_at_a_door_leave_what_is_given() -> None:
    flux = demo.load_pipeline("flux")
    config = suiting.suited(uce.Config(directions=5), flux, uce.AT_DOORS)
    assert (config.rows, config.directions) == ("window", 5)
    assert suiting.suited(uce.Config(), tiny_sdxl_pipe(), uce.AT_DOORS).rows is None


def test_more_contexts_hold_a_retained_word_better(pipe: Any) -> None:
    """In a context that the templates have, at the same weight."""
    moved = []
    for templates in (False, True):
        erasure = made(pipe, method="uce", retain=["dog"], retain_templates=templates, layer="text_map")
        tensors = erasure.layer_tensors(erasure.config.layers[0])
        (row,), _ = live_rows(pipe, ["a drawing of a dog on paper"])
        way = row @ tensors["A"].double().T @ tensors["D"].double()
        moved.append(float(way.norm() / row.norm()))
    assert moved[1] < 0.8 * moved[0]
