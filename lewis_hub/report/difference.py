"""The differences between two merges in sentences, and the changelog of a published merge."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from lewis_hub.display import line_of
from lewis_hub.documents import read_json
from lewis_hub.errors import OutputError
from lewis_hub.report import markdown
from lewis_hub.report.lock import Lock, LockedData, LockedInput

FILE = "lewis/changelog.json"
VERSION = 1
N_KEPT = 100
N_SHOWN = 10
BEGIN, END = "<!-- lewis-hub: changelog -->", "<!-- lewis-hub: end of changelog -->"
MAX_CHARACTERS = 300  # of a change in the card or in the message of a commit
MAX_CHANGES = 100  # of an entry there
SHORT = 12  # digits of a commit sha, or of a folder's digest
NAMES = {"model", "base_model", "dataset"}  # their changes are in the differences of the inputs
ABSENT = "absent"
UNCHANGED = ", without a change of the files that are read"


def differences(before: Lock, after: Lock) -> tuple[str, ...]:
    """A sentence for each difference; none if the merges and their bytes are the same."""
    changes = [*_inputs(before.inputs, after.inputs)]
    changes += _inputs(before.calibration, after.calibration)
    changes += recipe_differences(before.recipe, after.recipe, ignored=NAMES)
    changes += _exchanged(before, after)
    changes += _versions(before, after)
    if before.max_shard_bytes != after.max_shard_bytes:
        changes.append(
            f"maximum shard size: {before.max_shard_bytes:,} → {after.max_shard_bytes:,} bytes"
        )
    changes += _weights(before, after)
    if before.digest == after.digest and changes:
        changes.append("none of these changes affects the weights")
    return tuple(changes)


def recipe_differences(before: Any, after: Any, ignored: Collection[str] = ()) -> Iterator[str]:
    """A sentence for each field that differs, but for `ignored` keys."""
    old, new = (dict(_fields(side, ignored)) for side in (before, after))
    for field in _differing(old, new):
        yield f"{field}: {old.get(field, ABSENT)} → {new.get(field, ABSENT)}"


def _fields(value: Any, ignored: Collection[str], path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ignored and item is not None:
                yield from _fields(item, ignored, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _fields(item, ignored, f"{path}[{index}]")
    else:
        yield path, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value)


def _inputs(
    before: Sequence[LockedInput | LockedData], after: Sequence[LockedInput | LockedData]
) -> Iterator[str]:
    old, new = _by_place(before), _by_place(after)
    for place in dict.fromkeys((*old, *new)):
        role, name, _ = place
        if place not in new:
            yield f"{role} {name}: no longer used"
        elif place not in old:
            yield f"{role} {name}: new, at {_commit(new[place])}"
        elif old[place].commit_sha != new[place].commit_sha:
            moved = f"{_commit(old[place])} → {_commit(new[place])}"
            changed = _differing(old[place].files, new[place].files)
            rest = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            files = f" ({', '.join(changed[:3])}{rest})"
            yield f"{role} {name}: {moved}{files if changed else UNCHANGED}"


def _by_place(
    inputs: Sequence[LockedInput | LockedData],
) -> dict[tuple[str, str, int], LockedInput | LockedData]:
    """Inputs by role, name and number: a merge may have several revisions of one model."""
    commits: defaultdict[tuple[str, str], dict[str, LockedInput | LockedData]] = defaultdict(dict)
    for one in inputs:  # several experts may be measured on one dataset
        commits[getattr(one, "role", "calibration"), one.name].setdefault(one.commit_sha, one)
    return {
        (*place, number): one
        for place, found in commits.items()
        for number, one in enumerate(found.values())
    }


def _exchanged(before: Lock, after: Lock) -> Iterator[str]:
    """Fields of the recipe that name another input, where both merges use both."""
    used, named = list[set[str]](), list[dict[str, str]]()
    for lock in (before, after):
        used.append({one.name for one in lock.inputs} | {one.name for one in lock.calibration})
        fields = dict(_fields(lock.recipe, ()))
        names = {path for path in fields if path.rpartition(".")[2] in NAMES}
        named.append({path: fields[path].partition("@")[0] for path in names})
    (old, new), common = named, used[0] & used[1]
    for field in sorted(old.keys() & new.keys()):
        if old[field] != new[field] and {old[field], new[field]} <= common:
            yield f"{field}: {old[field]} → {new[field]}"


def _differing(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    return [key for key in dict.fromkeys((*old, *new)) if old.get(key) != new.get(key)]


def _versions(before: Lock, after: Lock) -> Iterator[str]:
    """Changes of the version of a method or guide whose name is the same."""
    if before.method == after.method and before.method_version != after.method_version:
        yield f"method {after.method}: version {before.method_version} → {after.method_version}"
    if before.guide == after.guide and before.guide_version != after.guide_version:
        yield f"guide {after.guide}: version {before.guide_version} → {after.guide_version}"


def _weights(before: Lock, after: Lock) -> Iterator[str]:
    old, new = (
        {path: file.sha256 for path, file in lock.outputs.items() if path.endswith(".safetensors")}
        for lock in (before, after)
    )
    changed = _differing(old, new)
    if changed and old and new:  # a planned merge has no weights
        total = len(dict.fromkeys((*old, *new)))
        yield f"weights: {len(changed)} of {total} files differ"


def _commit(source: LockedInput | LockedData) -> str:
    return source.commit_sha.removeprefix("sha256:")[:SHORT]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ChangelogEntry:
    """A published merge."""

    day: date  # of the push, in UTC
    replaced: str  # commit sha of the repo's main before the push
    digest: str  # of the new lock
    changes: tuple[str, ...]  # from `differences`


def to_json(entries: Sequence[ChangelogEntry]) -> str:
    """The text of `changelog.json`, newest first."""
    document = {"version": VERSION, "entries": [asdict(entry) for entry in entries[:N_KEPT]]}
    return json.dumps(document, indent=2, ensure_ascii=False, default=date.isoformat) + "\n"


def from_json(text: str, file: str = FILE) -> tuple[ChangelogEntry, ...]:
    """Read what `to_json` wrote; messages name `file`.

    Raises:
        OutputError: the text has another version, or is no such document.
    """
    try:
        document = read_json(text)
        json.dumps(document, ensure_ascii=False).encode()  # half a letter is a ValueError
        if document["version"] == VERSION:
            entries = Annotated[tuple[ChangelogEntry, ...], Field(fail_fast=True)]
            return TypeAdapter(entries).validate_python(document["entries"])
        problem = f"it has version {document['version']}, this program reads version {VERSION}."
    except (ValueError, TypeError, KeyError):
        problem = "it is not a changelog of merges."
    raise OutputError(file, problem, "Repair or delete it. The next push starts a new changelog.")


def in_card(card: str, entries: Sequence[ChangelogEntry]) -> str:
    """The card with these entries as its last section, instead of its previous changelog."""
    begin, end = card.find(BEGIN), card.rfind(END)
    if 0 <= begin < end:
        above, below = card[:begin].rstrip("\n"), card[end + len(END) :].removeprefix("\n")
        card = f"{above}\n{below}"
    without = card.rstrip("\n")
    return f"{without}\n\n{BEGIN}\n{_section(entries)}\n{END}\n" if entries else f"{without}\n"


def shown(changes: Sequence[str]) -> list[str]:
    """The changes for a card or the message of a commit: the first ones, and their beginnings."""
    more = len(changes) - MAX_CHANGES
    listed = [line_of(change, MAX_CHARACTERS) for change in changes[:MAX_CHANGES]]
    return [*listed, f"{more:,} more changes"] if more > 0 else listed


def _section(entries: Sequence[ChangelogEntry]) -> str:
    parts = ["## Changelog"]
    for entry in entries[:N_SHOWN]:
        replaced = markdown.code(entry.replaced[:12])
        parts.append(f"**{entry.day}**, replaces {replaced}:\n")
        parts[-1] += "".join(f"\n- {markdown.text(change)}" for change in shown(entry.changes))
    if len(entries) > N_SHOWN:
        parts.append(f"All {len(entries)} entries are in [{FILE}]({FILE}).")
    return "\n\n".join(parts)
