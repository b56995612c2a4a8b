"""MkDocs hooks. Warnings logged here fail `mkdocs build --strict`."""

import logging
import re
from pathlib import Path
from typing import Any


log = logging.getLogger("mkdocs.hooks.diffusers_erasure")

# what tests/test_docs_snippets.py reads and a reader should not: `<!-- setup: ... -->` and its like
SNIPPET_COMMENT = re.compile(r"^[ \t]*<!--\s*(?:setup:.*?|no-run:.*?|run\s*)-->[ \t]*\n", re.DOTALL | re.MULTILINE)

# what a browser would load of its own accord from another host
REMOTE_ASSET = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*?\ssrc=[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preconnect|preload|icon))[^>]*?\shref=[\"']?((?:https?:)?//[^\"'\s>]+)"
)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    return SNIPPET_COMMENT.sub("", markdown)


def on_post_build(config: Any, **kwargs: Any) -> None:
    site = Path(config["site_dir"])
    for page in sorted(site.rglob("*.html")):
        for match in REMOTE_ASSET.finditer(page.read_text(encoding="utf-8")):
            log.warning("%s loads %s from another host", page.relative_to(site), match.group(1) or match.group(2))
