"""Apply the difference of two generated texts to a third text, which its owner may have edited."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

LABEL = re.compile(r"- \*\*[^*]+:\*\*")


def patched(text: str, before: str, after: str) -> str:
    """Replace the lines of `text` that `before` and `after` differ in.

    Lines that the owner of the text has edited or deleted stay as they are, and so do those that
    were replaced before.
    """
    lines, old, new = (each.split("\n") for each in (text, before, after))
    changes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    for kind, start, end, first, last in reversed(changes):
        if kind == "equal":
            continue
        place, block = _place(lines, old[:start], old[start:end]), new[first:last]
        is_new = kind == "insert" and not _has(old, start, block)
        is_done = is_new and place is not None and _has(lines, place, block)
        if place is not None and not is_done:
            lines[place : place + end - start] = block
    return "\n".join(lines)


def _has(lines: Sequence[str], place: int, block: Sequence[str]) -> bool:
    return lines[place : place + len(block)] == block


def _place(lines: Sequence[str], above: Sequence[str], block: Sequence[str]) -> int | None:
    """The index of a block of lines, or the place where lines are inserted; None if unknown."""
    if not block:
        return _after(lines, above)
    starts = range(len(lines) - len(block) + 1)
    found = [i for i in starts if lines[i : i + len(block)] == block]
    if len(found) > 1:
        found = [i for i in found if i and above and lines[i - 1] == above[-1]]
    return found[0] if len(found) == 1 else None


def _after(lines: Sequence[str], above: Sequence[str]) -> int | None:
    """The place below the nearest line above that occurs once; of an item its label counts."""
    known, wanted = list(map(_label, lines)), list(map(_label, above))
    for distance, line in enumerate(reversed(wanted)):
        if line.strip() and known.count(line) == 1:
            place = known.index(line) + 1
            between = wanted[len(wanted) - distance :]
            return place + distance if known[place : place + distance] == between else place
    return None


def _label(line: str) -> str:
    """The label of a list's item such as `- **Context:** 128 tokens`; another line as it is."""
    item = LABEL.match(line)
    return item[0] if item else line
