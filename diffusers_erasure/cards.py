"""Model cards, rendered from the templates in `hub_cards/`."""

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from .errors import ErasureInputError
from .schema import GRID_FILE, ErasureConfig


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
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# Control characters, marks that turn the direction of text, and halves of surrogate pairs.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
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
def _environment() -> "jinja2.Environment":
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
    from .methods.citations import CITATIONS

    if license is not None and not re.fullmatch(r"[A-Za-z0-9.+-]{1,64}", license, re.ASCII):
        raise ErasureInputError(f"`license` must be an identifier such as 'apache-2.0', not {license!r}.")
    source = resources.files("diffusers_erasure.hub_cards").joinpath("erasure.md.j2").read_text(encoding="utf-8")
    named = [escape_markdown(concept.target) for concept in config.concepts[:MAX_NAMED]]
    if len(config.concepts) > MAX_NAMED:
        named.append(f"and {len(config.concepts) - MAX_NAMED} more")
    base = config.base_model.repo
    text = (
        _environment()
        .from_string(source)
        .render(
            config=config,
            named=named,
            concepts=config.concepts[:MAX_ROWS],
            base_repo=base if base and _REPO.fullmatch(base) else None,
            family_tags=_FAMILY_TAGS.get(config.base_model.family, ()),
            place=repo_id if repo_id and _REPO.fullmatch(repo_id) else "PATH_OR_REPO",
            settings=_rows(config.method.settings),
            diagnostics=_rows(config.diagnostics),
            results=_rows(config.results),
            citation=CITATIONS.get(config.method.name),
            grid=GRID_FILE if grid else None,
            license=license,
        )
    )
    return _sealed(text)


def _body(text: str) -> str:
    """A card's text without its front matter, as the Hub separates them."""
    found = re.match(r"\s*---[ \t]*\r?\n[\s\S]*?\r?\n---[ \t]*(\r?\n|\Z)", text)
    return text[found.end() :] if found else text


def _digest(body: str) -> str:
    return hashlib.sha256("\n".join(body.split("\r\n")).strip().encode("utf-8", "replace")).hexdigest()


def _sealed(text: str) -> str:
    """Add a comment by which a later push sees whether the text was edited meanwhile."""
    return f"{text.rstrip()}\n\n<!-- diffusers-erasure: sha256 of the text above: {_digest(_body(text))} -->\n"


def is_edited(card: str) -> bool:
    """Whether a card's text was written or edited by hand (its metadata does not count)."""
    body = _body(card)
    seal = _SEAL.search(body)
    return bool(body.strip()) and (seal is None or _digest(body[: seal.start()]) != seal[1])


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
    from huggingface_hub import ModelCard

    edited = is_edited(old)
    try:
        card, fresh = ModelCard(old), ModelCard(new)
    except Exception as error:  # the YAML parser's, and whatever metadata of odd types leads to
        raise ValueError(str(error)) from error
    before, now = card.data.to_dict(), fresh.data.to_dict()
    for key in ("base_model", "base_model_relation"):
        if key not in now and before.get("library_name") == now["library_name"]:
            before.pop(key, None)
    tags = before.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    foreign = [tag for tag in tags if tag != "lora" and not str(tag).startswith("erasure-method:")]
    now["tags"] = [*now["tags"], *(tag for tag in foreign if tag not in now["tags"])]
    merged = {**before, **now}
    text = card.text if edited else fresh.text
    if merged == card.data.to_dict() and text == card.text:
        return old, edited  # not a byte of it changes
    data = type(card.data)(**merged)
    there = re.findall(r"(?m)^([\w-]+):", old[: len(old) - len(card.text)])  # keys keep their order
    order = [*there, *re.findall(r"(?m)^([\w-]+):", new[: len(new) - len(fresh.text)]), *merged]
    return f"---\n{data.to_yaml(original_order=list(dict.fromkeys(order)))}\n---\n{text}", edited
