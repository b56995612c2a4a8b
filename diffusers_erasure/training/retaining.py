"""Which retained prompts are trained on, and in what words."""

from collections.abc import Sequence
from typing import Any

from ..denoising.prompts import nearest
from ..denoising.sampler import SAMPLE
from ..encoding import short_enough
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
