"""Settings of the methods: what each may be, what it is told where it is something else, and what stands about it in the files."""

import dataclasses
import importlib
import inspect
import json
import math
import re
import runpy
import typing
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

from diffusers_erasure import ErasureInputError, erase
from diffusers_erasure.layers import layer_kind
from diffusers_erasure.methods import get_method, make_config, method_names
from diffusers_erasure.methods.acterase_pairs import PAIRS
from diffusers_erasure.methods.catalogue import FILE, as_json, documented, meanings
from diffusers_erasure.settings import (
    USUAL,
    ByFacts,
    Choice,
    Facts,
    Number,
    Of,
    Switch,
    Whole,
    check_settings,
    resolve,
    rules_of,
)
from diffusers_erasure.training import TrainConfig, TrainingRun
from diffusers_erasure_cli import base_models as loading
from tests.commands import invoke


ROOT = Path(__file__).resolve().parents[1]


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
    settings = get_method("uce").resolved(config)
    assert [template.format("cat") for template in settings.template_list] == ["a cat, {style}"]


# --------------------------------------------------------------------------------------------- what a method declares


@pytest.mark.parametrize("name", method_names())
def test_what_a_method_declares_is_what_it_is(name: str) -> None:
    """Whether it takes a run and retained prompts is read off its code; that it trains, off what its settings are made of."""
    entry = get_method(name)
    assert entry.declared.resumable == ("run" in inspect.signature(entry.fit).parameters)
    assert entry.declared.retains == ("retain" in {item.name for item in dataclasses.fields(entry.config)})
    assert entry.declared.trains == issubclass(entry.config, TrainConfig)
    assert entry.declared.makes and all(layer_kind(name).name == name for name in entry.declared.makes)


@pytest.mark.parametrize("name", method_names())
def test_what_may_be_left_out_and_what_a_method_works_with(name: str) -> None:
    """Two types with the same fields: the second has none that may be `None`, and else the first's types."""
    entry = get_method(name)
    assert entry.settings is not None
    rules, worked = rules_of(entry.config), typing.get_type_hints(entry.settings)
    assert list(rules) == [item.name for item in dataclasses.fields(entry.config)]
    assert {item.name for item in dataclasses.fields(entry.settings)} == set(rules)
    for setting, rule in rules.items():
        kind = worked[setting]
        assert type(None) not in typing.get_args(kind), setting
        assert not isinstance(rule.range, Whole) or kind is int, setting
        assert not isinstance(rule.range, Number) or kind is float, setting
        assert not isinstance(rule.range, Switch) or kind is bool, setting
        values = typing.get_args(kind) if isinstance(rule.range, Choice) else ()
        assert not values or set(values) == set(rule.range.values), setting


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
    with pytest.raises(ErasureInputError, match="no model"):
        invoke("erase", "cat", "--method", method, "-o", str(tmp_path / "e"))
    assert asked == [half]


# ----------------------------------------------------------------------------------------------------------- ranges

CONFIGS: dict[str, Any] = {**{name: get_method(name).config for name in method_names()}, "training": TrainingRun}
EVERY = [(name, setting) for name, config in CONFIGS.items() for setting in rules_of(config)]
WRONG: dict[type, tuple[Any, ...]] = {
    Whole: (True, 1.0, "1", -1, math.nan),
    Number: (False, "1", -0.5, math.nan, math.inf),
    Choice: ("no such", 1, True, ["x"]),
    Switch: ("yes", 0, 1, 1.0),
    Of: (1, 0.5, object()),
}


@pytest.mark.parametrize(("name", "setting"), EVERY, ids=" ".join)
def test_every_setting_is_checked(name: str, setting: str) -> None:
    """What is of another type or out of range is refused by its name; `None` where it is no default."""
    rule = rules_of(CONFIGS[name])[setting]
    for value in (*WRONG[type(rule.range)], *(() if rule.optional else (None,))):
        with pytest.raises(ErasureInputError, match=f"^`{setting}` must be .*, not |leave `train_set` out") as told:
            CONFIGS[name](**{setting: value})
        assert repr(value) in str(told.value) or setting == "train_set"


@pytest.mark.parametrize(
    ("rule", "inside", "outside", "text", "expected"),
    [
        (Whole(least=2), (2, 10**9), (1, 2.0, True), "a whole number, at least 2", "a whole number of at least 2"),
        (Number(), (0, 0.5, 1e30), (-1e-9,), "a number, at least 0", "a finite number of at least 0"),
        (Number(above=0), (1e-9, 3), (0, 0.0, -1), "a number above 0", "a finite number above 0"),
        (Number(below=1), (0, 0.99), (1, 1.5), "a number, at least 0 and below 1", "a finite number of at least 0 and below 1"),
        (Number(above=0, most=1), (1, 0.1), (0, 1.1), "a number above 0 and at most 1", "a finite number above 0 and at most 1"),
        (Choice(("x", "y")), ("x", "y"), ("z", None), "one of x, y", "one of ['x', 'y']"),
        (Switch(), (True, False), (0, None, "no"), "true or false", "True or False"),
        (Of("a prompt", str), ("", "a"), (1, None), "a prompt", "a prompt"),
    ],
)  # fmt: skip
def test_ranges(rule: Any, inside: tuple[Any, ...], outside: tuple[Any, ...], text: str, expected: str) -> None:
    assert all(map(rule.holds, inside)) and not any(map(rule.holds, outside))
    assert (rule.text, rule.expected) == (text, expected)


def test_a_field_without_a_range_is_a_mistake_of_the_method() -> None:
    @dataclasses.dataclass
    class Config:
        rank: int = 1

    with pytest.raises(TypeError, match=r"Config\.rank has no range"):
        check_settings(Config())


@pytest.mark.parametrize("name", method_names())
def test_presets_are_named_and_within_the_ranges(name: str) -> None:
    """Every method has presets: those that the module has; with each of them every setting is one, and as it states."""
    entry = get_method(name)
    rules = rules_of(entry.config)
    module = importlib.import_module(entry.config.__module__)
    known = getattr(module, "PRESETS", PAIRS if name == "acterase" else {})
    choices = rules["preset"].range.values
    assert sorted(choices) == sorted(known) and ("published" in rules) == hasattr(module, "PUBLISHED")
    for preset in choices:
        for published in (False, True) if "published" in rules else (None,):
            given = {"preset": preset, **({} if published is None else {"published": published})}
            made = entry.resolved(entry.config(**given))
            for setting, rule in rules.items():
                assert rule.range.holds(getattr(made, setting)), setting
            stated = module.PUBLISHED if published else known
            stated = stated.get(preset, stated)
            for setting, value in stated.items() if isinstance(stated, dict) else ():
                value = value.of(USUAL) if isinstance(value, ByFacts) else value
                assert setting == "anchor" or getattr(made, setting) == value, setting


@pytest.mark.parametrize("name", method_names())
def test_what_is_recorded_can_be_given_again(name: str) -> None:
    """By `erase --config`: the settings in an artefact lead to the same ones."""
    entry = get_method(name)
    made = entry.resolved(entry.config())
    recorded, _ = made.recorded()
    given = {
        key: value for key, value in recorded.items() if not key.startswith("retain_") or key in rules_of(entry.config)
    }
    assert entry.resolved(make_config(entry, given)) == made


def test_a_preset_that_states_too_little_is_a_mistake_of_the_method() -> None:
    @dataclasses.dataclass
    class Config:
        rank: Annotated[int | None, Whole(least=1)] = None
        steps: Annotated[int | None, Whole(least=1)] = None

        def stated(self) -> dict[str, Any]:
            return {"rank": 4, "steps": ByFacts("two a concept", lambda facts: 2 * facts.concepts)}

    @dataclasses.dataclass
    class Settings:
        rank: int
        steps: int

    assert resolve(Config(rank=3), Settings, Facts(5, 1.0)) == Settings(3, 10)
    with pytest.raises(TypeError, match="nothing stands for `steps`"):  # it depends on what is not known
        resolve(Config(), Settings)
    assert resolve(Config(steps=1), Settings) == Settings(4, 1)


# -------------------------------------------------------------------------------------------------------- the catalogue


def test_the_catalogue_in_the_package_is_up_to_date() -> None:
    assert FILE.read_text(encoding="utf-8") == as_json(), "run `python -m diffusers_erasure.methods.catalogue`"


@pytest.mark.parametrize("name", method_names())
def test_every_setting_is_documented(name: str) -> None:
    """In words of its own, without a docstring's marks, and without a parameter that there is not."""
    config = get_method(name).config
    told = meanings(config)
    assert list(told) == [item.name for item in dataclasses.fields(config)]
    for setting, meaning in told.items():
        assert len(meaning) > 15 and meaning.endswith(".") and not re.search(r"`|\*|\[\w+\]|see |  ", meaning), setting
    assert documented(config.__doc__ or "").keys() <= told.keys()


def test_what_the_catalogue_says() -> None:
    """Against the classes themselves: the most derived documentation, ranges, presets and what the authors ran."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    assert list(found) == list(method_names())
    esd, dumo = (found[name]["settings"] for name in ("esd", "dumo"))
    assert esd["rank"] == {
        "meaning": "rank of the LoRA; its alpha is the same, so that its scale is 1.",
        "range": "a whole number, at least 1",
        "choices": [],
        "default": None,
        "presets": {"style": 4, "object": 8, "nudity": 16},
        "published": {"style": 4, "object": 8, "nudity": 16},
    }
    assert dumo["rank"]["meaning"] == "rank of the compact form's deltas."
    assert esd["steps"]["presets"]["style"] == "300, and 60 for each further concept"
    assert esd["steps"]["published"]["nudity"] == 1000 and esd["retain_weight"]["presets"]["style"] == 10.0
    assert esd["weight_decay"]["presets"]["style"] == 0.0  # of all methods that train
    assert esd["lr_scheduler"]["range"].startswith("one of constant, constant_with_warmup, linear")
    assert esd["ema_decay"]["range"] == "a number, at least 0 and below 1"
    assert found["speed"]["settings"]["filter"]["range"] == "true or false"
    assert found["speed"]["settings"]["filter"]["choices"] == ["true", "false"]
    assert found["uce"]["settings"]["layer"]["choices"] == ["both", "text_map", "lora"]
    assert (found["uce"]["presets"], found["uce"]["has_published"]) == (["object", "style", "person"], True)
    assert found["uce"]["settings"]["lamb"]["presets"]["style"] == 1e-3
    assert found["uce"]["settings"]["lamb"]["published"]["style"] == 0.5
    closed = {"uce", "rece", "speed", "dp", "oce", "gated"}
    trained = ["abo", "dumo", "eap", "eraseanything", "esd", "gem", "receler", "sdd"]
    of_transformers = {"gem", "eraseanything"}
    assert all(
        ("stable-diffusion" in entry["families"]) == (name not in of_transformers) for name, entry in found.items()
    )
    assert all("flux" in found[name]["families"] for name in closed | of_transformers)
    assert all((entry["needs"] == "text encoders") == (name in closed) for name, entry in found.items())
    assert found["rece"]["makes"] == ["text_map", "lora"] and found["dumo"]["citation"]["year"] == 2025
    assert (found["sdd"]["presets"], found["sdd"]["has_published"]) == (["style", "object", "nudity"], True)
    assert [name for name, entry in found.items() if entry["trains"]] == trained
    assert [name for name, entry in found.items() if entry["resumable"]] == ["abo", "acterase", *trained[1:]]
    assert [name for name, entry in found.items() if not entry["retains"]] == ["acterase"]
    assert "`blend`" in found["acterase"]["instead_of_retain"] and found["uce"]["instead_of_retain"] == ""


def test_several_settings_in_one_entry_and_a_derived_class() -> None:
    class Base:
        """A base.

        Args:
            first, second (`int`, *optional*): both, see
                [`Base`]. `"x"` is
                **one**.
            third (`str` or a tuple of `str`), fourth (`int`): an end: with a colon.

        Text that is no setting: not this one.
        """

    @dataclasses.dataclass
    class Derived(Base):
        """A derived class.

        Args:
            second (`int`): another.
        """

        first: int = 0
        second: int = 0
        third: str = ""
        fourth: int = 0
        fifth: int = 0

    assert meanings(Derived) == {
        "first": 'both. "x" is one.',
        "second": "another.",
        "third": "an end: with a colon.",
        "fourth": "an end: with a colon.",
    }


def test_the_tables_in_the_documentation_are_up_to_date() -> None:
    """Of every method its settings, and one of all methods."""
    tool = runpy.run_path(str(ROOT / "tools" / "method_tables.py"))
    found = json.loads(FILE.read_text(encoding="utf-8"))
    pages = {page.stem: page.read_text(encoding="utf-8") for page in tool["PAGES"]}
    for name, page in pages.items():
        assert tool["written"](page, found) == page, "run `python tools/method_tables.py`"
        assert f"<!-- table: {'methods' if name == 'index' else name} -->\n| " in page
    assert pages.keys() == {"index", *found}


def test_a_table_says_what_presets_differ_in() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "method_tables.py"))
    assert tool["by_preset"]({"a": 1, "b": 2, "c": 2}, "b") == "`2`; a: `1`"
    assert tool["by_preset"]({"a": "x", "b": "x"}, "b") == '`"x"`'
    assert (tool["value"]("two a concept"), tool["value"](None), tool["plain"]("|x|")) == (
        "two a concept",
        "none",
        r"\|x\|",
    )
