"""Prepare a checkout for a release on PyPI, which knows no repository: for_pypi.py REPOSITORY TAG.

README.md gets absolute links to the files at TAG, and pyproject.toml the addresses of REPOSITORY,
such as https://github.com/OWNER/NAME.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HERE = r"(?!\w+:|#)"  # neither on another site nor within the page
LINKS = (  # (before the path, the path), and how GitHub shows the file
    (re.compile(rf"((?<!!)\[[^\]]*\]\(|\bhref=\"){HERE}([^)\"\s]+)"), "blob"),
    (re.compile(rf"(!\[[^\]]*\]\(|\bsrc(?:set)?=\"){HERE}([^)\"\s]+)"), "raw"),
)
URLS = re.compile(r"^\[project\.urls\].*$", re.MULTILINE)


def absolute(text: str, repository: str, tag: str) -> str:
    """The text with links to the files of the repository; pictures are linked as raw files."""
    for link, kind in LINKS:
        text = link.sub(rf"\g<1>{repository}/{kind}/{tag}/\g<2>", text)
    return text


def with_addresses(project: str, repository: str, tag: str) -> str:
    """The text of pyproject.toml with the addresses of the repository."""
    addresses = {
        "Repository": repository,
        "Documentation": f"{repository}/tree/{tag}/docs",
        "Issues": f"{repository}/issues",
        "Releases": f"{repository}/releases",
    }
    lines = "\n".join(f'{name} = "{url}"' for name, url in addresses.items())
    changed, n_places = URLS.subn(rf"\g<0>\n{lines}", project)
    assert n_places == 1, "pyproject.toml has no [project.urls]"
    return changed


if __name__ == "__main__":
    _, repository, tag = sys.argv
    for name, change in {"README.md": absolute, "pyproject.toml": with_addresses}.items():
        file = ROOT / name
        changed = change(file.read_text(encoding="utf-8"), repository.rstrip("/"), tag)
        file.write_text(changed, encoding="utf-8", newline="\n")
