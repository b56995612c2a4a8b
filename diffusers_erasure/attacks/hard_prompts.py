"""Ring-A-Bell (Tsai et al., ICLR 2024, arXiv 2310.10012): a hard prompt for a concept, found with the text encoder alone.

With E(p) [L, C] what the text encoder makes of a prompt, at all places:

    direction = mean over pairs of E(prompt with the concept) - E(the same without)
    wanted    = E(prompt) + eta direction
    found     = the k tokens between the start and the padding that minimise  sum (E(tokens) - wanted)^2

by a genetic algorithm: in each generation the better half stays, half of these get two children by one-point crossover, and of all a quarter
has a token replaced. No image is drawn, and the erased model is never asked: what is found is tried on it afterwards.

The published search mutates its parents in place, so that the best can be lost, and publishes decoded text, of which the tokenizer may make
other tokens. Here the best stays unless `elite=0`, the same prompt is not searched with twice, and what is returned is text that was scored as it is read again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tqdm.auto import tqdm

from ..base_model import component, describe_base, family_of
from ..denoising.sampler import generator_for
from ..encoding.readers import padded_batch
from ..errors import ErasureCompatibilityError, ErasureInputError
from ..lists import names_any
from ..logging import get_logger
from ..runs.checkpoint import Checkpoints
from ..runs.interrupts import noted
from ..settings import Number, Whole, resolve
from ..settings.ranges import check_settings


logger = get_logger(__name__)

Distance = Callable[[torch.Tensor], torch.Tensor]  # of token ids [B, L] to what is wanted, [B]
TEMPLATES = (
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "a drawing of a {}",
    "{}",
    "a {} on a table",
    "a small {}",
    "one {} alone",
)
SAVE_EVERY = 25  # generations
WITHOUT = "thing"  # in the place of the concept, where no anchor is named
PUBLISHED: dict[str, Any] = {
    "population": 200,
    "generations": 3000,
    "tokens": 16,
    "eta": 3.0,
    "mutation": 0.25,
    "crossover": 0.5,
    "elite": 0,
    "vocabulary": "all",
    "allow_target": True,
}
OURS: dict[str, Any] = {
    **PUBLISHED,
    **{"generations": 300, "tokens": 8, "elite": 2, "vocabulary": "words", "allow_target": False},
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the search. Those that are left out (`None`) are this library's, or with `published` the authors'.

    Args:
        published (`bool`, *optional*, defaults to `False`): take the authors' settings.
        population (`int`, *optional*): prompts of a generation.
        generations (`int`, *optional*): how many; `population * generations` prompts are encoded.
        tokens (`int`, *optional*): of a prompt.
        eta (`float`, *optional*): how far along the concept's direction.
        mutation (`float`, *optional*): share of a generation in which a token is replaced.
        crossover (`float`, *optional*): share of the parents that get two children.
        elite (`int`, *optional*): of the best so many are never mutated.
        vocabulary (`"words"` or `"all"`, *optional*): whole lower-case words alone, which survive being written down, or all tokens.
        allow_target (`bool`, *optional*): whether the prompt may name the concept.
        seed (`int`, *optional*, defaults to 0): everything random depends on it and on the generation.
    """

    published: bool = False
    population: Annotated[int | None, Whole(least=4)] = None
    generations: Annotated[int | None, Whole(least=1)] = None
    tokens: Annotated[int | None, Whole(least=1)] = None
    eta: Annotated[float | None, Number()] = None
    mutation: Annotated[float | None, Number(most=1)] = None
    crossover: Annotated[float | None, Number(most=1)] = None
    elite: Annotated[int | None, Whole(least=0)] = None
    vocabulary: Literal["words", "all"] | None = None
    allow_target: bool | None = None
    seed: Annotated[int, Whole(least=0)] = 0

    def __post_init__(self) -> None:
        check_settings(self)

    def stated(self) -> dict[str, Any]:
        """What stands for settings that are left out."""
        return PUBLISHED if self.published else OURS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the search works with: a [`Config`] with nothing left out."""

    published: bool
    population: int
    generations: int
    tokens: int
    eta: float
    mutation: float
    crossover: float
    elite: int
    vocabulary: Literal["words", "all"]
    allow_target: bool
    seed: int


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        prompt: the text, as it is to be given to a pipeline.
        distance: the sum of squares to what was wanted, of that text.
        start: that of the prompt it started from.
        curve: the best of each generation.
        encoded: how many prompts were encoded.
    """

    prompt: str
    distance: float
    start: float
    curve: tuple[float, ...]
    encoded: int


class Encoder:
    """A pipeline's text encoder, from tokens to rows.

    Args:
        pipe ([`DiffusionPipeline`]): with its text encoder and tokenizer.
        name (`str`, *optional*): which of them, such as `"text_encoder_2"`; the first by default.

    Raises:
        ErasureCompatibilityError: it is missing.
    """

    def __init__(self, pipe: Any, name: str | None = None) -> None:
        family = family_of(pipe)
        name = name or family.text_encoders[0]
        if name not in family.text_encoders:
            raise ErasureInputError(
                f"{family.title} has the text encoders {list(family.text_encoders)}, not {name!r}."
            )
        self.name = name
        self.model = component(pipe, name)
        self.tokenizer = component(pipe, family.tokenizers[family.text_encoders.index(name)])
        if self.model is None or self.tokenizer is None:
            raise ErasureCompatibilityError(f"The attack encodes prompts, but the pipeline has no {name}.")
        positions = getattr(self.model.config, "max_position_embeddings", None)
        self.length = min(int(self.tokenizer.model_max_length), positions or 512)
        special = list(self.tokenizer("").input_ids)
        # What stands before the own tokens of a prompt, and behind them: the end, and padding as the tokenizer has it.
        self.before, self.after = special[:-1], [special[-1], *self._ids("")[len(special) :]]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, padding="max_length", max_length=self.length, truncation=True).input_ids)

    @property
    def room(self) -> int:
        """Tokens that fit between those that every prompt has."""
        return self.length - len(self.before) - 1

    def of_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Token ids [B, L]."""
        return torch.tensor([self._ids(text) for text in texts])

    def of_tokens(self, free: torch.Tensor) -> torch.Tensor:
        """Token ids [B, L] of prompts whose own tokens are [B, k]: start, these, end and padding as the tokenizer has them."""
        before, after = (torch.tensor([ids]).long().expand(len(free), -1) for ids in (self.before, self.after))
        return torch.cat([before, free, after], 1)[:, : self.length]

    @torch.no_grad()
    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """What is made of tokens [B, L]: [B, L, C], float32, on the CPU."""
        device, found = self.model.device, []
        for part in ids.split(padded_batch(self.length)):
            found.append(self.model(input_ids=part.to(device))[0].float().cpu())
        return torch.cat(found)

    def text(self, free: torch.Tensor) -> str:
        """Tokens [k] as they are written."""
        return str(self.tokenizer.decode(free.tolist(), skip_special_tokens=True)).strip()


def direction_of(encoder: Encoder, target: str, anchor: str, templates: Sequence[str] = TEMPLATES) -> torch.Tensor:
    """The concept's direction [L, C]: the mean of what prompts with it have more than the same with the anchor."""
    rows = [
        encoder.rows(encoder.of_texts([template.format(word) for template in templates])) for word in (target, anchor)
    ]
    return (rows[0] - rows[1]).mean(0)


def vocabulary_of(encoder: Encoder, target: str, settings: Settings) -> torch.Tensor:
    """The tokens that may be used, ids [V].

    Raises:
        ErasureInputError: there are none.
    """
    special, pieces = set(encoder.tokenizer.all_special_ids), encoder.tokenizer.get_vocab()
    found = []
    for piece, number in pieces.items():
        word = piece.removesuffix("</w>").removeprefix("▁")
        whole = word != piece and word.isascii() and word.isalpha() and word.islower()
        if number in special or (settings.vocabulary == "words" and not whole):
            continue
        if settings.allow_target or not names_any(word, [target]):
            found.append(number)
    if not found:
        raise ErasureInputError(f'The tokenizer has no tokens for `vocabulary="{settings.vocabulary}"`.')
    return torch.tensor(sorted(found))


class Search:
    """The genetic algorithm.

    Args:
        score: the fitness of prompts with tokens [B, k], [B]; less is better.
        vocabulary: tokens [V].
        settings ([`Settings`]): of the search.
    """

    def __init__(
        self, score: Callable[[torch.Tensor], torch.Tensor], vocabulary: torch.Tensor, settings: Settings
    ) -> None:
        self.score, self.vocabulary, self.settings = score, vocabulary, settings
        self.population = self._random(settings.population, self._generator(-1))
        self.scores = score(self.population)
        self.curve = [float(self.scores.min())]

    def _generator(self, number: int) -> torch.Generator:
        return generator_for(self.settings.seed, "ring-a-bell", number)

    def _random(self, count: int, generator: torch.Generator) -> torch.Tensor:
        places = torch.randint(len(self.vocabulary), (count, self.settings.tokens), generator=generator)
        return self.vocabulary[places]

    @property
    def generation(self) -> int:
        """Generations so far; the first was random."""
        return len(self.curve)

    def step(self) -> None:
        """One generation."""
        settings, generator = self.settings, self._generator(self.generation)
        parents = self.population[self.scores.argsort(stable=True)][: settings.population // 2]
        children = []
        for parent in parents:
            if float(torch.rand((), generator=generator)) < settings.crossover:
                mate = parents[int(torch.randint(len(parents), (), generator=generator))]
                cut = int(torch.randint(settings.tokens, (), generator=generator))
                children += [torch.cat([parent[:cut], mate[cut:]]), torch.cat([mate[:cut], parent[cut:]])]
        grown = torch.stack([*parents, *children])[: settings.population]
        if not settings.published:  # the same prompt twice is searched with once
            first = {tuple(row.tolist()): place for place, row in reversed(list(enumerate(grown)))}
            grown = grown[sorted(first.values())]
        if len(grown) < settings.population:  # fresh ones keep it as large
            grown = torch.cat([grown, self._random(settings.population - len(grown), generator)])
        grown = grown.clone()
        replaced = torch.rand(len(grown), generator=generator) < settings.mutation
        replaced[: settings.elite] = False
        places = torch.randint(settings.tokens, (len(grown),), generator=generator)
        fresh = self._random(len(grown), generator)[:, 0]
        for row in replaced.nonzero().flatten().tolist():
            grown[row, places[row]] = fresh[row]
        self.population, self.scores = grown, self.score(grown)
        self.curve.append(float(self.scores.min()))

    def draw(self) -> None:
        """In place of a generation as many prompts at random, of which and of those so far the best stay."""
        fresh = self._random(self.settings.population, self._generator(self.generation))
        population, scores = torch.cat([self.population, fresh]), torch.cat([self.scores, self.score(fresh)])
        order = scores.argsort(stable=True)[: self.settings.population]
        self.population, self.scores = population[order], scores[order]
        self.curve.append(float(self.scores.min()))

    def saved(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {
            "population": self.population,
            "scores": self.scores,
            "curve": torch.tensor(self.curve, dtype=torch.float64),
        }

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take what [`saved`] gave."""
        self.population, self.scores = tensors["population"], tensors["scores"]
        self.curve = tensors["curve"].tolist()


def ring_a_bell(
    pipe: Any,
    target: str,
    anchor: str = "",
    *,
    prompt: str | None = None,
    config: Config | None = None,
    encoder: str | None = None,
    checkpoint_dir: Path | str | None = None,
    resume: bool = False,
    random: bool = False,
    progress: bool = True,
) -> Found:
    """Search for a hard prompt of a concept, with the text encoder alone.

    Args:
        pipe ([`DiffusionPipeline`]): the base model; its denoiser is not used.
        target (`str`): the concept.
        anchor (`str`, *optional*): what stands in its place in the pairs' other halves.
        prompt (`str`, *optional*): a prompt without the concept, to which it is added; by default `"a {anchor}"`.
        config ([`Config`], *optional*): settings of the search.
        encoder (`str`, *optional*): the text encoder, the first by default.
        checkpoint_dir (`str` or `Path`, *optional*): a folder for checkpoints.
        resume (`bool`, *optional*, defaults to `False`): go on from the newest one there.
        random (`bool`, *optional*, defaults to `False`): draw all prompts at random instead, as many: the control.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        [`Found`].

    Raises:
        ErasureInputError: no room for so many tokens, or no tokens; a checkpoint that nobody asked for is there.
        ErasureCompatibilityError: the text encoder is missing.
        KeyboardInterrupt: after a checkpoint was saved.
    """
    settings = resolve(config or Config(), Settings)
    reader = Encoder(pipe, encoder)
    if settings.tokens > reader.room:
        raise ErasureInputError(f"`tokens` is {settings.tokens}, but {reader.name} reads {reader.room} at most.")
    without = anchor or WITHOUT
    start = prompt or f"a {without}"
    first = reader.rows(reader.of_texts([start]))
    wanted = first + settings.eta * direction_of(reader, target, without)[None]

    def distance(ids: torch.Tensor) -> torch.Tensor:
        return (reader.rows(ids) - wanted).square().flatten(1).sum(1).double()

    search = Search(lambda free: distance(reader.of_tokens(free)), vocabulary_of(reader, target, settings), settings)
    about = {**dataclasses.asdict(settings), "target": target, "anchor": anchor, "prompt": start, "random": random}
    checkpoints = None
    if checkpoint_dir is not None:
        identity = {"attack": "ring-a-bell", "encoder": reader.name, **about}
        checkpoints = Checkpoints(Path(checkpoint_dir).expanduser(), identity, dataclasses.asdict(describe_base(pipe)))
        if resume and (latest := checkpoints.latest()) is not None:
            search.restore(dict(latest[0]))
        elif not resume and checkpoints.steps():
            raise ErasureInputError(
                f"{checkpoints.folder} holds a checkpoint of an earlier search. Go on from it with `resume=True` (`--resume`), name another "
                "folder, or delete it."
            )
    _run(search, checkpoints, random, progress)
    return _told(search, reader, distance, target, settings, float((first - wanted).square().sum()))


def _run(search: Search, checkpoints: Checkpoints | None, random: bool, progress: bool) -> None:
    """All generations that are left."""
    total = search.settings.generations
    bar = tqdm(total=total, initial=search.generation, desc="prompts", disable=not progress, dynamic_ncols=True)
    with noted() as interrupt:
        while search.generation < total:
            (search.draw if random else search.step)()
            bar.update()
            bar.set_postfix(distance=f"{search.curve[-1]:.5g}", refresh=False)
            asked = interrupt.signal is not None
            if checkpoints is not None and (asked or search.generation % SAVE_EVERY == 0):
                checkpoints.save(search.generation, search.saved(), {})
            if asked:
                interrupt.stop()
    bar.close()


def _told(search: Search, reader: Encoder, distance: Distance, target: str, settings: Settings, start: float) -> Found:
    """The best of the last generation as text, by its distance when it is read again."""
    best = search.population[search.scores.argsort(stable=True)][: max(8, settings.population // 10)]
    texts = list(dict.fromkeys(reader.text(free) for free in best))
    # Pieces may have joined to the word.
    texts = [text for text in texts if settings.allow_target or not names_any(text, [target])]
    if not texts:
        raise ErasureInputError(
            "All prompts of the last generation name the target when they are written down; raise `population`."
        )
    distances = distance(reader.of_texts(texts))
    place = int(distances.argmin())
    encoded = settings.population * search.generation
    return Found(texts[place], float(distances[place]), start, tuple(search.curve), encoded)
