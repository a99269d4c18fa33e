"""Which sections the site's search finds first for the questions that newcomers ask.

    mkdocs build && python docs/find.py site

Prints the rank of the answer for each try, as the search of the built site finds it: its own
program is run by Node.js. Fails if an answer is not found within the two tries.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    "training-became-slower-what-does-it-cost": ("slower", "became slow"),
}
"""Two tries for each answer, by its anchor on the page *Questions*."""


WORKER = "assets/javascripts/workers/search.*.min.js"
"""The search's program, in the folder of the theme or of the site."""


def search(index: dict[str, Any], queries: Sequence[str], worker: Path) -> list[list[str]]:
    """What the site shows for each query: of each page that it finds, the best section.

    Args:
      index: as in ``search/search_index.json``.
      queries: what is typed into the field.
      worker: the search's program.
    """
    program = Path(__file__).with_suffix(".js")
    given = json.dumps({"index": index, "queries": queries})
    ran = subprocess.run(
        ["node", program, worker], input=given, capture_output=True, text=True, check=True
    )
    return [[items[0]["location"] for items in pages] for pages in json.loads(ran.stdout)]


def ranks(index: dict[str, Any], worker: Path) -> dict[str, list[int | None]]:
    """Of each answer for its queries: 1 if it is shown first, None if it is not shown."""
    queries = [query for each in QUESTIONS.values() for query in each]
    found = iter(search(index, queries, worker))
    places = {}
    for anchor, each in QUESTIONS.items():
        places[anchor] = [_place(next(found), f"questions/#{anchor}") for _ in each]
    return places


def _place(locations: Sequence[str], location: str) -> int | None:
    return locations.index(location) + 1 if location in locations else None


def is_found(places: Sequence[int | None]) -> bool:
    """Whether one of the tries shows the answer first or second."""
    return any(place in (1, 2) for place in places)


def main(site: Path) -> None:
    """Prints every question's ranks; fails if an answer is not found."""
    index = json.loads((site / "search/search_index.json").read_text())
    (worker,) = site.glob(WORKER)
    places = ranks(index, worker)
    for anchor, found in places.items():
        tries = zip(QUESTIONS[anchor], found, strict=True)
        print(anchor, *(f"    {query}: {place}" for query, place in tries), sep="\n")
    if lost := [anchor for anchor, found in places.items() if not is_found(found)]:
        sys.exit(f"not found: {', '.join(lost)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
