"""What a method says about itself: data, read without importing the method's code."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..base_model import FAMILIES
from ..errors import ErasureInputError


Needs = Literal["base weights", "text encoders"]


@dataclass(frozen=True, kw_only=True)
class Citation:
    """A method's paper.

    Args:
        title (`str`): its title.
        year (`int`): when it appeared.
        url (`str`): where it is read.
        bibtex (`str`): its entry, as authors would paste it.
    """

    title: str
    year: int
    url: str
    bibtex: str


@dataclass(frozen=True, kw_only=True)
class MethodDeclaration:
    """What a method says about itself.

    Args:
        name (`str`): what `erase(method=...)` takes.
        module (`str`): name of the module that makes its erasures, imported when it is used. It has `Config`, a dataclass of
            settings, and `fit(pipe, concepts, config)`, with a further `run` where the method is resumable; and
            `refit(pipe, concepts, config, rows)` where its erasures can be solved again by [`combine`]; then `Config` is a
            [`TextConfig`] and `Settings` a `TextSettings`.
        summary (`str`): one line for people.
        families (tuple of `str`): the families of base models that it works on: `"stable-diffusion"` (1.x and 2.x),
            `"stable-diffusion-xl"`, `"stable-diffusion-3"`, `"flux"`.
        needs (`"base weights"` or `"text encoders"`): what it reads of a base model: all of it, or its text encoders alone.
        makes (tuple of `str`): the kinds of layers that its erasures may have.
        trains (`bool`, *optional*, defaults to `False`): whether weights are trained by gradients.
        resumable (`bool`, *optional*, defaults to `False`): whether `fit` takes a [`TrainingRun`]: checkpoints, resuming,
            progress.
        instead_of_retain (`str`, *optional*): where it takes no retained prompts: what it has instead, in a sentence.
        citation ([`Citation`], *optional*): its paper.

    Raises:
        ErasureInputError: the name is none, or there is no such family.
    """

    name: str
    module: str
    summary: str
    families: tuple[str, ...]
    needs: Needs
    makes: tuple[str, ...]
    trains: bool = False
    resumable: bool = False
    instead_of_retain: str = ""
    citation: Citation | None = None

    def __post_init__(self) -> None:
        if not self.name.replace("-", "_").isidentifier():
            raise ErasureInputError(
                f"A method's name is made of letters, digits, `_` and `-`, and begins with a letter; {self.name!r} is not."
            )
        unknown = sorted(set(self.families) - set(FAMILIES))
        if unknown or not self.families:
            what = f"the families {unknown}, which are unknown" if unknown else "no families"
            raise ErasureInputError(f"The method {self.name!r} declares {what}; expected some of {sorted(FAMILIES)}.")
        if self.needs not in get_args(Needs):
            raise ErasureInputError(
                f"The method {self.name!r} declares that it needs {self.needs!r}; expected one of {list(get_args(Needs))}."
            )

    @property
    def retains(self) -> bool:
        """Whether it takes prompts that must not change."""
        return not self.instead_of_retain
