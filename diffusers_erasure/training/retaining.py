"""Which retained prompts are trained on, and in what words."""

from collections.abc import Sequence
from typing import Any

from ..denoising.prompts import nearest
from ..denoising.sampler import SAMPLE
from ..encoding import short_enough
from ..errors import ErasureInputError
from .config import TrainSettings
from .objective import RETAIN
from .pool import MOST_RETAINED, Example


HELD_NEAREST, MOST_HELD = 16, 64  # entries of default lists that are trained on: for each target, and for all
NEAR_TEMPLATES = 2  # further templates for the retained prompts that are nearest to a target


def kept_prompts(pipe: Any, config: TrainSettings, targets: Sequence[str]) -> list[str]:
    """What is retained, and of the default lists the entries nearest to the targets: all would take long to denoise."""
    if not config.retain_weight and not config.null_space and not config.whiten:
        return []
    templates = config.template_list
    held = [
        word
        for word in config.retain.held
        if len(short_enough(pipe, texts := [t.format(word) for t in templates], config.max_sequence_length))
        == len(texts)
    ]
    return [*config.retain.prompts, *nearest(pipe, held, targets, HELD_NEAREST)[:MOST_HELD]]


def retained_examples(prompts: Sequence[str], near: Sequence[str], templates: Sequence[str]) -> list[Example]:
    """Each retained prompt in one template, in turn, those near a target first; these then in further ones."""
    ordered = list(dict.fromkeys((*near, *prompts)))
    wanted = [(prompt, i) for i, prompt in enumerate(ordered)]
    wanted += [(prompt, i + j) for j in range(1, NEAR_TEMPLATES + 1) for i, prompt in enumerate(near)]
    filled = [templates[i % len(templates)].format(prompt) for prompt, i in wanted]
    texts = list(dict.fromkeys(filled))[:MOST_RETAINED]
    return [Example(dict.fromkeys((SAMPLE, RETAIN), text)) for text in texts]


def with_pools(
    retained: Sequence[Example], pools: Sequence[Sequence[str]], templates: Sequence[str]
) -> tuple[list[Example], list[list[str]]]:
    """The retained examples with those of an adversary's pools before them, each prompt in one template, in turn; and the pools' texts.

    Raises:
        ErasureInputError: the pools hold more than can be trained on.
    """
    prompts = list(dict.fromkeys(prompt for pool in pools for prompt in pool))
    if len(prompts) > MOST_RETAINED:
        raise ErasureInputError(
            f"The pools of {len(pools)} concepts hold {len(prompts)} prompts, but at most {MOST_RETAINED} can be trained on: "
            "lower `pool_size`."
        )
    filled = {prompt: templates[i % len(templates)].format(prompt) for i, prompt in enumerate(prompts)}
    own = [Example(dict.fromkeys((SAMPLE, RETAIN), text)) for text in dict.fromkeys(filled.values())]
    known = {example.prompts[RETAIN] for example in own}
    others = [example for example in retained if example.prompts[RETAIN] not in known]
    return [*own, *others][:MOST_RETAINED], [[filled[prompt] for prompt in pool] for pool in pools]
