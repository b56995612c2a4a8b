"""The T5 tokenizer of the tiny models: whole words of the captions, and letters for the rest."""

from __future__ import annotations

import math
from collections import Counter

from transformers import T5Tokenizer

from tools.demo_model.captions import Captions
from tools.demo_model.train_tokenizer import ALPHABET


T5_POSITIONS = 32  # more than any caption needs

# Between letters and the rarest word, in nats: a word is never spelt that has a piece of its own.
_LETTERS_BELOW_WORDS = 6.0


def train_t5_tokenizer(captions: Captions) -> T5Tokenizer:
    """
    Make a unigram tokenizer of all captions. There is no chance in it.

    Args:
        captions ([`~tools.demo_model.captions.Captions`]): The captions of the pictures.

    Returns:
        [`~transformers.T5Tokenizer`]: Padding is 0, the end of the text is 1.
    """
    counts = Counter(word for text in captions.corpus() for word in text.replace(",", " ,").split())
    total = sum(counts.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(word, count) for word, count in counts.most_common() if len(word) > 1 or word == "a"]
    pieces += [(f"▁{word}", math.log(count / total)) for word, count in words]
    lowest = min(score for _, score in pieces) - _LETTERS_BELOW_WORDS
    pieces += [(letter, lowest) for letter in ("▁", *ALPHABET)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=T5_POSITIONS)
