"""Layer kinds from outside: three that only this file knows go wherever those of the library go, or are refused there."""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import nn

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureConfigError,
    ErasureFileError,
    ErasureInputError,
    combine,
    to_kohya,
    with_gate,
    with_schedule,
)
from diffusers_erasure.base_model import describe_base
from diffusers_erasure.layers import (
    HookLayer,
    Layer,
    LayerKind,
    Pass,
    Place,
    SiteEdit,
    SiteLayer,
    Summand,
    WeightChange,
    layer_kind,
    register_layer_kind,
    registry,
)
from diffusers_erasure.layers.buffers import Tensors, live_buffer
from diffusers_erasure.layers.lora import LoraLayer, LowRankPart
from diffusers_erasure.layers.modifiers import Conditions, Modifier
from diffusers_erasure.layers.sites import find_site
from diffusers_erasure.schema import (
    CARD_FILE,
    MODIFIER_PREFIX,
    TENSOR_FILE,
    BaseModel,
    GateSpec,
    LayerSpec,
)
from tests.commands import invoke
from tests.helpers import (
    PROMPT,
    ROUNDINGS,
    assert_same_weights,
    far,
    is_mark,
    random_erasure,
    roundings,
    rows_of,
    tiny_sd_pipe,
    unchanged_by,
    weights,
)


# ----------------------------------------------------------------------- the kinds: what somebody else's file would hold


@dataclasses.dataclass(frozen=True)
class VectorPart:
    vector: torch.Tensor
    modifier: Modifier | None
    index: int


class Vectors(SiteEdit):
    """The vectors of some erasures at one site; how strongly each acts, the pass says."""

    rows: torch.Tensor  # [parts, C]

    def __init__(
        self,
        module: nn.Module,
        parts: Mapping[tuple[str, int], VectorPart],
        columns: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(module, parts, columns, device, dtype)
        live_buffer(self, "rows", torch.stack([part.vector for part in parts.values()]), device, dtype)

    def forward(self, output: torch.Tensor, now: Pass) -> torch.Tensor:
        """[C], or [1 or B, 1, C]."""
        rows, factors = self.rows.to(output.device, output.dtype), self.factors(now, output.device, len(output))
        return rows.sum(0) if factors is None else (factors.to(rows.dtype) @ rows)[:, None]


class VectorLayer(SiteLayer):
    edit: ClassVar[type[SiteEdit]] = Vectors
    act: ClassVar[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]

    def hook(self, component: nn.Module, site: str) -> tuple[nn.Module, Place, torch.utils.hooks.RemovableHandle]:
        module, place = find_site(component, site), Act(self.conditions, type(self))
        return module, place, module.register_forward_hook(place)

    def part(self, spec: LayerSpec, tensors: Tensors, index: int, modifier: Modifier | None) -> VectorPart:
        return VectorPart(tensors[spec.sites[index] + ".vector"], modifier, index)


class Act(Place):
    def __init__(self, conditions: Conditions, layer: type[VectorLayer]) -> None:
        super().__init__(conditions)
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        vectors, now = self.at_work()
        return None if vectors is None else self.layer.act(output, vectors(output, now))


class GainLayer(VectorLayer):
    act = staticmethod(lambda output, gain: output + output * gain)


class ShiftLayer(VectorLayer):
    act = staticmethod(lambda output, shift: output + shift)


class VectorKind(LayerKind):
    """A vector for each channel of a `Linear`'s output."""

    def validate(self, spec: LayerSpec, tensors: Tensors) -> None:
        if set(tensors) != {f"{site}.vector" for site in spec.sites} or any(t.ndim != 1 for t in tensors.values()):
            raise ErasureFileError(f"{spec.file}: a layer {self.name!r} has one vector for each site.")

    def rescaled(self, tensors: Tensors, factor: float) -> dict[str, torch.Tensor]:
        return {name: value * factor for name, value in tensors.items()}

    def check(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> None:
        for site in spec.sites:
            if find_site(component, site).weight.shape[0] != len(tensors[f"{site}.vector"]):
                raise ErasureCompatibilityError(f"{site!r} has another width: made for another architecture.")


class GainKind(VectorKind):
    """Answers what it must, and refuses a gate; all else is the default's."""

    name: ClassVar[str] = "gain"
    live: ClassVar[type[HookLayer]] = GainLayer

    def why_no_gate(self, spec: LayerSpec) -> str | None:
        return "a gain is the same for every prompt"


class ShiftChange(WeightChange):
    parameters: ClassVar[tuple[str, ...]] = ("bias",)

    def __init__(self, site: str, module: nn.Module, vector: torch.Tensor) -> None:
        super().__init__(site, module)
        self.vector = vector

    @classmethod
    def applied(
        cls, parameters: Mapping[str, torch.Tensor], changes: Sequence[tuple[float, Self]]
    ) -> dict[str, torch.Tensor]:
        return {"bias": parameters["bias"] + sum(strength * each.vector.double() for strength, each in changes)}

    def values(self, name: str, positions: list[int]) -> torch.Tensor | None:
        return self.vector.double()[positions] if name == "bias" else None


class ShiftKind(VectorKind):
    """Is a change of weights, and can be added."""

    name: ClassVar[str] = "shift"
    live: ClassVar[type[HookLayer]] = ShiftLayer

    def weight_changes(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> Sequence[WeightChange]:
        return [ShiftChange(site, find_site(component, site), tensors[f"{site}.vector"]) for site in spec.sites]

    def reads(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> set[Any]:
        return set()

    def summed(
        self, members: Sequence[Summand], rank: int | None, max_error: float | None
    ) -> list[tuple[Layer, float]]:
        total: dict[str, torch.Tensor] = {}
        for name, value in (item for member in members for item in member.tensors.items()):
            total[name] = total[name] + value if name in total else value
        sites = tuple(name.removesuffix(".vector") for name in total)
        return [(Layer(self.name, sites, total, members[0].spec.component), 0.0)]


class ThinLayer(LoraLayer):
    def part(self, spec: LayerSpec, tensors: Tensors, index: int, modifier: Modifier | None) -> LowRankPart:
        return LowRankPart(*ThinKind().lora(spec, tensors)[spec.sites[index]], modifier, index)


class ThinKind(LayerKind):
    """A LoRA of rank 1 under other names."""

    name: ClassVar[str] = "thin"
    live: ClassVar[type[HookLayer]] = ThinLayer

    def validate(self, spec: LayerSpec, tensors: Tensors) -> None:
        assert set(tensors) == {f"{site}.{half}" for site in spec.sites for half in ("row", "column")}

    def rescaled(self, tensors: Tensors, factor: float) -> dict[str, torch.Tensor]:
        return {name: value * factor if name.endswith(".column") else value for name, value in tensors.items()}

    def check(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> None:
        for site in spec.sites:
            find_site(component, site)

    def lora(self, spec: LayerSpec, tensors: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {site: (tensors[f"{site}.row"][None], tensors[f"{site}.column"][:, None]) for site in spec.sites}


KINDS = (GainKind(), ShiftKind(), ThinKind())
VECTORS = ("gain", "shift")


# --------------------------------------------------------------------------------------------------------- the tests

SITES = tuple(
    f"{block}.transformer_blocks.0.{part}"
    for block in ("down_blocks.1.attentions.0", "mid_block.attentions.0")
    for part in ("attn2.to_out.0", "ff.net.2")
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_kinds", dict(registry._kinds))
    for kind in KINDS:
        register_layer_kind(kind)


@cache
def base() -> BaseModel:
    return describe_base(tiny_sd_pipe())


@cache
def vector_layer(kind: str, seed: int = 0, sites: tuple[str, ...] = SITES) -> Layer:
    unet, generator = tiny_sd_pipe().unet, torch.Generator().manual_seed(seed)
    widths = {site: len(unet.get_submodule(site).weight) for site in sites}
    return Layer(kind, sites, {f"{s}.vector": torch.randn(w, generator=generator) for s, w in widths.items()})


def as_erasure(*layers: Layer, target: str = "zebra") -> Erasure:
    return Erasure.from_layers(layers, base=base(), concepts=target, anchors="horse", method="mine")


def erasure_of(kind: str, seed: int = 0, sites: tuple[str, ...] = SITES, target: str = "zebra") -> Erasure:
    return as_erasure(vector_layer(kind, seed, sites), target=target)


class Dense(nn.Module):
    """A `Linear` and what becomes of its output: the oracle, which knows nothing of hooks."""

    def __init__(self, inner: nn.Module, kind: str, vector: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.kind, self.vector = inner, kind, vector

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.inner(hidden_states)
        return output + (output * self.vector if self.kind == "gain" else self.vector)


def dense(kind: str, strength: float = 1.0, seed: int = 0) -> Any:
    pipe, layer = tiny_sd_pipe(), vector_layer(kind, seed)
    for site in layer.sites:
        module = Dense(pipe.unet.get_submodule(site), kind, layer.tensors[f"{site}.vector"] * strength)
        pipe.unet.set_submodule(site, module)
    return pipe


def predict(pipe: Any, timestep: int = 500, prompts: Sequence[str] = (PROMPT, "zebra")) -> Any:
    latents = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return pipe.unet(latents, timestep, torch.cat([rows_of(pipe, each) for each in prompts])).sample.numpy()


@pytest.mark.parametrize("kind", VECTORS)
def test_saved_loaded_and_off_again(pipe: Any, kind: str, tmp_path: Path) -> None:
    """Bit for bit the module that computes it itself; at strength 0, disabled and unloaded the base."""
    base, erasure = predict(pipe), erasure_of(kind)
    assert far(predict(dense(kind)), base) > 0.05
    erasure.save_pretrained(tmp_path / "one")
    back = Erasure.from_pretrained(tmp_path / "one")
    assert back.content_hash == erasure.content_hash and back.config.layers == erasure.config.layers

    def load_and_unload() -> None:
        pipe.load_erasure(tmp_path / "one", "a", strict_base="error")
        assert (predict(pipe) == predict(dense(kind))).all()
        assert [name for name in pipe.unet.state_dict() if "erasure" in name and not is_mark(name)] == []
        pipe.set_erasures("a", 0.4)
        assert (predict(pipe) == predict(dense(kind, 0.4))).all()
        assert (predict(copy.deepcopy(pipe)) == predict(pipe)).all()
        pipe.save_erasure(tmp_path / "weaker")
        pipe.set_erasures("a", 0.0)
        assert (predict(pipe) == base).all()
        pipe.set_erasures("a", 1.0)
        with pipe.erasures_disabled():
            assert (predict(pipe) == base).all()
        pipe.load_erasure(random_erasure(tiny_sd_pipe()), "beside")
        both = predict(pipe)
        pipe.unload_erasure("beside")
        assert far(both, predict(pipe)) > 0.05 and (predict(pipe) == predict(dense(kind))).all()
        pipe.unload_erasure()

    unchanged_by(pipe, load_and_unload)
    pipe.load_erasure(tmp_path / "weaker")
    assert roundings(predict(pipe), predict(dense(kind, 0.4))) <= ROUNDINGS
    wide = dataclasses.replace(vector_layer(kind), tensors={f"{site}.vector": torch.ones(3) for site in SITES})
    with pytest.raises(ErasureCompatibilityError, match="another width"):
        unchanged_by(pipe, lambda: pipe.load_erasure(as_erasure(wide)))


@pytest.mark.parametrize("kind", VECTORS)
def test_it_is_shown(pipe: Any, kind: str, tmp_path: Path) -> None:
    erasure = erasure_of(kind)
    assert pipe.load_erasure(erasure).layers == (f"{kind} on unet (4 sites)",)
    erasure.save_pretrained(tmp_path / "one")
    card = (tmp_path / "one" / CARD_FILE).read_text(encoding="utf-8")
    assert f"| layer 1 | {kind} on unet, 4 site(s), in `erasure.safetensors` |" in card and "no LoRA" in card
    assert f"layer 1, {kind}" in invoke("info", str(tmp_path / "one")).output


@pytest.mark.parametrize("kind", VECTORS)
def test_a_schedule(pipe: Any, kind: str, tmp_path: Path) -> None:
    with_schedule(erasure_of(kind), [1.0, 0.4, 0.0]).save_pretrained(tmp_path / "one")
    base = {t: predict(pipe, t) for t in (100, 500, 900)}
    pipe.load_erasure(tmp_path / "one")
    assert pipe.list_erasures()[0].layers == (f"{kind} on unet (4 sites, by timestep)",)
    assert (predict(pipe, 100) == predict(dense(kind), 100)).all()
    assert roundings(predict(pipe, 500), predict(dense(kind, 0.4), 500)) <= ROUNDINGS
    assert (predict(pipe, 900) == base[900]).all()
    with pytest.raises(ErasureCompatibilityError, match="by timestep or by prompt"):
        pipe.fuse_erasures()


def test_a_gate_or_why_there_is_none(pipe: Any) -> None:
    gated = with_gate(erasure_of("shift"), pipe, factor=1.0)
    base, full = predict(pipe), predict(dense("shift"))
    pipe.load_erasure(gated)
    found = predict(pipe)
    assert far(found[1], full[1]) <= 2e-3 * far(full[1], base[1])  # its concept; the gate's rows are float16
    assert 0.01 < far(found[0], base[0]) < 0.99 * far(full[0], base[0])

    erasure = erasure_of("gain")
    with pytest.raises(ErasureInputError, match=r"'gain', can have no gate: a gain is the same for every prompt\."):
        with_gate(erasure, pipe)
    spec = GateSpec(f"{MODIFIER_PREFIX}0.gate")
    layer = dataclasses.replace(erasure.config.layers[0], gate=spec)
    with pytest.raises(ErasureConfigError, match="the same for every prompt"):
        tensors = {TENSOR_FILE: {**erasure.tensors[TENSOR_FILE], spec.name: torch.ones(1, 2, 3)}}
        Erasure(dataclasses.replace(erasure.config, layers=(layer,)), tensors)


class NoScheduleKind(GainKind):
    name: ClassVar[str] = "constant"

    def why_no_schedule(self, spec: LayerSpec) -> str | None:
        return "it is constant"


def test_why_there_is_no_schedule() -> None:
    register_layer_kind(NoScheduleKind())
    with pytest.raises(
        ErasureInputError, match="Layer 0, of the kind 'constant', can have no schedule: it is constant"
    ):
        with_schedule(erasure_of("constant"), [1.0])


def test_what_it_is_not(pipe: Any, tmp_path: Path) -> None:
    """The defaults: no change of weights, no sum, no LoRA."""
    erasure = erasure_of("gain")
    with pytest.raises(ErasureInputError, match="Erasure number 2 has a layer of kind 'gain', which cannot be added"):
        combine([erasure_of("shift", target="cat"), erasure], mode="sum")
    with pytest.raises(ErasureInputError, match=r"no kohya form: it has layers of the kinds \['gain'\]"):
        to_kohya(erasure)
    with pytest.raises(ErasureInputError, match=r"layers of the kinds \['gain'\]"):
        unchanged_by(pipe, lambda: pipe.load_erasure(erasure, backend="peft"))
    with pytest.raises(ErasureCompatibilityError, match="'gain' is no change of weights, so it cannot be fused"):
        unchanged_by(pipe, lambda: pipe.load_erasure(erasure, backend="merge"))
    pipe.load_erasure(erasure, "gain")
    with pytest.raises(ErasureCompatibilityError, match="no change of weights"):
        unchanged_by(pipe, lambda: pipe.export_erased(tmp_path / "model"))
    assert not (tmp_path / "model").exists()
    # Nobody knows what it reads, so nothing that changes what is read can be fused beside it.
    pipe.load_erasure(random_erasure(tiny_sd_pipe(), "text_map"), "map")
    with pytest.raises(ErasureInputError, match=r"on which \['gain'\] work too"):
        unchanged_by(pipe, lambda: pipe.fuse_erasures("map"))
    pipe.unload_erasure("gain")
    pipe.fuse_erasures("map")
    with pytest.raises(ErasureInputError, match="unfuse_erasures"):
        unchanged_by(pipe, lambda: pipe.load_erasure(erasure))


def test_a_change_of_weights(pipe: Any) -> None:
    """Fused it is the bias plus the vectors, rounded once, beside a `lora` on the same modules; and back bit for bit."""
    one, two, before = erasure_of("shift"), erasure_of("shift", 1, SITES[:2]), weights(pipe)
    lora = random_erasure(tiny_sd_pipe(), "lora", (f"unet.{SITES[0]}",), size=0.3)
    for name, each, strength in (("one", one, 0.7), ("lora", lora, 1.0), ("two", two, 1.5)):
        pipe.load_erasure(each, name, strength=strength)
    hooked = predict(pipe)
    kept = pipe.fuse_erasures()
    after = weights(pipe)
    for site in SITES:
        bias = before[f"unet.{site}.bias"].double() + 0.7 * vector_layer("shift").tensors[f"{site}.vector"].double()
        if site in SITES[:2]:
            bias = bias + 1.5 * vector_layer("shift", 1, SITES[:2]).tensors[f"{site}.vector"].double()
        assert torch.equal(after.pop(f"unet.{site}.bias"), bias.float())
    changed = {f"unet.{SITES[0]}.weight"}
    assert {name for name in after if not torch.equal(after[name], before[name])} == changed
    assert kept == sum(before[name].nbytes for name in {*changed, *(f"unet.{site}.bias" for site in SITES)})
    assert roundings(predict(pipe), hooked) <= ROUNDINGS
    with pytest.raises(ErasureInputError, match="loaded already"):
        pipe.load_erasure(one, "again")
    pipe.unload_erasure()
    assert_same_weights(weights(pipe), before)
    # It reads nothing: beside a fused map it is exact.
    pipe.load_erasure(random_erasure(tiny_sd_pipe(), "text_map"), "map", backend="merge")
    pipe.load_erasure(erasure_of("shift"))
    assert [info.backend for info in pipe.list_erasures()] == ["merge", "hook"]


def test_a_sum(pipe: Any) -> None:
    one, two = erasure_of("shift"), erasure_of("shift", 1, SITES[1:3], "cat")
    total = combine([one, two], mode="sum")
    (layer,) = total.config.layers
    assert (layer.kind, layer.sites, layer.prefix, total.config.stock) == ("shift", SITES, "shift.", None)
    pipe.load_erasure(total)
    found, both = predict(pipe), tiny_sd_pipe()
    both.load_erasure(one, "one")
    both.load_erasure(two, "two")
    assert roundings(found, predict(both)) <= ROUNDINGS and far(found, predict(dense("shift"))) > 0.05
    Erasure.from_files(total.to_files())


def test_it_is_recognised_in_a_model(pipe: Any, tmp_path: Path) -> None:
    """By the provenance file of an exported model, and by the weights alone."""
    erasure = erasure_of("shift")
    pipe.load_erasure(erasure, "one")
    pipe.export_erased(tmp_path / "model")
    told = json.loads((tmp_path / "model" / "erasure_config.json").read_text())
    assert [layer["kind"] for layer in told["contains"][0]["config"]["layers"]] == ["shift"]
    pipe.fuse_erasures()
    pipe.save_pretrained(tmp_path / "saved")
    for place, why in (("model", "exported with it"), ("saved", "by the change that this erasure makes")):
        found = type(pipe).from_pretrained(tmp_path / place)
        assert (predict(found) == predict(pipe)).all()
        with pytest.raises(ErasureInputError, match=why):
            found.load_erasure(erasure)
        found.load_erasure(erasure_of("shift", 5), strict_base="ignore")


def test_a_lora_under_other_names(pipe: Any) -> None:
    """What is a LoRA is written for kohya and given to peft, whatever it is called."""
    unet, generator = pipe.unet, torch.Generator().manual_seed(0)
    tensors, factors = {}, {}
    for site in SITES:
        shape = unet.get_submodule(site).weight.shape
        column, row = (torch.randn(size, generator=generator) / size**0.5 for size in shape)
        tensors[f"{site}.row"], tensors[f"{site}.column"] = row, column
        factors[f"{site}.lora_A.weight"], factors[f"{site}.lora_B.weight"] = row[None], column[:, None]
    thin = as_erasure(Layer("thin", SITES, tensors))
    lora = random_erasure(tiny_sd_pipe(), "lora", tuple(f"unet.{site}" for site in SITES))
    lora = Erasure(lora.config, {next(iter(lora.tensors)): {f"unet.{name}": value for name, value in factors.items()}})
    assert_same_weights(to_kohya(thin), to_kohya(lora))
    hooked = {}
    for name, each in (("thin", thin), ("lora", lora)):
        pipe.load_erasure(each, name)
        hooked[name] = predict(pipe)
        pipe.unload_erasure()
    assert (hooked["thin"] == hooked["lora"]).all() and far(hooked["thin"], predict(pipe)) > 0.05
    pipe.load_erasure(thin, "thin", backend="peft")
    assert roundings(predict(pipe), hooked["thin"]) <= ROUNDINGS


def test_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert layer_kind("gain") is KINDS[0]
    for name in ("gain", "lora"):
        monkeypatch.setattr(GainKind, "name", name)
        with pytest.raises(ErasureInputError, match=f"a layer kind '{name}' already"):
            register_layer_kind(GainKind())
    for name in ("", "Gain", "a.b", "peft adapters", "items", "g" * 65):
        monkeypatch.setattr(GainKind, "name", name)
        with pytest.raises(ErasureInputError, match="cannot be the name"):
            register_layer_kind(GainKind())
    with pytest.raises(ErasureInputError, match="is an instance"):
        register_layer_kind(GainKind)  # type: ignore[arg-type]
    monkeypatch.undo()
    assert layer_kind("lora").name == "lora"


def test_where_the_kind_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    erasure_of("gain").save_pretrained(tmp_path / "one")
    monkeypatch.delitem(registry._kinds, "gain")
    with pytest.raises(ErasureConfigError, match=r"a layer of the kind 'gain'; this version .* Upgrade"):
        Erasure.from_pretrained(tmp_path / "one")
