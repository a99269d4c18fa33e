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
UNKNOWN = re.compile(r">(\\[A-Za-z]+|&)<")
"""What the converter leaves as it is: a command that it does not know, a stray `&`."""

log = logging.getLogger("mkdocs.hooks.mathematics")


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Converts what `pymdownx.arithmatex` has found, in pages and docstrings."""
    # Here, so that tests, which import every module, do not need it.
    from latex2mathml.converter import convert

    def replace(match: re.Match[str]) -> str:
        display = "block" if match["tag"] == "div" else "inline"
        # The same but for its name, which the converter does not know.
        latex = html.unescape(match["latex"]).replace("{aligned}", "{align*}")
        formula = convert(latex, display=display)
        if unknown := UNKNOWN.findall(formula):
            log.warning("%s: %s is not known in %s", page.file.src_uri, unknown, latex)
        # Names of functions and numbers are signs of operators, too.
        for name in re.findall(r"\\operatorname\{(\w+)\}", latex):
            formula = formula.replace(f"<mo>{name}</mo>", f"<mi>{name}</mi>")
        # Bars are signs of operators to a browser, with space around.
        formula = formula.replace(">&#x0007C;<", ' lspace="0" rspace="0">&#x0007C;<')
        # A block of its own scrolls where a screen is narrower than a formula.
        return f'<div class="formula">{formula}</div>' if display == "block" else formula

    return FORMULA.sub(replace, content)
