"""The documentation's Python examples run as tests."""

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    # These have blocks that go on from one another, which several workers would tear apart:
    # tests/test_get_started.py and tests/test_documentation.py run them.
    excludes=[
        f"docs/{name}.md" for name in ("get_started", "many_devices", "mixed_precision", "pytorch")
    ],
).pytest()
