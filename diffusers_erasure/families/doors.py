"""What is known of a family of base models: how text enters its denoiser, and what that predicts.

A *door* is where text enters. Most transformers have one Linear that every text row passes first; a UNet has none, there each
cross-attention's keys and values read the rows. What a door reads can be mapped, which is the same as another weight of the
door: W (T x) = (W T) x, with the bias left alone. Where a norm stands before the door, the map belongs behind it, as a norm is
not linear.
"""

from dataclasses import dataclass
from typing import Literal


ROWS = "encoder_hidden_states"  # text rows as the denoiser is given them
DOOR_INPUT = "door_input"  # text rows behind the norm, as the door reads them


@dataclass(frozen=True)
class Pooled:
    """The door of the pooled text vector.

    Attributes:
        input: by which name a map acts on it; the argument of the denoiser's `forward`, or a key of `added_cond_kwargs`.
        reader: the Linear that reads it.
        encoders: the components whose projections make it, side by side.
    """

    input: str
    reader: str
    encoders: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A family of base models.

    Attributes:
        name: as it stands in an erasure's config.
        title: as people call it.
        classes: its denoisers' classes.
        text_encoders: the pipeline's attributes that hold text encoders.
        tokenizers: those that hold their tokenizers.
        denoiser: the attribute that holds the UNet or transformer; it is the LoRA prefix of stock diffusers too.
        rows: which encoders make the text rows: blocks one after another, in each the encoders whose rows stand side by side.
        causal: encoders whose rows depend on what stands before them alone. In the others a word is in every row.
        argument: the argument of the denoiser's `forward` that holds the rows.
        door: the Linear that all rows pass first; `None` where the cross-attentions' keys and values are the first.
        norm: what stands before the door and is not linear; `None` where the door reads the rows as they are given.
        pooled: the door of the pooled vector, where there is one.
        text_sites: endings of the names of the Linears that make keys and values of text; such modules see text alone.
        prediction: what the denoiser predicts: `"scheduler"`, as the scheduler's configuration says (ε or v), or `"flow"`.
        timestep: the argument of `forward` that holds the timestep.
        clock: factor and offset from it to the timestep of the schedulers, of which 0 is the image and 1,000 the noise.
        packing: sides of the squares of latents that are packed into one token before the denoiser; 1 where it does so itself.
        even_sigmas: whether the pipeline gives its scheduler N sigmas evenly spaced from 1 to 1 / N, before these are shifted;
            if not, they are the scheduler's own.
        guided: whether the pipeline guides without a classifier by default; FLUX has its guidance, if any, in the weights.
        judged: whether erasures of this family are judged on trained models here; the others' algebra alone is tested.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    text_encoders: tuple[str, ...] = ("text_encoder",)
    tokenizers: tuple[str, ...] = ("tokenizer",)
    denoiser: str = "transformer"
    rows: tuple[tuple[str, ...], ...] = (("text_encoder",),)
    causal: tuple[str, ...] = ()
    argument: str = ROWS
    door: str | None = None
    norm: str | None = None
    pooled: Pooled | None = None
    text_sites: tuple[str, ...] = ()
    prediction: Literal["scheduler", "flow"] = "flow"
    timestep: str = "timestep"
    clock: tuple[float, float] = (1.0, 0.0)
    packing: int = 1
    even_sigmas: bool = False
    guided: bool = True
    judged: bool = False

    @property
    def input(self) -> str:
        """By which name a map acts on the text rows."""
        return ROWS if self.norm is None else DOOR_INPUT
