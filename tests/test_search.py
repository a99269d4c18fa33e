"""The site's search: what newcomers ask by name is found within two tries."""

import re

import pytest

from docs import find
from tests.test_documentation import PAGES

markdown = pytest.importorskip("markdown", reason="the extra docs is not installed")
plugin = pytest.importorskip(
    "material.plugins.search.plugin", reason="the extra docs is not installed"
)


@pytest.fixture(scope="module")
def sections():
    """Of all pages, as the search's own parser divides them."""
    found = []
    for page in PAGES:
        parser = plugin.Parser()
        extensions = ["toc", "tables", "attr_list", "pymdownx.superfences"]
        parser.feed(markdown.markdown(page.read_text(), extensions=extensions))
        parser.close()
        for section in parser.data:
            title, text = (
                re.sub("<[^>]+>", " ", "".join(x or ())) for x in (section.title, section.text)
            )
            found.append({"location": f"{page.stem}/#{section.id}", "title": title, "text": text})
    return found


@pytest.mark.parametrize("anchor", find.QUESTIONS)
def test_each_question_is_found_within_two_tries(sections, anchor):
    ranks = [find.rank(sections, query, anchor) for query in find.QUESTIONS[anchor]]
    assert min(rank or 100 for rank in ranks) <= 3, ranks


def test_a_word_in_a_title_counts_more_and_a_rare_one_most():
    sections = [
        {"location": "#a", "title": "Losses", "text": "a zebra"},
        {"location": "#b", "title": "Zebras", "text": "losses losses"},
        {"location": "#c", "title": "Losses again", "text": ""},
        {"location": "#d", "title": "Nothing", "text": "of it"},
    ]
    assert find.ranked(sections, "losses zebra") == ["#b", "#a", "#c"]
    assert find.rank(sections, "zebra", "a") == 2
    assert find.rank(sections, "zebra", "d") is None
