"""The site's search: what newcomers ask by name is found within two tries."""

import shutil
from pathlib import Path

import pytest

from docs import find
from tests.test_documentation import PAGES

markdown = pytest.importorskip("markdown", reason="the extra docs is not installed")
plugin = pytest.importorskip(
    "material.plugins.search.plugin", reason="the extra docs is not installed"
)
if shutil.which("node") is None:
    pytest.skip("Node.js is not installed", allow_module_level=True)

THEME = Path(plugin.__file__).parents[2] / "templates"
(WORKER,) = THEME.glob(find.WORKER)
CONFIG = {
    "lang": ["en"],
    "separator": r"[\s\-]+",
    "pipeline": ["stopWordFilter"],
    "fields": {"title": {"boost": 1e3}, "text": {"boost": 1}, "tags": {"boost": 1e6}},
}
"""What the theme chooses for a site in English."""


@pytest.fixture(scope="module")
def ranks():
    """Of each answer, among all pages as the search's own parser divides them."""
    sections = []
    for page in PAGES:
        parser = plugin.Parser()
        extensions = ["toc", "tables", "attr_list", "pymdownx.superfences"]
        parser.feed(markdown.markdown(page.read_text(), extensions=extensions))
        parser.close()
        for section in parser.data:
            anchor = f"#{section.id}" if section.id else ""
            title, text = ("".join(part or ()).strip() for part in (section.title, section.text))
            location = f"{page.stem.lower()}/{anchor}"
            sections.append({"location": location, "title": title, "text": text})
    return find.ranks({"config": CONFIG, "docs": sections}, WORKER)


@pytest.mark.parametrize("anchor", find.QUESTIONS)
def test_each_question_is_found_within_two_tries(ranks, anchor):
    assert find.is_found(ranks[anchor]), ranks[anchor]


@pytest.mark.parametrize(
    ("ranks", "expected"), [([1, None], True), ([3, 2], True), ([None, 3], False), ([], False)]
)
def test_an_answer_is_found_if_a_try_shows_it_first_or_second(ranks, expected):
    assert find.is_found(ranks) is expected


def test_of_each_page_the_best_section_is_shown():
    sections = [
        {"location": "a/", "title": "Losses", "text": "a zebra"},
        {"location": "b/", "title": "Animals", "text": "losses"},
        {"location": "b/#z", "title": "Zebras, many", "text": "losses losses"},
        {"location": "b/#n", "title": "Nothing", "text": "a zebra"},
        {"location": "c/", "title": "Nothing", "text": "of it"},
    ]
    found = find.search({"config": CONFIG, "docs": sections}, ["losses zebra", "okapi"], WORKER)
    assert found == [["b/#z", "a/"], []]
