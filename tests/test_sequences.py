"""Whatever is done in whatever order, a pipeline is what the erasures and LoRAs that it then has make of it.

A state machine calls the library and diffusers at random. It keeps what should be there: erasures with strengths and back ends, LoRAs with
weights. From that alone it computes all weights in float64, and after each step compares one pass of the pipeline with one of a UNet that
has these weights and no hooks. An error is allowed only where the machine says so; then nothing must have changed, which the next
comparison shows.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from diffusers_erasure import Erasure, ErasureError, ErasureInactiveError
from diffusers_erasure.low_rank import DOWN, UP
from tests.coexistence import copy_of
from tests.helpers import (
    CONV_SITES,
    ROUNDINGS,
    UNET_SITES,
    noise,
    random_erasure,
    roundings,
    style_lora,
    tiny_sd_pipe,
)


@cache
def fresh() -> Any:
    return tiny_sd_pipe()


@cache
def catalogue() -> dict[str, Erasure]:
    """Two LoRAs on modules that overlap, and two maps of the text rows."""
    pipe = fresh()
    return {
        "one": random_erasure(pipe, "lora", (*UNET_SITES, CONV_SITES[0]), size=0.5, seed=1),
        "two": random_erasure(pipe, "lora", UNET_SITES[2:], size=0.5, seed=2),
        "map": random_erasure(pipe, "text_map", size=0.5, seed=3),
        "other map": random_erasure(pipe, "text_map", rank=2, size=0.5, seed=4),
    }


@cache
def style(seed: int) -> dict[str, torch.Tensor]:
    """A user's LoRA on the UNet, also where the erasures are."""
    found = style_lora(fresh(), seed, ("attn1.to_q", "attn2.to_k", "attn2.to_v"))
    return {name: value for name, value in found.items() if name.startswith("unet.")}


def loaded_style(seed: int) -> dict[str, torch.Tensor]:
    """As from a file: diffusers takes the very tensors, and hotswapping writes into them."""
    return {name: value.clone() for name, value in style(seed).items()}


@cache
def deltas(name: str | int) -> Mapping[str, torch.Tensor]:
    """B A of an erasure or of a user's LoRA, by module, float64; none for a map."""
    if isinstance(name, int):
        tensors = {key.removeprefix("unet."): value.double() for key, value in style(name).items()}
    else:
        (layer,) = catalogue()[name].config.layers
        tensors = {key: value.double() for key, value in catalogue()[name].layer_tensors(layer).items()}
    sites = [key.removesuffix(DOWN) for key in tensors if key.endswith(DOWN)]
    shapes = {site: (tensors[site + UP].shape[0], *tensors[site + DOWN].shape[1:]) for site in sites}
    return {s: (tensors[s + UP].flatten(1) @ tensors[s + DOWN].flatten(1)).reshape(shapes[s]) for s in sites}


def transform(items: Iterable["Item"]) -> torch.Tensor:
    """T = 1 + the sum of s D^T A."""
    total = torch.eye(32, dtype=torch.float64)
    for item in items:
        (layer,) = catalogue()[item.name].config.layers
        tensors = catalogue()[item.name].layer_tensors(layer)
        total = total + item.strength * tensors["D"].double().T @ tensors["A"].double()
    return total


READERS = tuple(name for name, _ in fresh().unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v")))
TOUCHED = tuple(dict.fromkeys([*READERS, *deltas("one"), *deltas(1)]))


@dataclass(frozen=True)
class Item:
    """An erasure that should be there."""

    name: str
    strength: float
    backend: str

    @property
    def is_map(self) -> bool:
        return "map" in self.name


@dataclass
class Model:
    """What should be there."""

    items: dict[str, Item] = field(default_factory=dict)
    loras: dict[str, int] = field(default_factory=dict)  # the seed of each
    active: dict[str, float] = field(default_factory=dict)  # the weight of each
    fused: dict[str, float] = field(default_factory=dict)  # LoRAs, by `fuse_lora`, with their seeds in `loras`
    lasting: list[tuple[int, float]] = field(default_factory=list)  # LoRAs that were unloaded while they were fused
    gone: bool = False  # adapters of erasures were unloaded with all others
    fused_dtype: torch.dtype = torch.float32
    spoilt: bool = False  # fused weights were rounded since
    disabled: bool = False  # `disable_lora`, which lasts also when others are loaded
    mixed: bool = False  # but no more where the guard has switched an erasure's adapter on again
    dtype: torch.dtype = torch.float32

    def of(self, *backends: str) -> list[Item]:
        return [item for item in self.items.values() if item.backend in backends]

    @property
    def frozen(self) -> bool:
        """Whether fused weights are no longer those that were fused, so that they cannot be restored."""
        return bool(self.of("merge")) and (self.spoilt or self.dtype != self.fused_dtype)

    def weight(self, site: str, erased: bool) -> torch.Tensor:
        """What a module should compute with, float64."""
        value = fresh().unet.get_submodule(site).weight.detach().double()
        reads = site in READERS

        def add(parts: Iterable[tuple[str | int, float]]) -> None:
            nonlocal value
            for name, factor in parts:
                if site in deltas(name):
                    value = value + factor * deltas(name)[site]

        def added(*backends: str) -> list[tuple[str | int, float]]:
            return [(item.name, item.strength) for item in self.of(*backends) if erased and not item.is_map]

        def maps(backend: str) -> torch.Tensor:
            return transform(item for item in self.of(backend) if erased and item.is_map)

        add(self.lasting)
        add(added("merge"))
        value = value @ maps("merge") if reads else value
        add([(self.loras[name], factor) for name, factor in (self.fused or self.active).items()])
        add(added("hook", "peft"))
        return value @ maps("hook") if reads else value


@cache
def bare() -> Any:
    """The hook-free UNet into which the weights are written."""
    return copy.deepcopy(fresh().unet).double()


class Machine(RuleBasedStateMachine):
    """See the top."""

    def __init__(self) -> None:
        super().__init__()
        self.pipe = copy_of(fresh())
        self.model = Model()
        self.offloaded = False

    @initialize(
        name=st.sampled_from(sorted(catalogue())),
        backend=st.sampled_from(["hook", "merge", "peft"]),
        seed=st.sampled_from([None, 11, 12]),
    )
    def begin(self, name: str, backend: str, seed: int | None) -> None:
        """As most begin: with an erasure, and perhaps a LoRA."""
        if seed is not None:
            self.load_lora("style", seed)
        self.load(name, backend, 1.0)

    def tried(self, allowed: bool, call: Any) -> bool:
        """Call it; returns whether it succeeded. A typed error is in order only where it is allowed."""
        try:
            call()
        except ErasureError:
            if not allowed:
                raise
            return False
        return True

    # ---------------------------------------------------------------------------------------------- erasures

    @rule(
        name=st.sampled_from(sorted(catalogue())),
        backend=st.sampled_from(["hook", "hook", "merge", "peft"]),
        strength=st.sampled_from([1.0, 0.5, 0.0]),
    )
    def load(self, name: str, backend: str, strength: float) -> None:
        model, item = self.model, Item(name, strength, backend)
        under_map = any(other.is_map for other in model.of("merge"))
        map_meets = backend == "merge" and (item.is_map or under_map) and bool(model.items)
        allowed = (
            name in model.items
            or under_map
            or map_meets
            or (backend == "peft" and item.is_map)
            or (backend == "merge" and (model.frozen or self.offloaded))
        )
        if (backend == "peft" and self.offloaded) or (backend != "hook" and model.fused):
            return
        if self.tried(
            allowed,
            lambda: self.pipe.load_erasure(
                catalogue()[name], name, strength=strength, backend=backend, strict_base="ignore"
            ),
        ):
            model.items[name] = item
            if backend == "merge":
                model.fused_dtype = model.dtype

    @precondition(lambda self: self.model.items)
    @rule(data=st.data(), strength=st.sampled_from([0.0, 0.3, 1.0, 1.5]))
    def set_strength(self, data: Any, strength: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.items)))
        item = self.model.items[name]
        allowed = item.backend == "merge" and (self.model.frozen or self.offloaded)
        if self.tried(allowed, lambda: self.pipe.set_erasures(name, strength)):
            self.model.items[name] = replace(item, strength=strength)

    @precondition(lambda self: self.model.items)
    @rule(data=st.data(), every=st.booleans())
    def unload(self, data: Any, every: bool) -> None:
        names = sorted(self.model.items)
        names = names if every else [data.draw(st.sampled_from(names))]
        merged = any(self.model.items[name].backend == "merge" for name in names)
        allowed = merged and (self.model.frozen or self.offloaded)
        if self.tried(allowed, lambda: self.pipe.unload_erasure(None if every else names[0])):
            for name in names:
                del self.model.items[name]
            self.model.gone = self.model.gone and bool(self.model.of("peft"))

    @precondition(lambda self: self.model.items and not self.model.fused)
    @rule(data=st.data())
    def fuse(self, data: Any) -> None:
        model = self.model
        names = data.draw(st.lists(st.sampled_from(sorted(model.items)), min_size=1, unique=True))
        together = {*names, *(item.name for item in model.of("merge"))}
        allowed = (
            any(model.items[name].backend == "peft" for name in names)
            or model.frozen
            or self.offloaded
            or any(model.items[name].is_map for name in together)
            and together != set(model.items)
        )
        if self.tried(allowed, lambda: self.pipe.fuse_erasures(names)):
            if any(model.items[name].backend == "hook" for name in names):
                model.fused_dtype = model.dtype
            for name in names:
                model.items[name] = replace(model.items[name], backend="merge")

    @precondition(lambda self: self.model.items)
    @rule()
    def unfuse(self) -> None:
        model = self.model
        allowed = bool(model.of("merge")) and (model.frozen or self.offloaded)
        if self.tried(allowed, self.pipe.unfuse_erasures):
            for item in model.of("merge"):
                model.items[item.name] = replace(item, backend="hook")

    @precondition(lambda self: self.model.items)
    @rule()
    def disable(self) -> None:
        model = self.model

        def look() -> None:
            with self.pipe.erasures_disabled():
                self.compare(erased=False)

        self.tried(bool(model.of("merge")) and (model.frozen or self.offloaded), look)

    @precondition(lambda self: any(item.strength for item in self.model.of("hook", "peft")))
    @rule()
    def save(self) -> None:
        """What acts beside the weights would be lost."""
        with TemporaryDirectory() as folder:
            with pytest.raises(ErasureInactiveError, match="was written"):
                self.pipe.unet.save_pretrained(folder)
            assert not any(Path(folder).iterdir())

    # ------------------------------------------------------------------------------------------------- LoRAs

    @precondition(lambda self: not self.offloaded and not self.model.fused)
    @rule(name=st.sampled_from(["style", "second"]), seed=st.sampled_from([11, 12, 13]))
    def load_lora(self, name: str, seed: int) -> None:
        """Loading makes it the only one that is active; hotswapping leaves what is active."""
        model = self.model
        swap = name in model.loras
        self.pipe.load_lora_weights(loaded_style(seed), adapter_name=name, hotswap=swap)
        model.loras[name] = seed
        if model.mixed and not swap:
            self.make_active([name], 1.0)
        elif not swap:
            model.active = {} if model.disabled else {name: 1.0}
        elif name in model.active:
            model.active[name] = 1.0

    @precondition(lambda self: self.model.loras and not self.model.fused)
    @rule(data=st.data(), weight=st.sampled_from([0.0, 0.4, 1.0]))
    def activate(self, data: Any, weight: float) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.model.loras)), min_size=1, unique=True))
        self.make_active(names, weight)

    def make_active(self, names: list[str], weight: float) -> None:
        self.pipe.enable_lora()
        self.pipe.set_adapters(names, [weight] * len(names))
        self.model.active = dict.fromkeys(names, weight)
        self.model.disabled = self.model.mixed = False

    @precondition(lambda self: self.model.loras and not self.model.fused)
    @rule()
    def disable_lora(self) -> None:
        self.pipe.disable_lora()
        self.model.active, self.model.disabled = {}, True

    @precondition(lambda self: self.model.loras and not self.model.fused)
    @rule(data=st.data())
    def delete_lora(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.loras)))
        self.pipe.delete_adapters(name)
        del self.model.loras[name]
        self.model.active = {}
        if self.model.loras:  # by itself peft may make another one active
            self.make_active(sorted(self.model.loras), 1.0)

    @precondition(lambda self: self.model.loras or self.model.of("peft"))
    @rule()
    def unload_loras(self) -> None:
        model = self.model
        self.pipe.unload_lora_weights()
        model.lasting += [(model.loras[name], factor) for name, factor in model.fused.items()]
        model.loras, model.active, model.fused = {}, {}, {}
        model.disabled = model.mixed = False
        model.gone = bool(model.of("peft"))

    @precondition(lambda self: self.model.active and not self.model.fused and not self.offloaded)
    @precondition(lambda self: not self.model.of("merge", "peft"))
    @rule()
    def fuse_lora(self) -> None:
        self.pipe.fuse_lora()
        self.model.fused = dict(self.model.active)

    # While weights are offloaded peft writes into what stands in their place, with and without an erasure.
    @precondition(lambda self: self.model.fused and not self.offloaded)
    @rule()
    def unfuse_lora(self) -> None:
        self.pipe.unfuse_lora()
        self.model.fused = {}

    # ------------------------------------------------------------------------------------------- pipeline, place

    @precondition(lambda self: not self.offloaded)
    @rule()
    def another_pipeline(self) -> None:
        classes = StableDiffusionPipeline, StableDiffusionImg2ImgPipeline
        other = classes[isinstance(self.pipe, StableDiffusionPipeline)]
        self.pipe = other.from_pipe(self.pipe, torch_dtype=self.model.dtype)  # by default it casts to float32

    @rule()
    def copy_pipeline(self) -> None:
        if not self.offloaded:
            self.pipe = copy_of(self.pipe)

    @rule()
    def offload(self) -> None:
        if self.offloaded:
            self.pipe.remove_all_hooks()
        else:
            cpu_offload(self.pipe.unet, "cpu")
        self.offloaded = not self.offloaded

    @precondition(lambda self: not self.offloaded)
    @rule()
    def cast(self) -> None:
        """To float64, which rounds nothing, or back from there."""
        if self.model.of("merge") and self.model.fused_dtype == self.model.dtype == torch.float64:
            self.model.spoilt = True
        self.model.dtype = torch.float64 if self.model.dtype == torch.float32 else torch.float32
        self.pipe.vae = copy.deepcopy(self.pipe.vae)
        self.pipe.to(self.model.dtype)

    # ------------------------------------------------------------------------------------------- the comparison

    @invariant()
    def is_what_it_should_be(self) -> None:
        model = self.model
        listed = {info.name: Item(info.name, info.strength, info.backend) for info in self.pipe.list_erasures()}
        assert listed == model.items
        model.mixed = model.mixed or (model.disabled and bool(model.of("peft")))
        if model.gone and any(item.strength for item in model.of("peft")):
            with pytest.raises(ErasureInactiveError, match="is gone"):
                noise(self.pipe)
            return
        self.compare(erased=True)

    def compare(self, erased: bool) -> None:
        """One pass with the pipeline's UNet, and one with the weights that should be there."""
        model, unet = self.model, bare()
        for site in TOUCHED:
            unet.get_submodule(site).weight.data = model.weight(site, erased)
        off = roundings(noise(self.pipe).double(), noise(SimpleNamespace(unet=unet)))
        assert off <= ROUNDINGS, f"{off} roundings off"


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_two_hundred_steps() -> None:
    run(10, 25)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_steps() -> None:
    run(330, 40)
