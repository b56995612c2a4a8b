"""A fit is private: it runs a twin of the denoiser, and whoever draws with the pipeline meanwhile sees nothing of it."""

import copy
import gc
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from torch import nn

from diffusers_erasure import Erasure, compat, erase
from diffusers_erasure.collateral import predictions
from diffusers_erasure.denoising import twin as twins
from diffusers_erasure.denoising.calls import Caller
from diffusers_erasure.denoising.twin import private, twin_of
from diffusers_erasure.layers import register_layer_kind, registry
from diffusers_erasure.live.processor import ActEraseAttnProcessor
from diffusers_erasure.methods.acterase import Calibration
from diffusers_erasure.methods.probes import inputs_seen
from diffusers_erasure.training import TrainingRun
from diffusers_erasure.training.loop import Trainer
from diffusers_erasure.training.network import Network
from tests import test_layer_kind
from tests.coexistence import FORMS, NEIGHBOURS, base, erased
from tests.helpers import (
    cast_to_float8,
    edits,
    equal,
    images,
    load_style,
    noise,
    rows_of,
    tiny_sd_pipe,
    tree,
)
from tests.test_fusing import PackedWeight


QUICK: dict[str, Any] = {"steps": 4, "trajectories": 2, "num_inference_steps": 3, "batch_size": 1, "rank": 2}
FITS: dict[str, dict[str, Any]] = {
    "esd": {"method": "esd", "gradient_checkpointing": True, **QUICK},
    "sdd": {"method": "sdd", **QUICK},
    "dumo": {"method": "dumo", "schedule_steps": 2, **QUICK},
    "acterase": {"method": "acterase", "num_pairs": 3, "num_inference_steps": 4, "timesteps": 3},
}


# -------------------------------------------------------------------------------------------------------- the twin


def state(pipe: Any) -> Any:
    """All of a pipeline's models that a fit might change, but for the values of the weights."""
    unet = compat.unwrap_compiled(pipe.unet)
    flags = {name: (id(each), each.requires_grad, each.grad is None) for name, each in unet.named_parameters()}
    modes = {name: part.training for name, part in unet.named_modules()}
    adapters = [(layer, str(found)) for layer, found in compat.adapter_states(unet).items()]
    return tree(pipe), flags, modes, adapters, dict(unet.config), unet.is_gradient_checkpointing


def storage(unet: nn.Module) -> dict[str, tuple[int, torch.Size]]:
    tensors = {**dict(unet.named_parameters()), **dict(unet.named_buffers())}
    return {name: (value.data_ptr(), value.shape) for name, value in tensors.items()}


def of_erasures(module: nn.Module) -> list[Any]:
    """What of this library, or of the tests' own layer kinds, hangs on a model."""
    packages = ("diffusers_erasure", "tests.test_layer_kind")
    found: list[Any] = [part for part in module.modules() if type(part).__module__.startswith(packages)]
    for part in module.modules():
        values = [*vars(part).values(), *(hook for table in compat.hook_tables(part) for hook in table.values())]
        owners = [getattr(value, "__self__", getattr(value, "hook", value)) for value in values]
        found += [each for each in owners if type(each).__module__.startswith(packages)]
    return found


WITHOUT = ("model offload", "sequential offload", "group offload", "layerwise casting", "DeepCache")


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_what_the_un_erased_one_does(form: str) -> None:
    pipe, plain = erased(form), noise(base())
    before, weights = state(pipe), storage(base().unet)
    twin = twin_of(pipe.unet)
    assert twin is not None and state(pipe) == before and of_erasures(twin) == []
    assert of_erasures(pipe.unet) and storage(twin).keys() == weights.keys()
    if form == "merged":  # the weights hold it until the block of a fit unfuses it, in place
        assert torch.equal(noise(pipe, twin), noise(pipe))
        with pipe.erasures_disabled():
            assert torch.equal(noise(pipe, twin), plain)
    else:
        assert torch.equal(noise(pipe, twin), plain) and not torch.equal(noise(pipe), plain)


@pytest.mark.parametrize("name", [name for name, each in NEIGHBOURS.items() if not each.slow])
def test_what_others_have_put_in_acts_in_it(name: str) -> None:
    """A twin beside whatever the matrix of `test_coexistence.py` knows draws the same images, bit for bit."""
    neighbour = NEIGHBOURS[name]
    if (reason := neighbour.why_not()) is not None:
        pytest.skip(reason)
    pipe = neighbour.joins(base())
    drawn = neighbour.drawn(pipe)
    if not neighbour.first:
        FORMS["lora by hooks"].load(pipe)
    before = state(pipe)
    twin = twin_of(pipe.unet)
    assert (twin is None) == (name in WITHOUT)
    if twin is not None:
        other = copy.copy(pipe)
        other.unet = twin
        with pipe.erasures_disabled():  # for the text encoder, and prompts
            assert equal(neighbour.drawn(other), drawn)
    assert state(pipe)[1:] == before[1:] and pipe.unet is not twin


def test_it_shares_the_memory_and_nothing_else() -> None:
    pipe = tiny_sd_pipe()
    pipe.unet.register_buffer("table", torch.ones(3), persistent=False)
    pipe.unet.conv_out.bias = pipe.unet.conv_norm_out.bias = nn.Parameter(torch.zeros(4))  # tied
    pipe.unet.train().conv_in.requires_grad_(False)
    before = state(pipe)
    twin = twin_of(pipe.unet)
    assert twin is not None and storage(twin) == storage(pipe.unet) and twin.conv_out.bias is twin.conv_norm_out.bias
    assert not twin.training and not any(each.requires_grad for each in twin.parameters())
    assert not {id(each) for each in twin.modules()} & {id(each) for each in pipe.unet.modules()}
    twin.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), adapter_name="mine")
    twin.enable_gradient_checkpointing()
    twin.train().register_forward_hook(lambda *_: None)
    twin.register_to_config(sample_size=99)
    twin.set_attn_processor(type(next(iter(twin.attn_processors.values())))())
    assert state(pipe) == before


def test_nothing_holds_it_when_it_is_not_needed() -> None:
    """Not even until cycles are looked for: it would hold the weights."""
    pipe, seen = tiny_sd_pipe(), []
    made = twins.twin_of

    def noted(model: nn.Module) -> Any:
        twin = made(model)
        seen.append(weakref.ref(twin))
        return twin

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(twins, "twin_of", noted)
            for fit in FITS.values():
                erase(pipe, "cat", training=TrainingRun(progress=False), compare=False, **fit)
    finally:
        gc.enable()
    assert len(seen) == 5 and [each() for each in seen] == [None] * 5


def test_a_users_adapters_hooks_and_packed_weights_are_there() -> None:
    pipe = tiny_sd_pipe()
    load_style(pipe)
    pipe.set_adapters("style", 0.5)
    calls: list[int] = []
    pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    linear = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.base_layer
    linear.weight = PackedWeight(linear.weight.detach())

    class Doubling(nn.Conv2d):
        factor = 1.0

        def double(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output * self.factor

    own = pipe.unet.conv_out
    own.__class__ = Doubling
    own.factor = 2.0
    own.register_forward_hook(own.double)
    twin = twin_of(pipe.unet)
    assert twin is not None and torch.equal(noise(pipe, twin), noise(pipe)) and len(calls) == 2
    found = twin.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.base_layer
    assert found is not linear and found.weight is linear.weight
    twin.conv_out.factor = 3.0  # the method is that of the copied module
    assert torch.allclose(noise(pipe, twin), 1.5 * noise(pipe))
    twin.conv_out.factor = 2.0
    drawn = noise(pipe)
    twin.set_adapters("style", 0.0)
    assert torch.equal(noise(pipe), drawn) and not torch.equal(noise(pipe, twin), drawn)


def test_kinds_from_outside_and_processors_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd_pipe()
    plain = noise(pipe)
    monkeypatch.setattr(registry, "_kinds", dict(registry._kinds))
    register_layer_kind(test_layer_kind.ShiftKind())
    pipe.load_erasure(test_layer_kind.erasure_of("shift"), "vectors")
    twin = twin_of(pipe.unet)
    assert twin is not None and torch.equal(noise(pipe, twin), plain) and of_erasures(twin) == []
    assert not torch.equal(noise(pipe), plain)
    pipe.unload_erasure()
    erasure = erase(pipe, "cat", **{**FITS["acterase"], "sites": "attn2"}, compare=False)
    processors = ActEraseAttnProcessor.for_unet(pipe.unet, erasure)
    pipe.unet.set_attn_processor(processors)
    before = state(pipe)
    twin = twin_of(pipe.unet)
    assert twin is not None and torch.equal(noise(pipe, twin), plain) and of_erasures(twin) == []
    assert not torch.equal(noise(pipe), plain) and state(pipe) == before
    assert all(each is processors.get(name, each) for name, each in pipe.unet.attn_processors.items())


def test_compiled_networks_have_plain_twins() -> None:
    whole, part, own = tiny_sd_pipe(), tiny_sd_pipe(), tiny_sd_pipe()
    plain, bare = noise(own), own.unet
    whole.unet = torch.compile(whole.unet)
    part.unet.mid_block = torch.compile(part.unet.mid_block)
    own.unet.compile()
    for pipe in (whole, part, own):
        twin = twin_of(pipe.unet)
        assert twin is not None and not compat.is_compiled(twin) and compat.is_compiled(pipe.unet)
        assert torch.equal(noise(own, twin), plain) and type(twin) is type(bare)


@contextmanager
def replaced(pipe: Any) -> Iterator[None]:
    """The UNet's `forward` replaced by one that does the same, as caches replace it."""
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    yield
    del pipe.unet.forward


def test_where_there_is_none_the_network_itself_is_worked_on() -> None:
    expected = {name: erase(tiny_sd_pipe(), "cat", compare=False, **fit) for name, fit in FITS.items()}
    pipe = tiny_sd_pipe()
    images(pipe)
    with replaced(pipe):
        assert twin_of(pipe.unet) is None and private(pipe.unet) is pipe.unet
        before = state(pipe)
        for name, fit in FITS.items():
            erasure = erase(pipe, "cat", **fit)  # with the comparison, which is left out
            assert erasure.to_files() == expected[name].to_files()
            assert state(pipe)[1:] == before[1:]  # diffusers leaves attributes of the gradient checkpointing
    offloaded, cast = tiny_sd_pipe(), tiny_sd_pipe()
    cpu_offload(offloaded.unet, "cpu")
    assert twin_of(offloaded.unet) is None
    made = erase(offloaded, "cat", **FITS["acterase"])
    assert made.to_files() == expected["acterase"].to_files()
    cast_to_float8(cast)
    assert twin_of(cast.unet) is None
    stuck = tiny_sd_pipe()
    stuck.unet.lock = threading.Lock()
    assert twin_of(stuck.unet) is None


# ------------------------------------------------------------------------------------------------ while others draw


@contextmanager
def drawn_beside(pipe: Any) -> Iterator[list[bool]]:
    """Draw in another thread within the block, and tell of each picture whether it was as before, bit for bit."""
    found, over = list[bool](), threading.Event()
    arguments = {"prompt_embeds": rows_of(pipe), "negative_prompt_embeds": rows_of(pipe, "")}
    expected = images(pipe, **arguments)
    expected_with_gradients = noise(pipe)

    def draw() -> None:
        while not over.is_set():
            found.append(equal(images(pipe, **arguments), expected))
            found.append(torch.equal(noise(pipe), expected_with_gradients))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def compared_by(monkeypatch: pytest.MonkeyPatch, around: Callable[[Callable[[], torch.Tensor]], torch.Tensor]) -> None:
    """Have the comparison's passes made by `around`, which is given each."""

    class Passing(Caller):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return around(lambda: Caller.__call__(self, *args, **kwargs))

    monkeypatch.setattr(predictions, "Caller", Passing)


@pytest.mark.parametrize("name", FITS)
def test_other_threads_draw_as_before(name: str, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more: dict[str, Any] = {} if name == "acterase" else {"checkpoint_dir": tmp_path, "sample_every": 2}
    expected = erase(tiny_sd_pipe(), "cat", **FITS[name])
    pipe.unet.train().conv_in.requires_grad_(False)
    images(pipe)
    before, moments = state(pipe), []

    def looked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            moments.append(function.__name__)
            assert state(pipe) == before
            return found

        return call

    for owner, method in (
        (Trainer, "_loss"),
        (Trainer, "_after"),
        (Network, "teacher_rows"),
        (Calibration, "_step"),
    ):
        monkeypatch.setattr(owner, method, looked(getattr(owner, method)))

    def comparing(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        return compute()

    compared_by(monkeypatch, looked(comparing))
    with drawn_beside(pipe) as found:
        erasure = erase(pipe, "cat", training=TrainingRun(progress=False, **more), **FITS[name])
    assert len(found) > 4 and all(found)
    assert {"comparing", "_step" if name == "acterase" else "_after"} <= set(moments)
    assert erasure.to_files() == expected.to_files() and state(pipe) == before


def test_a_calibration_counts_no_pass_of_other_threads(pipe: Any) -> None:
    """Nor does it where it watches the live network itself, for want of a twin."""
    seen: list[str] = []
    with inputs_seen(pipe.unet, {"conv_in": pipe.unet.conv_in}, lambda name, _: seen.append(name)):
        thread = threading.Thread(target=noise, args=(pipe,))
        thread.start()
        thread.join()
        assert seen == []
        noise(pipe)
    assert seen == ["conv_in"]


def test_nothing_is_moved_and_nothing_is_drawn_from_the_process_generator(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TrainingRun(checkpoint_dir=tmp_path, sample_every=2, progress=False)
    moved: list[str] = []
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        monkeypatch.setattr(model, "_apply", lambda *_, model=model: moved.append(type(model).__name__) or model)
    adapted: list[bool] = []
    add = type(pipe.unet).add_adapter

    def add_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        before = torch.random.get_rng_state()
        add(self, *args, **kwargs)
        adapted.append(torch.equal(before, torch.random.get_rng_state()))

    monkeypatch.setattr(type(pipe.unet), "add_adapter", add_adapter)
    erase(pipe, "cat", training=run, **FITS["esd"])
    assert moved == [] and adapted == [True] and len(list((tmp_path / "samples").iterdir())) == 2


# ------------------------------------------------------------------------------------------------- the comparison


def interrupting(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, at: int = 3) -> list[int]:
    """Let a signal come in the comparison's pass of that number."""
    calls = list[int]()

    def passing(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(number)
        return compute()

    compared_by(monkeypatch, passing)
    return calls


@pytest.mark.parametrize("name", ["esd", "acterase"])
def test_ctrl_c_in_the_comparison_keeps_the_erasure(
    pipe: Any, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = erase(tiny_sd_pipe(), "cat", compare=False, **FITS[name])
    before = signal.getsignal(signal.SIGINT)
    calls = interrupting(monkeypatch, signal.SIGINT)
    erasure = erase(pipe, "cat", **FITS[name])
    assert len(calls) == 3 and erasure.to_files() == expected.to_files()
    (message,) = [each.getMessage() for each in caplog.records if "Interrupted" in each.getMessage()]
    assert "made and kept" in message and "words of list:things was not compared" in message
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_ends_the_process_all_the_same(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = interrupting(monkeypatch, signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        erase(pipe, "cat", **FITS["acterase"])
    assert stopped.value.code == 143 and len(calls) == 3


def test_a_second_ctrl_c_is_one(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return compute()

    compared_by(monkeypatch, twice)
    with pytest.raises(KeyboardInterrupt):
        erase(pipe, "cat", **FITS["acterase"])


def test_ctrl_c_while_rows_are_compared(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That takes a moment: it is done, and said."""
    from diffusers_erasure import collateral

    moves = collateral.row_moves

    def interrupted(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return moves(*args)

    expected = erase(tiny_sd_pipe(), "cat", retain=["dog"], method="uce")
    monkeypatch.setattr(collateral, "row_moves", interrupted)
    erasure = erase(pipe, "cat", retain=["dog"], method="uce")
    assert erasure.to_files() == expected.to_files() and "made and kept. The comparison was done" in caplog.text


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_of_the_comparison(
    pipe: Any, progress: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = interrupting(monkeypatch, signal.SIGINT, at=0)
    erase(pipe, "cat", training=TrainingRun(progress=progress), **FITS["acterase"])
    bar = f"{len(calls)}/{len(calls)}"
    shown = capsys.readouterr().err.rpartition("comparing")
    assert bool(shown[1]) == progress and (bar in shown[2]) == progress


def test_the_comparison_has_no_erasure_but_the_new_one(pipe: Any) -> None:
    plain = erase(pipe, "cat", **FITS["acterase"])
    other: Erasure = erase(pipe, "dog", retain=["fox"], compare=False, method="uce")
    pipe.load_erasure(other, "no-dog", strength=0.5)
    before = state(pipe)
    again = erase(pipe, "cat", **FITS["acterase"])
    assert again.config.diagnostics["collateral"] == plain.config.diagnostics["collateral"]
    assert state(pipe) == before and edits(other)
