"""Which sections the site's search finds first for the questions that newcomers ask.

    mkdocs build && python docs/find.py site/search/search_index.json

Prints the rank of the answer for each try. Sections are ranked as by the site's search: by the
share of the words in the title, a thousand times as important as in the text, rare words first.
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

QUESTIONS: dict[str, tuple[str, str]] = {
    "a-vae-a-beta-vae-a-diffusion-model-any-likelihood-and-prior": ("VAE", "likelihood prior"),
    "ppo-and-a2c-actor-and-critic": ("PPO", "actor critic"),
    "a-gan-a-vq-gan-a-discriminator": ("GAN", "discriminator"),
    "distillation-labels-and-a-teacher": ("distillation", "teacher"),
    "a-contrastive-auxiliary-loss-simclr-self-supervision": ("contrastive loss", "SimCLR"),
    "a-regulariser-a-penalty": ("regulariser", "penalty strength"),
    "labels-that-are-absent-for-some-batches-missing-labels": ("missing labels", "absent labels"),
    "a-loss-to-be-maximised": ("maximise a loss", "maximised"),
    "thirty-losses-very-many-losses": ("thirty losses", "many losses"),
    "no-main-loss-all-losses-equal": ("no main loss", "all losses equal"),
    "muon-lion-any-optimizer": ("Muon", "Lion"),
    "learning-rates-by-layer-frozen-embeddings": ("frozen embeddings", "learning rate per layer"),
    "it-became-slower": ("slower", "became slow"),
}
"""Two tries for each answer, by its anchor on the page *Questions*."""


def ranked(sections: Sequence[dict[str, str]], query: str) -> list[str]:
    """Locations of the sections that have a word of the query, best first.

    Args:
      sections: of all pages, with ``location``, ``title`` and ``text``.
      query: words; one that begins a word of a section counts as that word.
    """
    words = re.findall(r"\w+", query.lower())
    fields = [
        [re.findall(r"\w+", section[name].lower()) for name in ("title", "text")]
        for section in sections
    ]
    scores = [0.0] * len(sections)
    for word in words:
        counts = [[sum(w.startswith(word) for w in field) for field in pair] for pair in fields]
        having = sum(any(pair) for pair in counts)
        rarity = math.log(1 + len(sections) / (1 + having))
        for place, pair in enumerate(counts):
            for boost, count, field in zip((1000, 1), pair, fields[place], strict=True):
                scores[place] += boost * rarity * count / (count + 1 + len(field) / 50)
    order = sorted(range(len(sections)), key=lambda place: -scores[place])
    return [sections[place]["location"] for place in order if scores[place]]


def rank(sections: Sequence[dict[str, str]], query: str, anchor: str) -> int | None:
    """The place of an answer among what a query finds, 1 the first; None if it is not found."""
    found = [location.partition("#")[2] for location in ranked(sections, query)]
    return found.index(anchor) + 1 if anchor in found else None


def main(path: Path) -> None:
    """Prints every question's ranks."""
    sections = json.loads(path.read_text())["docs"]
    for anchor, queries in QUESTIONS.items():
        found = ", ".join(f"{query!r}: {rank(sections, query, anchor)}" for query in queries)
        print(f"{anchor}\n    {found}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
