"""Embedding models are scored by mteb, from the recipe to scores, gate and card."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard
from scipy.stats import spearmanr
from sentence_models import embedder
from statistical_merges import Recorder

import lewis_hub
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import CheckFailedError, EvaluationError, RecipeError
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.embedding_tasks import load_embedding_tasks
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.evaluate import Candidate, score

pytestmark = [  # mteb brings large packages, which stay in the process
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("mteb"), reason="mteb is not installed"),
]

WORDS = [
    "cat",
    "dog",
    "sofa",
    "couch",
    "rain",
    "snow",
    "house",
    "garden",
    "bread",
    "water",
    "stone",
    "river",
]
PAIRS = [
    {"sentence1": f"a {one} here", "sentence2": f"{other} {one}s there", "score": float(i % 6)}
    for i, (one, other) in enumerate(zip(WORDS, reversed(WORDS), strict=True))
]
CORPUS = [
    {"_id": f"d{i}", "title": "", "text": f"All about {word}."} for i, word in enumerate(WORDS)
]
QUERIES = [{"_id": f"q{i}", "text": f"What is a {word}?"} for i, word in enumerate(WORDS[:6])]
RELEVANT = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(6)]
CONFIGS = {"corpus": CORPUS, "queries": QUERIES, "default": RELEVANT}
TASKS = {
    "pairs": ("STS", "cosine_spearman", "zoo/pairs"),
    "search": ("Retrieval", "ndcg_at_10", "zoo/search"),
}
STS, GAIN = "cosine_spearman,test", "ndcg_at_10,test"


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def put(api, repo, files):
    api.create_repo(repo, repo_type="dataset", exist_ok=True)
    for path, content in files.items():
        api.upload_file(
            repo_id=repo, repo_type="dataset", path_in_repo=path, path_or_fileobj=content
        )


@pytest.fixture
def folder(api, tmp_path):
    """A base, an expert and own task files; the data of the tasks is on the Hub."""
    put(api, "zoo/pairs", {"test.jsonl": lines(PAIRS)})
    listed = [
        {"config_name": name, "data_files": [{"split": "test", "path": f"{name}.jsonl"}]}
        for name in CONFIGS
    ]
    card = f"---\n{yaml.safe_dump({'configs': listed})}---\n".encode()
    data = {f"{name}.jsonl": lines(rows) for name, rows in CONFIGS.items()}
    put(api, "zoo/search", {"README.md": card, **data})
    (tmp_path / "tasks").mkdir()
    for name, (kind, metric, repo) in TASKS.items():
        task = {"name": name, "type": kind, "main_score": metric, "dataset": {"path": repo}}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    embedder(tmp_path / "base", 0)
    embedder(tmp_path / "expert", 1)
    return tmp_path


def recipe(folder, base="base", **evaluate):
    document = {
        "base_model": str(folder / base),
        "models": [{"model": str(folder / "expert"), "parameters": {"weight": 0.5}}],
        "merge_method": "task_arithmetic",
        "evaluate": {"backend": "mteb", "tasks": [*TASKS], "include": "tasks", **evaluate},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    return lewis_hub.read_recipe(folder / "recipe.yaml")


def embeddings(model, texts):
    found = np.stack(model.encode(texts)).astype(np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def gain(model):
    """The mean of 1 / log2(rank + 1), as each query has one right document of the first ten."""
    documents = embeddings(model, [f" {one['text']}".strip() for one in CORPUS])
    gains = []
    for number, query in enumerate(embeddings(model, [one["text"] for one in QUERIES])):
        similar = documents @ query
        rank = 1 + int((similar > similar[number]).sum())
        gains.append(1 / math.log2(rank + 1) if rank <= 10 else 0.0)
    return sum(gains) / len(gains)


def correlation(model):
    first, second = (embeddings(model, [one[f"sentence{n}"] for one in PAIRS]) for n in (1, 2))
    return spearmanr([one["score"] for one in PAIRS], (first * second).sum(axis=1)).statistic


def test_a_merge_of_embedding_models_is_scored_judged_and_described(folder):
    gate = {"task": "pairs", "metric": STS, "not_worse_than": ["base"], "tolerance": 2.0}
    asked = recipe(folder, compare=["base", "experts"], gate=gate)

    merged = lewis_hub.merge_models(asked, folder / "out")

    scores = json.loads((merged.output / "lewis" / "scores.json").read_text())
    assert scores["settings"] == {"backend": "mteb"}
    models = {
        label: place
        for label, place in zip(
            scores["tasks"]["pairs"]["models"],
            (folder / "base", folder / "expert", merged.output),
            strict=True,
        )
    }
    assert [*models] == ["base", f"expert:{folder / 'expert'}", "merged"]
    from sentence_transformers import SentenceTransformer

    for label, place in models.items():
        model = SentenceTransformer(str(place), device="cpu")
        found = {task: scores["tasks"][task]["models"][label] for task in TASKS}
        assert found["pairs"][STS]["value"] == pytest.approx(correlation(model), abs=1e-6)
        assert found["search"][GAIN]["value"] == pytest.approx(gain(model), abs=1e-6)
        assert found["search"][GAIN]["stderr"] > 0
    assert [scores["tasks"][task]["n"] for task in TASKS] == [12, 6]
    assert [test["against"] for test in scores["tasks"]["pairs"]["paired"]] == [*models][:2]
    assert merged.gate.checks[0].ci95 is not None
    assert not merged.gate.missed
    card = ModelCard.load(merged.output / "README.md")
    results = {one.dataset_name: one for one in card.data.eval_results}
    assert {name: one.dataset_type for name, one in results.items()} == {
        "pairs": "zoo/pairs",
        "search": "zoo/search",
    }
    assert results["pairs"].task_type == "sentence-similarity"
    assert len(results["pairs"].dataset_revision) == 40
    assert "This merge was not scored" not in card.text
    assert "backend mteb" in card.text
    again = merged.output / "lewis"
    assert yaml.safe_load((again / "tasks" / "pairs.yaml").read_text())["type"] == "STS"
    assert lewis_hub.merge_models(asked, folder / "out").status == "unchanged"
    own = asked.evaluate.model_copy(update={"include": str(folder / "tasks")})
    [alone] = lewis_hub.evaluate_model(merged.output, own).tasks["search"].models.values()
    assert alone[GAIN].value == scores["tasks"]["search"]["models"]["merged"][GAIN]["value"]


def test_one_model_is_scored_on_the_command_line(folder, monkeypatch):
    monkeypatch.chdir(folder)
    words = ["evaluate", "expert", "--task", "search", "--include", "tasks", "--backend", "mteb"]

    done = CliRunner().invoke(cli, [*words, "--json"])

    assert done.exit_code == 0, done.output
    [found] = json.loads(done.stdout)["tasks"]["search"]["models"].values()
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder / "expert"), device="cpu")
    assert found[GAIN]["value"] == pytest.approx(gain(model), abs=1e-6)


def test_all_modules_of_a_model_on_the_hub_are_fetched(api, folder):
    embedder(folder / "other", 1)
    api.create_repo("zoo/other")
    api.upload_folder(repo_id="zoo/other", folder_path=folder / "other")
    asked = lewis_hub.Evaluation(tasks=("pairs",), include=str(folder / "tasks"), backend="mteb")

    fetched, local = (
        lewis_hub.evaluate_model(name, asked).tasks["pairs"].models
        for name in ("zoo/other", str(folder / "other"))
    )

    assert [one[STS].value for one in fetched.values()] == [
        one[STS].value for one in local.values()
    ]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (lines([*PAIRS, {**PAIRS[0], "sentence1": None}]), "mteb could not score the model: "),
        (lines(PAIRS) + b'{"sentence1": ', "its data `zoo/pairs` cannot be loaded: "),
    ],
)
def test_data_that_mteb_cannot_read_is_one_message(api, folder, rows, problem):
    put(api, "zoo/pairs", {"test.jsonl": rows})
    asked = recipe(folder, tasks=["pairs"]).evaluate
    own = asked.model_copy(update={"include": str(folder / "tasks")})

    with pytest.raises(EvaluationError, match=f"^pairs: {problem}"):
        lewis_hub.evaluate_model(str(folder / "base"), own)


def problem(asked):
    [found] = lewis_hub.check(asked).problems
    return found


def test_check_refuses_what_mteb_cannot_score(folder):
    assert lewis_hub.check(recipe(folder)).problems == ()
    assert problem(recipe(folder, tasks=["STSBenchmrk"])).startswith(
        "STSBenchmrk: mteb has no task of this name.\nDid you mean `STSBenchmark"
    )
    gate = {"task": "pairs", "metric": "pearson,test", "not_worse_than": ["base"]}
    assert problem(recipe(folder, gate=gate)) == (
        "pairs: it has no metric `pearson,test`.\nDid you mean `cosine_spearman,test`? "
        "It has `cosine_spearman,test`."
    )
    assert problem(recipe(folder, tasks=["CQADupstackRetrieval"])).startswith(
        "CQADupstackRetrieval: it is a group of tasks.\nName some of them: CQADupstackAndroid"
    )
    (folder / "tasks" / "pairs.yaml").write_text("{name: pairs, type: Riddle}")
    assert "`type` is 'Riddle', expected one of Classification, Clustering" in problem(
        recipe(folder, tasks=["pairs"])
    )


def test_a_language_model_gives_no_embeddings(folder):
    asked = recipe(folder)
    text = "{base_model: zoo/base, models: [zoo/expert-reverse], merge_method: linear}"
    scored = parse_recipe(text, "r.yaml").model_copy(update={"evaluate": asked.evaluate})
    language = scored.placed_in(folder)

    with pytest.raises(CheckFailedError) as caught:
        lewis_hub.merge_models(language, folder / "out")
    alone = asked.evaluate.model_copy(update={"include": str(folder / "tasks")})
    with pytest.raises(EvaluationError) as single:
        lewis_hub.evaluate_model(zoo_folder() / "base", alone)

    named = json.loads((zoo_folder() / "base" / "config.json").read_text())["architectures"][0]
    said = (
        f"is a {named}, and mteb runs only models that give embeddings.\n"
        "Score it by lm-eval: leave `backend` out, and name its tasks."
    )
    assert f"evaluate: zoo/base: {said}" in str(caught.value)
    assert str(single.value) == f"{zoo_folder() / 'base'}: {said}"


def test_what_an_embedding_model_may_not_say_is_refused_before_anything_is_merged(folder):
    """The merge was made, and scoring it took all memory, again at each rerun."""
    wrong = {"processing_kwargs": {"text": {"pad_to_multiple_of": 20_000_000}}}
    (folder / "base" / "sentence_bert_config.json").write_text(json.dumps(wrong))
    asked = recipe(folder)
    told = (
        f"{folder / 'base'}: sentence_bert_config.json: "
        "`processing_kwargs.text.pad_to_multiple_of` is 20000000, expected a whole number from 0 "
        "to 1,024.\nRemove it in a copy of the model: it is loaded and run by its own files and "
        "sizes only."
    )

    assert problem(asked) == told
    with pytest.raises(CheckFailedError) as caught:
        lewis_hub.merge_models(asked, folder / "out")
    alone = asked.evaluate.model_copy(update={"include": str(folder / "tasks")})
    with pytest.raises(EvaluationError) as single:
        lewis_hub.evaluate_model(folder / "base", alone)

    assert told in str(caught.value)
    assert not (folder / "out.partial").exists()
    assert str(single.value) == told


def test_a_tokenizer_that_pads_to_any_length_is_a_problem_of_check(folder):
    file = folder / "base" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_to_multiple_of": 20_000_000}))

    assert problem(recipe(folder)) == (
        f"{folder / 'base'}: tokenizer_config.json: it pads each text to a multiple of 20,000,000 "
        "tokens, the limit is 1,024.\nUse a copy of the model without this padding."
    )


def test_rivals_are_checked_as_the_merge_is(folder):
    listed = [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}] * 101
    (folder / "expert" / "modules.json").write_text(json.dumps(listed))
    told = f"{folder / 'expert'}: modules.json: it lists more than 100 modules."

    assert problem(recipe(folder, compare=["experts"])).startswith(told)
    assert lewis_hub.check(recipe(folder, compare=["base"])).problems == ()


def test_settings_of_text_generation_do_not_apply(folder):
    for key, value in {"limit": 3, "num_fewshot": 2, "chat_template": True}.items():
        with pytest.raises(RecipeError, match=f"`{key}` does not apply to `backend: mteb`"):
            recipe(folder, **{key: value})


@pytest.mark.parametrize("place", ["tasks/rows", "rows"])
def test_results_on_local_rows_that_changed_are_not_used_again(folder, monkeypatch, place):
    monkeypatch.chdir(folder)
    (folder / place).mkdir()
    task = {
        "name": "own",
        "type": "STS",
        "dataset": {"path": place},
        "main_score": "cosine_spearman",
    }
    (folder / "tasks" / "own.yaml").write_text(yaml.safe_dump(task))
    selection = TaskSelection(("own",), folder / "tasks", library="mteb")

    def scored(rows):
        (folder / place / "test.jsonl").write_bytes(lines(rows))
        loaded, told = load_embedding_tasks(selection, {}), Recorder()
        how = EvaluationSettings(backend="mteb")
        one = Candidate("base", "sha256:0", folder / "base")
        found = score([one], loaded, None, how, folder / "kept", told)
        return found["base"].tasks["own"].documents, told.totals["Evaluating"]

    first, again = scored(PAIRS), scored(PAIRS)
    other = scored([*PAIRS[:-1], {**PAIRS[-1], "sentence1": "another"}])

    assert (first[1], again[1], other[1]) == (12, 0, 12)
    assert first[0] == again[0] == (*other[0][:-1], first[0][-1])
    assert first[0] != other[0]
