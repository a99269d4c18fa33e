"""Formulas become MathML when the site is built: browsers draw it without scripts or fonts.

A hook of MkDocs, named in `mkdocs.yml`.
"""

import html
import logging
import re
from typing import Any

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
UNKNOWN = re.compile(r">(\\[A-Za-z]+)<")

log = logging.getLogger("mkdocs.hooks.mathematics")


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Converts what `pymdownx.arithmatex` has found, in pages and docstrings."""
    # Here, so that tests, which import every module, do not need it.
    from latex2mathml.converter import convert

    def replace(match: re.Match[str]) -> str:
        display = "block" if match["tag"] == "div" else "inline"
        formula = convert(html.unescape(match["latex"]), display=display)
        if unknown := UNKNOWN.findall(formula):
            log.warning("%s: %s is not known in %s", page.file.src_uri, unknown, match["latex"])
        # In a paragraph of its own, which scrolls where a screen is narrower than a formula.
        return f'<div class="formula">{formula}</div>' if display == "block" else formula

    return FORMULA.sub(replace, content)
