"""`ActEraseAttnProcessor`: the same as the hooks, over whatever processors a UNet has."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import nn

from diffusers_erasure import (
    ActEraseAttnProcessor,
    Erasure,
    ErasureInactiveError,
    ErasureInputError,
    ErasureTrainingError,
    compat,
)
from diffusers_erasure.layers.activation import ActivationPatch
from tests import test_stays_on
from tests.helpers import (
    ROUNDINGS,
    assert_like,
    base_images,
    equal,
    far,
    images,
    is_mark,
    roundings,
    rows_of,
    style_lora,
    tiny_sd_pipe,
    tree,
    unchanged_by,
)
from tests.test_activation import ATTENTION, FF, Reference, as_erasure, call, make_plan


ip_adapter = test_stays_on.ip_adapter  # a fixture
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def erasure() -> Erasure:
    return as_erasure(make_plan(ATTENTION), make_plan(ATTENTION[:3], 5, (450.0,)))


def patch(pipe: Any, erasure: Erasure, strength: float = 0.8) -> None:
    pipe.unet.set_attn_processor(ActEraseAttnProcessor.for_unet(pipe.unet, erasure, strength))


def patching(pipe: Any) -> list[str]:
    """The attentions that have an `ActEraseAttnProcessor`."""
    names = (name.removesuffix(".processor") for name, each in pipe.unet.attn_processors.items() if ours(each))
    return sorted(names)


def ours(processor: Any) -> bool:
    return type(processor) is ActEraseAttnProcessor


SITES = sorted(site.removesuffix(".to_out.0") for site in ATTENTION)


def load_ip_adapter(pipe: Any, ip_adapter: dict[str, Any]) -> None:
    pipe.load_ip_adapter(
        str(ip_adapter["folder"]), subfolder="", weight_name="ip.safetensors", image_encoder_folder=None
    )


# ------------------------------------------------------------------------------------------------ the hooks' own edit


def test_the_very_values_of_the_hooks(pipe: Any, erasure: Erasure) -> None:
    base, hooked = images(pipe), tiny_sd_pipe()
    hooked.load_erasure(erasure, strength=0.8)
    before, found = tree(pipe), pipe.unet.attn_processors
    processors = ActEraseAttnProcessor.for_unet(pipe.unet, erasure, strength=0.8)
    assert processors.keys() == found.keys()
    with pytest.raises(ErasureInactiveError, match="they were not set"):
        images(pipe)
    pipe.unet.set_attn_processor(processors)
    assert patching(pipe) == SITES
    assert equal(images(pipe), images(hooked))
    assert far(images(pipe), base) > 0.05
    assert [name for name in pipe.unet.state_dict() if not is_mark(name)] == list(tiny_sd_pipe().unet.state_dict())
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert equal(images(twin), images(hooked))
        ActEraseAttnProcessor.remove(twin.unet)
        assert equal(images(twin), base)
    assert equal(images(pipe), images(hooked))
    ActEraseAttnProcessor.remove(pipe.unet)
    assert all(each is found[name] for name, each in pipe.unet.attn_processors.items())
    assert tree(pipe) == before
    assert equal(images(pipe), base)


def test_at_strength_0_it_is_the_base_bit_for_bit(pipe: Any, erasure: Erasure) -> None:
    base = images(pipe)
    patch(pipe, erasure, 0)
    assert patching(pipe) == SITES
    assert equal(images(pipe), base)


def test_a_users_lora_on_the_projection_reads_patched_values(pipe: Any) -> None:
    """(W + U) patched here, W patched + U unpatched by hooks."""
    plan = make_plan(ATTENTION)
    oracle, hooked = tiny_sd_pipe(), tiny_sd_pipe()
    style = style_lora(oracle)
    for each in (oracle, hooked, pipe):
        each.load_lora_weights(dict(style), adapter_name="style")
    base = images(pipe)
    merged = copy.deepcopy(oracle)
    merged.fuse_lora()
    merged.unload_lora_weights()
    merged = Reference(merged, [(plan, 0.8)]).pipe
    hooked.load_erasure(as_erasure(plan), strength=0.8, strict_base="ignore")
    patch(pipe, as_erasure(plan))
    assert_like(images(pipe), images(merged), base)
    assert far(images(hooked), images(pipe)) > 1e-3


def test_compiled(pipe: Any, erasure: Erasure) -> None:
    """One graph for all timesteps, and another when the patch is taken off."""
    graphs = 0

    def backend(module: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    patch(pipe, erasure)
    drawn = [call(pipe.unet, time, 2) for time in torch.linspace(999, 0, 9)]
    block = pipe.unet.get_submodule(MIDDLE.removesuffix(".attn2"))
    torch.compiler.reset()
    try:
        block.compile(fullgraph=True, backend=backend)
        for time, value in zip(torch.linspace(999, 0, 9), drawn, strict=True):
            assert roundings(call(pipe.unet, time, 2), value) <= ROUNDINGS
        assert graphs == 1
        ActEraseAttnProcessor.remove(pipe.unet)
        time = torch.tensor(500.0)
        assert torch.equal(call(pipe.unet, time, 2), call(tiny_sd_pipe().unet, time, 2))
    finally:
        torch.compiler.reset()


def test_with_a_schedule(pipe: Any) -> None:
    plan = make_plan(ATTENTION)
    plan.schedule = torch.rand(8, len(ATTENTION), generator=torch.Generator().manual_seed(2))
    hooked = tiny_sd_pipe()
    hooked.load_erasure(as_erasure(plan), strength=0.8)
    patch(pipe, as_erasure(plan))
    assert equal(images(pipe), images(hooked))
    ActEraseAttnProcessor.remove(pipe.unet)
    patch(pipe, as_erasure(make_plan(ATTENTION)))
    assert far(images(pipe), images(hooked)) > 1e-3


def test_several_join_as_hooks_do(pipe: Any) -> None:
    """Each is unloaded by itself, and then its attentions have what was found."""
    erasures = {"one": as_erasure(make_plan(ATTENTION[:4])), "two": as_erasure(make_plan(ATTENTION[2:], 7))}
    base, hooked, alone = images(pipe), tiny_sd_pipe(), tiny_sd_pipe()
    for name, each in erasures.items():
        pipe.unet.set_attn_processor(ActEraseAttnProcessor.for_unet(pipe.unet, each, 0.8, name))
        hooked.load_erasure(each, name, strength=0.8)
    alone.load_erasure(erasures["two"], strength=0.8)
    assert equal(images(pipe), images(hooked))
    pipe.unload_erasure("one")
    assert patching(pipe) == sorted(site.removesuffix(".to_out.0") for site in ATTENTION[2:])
    assert equal(images(pipe), images(alone)) and far(images(pipe), images(hooked)) > 1e-3
    ActEraseAttnProcessor.remove(pipe.unet)
    assert patching(pipe) == [] and equal(images(pipe), base)


# ------------------------------------------------------------------------------------------- over other processors

BELOW: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "default": (AttnProcessor2_0, lambda pipe: None),
    "written out": (AttnProcessor, lambda pipe: pipe.unet.set_attn_processor(AttnProcessor())),
    "slices": (SlicedAttnProcessor, lambda pipe: pipe.enable_attention_slicing(1)),
    "fused": (FusedAttnProcessor2_0, lambda pipe: pipe.unet.fuse_qkv_projections()),
}


@pytest.mark.parametrize("below", BELOW)
def test_what_is_below_goes_on(monkeypatch: pytest.MonkeyPatch, erasure: Erasure, below: str) -> None:
    """The found processor attends, of the patched attentions too: the same bits as hooks over it."""
    expected, prepare = BELOW[below]
    pipe, hooked = tiny_sd_pipe(), tiny_sd_pipe()
    hooked.load_erasure(erasure, strength=0.8)
    for each in (pipe, hooked):
        prepare(each)
    found = pipe.unet.attn_processors
    assert {type(each) for each in found.values()} == {expected}
    patch(pipe, erasure)
    assert patching(pipe) == SITES
    assert isinstance(pipe.unet.get_submodule(MIDDLE).processor, expected)
    oracle, attend, attended = images(hooked), expected.__call__, []

    def noted(processor: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        attended.append(type(attn).__name__)
        return attend(processor, attn, *args, **kwargs)

    monkeypatch.setattr(expected, "__call__", noted)
    assert equal(images(pipe), oracle)
    passes = len(attended) // len(found)
    assert attended.count("PatchedAttention") == passes * len(SITES) > 0
    ActEraseAttnProcessor.remove(pipe.unet)
    assert all(each is found[name] for name, each in pipe.unet.attn_processors.items())


def test_fused_projections_are_seen_through(pipe: Any, erasure: Erasure) -> None:
    """Else an erasure on `to_k` would be loaded where nothing calls it."""
    pipe.unet.fuse_qkv_projections()
    patch(pipe, erasure)
    attention = pipe.unet.get_submodule(MIDDLE)
    assert compat.has_fused_projections(attention)
    pipe.unet.unfuse_qkv_projections()
    assert not compat.has_fused_projections(attention)


def test_an_ip_adapter_below(pipe: Any, erasure: Erasure, ip_adapter: dict[str, Any]) -> None:
    """Its scale is set, its masks arrive, its weights move and are saved under the same names."""
    arguments = ip_adapter["arguments"]
    hooked, plain = tiny_sd_pipe(), tiny_sd_pipe()
    for each in (pipe, hooked, plain):
        load_ip_adapter(each, ip_adapter)
    hooked.load_erasure(erasure, strength=0.8)
    found = pipe.unet.attn_processors
    patch(pipe, erasure)
    assert patching(pipe) == SITES
    for scale in (1.0, 0.3):
        for each in (pipe, hooked, plain):
            each.set_ip_adapter_scale(scale)
        drawn = images(pipe, **arguments)
        assert equal(drawn, images(hooked, **arguments))
        assert far(drawn, images(plain, **arguments)) > 0.05
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": [torch.arange(256).reshape(1, 1, 16, 16) / 256]}}
    masked = images(pipe, **arguments, **masks)
    assert equal(masked, images(hooked, **arguments, **masks))
    assert far(masked, drawn) > 1e-4

    state = plain.unet.state_dict()
    assert any("to_k_ip" in name for name in state)
    assert {name: value.shape for name, value in pipe.unet.state_dict().items() if not is_mark(name)} == {
        name: value.shape for name, value in state.items()
    }
    assert sorted(name for name, _ in pipe.unet.named_parameters()) == sorted(
        name for name, _ in plain.unet.named_parameters()
    )
    twin = pickle.loads(pickle.dumps(pipe))
    twin.unet.double()
    below = twin.unet.get_submodule(MIDDLE).processor.found[0]
    assert isinstance(below, IPAdapterAttnProcessor2_0)
    assert {value.dtype for value in below.parameters()} == {torch.float64}
    ActEraseAttnProcessor.remove(pipe.unet)
    assert all(each is found[name] for name, each in pipe.unet.attn_processors.items())
    assert equal(images(pipe, **arguments), images(plain, **arguments))


class Weighted(nn.Module):
    """A processor with tensors of its own, and an attribute that others set, as `set_attention_backend` does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.backend = "native"
        self.register_buffer("offset", torch.tensor(0.25))

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        attn.seen = len(hidden_states)
        assert attn.to_out[0].in_features == hidden_states.shape[-1]
        values = hidden_states * self.weight + self.offset
        for part in attn.to_out:
            values = part(values)
        return values


def test_attributes_and_tensors_of_its_own(pipe: Any, erasure: Erasure) -> None:
    attention = pipe.unet.get_submodule(MIDDLE)
    found = Weighted()
    attention.set_processor(found)
    patch(pipe, erasure)
    processor = attention.processor
    assert processor.backend == "native"
    processor.backend = "other"
    assert found.backend == "other"
    assert not hasattr(processor, "nothing")
    assert any(value is found.weight for value in pipe.unet.parameters())
    pipe.unet.double()
    assert (found.weight.dtype, found.offset.dtype) == (torch.float64, torch.float64)
    attention.float()
    with torch.no_grad():
        drawn = call(pipe.unet.float(), torch.tensor(500.0))
    assert attention.seen == 4
    assert not torch.equal(drawn, call(tiny_sd_pipe().unet, torch.tensor(500.0)))


# ---------------------------------------------------------------------------------------------- what takes them away

REPLACED: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "slicing": lambda pipe, adapter: pipe.enable_attention_slicing(1),
    "fusing": lambda pipe, adapter: pipe.unet.fuse_qkv_projections(),
    "default": lambda pipe, adapter: pipe.unet.set_default_attn_processor(),
    "loading an IP-Adapter": load_ip_adapter,
}


OTHERS = {
    "slicing": "is SlicedAttnProcessor",
    "fusing": "is FusedAttnProcessor2_0",
    "default": "is AttnProcessor:",
    "loading an IP-Adapter": "is AttnProcessor2_0",  # of the self-attention, which comes first
}


@pytest.mark.parametrize("step", REPLACED)
def test_whoever_sets_processors_later_is_noticed(
    pipe: Any, erasure: Erasure, ip_adapter: dict[str, Any], step: str
) -> None:
    """A pass raises; and `remove` leaves the later ones, and nothing else."""
    plain = tiny_sd_pipe()
    arguments = ip_adapter["arguments"] if "IP" in step else {}
    patch(pipe, erasure)
    for each in (pipe, plain):
        REPLACED[step](each, ip_adapter)
    assert patching(pipe) == []
    with pytest.raises(ErasureInactiveError, match=OTHERS[step]):
        images(pipe, **arguments)
    replaced = pipe.unet.attn_processors
    with pipe.erasures_disabled():
        assert equal(images(pipe, **arguments), images(plain, **arguments))
    ActEraseAttnProcessor.remove(pipe.unet)
    assert equal(images(pipe, **arguments), images(plain, **arguments))
    assert all(each is replaced[name] for name, each in pipe.unet.attn_processors.items())
    assert len(pipe.unet._forward_pre_hooks) == 0
    assert sorted(vars(pipe.unet)) == sorted(vars(plain.unet))


def test_unloading_an_ip_adapter_is_noticed(pipe: Any, erasure: Erasure, ip_adapter: dict[str, Any]) -> None:
    load_ip_adapter(pipe, ip_adapter)
    patch(pipe, erasure)
    pipe.unload_ip_adapter()
    assert {type(each) for each in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}
    with pytest.raises(ErasureInactiveError, match="AttnProcessor2_0"):
        images(pipe)
    pipe.unload_erasure()
    assert equal(images(pipe), base_images())


def test_it_is_an_erasure_like_others(pipe: Any, erasure: Erasure) -> None:
    """Listed, set, disabled, guarded, and not loaded twice."""
    base, hooked = images(pipe), tiny_sd_pipe()
    before, found = tree(pipe), pipe.unet.attn_processors
    patch(pipe, erasure)
    (info,) = pipe.list_erasures()
    assert (info.name, info.strength, info.backend) == ("random", 0.8, "processor")
    with pytest.raises(ErasureInputError, match="loaded already, as 'random'"):
        pipe.load_erasure(erasure, "again")
    with pytest.raises(ErasureInputError, match="backend='processor'.*not fused"):
        pipe.fuse_erasures()
    hooked.load_erasure(erasure, "one", strength=0.3)
    pipe.set_erasures("random", 0.3)
    assert equal(images(pipe), images(hooked))
    with pipe.erasures_disabled():
        assert equal(images(pipe), base)
    with pytest.raises(ErasureTrainingError):
        pipe.unet.requires_grad_(True)(torch.zeros(1, 4, 8, 8), 500, torch.zeros(1, 5, 32))
    pipe.unet.requires_grad_(False)
    pipe.unload_erasure("random")
    assert all(each is found[name] for name, each in pipe.unet.attn_processors.items())
    assert tree(pipe) == before
    assert equal(images(pipe), base)


def test_undoing_the_fusion_brings_the_patch_back(pipe: Any, erasure: Erasure) -> None:
    patch(pipe, erasure)
    drawn = images(pipe)
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ErasureInactiveError, match="FusedAttnProcessor"):
        images(pipe)
    pipe.unet.unfuse_qkv_projections()
    assert patching(pipe) == SITES
    assert equal(images(pipe), drawn)


def test_unloaded_while_others_are_over_it(pipe: Any, erasure: Erasure) -> None:
    """diffusers keeps the processors that it found, and puts them back; they patch nothing then."""
    base = images(pipe)
    patch(pipe, erasure)
    pipe.unet.fuse_qkv_projections()
    pipe.unload_erasure()
    pipe.unet.unfuse_qkv_projections()
    assert patching(pipe) == SITES
    assert equal(images(pipe), base)
    patch(pipe, erasure)  # over what those had found
    assert far(images(pipe), base) > 0.05
    ActEraseAttnProcessor.remove(pipe.unet)
    assert patching(pipe) == []


def test_threads_with_strengths_of_their_own(pipe: Any, erasure: Erasure) -> None:
    """As with hooks; and where it is off in one thread, the others' passes are as they were."""
    hooked = tiny_sd_pipe()
    hooked.load_erasure(erasure, "random")
    patch(pipe, erasure)
    wanted: list[Any] = [0.0, 0.8, 1.0, [0.0, 1.0, 0.3, 0.0]]

    def draw(on: Any, strength: Any) -> torch.Tensor:
        with on.erasure_strengths({"random": strength}):
            return call(on.unet, torch.tensor(476.0))

    oracle = [draw(hooked, each) for each in wanted]
    assert torch.equal(oracle[0], call(tiny_sd_pipe().unet, torch.tensor(476.0)))
    with ThreadPoolExecutor(len(wanted)) as pool:
        for _ in range(4):
            for job, own in zip([pool.submit(draw, pipe, each) for each in wanted], oracle, strict=True):
                assert roundings(job.result(), own) <= ROUNDINGS


def test_taken_off_while_a_request_is_under_way(pipe: Any, erasure: Erasure) -> None:
    """It ends as it began, and then the processors that were found are back."""
    base = images(pipe)
    patch(pipe, erasure)
    drawn, under_way, removed = images(pipe), Event(), Event()

    def remove() -> None:
        under_way.wait()
        ActEraseAttnProcessor.remove(pipe.unet)
        removed.set()

    def after_a_step(*args: Any) -> dict[str, Any]:
        under_way.set()
        assert removed.wait(30) and patching(pipe) == SITES
        return {}

    thread = Thread(target=remove)
    thread.start()
    assert equal(images(pipe, callback_on_step_end=after_a_step), drawn)
    thread.join()
    assert patching(pipe) == [] and equal(images(pipe), base)


def test_beside_hooks_it_is_refused(pipe: Any, erasure: Erasure) -> None:
    pipe.load_erasure(erasure, "hooks")
    with pytest.raises(ErasureInputError, match="loaded already, as 'hooks'"):
        unchanged_by(pipe, lambda: ActEraseAttnProcessor.for_unet(pipe.unet, erasure))
    other = as_erasure(make_plan(ATTENTION[:1], 7))
    with pytest.raises(ErasureInputError, match="one form"):
        unchanged_by(pipe, lambda: ActEraseAttnProcessor.for_unet(pipe.unet, other))
    pipe.unload_erasure()
    patch(pipe, other)
    with pytest.raises(ErasureInputError, match="one form"):
        unchanged_by(pipe, lambda: pipe.load_erasure(erasure))


def test_all_or_nothing(pipe: Any, erasure: Erasure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivationPatch, "__init__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        unchanged_by(pipe, lambda: ActEraseAttnProcessor.for_unet(pipe.unet, erasure))


# ------------------------------------------------------------------------------------------------------------ bare


def test_without_arguments_it_is_the_plain_one(pipe: Any) -> None:
    """As diffusers makes them anew, `type(processor)()`."""
    base = images(pipe)
    pipe.unet.set_attn_processor(ActEraseAttnProcessor())
    assert equal(images(pipe), base)
    # The VAE's has a group norm, a residual and [B, C, H, W].
    pipe.vae.encoder.mid_block.attentions[0].set_processor(ActEraseAttnProcessor())
    values = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = tiny_sd_pipe().vae.encoder.mid_block.attentions[0]
    attention, other = (each.unet.get_submodule(MIDDLE) for each in (pipe, tiny_sd_pipe()))
    with torch.no_grad():
        assert roundings(pipe.vae.encoder.mid_block.attentions[0](values), plain(values)) <= ROUNDINGS
        mask = torch.zeros(2, 1, 7).masked_fill(torch.arange(7) > 3, -1e4)
        rows = torch.randn(2, 5, 64), torch.randn(2, 7, 32)
        assert torch.equal(attention(*rows, mask), other(*rows, mask))


# ---------------------------------------------------------------------------------------------------------- refused


def test_only_attention_outputs(pipe: Any) -> None:
    for wrong in (as_erasure(make_plan(FF)), as_erasure(make_plan(ATTENTION), gate=rows_of(pipe)), "no erasure"):
        with pytest.raises(ErasureInputError):
            unchanged_by(pipe, lambda wrong=wrong: ActEraseAttnProcessor.for_unet(pipe.unet, wrong))
    with pytest.raises(ErasureInputError, match="strength"):
        unchanged_by(pipe, lambda: ActEraseAttnProcessor.for_unet(pipe.unet, as_erasure(make_plan(ATTENTION)), -1))


def test_one_erasure_twice_is_refused(pipe: Any, erasure: Erasure) -> None:
    """But not one that was made and never set."""
    ActEraseAttnProcessor.for_unet(pipe.unet, erasure, 0.3)
    patch(pipe, erasure)
    assert len(pipe.unet._forward_pre_hooks) == 1, "the guard: those that were never set are gone"
    drawn = images(pipe)
    for name in (None, "other"):
        with pytest.raises(ErasureInputError, match="loaded already, as 'random'"):
            unchanged_by(pipe, lambda name=name: ActEraseAttnProcessor.for_unet(pipe.unet, erasure, 1.0, name))
    with pytest.raises(ErasureInputError, match="patches already"):
        ActEraseAttnProcessor(found=pipe.unet.get_submodule(MIDDLE).processor)
    assert equal(images(pipe), drawn)
    ActEraseAttnProcessor.remove(pipe.unet)
    patch(pipe, erasure)
    assert equal(images(pipe), drawn)
    ActEraseAttnProcessor.remove(pipe.unet)
    ActEraseAttnProcessor.remove(pipe.unet)
    assert len(pipe.unet._forward_pre_hooks) == 0


def test_a_processor_with_a_projection_of_its_own(pipe: Any, erasure: Erasure) -> None:
    """It would compute without the patch."""
    attention = pipe.unet.get_submodule(MIDDLE)
    attention.set_processor(CustomDiffusionAttnProcessor(True, True, hidden_size=64, cross_attention_dim=32))
    patch(pipe, erasure)
    with pytest.raises(ErasureInactiveError, match="CustomDiffusionAttnProcessor does not call"):
        images(pipe)
    with pipe.erasures_disabled():
        base = images(pipe)
    pipe.set_erasures("random", 0.0)
    assert equal(images(pipe), base)
    ActEraseAttnProcessor.remove(pipe.unet)
    images(pipe)
