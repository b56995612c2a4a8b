"""The options of reading, saving and pushing: each stands here once, for signatures, docstrings and `help()`."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ForwardRef, Literal, TypedDict, TypeVar, cast


if TYPE_CHECKING:
    import torch
    from PIL import Image

Side = Literal["local", "hub"]
F = TypeVar("F", bound=Callable[..., Any])


class ReadOptions(TypedDict, total=False):
    """Where an erasure is read from.

    Args:
        subfolder (`str`, *optional*): a folder within the folder or repository.
        revision (`str`, *optional*): branch, tag or commit. It is resolved once, and all files come from there.
        token (`str` or `bool`, *optional*): token for private and gated repositories; the stored one by default.
        cache_dir (`str` or `os.PathLike`, *optional*): cache folder, the Hub's default otherwise.
        force_download (`bool`, *optional*, defaults to `False`): download again what is cached.
        local_files_only (`bool`, *optional*, defaults to `False`): use the cache alone.
    """

    subfolder: str | None
    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    force_download: bool
    local_files_only: bool


class SaveOptions(TypedDict, total=False):
    """In which form an erasure is saved or pushed.

    Args:
        dtype (`torch.dtype` or `str`, *optional*): dtype of the tensors; as they are by default (float32).
        redact_concepts (`bool`, *optional*, defaults to `False`): leave out the concepts' names, and with them what was
            written into the card by hand, and its pictures.
        card (`"local"` or `"hub"`, *optional*): which card holds where the folder's and that of the Hub, or of the place
            that this erasure was read from, were edited differently.
    """

    dtype: "torch.dtype | str | None"
    redact_concepts: bool
    card: Side | None


class CommitOptions(TypedDict, total=False):
    """How something is pushed to the Hub.

    Args:
        private (`bool`, *optional*): whether a repository that is created is private; the account's default otherwise.
            `True` with a repository that exists and is public is refused.
        token (`str` or `bool`, *optional*): the token; the stored one by default.
        create_pr (`bool`, *optional*, defaults to `False`): propose the commit as a pull request.
        commit_message (`str`, *optional*): the commit's message.
    """

    private: bool | None
    token: str | bool | None
    create_pr: bool
    commit_message: str | None


class PushOptions(CommitOptions, SaveOptions, total=False):
    """How an erasure is pushed to the Hub: the options of a commit, those of its form, and these.

    Args:
        revision (`str`, *optional*): the branch, created from the main one where it does not exist; main by default.
        grid (`PIL.Image.Image`, *optional*): a picture for the card, of images before and after.
        license (`str`, *optional*): identifier of the licence, for the card's metadata.
        base_model (`str`, *optional*): the base model's repository; see [`Erasure.with_base_model`].
    """

    revision: str | None
    grid: "Image.Image | None"
    license: str | None
    base_model: str | None


def takes(*kinds: Any) -> Callable[[F], F]:
    """Name the options of a function, which takes them as `**options`, in its signature and its docstring.

    What is left out is `None` or `False`. A name that is none of them is a `TypeError`, as with any function.

    Args:
        kinds: the `TypedDict`s. A line `options: …` of the docstring is replaced by what they say of each option.
    """

    def mark(function: F) -> F:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        hints = {name: hint for kind in kinds for name, hint in kind.__annotations__.items()}
        named = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_left_out(hint), annotation=_shown(hint))
            for name, hint in hints.items()
        ]
        signature = signature.replace(parameters=[*own, *named])

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            signature.bind(*args, **kwargs)
            return function(*args, **kwargs)

        # functions take attributes, whatever their type says
        checked.__signature__ = signature  # type: ignore[attr-defined]
        checked.__doc__ = _told(function.__doc__ or "", kinds)
        return cast(F, checked)

    return mark


def _left_out(hint: Any) -> bool | None:
    return False if hint is bool else None


def _shown(hint: Any) -> Any:
    return hint.__forward_arg__ if isinstance(hint, ForwardRef) else hint


def _told(doc: str, kinds: tuple[Any, ...]) -> str:
    lines = []
    for line in doc.splitlines():
        text = line.lstrip()
        if text.startswith("options: "):
            indent = line[: len(line) - len(text)]
            said = [inspect.cleandoc(kind.__doc__).partition("Args:\n")[2].splitlines() for kind in kinds]
            lines += [indent + each.removeprefix("    ") for option in said for each in option]
        else:
            lines.append(line)
    return "\n".join(lines)
