"""The documentation's Python examples run as tests."""

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    # Its tabs are programs of their own: tests/test_get_started.py runs them one by one.
    excludes=["docs/get_started.md"],
).pytest()
