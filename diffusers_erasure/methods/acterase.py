"""ActErase (Sun et al., arXiv 2601.00267): activations that carry a concept are replaced by what they are without it.

Without training: pairs of prompts, without and with the concept, are denoised from the same noise, and the input h of each
feed-forward's last Linear is observed at each timestep t. With s for the prompts without the concept and t for those with it,

    I     = RMS over tokens and pairs of h / |h|, one number a unit, divided by its largest
    mask  = (I_s >= tau) and (I_s < I_t)                                        the paper's equation 5
    h    <- h + blend (mean of h_s - h), where the mask is set                  when images are made

The paper's code is not public. What it does not tell (I, tau, the pairs, the sites, the branch of guidance) is a setting
here, and so are two things of ours, `top` and `blend`, which is 1 in the paper. Defaults were measured
(docs/methods/acterase.md).
"""

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tqdm.auto import tqdm

from ..artifact import Erasure
from ..assembling import bound_to_text, made_by
from ..base_model import component, describe_base, family_of, plain_weight, refuse_loras
from ..denoising.calls import Caller, latent_shape
from ..denoising.prompts import Prompts
from ..denoising.sampler import EMPTY, SAMPLE, guided, sampler_for
from ..denoising.twin import private
from ..errors import ErasureInputError, ErasureTrainingError
from ..layers.activation import BLEND, MASK, MEANS, TIMESTEPS, pack
from ..layers.layer import Layer
from ..logging import get_logger
from ..runs.checkpoint import Checkpoints
from ..runs.interrupts import Interrupt, noted
from ..runs.options import TrainingRun
from ..schema import MAX_LAYERS, Concept
from ..settings import Number, Of, Whole, check_settings, resolve
from .acterase_pairs import Pair, pairs_for
from .acterase_sites import find_sites
from .probes import Moments, inputs_seen


logger = get_logger(__name__)

SOURCE, TARGET = 0, 1  # sides of a pair: without the concept, and with it
PAIRS_OF_PROMPTS = "one or more pairs of prompts, (without the concept, with it)"


def checked_pairs(pairs: Any) -> tuple[Pair, ...]:
    """Pairs of prompts, (without the concept, with it); none where there are none."""
    plain = not isinstance(pairs, str | Mapping) and all(
        not isinstance(pair, str) and len(pair) == 2 and all(isinstance(side, str) for side in pair) for pair in pairs
    )
    if not plain:
        raise ErasureInputError(f"`pairs` must be {PAIRS_OF_PROMPTS}.")
    return tuple((str(left), str(right)) for left, right in pairs)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of ActErase.

    Args:
        preset (`"object"`, `"style"` or `"nudity"`, *optional*, defaults to `"object"`): whose pairs of prompts are used. With
            an anchor the prompt without the concept names the anchor instead, without one it names nothing.
        pairs (sequence of pairs of `str`, *optional*): one's own `(without, with)`. `{}` is the anchor on the left and the
            target on the right, which each right side needs where several concepts are erased.
        num_pairs (`int`, *optional*, defaults to 24): pairs that are denoised, each from noise of its own.
        importance (`"activation"` or `"wanda"`, *optional*, defaults to `"activation"`): how much a unit matters: by the root
            mean square of its share in the activation, or by that times the norm of the weight's column that reads it.
        tau (`float`, *optional*, defaults to 0.25): quantile of the importance without the concept over the units of a site.
            Units that matter less are left alone; with 0 none are.
        top (`float`, *optional*, defaults to 0.1): of the units of a site change at most this share, those whose
            importance the concept raises most; 1 or `None` for all.
        blend (`float`, *optional*, defaults to 2.0): how far a unit is moved at strength 1: with 1 to its mean, as published,
            with 2 as far again beyond it.
        sites (`"ff"`, `"attn"`, `"attn1"`, `"attn2"`, `"ff+attn2"` or `"all"`, *optional*, defaults to `"ff"`): what is patched:
            the input of each feed-forward's last Linear, of the output projections of attentions (both, self, cross), or both. In
            transformers `"ff"`, `"attn"` and `"all"` of the image's and the text's; the last Linear of FLUX.1's single blocks is both.
        blocks (`"all"`, `"up"`, `"mid"`, `"down"`, `"double"` or `"single"`, *optional*, defaults to `"all"`): in which blocks of a
            UNet, or in which of FLUX.1, those of two streams or of one.
        by_timestep (`bool`, *optional*, defaults to `True`): a mask and means for each of several timesteps. `False` pools all
            timesteps: such an erasure can be fused into the weights (`pipe.fuse_erasures()`), and then costs nothing.
        timesteps (`int`, *optional*, defaults to 20): how many timesteps are stored, evenly over the run.
        rows (`"conditional"` or `"all"`, *optional*, defaults to `"conditional"`): which branches of classifier-free guidance
            are observed. Both are patched.
        num_inference_steps (`int`, *optional*, defaults to 30): sampler steps of the calibration.
        guidance_scale (`float`, *optional*, defaults to 7.5): guidance of the calibration, as the base is guided: by the empty prompt
            (1 is none), or by the number that FLUX.1-dev is given; it does nothing where a model has none.
        max_sequence_length (`int`, *optional*, defaults to 0): text rows that T5 makes of a prompt, where there is one; 0 for the
            pipeline's own number.
        batch_size (`int`, *optional*, defaults to 4): pairs that are denoised at once.
        seed (`int`, *optional*, defaults to 0): seed of the noise.
    """

    preset: Literal["object", "style", "nudity"] = "object"
    pairs: Annotated[Sequence[Pair] | None, Of(PAIRS_OF_PROMPTS, Collection, plain=checked_pairs)] = None
    num_pairs: Annotated[int, Whole(least=1)] = 24
    importance: Literal["activation", "wanda"] = "activation"
    tau: Annotated[float, Number(below=1)] = 0.25
    top: Annotated[float | None, Number(above=0, most=1)] = 0.1
    blend: Annotated[float, Number(above=0)] = 2.0
    sites: Literal["ff", "attn", "attn1", "attn2", "ff+attn2", "all"] = "ff"
    blocks: Literal["all", "up", "mid", "down", "double", "single"] = "all"
    by_timestep: bool = True
    timesteps: Annotated[int, Whole(least=1)] = 20
    rows: Literal["conditional", "all"] = "conditional"
    num_inference_steps: Annotated[int, Whole(least=1)] = 30
    guidance_scale: Annotated[float, Number(above=0)] = 7.5
    max_sequence_length: Annotated[int, Whole(least=0)] = 0
    batch_size: Annotated[int, Whole(least=1)] = 4
    seed: Annotated[int, Whole(least=0)] = 0

    def stated(self) -> Mapping[str, Any]:
        """What stands for settings that are `None`."""
        return {"pairs": (), "top": 1.0}

    def __post_init__(self) -> None:
        check_settings(self)
        if self.pairs is not None and not self.pairs:
            raise ErasureInputError(f"`pairs` must be {PAIRS_OF_PROMPTS}.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What ActErase works with: a [`Config`] without `None`. No `pairs` are those of the preset, a `top` of 1 is all units."""

    preset: Literal["object", "style", "nudity"]
    pairs: tuple[Pair, ...]
    num_pairs: int
    importance: Literal["activation", "wanda"]
    tau: float
    top: float
    blend: float
    sites: Literal["ff", "attn", "attn1", "attn2", "ff+attn2", "all"]
    blocks: Literal["all", "up", "mid", "down", "double", "single"]
    by_timestep: bool
    timesteps: int
    rows: Literal["conditional", "all"]
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    batch_size: int
    seed: int

    def recorded(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The settings for the artefact, and the names of those that would reveal a concept."""
        settings = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        if not self.pairs:
            return {**settings, "pairs": None}, ()
        return {**settings, "pairs": [list(pair) for pair in self.pairs]}, ("pairs",)


# ----------------------------------------------------------------------------------------------------- the algorithm


def unit_mask(source: torch.Tensor, target: torch.Tensor, tau: float, top: float = 1.0) -> torch.Tensor:
    """Units that matter without the concept, and more with it: bool [T, C] from importances [T, C].

    Args:
        source, target (`torch.Tensor`): without and with the concept.
        tau (`float`): quantile of `source` over the units of a timestep.
        top (`float`, *optional*, defaults to 1.0): at most this share of the units, those that gain most.
    """
    mask = (source >= source.quantile(tau, dim=1, keepdim=True)) & (source < target)
    gain = (target - source).masked_fill(~mask, -torch.inf)
    count = max(1, round(top * mask.shape[1]))
    return mask & (gain >= gain.topk(count, dim=1).values[:, -1:])


def importance(moments: Moments, site: str, columns: torch.Tensor | None) -> torch.Tensor:
    """I [T, C]: the largest of each timestep is 1. `columns` [C]: norms of the weight's columns, for `"wanda"`."""
    value = moments.root_mean_square(site)
    value = value if columns is None else value * columns
    return value / value.amax(1, keepdim=True).clamp_min(1e-30)


class Calibration:
    """Denoises pairs of prompts, and sums what is seen: in a private twin of the denoiser, where it can have one.

    Args:
        pipe: the base model.
        settings ([`Settings`]): settings.
        pairs (sequence of lists of pairs): of each concept.
    """

    def __init__(self, pipe: Any, settings: Settings, pairs: Sequence[Sequence[Pair]]) -> None:
        self.settings, self.pairs = settings, pairs
        self.family = family_of(pipe)
        self.model = private(component(pipe, self.family.denoiser))
        self.modules = find_sites(self.model, settings)
        self.shape = latent_shape(pipe)
        self.sampler = sampler_for(pipe, settings.num_inference_steps, self.shape[1:])
        steps = len(self.sampler)
        stored = min(settings.timesteps, steps) if settings.by_timestep else steps
        self.stored = torch.linspace(0, steps - 1, stored).round().long().tolist() if stored > 1 else [steps // 2]
        texts = [text for own in pairs for pair in own for text in pair]
        size = self.shape[1] * getattr(pipe, "vae_scale_factor", 8)
        prompts = Prompts(pipe, texts, size, settings.max_sequence_length)
        self.call = Caller(self.family, self.model, prompts, self.sampler)
        self.dtype = self.model.dtype
        self.seen: tuple[int, int] | None = None  # side of the pair, and number of the stored timestep
        self.clear()

    @property
    def batches(self) -> int:
        """Batches of pairs of one concept."""
        return -(-self.settings.num_pairs // self.settings.batch_size)

    def clear(self) -> None:
        """Forget what was seen."""
        widths = {site: module.in_features for site, module in self.modules.items()}
        self.moments = [Moments(len(self.stored), widths) for _ in (SOURCE, TARGET)]

    def see(self, site: str, hidden_states: torch.Tensor) -> None:
        """Count in what a module reads."""
        if self.seen is not None:
            side, time = self.seen
            self.moments[side].add(site, time, hidden_states)

    @torch.no_grad()
    def batch(self, concept: int, number: int) -> None:
        """Denoise one batch of a concept's pairs, both sides from the same noise."""
        first = number * self.settings.batch_size
        places = range(first, min(first + self.settings.batch_size, self.settings.num_pairs))
        noise = torch.stack([self.sampler.noise(self.settings.seed, ("pair", i), self.shape) for i in places])
        for side in (SOURCE, TARGET):
            prompts = [self.pairs[concept][i][side] for i in places]
            latents = noise
            for step in range(len(self.sampler)):
                latents = self._step(latents, step, prompts, side)

    def _step(self, latents: torch.Tensor, step: int, prompts: list[str], side: int) -> torch.Tensor:
        settings, free = self.settings, self.sampler.guidance == "classifier-free"
        stored = (side, self.stored.index(step)) if step in self.stored else None
        outputs = []
        # Branch by branch, so that what is seen needs no cutting where a feed-forward is chunked.
        branches = [prompts, [""] * len(prompts)] if free and settings.guidance_scale != 1 else [prompts]
        for branch, texts in enumerate(branches):
            self.seen = stored if branch == 0 or settings.rows == "all" else None
            given = [settings.guidance_scale] * len(texts)
            outputs.append(self.call(latents, self.sampler.timesteps[step], texts, given))
        self.seen = None
        scale = settings.guidance_scale if free else 1.0
        prediction = guided(outputs, {SAMPLE: 0, EMPTY: len(outputs) - 1}, scale)
        return self.sampler.step(prediction.cpu(), step, latents.cpu())

    def tensors(self, settings: Settings | None = None) -> dict[str, torch.Tensor]:
        """The layer's tensors from what was seen, by the settings of the mask.

        Args:
            settings ([`Settings`], *optional*): other settings `importance`, `tau`, `top`, `blend`, `by_timestep`, and fewer sites.

        Raises:
            ErasureInputError: no unit passes.
            ErasureTrainingError: a statistic is not finite.
        """
        settings = settings or self.settings
        source, target = self.moments if settings.by_timestep else [moments.pooled() for moments in self.moments]
        timesteps = self.sampler.timesteps[self.stored].float()
        found = {TIMESTEPS: timesteps if settings.by_timestep else timesteps.mean(0, keepdim=True)}
        found[BLEND] = torch.tensor([float(settings.blend)])
        for site, module in find_sites(self.model, settings).items():
            means = source.mean(site)
            columns = plain_weight(module, site).norm(dim=0) if settings.importance == "wanda" else None
            without, with_it = (importance(moments, site, columns) for moments in (source, target))
            if not all(bool(torch.isfinite(value).all()) for value in (means, without, with_it)):
                raise ErasureTrainingError(
                    f"What {site!r} reads is not finite. Check that the base model draws what it should in {self.dtype}; if "
                    "not, make the erasure in float32 or bfloat16."
                )
            mask = unit_mask(without, with_it, settings.tau, settings.top)
            if bool(mask.any()):
                found[site + MASK], found[site + MEANS] = pack(mask), _compact(means[mask])
        if len(found) == 2:
            raise ErasureInputError(
                "No unit matters more with the concept than without it. Lower `tau`, leave `top` out, give `pairs` that differ more, "
                "or an anchor that is further away."
            )
        return found


def _compact(means: torch.Tensor) -> torch.Tensor:
    """float16, which keeps means to three digits, where it can hold them."""
    half = means.half()
    return half if bool(torch.isfinite(half).all()) else means.float()


# ---------------------------------------------------------------------------------------------------------- the run


def fit(pipe: Any, concepts: Sequence[Concept], config: Config, run: TrainingRun | None = None) -> Erasure:
    """Make the erasure, one layer a concept. Called by [`erase`], which has checked the concepts.

    A `run` with a `checkpoint_dir` saves the sums after each batch of pairs, and goes on from there with `resume`.
    """
    run = run or TrainingRun()
    check(pipe, concepts, run)
    settings = resolve(config, Settings)
    own, alone = settings.pairs, len(concepts) == 1
    pairs = [pairs_for(concept, settings.num_pairs, settings.preset, own, alone) for concept in concepts]
    base = describe_base(pipe)
    calibration = Calibration(pipe, settings, pairs)
    if run.release:
        for name in calibration.family.text_encoders:
            if getattr(pipe, name, None) is not None:
                pipe.register_modules(**{name: None})
    recorded, _ = settings.recorded()
    checkpoints = None
    if run.checkpoint_dir is not None:
        identity = {
            "method": "acterase",
            "settings": recorded,
            "concepts": [[concept.target, concept.anchor] for concept in concepts],
            "dtype": str(calibration.dtype),
        }
        checkpoints = Checkpoints(Path(run.checkpoint_dir).expanduser(), identity, dataclasses.asdict(base))
    layers = Run(calibration, run, checkpoints).layers()
    made = [
        Layer(
            "activation",
            tuple(sorted(n.removesuffix(MASK) for n in own if n.endswith(MASK))),
            own,
            calibration.family.denoiser,
        )
        for own in layers
    ]
    return Erasure.from_layers(
        bound_to_text(made, base),
        base=base,
        concepts=concepts,
        method=made_by("acterase", settings, settings.seed),
        diagnostics=diagnose(calibration, layers),
    )


def check(pipe: Any, concepts: Sequence[Concept], run: TrainingRun) -> None:
    """Refuse what cannot be done before anything is computed."""
    refuse_loras(component(pipe, family_of(pipe).denoiser), "denoiser")
    if len(concepts) > MAX_LAYERS:
        raise ErasureInputError(f"An erasure holds at most {MAX_LAYERS} concepts of this method, not {len(concepts)}.")
    if run.sample_every:
        raise ErasureInputError("ActErase trains nothing, so there are no sample images: leave `sample_every` out.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ErasureInputError("ActErase runs in one process: start it without `accelerate launch` and `torchrun`.")


class Run:
    """The calibration of all concepts, batch by batch, with checkpoints between two batches."""

    def __init__(self, calibration: Calibration, run: TrainingRun, checkpoints: Checkpoints | None) -> None:
        self.calibration, self.run, self.checkpoints = calibration, run, checkpoints
        self.done: list[dict[str, torch.Tensor]] = []  # the layers of the finished concepts
        self.batch = 0  # of the present concept
        if checkpoints is not None and checkpoints.steps() and not run.resume:
            raise ErasureInputError(
                f"{checkpoints.folder} holds the checkpoint of an earlier run. Go on from it with `resume=True` (`--resume`), name "
                "another folder, or delete this one."
            )

    @property
    def step(self) -> int:
        """Batches so far, over all concepts."""
        return len(self.done) * self.calibration.batches + self.batch

    def layers(self) -> list[dict[str, torch.Tensor]]:
        """The tensors of each concept's layer.

        Raises:
            KeyboardInterrupt: after a checkpoint was saved.
            ErasureError: see [`Calibration.tensors`]; a checkpoint cannot be written or read.
        """
        calibration, count = self.calibration, len(self.calibration.pairs)
        self._resume()
        total = count * calibration.batches
        with (
            inputs_seen(calibration.model, calibration.modules, calibration.see),
            noted() as interrupt,
            tqdm(
                total=total, initial=self.step, desc="calibrating", disable=not self.run.progress, dynamic_ncols=True
            ) as bar,
        ):
            while len(self.done) < count:
                calibration.batch(len(self.done), self.batch)
                self.batch += 1
                if self.batch == calibration.batches:
                    self.done.append(calibration.tensors())
                    calibration.clear()
                    self.batch = 0
                    logger.info("Calibrated %d of %d concepts.", len(self.done), count)
                bar.update()
                self._after(interrupt, total)
        return self.done

    def _after(self, interrupt: Interrupt, total: int) -> None:
        """Save a checkpoint, and stop where that was asked for."""
        if self.checkpoints is not None:
            parts = [moments.tensors(f"moments.{side}.") for side, moments in enumerate(self.calibration.moments)]
            parts += [
                {f"layer.{i}.{name}": value for name, value in layer.items()} for i, layer in enumerate(self.done)
            ]
            tensors = {name: value for part in parts for name, value in part.items()}
            self.checkpoints.save(self.step, tensors, {"done": len(self.done), "batch": self.batch})
        if interrupt.signal is not None and self.step < total:
            if self.checkpoints is not None:
                logger.warning("Stopped after batch %d of %d; `resume=True` goes on from there.", self.step, total)
            interrupt.stop()

    def _resume(self) -> None:
        found = self.checkpoints.latest() if self.checkpoints is not None and self.run.resume else None
        if found is None:
            return
        tensors, state = found
        self.batch = state["batch"]
        for index in range(state["done"]):
            prefix = f"layer.{index}."
            items = tensors.items()
            self.done.append({name.removeprefix(prefix): value for name, value in items if name.startswith(prefix)})
        for side, moments in enumerate(self.calibration.moments):
            moments.restore(f"moments.{side}.", tensors)
        logger.info("Going on after batch %d.", self.step)


def diagnose(calibration: Calibration, layers: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """Which share of the units is patched: of each concept, and at each site over all concepts and timesteps."""
    shares = {site: [0.0] * len(layers) for site in calibration.modules}
    sizes = {site: module.in_features for site, module in calibration.modules.items()}
    for index, layer in enumerate(layers):
        for site in shares.keys() & {name.removesuffix(MEANS) for name in layer}:
            shares[site][index] = layer[site + MEANS].numel() / (len(layer[TIMESTEPS]) * sizes[site])
    units = sum(sizes.values())
    return {
        "pairs": calibration.settings.num_pairs,
        "timesteps": len(layers[0][TIMESTEPS]),
        "patched": [
            round(sum(shares[site][i] * sizes[site] for site in sizes) / units, 4) for i in range(len(layers))
        ],
        "patched_by_site": {site: round(sum(own) / len(own), 4) for site, own in shares.items()},
    }
