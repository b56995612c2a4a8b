"""The training loop of all fine-tuning methods: noisy latents in, the tensors of an erasure out."""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, reduce
from tqdm.auto import tqdm

from .. import compat
from ..base_model import component, family_of
from ..denoising.calls import latent_shape
from ..denoising.prompts import Prompts, nearest
from ..denoising.sampler import Predict, placed, sampler_for
from ..errors import ErasureInputError, ErasureTrainingError
from ..lists import read_list
from ..logging import get_logger
from ..runs.checkpoint import POOL_FILE, Checkpoints
from ..runs.interrupts import Interrupt, noted
from ..runs.options import TrainingRun
from ..schema import BaseModel, Concept
from .config import TrainSettings
from .mixing import Mixing
from .network import Network, in_training
from .null_space import NullSpace, null_space, text_readers
from .objective import RETAIN, STUDENT, Objective, Step
from .players import Players
from .pool import Example, Source
from .pull import pull
from .retaining import kept_prompts, retained_examples
from .samples import write_samples
from .state import State
from .student import LoraStudent, Student
from .whitening import Whitening, whitening


logger = get_logger(__name__)

CONCEPTS, RETAINED = "concepts", "retained"  # the two sources of noisy latents
WORDS = "list:things"  # what text is whitened by where nothing is retained
READ_EVERY = 10  # steps after which the losses are read, at the latest


@dataclass(frozen=True)
class Trained:
    """What came out of a run.

    Attributes:
        tensors: the student's, by name, float32, on the CPU.
        losses: the mean loss of each step.
        sources: the pools of noisy latents.
        prompts: the encoded prompts.
        kept: the retained prompts, those of default lists among them.
        near: those of them that are nearest to a target.
        diagnostics: what else there is to tell of the run.
    """

    tensors: dict[str, torch.Tensor]
    losses: list[float]
    sources: dict[str, Source]
    prompts: Prompts
    kept: list[str]
    near: list[str]
    diagnostics: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Trains a student by a method's objective; the pipeline is only read, but for what the run may release.

    Args:
        pipe: the base model.
        student ([`Student`]): what is trained.
        concepts: what is erased.
        objective ([`Objective`]): the method.
        config ([`TrainSettings`]): settings that decide about the result.
        run ([`TrainingRun`]): those that only carry it out.
        identity: name and settings of the method, by which a checkpoint is known again.
        base ([`BaseModel`]): the base model's fingerprint.
        earlier ([`Trained`], *optional*): the stage before, with the same examples and settings of the sampler. Its noisy
            latents are taken over, and its encoded prompts: the text encoders may be released by now.
    """

    def __init__(
        self,
        pipe: Any,
        student: Student,
        concepts: Sequence[Concept],
        objective: Objective,
        config: TrainSettings,
        run: TrainingRun,
        identity: dict[str, Any],
        base: BaseModel,
        earlier: Trained | None = None,
    ) -> None:
        self.pipe, self.student, self.objective, self.config, self.run = pipe, student, objective, config, run
        self.earlier = earlier
        self.steps, self.batch_size = config.steps, config.batch_size
        self.family = family_of(pipe)
        model = component(pipe, self.family.denoiser)
        self.device = compat.execution_device(model)
        self.accelerator = _accelerator(config.accumulation, self.device)
        # SDXL's VAE has as many levels as Stable Diffusion's; a pipeline without one is trained all the same.
        self.pixels = getattr(pipe, "vae_scale_factor", 8)
        step = self.pixels * self.family.packing * getattr(model.config, "patch_size", 1)
        if config.resolution and config.resolution % step:
            raise ErasureInputError(f"`resolution` must be a multiple of {step}, not {config.resolution}.")
        self.shape = latent_shape(pipe, config.resolution)
        self.sampler = sampler_for(pipe, config.num_inference_steps, self.shape[1:])
        first = min(config.first_steps or len(self.sampler), len(self.sampler))
        self.of_pool = self.sampler.first(min(first + objective.late, len(self.sampler)))
        self.examples = objective.examples(concepts, config.template_list)
        self.mixing = (
            Mixing(self.examples, len(concepts), config.mixtures, config.seed) if config.mixtures > 1 else None
        )
        # Predictions that are kept lie at their own latents' timesteps, and are for prompts that stay the same.
        known = objective.teacher_roles if config.policy == "base" and not objective.late else ()
        self.kept_roles = tuple(role for role in known if self.mixing is None or not self.mixing.mixes(role))
        targets = [str(concept.target) for concept in concepts]
        kept = self.kept = kept_prompts(pipe, config, targets) if earlier is None else earlier.kept
        self.near = nearest(pipe, kept, targets, config.retain_nearest) if earlier is None else earlier.near
        in_templates = retained_examples(kept, self.near, config.template_list)
        self.players = Players(objective, config, self.examples, len(concepts), in_templates)
        in_templates = self.players.retained
        self.retained = in_templates if config.retain_weight else []
        if config.null_space:
            self._check_null_space(model)
        self.protected = [*self.near, *kept, *(example.prompts[RETAIN] for example in in_templates)]
        if config.retain_weight and len(kept) > len({example.prompts[RETAIN] for example in self.retained}):
            logger.warning(
                "%d prompts are retained, but only %d of them, the nearest to a target first, are trained on.",
                len(kept),
                len(self.retained),
            )
        self.sample_prompts = list(run.sample_prompts) or [
            *(str(concept.target) for concept in concepts[:4]),
            *config.retain.prompts[:4],
        ]
        self.guard: NullSpace | None = None
        self.checkpoints: Checkpoints | None = None
        if run.checkpoint_dir is not None:
            processes = {"processes": self.accelerator.num_processes, "dtype": str(model.dtype)}
            self.checkpoints = Checkpoints(
                Path(run.checkpoint_dir).expanduser(), {**identity, **processes}, dataclasses.asdict(base)
            )
            if not run.resume and self.checkpoints.steps():
                raise ErasureInputError(
                    f"{self.checkpoints.folder} holds the checkpoint of step {self.checkpoints.steps()[-1]} of an earlier "
                    "run. Go on from it with `resume=True` (`--resume`), name another folder, or delete this one."
                )

    # ------------------------------------------------------------------------------------------------- one run

    def train(self) -> Trained:
        """Train to the end.

        Raises:
            ErasureTrainingError: the loss is not finite, or a checkpoint cannot be written.
            ErasureError: a checkpoint is damaged or belongs to another run; a prompt is too long.
            KeyboardInterrupt: after a checkpoint was saved.
        """
        config = self.config
        with ExitStack() as stack:
            prompts = self._encode() if self.earlier is None else self.earlier.prompts
            self.guard = self._null_space(prompts) if config.null_space else None
            self.student.whitening = self._whitening(prompts) if config.whiten else Whitening()
            self._release()
            network = stack.enter_context(
                in_training(
                    self.pipe,
                    self.student,
                    prompts,
                    self.sampler,
                    self.accelerator,
                    config.gradient_checkpointing,
                )
            )
            if self.guard is not None:
                self.guard.apply(network.factors)
            stack.enter_context(self.objective.inside(network.model))
            sources = self._sources(network) if self.earlier is None else self.earlier.sources
            self.players.begin(prompts)
            state = State(network, config, sources, self.players)
            if self.checkpoints is not None and self.run.resume:
                self._resume(state, self.checkpoints)
            interrupt = stack.enter_context(noted())
            self._fill(state, interrupt)
            self._steps(state, interrupt)
            told: dict[str, Any] = {} if self.guard is None else {"null_space": self.guard.diagnostics}
            if self.student.whitening.matrices:
                told["whitened"] = self.student.whitening.diagnostics
            told |= self.players.diagnostics
            found = state.factors(config.save), state.losses, state.sources, prompts
            return Trained(*found, self.kept, self.near, told)

    def _steps(self, state: State, interrupt: Interrupt) -> None:
        """The loop itself."""
        config, network = self.config, state.network
        total = self.batch_size * self.accelerator.num_processes
        first = self.batch_size * self.accelerator.process_index
        own = slice(first, first + self.batch_size)
        bar = self._bar("training", self.steps, state.step)
        for number in range(state.step, self.steps):
            self._refresh(state, number)
            losses = []
            for part in range(config.accumulation):
                with self.accelerator.accumulate(network.student_module):
                    self.student.shuffle(number, part)
                    step = self._draw(state, (number, part), total, own)
                    step = self.players.before(network, step, self.accelerator)
                    loss = self._loss(step)
                    losses.append(loss.detach())
                    self.accelerator.backward(loss)
            if config.pull:
                pull(network.factors, config.pull * number / max(1, self.steps - 1))
            self.accelerator.clip_grad_norm_(network.parameters, config.max_grad_norm)
            for group in state.optimizer.param_groups:  # until the schedule sets it anew
                group["lr"] *= self.objective.rate(number)
            state.optimizer.step()
            if self.guard is not None:
                self.guard.apply(network.factors)
            state.schedule.step()
            state.optimizer.zero_grad(set_to_none=True)
            if state.ema is not None:
                state.ema.step(network.parameters)
            self.players.after(network, step, self.accelerator)
            state.unread.append(torch.stack(losses).mean())
            # Several processes agree about an end where they read their losses.
            asked = self.accelerator.num_processes == 1 and interrupt.signal is not None
            if asked or self._is_read(state.step):
                asked = self._read(state, interrupt)
                bar.set_postfix(loss=f"{state.losses[-1]:.4g}", refresh=False)
            bar.update()
            self._after(state, asked, interrupt)
        bar.close()

    def _loss(self, step: Step) -> torch.Tensor:
        loss = self.objective.loss(step).mean()
        if step.retained is not None:
            scale = self.objective.scale(step.network.sampler, step.retained.timesteps)
            scale = placed(scale, loss.device) if isinstance(scale, torch.Tensor) else scale
            loss = loss + self.config.retain_weight * (scale * step.retain_loss()).mean()
        return loss

    def _draw(self, state: State, what: tuple[int, int], total: int, own: slice) -> Step:
        drawn = state.sources[CONCEPTS].draw(what, total, own, lambda: self._predict(state, self.config.policy))
        if self.mixing is not None:
            drawn = self.mixing.of(drawn, what, total, own)
        retained, picks = None, None
        if RETAINED in state.sources and self.objective.retains(what[0]):
            picks = self.players.picks(drawn.examples, what, total, own)
            places = None if picks is None else picks.places
            retained = state.sources[RETAINED].draw(what, total, own, lambda: state.network.teacher_rows, places)
        return Step(state.network, drawn, retained, what[0], picks)

    def _is_read(self, step: int) -> bool:
        """Whether the losses are read after a step: before anything is saved, drawn or told, and every few steps."""
        run = self.run
        often = (READ_EVERY, run.checkpoint_every, *([run.sample_every] if run.sample_every else []))
        return step == self.steps or any(step % each == 0 for each in often) or self._is_told(step)

    def _is_told(self, step: int) -> bool:
        return step % max(READ_EVERY, self.steps // 20) == 0

    def _read(self, state: State, interrupt: Interrupt) -> bool:
        """Read the losses that nobody has read; return whether a process was asked to stop.

        Raises:
            ErasureTrainingError: one is not finite. Nothing of it was saved.
        """
        found, asked = self._everywhere(torch.stack(state.unread), interrupt)
        state.unread = []
        for loss in found:
            if not math.isfinite(loss):
                self._refuse(state.step)
            state.losses.append(loss)
        return asked

    def _refuse(self, number: int) -> None:
        good = self.checkpoints.steps() if self.checkpoints else []
        raise ErasureTrainingError(
            f"The loss of step {number + 1} is not finite. "
            + (f"The last good checkpoint is of step {good[-1]}. " if good else "")
            + "Check that the base model draws what it should in this dtype; if so, lower `learning_rate`, or train in float32."
        )

    def _everywhere(self, losses: torch.Tensor, interrupt: Interrupt) -> tuple[list[float], bool]:
        """Losses [n], their means over all processes, and whether one of these was asked to stop; in one read."""
        asked = losses.new_full((1,), float(interrupt.signal is not None), dtype=torch.float32)
        *means, stop = reduce(torch.cat([losses.float(), asked]), "mean").tolist()
        return means, stop > 0

    def _after(self, state: State, asked_to_stop: bool, interrupt: Interrupt) -> None:
        """Sample images, checkpoints and an end between two steps."""
        run, step = self.run, state.step
        if run.sample_every and step % run.sample_every == 0 and self.accelerator.is_main_process:
            assert self.checkpoints is not None  # `TrainingRun` asks for a folder with `sample_every`
            file = self.checkpoints.folder / "samples" / f"step-{step:07d}.png"
            drawing = (self.sample_prompts, self.shape, self.config)
            write_samples(self.pipe, state.network, self.sampler, *drawing, file)
        done = step == self.steps
        if step % run.checkpoint_every == 0 or asked_to_stop or done:
            self._save(state)
        if self._is_told(step):
            logger.info("Step %d of %d, loss %.4g.", step, self.steps, state.losses[-1])
        if asked_to_stop and not done:
            self._stop(state, interrupt)

    def _stop(self, state: State, interrupt: Interrupt) -> None:
        if self.checkpoints is not None:
            logger.warning(
                "Stopped at step %d of %d; `resume=True` (`--resume`) goes on from there.",
                state.step,
                self.steps,
            )
        interrupt.stop()

    # ------------------------------------------------------------------------------------------- noisy latents

    def _sources(self, network: Network) -> dict[str, Source]:
        config = self.config
        count = config.trajectories

        def source(
            name: str,
            examples: Sequence[Example],
            count: int,
            keep: Sequence[str],
            favoured: Sequence[int] = (),
            late: int = 0,
        ) -> Source:
            how = self.shape, config.guidance_scale or 1.0, config.seed, name, network.model.dtype, favoured, late
            return Source(self.of_pool, examples, count, keep, *how)

        late = self.objective.late
        sources = {CONCEPTS: source(CONCEPTS, self.examples, count, self.kept_roles, late=late)}
        if self.retained:
            of_retained = max(count, len(self.retained)) if count else 0
            sources[RETAINED] = source(RETAINED, self.retained, of_retained, (RETAIN,), self._favoured())
        return sources

    def _favoured(self) -> list[int]:
        """Retained examples about prompts that are near a target."""
        texts = {template.format(prompt) for template in self.config.template_list for prompt in self.near}
        return [i for i, example in enumerate(self.retained) if example.prompts[RETAIN] in texts]

    def _predict(self, state: State, policy: str | None) -> Predict:
        """The network that denoises."""
        if policy == "base":
            return state.network.teacher_rows
        if policy == "student" or state.ema is None:
            return state.network.student_rows

        def with_average(*arguments: Any) -> list[torch.Tensor]:
            assert state.ema is not None
            state.ema.store(state.network.parameters)
            state.ema.copy_to(state.network.parameters)
            try:
                return state.network.student_rows(*arguments)
            finally:
                state.ema.restore(state.network.parameters)

        return with_average

    def _fill(self, state: State, interrupt: Interrupt) -> None:
        """Fill the pools; the student is still the base then."""
        missing = {name: source for name, source in state.sources.items() if not source.is_full}
        if not missing:
            return
        wanted = sum(source.count - source.drawn_times for source in missing.values())
        bar = self._bar("noisy latents", wanted, 0)
        for source in missing.values():
            while not source.is_full:
                most = source.count - source.drawn_times
                bar.update(source.extend(state.network.teacher_rows, self.accelerator, most))
                _, asked = self._everywhere(torch.zeros(1, device=self.device), interrupt)
                if asked:
                    self._save_pools(state)
                    logger.warning(
                        "Stopped while drawing noisy latents; `resume=True` (`--resume`) goes on from there."
                    )
                    interrupt.stop()
        bar.close()
        self._save_pools(state)

    def _refresh(self, state: State, number: int) -> None:
        """Draw the oldest trajectories again, where they follow the student."""
        source = state.sources[CONCEPTS]
        if self.config.policy == "base" or not source.count or not number or number % self.config.refresh_every:
            return
        left = min(self.config.refresh, source.count)
        predict = self._predict(state, self.config.policy)
        while left:
            left -= source.extend(predict, self.accelerator, left)

    # --------------------------------------------------------------------------------------------- checkpoints

    def _save(self, state: State) -> None:
        if self.checkpoints is not None and self.accelerator.is_main_process:
            self.checkpoints.save(state.step, *state.saved())

    def _save_pools(self, state: State) -> None:
        if self.checkpoints is not None and self.accelerator.is_main_process:
            self.checkpoints.write(POOL_FILE, *state.saved_pools())

    def _resume(self, state: State, checkpoints: Checkpoints) -> None:
        """Go on from the newest checkpoint, where there is one."""
        found = checkpoints.latest()
        if (checkpoints.folder / POOL_FILE).exists():  # else it is drawn again, to the same values
            state.restore_pools(*checkpoints.read(POOL_FILE))
        if found is not None:
            state.restore(*found)
            logger.info("Going on from step %d of %d.", state.step, self.steps)
        else:
            logger.warning("There is no checkpoint in %s to go on from; starting with step 1.", checkpoints.folder)

    # ------------------------------------------------------------------------------------------------- the rest

    def _encode(self) -> Prompts:
        wanted = [prompt for example in (*self.examples, *self.retained) for prompt in example.prompts.values()]
        pixels, length = self.shape[1] * self.pixels, self.config.max_sequence_length
        return Prompts(self.pipe, [*wanted, *self.sample_prompts], pixels, length)

    def _check_null_space(self, model: torch.nn.Module) -> None:
        """See, before anything is encoded, that something is retained and that a layer reads it."""
        if not self.kept:
            raise ErasureInputError(
                "`null_space` protects what is retained, but nothing is: name in `retain` what must stay, or leave `null_space` out."
            )
        text_readers(model, self._sites())

    def _sites(self) -> tuple[str, ...]:
        return self.student.sites if isinstance(self.student, LoraStudent) else ()

    def _null_space(self, prompts: Prompts) -> NullSpace:
        """What the LoRA is kept from reading; in all processes the first one's, bit for bit."""
        targets = [example.prompts[STUDENT] for example in self.examples]
        share = self.config.null_space
        found = [null_space(self.pipe, share, self._sites(), prompts, self.protected, targets)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        return found[0]

    def _whitening(self, prompts: Prompts) -> Whitening:
        """How the student reads text; in all processes the first one's, bit for bit."""
        sites = self.student.low_rank(component(self.pipe, self.family.denoiser))
        targets = [example.prompts[STUDENT] for example in self.examples]
        kept = self.protected or read_list(WORDS)
        found = [whitening(self.pipe, self.config.whiten, sites, prompts, kept, targets)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        return found[0]

    def _release(self) -> None:
        """Take text encoders and VAE out of the pipeline, where the run may: nothing else makes room for the training.

        To move them and bring them back would take them from whoever draws with the pipeline meanwhile.
        """
        if not self.run.release:
            return
        for name in (*self.family.text_encoders, "vae", "image_encoder", "safety_checker"):
            drawing = name == "vae" and self.run.sample_every
            if isinstance(getattr(self.pipe, name, None), torch.nn.Module) and not drawing:
                self.pipe.register_modules(**{name: None})

    def _bar(self, what: str, total: int, done: int) -> tqdm:
        hidden = not self.run.progress or not self.accelerator.is_local_main_process
        return tqdm(total=total, initial=done, desc=what, disable=hidden, dynamic_ncols=True)


def _accelerator(accumulation: int, device: torch.device) -> Accelerator:
    """An accelerator without mixed precision: base and LoRA have dtypes of their own, and the loss is not scaled."""
    try:
        return Accelerator(
            gradient_accumulation_steps=accumulation,
            cpu=device.type == "cpu",
            device_placement=False,
            mixed_precision="no",
        )
    except ValueError as error:  # its options cannot be changed any more
        raise ErasureInputError(
            f"accelerate is set up in this process in another way ({str(error).splitlines()[0]}). Train before making an "
            "`Accelerator` of your own, or without mixed precision."
        ) from error
