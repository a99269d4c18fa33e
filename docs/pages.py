"""Notebooks become pages of the site, as they were committed, and long names may break.

A hook of MkDocs, named in `mkdocs.yml`.
"""

import html
import re
import textwrap
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ON_PYPI = False
"""Whether ``pip install gdmam-jax`` works, which the first cell of a notebook needs in Colab."""
TEMPLATE = """{% extends 'markdown/index.md.j2' %}
{% block stream %}
``` { .text .output }
{{ output.text }}
```
{% endblock stream %}
{% block data_png %}
![What the cell above draws]({{ output.metadata.filenames['image/png'] }})
{% endblock data_png %}
"""

CHANGED = re.compile(
    r'<(?P<tag>a|picture|pre)\b.*?</(?P=tag)>|<img [^>]*src="(?P<file>[^"]+)"[^>]*>|<[^>]+>'
    r"|(?P<number>\b\d[\d.]*e-\d+)",
    re.DOTALL,
)
"""Pictures without a link, and numbers that must not break; before these, where neither is."""


def opening(name: str, repository: str | None, on_pypi: bool = ON_PYPI) -> str:
    """How to run a notebook: in Colab by a link, if package and repository are published."""
    file = f"[{name}.ipynb]({name}.ipynb){{ download }}"
    if not on_pypi:
        return (
            f"To run this page, open `notebooks/{name}.ipynb` of a clone "
            "([how](../examples.md#notebooks)), or download "
            f"{file}."
        )
    if github := re.fullmatch(r"https://github\.com/([^/]+/[^/]+?)(\.git)?/?", repository or ""):
        colab = f"https://colab.research.google.com/github/{github[1]}/blob/main"
        return (
            f"[Open in Colab]({colab}/notebooks/{name}.ipynb){{ .md-button }} or download {file}."
        )
    return (
        f"To run this page, download {file}. In [Colab](https://colab.research.google.com) choose "
        "*File*, *Upload notebook*: the first cell installs what it needs."
    )


def on_files(files: Any, config: Any) -> Any:
    """Adds a page for each notebook, and its pictures."""
    # Here, so that tests, which import every module, do not need them.
    from mkdocs.structure.files import File
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    exporter = MarkdownExporter(raw_template=TEMPLATE)
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        names = {"unique_key": path.stem, "output_files_dir": path.stem}
        text, resources = exporter.from_filename(path, resources=names)
        title, _, rest = text.partition("\n")
        # Without a table of contents there is room for the cells.
        text = f"---\nhide: [toc]\n---\n\n{title}\n\n{opening(path.stem, config.repo_url)}\n{rest}"
        made = {f"{path.stem}.md": text, **resources["outputs"]}
        for name, content in made.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads links to notebooks to these pages, but not those that download."""
    if page.file.src_uri.startswith("notebooks/"):
        markdown = re.sub(r"(\(\w+)\.ipynb\)(?!\{)", r"\1.md)", markdown)
        return markdown.replace("(../docs/", "(../")
    return re.sub(r"(\(notebooks/\w+)\.ipynb\)", r"\1.md)", markdown)


def on_page_context(context: Any, page: Any, **_: Any) -> Any:
    """A page's description is its first paragraph without formulas."""
    opened = page.file.src_uri.startswith("notebooks/")  # by how to run it
    for found in re.findall(r"<p>(.*?)</p>", page.content, re.DOTALL)[opened:]:
        if "<math" not in found and (text := html.unescape(re.sub("<[^>]+>", "", found)).strip()):
            page.meta["description"] = html.escape(textwrap.shorten(text, 200, placeholder=" ..."))
            break
    return context


def on_page_content(content: str, **_: Any) -> str:
    """Code in sentences and tables breaks behind `_`, `=`, `(` and `,` only; pictures enlarge."""

    def breakable(match: re.Match[str]) -> str:
        text = re.sub(r"(?<!\S)--[\w-]+", r'<span class="option">\g<0></span>', match[0])
        return re.sub(r"(?<=[_,])(?=\w)|(?<=\w[=(])(?=\w)", "<wbr>", text)

    def whole(match: re.Match[str]) -> str:
        if match["number"]:
            return f'<span class="option">{match[0]}</span>'
        return f'<a href="{match["file"]}">{match[0]}</a>' if match["file"] else match[0]

    content = re.sub(r"(?<=<code>)[^<\n]+(?=</code>)", breakable, content)
    return CHANGED.sub(whole, content)
