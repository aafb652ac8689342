"""What pip installs to get this lewis_hub on another machine."""

from __future__ import annotations

import json
from importlib.metadata import distribution

NAME = "lewis-hub"


def requirement(extra: str | None = None) -> str:
    """The commit that pip installed this from, if it was from a repository; else the release.

    `extra` names optional dependencies to install as well.

    Source:
        The file direct_url.json, packaging.python.org/en/latest/specifications/direct-url.
    """
    installed = distribution(NAME)
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    name = f"{NAME}[{extra}]" if extra else NAME
    commit = origin.get("vcs_info", {}).get("commit_id")
    if commit:
        return f"{name} @ git+{origin['url']}@{commit}"
    return f"{name}=={installed.version}"
