from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from lewis_hub.errors import OutputError
from lewis_hub.report.lock import (
    Lock,
    LockedData,
    LockedInput,
    OutputFile,
    can_change_the_result,
    canonical,
    schema,
)

BASE = LockedInput("zoo/base", "base", None, "a" * 40, {"model.safetensors": "sha256:01"})
MATH = LockedInput("zoo/math", "expert", "main", "b" * 40, {"model.safetensors": "sha256:02"})
TEXT = LockedInput("./text", "expert", None, "sha256:cc", {"model.safetensors": "sha256:03"})
SUMS = LockedData("zoo/sums", None, "d" * 40, {"a.jsonl": "sha256:04"}, None, "train", (7, 2))
WORDS = LockedData("zoo/words", None, "e" * 40, {"a.jsonl": "sha256:05"}, None, "train", (1,))
RECIPE = {
    "base_model": "zoo/base@" + "a" * 40,
    "models": [
        {"model": "zoo/math@" + "b" * 40, "parameters": {"weight": 1.0}},
        {"model": "./text", "parameters": {"weight": 0.5}},
    ],
    "merge_method": "ties",
    "parameters": {"normalize": True},
    "dtype": "bfloat16",
    "guide": {
        "name": "lewis",
        "gamma": 0.3,
        "calibration": {"dataset": "zoo/sums", "split": "train", "samples": 64},
    },
    "evaluate": {"tasks": ["sums"], "include": "tasks"},
    "publish": {"repo": "me/merge"},
}
LOCK = Lock(
    inputs=(BASE, MATH, TEXT),
    calibration=(SUMS, SUMS),
    recipe=RECIPE,
    method="ties",
    method_version=1,
    guide="lewis",
    guide_version=1,
    seed=42,
    max_shard_bytes=5_000_000_000,
    outputs={"model.safetensors": OutputFile("ff", 10), "config.json": OutputFile("ee", 3)},
    software={"torch": "2.9", "lewis_hub": "0.1.0"},
)


def edited(path: tuple[str | int, ...], value: object) -> dict[str, object]:
    recipe = json.loads(json.dumps(RECIPE))
    place = recipe
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return recipe


CHANGES_BYTES = {
    "a weight file": {
        "inputs": (BASE, replace(MATH, files={"model.safetensors": "sha256:09"}), TEXT)
    },
    "another file": {
        "inputs": (replace(BASE, files={**BASE.files, "a.py": "git-sha1:1"}), MATH, TEXT)
    },
    "order of experts": {"inputs": (BASE, TEXT, MATH)},
    "a role": {"inputs": (replace(BASE, role="expert"), MATH, TEXT)},
    "calibration data": {"calibration": (SUMS, replace(SUMS, files={"a.jsonl": "sha256:08"}))},
    "whose calibration": {"calibration": (SUMS, WORDS)},
    "what a method does": {"method_version": 2},
    "what a guide does": {"guide_version": 2},
    "seed": {"seed": 43},
    "shards": {"max_shard_bytes": 1000},
    "method": {"method": "dare_ties"},
    "guide": {"guide": "uniform"},
    "a weight": {"recipe": edited(("models", 0, "parameters", "weight"), 0.9)},
    "an option": {"recipe": edited(("parameters", "normalize"), False)},
    "gamma": {"recipe": edited(("guide", "gamma"), 0.31)},
    "samples": {"recipe": edited(("guide", "calibration", "samples"), 65)},
    "dtype": {"recipe": edited(("dtype",), "float32")},
}
CHANGES_NOTHING = {
    "an expert's name": {"inputs": (BASE, replace(MATH, name="other/name"), TEXT)},
    "a commit": {"inputs": (BASE, replace(MATH, commit_sha="f" * 40), TEXT)},
    "the revision": {"inputs": (BASE, replace(MATH, revision="v2"), TEXT)},
    "the data's name": {"calibration": (replace(SUMS, name="x/y"),) * 2},
    "names in the recipe": {"recipe": edited(("models", 0, "model"), "other/name@" + "0" * 40)},
    "the dataset's name": {"recipe": edited(("guide", "calibration", "dataset"), "x/y")},
    "a whole number": {"recipe": edited(("models", 0, "parameters", "weight"), 1)},
    "what is scored": {"recipe": edited(("evaluate", "tasks"), ["words"])},
    "where it goes": {"recipe": edited(("publish", "repo"), "me/other")},
    "the rows that were drawn": {"calibration": (replace(SUMS, rows=None),) * 2},
    "an unset option": {"recipe": {**RECIPE, "out_dtype": None}},
    "outputs": {"outputs": {}},
    "software": {"software": {"torch": "3.0"}},
}


@pytest.mark.parametrize("change", CHANGES_BYTES.values(), ids=CHANGES_BYTES)
def test_the_digest_changes_with_what_fixes_the_bytes(change):
    assert replace(LOCK, **change).digest != LOCK.digest


@pytest.mark.parametrize("change", CHANGES_NOTHING.values(), ids=CHANGES_NOTHING)
def test_the_digest_does_not_change_with_anything_else(change):
    assert replace(LOCK, **change).digest == LOCK.digest


FILES = st.dictionaries(st.sampled_from("abé"), st.sampled_from("12"), max_size=2)
FIXING = st.tuples(
    st.lists(FILES, max_size=3), FILES, st.integers(0, 3), st.integers(1, 3), st.booleans()
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FIXING, FIXING, st.text(max_size=9), st.text(max_size=9))
def test_two_digests_are_equal_exactly_when_all_that_fixes_the_bytes_is(first, second, name, sha):
    def lock(fixing, name, sha):
        experts, data, seed, shard, normalize = fixing
        return replace(
            LOCK,
            inputs=tuple(LockedInput(name, "expert", None, sha, files) for files in experts),
            calibration=(replace(SUMS, files=data),),
            recipe={**RECIPE, "parameters": {"normalize": normalize}},
            seed=seed,
            max_shard_bytes=shard,
            software={"torch": name},
        )

    same = lock(first, name, sha).digest == lock(second, "another", "sha").digest
    assert same == (first == second)


def test_the_digest_tells_apart_which_model_gives_the_embedding_of_a_token():
    sources = [
        {"kind": "model_token", "model": model, "token": "he"} for model in ("zoo/math", "./text")
    ]
    settings = [
        {},
        *({"<tool>": {"source": source}} for source in sources),
        *({text: {"source": "./text"}} for text in ("model", "export", "<tool>")),
        {"model": {"source": "zoo/math"}},
    ]
    recipes = [edited(("tokenizer",), {"source": "union", "tokens": one}) for one in settings]

    digests = {replace(LOCK, recipe=recipe).digest for recipe in recipes}

    assert len(digests) == len(settings)


GIVERS = {
    "tokenizer_source": lambda model: model,
    "chat_template": lambda model: model,
    "tokenizer": lambda model: {"source": model, "tokens": {}},
    "tokens": lambda model: {"source": "base", "tokens": {"<tool>": {"source": model}}},
    "a token": lambda model: {
        "source": "base",
        "tokens": {"<a>": {"source": {"kind": "model_token", "model": model, "token": "zoo/math"}}},
    },
}


def given_by(what, number, names):
    """The digest if the model with a number gives the tokenizer or a part of it."""
    key = what if what in ("tokenizer_source", "chat_template") else "tokenizer"
    base, *experts = names
    models = [{"model": name} for name in experts]
    recipe = {"base_model": base, "models": models, key: GIVERS[what](names[number])}
    whole = {"models": [{"model": "last"}], "intermediate": [recipe]}
    return [replace(LOCK, recipe=one).digest for one in (recipe, whole)]


@pytest.mark.parametrize("what", GIVERS)
def test_the_digest_tells_which_model_gives_the_tokenizer_and_not_its_name_or_commit(what):
    names = ["zoo/base@" + "a" * 40, "zoo/math@" + "b" * 40, "./text"]
    moved = ["zoo/base@" + "c" * 40, "zoo/math@" + "d" * 40, "./another"]

    digests = [given_by(what, number, names) for number in range(3)]

    assert [given_by(what, number, moved) for number in range(3)] == digests
    assert len({digest for both in digests for digest in both}) == 6


def test_a_folder_named_as_a_word_for_the_tokenizer_is_not_that_word():
    alike = given_by("tokenizer_source", 1, ["x", "y"])

    assert given_by("tokenizer_source", 1, ["x", "base"]) != alike


def test_the_digest_is_the_documented_one():
    document = (
        '{"arithmetic":2,"calibration":[],"guide":[null,null],"inputs":[{"files":{"ä":"sha256:01"},'
        '"role":"expert"}],"max_shard_bytes":7,"method":["linear",1],'
        '"recipe":{"models":[{"parameters":{"weight":0.5}}]},"seed":1}'
    )
    lock = Lock(
        inputs=(LockedInput("a/b", "expert", None, "c" * 40, {"ä": "sha256:01"}),),
        calibration=(),
        recipe={"models": [{"model": "a/b", "parameters": {"weight": 0.5}}]},
        method="linear",
        method_version=1,
        guide=None,
        guide_version=None,
        seed=1,
        max_shard_bytes=7,
        outputs={},
        software={},
    )

    assert lock.digest == "sha256:" + hashlib.sha256(document.encode()).hexdigest()


def stacked(*models, base=None, names=("a/b", "c/d")):
    slices = [
        {"sources": [{"model": names[i], "layer_range": [0, 2]} for i in one], "base_model": base}
        for one in models
    ]
    return replace(LOCK, recipe={"base_model": names[0], "slices": slices}).digest


def test_the_digest_tells_which_entry_is_that_of_a_base_that_is_listed_too():
    def listed(*numbers):
        settings = [{"weight": 0.5}, {"weight": 0.3}, {"weight": 0.2}]
        names = [RECIPE["base_model"], "zoo/math", "./text"]
        models = [
            {"model": names[number], "parameters": parameters}
            for number, parameters in zip(numbers, settings, strict=True)
        ]
        return replace(LOCK, recipe=RECIPE | {"models": models}).digest

    assert len({listed(0, 1, 2), listed(1, 0, 2), listed(1, 2, 0)}) == 3


def test_of_slices_the_digest_says_which_input_goes_where_and_not_what_it_is_called():
    digest = stacked([0], [1], [0])

    assert stacked([0], [1], [0], names=("e/f", "g/h")) == digest
    assert stacked([0], [1], [1]) != digest
    assert stacked([0, 1]) != stacked([1, 0])
    assert stacked([0, 1], base="a/b") != stacked([0, 1], base="c/d")


def test_canonical_json_writes_equal_values_alike():
    assert canonical({"b": 1.0, "a": (True, 2, 0.1)}) == b'{"a":[true,2,0.1],"b":1}'
    assert canonical({"a": [True, 2.0, 0.1], "b": 1}) == b'{"a":[true,2,0.1],"b":1}'


def test_a_lock_is_written_deterministically_and_read_back():
    document = json.loads(LOCK.to_json())

    assert list(document) == [
        "version",
        "digest",
        "inputs",
        "calibration",
        "recipe",
        "method",
        "method_version",
        "guide",
        "guide_version",
        "seed",
        "max_shard_bytes",
        "outputs",
        "software",
        "seal",
    ]
    assert document["digest"] == LOCK.digest
    assert document["inputs"][1] == {
        "name": "zoo/math",
        "role": "expert",
        "revision": "main",
        "commit_sha": "b" * 40,
        "files": {"model.safetensors": "sha256:02"},
    }
    assert list(document["outputs"]) == ["config.json", "model.safetensors"]
    assert Lock.from_json(LOCK.to_json()) == LOCK
    assert Lock.from_json(LOCK.to_json()).to_json() == LOCK.to_json()


def test_a_lock_that_was_changed_by_hand_is_refused():
    changed = LOCK.to_json().replace("sha256:02", "sha256:99")

    with pytest.raises(OutputError) as refused:
        Lock.from_json(changed)

    digest = replace(
        LOCK, inputs=(BASE, replace(MATH, files={"model.safetensors": "sha256:99"}), TEXT)
    ).digest
    assert str(refused.value) == (
        f"lewis/lock.json: it states the digest {LOCK.digest}, but its contents have {digest}.\n"
        "It was changed after the merge. Use the file that the merge wrote."
    )


@settings(deadline=None)
@given(st.integers(0, len(LOCK.to_json().encode()) - 1), st.integers(1, 255))
def test_no_byte_of_a_lock_can_be_another_one(place, change):
    content = bytearray(LOCK.to_json().encode())
    content[place] ^= change

    with pytest.raises(OutputError):
        Lock.from_json(content.decode(errors="replace"))


def test_what_no_digest_fixes_is_sealed():
    changed = LOCK.to_json().replace('"torch": "2.9"', '"torch": "2.8"')

    with pytest.raises(OutputError) as refused:
        Lock.from_json(changed)

    assert str(refused.value) == (
        "lewis/lock.json: its contents do not match its seal.\n"
        "It was changed after the merge. Use the file that the merge wrote."
    )


def test_a_lock_with_the_digest_of_another_version_is_not_called_changed():
    document = {**json.loads(LOCK.to_json()), "digest": f"sha256:{'0' * 64}"}
    del document["seal"]
    document["seal"] = "sha256:" + hashlib.sha256(canonical(document)).hexdigest()

    with pytest.raises(OutputError) as refused:
        Lock.from_json(json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    assert str(refused.value) == (
        "lewis/lock.json: it is whole, but its digest is by the rules of another version of "
        "lewis-hub.\nUse that version (0.1.0), or merge again."
    )


def test_a_lock_is_what_its_schema_says():
    validator = Draft202012Validator(json.loads(schema()))
    document = json.loads(LOCK.to_json())

    Draft202012Validator.check_schema(validator.schema)
    assert list(validator.iter_errors(document)) == []
    assert validator.schema["required"] == list(document)
    for broken in (document | {"version": 2}, document | {"seed": "x"}, document | {"more": 1}):
        assert len(list(validator.iter_errors(broken))) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "it is not the lock of a merge (Expecting property name"),
        ("[]", "it is not the lock of a merge (TypeError: "),
        ('{"version": 9}', "it has version 9, expected 1."),
        ('{"version": 1}', "it is not the lock of a merge (KeyError: 'digest')."),
        (
            LOCK.to_json().replace('"seed": 42', '"seed": "many"'),
            "it is not the lock of a merge (`seed`: Input should be a valid integer, unable to "
            "parse",
        ),
        (
            "[" * 100_000,
            "it is not the lock of a merge (its values are in each other more than 100 deep)",
        ),
    ],
    ids=["no JSON", "a list", "version", "empty", "a word", "deep"],
)
def test_another_document_is_refused(text, problem):
    with pytest.raises(OutputError) as refused:
        Lock.from_json(text, "x.json")

    assert problem in str(refused.value)


def nested(value, depth):
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": RECIPE | {"k" * 10**6: dict.fromkeys(map(str, range(101)), 1)}},
        {"recipe": RECIPE | {"dtype": nested([0] * 600_000, 90)}},
        {
            "inputs": (
                replace(BASE, name="n" * 10**6, files=dict.fromkeys(map(str, range(101)), "")),
            )
        },
        {
            "calibration": (
                replace(SUMS, name="n" * 10**6, files=dict.fromkeys(map(str, range(101)), "")),
            )
        },
    ],
    ids=["long key", "deep list", "name of a model", "name of a dataset"],
)
def test_a_small_lock_that_is_written_out_as_a_large_one_is_refused(changes):
    document = {"version": 1, "digest": "", "seal": "", **asdict(replace(LOCK, **changes))}

    with pytest.raises(OutputError, match="characters with the names around each value"):
        Lock.from_json(json.dumps(document, separators=(",", ":")))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inputs": ()}, "it has no inputs"),
        ({"outputs": {"x": OutputFile("0" * 64, 10**400)}}, "no file has the size of `x`"),
        ({"outputs": {"x": OutputFile("0" * 64, -1)}}, "no file has the size of `x`"),
    ],
)
def test_a_lock_of_no_merge_is_refused_though_it_is_sealed(changes, says):
    """`push` and `verify` ended in tracebacks."""
    with pytest.raises(OutputError) as refused:
        Lock.from_json(replace(LOCK, **changes).to_json())

    assert str(refused.value) == (
        f"lewis/lock.json: it is not the lock of a merge ({says}).\n"
        "Use the file that the merge wrote."
    )


def test_cards_pictures_and_formats_that_are_not_read_stay_out_of_the_lock():
    kept = ["model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "LICENSE"]
    left = ["README.md", ".gitattributes", "pytorch_model.bin", "img/a.png", ".cache/x.json"]

    assert [path for path in (*kept, *left) if can_change_the_result(path)] == kept
