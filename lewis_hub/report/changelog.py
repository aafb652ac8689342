"""What each published merge changed against the one before: `lewis/changelog.json`, and the card.

The file holds data, the card's section is made from it. What a repo's file says is checked when it
is read and escaped when it is shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from lewis_hub.errors import OutputError
from lewis_hub.report import markdown

FILE = "lewis/changelog.json"
VERSION = 1
N_KEPT = 100
N_SHOWN = 10
BEGIN, END = "<!-- lewis-hub: changelog -->", "<!-- lewis-hub: end of changelog -->"
SECTION = re.compile(rf"\n*{BEGIN}.*{END}\n?", re.DOTALL)
LONGEST = 300  # characters of one change that the card shows


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Entry:
    """One published merge.

    Attributes:
        day: of the push, in UTC.
        replaced: commit sha of the repo's main, as it was.
        digest: the new lock's.
        changes: one sentence each, as `difference` writes them.
    """

    day: date
    replaced: str
    digest: str
    changes: tuple[str, ...]


def to_json(entries: Sequence[Entry]) -> str:
    """The text of `changelog.json`, newest first."""
    document = {"version": VERSION, "entries": [asdict(one) for one in entries[:N_KEPT]]}
    return json.dumps(document, indent=2, ensure_ascii=False, default=date.isoformat) + "\n"


def from_json(text: str, file: str = FILE) -> tuple[Entry, ...]:
    """Read what `to_json` wrote; `file` is named in messages.

    Raises:
        OutputError: another version, or no such document.
    """
    try:
        document = json.loads(text)
        if document["version"] == VERSION:
            return TypeAdapter(tuple[Entry, ...]).validate_python(document["entries"])
        problem = f"it has version {document['version']}, this program reads version {VERSION}."
    except (ValueError, TypeError, KeyError, RecursionError):
        problem = "it is no changelog of merges."
    raise OutputError(file, problem, "Repair it, or delete it: the next push begins a new one.")


def in_card(card: str, entries: Sequence[Entry]) -> str:
    """The card with these entries as its last section, in the place of those that it had."""
    without = SECTION.sub("\n", card).rstrip("\n")
    return f"{without}\n\n{BEGIN}\n{_section(entries)}\n{END}\n" if entries else f"{without}\n"


def _section(entries: Sequence[Entry]) -> str:
    told = ["## Changelog"]
    for entry in entries[:N_SHOWN]:
        replaced = markdown.code(entry.replaced[:12])
        told.append(f"**{entry.day}**, in the place of {replaced}:\n")
        told[-1] += "".join(f"\n- {markdown.text(change[:LONGEST])}" for change in entry.changes)
    if len(entries) > N_SHOWN:
        told.append(f"All {len(entries)} are in [{FILE}]({FILE}).")
    return "\n\n".join(told)
