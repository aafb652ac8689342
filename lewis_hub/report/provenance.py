"""Where a merge came from, in the words of the supply chain: `lewis/provenance.json`.

An in-toto Statement v1 (https://in-toto.io/Statement/v1) about every file of the merge, with a SLSA
Provenance v1 predicate (https://slsa.dev/provenance/v1). All of it but the two dates follows from
the lock, so it can be held against the lock. Paths of local folders stand as the recipe has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lewis_hub.report.lock import FILE as LOCK
from lewis_hub.report.lock import Lock, LockedData, LockedInput

FILE = "lewis/provenance.json"
BUILDER = "https://pypi.org/project/lewis-hub/"
BUILD_TYPE = f"{BUILDER}#merge-v1"
GIT_SHA_DIGITS = 40


@dataclass(frozen=True)
class Run:
    """When the run that finished a merge began and ended, both with a time zone."""

    began: datetime
    ended: datetime


def provenance(lock: Lock, run: Run) -> str:
    """The text of `provenance.json`; the same lock and run give the same text."""
    told = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": list(_subjects(lock)),
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"recipe": lock.recipe},
                "internalParameters": {
                    "digest": lock.digest,
                    "max_shard_bytes": lock.max_shard_bytes,
                    "versions": {"method": lock.method_version, "guide": lock.guide_version},
                },
                "resolvedDependencies": [
                    descriptor
                    for kind, locked in (("", lock.inputs), ("datasets/", lock.calibration))
                    for one in {(one.name, one.commit_sha): one for one in locked}.values()
                    for descriptor in _dependencies(kind, one)
                ],
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": dict(sorted(lock.software.items()))},
                "metadata": {
                    "invocationId": lock.digest,
                    "startedOn": run.began.isoformat(timespec="seconds"),
                    "finishedOn": run.ended.isoformat(timespec="seconds"),
                },
            },
        },
    }
    return json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def is_provenance_of(text: str, lock: Lock) -> bool:
    """Whether a text says of a lock what `provenance` does, whatever its dates."""
    try:
        told = json.loads(text)["predicate"]["runDetails"]["metadata"]
        dates = [datetime.fromisoformat(told[key]) for key in ("startedOn", "finishedOn")]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return provenance(lock, Run(*dates)) == text


def _subjects(lock: Lock) -> Iterator[dict[str, Any]]:
    for path, file in sorted(lock.outputs.items()):
        yield {"name": path, "digest": {"sha256": file.sha256}}
    own = hashlib.sha256(lock.to_json().encode()).hexdigest()
    yield {"name": LOCK, "digest": {"sha256": own}}


def _dependencies(kind: str, one: LockedInput | LockedData) -> Iterator[dict[str, Any]]:
    """The commit, where there is one, and each file that was read of it."""
    on_hub = len(one.commit_sha) == GIT_SHA_DIGITS
    place = f"hf://{kind}{one.name.partition('@')[0]}@{one.commit_sha}"
    if on_hub:
        asked = {"annotations": {"revision": one.revision}} if one.revision else {}
        yield {"uri": place, "digest": {"gitCommit": one.commit_sha}, **asked}
    for path, digest in sorted(one.files.items()):
        where = {"uri": f"{place}/{path}"} if on_hub else {"name": f"{one.name}/{path}"}
        yield {**where, "digest": _digest(digest)}


def _digest(written: str) -> Mapping[str, str]:
    algorithm, _, digits = written.partition(":")
    return {"gitBlob" if algorithm == "git-sha1" else algorithm: digits}
