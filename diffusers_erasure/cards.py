"""Model cards, rendered from the templates in `hub_cards/`."""

import json
import re
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from .schema import ErasureConfig


if TYPE_CHECKING:
    import jinja2


MAX_NAMED = 5


def escape_markdown(text: Any) -> str:
    """Return text that Markdown shows as it is: on one line, with its marks and HTML escaped."""
    line = re.sub(r"\s+", " ", str(text)).strip()
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:@-])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))


def escape_yaml(text: Any) -> str:
    """Return text as a double-quoted YAML scalar (JSON strings are valid YAML)."""
    return json.dumps(str(text), ensure_ascii=True)


@cache
def _environment() -> "jinja2.Environment":
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters.update(md=escape_markdown, yaml=escape_yaml)
    return environment


def render_card(config: ErasureConfig) -> str:
    """Render an erasure's `README.md`.

    Args:
        config ([`ErasureConfig`]): the erasure's configuration.

    Returns:
        `str`: front matter for the Hub, and text for people. Concept strings are escaped for YAML and Markdown.
    """
    source = resources.files("diffusers_erasure.hub_cards").joinpath("erasure.md.j2").read_text(encoding="utf-8")
    named = [escape_markdown(concept.target) for concept in config.concepts[:MAX_NAMED]]
    if len(config.concepts) > MAX_NAMED:
        named.append(f"and {len(config.concepts) - MAX_NAMED} more")
    return _environment().from_string(source).render(config=config, named=named)
