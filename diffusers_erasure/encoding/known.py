"""By what text encoders are recognised again, so that what they made of a list need not be computed twice."""

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from .. import compat
from ..base_model import component, family_of
from ..fingerprints import checksum, describe_model, describe_tokenizer, inner_tokenizer, named_weights


# What a text encoder's configuration says of its rows beside the shapes of its weights.
BEHAVIOUR = ("hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id", "use_attention_mask")
T5_BEHAVIOUR = (
    *("feed_forward_proj", "num_heads", "layer_norm_epsilon"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
)

Made = TypeVar("Made")
_known: ContextVar[dict[Hashable, Any] | None] = ContextVar("known in one fit", default=None)


@contextmanager
def one_fit() -> Iterator[None]:
    """While one erasure is made, recognise its pipeline's text encoders once: nobody changes them meanwhile."""
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def once(key: Hashable, make: Callable[[], Made]) -> Made:
    """`make()`, once for a key while one erasure is made."""
    known = _known.get()
    if known is None:
        return make()
    if key not in known:
        known[key] = make()
    found: Made = known[key]
    return found


def fingerprint(pipe: Any) -> str | None:
    """Identify the text encoders and tokenizers by all of their weights; `None` where these cannot be read."""
    return once(("fingerprint", id(pipe)), lambda: _fingerprint(pipe))


def _fingerprint(pipe: Any) -> str | None:
    parts: list[str] = []
    family = family_of(pipe)
    for name, tokenizer_name in zip(family.text_encoders, family.tokenizers, strict=True):
        encoder = component(pipe, name)
        if encoder is None:
            continue
        bits = checksum(named_weights(encoder))
        if bits is None:
            return None
        parts += _of_encoder(encoder, bits) + _of_tokenizer(component(pipe, tokenizer_name))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _of_encoder(encoder: Any, bits: str) -> list[str]:
    model = describe_model(encoder)
    device = compat.execution_device(encoder).type
    config = encoder.config
    names = BEHAVIOUR if hasattr(config, "hidden_act") else T5_BEHAVIOUR
    if not all(hasattr(config, name) for name in names[:1]):
        return [model.architecture, str(model.values), bits, device, config.to_json_string()]
    behaviour = str([getattr(config, name, None) for name in names])
    return [model.architecture, str(model.values), bits, device, behaviour]


def _of_tokenizer(tokenizer: Any) -> list[str]:
    tokenizer = inner_tokenizer(tokenizer)
    vocabulary = [describe_tokenizer(tokenizer).architecture, repr(sorted(tokenizer.get_added_vocab().items()))]
    return [*vocabulary, str(tokenizer.pad_token_id), str(tokenizer.model_max_length)]


def listing(key: Sequence[str], prompts: Sequence[str], pipe: Any) -> Callable[[], list[str | None]]:
    """The key of what was made of some prompts."""
    return lambda: [fingerprint(pipe), *key, *prompts]
