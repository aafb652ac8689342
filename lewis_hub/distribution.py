"""What pip installs to get this lewis_hub on another machine."""

from __future__ import annotations

import json
from importlib.metadata import distribution

NAME = "lewis-hub"


def requirement() -> str:
    """The commit that pip installed this from, if it was from a repository; else the release.

    Source:
        The file direct_url.json, packaging.python.org/en/latest/specifications/direct-url.
    """
    installed = distribution(NAME)
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id")
    if commit:
        return f"{NAME} @ git+{origin['url']}@{commit}"
    return f"{NAME}=={installed.version}"
