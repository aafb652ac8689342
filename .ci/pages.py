"""Hooks of mkdocs: the reference is made from the code, and pages outside of docs/ are added.

A page of the reference has a marker such as `<!-- reference: recipe -->`, where the text goes.
"""

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / ".ci"))

import reference  # noqa: E402

MARKER = re.compile(r"<!-- reference: (\w+) -->")
LINK = re.compile(r"(\]\()(?!\w+:|#|<)([^)#\s]+)")
OUTSIDE = {  # file of the repository -> its page
    "benchmarks/RESULTS.md": "results.md",
    "CONTRIBUTING.md": "contributing.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Fill the markers, and point links between files of the repository at their pages."""
    own = page.file.src_uri
    sources = {place: source for source, place in OUTSIDE.items()}
    folder = posixpath.dirname(sources.get(own, f"docs/{own}"))

    def to_page(link: re.Match[str]) -> str:
        source = posixpath.normpath(posixpath.join(folder, link[2]))
        target = OUTSIDE.get(source, source.removeprefix("docs/"))
        return link[1] + posixpath.relpath(target, posixpath.dirname(own) or ".")

    linked = LINK.sub(to_page, markdown)
    return MARKER.sub(lambda marker: reference.TEXTS[marker[1]](), linked)
