"""Model cards, rendered from the templates in `hub_cards/`."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from .demo import is_embedded
from .errors import ErasureInputError
from .registry import find
from .schema import GRID_FILE, LORA_FILE, ErasureConfig
from .showing import Gates


if TYPE_CHECKING:
    import jinja2


MAX_NAMED = 5
MAX_ROWS = 50
MAX_TEXT = 300

# Tags by which the Hub's users look for adapters of a family, as diffusers' own training scripts write them.
_FAMILY_TAGS = {
    "stable-diffusion": ("stable-diffusion", "stable-diffusion-diffusers"),
    "stable-diffusion-xl": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    "stable-diffusion-3": ("sd3", "sd3-diffusers"),
    "flux": ("flux", "flux-diffusers"),
}
_NAMES = {
    "retain_default": "retained by default",
    "anchors_picked": "anchors, picked automatically",
}  # settings that are told in other words
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# Control characters, marks that turn the direction of text, and halves of surrogate pairs.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_PROMPT = re.compile(r"\w[\w ,.'-]{0,99}")  # what stands between quotes in code as it is
_LICENCE = re.compile(r"[A-Za-z0-9.+-]{1,64}", re.ASCII)
_SEAL = re.compile(r"\n*<!-- diffusers-erasure: sha256 of the text above: ([0-9a-f]{64}) -->\s*\Z")


def escape_markdown(text: Any) -> str:
    """Return text that Markdown shows as it is: on one line of limited length, with its marks and HTML escaped."""
    line = re.sub(r"\s+", " ", _UNSEEN.sub(" ", str(text))).strip()
    line = line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 1] + "…"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]()#+!|~$:@=-])", r"\\\1", line)
    return re.sub(r"(?i)\bwww\.", lambda found: found[0][:3] + "\\.", line)  # no link by itself


def escape_yaml(text: Any) -> str:
    """Return text as a double-quoted YAML scalar in ASCII."""
    quoted = json.dumps(_UNSEEN.sub(" ", str(text)), ensure_ascii=False)
    return re.sub(r"[^\x20-\x7e]", lambda found: f"\\U{ord(found[0]):08x}", quoted)


@cache
def card_environment() -> "jinja2.Environment":
    """The templates' environment, with the filters `md` and `yaml`."""
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters.update(md=escape_markdown, yaml=escape_yaml)
    return environment


def flattened(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries and lists as `(path, value)`, for a table."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from flattened(value, f"{path}, {key}" if path else str(key))
    elif isinstance(values, list | tuple) and any(isinstance(value, dict | list | tuple) for value in values):
        for index, value in enumerate(values):
            yield from flattened(value, f"{path}, {index}" if path else str(index))
    else:
        if isinstance(values, float):
            values = f"{values:.4g}"
        elif isinstance(values, list | tuple):
            values = ", ".join(str(value) for value in values) or "none"
        yield path, "not set" if values is None else values


def _rows(values: Any) -> list[tuple[str, Any]]:
    rows = list(flattened(values)) if values else []
    left = len(rows) - MAX_ROWS
    return rows if left <= 0 else [*rows[:MAX_ROWS], ("…", f"{left} more in erasure_config.json")]


def check_repo_id(repo_id: str) -> None:
    """Check the form of a base model's id.

    Raises:
        ErasureInputError: it is not "user/model".
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        valid = bool(_REPO.fullmatch(repo_id))
    except HFValidationError:
        valid = False
    if not valid:
        raise ErasureInputError(
            f'A base model is named by the id of its repository on the Hub, "user/model", not {repo_id!r}.'
        )


def check_licence(license: str | None) -> None:
    """Raise `ErasureInputError` for what is no identifier of a licence."""
    if license is not None and not _LICENCE.fullmatch(license):
        raise ErasureInputError(f"`license` must be an identifier such as 'apache-2.0', not {license!r}.")


def base_repo(config: ErasureConfig) -> str | None:
    """The id of the base model's repository on the Hub, where one is recorded."""
    repo = config.base_model.repo
    return repo if repo and _REPO.fullmatch(repo) else None


def render_card(
    config: ErasureConfig, repo_id: str | None = None, *, grid: bool = False, license: str | None = None
) -> str:
    """Render an erasure's `README.md`.

    Args:
        config ([`ErasureConfig`]): the erasure's configuration.
        repo_id (`str`, *optional*): the repository that it will lie in, for the examples of use.
        grid (`bool`, *optional*, defaults to `False`): show the picture `before_after.png` that lies beside the card.
        license (`str`, *optional*): identifier of the licence, as the Hub lists them.

    Raises:
        ErasureInputError: `license` is no identifier.

    Returns:
        `str`: front matter for the Hub, and text for people. Concept strings are escaped for YAML and Markdown.
    """

    check_licence(license)
    source = resources.files("diffusers_erasure.hub_cards").joinpath("erasure.md.j2").read_text(encoding="utf-8")
    named = [escape_markdown(concept.target) for concept in config.concepts[:MAX_NAMED]]
    if len(config.concepts) > MAX_NAMED:
        named.append(f"and {len(config.concepts) - MAX_NAMED} more")
    target = config.concepts[0].target if config.concepts and not config.redacted else None
    plain = config.method.name == "lora" and not config.concepts
    method = find(config.method.name)
    text = (
        card_environment()
        .from_string(source)
        .render(
            config=config,
            named=named,
            concepts=config.concepts[:MAX_ROWS],
            base_repo=base_repo(config),
            embedded=is_embedded(config.base_model),
            prompt=target if target and _PROMPT.fullmatch(target) else None,
            plain=plain,
            lora_file=LORA_FILE if plain or config.stock else None,
            family_tags=_FAMILY_TAGS.get(config.base_model.family, ()),
            place=repo_id if repo_id and _REPO.fullmatch(repo_id) else "PATH_OR_REPO",
            settings=_rows({_NAMES.get(key, key): value for key, value in config.method.settings.items()}),
            diagnostics=_rows(config.diagnostics),
            results=_rows(config.results),
            stock_results=_rows(config.stock.results) if config.stock else [],
            gates=Gates.of(config),
            in_two_forms=any(layer.file != LORA_FILE for layer in config.layers),
            summary=method.summary if method else None,
            citation=method.citation if method else None,
            grid=GRID_FILE if grid else None,
            license=license,
        )
    )
    return sealed(text)


def _body(text: str) -> str:
    """A card's text without its front matter, as the Hub separates them."""
    found = re.match(r"\s*---[ \t]*\r?\n[\s\S]*?\r?\n---[ \t]*(\r?\n|\Z)", text)
    return text[found.end() :] if found else text


def _digest(body: str) -> str:
    return hashlib.sha256("\n".join(body.split("\r\n")).strip().encode("utf-8", "replace")).hexdigest()


def sealed(text: str) -> str:
    """Add a comment by which a later push sees whether the text was edited meanwhile."""
    return f"{text.rstrip()}\n\n<!-- diffusers-erasure: sha256 of the text above: {_digest(_body(text))} -->\n"


def is_edited(card: str) -> bool:
    """Whether a card's text was written or edited by hand (its metadata does not count)."""
    return _written(card) is not None


def _written(card: str) -> str | None:
    """The text that was written or edited by hand, without the seal; `None` where it is as it was rendered."""
    body = _body(card)
    seal = _SEAL.search(body)
    if not body.strip() or (seal is not None and _digest(body[: seal.start()]) == seal[1]):
        return None
    return "\n".join((body if seal is None else body[: seal.start()]).split("\r\n")).strip()


@dataclass(frozen=True)
class ParsedCard:
    """A card taken apart.

    Attributes:
        card: all of it.
        data: its metadata.
        text: its text.
        written: its text where that was written or edited by hand, without the seal, else `None`.
    """

    card: str
    data: dict[str, Any]
    text: str
    written: str | None

    @property
    def keys(self) -> list[str]:
        """The metadata's keys in their order."""
        return re.findall(r"(?m)^([\w-]+):", self.card[: len(self.card) - len(self.text)])

    def foreign(self, fresh: "ParsedCard") -> dict[str, Any]:
        """The metadata that this library did not write, without the tags."""
        ours = self.data.get("library_name") == fresh.data["library_name"]
        stale = ("base_model", "base_model_relation") if ours else ()
        return {key: value for key, value in self.data.items() if key not in {*fresh.data, *stale, "tags"}}

    @property
    def foreign_tags(self) -> list[Any]:
        """The tags without those that say how an erasure can be loaded and was made."""
        tags = self.data.get("tags") or []
        tags = [tags] if isinstance(tags, str) else tags
        return [tag for tag in tags if tag != "lora" and not str(tag).startswith("erasure-method:")]


def parse_card(card: str) -> ParsedCard:
    """Take a card apart.

    Raises:
        ValueError: its metadata cannot be read.
    """
    from huggingface_hub import ModelCard

    try:
        parsed = ModelCard(card)
        return ParsedCard(card, parsed.data.to_dict(), parsed.text, _written(card))
    except Exception as error:  # the YAML parser's, and whatever metadata of odd types leads to
        raise ValueError(f"its metadata cannot be read: {error}") from error


def check_card(card: str) -> None:
    """Raise `ValueError` where a card's metadata cannot be read or written again."""
    parsed = parse_card(card)
    compose([], parsed.data, parsed.text)


def licence_of(card: str) -> str | None:
    """The identifier of the licence that a card states."""
    licence = parse_card(card).data.get("license")
    return licence if isinstance(licence, str) and _LICENCE.fullmatch(licence) else None


def compose(sides: Sequence[ParsedCard], data: Mapping[str, Any], text: str) -> str:
    """Put a card together; one of `sides` that has the same content is returned without a byte changed.

    Args:
        sides (sequence of [`ParsedCard`]): the cards whose content it has, for the order of the metadata's keys.
        data (mapping): the metadata.
        text (`str`): the text.

    Raises:
        ValueError: the metadata cannot be written.
    """
    from huggingface_hub import ModelCardData

    for side in sides:
        if side.data == data and side.text == text:
            return side.card
    order = dict.fromkeys([*(key for side in sides for key in side.keys), *data])
    try:
        return f"---\n{ModelCardData(**data).to_yaml(original_order=list(order))}\n---\n{text}"
    except Exception as error:  # the YAML writer's, for values of odd types
        raise ValueError(f"its metadata cannot be written: {error}") from error


def merge_card(old: str, new: str) -> tuple[str, bool]:
    """Bring a card that is there up to date.

    What this library writes into the metadata is updated, everything else in it is kept. The text is kept where it was
    edited by hand, else replaced.

    Args:
        old (`str`): the card that is there.
        new (`str`): the card of the erasure.

    Returns:
        `tuple`: the card, and whether the old text was kept.

    Raises:
        ValueError: the old card's metadata cannot be read.
    """
    there, fresh = parse_card(old), parse_card(new)
    by_hand = there.written is not None
    data = {**there.foreign(fresh), **fresh.data, "tags": joined_tags(fresh, there.foreign_tags)}
    return compose([there, fresh], data, there.text if by_hand else fresh.text), by_hand


def joined_tags(fresh: ParsedCard, others: Iterable[Any]) -> list[Any]:
    """The tags of a fresh card, and others behind them."""
    return list(dict.fromkeys([*fresh.data["tags"], *others]))
