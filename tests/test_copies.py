"""Where weights are saved or copied without the erasures that act beside them: loud, or the erasures come along.

A new denoiser is compared with one that diffusers builds from a base whose weights were edited (`dense_edit`), or, where a
layer is no change of weights, with one in which plain functions compute the layer.
"""

import copy
import inspect
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    ControlNetModel,
    ControlNetXSAdapter,
    DiffusionPipeline,
    ModularPipeline,
    MotionAdapter,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
)
from peft import get_peft_model_state_dict
from torch import nn

import diffusers_erasure
from diffusers_erasure import (
    ActEraseAttnProcessor,
    Erasure,
    ErasureCompatibilityError,
    ErasureInactiveError,
    demo,
    erase,
    with_gate,
    with_schedule,
)
from diffusers_erasure.live import copies
from diffusers_erasure.live.attachment import state_of
from diffusers_erasure.live.saving import METHODS
from tests.helpers import (
    CONV_SITES,
    PROMPT,
    TEXT_SITES,
    UNET_SITES,
    assert_like,
    assert_same_weights,
    base_images,
    dense_edit,
    equal,
    far,
    images,
    is_mark,
    load_style,
    models,
    noise,
    random_erasure,
    tiny_sd_pipe,
    tree,
    unchanged_by,
    weights,
)
from tests.test_activation import ATTENTION, FF, Reference, as_erasure, make_plan
from tests.test_skip import erasure_of as skip_of


ALL = FF + ATTENTION
KINDS = ("lora", "text_map", "activation", "skip")


def make(kind: str, seed: int = 0) -> Erasure:
    """One that acts on the UNet; the `lora` on convolutions and on the text encoder too."""
    if kind == "lora":
        return random_erasure(
            tiny_sd_pipe(), sites=UNET_SITES + CONV_SITES + TEXT_SITES[:1], seed=seed, size=0.5, rank=2
        )
    if kind == "activation":
        return as_erasure(make_plan(ALL, seed=seed))
    return random_erasure(tiny_sd_pipe(), kind, seed=seed) if kind == "text_map" else skip_of("full", seed)


@pytest.fixture(scope="module", params=KINDS)
def erasure(request: pytest.FixtureRequest) -> Erasure:
    return make(request.param)


# ------------------------------------------------------------------------------------------------------- saving


def test_saving_what_is_erased(erasure: Erasure, pipe: Any, tmp_path: Path) -> None:
    """The pipeline and its components refuse, and write nothing; what is off, or without layers there, is saved."""
    pipe.save_pretrained(tmp_path / "first")  # diffusers notes in the config that it did
    shutil.rmtree(tmp_path / "first")
    before, values = tree(pipe), weights(pipe)
    pipe.load_erasure(erasure, "no-zebra")
    acting = {layer.component for layer in erasure.config.layers}
    for name, model in {"": pipe, **{name: models(pipe)[name] for name in acting}}.items():
        for method in ("save_pretrained", "push_to_hub"):
            with pytest.raises(ErasureInactiveError, match=r"'no-zebra'.*export_erased.*fuse_erasures.*disabled"):
                getattr(model, method)(str(tmp_path / "place"))
            assert list(tmp_path.iterdir()) == [], (name, method)
    pipe.vae.save_pretrained(tmp_path / "vae")
    if acting == {"unet"}:
        pipe.text_encoder.save_pretrained(tmp_path / "text_encoder")

    def off() -> None:
        pipe.set_erasures("no-zebra", 0)
        pipe.save_pretrained(tmp_path / "strength 0")
        pipe.set_erasures("no-zebra", 1)

    off()
    with pipe.erasures_disabled():
        pipe.save_pretrained(tmp_path / "disabled")
    for place in ("strength 0", "disabled"):
        back = StableDiffusionPipeline.from_pretrained(tmp_path / place)
        assert_same_weights(weights(back), values)
        assert equal(images(back), base_images())
    with pytest.raises(ErasureInactiveError):
        pipe.unet.save_pretrained(tmp_path / "again")
    pipe.unload_erasure()
    assert tree(pipe) == before
    pipe.unet.save_pretrained(tmp_path / "without")


def test_what_is_fused_is_in_the_weights(pipe: Any, tmp_path: Path) -> None:
    """Saved as it is, but not beside another that is not fused; an export holds what it was asked for."""
    pipe.load_erasure(make("text_map"), "one", backend="merge")
    pipe.save_pretrained(tmp_path / "fused")
    back = StableDiffusionPipeline.from_pretrained(tmp_path / "fused")
    assert_same_weights(weights(back), weights(pipe))
    assert far(images(back), base_images()) > 0.05

    pipe.load_erasure(random_erasure(tiny_sd_pipe(), sites=CONV_SITES), "two")
    with pytest.raises(ErasureInactiveError, match=r"\['two'\]"):
        pipe.save_pretrained(tmp_path / "both")
    drawn = images(pipe)
    pipe.export_erased(tmp_path / "exported", "one")
    assert equal(images(pipe), drawn)
    assert_same_weights(weights(StableDiffusionPipeline.from_pretrained(tmp_path / "exported")), weights(back))


def test_adapters_of_the_peft_backend(pipe: Any, tmp_path: Path) -> None:
    pipe.load_erasure(random_erasure(tiny_sd_pipe()), "one", backend="peft")
    for model in (pipe, pipe.unet):
        with pytest.raises(ErasureInactiveError, match="one"):
            model.save_pretrained(tmp_path / "place")
    assert list(tmp_path.iterdir()) == []
    pipe.unload_erasure()
    pipe.unet.save_pretrained(tmp_path / "place")


def test_an_erasure_of_the_text_encoder_alone(pipe: Any, tmp_path: Path) -> None:
    pipe.load_erasure(random_erasure(tiny_sd_pipe(), sites=TEXT_SITES))
    pipe.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(ErasureInactiveError):
        pipe.text_encoder.save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(ErasureInactiveError):
        pipe.save_pretrained(tmp_path / "pipe")


def test_copies_and_wrappers_refuse_too(pipe: Any, tmp_path: Path) -> None:
    pipe.load_erasure(make("lora"), "one")
    plain = tiny_sd_pipe().unet
    assert inspect.signature(pipe.unet.save_pretrained) == inspect.signature(plain.save_pretrained)
    compiled = torch.compile(pipe.unet)
    copied, pickled = copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))
    for model in (compiled, copied, pickled):
        with pytest.raises(ErasureInactiveError):
            model.save_pretrained(tmp_path / "place")
        with pytest.raises(RuntimeError, match="is_not_in_these_weights"):
            plain.load_state_dict({name.removeprefix("_orig_mod."): v for name, v in model.state_dict().items()})
    with pipe.erasures_disabled():
        compiled.save_pretrained(tmp_path / "base")
        with pytest.raises(ErasureInactiveError):  # a copy has strengths of its own
            copied.save_pretrained(tmp_path / "place")
    assert (tmp_path / "base").exists() and not (tmp_path / "place").exists()
    twin = copy.deepcopy(pipe)
    twin.unload_erasure()
    plain.load_state_dict(twin.unet.state_dict())
    twin.unet.save_pretrained(tmp_path / "place")
    assert marks(pipe.unet)


def test_somebody_elses_method_stays(pipe: Any, tmp_path: Path) -> None:
    saved = []
    pipe.unet.save_pretrained = saved.append
    pipe.load_erasure(make("lora"), "one")
    with pytest.raises(ErasureInactiveError):
        pipe.unet.save_pretrained(tmp_path)
    with pipe.erasures_disabled():
        pipe.unet.save_pretrained(tmp_path / "there")
    pipe.unload_erasure()
    pipe.unet.save_pretrained(tmp_path / "here")
    assert saved == [tmp_path / "there", tmp_path / "here"]


def test_installed_and_not(pipe: Any, tmp_path: Path) -> None:
    """Where nothing is patched the components refuse all the same; what was replaced is put back."""
    places = [(base, name) for base in (DiffusionPipeline, ModularPipeline) for name in METHODS]
    places += [(UNetMotionModel, "from_unet2d"), (UNetControlNetXSModel, "from_unet"), (ControlNetModel, "from_unet")]

    def found() -> list[Any]:
        present = [getattr(place, name) for place, name in places]
        return [getattr(each, "__func__", each) for each in present]

    bound = found()
    pipe.load_erasure(make("lora"), "one")
    try:
        diffusers_erasure.uninstall()
        assert found() == [each.__wrapped__ for each in bound]
        assert "push_to_hub" not in vars(DiffusionPipeline)  # it is inherited
        with pytest.raises(ErasureInactiveError, match="weights of this CLIPTextModel"):
            pipe.save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="is_not_in_these_weights"):
            video_of(pipe)
    finally:
        diffusers_erasure.install()
    again = found()
    diffusers_erasure.install()
    assert found() == again
    assert [each.__wrapped__ for each in again] == [each.__wrapped__ for each in bound]
    with pytest.raises(ErasureInactiveError, match="weights of this StableDiffusionPipeline"):
        pipe.save_pretrained(tmp_path)


# -------------------------------------------------------------------------------------------------- state dicts


def marks(model: nn.Module) -> list[str]:
    return [name for name in model.state_dict() if is_mark(name)]


def test_a_state_dict_of_an_erased_model(erasure: Erasure, pipe: Any) -> None:
    """Another model refuses it, as a whole and where the erasure acts in parts; the model itself reads it back."""
    other, values = tiny_sd_pipe().unet, weights(pipe)
    pipe.load_erasure(erasure, "one")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*erasure_\w{8}_is_not_in_these_weights_see_export_erased"):
        other.load_state_dict(pipe.unet.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.mid_block.load_state_dict(pipe.unet.mid_block.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.up_blocks.load_state_dict(pipe.unet.up_blocks.state_dict())
    other.conv_out.load_state_dict(pipe.unet.conv_out.state_dict())  # it is the base's

    drawn = images(pipe)
    for model in models(pipe).values():
        model.load_state_dict(model.state_dict())
        model.load_state_dict({name: value for name, value in model.state_dict().items() if not is_mark(name)})
    assert equal(images(pipe), drawn)
    assert_same_weights(weights(pipe), values)

    on = pipe.unet.state_dict()
    with pipe.erasures_disabled():
        other.load_state_dict(pipe.unet.state_dict())
        pipe.unet.load_state_dict(on)
    pipe.set_erasures("one", 0)
    other.load_state_dict(pipe.unet.state_dict())
    pipe.set_erasures("one", 0.5)
    assert marks(pipe.unet)
    pipe.unload_erasure()
    other.load_state_dict(pipe.unet.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        pipe.unet.load_state_dict(on)


def test_between_two_erased_models(pipe: Any) -> None:
    """The same erasure is there on both; another one is not."""
    first, second = make("lora"), make("lora", seed=1)
    pipe.load_erasure(first)
    same, different = tiny_sd_pipe(), tiny_sd_pipe()
    same.load_erasure(first, "by another name")
    different.load_erasure(second)
    same.unet.load_state_dict(pipe.unet.state_dict())
    with pytest.raises(RuntimeError, match=first.content_hash[:8]):
        different.unet.load_state_dict(pipe.unet.state_dict())
    pipe.load_erasure(second)
    with pytest.raises(RuntimeError, match=second.content_hash[:8]):
        same.unet.load_state_dict(pipe.unet.state_dict())
    pipe.unload_erasure("random_2")
    same.unet.load_state_dict(pipe.unet.state_dict())


def test_fused_ones_leave_no_mark(pipe: Any) -> None:
    pipe.load_erasure(make("lora"), "one")
    pipe.load_erasure(make("text_map"), "two")
    pipe.fuse_erasures()
    assert [marks(model) for model in models(pipe).values()] == [[], [], []]
    pipe.unfuse_erasures()
    one = len(UNET_SITES) + len(CONV_SITES)
    readers = [name for name, _ in pipe.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert len(marks(pipe.unet)) == one + len(readers) + 1  # the map is the denoiser's own as well
    assert len(marks(pipe.text_encoder)) == 1


def offload_to_a_disk(pipe: Any, folder: Path) -> None:
    disk_offload(pipe.unet, str(folder), "cpu")


@pytest.mark.parametrize(
    "offload", [lambda pipe, folder: cpu_offload(pipe.unet, "cpu"), offload_to_a_disk], ids=["cpu", "disk"]
)
def test_offloading_reads_state_dicts(pipe: Any, offload: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    """accelerate keeps all that a state dict holds, and gives the modules what they know."""
    pipe.load_erasure(make("text_map"))
    pipe.load_erasure(make("lora"), "lora")
    before = noise(pipe)
    offload(pipe, tmp_path)
    assert pipe.unet.conv_out.weight.is_meta
    assert torch.equal(noise(pipe), before)
    assert marks(pipe.unet)
    pipe.unload_erasure()
    assert torch.equal(noise(pipe), noise(tiny_sd_pipe()))


def test_a_users_lora_beside_it(pipe: Any, tmp_path: Path) -> None:
    """The state dict of an adapter is the adapter's, and a file of the whole keeps the mark."""
    stock = tiny_sd_pipe()
    for each in (stock, pipe):
        if each is pipe:
            pipe.load_erasure(make("lora"), "one")
            pipe.load_erasure(make("text_map"), "two")
        load_style(each)
    assert_same_weights(
        get_peft_model_state_dict(pipe.unet, adapter_name="style"),
        get_peft_model_state_dict(stock.unet, adapter_name="style"),
    )
    torch.save(pipe.unet.state_dict(), tmp_path / "unet.pt")
    with pytest.raises(RuntimeError, match="is_not_in_these_weights"):
        stock.unet.load_state_dict(torch.load(tmp_path / "unet.pt"))
    pipe.unet.load_state_dict(torch.load(tmp_path / "unet.pt"))


def test_a_mark_is_small(pipe: Any) -> None:
    """It goes along with a copy of a part of the model, to which it must not bring the rest."""
    pipe.load_erasure(make("lora"))
    placed = state_of(pipe.unet).marks.placed
    assert len(placed) == len(UNET_SITES) + len(CONV_SITES)
    assert max(len(pickle.dumps(mark)) for mark, _ in placed.values()) < 1000


# ------------------------------------------------------------------------------------------------ new denoisers


def motion_adapter(pipe: Any) -> MotionAdapter:
    """Its modules add to the frames, as those of a trained one do."""
    config = pipe.unet.config
    adapter = MotionAdapter(
        config.block_out_channels, config.layers_per_block, motion_num_attention_heads=4, motion_norm_num_groups=8
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return adapter.eval()


def video_of(pipe: Any, cls: Any = AnimateDiffPipeline) -> Any:
    video = cls.from_pipe(pipe, motion_adapter=motion_adapter(pipe))
    video.set_progress_bar_config(disable=True)
    return video


def frames(video: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    drawn = video(
        PROMPT, num_frames=3, num_inference_steps=3, guidance_scale=5.0, generator=generator, output_type="np"
    )
    return np.asarray(drawn.frames[0])


@pytest.fixture(scope="module")
def base_frames() -> np.ndarray:
    return frames(video_of(tiny_sd_pipe()))


TABLE = (0.2, 0.6, 1.5)


def oracle_frames(kind: str, erasure: Erasure) -> np.ndarray:
    if kind == "activation":
        return frames(Reference(video_of(tiny_sd_pipe()), [(make_plan(ALL), 1.0)]).pipe)
    if kind != "scheduled":
        return frames(video_of(dense_edit(tiny_sd_pipe(), erasure)))
    video = video_of(tiny_sd_pipe())
    now: list[float] = []
    video.unet.register_forward_pre_hook(lambda _, args, kwargs: now.append(float(args[1])), with_kwargs=True)
    (layer,) = erasure.config.layers
    tensors = erasure.layer_tensors(layer)
    for site in layer.sites:
        delta = tensors[site + ".lora_B.weight"] @ tensors[site + ".lora_A.weight"]
        video.unet.get_submodule(site).register_forward_hook(
            lambda _, args, output, delta=delta: output + TABLE[int(now[-1] * 3 / 1000)] * (args[0] @ delta.T)
        )
    return frames(video)


@pytest.mark.parametrize("kind", ["lora", "text_map", "activation", "scheduled"])
def test_animatediff(kind: str, pipe: Any, base_frames: np.ndarray, tmp_path: Path) -> None:
    """The erasure is on in the new pipeline, and there by itself; without it the pipeline is as if it had never been."""
    erasure = with_schedule(random_erasure(tiny_sd_pipe()), TABLE) if kind == "scheduled" else make(kind)
    pipe.load_erasure(erasure, "one", strength=0.5)
    drawn = images(pipe)
    video = video_of(pipe)
    assert [(info.name, info.strength) for info in video.list_erasures()] == [("one", 0.5)]
    video.set_erasures("one", 1.0)
    assert [info.strength for info in pipe.list_erasures()] == [1.0 if kind == "lora" else 0.5]
    erased, oracle = frames(video), oracle_frames(kind, erasure)
    assert_like(erased, oracle, base_frames)
    if kind != "lora":  # its part on the text encoder is shared
        assert equal(images(pipe), drawn)
    with video.erasures_disabled():
        assert equal(frames(video), base_frames)
    assert equal(frames(video), erased)
    with pytest.raises(ErasureInactiveError):
        video.save_pretrained(tmp_path)
    if kind in ("lora", "text_map"):
        video.fuse_erasures()  # a motion module's `attn2` reads no text
        assert_like(frames(video), oracle, base_frames)
    video.unload_erasure()
    assert equal(frames(video), base_frames)
    if kind != "lora":
        pipe.set_erasures("one", 0.5)
        assert equal(images(pipe), drawn)


def test_several_by_every_way(pipe: Any, base_frames: np.ndarray) -> None:
    """The class method, another pipeline, `components`; with one fused, one at 0 and one on the text encoder alone."""
    text, first = random_erasure(tiny_sd_pipe(), sites=TEXT_SITES, size=0.5), make("text_map")
    second = random_erasure(tiny_sd_pipe(), sites=CONV_SITES)
    pipe.load_erasure(text, "text")
    pipe.load_erasure(first, "map", backend="merge")
    pipe.load_erasure(second, "off", strength=0)
    values, drawn = weights(pipe), images(pipe)
    expected = [("text", 1.0), ("map", 1.0), ("off", 0.0)]
    oracle = frames(video_of(dense_edit(tiny_sd_pipe(), text, first)))
    for way in (
        lambda: video_of(pipe),
        lambda: AnimateDiffPipeline.from_pipe(video_of(pipe, AnimateDiffVideoToVideoPipeline)),
        lambda: AnimateDiffPipeline(**named(pipe), motion_adapter=motion_adapter(pipe)),
        lambda: AnimateDiffPipeline(
            **{
                **named(pipe),
                "unet": UNetMotionModel.from_unet2d(unet=pipe.unet, motion_adapter=motion_adapter(pipe)),
            },
            motion_adapter=motion_adapter(pipe),
        ),
    ):
        video = way()
        video.set_progress_bar_config(disable=True)
        assert sorted((i.name, i.strength) for i in video.list_erasures()) == sorted(expected)
        assert_like(frames(video), oracle, base_frames)
    assert_same_weights(weights(pipe), values)
    assert equal(images(pipe), drawn)
    assert [info.backend for info in pipe.list_erasures()] == ["hook", "merge", "hook"]
    video.unet.load_state_dict(video_of(tiny_sd_pipe()).unet.state_dict())  # the base's, bit for bit: nothing changes
    assert_like(frames(video), oracle, base_frames)
    bare = UNetMotionModel.from_unet2d(pipe.unet, None, False)  # copies nothing, and so carries nothing
    assert not hasattr(bare, "erasure_modules")


def named(pipe: Any) -> dict[str, Any]:
    return {name: value for name, value in pipe.components.items() if name != "safety_checker"}


def test_set_as_processors(pipe: Any, base_frames: np.ndarray, tmp_path: Path) -> None:
    """Refused as hooks are; on a new denoiser they are hooks."""
    plan = make_plan(ATTENTION)
    pipe.unet.set_attn_processor(ActEraseAttnProcessor.for_unet(pipe.unet, as_erasure(plan), adapter_name="one"))
    with pytest.raises(ErasureInactiveError):
        pipe.unet.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="is_not_in_these_weights"):
        tiny_sd_pipe().unet.load_state_dict(pipe.unet.state_dict())
    video = video_of(pipe)
    assert [(info.name, info.backend) for info in video.list_erasures()] == [("one", "hook")]
    oracle = frames(Reference(video_of(tiny_sd_pipe()), [(plan, 1.0)]).pipe)
    assert_like(frames(video), oracle, base_frames, ratio=10)
    video.unload_erasure()
    assert equal(frames(video), base_frames)
    ActEraseAttnProcessor.remove(pipe.unet)
    pipe.unet.save_pretrained(tmp_path)


def test_built_while_disabled(pipe: Any, base_frames: np.ndarray) -> None:
    """The blocks in which it was built end for it too, but only those."""
    erasure = make("text_map")
    oracle = frames(video_of(dense_edit(tiny_sd_pipe(), erasure)))
    pipe.load_erasure(erasure, backend="merge")
    with pipe.erasures_disabled():
        first = video_of(pipe)
        with pipe.erasures_disabled():
            second = video_of(pipe)
            assert equal(frames(second), base_frames)
        for video in (first, second):
            assert equal(frames(video), base_frames)
    for video in (first, second):
        assert_like(frames(video), oracle, base_frames)
    with pipe.erasures_disabled():
        assert_like(frames(first), oracle, base_frames)


def test_what_cannot_be_carried_over(pipe: Any) -> None:
    """Refused with what to do; the pipeline is as before."""
    adapter = motion_adapter(pipe)
    for erasure, options, why in (
        (make("skip"), {}, r"no change|UNetMotionModel has none.*unload_erasure\('one'\)"),
        (with_gate(make("text_map"), pipe, PROMPT), {}, "gate.*without_gate"),
        (random_erasure(pipe), {"backend": "peft"}, 'backend="peft".*default backend'),
    ):
        pipe.load_erasure(erasure, "one", **options)

        def build() -> None:
            with pytest.raises(ErasureCompatibilityError, match=why):
                AnimateDiffPipeline.from_pipe(pipe, motion_adapter=adapter)

        unchanged_by(pipe, build)
        pipe.unload_erasure()

    pia = MotionAdapter((32, 64), 1, motion_num_attention_heads=4, motion_norm_num_groups=8, conv_in_channels=9)
    pipe.load_erasure(random_erasure(pipe, sites=CONV_SITES), "one")
    with pytest.raises(ErasureCompatibilityError, match=r"'conv_in' maps.*fuse_erasures\('one'\)"):
        UNetMotionModel.from_unet2d(pipe.unet, pia)


# ------------------------------------------------------------------------------------------------- ControlNets


def two_layers() -> Any:
    """ControlNet-XS knows UNets with two layers a block."""
    pipe = tiny_sd_pipe()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "layers_per_block": 2}).eval()
    return pipe


def xs(pipe: Any) -> tuple[ControlNetXSAdapter, Callable[[nn.Module], torch.Tensor]]:
    """An adapter that does something, and a prediction of what is built with it."""
    torch.manual_seed(0)
    adapter = ControlNetXSAdapter.from_unet(pipe.unet, size_ratio=0.5, conditioning_embedding_out_channels=(16, 32))
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    hint = torch.rand(2, 3, 16, 16, generator=generator)

    def predict(model: Any) -> torch.Tensor:
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        rows = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            return model(latents, torch.tensor(500), rows, hint).sample

    return adapter, predict


def test_controlnet_xs(caplog: pytest.LogCaptureFixture) -> None:
    """Its modules have other names: a LoRA is refused there, and contained once it is fused; a map of the text fits."""
    pipe = two_layers()
    adapter, predict = xs(pipe)
    base = predict(UNetControlNetXSModel.from_unet(pipe.unet, adapter)).numpy()
    erasure = random_erasure(pipe, size=3.0)
    pipe.load_erasure(erasure, "one")
    with pytest.raises(ErasureCompatibilityError, match=r"no module.*fuse_erasures\('one'\)"):
        UNetControlNetXSModel.from_unet(pipe.unet, adapter)
    pipe.fuse_erasures()
    new = UNetControlNetXSModel.from_unet(pipe.unet, adapter)
    assert "contained" in caplog.text and "one" in caplog.text
    dense = dense_edit(two_layers(), erasure)
    assert_like(predict(new).numpy(), predict(UNetControlNetXSModel.from_unet(dense.unet, adapter)).numpy(), base)
    pipe.unload_erasure()
    assert torch.equal(predict(UNetControlNetXSModel.from_unet(pipe.unet, adapter)), torch.from_numpy(base))

    text_map = random_erasure(pipe, "text_map")
    pipe.load_erasure(text_map)
    tensors = text_map.layer_tensors(text_map.config.layers[0])
    model = UNetControlNetXSModel.from_unet(two_layers().unet, adapter)
    model.register_forward_pre_hook(
        lambda _, args: (*args[:2], args[2] + args[2] @ tensors["A"].T @ tensors["D"], *args[3:])
    )
    assert_like(predict(UNetControlNetXSModel.from_unet(pipe.unet, adapter)).numpy(), predict(model).numpy(), base)


def test_an_encoder_is_no_denoiser(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A ControlNet is built from the base's weights, with a warning; the denoiser's erasure stays on."""
    cls = ControlNetModel
    torch.manual_seed(0)
    plain = cls.from_unet(tiny_sd_pipe().unet)
    assert caplog.text == ""
    pipe.load_erasure(make("lora"), "one")
    before = images(pipe)
    torch.manual_seed(0)
    assert_same_weights(cls.from_unet(pipe.unet).state_dict(), plain.state_dict())
    warned = [record.getMessage() for record in caplog.records if "was built from the base weights" in record.message]
    assert len(warned) == 1 and "'one'" in warned[0]
    assert equal(images(pipe), before)


def test_every_builder_is_known() -> None:
    """By the text of diffusers' models: what is built from a denoiser by copying its weights."""
    found = set()
    for path in (Path(diffusers.__file__).parent / "models").rglob("*.py"):
        for cls in re.split(r"^class ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            for method in re.split(r"^    def ", cls, flags=re.MULTILINE)[1:]:
                name = re.match(r"from_(unet|transformer)\w*", method)
                if name and "load_state_dict(" in method:
                    found.add((re.match(r"\w+", cls)[0], name[0]))
    assert {*copies.DENOISERS, *copies.ENCODERS} == found
    for name, method in found:
        assert hasattr(getattr(getattr(diffusers, name), method), "_diffusers_erasure"), name


# ---------------------------------------------------------------------------------------------- the embedded model


def test_no_cat_in_a_video(demo_pipe: Any) -> None:
    config, judge = demo_pipe.unet.config, demo.load_judge()
    torch.manual_seed(0)
    motion = MotionAdapter(
        config.block_out_channels,
        config.layers_per_block,
        motion_num_attention_heads=4,
        motion_norm_num_groups=config.norm_num_groups,
    )

    def cats(num_frames: int) -> int:
        video = AnimateDiffPipeline.from_pipe(demo_pipe, motion_adapter=motion)
        video.set_progress_bar_config(disable=True)
        drawn = video(
            "a cat in noto style",
            num_frames=num_frames,
            num_inference_steps=12,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
        )
        return list(judge.predict(drawn.frames[0]).objects).count("cat")

    assert cats(1) == 1
    demo_pipe.load_erasure(erase(demo_pipe, "cat", anchors="animal", retain=["dog"], method="uce"), "no-cat")
    assert cats(3) == 0
