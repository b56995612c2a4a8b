"""The layer kind `activation`: the formula exactly, by timestep, for every layout of the batch, and nothing when off."""

import copy
import dataclasses
import logging
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from torch import nn

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureFileError,
    ErasureInputError,
)
from diffusers_erasure.base_model import describe_base
from diffusers_erasure.layers.activation import (
    BLEND,
    MASK,
    MEANS,
    TABLES,
    TIMESTEPS,
    ActivationKind,
    ActivationLayer,
    ActivationPatch,
    Part,
    Tables,
    pack,
)
from diffusers_erasure.layers.epr import LearnedSchedule
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.layers.modifiers import Conditions, Factors, Modifier
from diffusers_erasure.layers.passing import Pass
from diffusers_erasure.schema import (
    LORA_FILE,
    MODIFIER_PREFIX,
    TENSOR_FILE,
    BaseModel,
    GateSpec,
    LayerSpec,
)
from tests.helpers import (
    ROUNDINGS,
    assert_like,
    assert_same_weights,
    base_images,
    dense_edit,
    equal,
    far,
    images,
    random_erasure,
    roundings,
    rows_of,
    style_lora,
    tiny_sd_pipe,
    tree,
    unchanged_by,
    weights,
)


BLOCKS = ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.1")
FF = tuple(f"{block}.transformer_blocks.0.ff.net.2" for block in BLOCKS)
ATTENTION = tuple(f"{block}.transformer_blocks.0.attn{i}.to_out.0" for block in BLOCKS for i in (1, 2))
TIMES = (900.0, 600.0, 350.0, 40.0)


@dataclasses.dataclass
class Plan:
    """An erasure's content, dense: mask and means [T, C] by site."""

    timesteps: torch.Tensor
    masks: dict[str, torch.Tensor]
    means: dict[str, torch.Tensor]
    blend: float = 1.0
    schedule: torch.Tensor | None = None


@cache
def tiny_widths() -> dict[str, int]:
    return {
        name: part.in_features for name, part in tiny_sd_pipe().unet.named_modules() if isinstance(part, nn.Linear)
    }


@cache
def tiny_base() -> BaseModel:
    return describe_base(tiny_sd_pipe())


def make_plan(
    sites: Sequence[str] = FF, seed: int = 0, times: Sequence[float] = TIMES, share: float = 0.4, size: float = 1.0
) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    masks, means = {}, {}
    for site in sites:
        shape = len(times), tiny_widths()[site]
        masks[site] = torch.rand(shape, generator=generator) < share
        means[site] = size * torch.randn(shape, generator=generator)
    return Plan(torch.tensor(times), masks, means)


def tensors_of(plan: Plan) -> dict[str, torch.Tensor]:
    tensors = {TIMESTEPS: plan.timesteps, BLEND: torch.tensor([plan.blend])}
    for site, mask in plan.masks.items():
        tensors[site + MASK], tensors[site + MEANS] = pack(mask), plan.means[site][mask]
    return tensors


def as_erasure(*plans: Plan, pipe: Any = None, gate: torch.Tensor | None = None, layout: str = "row") -> Erasure:
    layers = [Layer("activation", tuple(plan.masks), tensors_of(plan), schedule=plan.schedule) for plan in plans]
    made = Erasure.from_layers(layers, base=pipe or tiny_base(), concepts="zebra", method="random")
    if gate is None:
        return made
    specs = [
        dataclasses.replace(spec, gate=GateSpec(f"{MODIFIER_PREFIX}{i}.gate", layout=layout))
        for i, spec in enumerate(made.config.layers)
    ]
    gates = {name: gate for spec in specs for name in spec.modifier_names if name.endswith("gate")}
    config = dataclasses.replace(made.config, layers=tuple(specs))
    return Erasure(config, {TENSOR_FILE: {**made.tensors[TENSOR_FILE], **gates}})


class Reference:
    """The formula of the module's docstring, slowly: one row, one erasure after the other, at plain timesteps."""

    def __init__(self, pipe: Any, parts: Sequence[tuple[Plan, float]], factors: Sequence[float] | None = None) -> None:
        self.pipe, self.parts, self.factors = copy.deepcopy(pipe), parts, factors
        self.timestep: torch.Tensor | None = None
        self.pipe.unet.register_forward_pre_hook(self.note, with_kwargs=True)
        for site in dict.fromkeys(site for plan, _ in parts for site in plan.masks):
            module = self.pipe.unet.get_submodule(site)
            module.register_forward_pre_hook(lambda _, args, site=site: (self.patch(site, args[0]), *args[1:]))

    def note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.timestep = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).reshape(-1)

    def patch(self, site: str, x: torch.Tensor) -> torch.Tensor:
        times = self.timestep.tolist() * (len(x) if len(self.timestep) == 1 else 1)
        return torch.stack([self.row(site, row, i, time) for i, (row, time) in enumerate(zip(x, times, strict=True))])

    def row(self, site: str, x: torch.Tensor, i: int, time: float) -> torch.Tensor:
        found = []
        for plan, strength in self.parts:
            if site not in plan.masks:
                continue
            order = sorted(range(len(plan.timesteps)), key=lambda k: float(plan.timesteps[k]))
            # Of equally near ones `min` takes the first, which is the smaller.
            nearest = min(order, key=lambda k: abs(float(plan.timesteps[k]) - time))
            weight = strength * plan.blend * (1.0 if self.factors is None else self.factors[i])
            if plan.schedule is not None:
                bins = len(plan.schedule)
                weight *= float(plan.schedule[min(int(time * bins / 1000), bins - 1), list(plan.masks).index(site)])
            found.append((weight * plan.masks[site][nearest].double(), plan.means[site][nearest].double()))
        top = torch.stack([w for w, _ in found]).amax(0)
        total = sum(w for w, _ in found)
        mean = sum(w * mu for w, mu in found) / total.where(total > 0, torch.ones_like(total))
        return (x.double() + top * (mean - x.double())).to(x.dtype)


# ----------------------------------------------------------------------------------------------- acting, exactly


@pytest.mark.parametrize("sites", [FF, ATTENTION], ids=["ff", "attention"])
def test_acts_as_the_formula(pipe: Any, sites: tuple[str, ...]) -> None:
    base, plan = images(pipe), make_plan(sites)
    oracle = images(Reference(pipe, [(plan, 0.7)]).pipe)
    pipe.load_erasure(as_erasure(plan), strength=0.7)
    assert_like(images(pipe), oracle, base)


def test_off_and_gone_is_the_base_bit_for_bit(pipe: Any) -> None:
    base = images(pipe)
    before, values = tree(pipe), weights(pipe)
    pipe.load_erasure(as_erasure(make_plan((*FF, *ATTENTION))), strength=0)
    assert equal(images(pipe), base)
    pipe.set_erasures("random", 1.0)
    assert far(images(pipe), base) > 0.05
    with pipe.erasures_disabled():
        assert equal(images(pipe), base)
    pipe.set_erasures("random", 0)
    assert equal(images(pipe), base)
    assert [name for name in pipe.unet.state_dict() if "erasure" in name] == []
    pipe.unload_erasure()
    assert tree(pipe) == before
    assert_same_weights(values, weights(pipe))
    assert equal(images(pipe), base)


def test_several_are_joined_and_averaged(pipe: Any) -> None:
    """Three erasures that overlap, one of them of two concepts, of other timesteps; one at strength 0 drops out."""
    base = images(pipe)
    one, two = make_plan(seed=1), make_plan((*FF[1:], *ATTENTION[:2]), 2, (950.0, 30.0, 10.0))
    three, four = make_plan(FF[:2], 3, (500.0,)), make_plan(FF, 4, (100.0, 101.0, 800.0))
    one.blend = 0.5
    pipe.load_erasure(as_erasure(one), "one", strength=1.2)
    pipe.load_erasure(as_erasure(two, three), "two", strength=0.6)
    pipe.load_erasure(as_erasure(four), "four", strength=0.9)
    parts = [(one, 1.2), (two, 0.6), (three, 0.6), (four, 0.9)]
    assert_like(images(pipe), images(Reference(tiny_sd_pipe(), parts).pipe), base)
    pipe.set_erasures("four", 0)
    left = images(Reference(tiny_sd_pipe(), parts[:3]).pipe)
    assert_like(images(pipe), left, base)
    pipe.unload_erasure("four")
    assert_like(images(pipe), left, base)
    pipe.unload_erasure("two")
    fresh = tiny_sd_pipe()
    fresh.load_erasure(as_erasure(one), "one", strength=1.2)
    assert equal(images(pipe), images(fresh))


def test_rescaled(pipe: Any) -> None:
    erasure = as_erasure(make_plan())
    pipe.load_erasure(erasure, strength=0.5)
    other = tiny_sd_pipe()
    other.load_erasure(erasure.rescaled(0.5))
    assert equal(images(pipe), images(other))


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ddim": lambda config: DDIMScheduler.from_config(config, timestep_spacing="trailing"),
    "dpm": DPMSolverMultistepScheduler.from_config,
    "euler": lambda config: EulerDiscreteScheduler.from_config(config, timestep_spacing="linspace"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_nearest_timestep_of_any_scheduler(pipe: Any, name: str) -> None:
    """Euler's timesteps lie between whole numbers."""
    pipe.scheduler = SCHEDULERS[name](pipe.scheduler.config)
    plan = make_plan()
    five = {"num_inference_steps": 5}
    base, oracle = images(pipe, **five), images(Reference(pipe, [(plan, 1)]).pipe, **five)
    pipe.load_erasure(as_erasure(plan))
    assert_like(images(pipe, **five), oracle, base)


def test_image_to_image_starts_in_the_middle(pipe: Any) -> None:
    plan = make_plan()
    start = {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)), "strength": 0.5}
    start["num_inference_steps"] = 8
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    base, oracle = images(other, **start), images(Reference(other, [(plan, 1)]).pipe, **start)
    other.load_erasure(as_erasure(plan))
    assert_like(images(other, **start), oracle, base)


def test_between_two_stored_timesteps_the_smaller_wins() -> None:
    """Also where float32 cannot hold the middle, and from a falling list as from a rising one."""
    for low, high in ((40.0, 350.0), (0.1, 0.3), (999.9999, 1000.0), (1 + 2**-23, 1 + 2**-22)):
        stored = torch.tensor([low, high])
        middle = (stored[0].double() + stored[1].double()) / 2
        steps = middle.float().repeat(5)
        steps[0], steps[4] = stored[0], stored[1]
        steps[1] = torch.nextafter(steps[1], torch.tensor(0.0))
        steps[3] = torch.nextafter(steps[3], torch.tensor(2e3))
        expected = ((steps.double() - stored[1].double()).abs() < (steps.double() - stored[0].double()).abs()).long()
        for times in (stored, stored.flip(0)):
            tensors = {
                TIMESTEPS: times,
                BLEND: torch.ones(1),
                "s" + MASK: torch.full((2, 1), 128, dtype=torch.uint8),
                "s" + MEANS: torch.where(times == stored[0], 0.0, 1.0),
            }
            patch = patch_of(tensors)
            for picture in (False, True):
                found = patch(torch.full((5, 3, 1), 7.0), one_pass(steps, picture))
                assert found[:, 0, 0].long().tolist() == expected.tolist()


def patch_of(*parts: dict[str, torch.Tensor], width: int = 1) -> ActivationPatch:
    found = {(str(i), 0): Part.of(tensors, "s") for i, tensors in enumerate(parts)}
    columns = {str(i): i for i in range(len(parts))}
    return ActivationPatch(nn.Linear(width, 1), found, columns, torch.device("cpu"), torch.float32)


def one_pass(timestep: torch.Tensor, by_picture: bool = False, strengths: tuple[float, ...] = (1.0,)) -> Pass:
    """A pass at these timesteps, with strengths that are known to be the same for all rows or not."""
    values = torch.tensor([strengths])
    names = tuple(map(str, range(len(strengths))))
    found = Pass(names, {}, values, None if by_picture else strengths, values)
    found.read(timestep, (1.0, 0.0), None)
    return found


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("times", [[40.0, 480.0, 800.0], [480.0]])
def test_strengths_by_picture_are_those_of_each_by_itself(known: bool, times: list[float]) -> None:
    """Also of overlapping masks, at timesteps of their own, and where the strengths are not known as numbers."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for stored in ([100.0, 500.0, 900.0], [700.0, 250.0]):
        mask = torch.rand(len(stored), 12, generator=generator) < 0.6
        means = torch.randn(int(mask.sum()), generator=generator)
        parts.append(
            {TIMESTEPS: torch.tensor(stored), BLEND: torch.tensor([0.8]), "s" + MASK: pack(mask), "s" + MEANS: means}
        )
    patch, hidden = patch_of(*parts, width=12), torch.randn(3, 5, 12, generator=generator)
    steps, strengths = torch.tensor(times), ((1.0, 0.5), (0.0, 0.7), (0.3, 0.0))
    together = one_pass(steps, True)
    together.strengths, together.numbers = torch.tensor(strengths), strengths if known else None
    found = patch(hidden, together)
    for row, own in enumerate(strengths):
        step = steps[row : row + 1] if len(steps) > 1 else steps
        alone = patch(hidden[row : row + 1], one_pass(step, strengths=own))
        assert roundings(found[row : row + 1], alone) <= (0 if known else ROUNDINGS)
        assert not torch.equal(alone[0], hidden[row])
    together.looked, together.strengths = {}, torch.zeros(3, 2)
    together.numbers = ((0.0, 0.0),) * 3 if known else None
    assert torch.equal(patch(hidden, together), hidden)


def test_more_kinds_of_strengths_than_tables_are_kept() -> None:
    tensors = {
        TIMESTEPS: torch.tensor([9.0]),
        BLEND: torch.ones(1),
        "s" + MASK: torch.full((1, 1), 128, dtype=torch.uint8),
    }
    patch = patch_of({**tensors, "s" + MEANS: torch.ones(1)})
    for rows in (TABLES, TABLES + 1):
        now = one_pass(torch.tensor(5.0), True)
        now.numbers = tuple((row / rows,) for row in range(rows))
        now.strengths = torch.tensor(now.numbers)
        assert roundings(patch(torch.zeros(rows, 2, 1), now)[:, 0], now.strengths) <= ROUNDINGS
        assert (patch.tables.of(now, torch.zeros(1)) is None) == (rows > TABLES)
    assert len(patch.tables.made) == TABLES


def test_one_look_up_for_all_modules_of_a_pass() -> None:
    pipe = tiny_sd_pipe()
    layer, tensors = ActivationLayer(Conditions(lambda: one_pass(torch.tensor(500.0)))), as_erasure(make_plan())
    spec = tensors.config.layers[0]
    layer.attach(pipe.unet, ("0", 0), spec, tensors.layer_tensors(spec), None)
    edits = layer.build(layer.parts(), ("0",))
    now = one_pass(torch.tensor(476.0))
    for site in FF:
        module = pipe.unet.get_submodule(site)
        edits[layer.sites[site].place.number](torch.zeros(1, 2, module.in_features), now)
    assert len(FF) > 1 and [type(key[0]) for key in now.looked].count(Tables) == 1
    before = dict(now.looked)
    now.read(torch.tensor(30.0), (1.0, 0.0), None)
    edits[layer.sites[FF[0]].place.number](torch.zeros(1, 2, pipe.unet.get_submodule(FF[0]).in_features), now)
    (key,) = (key for key in now.looked if isinstance(key[0], Tables))
    assert not torch.equal(now.looked[key], before[key])


# ------------------------------------------------------------------------------------------- batches and their layout


def call(unet: Any, timestep: torch.Tensor, batch: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, 8, 8, generator=generator)
    rows = torch.randn(batch, 24, 32, generator=generator)
    with torch.no_grad():
        return unet(latents, timestep, encoder_hidden_states=rows).sample


def test_timesteps_of_each_row(pipe: Any) -> None:
    plan, times = make_plan(), torch.tensor([880, 560, 30, 476])
    reference = Reference(pipe, [(plan, 1.0)]).pipe
    base, oracle = call(pipe.unet, times), call(reference.unet, times)
    pipe.load_erasure(as_erasure(plan))
    assert_like(call(pipe.unet, times).numpy(), oracle.numpy(), base.numpy())


@pytest.mark.parametrize("dim", [0, 1])
def test_chunked_feed_forward(pipe: Any, dim: int) -> None:
    pipe.load_erasure(as_erasure(make_plan((*FF, *ATTENTION))))
    one, each = torch.tensor(500), torch.tensor([880, 560, 30, 476])
    whole, rows = call(pipe.unet, one), call(pipe.unet, each)
    for module in pipe.unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(2, dim)
    assert roundings(call(pipe.unet, one), whole) <= ROUNDINGS
    if dim == 1:
        assert roundings(call(pipe.unet, each), rows) <= ROUNDINGS
    else:
        with pytest.raises(ErasureInputError, match="dim=1"):
            call(pipe.unet, each)


def test_both_layouts_of_guidance(pipe: Any) -> None:
    """Both branches in one batch, in either order, or in two passes: each row gets the same."""
    pipe.load_erasure(as_erasure(make_plan()))
    generator = torch.Generator().manual_seed(1)
    latents, rows = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, 32, generator=generator)

    def predict(order: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return pipe.unet(latents[order], torch.tensor(476), encoder_hidden_states=rows[order]).sample

    both = predict([0, 1])
    for other in (predict([1, 0]).flip(0), torch.cat([predict([0]), predict([1])])):
        assert roundings(other, both) <= ROUNDINGS


@pytest.mark.parametrize("bins", [3, 7, 500])
def test_with_a_schedule(pipe: Any, bins: int) -> None:
    one, two = make_plan(seed=1), make_plan(seed=2, times=(700.0, 300.0))
    one.schedule = torch.rand(bins, len(FF), generator=torch.Generator().manual_seed(3))
    base, oracle = images(pipe), images(Reference(pipe, [(one, 1.0), (two, 0.5)]).pipe)
    pipe.load_erasure(as_erasure(one), "one")
    pipe.load_erasure(as_erasure(two), "two", strength=0.5)
    assert_like(images(pipe), oracle, base)


def test_a_schedule_changes_where_it_says() -> None:
    """The table's intervals end at the very numbers at which `Factors` changes the bin, and a schedule in training too."""
    for bins, span in ((3, 1000.0), (7, 999.0), (50, 1000.0), (97, 333.3)):
        modifier = Modifier(("a", 0), torch.arange(bins).float()[:, None], span)
        tensors = {TIMESTEPS: torch.tensor([5.0]), BLEND: torch.ones(1)}
        tensors |= {"s" + MASK: torch.full((1, 1), 128, dtype=torch.uint8), "s" + MEANS: torch.ones(1)}
        part = Part.of(tensors, "s", modifier)
        factors = Factors([(modifier, 0, 0)], torch.device("cpu"))
        limits = part.scheduled()[1]
        assert len(limits) == bins - 1
        after = torch.nextafter(limits, torch.full_like(limits, torch.inf))
        learned = LearnedSchedule(bins, 1, span)
        learned.table.data.copy_(modifier.schedule)
        for first, timesteps in enumerate((limits, after)):
            expected = list(range(first, first + bins - 1))
            assert factors.schedule(timesteps)[:, 0].tolist() == expected
            assert learned(timesteps)[:, 0].tolist() == expected


@pytest.mark.parametrize("layout", ["row", "uncond_first"])
def test_with_a_gate(pipe: Any, layout: str) -> None:
    """Each row of the batch is patched by its own prompt's factor and timestep, also beside an erasure without a gate."""
    concept = rows_of(pipe, "an ink drawing of a cat")
    plan, plain = make_plan(seed=1), make_plan(FF[:1], seed=2, times=(700.0, 300.0))
    generator = torch.Generator().manual_seed(4)
    plan.schedule = torch.rand(7, len(FF), generator=generator)
    latents, rows = torch.randn(2, 4, 8, 8, generator=generator), torch.cat([rows_of(pipe, ""), rows_of(pipe)])

    def predict(unet: Any) -> Any:
        with torch.no_grad():
            return unet(latents, torch.tensor([500, 40]), encoder_hidden_states=rows).sample.numpy()

    cosines = nn.functional.cosine_similarity(rows.flatten(1), concept.flatten(1)).clamp_min(0).tolist()
    factors = [cosines[1]] * 2 if layout == "uncond_first" else cosines
    base = predict(pipe.unet)
    assert cosines[0] != pytest.approx(cosines[1], rel=0.01)
    oracle = predict(Reference(pipe, [(plan, 0.8)], factors).pipe.unet)
    pipe.load_erasure(as_erasure(plan, gate=concept, layout=layout), "gated", strength=0.8)
    assert_like(predict(pipe.unet), oracle, base)
    other = tiny_sd_pipe()
    other.load_erasure(as_erasure(plain), "plain")
    alone = predict(other.unet)
    pipe.load_erasure(as_erasure(plain), "plain")
    pipe.set_erasures("gated", 0)
    assert_like(predict(pipe.unet), alone, base)
    pipe.set_erasures("plain", 0)
    assert equal(predict(pipe.unet), base)


def test_threads_with_strengths_of_their_own(pipe: Any) -> None:
    """Each draws what it draws alone, at its own timestep; pictures of one batch may have strengths of their own too."""
    one, two = make_plan((*FF, *ATTENTION), seed=1), make_plan(FF, seed=2, times=(700.0, 300.0))
    one.schedule = torch.rand(7, len(FF) + len(ATTENTION), generator=torch.Generator().manual_seed(3))
    pipe.load_erasure(as_erasure(one), "one")
    pipe.load_erasure(as_erasure(two), "two")
    singles = [(first, second) for first in (0.0, 0.4, 1.0) for second in (0.0, 0.7, 1.0)]
    pictures = [singles[1], singles[8], singles[0], singles[3]]

    def draw(first: Any, second: Any, time: float) -> torch.Tensor:
        with pipe.erasure_strengths({"one": first, "two": second}):
            return call(pipe.unet, torch.tensor(time))

    times = [40.0 + 100 * number for number in range(len(singles))]
    alone = [draw(*each, time) for each, time in zip(singles, times, strict=True)]
    assert torch.equal(alone[0], call(tiny_sd_pipe().unet, torch.tensor(times[0])))
    assert len({tuple(each.flatten().tolist()) for each in alone}) == len(alone)
    batch = draw(*zip(*pictures, strict=True), 476.0)
    for row, own in enumerate(pictures):
        assert roundings(batch[row], draw(*own, 476.0)[row]) <= ROUNDINGS
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            jobs = [pool.submit(draw, *each, time) for each, time in zip(singles, times, strict=True)]
            together = pool.submit(draw, *zip(*pictures, strict=True), 476.0)
            for job, own in zip(jobs, alone, strict=True):
                assert roundings(job.result(), own) <= ROUNDINGS
            assert roundings(together.result(), batch) <= ROUNDINGS


# ------------------------------------------------------------------------------------------------- living together


def test_beside_a_users_lora_and_a_lora_erasure(pipe: Any) -> None:
    """A user's LoRA reads what comes in, an erasure's `lora` reads what the patch gives: (W + BA) patched + U unpatched."""
    plan = make_plan((*FF, *ATTENTION))
    lora = random_erasure(pipe, "lora", tuple(f"unet.{site}" for site in FF), size=0.4)
    style = style_lora(tiny_sd_pipe())

    reference = dense_edit(tiny_sd_pipe(), lora)
    reference = Reference(reference, [(plan, 0.9)]).pipe
    base, oracle = base_images(), images(reference)
    pipe.load_erasure(as_erasure(plan), "patch", strength=0.9)
    pipe.load_erasure(lora, "lora")
    assert_like(images(pipe), oracle, base)

    for each in (reference, pipe):
        each.load_lora_weights(dict(style), adapter_name="style")
    # The reference's own hooks sit on what peft wraps, as ours do.
    styled = images(reference)
    assert far(styled, oracle) > 0.01
    assert_like(images(pipe), styled, base)
    late = tiny_sd_pipe()
    late.load_lora_weights(dict(style), adapter_name="style")
    late.load_erasure(lora, "lora", strict_base="ignore")
    late.load_erasure(as_erasure(plan), "patch", strength=0.9, strict_base="ignore")
    assert_like(images(late), styled, base)
    pipe.unload_lora_weights()
    assert_like(images(pipe), oracle, base)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["deepcopy", "pickle"]
)
def test_copies(pipe: Any, duplicate: Callable[[Any], Any]) -> None:
    pipe.load_erasure(as_erasure(make_plan()), "a")
    base, drawn = base_images(), images(pipe)
    twin = duplicate(pipe)
    assert equal(images(twin), drawn)
    twin.set_erasures("a", 0)
    assert equal(images(twin), base)
    assert equal(images(pipe), drawn)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Timesteps stay exact whatever the model is cast to; strength 0 is the base of that dtype, bit for bit."""
    plan = make_plan(times=(704.2, 699.2, 3.0))  # no half-precision number lies between 701.6 and the middle

    def predict(pipe: Any, time: float = 701.6) -> Any:
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, 4, 8, 8, generator=generator).to(pipe.unet.dtype)
        rows = torch.randn(1, 24, 32, generator=generator).to(pipe.unet.dtype)
        with torch.no_grad():
            return pipe.unet(latents, torch.tensor(time), encoder_hidden_states=rows).sample.float().numpy()

    pipe = tiny_sd_pipe()
    oracle, base = predict(Reference(pipe, [(plan, 1)]).pipe), predict(pipe)
    half = predict(tiny_sd_pipe().to(dtype))
    pipe.load_erasure(as_erasure(plan))
    pipe = pipe.to(dtype)
    assert pipe.unet.dtype == dtype
    assert_like(predict(pipe), oracle, base, tolerance=4 * far(half, base), ratio=2)
    pipe.set_erasures("random", 0)
    assert equal(predict(pipe), half)


def test_a_warning_above_five_concepts(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "diffusers_erasure")
    pipe.load_erasure(as_erasure(*(make_plan(FF[:1], seed) for seed in range(5))), "five")
    assert caplog.records == []
    pipe.load_erasure(as_erasure(make_plan(FF[:1], 5), make_plan(FF[:1], 6)), "more")
    told = [record.getMessage() for record in caplog.records]
    assert sum("More than 5 concepts" in each for each in told) == 1
    assert [each for each in told if "More than 5" not in each] == [
        each for each in told if "'zebra' is removed already" in each
    ]


def test_compiled() -> None:
    """One graph for all timesteps, and none more when strengths change."""
    graphs = 0

    def backend(module: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    pipe = tiny_sd_pipe(levels=1)
    sites = [name for name, _ in pipe.unet.named_modules() if f".{name}".endswith(".ff.net.2")][:1]
    widths = {site: pipe.unet.get_submodule(site).in_features for site in sites}
    plan = Plan(
        torch.tensor(TIMES),
        {site: torch.rand(4, width) < 0.5 for site, width in widths.items()},
        {site: torch.randn(4, width) for site, width in widths.items()},
    )
    erasure = as_erasure(plan, pipe=pipe)
    eager = copy.deepcopy(pipe)
    eager.load_erasure(erasure)
    pipe.load_erasure(erasure)
    torch.compiler.reset()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=backend)
    try:
        for time in torch.linspace(999, 0, 50):
            assert torch.equal(call(pipe.unet, time, 2), call(eager.unet, time, 2))
        pipe.set_erasures("random", 0.5)
        eager.set_erasures("random", 0.5)
        assert torch.equal(call(pipe.unet, torch.tensor(3.0), 2), call(eager.unet, torch.tensor(3.0), 2))
        assert graphs == 1
    finally:
        torch.compiler.reset()


# ----------------------------------------------------------------------------------------------------------- fused


def static_plan(sites: Sequence[str] = FF, seed: int = 0) -> Plan:
    return make_plan(sites, seed, (500.0,))


@pytest.mark.parametrize("sites", [FF, ATTENTION], ids=["ff", "attention"])
def test_fused_and_back(pipe: Any, sites: tuple[str, ...]) -> None:
    """Against the formula in float64: W diag(1 - s m) and b + s W (m mu)."""
    plan = static_plan(sites)
    base, before = images(pipe), weights(pipe)
    pipe.load_erasure(as_erasure(plan), strength=0.8)
    hooked = images(pipe)
    kept = pipe.fuse_erasures()
    after = weights(pipe)
    for site in sites:
        weight, bias = (before[f"unet.{site}.{name}"].double() for name in ("weight", "bias"))
        m, mu = plan.masks[site][0].double(), plan.means[site][0].double()
        expected = weight * (1 - 0.8 * m), bias + 0.8 * weight @ (m * mu)
        for name, value in zip(("weight", "bias"), expected, strict=True):
            merged = after.pop(f"unet.{site}.{name}")
            # The only rounding is the last one, to float32, by half of its eps at most.
            assert roundings(merged, value) <= 0.5 * (1 + 1e-6)
    assert_same_weights(after, {name: value for name, value in before.items() if name in after})
    assert_like(images(pipe), hooked, base)
    assert sum(len(module._forward_pre_hooks) for module in pipe.unet.modules()) == 1, "only the guard"
    (info,) = pipe.list_erasures()
    assert info.backend == "merge"
    changed = [f"unet.{site}.{name}" for site in sites for name in ("weight", "bias")]
    assert info.kept_bytes == kept == sum(before[name].nbytes for name in changed)
    info = pipe.load_erasure(random_erasure(tiny_sd_pipe(), "text_map"), "map", strict_base="error")
    assert set(info.base_match.values()) == {"same"}  # our own merge is no other base, nor is its bias
    pipe.unload_erasure("map")
    twin = copy.deepcopy(pipe)
    for each in (pipe, twin):
        each.unfuse_erasures()
        assert_same_weights(weights(each), before)
        assert equal(images(each), hooked)
    pipe.unload_erasure()
    assert equal(images(pipe), base)


def test_several_fused_with_a_lora(pipe: Any) -> None:
    """As by hooks: the `lora` reads what the joined patches give. (W + BA) diag(keep), b + (W + BA) add."""
    sites = tuple(f"unet.{site}" for site in (FF[0], ATTENTION[0]))
    base = images(pipe)
    pipe.load_erasure(as_erasure(static_plan((*FF, *ATTENTION), 1)), "one", strength=0.7)
    pipe.load_erasure(random_erasure(tiny_sd_pipe(), "lora", sites, size=0.5), "lora")
    pipe.load_erasure(as_erasure(static_plan(FF, 2), static_plan(FF[:1], 3)), "two", strength=0.9)
    hooked, before = images(pipe), weights(pipe)
    for names in (["one"], ["one", "lora"], ["two"]):
        with pytest.raises(ErasureInputError, match="Fuse them together"):
            unchanged_by(pipe, lambda names=names: pipe.fuse_erasures(names))
    pipe.fuse_erasures(["lora"])  # below patches that are hooks it is exact
    assert_like(images(pipe), hooked, base)
    pipe.fuse_erasures()
    assert_like(images(pipe), hooked, base)
    for other in (as_erasure(static_plan(FF[:1], 4)), random_erasure(tiny_sd_pipe(), "lora", sites[:1], size=0.1)):
        with pytest.raises(ErasureInputError, match="unfuse_erasures"):
            unchanged_by(pipe, lambda other=other: pipe.load_erasure(other, "other"))
    with pipe.erasures_disabled():
        assert equal(images(pipe), base)
    pipe.set_erasures("lora", 0.5)
    pipe.unfuse_erasures()
    assert_same_weights(weights(pipe), before)
    pipe.set_erasures("lora", 1.0)
    assert equal(images(pipe), hooked)


def test_what_cannot_be_fused(pipe: Any) -> None:
    scheduled = static_plan()
    scheduled.schedule = torch.rand(3, 1, generator=torch.Generator().manual_seed(0))
    concept = rows_of(pipe)
    for erasure in (
        as_erasure(make_plan()),
        as_erasure(static_plan(), make_plan(ATTENTION)),
        as_erasure(scheduled),
        as_erasure(static_plan(), gate=concept),
    ):
        pipe.load_erasure(erasure)
        with pytest.raises(ErasureCompatibilityError, match="cannot be fused"):
            unchanged_by(pipe, pipe.fuse_erasures)
        pipe.unload_erasure()
    linear = pipe.unet.get_submodule(FF[1])
    linear.bias = None
    pipe.load_erasure(as_erasure(static_plan(), pipe=pipe), strict_base="ignore")
    with pytest.raises(ErasureCompatibilityError, match="has no bias"):
        unchanged_by(pipe, pipe.fuse_erasures)


def test_exporting_a_static_one(pipe: Any, tmp_path: Any) -> None:
    base = images(pipe)
    pipe.load_erasure(as_erasure(static_plan()))
    pipe.export_erased(tmp_path / "model")
    back = type(pipe).from_pretrained(tmp_path / "model")
    back.set_progress_bar_config(disable=True)
    assert_like(images(back), images(pipe), base)


# ------------------------------------------------------------------------------------------------------ bad files


def damaged(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[], Erasure]:
    def make() -> Erasure:
        erasure = as_erasure(make_plan(FF[:2]))
        tensors = {name.removeprefix("activation."): value for name, value in erasure.tensors[TENSOR_FILE].items()}
        change(tensors)
        return Erasure(erasure.config, {TENSOR_FILE: {"activation." + name: value for name, value in tensors.items()}})

    return make


SITE = FF[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(SITE + MASK), "missing"),
        (lambda t: t.update(more=torch.ones(1)), "unexpected"),
        (lambda t: t.update({SITE + MEANS: t[SITE + MEANS][:-1]}), "one mean for each"),
        (lambda t: t.update({SITE + MEANS: t[SITE + MEANS][None]}), "one mean for each"),
        (lambda t: t.update({SITE + MASK: t[SITE + MASK][:-1]}), "one mean for each"),
        (lambda t: t.update({SITE + MASK: t[SITE + MASK][0]}), "one mean for each"),
        (lambda t: t.update({SITE + MASK: torch.zeros_like(t[SITE + MASK])}), "one mean for each"),
        (lambda t: t.update({SITE + MASK: t[SITE + MASK].float()}), "uint8"),
        (lambda t: t.update({SITE + MEANS: t[SITE + MEANS].to(torch.uint8)}), "uint8"),
        (lambda t: t.update({TIMESTEPS: t[TIMESTEPS].to(torch.uint8)}), "uint8"),
        (lambda t: t.update({TIMESTEPS: t[TIMESTEPS][[0, 1, 1, 2]]}), "only rise or only fall"),
        (lambda t: t.update({TIMESTEPS: t[TIMESTEPS][[0, 2, 1, 3]]}), "only rise or only fall"),
        (lambda t: t.update({TIMESTEPS: -t[TIMESTEPS]}), "only rise or only fall"),
        (lambda t: t.update({TIMESTEPS: t[TIMESTEPS][None]}), "only rise or only fall"),
        (lambda t: t.update({TIMESTEPS: torch.arange(1001.0)}), "1 to 1000"),
        (lambda t: t.update({BLEND: torch.ones(2)}), "blend"),
        (lambda t: t.update({BLEND: -torch.ones(1)}), "blend"),
        (lambda t: t.update({BLEND: torch.full((1,), torch.nan)}), "blend"),
        (lambda t: t.update({SITE + MEANS: t[SITE + MEANS] * torch.inf}), "finite"),
    ],
)
def test_damaged_tensors(change: Any, message: str) -> None:
    with pytest.raises(ErasureFileError, match=message):
        damaged(change)()


@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec("activation", "text_encoder", FF[:1], TENSOR_FILE, "a."),
        LayerSpec("activation", "unet", FF[:1], LORA_FILE, "a."),
        LayerSpec("activation", "unet", ("conv_in",), TENSOR_FILE, "a."),
        LayerSpec("activation", "unet", ("time_embedding.linear_1",), TENSOR_FILE, "a."),
    ],
)
def test_damaged_specs(spec: LayerSpec) -> None:
    with pytest.raises(ErasureFileError):
        ActivationKind().validate(spec, {})


def test_masks_in_another_kind_of_layer() -> None:
    erasure = random_erasure(tiny_sd_pipe(), "text_map")
    items = erasure.tensors[TENSOR_FILE].items()
    tensors = {name: torch.zeros_like(value, dtype=torch.uint8) for name, value in items}
    with pytest.raises(ErasureFileError, match="floating"):
        Erasure(erasure.config, {TENSOR_FILE: tensors})


def wider(tensors: dict[str, torch.Tensor]) -> None:
    tensors[SITE + MASK] = nn.functional.pad(tensors[SITE + MASK], (0, 1))


def test_another_architecture_or_bits_in_the_padding(pipe: Any) -> None:
    for make in (damaged(wider), lambda: as_erasure(plan_elsewhere())):
        with pytest.raises(ErasureCompatibilityError):
            unchanged_by(pipe, lambda make=make: pipe.load_erasure(make(), strict_base="ignore"))
    spec = LayerSpec("activation", "unet", (SITE,), TENSOR_FILE, "a.")
    unet = nn.Module()
    for part, module in zip(("ff", "net"), (nn.Module(), nn.Module()), strict=True):
        unet.add_module(part, module)
    net = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(12, 3))
    unet.ff.add_module("net", net)
    spec = dataclasses.replace(spec, sites=("ff.net.2",))
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 3] = True
    tensors = {"timesteps": torch.tensor([500.0]), "blend": torch.ones(1)}
    tensors |= {"ff.net.2.mask": pack(mask), "ff.net.2.means": torch.ones(1)}
    ActivationKind().check(unet, spec, tensors)
    mask[0, 12] = True
    tensors |= {"ff.net.2.mask": pack(mask), "ff.net.2.means": torch.ones(2)}
    ActivationKind().validate(spec, tensors)
    with pytest.raises(ErasureCompatibilityError, match="bits beyond"):
        ActivationKind().check(unet, spec, tensors)


def plan_elsewhere() -> Plan:
    plan = make_plan(FF[:1])
    site = "up_blocks.3.attentions.0.transformer_blocks.0.ff.net.2"
    return Plan(plan.timesteps, {site: plan.masks[FF[0]]}, {site: plan.means[FF[0]]})


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_saving(pipe: Any, tmp_path: Any, dtype: torch.dtype | None) -> None:
    erasure = as_erasure(make_plan())
    erasure.save_pretrained(tmp_path / "e", dtype=dtype)
    back = Erasure.from_pretrained(tmp_path / "e")
    for name, value in erasure.tensors[TENSOR_FILE].items():
        kept = back.tensors[TENSOR_FILE][name]
        assert kept.dtype == (value.dtype if dtype is None or name.endswith(MASK) else dtype)
        assert torch.equal(kept, value.to(kept.dtype))
    pipe.load_erasure(tmp_path / "e")
