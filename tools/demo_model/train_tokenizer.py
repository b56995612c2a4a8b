"""Trains the tokenizer: byte-pair encoding in the form of CLIP's."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tokenizers import trainers
from transformers import CLIPTokenizer

from .captions import Captions


# Every letter is a piece of its own too, within and at the end of a word, so that any English word can be written.
ALPHABET = "!',-.0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class TokenizerSettings:
    """
    The size of the tokenizer.

    Args:
        vocabulary (`int`): The largest number of pieces.
        positions (`int`): The length of a padded prompt.
    """

    vocabulary: int = 531
    positions: int = 24


def train_tokenizer(captions: Captions, settings: TokenizerSettings) -> CLIPTokenizer:
    """
    Train a tokenizer on all captions. There is no chance in it.

    Args:
        captions ([`~tools.demo_model.captions.Captions`]): The captions of the pictures.
        settings ([`TokenizerSettings`]): Sizes.

    Returns:
        [`~transformers.CLIPTokenizer`]: BOS is 0, EOS and padding are 1.
    """
    blank = CLIPTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[blank.bos_token, blank.eos_token],
        initial_alphabet=list(ALPHABET),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend = blank.backend_tokenizer
    backend.train_from_iterator([*captions.corpus(), *ALPHABET], trainer=trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=settings.positions)
