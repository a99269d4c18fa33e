"""The documentation's Python examples run as tests."""

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

WHOLE_PAGES = ("many_devices", "mixed_precision", "pytorch", "several_losses", "three_places")
"""Their blocks go on from one another, which several workers would tear apart:
tests/test_documentation.py runs each page in one go."""

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    # The tabs of *Get started* are programs of their own: tests/test_get_started.py runs them.
    excludes=["docs/get_started.md", *(f"docs/{name}.md" for name in WHOLE_PAGES)],
).pytest()
