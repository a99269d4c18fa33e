"""The Python on *Get started*, as a reader meets it who chooses one library's tabs."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).with_name("get_started.md")
LIBRARIES = ("Optax", "Flax NNX", "Flax Linen", "Equinox")
BLOCK = re.compile(
    r'^=== "(?P<tab>[^"]+)"$|^(?P<indent> *)```python\n(?P<code>.*?)\n *```$', re.M | re.S
)


def blocks(library: str) -> Iterator[str]:
    """What the page has for every library, and in this library's tabs, in order."""
    tab = None
    for match in BLOCK.finditer(PAGE.read_text()):
        tab = match["tab"] or tab
        if match["code"] is not None and (not match["indent"] or tab == library):
            yield textwrap.dedent(match["code"])
