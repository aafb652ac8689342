import json
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement, statement_pb2

from lewis_hub.report.lock import (
    Lock,
    LockedData,
    LockedInput,
    OutputFile,
    is_provenance_of,
    provenance,
)

RUN = (datetime(2026, 1, 2, 3, 4, 5, 678, UTC), datetime(2026, 1, 2, 4, 0, tzinfo=UTC))
DATA = LockedData("zoo/sums@v1", "v1", "d" * 40, {"a.jsonl": "sha256:04"}, None, "train", (7, 2))
LOCK = Lock(
    inputs=(
        LockedInput("zoo/base", "base", "main", "a" * 40, {"config.json": "git-sha1:0a"}),
        LockedInput("./mine", "expert", None, "sha256:cc", {"model.safetensors": "sha256:03"}),
    ),
    calibration=(DATA, DATA),
    recipe={"merge_method": "ties", "seed": 42},
    method="ties",
    method_version=1,
    guide="lewis",
    guide_version=3,
    seed=42,
    max_shard_bytes=1000,
    outputs={"model.safetensors": OutputFile("ff" * 32, 10), "config.json": OutputFile("ee", 3)},
    software={"torch": "2.9", "lewis_hub": "0.1.0"},
)


@pytest.fixture
def told():
    return json.loads(provenance(LOCK, *RUN))


def test_every_file_of_the_merge_and_its_lock_is_a_subject(told):
    assert told["subject"] == [
        {"name": "config.json", "digest": {"sha256": "ee"}},
        {"name": "model.safetensors", "digest": {"sha256": "ff" * 32}},
        {
            "name": "lewis/lock.json",
            "digest": {"sha256": sha256(LOCK.to_json().encode()).hexdigest()},
        },
    ]


def test_each_input_stands_with_its_commit_and_the_digest_of_each_file_once(told):
    base, data = f"hf://zoo/base@{'a' * 40}", f"hf://datasets/zoo/sums@{'d' * 40}"

    assert told["predicate"]["buildDefinition"]["resolvedDependencies"] == [
        {"uri": base, "digest": {"gitCommit": "a" * 40}, "annotations": {"revision": "main"}},
        {"uri": f"{base}/config.json", "digest": {"gitBlob": "0a"}},
        {"name": "./mine/model.safetensors", "digest": {"sha256": "03"}},
        {"uri": data, "digest": {"gitCommit": "d" * 40}, "annotations": {"revision": "v1"}},
        {"uri": f"{data}/a.jsonl", "digest": {"sha256": "04"}},
    ]


def test_it_says_what_was_asked_who_did_it_and_when(told):
    assert told["predicate"]["buildDefinition"]["externalParameters"] == {"recipe": LOCK.recipe}
    assert told["predicate"]["runDetails"] == {
        "builder": {
            "id": "https://pypi.org/project/lewis-hub/",
            "version": {"lewis_hub": "0.1.0", "torch": "2.9"},
        },
        "metadata": {
            "invocationId": LOCK.digest,
            "startedOn": "2026-01-02T03:04:05+00:00",
            "finishedOn": "2026-01-02T04:00:00+00:00",
        },
    }


def test_in_toto_and_slsa_read_it_as_theirs(told):
    read = json_format.ParseDict(told, statement_pb2.Statement())
    predicate = json_format.ParseDict(told["predicate"], provenance_pb2.Provenance())

    whole = statement.Statement(
        read.subject, read.predicate_type, json_format.MessageToDict(read.predicate)
    )
    whole.validate()
    assert read.predicate_type == "https://slsa.dev/provenance/v1"
    assert predicate.build_definition.build_type.endswith("#merge-v1")
    assert predicate.run_details.metadata.started_on.seconds == int(RUN[0].timestamp())


def test_it_is_held_against_the_lock_but_for_its_dates():
    text = provenance(LOCK, *RUN)

    assert is_provenance_of(text, LOCK)
    assert is_provenance_of(text.replace("2026-01-02T04", "2026-01-02T05"), LOCK)
    assert not is_provenance_of(text.replace("2026-01-02T04", "yesterday"), LOCK)
    assert not is_provenance_of(text, replace(LOCK, seed=43))
    assert not is_provenance_of(text.replace("zoo/base", "zoo/case"), LOCK)
    assert not is_provenance_of("[]", LOCK)
