"""What differs between two merges, in words: their inputs, their recipes, their weights."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from lewis_hub.errors import OutputError
from lewis_hub.report import markdown
from lewis_hub.report.lock import Lock, LockedData, LockedInput

SHORT = 12  # of a commit sha; of a folder's digest too
NAMING = {"model", "base_model", "dataset"}  # told as inputs
ABSENT = "absent"

Place = tuple[str, str]  # role, name


def differences(before: Lock, after: Lock) -> tuple[str, ...]:
    """One sentence a difference; none where the two are the same merge with the same bytes."""
    told = [*_inputs(_by_role(before.inputs), _by_role(after.inputs))]
    told += _inputs(_data(before), _data(after))
    told += recipe_differences(before.recipe, after.recipe, told_already=NAMING)
    told += _versions(before, after)
    if before.max_shard_bytes != after.max_shard_bytes:
        told.append(
            f"largest file of weights: {before.max_shard_bytes:,} → {after.max_shard_bytes:,} bytes"
        )
    told += _weights(before, after)
    if before.digest == after.digest and told:
        told.append("what fixes the weights is the same in both")
    return tuple(told)


def recipe_differences(
    before: Any, after: Any, told_already: Collection[str] = ()
) -> Iterator[str]:
    """One sentence a field that differs; keys that are `told_already` are left out."""
    old, new = (dict(_fields(side, told_already)) for side in (before, after))
    for field in dict.fromkeys((*old, *new)):
        ours, theirs = old.get(field, ABSENT), new.get(field, ABSENT)
        if ours != theirs:
            yield f"{field}: {ours} → {theirs}"


def _fields(value: Any, dropped: Collection[str], path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in dropped and item is not None:
                yield from _fields(item, dropped, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _fields(item, dropped, f"{path}[{index}]")
    else:
        yield path, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value)


def _by_role(inputs: Sequence[LockedInput]) -> dict[Place, LockedInput | LockedData]:
    return {(one.role, one.name): one for one in inputs}


def _data(lock: Lock) -> dict[Place, LockedInput | LockedData]:
    return {("calibration", one.name): one for one in lock.calibration}


def _inputs(
    old: Mapping[Place, LockedInput | LockedData], new: Mapping[Place, LockedInput | LockedData]
) -> Iterator[str]:
    for place in dict.fromkeys((*old, *new)):
        role, name = place
        if place not in new:
            yield f"{role} {name}: no longer used"
        elif place not in old:
            yield f"{role} {name}: new, at {_commit(new[place])}"
        elif old[place].commit_sha != new[place].commit_sha:
            moved = f"{_commit(old[place])} → {_commit(new[place])}"
            yield f"{role} {name}: {moved}{_changed(old[place].files, new[place].files)}"


def _changed(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    changed = [path for path in dict.fromkeys((*old, *new)) if old.get(path) != new.get(path)]
    if not changed:
        return ", which changed no file that counts"
    rest = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f" ({', '.join(changed[:3])}{rest})"


def _versions(before: Lock, after: Lock) -> Iterator[str]:
    """That a method or guide of one name now works otherwise."""
    if before.method == after.method and before.method_version != after.method_version:
        yield f"method {after.method}: version {before.method_version} → {after.method_version}"
    if before.guide == after.guide and before.guide_version != after.guide_version:
        yield f"guide {after.guide}: version {before.guide_version} → {after.guide_version}"


def _weights(before: Lock, after: Lock) -> Iterator[str]:
    old, new = (
        {path: file.sha256 for path, file in lock.outputs.items() if path.endswith(".safetensors")}
        for lock in (before, after)
    )
    changed = [path for path in dict.fromkeys((*old, *new)) if old.get(path) != new.get(path)]
    if changed and before.outputs and after.outputs:  # a merge that is planned has none
        total = len(dict.fromkeys((*old, *new)))
        yield f"weights: {len(changed)} of {total} files differ"


def _commit(one: LockedInput | LockedData) -> str:
    return one.commit_sha.removeprefix("sha256:")[:SHORT]


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
