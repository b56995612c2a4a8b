"""Text maps and LoRAs on each family of the table, against weights that were edited, on tiny random denoisers."""

import inspect
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_erasure import Erasure, with_stock_lora
from diffusers_erasure.base_model import door_readers, family_of
from diffusers_erasure.families import FAMILIES as TABLE
from diffusers_erasure.low_rank import DOWN, UP
from tests.helpers import assert_merged_weights, assert_same_weights, weights
from tests.tiny_families import (
    DOOR,
    EFFECT,
    EXACT,
    FAMILIES,
    LENGTH,
    ROWS,
    SCHEDULE,
    apart,
    assert_close,
    base,
    edit,
    edited,
    erasure_of,
    linears,
    maps_of,
)


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


# --------------------------------------------------------------------------------------------------- what they do


def test_a_map_is_another_weight(name: str, tmp_path: Path) -> None:
    """From a folder, at strengths 1 and 0, and taken off again."""
    tiny = FAMILIES[name]
    pipe = tiny.make()
    before = weights(pipe)
    erasure_of(tiny, pipe, maps_of(tiny)).save_pretrained(tmp_path)
    pipe.load_erasure(tmp_path, "one")
    assert_close(tiny.draw(pipe), edited(name), base(name))
    pipe.set_erasures("one", 0.0)
    assert torch.equal(tiny.draw(pipe), base(name))
    pipe.unload_erasure()
    assert torch.equal(tiny.draw(pipe), base(name))
    assert_same_weights(weights(pipe), before)


@pytest.mark.parametrize("name", [name for name, tiny in FAMILIES.items() if len(tiny.doors) > 1])
def test_each_door_has_a_map_of_its_own(name: str) -> None:
    tiny = FAMILIES[name]
    pipe = tiny.make()
    for source in tiny.doors:
        maps = maps_of(tiny, sources=(source,))
        pipe.load_erasure(erasure_of(tiny, pipe, maps), "alone")
        drawn = tiny.draw(pipe)
        assert_close(drawn, tiny.draw(edit(tiny, tiny.make(), maps)), base(name))
        assert apart(drawn, edited(name)) > EFFECT
        pipe.unload_erasure()


def test_fused_and_back(name: str) -> None:
    tiny = FAMILIES[name]
    pipe, maps = tiny.make(), maps_of(tiny)
    before = weights(pipe)
    pipe.load_erasure(erasure_of(tiny, pipe, maps), "one")
    live = tiny.draw(pipe)
    pipe.fuse_erasures()
    assert_merged_weights(weights(pipe), weights(edit(tiny, tiny.make(), maps)))
    assert_close(tiny.draw(pipe), edited(name), base(name))
    pipe.unfuse_erasures()
    assert_same_weights(weights(pipe), before)
    assert torch.equal(tiny.draw(pipe), live)


def test_stock_diffusers_loads_its_lora(name: str, tmp_path: Path) -> None:
    tiny = FAMILIES[name]
    pipe = tiny.make()
    both = with_stock_lora(erasure_of(tiny, pipe, maps_of(tiny)), pipe)
    assert both.config.stock is not None and both.config.stock.is_exact
    both.save_pretrained(tmp_path)
    assert hasattr(pipe, "load_lora_weights") is tiny.loads_loras
    if tiny.loads_loras:
        pipe.load_lora_weights(tmp_path)
        assert_close(tiny.draw(pipe), edited(name), base(name))
    other = tiny.make()  # where it is a `lora`
    other.load_erasure(Erasure.from_lora(both.lora_for_others(), base=other, concepts="zebra"))
    assert_close(tiny.draw(other), edited(name), base(name))


def test_a_lora_is_another_weight(name: str) -> None:
    """On every third Linear, wherever it stands, and off again."""
    tiny = FAMILIES[name]
    pipe, oracle, generator = tiny.make(), tiny.make(), torch.Generator().manual_seed(4)
    models = getattr(pipe, tiny.component), getattr(oracle, tiny.component)
    linears_there = [site for site, module in models[0].named_modules() if isinstance(module, nn.Linear)]
    sites = [
        site for site in linears_there[::3] if "-" not in site
    ]  # which no site has: Z-Image's embedder of patches
    factors: dict[str, torch.Tensor] = {}
    for site in sites:
        linear = models[1].get_submodule(site)
        down, up = (
            torch.randn(2, linear.in_features, generator=generator),
            torch.randn(linear.out_features, 2, generator=generator),
        )
        up = up * 0.2 / linear.in_features
        factors |= {f"{tiny.component}.{site}{DOWN}": down, f"{tiny.component}.{site}{UP}": up}
        linear.weight.data += up @ down
    pipe.load_erasure(Erasure.from_lora(factors, base=pipe, concepts="zebra"), "one")
    assert_close(tiny.draw(pipe), tiny.draw(oracle), base(name))
    pipe.set_erasures("one", 0.0)
    assert torch.equal(tiny.draw(pipe), base(name))


def test_by_the_schedulers_clock(name: str) -> None:
    """In the steps below 500 of the scheduler, whatever the denoiser is told, and in no others."""
    tiny, steps = FAMILIES[name], 3
    pipe, oracle, maps = tiny.make(), tiny.make(), maps_of(tiny)
    pipe.load_erasure(erasure_of(tiny, pipe, maps, SCHEDULE))
    model, step = getattr(oracle, tiny.component), oracle.scheduler.step
    own = {key: value.clone() for key, value in model.state_dict().items()}
    other = getattr(edit(tiny, tiny.make(), maps), tiny.component).state_dict()
    acted: list[bool] = [False]  # the last one is that of the step that is under way

    def count(*args: Any, **kwargs: Any) -> Any:
        acted.append(False)
        return step(*args, **kwargs)

    def choose(*_: Any) -> None:
        acted[-1] = float(oracle.scheduler.timesteps[len(acted) - 1]) < 500
        model.load_state_dict(other if acted[-1] else own)

    oracle.scheduler.step = count
    model.register_forward_pre_hook(choose)
    assert apart(tiny.draw(pipe, steps), tiny.draw(oracle, steps)) < EXACT
    assert set(acted[:-1]) == {True, False}


# ------------------------------------------------------------------------------------------------------ the table


def test_a_row_of_the_table(name: str) -> None:
    """Doors, arguments, packing, and where text alone is seen, as diffusers' class has them."""
    tiny = FAMILIES[name]
    pipe, row = tiny.make(), TABLE[tiny.family]
    model = getattr(pipe, tiny.component)
    assert family_of(pipe) is row and row.denoiser == tiny.component
    doors = {source: set(linears(tiny, pipe, source)) for source in tiny.doors}
    assert {source: set(readers) for source, readers in door_readers(model).items()} == doors
    assert (row.norm is not None) is (DOOR in tiny.doors)
    if row.norm is not None:
        assert type(model.get_submodule(row.norm)).__name__ == "RMSNorm" and doors[DOOR] == {row.door}

    calls: list[dict[str, Any]] = []
    tokens: dict[str, int] = {}

    def note_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({**dict(zip(names, args, strict=False)), **kwargs})

    def note_tokens(site: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            tokens[site] = args[0].shape[1]

        return note

    names = list(inspect.signature(type(model).forward).parameters)[1:]
    model.register_forward_pre_hook(note_call, with_kwargs=True)
    of_text = [site for site, _ in model.named_modules() if row.text_sites and site.endswith(row.text_sites)]
    for site in of_text:
        assert isinstance(model.get_submodule(site), nn.Linear)
        model.get_submodule(site).register_forward_pre_hook(note_tokens(site))
    tiny.draw(pipe)
    registers = 8 if tiny.family == "auraflow" else 0  # tokens of its own
    assert tokens == dict.fromkeys(of_text, LENGTH + registers)
    assert bool(of_text) is (tiny.family not in ("z-image", "lumina-2"))
    text, sample = calls[0][row.argument], next(iter(calls[0].values()))
    assert (text[0] if isinstance(text, list) else text).shape[-2:] == (LENGTH, tiny.widths[ROWS])
    assert row.timestep in calls[0]
    assert row.packing == (2 if tiny.packed else 1)
    assert not tiny.packed or sample.shape[1] == tiny.packed


def test_every_row_is_tested_here() -> None:
    assert {tiny.family for tiny in FAMILIES.values()} == set(TABLE)
    assert {each for row in TABLE.values() for each in row.classes} == {tiny.denoiser for tiny in FAMILIES.values()}


def test_the_table_in_the_documentation_is_up_to_date() -> None:
    tool = runpy.run_path(str(Path(__file__).resolve().parents[1] / "tools" / "family_table.py"))
    page = tool["PAGE"].read_text(encoding="utf-8")
    assert tool["written"](page) == page, "run `python tools/family_table.py`"
    assert all(f"| {row.title} | " in page for row in TABLE.values())
