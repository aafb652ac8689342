"""Texts of others that are made to take all time or memory: each is refused within a second."""

import json
import time

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from lewis_hub.calibration.profile import ImportanceProfile
from lewis_hub.checkpoint.lora import AdapterConfig, read_config
from lewis_hub.documents import (
    MAX_JSON_VALUES,
    MAX_TABLE_BYTES,
    DocumentError,
    count_values,
    front_matter,
    read_json,
    read_yaml,
)
from lewis_hub.errors import AdapterError, EvaluationError, OutputError, RecipeError
from lewis_hub.evaluate.samples import TaskSamples
from lewis_hub.evaluate.scores import Answers, MetricResult, TaskResult, TaskScores
from lewis_hub.evaluate.tasks import read_file
from lewis_hub.hub import jobs, target
from lewis_hub.hub.facts import model_facts
from lewis_hub.hub.resolve import resolve_model
from lewis_hub.hub.target import Account
from lewis_hub.localhub.commits import Uploads
from lewis_hub.localhub.repositories import _card_metadata
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.report.lock import Lock, LockedData

ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
LONG_TEXT = f"t: &t {'x' * 100_000}\nu: [{', '.join(['*t'] * 400)}]\n"
DEEP_ALIASES = "".join(
    f"a{i}: &a{i} {'[' * 60}{f'*a{i - 1}' if i else 1}{']' * 60}\n" for i in range(20)
)
SAME_HASH = f"{{{', '.join(f'{(2**61 - 1) * k}: 1' for k in range(1, 20_000))}}}"
TOO_MANY = "it has more than 200,000 values once its aliases are written out"
SHORT_TAGS = "it has a `%TAG` directive, which is not read"
TOO_DEEP = "its values are in each other more than 100 deep"
YAML = {
    "aliases": (ALIASES, TOO_MANY),
    "merged keys": (ALIASES + f"b: {{<<: [{', '.join(['{x: *a7}'] * 9)}]}}", TOO_MANY),
    "aliases of a long text": (LONG_TEXT, TOO_MANY),
    "a value in itself": ("a: &a [*a]", "the value of `&a` contains itself"),
    "a mapping merged into itself": ("&a {<<: *a}", "the value of `&a` contains itself"),
    "deep": ("[" * 101 + "]" * 101, TOO_DEEP),
    "deep blocks": ("- " * 50_000 + "x", TOO_DEEP),
    "deep by aliases": (DEEP_ALIASES, TOO_DEEP),
    "sixties": ("a: 1" + ":1" * 200_000, "a number has more than 1,000 characters"),
    "keys of one hash": (SAME_HASH, TOO_MANY),
    "names of tags": ("".join(f"%TAG !{i:x}! b\n" for i in range(99_000)) + "--- a", SHORT_TAGS),
    "a long tag": (f"%TAG !a! {'b' * 10**6}\n--- [{'!a!x v, ' * 9000}]", SHORT_TAGS),
    "a later tag": ("--- a\n...\n%TAG !a! b\n--- a", SHORT_TAGS),
    "large": ("x" * 3_000_000, "it has 3.0 MB, the limit is 2.1 MB"),
}


@pytest.fixture(autouse=True)
def within_seconds():
    began = time.process_time()
    yield
    assert time.process_time() - began < 20  # a hang takes minutes


@pytest.mark.parametrize(("text", "problem"), YAML.values(), ids=YAML)
@pytest.mark.parametrize("loader", [yaml.SafeLoader, yaml.CSafeLoader])
def test_a_yaml_bomb_is_refused_before_it_is_built(text, problem, loader):
    with pytest.raises(DocumentError) as caught:
        read_yaml(text, loader)

    assert caught.value.problem == problem


@pytest.mark.parametrize(
    "text",
    ["!!int ''", "!!bool x", "!!timestamp x", "!!float ''", "? [a]\n: 1", "\0", "*x", "0000-00-00"]
    + ["1" + ":1" * 400 + ".5", "9999-99-99", "!!binary é", "!!omap [a]", "<<: 1", "--- a\n--- b"],
)
def test_yaml_that_pyyaml_cannot_build_is_one_kind_of_error(text):
    with pytest.raises(DocumentError):
        read_yaml(text)


def test_half_a_letter_is_refused_with_its_line():
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f'{RECIPE}name: "\\ud800"\n', "r.yaml")

    assert str(caught.value) == (
        "r.yaml:4: not valid YAML: a text has half a letter, which UTF-8 cannot encode.\n"
        "Fix the line, then run again."
    )


def test_yaml_with_aliases_within_the_limits_is_read():
    assert read_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]") == {
        **{"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}
    }
    assert read_yaml("[" * 100 + "]" * 100)
    assert read_yaml("") is None


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"[" * 101 + b"]" * 101, b'{"a":' * 101 + b"1" + b"}" * 101]
)
def test_json_that_is_too_deep_is_refused(text):
    with pytest.raises(ValueError, match="deep|Expecting"):
        read_json(text)
    assert read_json(b"[" * 100 + b"]" * 100)


def test_json_that_is_too_large_is_refused():
    with pytest.raises(DocumentError, match=r"it has 0\.0 MB, the limit is 0\.0 MB"):
        read_json(b"[1, 2, 3]", max_bytes=8)


def test_json_of_more_values_than_any_model_has_is_refused():
    with pytest.raises(DocumentError, match="it has 8,000,001 values, the limit is 4,000,000"):
        read_json(b"[" + b"[]," * 4_000_000 + b"1]", max_bytes=MAX_TABLE_BYTES)


@pytest.mark.parametrize(
    ("shape", "key"),
    [
        (Lock, "inputs"),
        (Lock, "calibration"),
        (LockedData, "rows"),
        (AdapterConfig, "modules_to_save"),
        (MetricResult, "values"),
        (Answers, "given"),
        (TaskResult, "documents"),
        (TaskResult, "prompts"),
        (TaskScores, "paired"),
        (Uploads, "files"),
        (ImportanceProfile, "sources"),
        (Account, "orgs"),
        (target._PullRequests, "discussions"),
        (target._Scopes, "scoped"),
        (jobs._Schedule, "command"),
        (TaskSamples, "questions"),
    ],
)
def test_of_a_list_only_the_first_wrong_item_is_told(shape, key):
    """An error of each takes kilobytes: a lock of 3.9 MB took 5.7 GB."""
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(shape).validate_python({key: [{}] * 1000})

    of_items = [one for one in refused.value.errors() if len(one["loc"]) > 1]
    assert {one["loc"][:2] for one in of_items} == {(key, 0)}


def test_of_schedules_only_the_first_wrong_one_is_told():
    with pytest.raises(ValidationError) as refused:
        jobs.SCHEDULES.validate_python([{}] * 1000)

    assert {one["loc"][0] for one in refused.value.errors()} == {0}


def test_a_lock_and_an_adapter_have_no_more_values_than_any_honest_one():
    lock = json.dumps({"inputs": [{}] * 800_001}, separators=(",", ":"))
    with pytest.raises(OutputError, match="it has 1,600,004 values, the limit is 1,600,000"):
        Lock.from_json(lock)
    adapter = json.dumps({"rank_pattern": {f"m{i}": 8 for i in range(500_000)}}).encode()
    with pytest.raises(AdapterError, match="it is not a JSON object"):
        read_config("an adapter", adapter)


@pytest.mark.slow
def test_the_files_of_the_largest_models_are_within_the_limits():
    vocabulary = {f"token of some length {i}": i for i in range(262_144)}
    merges = [[f"left{i}", f"right{i}"] for i in range(514_000)]
    tokenizer = json.dumps({"model": {"vocab": vocabulary, "merges": merges}}, indent=1).encode()
    index = {
        f"model.layers.{i // 400}.mlp.experts.{i % 400}.up_proj.weight": i for i in range(10**5)
    }
    entry = '"dtype":"BF16","shape":[18432,7168],"data_offsets":[123456789012,123456789013]'
    header = "{" + ",".join(f'"{name}":{{{entry}}}' for name in index) + "}"

    assert len(tokenizer) > 30e6
    assert len(read_json(tokenizer, MAX_TABLE_BYTES)["model"]["vocab"]) == 262_144
    assert len(header) > 10e6
    assert count_values(header) < MAX_JSON_VALUES / 3
    unigram = ",".join(['["a",-1.5]'] * 1_000_000)  # a vocabulary of a million tokens
    assert count_values(unigram) < MAX_JSON_VALUES


RECIPE = "base_model: a/b\nmodels: [{model: a/c}]\nmerge_method: ties\n"


def test_a_recipe_with_a_bomb_is_one_message_with_its_line():
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"{RECIPE}{ALIASES}evaluate: {{tasks: [x], chat_template: *a8}}", "r.yaml")

    assert str(caught.value) == (
        f"r.yaml:9: not valid YAML: {TOO_MANY}.\nFix the line, then run again."
    )


def test_a_recipe_with_thousands_of_bad_entries_lists_the_first():
    bad = "".join("  - {x: 1, y: 2}\n" for _ in range(4000))
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"base_model: a/b\nmodels:\n{bad}merge_method: ties\n", "r.yaml")

    first, _, *others, last = str(caught.value).splitlines()
    assert first == "r.yaml:3: `models[0].x`: unknown key `x`."
    assert others[-1] == "r.yaml:28: `models[25].x`: unknown key `x`."
    assert (len(others), last) == (50, "There are more problems.")


MANY = ", ".join(f"a/{n:x}" for n in range(6_000))
GIVEN = ", ".join(f"t{n:x}: *t" for n in range(6_000))


def test_a_recipe_of_very_many_models_and_tokens_is_read_in_linear_time():
    head, parameters = "base_model: a/b\nmerge_method: linear\n", "parameters: {weight: 1}\n"
    tokens = f"tokenizer: {{tokens: {{t: &t {{source: a/176f}}, {GIVEN}}}}}\n"
    recipe = parse_recipe(f"{head}{parameters}models: [{MANY}]\n{tokens}", "r.yaml")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"{head}models: [{', '.join(['a/b', *['a/c'] * 20_000])}]\n", "r.yaml")

    assert (len(recipe.models), len(recipe.tokenizer.tokens)) == (6_000, 6_001)
    assert str(caught.value) == (
        "r.yaml:3: `models`: `a/c` is listed twice.\nList each expert once, with its weight."
    )


@pytest.mark.parametrize("text", [text for text, _ in YAML.values()], ids=YAML)
def test_a_card_with_a_bomb_states_nothing(text, tmp_path, api):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{text}\n---\n", encoding="utf-8")

    found = model_facts(api, resolve_model(api, str(tmp_path)))

    assert (found.licence, found.languages) == (None, ())
    with pytest.raises(DocumentError):
        _card_metadata(f"---\n{text}\n---\n")


def test_a_card_of_empty_lines_is_read_in_linear_time():
    assert front_matter("---\n" + "\n" * 200_000) == ""
    assert front_matter("---\n" + "\n" * 1000 + "a: 1\n\n---\n# b\n---\n").strip() == "a: 1"


@pytest.mark.parametrize("text", [text for text, _ in YAML.values()], ids=YAML)
def test_a_task_file_with_a_bomb_is_refused(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")

    with pytest.raises(EvaluationError, match="is not valid YAML"):
        read_file(tmp_path / "a.yaml")


MODULE = "model.layers.0." + "a" * 40 + ".q_proj"
NESTED = ["(a+)+b", "(a|a)*b", "(.*)*b", "(.*.*.*.*.*.*)+b", "(a?){1000}b"]


def adapter(**settings):
    return read_config("it", json.dumps({"peft_type": "LORA", "r": 8, **settings}).encode())


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", NESTED)
def test_a_pattern_of_an_adapter_takes_linear_time(key, pattern):
    config = adapter(**{key: {pattern: 2}})

    assert (config.rank(MODULE), config.scale(MODULE)) == (8, 1.0)


def test_many_patterns_take_one_lookup_or_are_refused():
    names = {f"layers.{i}.q_proj": 3 for i in range(100_000)}
    anchored = {f"^model.layers.{i}.k_proj": 5 for i in range(1000)}
    config = adapter(rank_pattern={**names, **anchored, "q_proj": 4})

    assert {config.rank(f"model.layers.{i}.q_proj") for i in range(2000)} == {3}
    assert config.rank("model.q_proj") == 4
    assert config.rank("model.layers.9.k_proj") == 5
    with pytest.raises(AdapterError, match="more than 256 of its keys are regular expressions"):
        adapter(rank_pattern={f"a{i}|b": 3 for i in range(257)})


def test_thousands_of_groups_in_a_pattern_take_linear_time():
    config = adapter(rank_pattern={"(|a)*" * 2000: 2})

    assert {config.rank(f"model.layers.{i}.self_attn.q_proj") for i in range(200)} == {8}


def test_patterns_that_are_too_long_together_are_refused():
    with pytest.raises(AdapterError, match="its regular expressions are too long"):
        adapter(rank_pattern={"(a|.b)*c?" * 100 + str(i): 3 for i in range(200)})


@pytest.mark.parametrize("pattern", ["(?=a)b", r"(a)\1", "(" * 10_000, "((a{30}){30}){30}"])
def test_a_pattern_beyond_linear_time_is_refused(pattern):
    with pytest.raises(AdapterError, match="is not a regular expression that RE2 knows"):
        adapter(alpha_pattern={pattern: 2})


@pytest.mark.parametrize(
    ("patterns", "module", "rank"),
    [
        ({"q_proj": 2}, "model.layers.0.q_proj", 2),
        ({"q_proj": 2}, "q_proj", 2),
        ({"q_proj": 2}, "model.xq_proj", 8),
        ({"0.q_proj": 2}, "model.layers.10.q_proj", 8),
        ({r".*\.[01]\..*_proj": 3, "q_proj": 2}, "model.layers.0.q_proj", 3),
        ({"q_proj": 2, r".*\.[01]\..*_proj": 3}, "model.layers.0.q_proj", 2),
        ({"^model.layers.0.q_proj": 5}, "model.layers.0.q_proj", 5),
        ({"(q|k)_proj$": 6}, "model.layers.0.k_proj", 6),
        ({"k|q_proj": 7}, "model.k", 7),
        ({"^q_proj": 5}, "model.q_proj", 8),
        ({"q_proj$": 5}, "model.q_proj", 5),
        ({r"layers\.0\.q_proj": 5}, "model.layers.0.q_proj", 5),
        ({"layers...q_proj": 5}, "model.layers.0.q_proj", 5),
        ({"^model.q_proj": 5, "q_proj": 6, "q_proj$": 7}, "model.q_proj", 5),
        ({"q_proj": 6, "^model.q_proj": 5}, "model.q_proj", 6),
    ],
)
def test_patterns_match_as_in_peft(patterns, module, rank):
    assert adapter(rank_pattern=patterns).rank(module) == rank


def test_several_documents_share_the_limits_of_one():
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"name: x\n{RECIPE}---\n{RECIPE}{ALIASES}seed: *a8", "r.yaml")
    assert f"not valid YAML: {TOO_MANY}." in str(caught.value)

    with pytest.raises(RecipeError, match=r"found 101 documents, the limit is 100\."):
        parse_recipe("---\n".join([RECIPE] * 101), "r.yaml")


@pytest.mark.parametrize("numbers", [(100,), (10, 10)])
def test_merges_inside_a_recipe_have_the_limit_of_documents(numbers):
    merge = {"merge_method": "linear", "models": ["a/b"]}
    whole = merge
    for n in numbers:
        whole = merge | {"intermediate": [whole] * n}

    with pytest.raises(RecipeError, match=r"it has 1\d1 merges, the limit is 100"):
        parse_recipe(json.dumps(whole), "r.yaml")
