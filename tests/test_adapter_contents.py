"""`backend="peft"`: the guard looks at what the adapter's tensors are, whoever wrote into them."""

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from peft.utils import hotswap

from diffusers_erasure import (
    Erasure,
    ErasureInactiveError,
    ErasureTrainingError,
    demo,
    erase,
    training_through_erasures,
)
from diffusers_erasure.live import adapter_contents
from tests.helpers import (
    ROUNDINGS,
    UNET_SITES,
    assert_like,
    dense_edit,
    equal,
    noise,
    random_erasure,
    roundings,
    site_of,
    tiny_sd_pipe,
)


SITES = (*UNET_SITES, "unet.conv_in")
Step = Callable[[Any], Any]


@cache
def base() -> Any:
    return tiny_sd_pipe()


@cache
def made() -> Erasure:
    return random_erasure(base(), "lora", SITES)


@pytest.fixture
def erasure() -> Erasure:
    return made()


@cache
def expected(strength: float = 1.0) -> Any:
    """The prediction of dense weights; at 0 the base model's."""
    return noise(dense_edit(base(), (made(), strength)) if strength else base()).numpy()


def lora(sites: tuple[str, ...] = SITES[:1], rank: int = 3, seed: int = 3) -> dict[str, torch.Tensor]:
    """A user's LoRA that does nothing; its alpha is its rank."""
    generator, result = torch.Generator().manual_seed(seed), {}
    for site in sites:
        weight = site_of(base(), site).weight
        result[site + ".lora_A.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator)
        ones = [1] * (weight.ndim - 2)
        result[site + ".lora_B.weight"] = torch.zeros(weight.shape[0], rank, *ones)
    return result


def parameters_of(pipe: Any, name: str = "no_cat") -> list[torch.nn.Parameter]:
    return [each for path, each in pipe.unet.named_parameters() if f".{name}." in path]


def hotswap_like_named(pipe: Any) -> None:
    pipe.load_lora_weights(lora(), adapter_name="cat", hotswap=True)


def hotswap_by_peft(pipe: Any) -> None:
    tensors = {
        key.replace("lora_A", "lora_A.cat").replace("lora_B", "lora_B.cat").removeprefix("unet."): value
        for key, value in lora().items()
    }
    hotswap.hotswap_adapter_from_state_dict(
        model=pipe.unet, state_dict=tensors, adapter_name="cat", config=pipe.unet.peft_config["cat"]
    )


def load_anew(rank: int, **others: Any) -> Step:
    modules = [site.removeprefix("unet.") for site in SITES]

    def step(pipe: Any) -> None:
        pipe.delete_adapters("no_cat")
        pipe.unet.add_adapter(LoraConfig(r=rank, target_modules=modules, **others), "no_cat")

    return step


def load_anew_elsewhere_too(pipe: Any) -> None:
    pipe.delete_adapters("no_cat")
    tensors = lora((*SITES, "unet.conv_out"))
    tensors["unet.conv_out.lora_B.weight"] += 1
    pipe.load_lora_weights(tensors, adapter_name="no_cat")


def write_zeros(pipe: Any) -> None:
    for each in parameters_of(pipe):
        each.data.zero_()


def write_to_one(pipe: Any) -> None:
    parameters_of(pipe)[-1].data[-1] *= 1.01


def train(pipe: Any) -> None:
    pipe.unet.requires_grad_(False)
    trained = parameters_of(pipe)
    for each in trained:
        each.requires_grad_(True)
    rows = torch.zeros(1, 24, 32)
    arguments = (torch.ones(1, 4, 8, 8), torch.tensor(10), rows)
    with pytest.raises(ErasureTrainingError):
        pipe.unet(*arguments)
    optimizer = torch.optim.SGD(trained, lr=1.0)
    with training_through_erasures(pipe):  # which freezes it
        for each in trained:
            each.requires_grad_(True)
        pipe.unet(*arguments).sample.square().sum().backward()
    optimizer.step()


WRITES: dict[str, Step] = {
    "a like name": hotswap_like_named,
    "a like name, by peft": hotswap_by_peft,
    "its own name": lambda pipe: pipe.load_lora_weights(lora(SITES), adapter_name="no_cat", hotswap=True),
    "its own name, of a larger rank": lambda pipe: pipe.load_lora_weights(
        lora(SITES, rank=5), adapter_name="no_cat", hotswap=True
    ),
    "loaded anew": load_anew(3),
    "loaded anew, of a smaller rank": load_anew(2),
    "loaded anew, with an alpha": load_anew(3, lora_alpha=27, use_rslora=True, lora_dropout=0.5),
    "loaded anew, as DoRA": load_anew(3, use_dora=True),
    "loaded anew, on more modules": load_anew_elsewhere_too,
    "zeros": write_zeros,
    "one value": write_to_one,
    "training": train,
}


@cache
def _loaded(policy: Any, strength: float) -> Any:
    pipe = copy.deepcopy(base())
    pipe.load_lora_weights(lora(), adapter_name="cat")
    pipe.load_erasure(made(), "no_cat", strength=strength, backend="peft", peft_guard=policy)
    return pipe


def loaded(peft_guard: str, strength: float = 1.0) -> Any:
    """With the LoRA "cat" beside it, which stays active and does nothing."""
    return copy.deepcopy(_loaded(peft_guard, strength))


def assert_erased(pipe: Any, strength: float) -> None:
    assert_like(noise(pipe).numpy(), expected(strength), expected(0))


@pytest.mark.parametrize("write", list(WRITES))
def test_error_before_the_pass(write: str) -> None:
    pipe = loaded("error")
    WRITES[write](pipe)
    for _ in range(2):
        with pytest.raises(ErasureInactiveError, match=r"other tensors"):
            noise(pipe)
    pipe.unload_erasure("no_cat")
    assert roundings(noise(pipe), expected(0)) <= ROUNDINGS


@pytest.mark.parametrize("write", list(WRITES))
def test_restored_before_the_pass(write: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe = loaded("reactivate", 0.7)
    with caplog.at_level(logging.WARNING, "diffusers_erasure"):
        for _ in range(2):
            WRITES[write](pipe)
            assert_erased(pipe, 0.7)
    assert sum("other tensors" in record.message for record in caplog.records) == 1
    pipe.set_erasures("no_cat", 0.3)
    assert_erased(pipe, 0.3)


def test_unloaded_and_loaded_again() -> None:
    pipe = loaded("error")
    before = noise(pipe).numpy()
    hotswap_like_named(pipe)
    pipe.unload_erasure("no_cat")
    pipe.load_erasure(made(), "no_cat", backend="peft", peft_guard="error")
    assert equal(noise(pipe).numpy(), before)


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The tensors count as on a GPU, and the time is what is in the list."""
    clock = [100.0]
    monkeypatch.setattr(adapter_contents, "_is_near", lambda tensor: False)
    monkeypatch.setattr(adapter_contents.time, "monotonic", lambda: clock[0])
    yield clock


@pytest.mark.parametrize("write", ["a like name", "its own name", "loaded anew"])
def test_on_a_gpu_at_once(far_away: list[float], write: str) -> None:
    """What peft swaps, and what torch counts."""
    pipe = loaded(peft_guard="error")
    noise(pipe)
    WRITES[write](pipe)
    with pytest.raises(ErasureInactiveError, match="other tensors"):
        noise(pipe)


def test_on_a_gpu_within_a_second(far_away: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents are not read in each pass; nobody tells of what is written through `.data`."""
    pipe = loaded(peft_guard="error")
    noise(pipe)
    write_zeros(pipe)
    with monkeypatch.context() as patched:
        patched.setattr(adapter_contents.AdapterContents, "changed", None)  # is not called
        noise(pipe)
    far_away[0] += 1.0
    for _ in range(2):
        with pytest.raises(ErasureInactiveError, match="other tensors"):
            noise(pipe)


def test_on_a_gpu_less_often_where_looks_take_long(far_away: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = loaded(peft_guard="error")
    plain = adapter_contents._is_as_made

    def slow(*args: Any) -> bool:
        far_away[0] += 0.5
        return plain(*args)

    with monkeypatch.context() as patched:
        patched.setattr(adapter_contents, "_is_as_made", slow)
        noise(pipe)
        looked = far_away[0] - 100
        assert looked == 0.5 * len(SITES)
        write_zeros(pipe)
        far_away[0] = 100 + 30 * looked
        noise(pipe)
        assert far_away[0] == 100 + 30 * looked
    far_away[0] = 100 + 40 * looked
    with pytest.raises(ErasureInactiveError, match="other tensors"):
        noise(pipe)


def test_nothing_is_read_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = loaded(peft_guard="error")
    write_zeros(pipe)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_initialized", lambda: True)
        patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patched.setattr(adapter_contents.AdapterContents, "changed", None)  # is not called
        noise(pipe)
    with pytest.raises(ErasureInactiveError, match="other tensors"):
        noise(pipe)


# ------------------------------------------------------------------------------------------------------ merged


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {site: site_of(pipe, site).weight.detach().clone() for site in SITES}


@pytest.mark.parametrize("write", [hotswap_like_named, write_zeros], ids=["hotswap", "zeros"])
def test_written_into_after_it_was_merged(write: Step) -> None:
    """The weights hold the erasure, and what is subtracted from them has to be it."""
    pipe = loaded("error")
    pipe.fuse_lora(adapter_names=["no_cat"])
    assert_erased(pipe, 1.0)
    write(pipe)
    for _ in range(2):
        with pytest.raises(ErasureInactiveError, match=r"unfuse_lora.*unload_erasure"):
            noise(pipe)
    pipe.unfuse_lora()
    pipe.unload_erasure("no_cat")
    pipe.unload_lora_weights()
    for site, weight in weights(pipe).items():
        assert (weight - site_of(base(), site).weight).abs().max() < 1e-5


def test_merged_after_it_was_written_into() -> None:
    """Then the weights do not hold it, and nothing is to be subtracted."""
    pipe = loaded("error")
    hotswap_like_named(pipe)
    pipe.fuse_lora(adapter_names=["no_cat"])
    for _ in range(2):
        with pytest.raises(ErasureInactiveError, match="other tensors"):
            noise(pipe)
    pipe.unfuse_lora()
    pipe.unload_erasure("no_cat")
    pipe.unload_lora_weights()
    for site, weight in weights(pipe).items():
        assert (weight - site_of(base(), site).weight).abs().max() < 1e-5


def test_restored_where_it_is_merged_at_another_weight() -> None:
    pipe = loaded("reactivate")
    pipe.set_adapters(["cat", "no_cat"], [1.0, 0.5])
    pipe.fuse_lora(adapter_names=["no_cat"])
    hotswap_like_named(pipe)
    assert_erased(pipe, 0.5)
    pipe.unfuse_lora()
    pipe.unload_erasure("no_cat")
    pipe.unload_lora_weights()
    for site, weight in weights(pipe).items():
        assert (weight - site_of(base(), site).weight).abs().max() < 1e-5


def compiled_alone(pipe: Any) -> Any:
    return torch.compile(pipe.unet, backend="eager", fullgraph=True)


def within_a_larger_graph(pipe: Any) -> Any:
    """There the guard is traced, and reads no contents."""
    return torch.compile(lambda *args, **kwargs: pipe.unet(*args, **kwargs), backend="eager", fullgraph=True)


@pytest.mark.parametrize(
    ("compiled", "policy"),
    [
        (within_a_larger_graph, "error"),
        pytest.param(within_a_larger_graph, "reactivate", marks=pytest.mark.slow),
        pytest.param(compiled_alone, "error", marks=pytest.mark.slow),
        pytest.param(compiled_alone, "reactivate", marks=pytest.mark.slow),
    ],
)
def test_compiled(compiled: Step, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would keep all it says
    torch.compiler.reset()
    small = tiny_sd_pipe(levels=1)
    sites = tuple(f"unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.{part}" for part in ("to_k", "to_v"))
    erasure, pipe = random_erasure(small, "lora", sites), copy.deepcopy(small)
    factors = erasure.layer_tensors(erasure.config.layers[0])
    there = sites[0].removeprefix("unet.")
    nothing = {f"unet.{name}": torch.zeros_like(value) for name, value in factors.items() if there in name}
    pipe.load_lora_weights(dict(nothing), adapter_name="cat")
    pipe.load_erasure(erasure, "no_cat", backend="peft", peft_guard=policy)
    unet = compiled(pipe)
    drawn = noise(pipe, unet).numpy()
    assert_like(drawn, noise(dense_edit(small, erasure)).numpy(), noise(small).numpy())
    if compiled is compiled_alone:
        write_zeros(pipe)
    else:
        pipe.load_lora_weights(dict(nothing), adapter_name="cat", hotswap=True)
    if policy == "error":
        with pytest.raises(Exception, match="other tensors"):
            noise(pipe, unet)
    else:
        assert equal(noise(pipe, unet).numpy(), drawn)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_no_change(dtype: torch.dtype) -> None:
    pipe = loaded(peft_guard="error")
    pipe.to(dtype)
    noise(pipe)
    pipe.to(torch.float32)
    noise(pipe)
    parameters_of(pipe)[0].data[0] *= 1.05
    with pytest.raises(ErasureInactiveError, match="other tensors"):
        noise(pipe)


def test_copies_and_offloading() -> None:
    pipe = loaded(peft_guard="error")
    drawn = noise(pipe).numpy()
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert equal(noise(twin).numpy(), drawn)
        hotswap_like_named(twin)
        with pytest.raises(ErasureInactiveError, match="other tensors"):
            noise(twin)
        assert equal(noise(pipe).numpy(), drawn)
    cpu_offload(pipe.unet, "cpu")
    assert pipe.unet.conv_in.base_layer.weight.is_meta
    assert equal(noise(pipe).numpy(), drawn)


def test_padded_for_hotswaps(erasure: Erasure) -> None:
    """`enable_lora_hotswap` pads the factors with zeros to one rank."""
    pipe = tiny_sd_pipe()
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_erasure(erasure, "no_cat", backend="peft", peft_guard="error")
    assert parameters_of(pipe)[0].shape[0] == 8
    assert_like(noise(pipe).numpy(), noise(dense_edit(tiny_sd_pipe(), erasure)).numpy(), noise(tiny_sd_pipe()).numpy())
    parameters_of(pipe)[0].data[-1] = 1
    with pytest.raises(ErasureInactiveError, match="other tensors"):
        noise(pipe)


# ---------------------------------------------------------------------------------------------------- weights


def test_a_weight_by_name_governs_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    pipe = loaded("reactivate")
    pipe.set_adapters(["cat", "no_cat"], [1.0, 0.3])
    with caplog.at_level(logging.WARNING, "diffusers_erasure"):
        for _ in range(2):
            assert_erased(pipe, 0.3)
    assert sum("below the strength" in record.message for record in caplog.records) == 1
    assert pipe.list_erasures()[0].strength == 0.3
    pipe.set_erasures("no_cat", 1.0)
    assert pipe.list_erasures()[0].strength == 1.0
    assert_erased(pipe, 1.0)


@pytest.mark.parametrize("policy", ["reactivate", "error"])
def test_a_weight_that_is_not_honoured_is_not_told(policy: Any, tmp_path: Path) -> None:
    pipe = tiny_sd_pipe()
    pipe.load_erasure(random_erasure(pipe), "no_cat", strength=0.7, backend="peft", peft_guard=policy)
    for weight in (0.0, {"unet": {"down": 0.1, "mid": 0.7, "up": 0.7}}):
        pipe.set_adapters("no_cat", weight)
        assert pipe.list_erasures()[0].strength == 0.7
        pipe.save_erasure(tmp_path / "saved", "no_cat")
        assert Erasure.from_pretrained(tmp_path / "saved").config.published_strength == 0.7
    pipe.set_adapters("no_cat", 0.9)
    assert pipe.list_erasures()[0].strength == 0.9


def test_a_weight_for_some_layers_is_a_switching_off(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    erasure = random_erasure(tiny_sd_pipe())
    pipe.load_erasure(erasure, "no_cat", backend="peft")
    pipe.set_adapters("no_cat", {"unet": {"down": 0.1, "mid": 1.0, "up": 1.0}})
    with caplog.at_level(logging.WARNING, "diffusers_erasure"):
        assert roundings(noise(pipe), noise(dense_edit(base(), erasure))) <= ROUNDINGS
    assert "switched off" in caplog.text


def test_any_weaker_weight_is_refused_with_error() -> None:
    pipe = loaded("error", 0.7)
    for weight in (0.69, 0.0):
        pipe.set_adapters("no_cat", weight)
        with pytest.raises(ErasureInactiveError, match="weakened"):
            noise(pipe)
    for weight in (0.7, 1.0):
        pipe.set_adapters("no_cat", weight)
        assert_erased(pipe, weight)
    pipe.fuse_lora(lora_scale=0.1)
    with pytest.raises(ErasureInactiveError):
        noise(pipe)


# ------------------------------------------------------------------------------------------- the embedded model


@pytest.mark.parametrize("policy", ["reactivate", "error"])
def test_no_cats_after_a_hotswap(demo_pipe: Any, policy: Any) -> None:
    site = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    out, into = demo_pipe.unet.get_submodule(site).weight.shape
    nothing = {f"unet.{site}.lora_A.weight": torch.randn(4, into), f"unet.{site}.lora_B.weight": torch.zeros(out, 4)}
    demo_pipe.load_lora_weights(dict(nothing), adapter_name="cat")
    erasure = erase(demo_pipe, "cat", anchors="animal", retain=["dog"], retain_default="none", method="uce")
    demo_pipe.load_erasure(erasure, "no_cat", backend="peft", peft_guard=policy)
    prompts = [demo.prompt("cat", style) for style in demo.STYLES]

    def draw() -> Any:
        return demo_pipe(prompts, num_inference_steps=12, guidance_scale=3.0, generator=torch.manual_seed(0)).images

    before = demo.load_judge().predict(draw()).objects
    assert before.count("cat") <= 1  # its anchor is a cat now and then
    demo_pipe.load_lora_weights(dict(nothing), adapter_name="cat", hotswap=True)
    if policy == "error":
        with pytest.raises(ErasureInactiveError, match="swapped"):
            draw()
    else:
        assert demo.load_judge().predict(draw()).objects == before
