"""`verify`: a merge's files against its lock, here and on the Hub."""

import json
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from zoo_hub import put_zoo

import lewis_hub
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import LewisHubError, OutputError
from lewis_hub.files import sha256_of
from lewis_hub.hub.source import cache_root
from lewis_hub.recipe.reference import ModelReference
from lewis_hub.recipe.schema import Publishing
from lewis_hub.report.lock import Lock, OutputFile, provenance
from lewis_hub.workflow.snapshot import RecipeSnapshot
from lewis_hub.workflow.verify import compare_origins, weight_files_within_tolerance

OTHER = {"model.safetensors": f"sha256:{0:064}"}
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A merge of local folders, so that it can be made again without a Hub."""
    folder = tmp_path_factory.mktemp("verify")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"base_model: {zoo_folder() / 'base'}\nmerge_method: dare_ties\ndtype: bfloat16\n"
        f"models: [{{model: {zoo_folder() / 'expert-reverse'}, parameters: {{density: 0.4}}}}]\n"
    )
    return lewis_hub.merge_models(lewis_hub.read_recipe(recipe), folder / "merged").output


@pytest.fixture
def merged(made, tmp_path):
    return shutil.copytree(made, tmp_path / "merged")


def verify(target, *words):
    done = CliRunner().invoke(cli, ["verify", str(target), "--json", *words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, json.loads(done.stdout)


def test_what_a_merge_left_is_verified(merged):
    code, told = verify(merged)

    assert (code, told["status"], told["problems"]) == (0, "verified", [])
    assert told["n_files"] == len(json.loads((merged / "lewis/lock.json").read_text())["outputs"])


def test_the_merge_made_again_has_the_same_weights(merged):
    code, told = verify(merged, "--rebuild")

    assert (code, told["status"], told["rebuilt"]) == (0, "verified", True)


def forge(merged, files):
    """Other files, with a lock and a provenance that fit them."""
    true = Lock.from_json((merged / "lewis/lock.json").read_text())
    told = {}
    for name, content in files.items():
        (merged / name).write_bytes(content)
        told[name] = OutputFile(sha256_of(merged / name), len(content))
    forged = replace(true, outputs=true.outputs | told)
    (merged / "lewis/lock.json").write_text(forged.to_json())
    (merged / "lewis/provenance.json").write_text(provenance(forged, NOW, NOW))


def put_lock(merged, lock, text=None):
    """A lock, with a provenance that fits it, and with its recipe or another `text` beside it."""
    recipe = merged / "lewis/recipe.yaml"
    recipe.write_text(text or RecipeSnapshot(lock.recipe, {}).to_yaml())
    file = OutputFile(sha256_of(recipe), recipe.stat().st_size)
    lock = replace(lock, outputs={**lock.outputs, "lewis/recipe.yaml": file})
    (merged / "lewis/lock.json").write_text(lock.to_json())
    (merged / "lewis/provenance.json").write_text(provenance(lock, NOW, NOW))


@pytest.mark.slow
def test_a_rebuild_uses_no_measurement_that_is_in_the_folder(tmp_path):
    """Else made-up measurements would give weights that the recipe does not give."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base_model: {zoo_folder() / 'base'}\nmerge_method: ties\nguide: {{name: magnitude}}\n"
        f"models: [{zoo_folder() / 'expert-reverse'}, {zoo_folder() / 'expert-cipher'}]\n"
    )
    true = lewis_hub.merge_models(lewis_hub.read_recipe(recipe), tmp_path / "true").output
    profile = json.loads((true / "lewis/importance.json").read_text())
    for source in profile["sources"]:
        names = list(source["modules"])
        source["modules"] = dict(zip(names, reversed(source["modules"].values()), strict=True))
    made_up = tmp_path / "importance" / "importance.json"
    made_up.parent.mkdir()
    made_up.write_text(json.dumps(profile))
    forged = lewis_hub.merge_models(lewis_hub.read_recipe(recipe), tmp_path / "forged").output
    place = forged / "lewis/importance/importance.json"
    place.parent.mkdir()
    shutil.copy(made_up, place)
    shutil.rmtree(made_up.parent)
    lock = Lock.from_json((forged / "lewis/lock.json").read_text())
    planted = OutputFile(sha256_of(place), place.stat().st_size)
    outputs = lock.outputs | {"lewis/importance/importance.json": planted}
    put_lock(forged, replace(lock, outputs=outputs))

    assert verify(forged)[1]["problems"] == []
    code, told = verify(forged, "--rebuild")

    assert (code, told["status"]) == (1, "failed")
    [problem] = told["problems"]
    assert problem.startswith("model.safetensors: made again it has sha256 ")


@pytest.mark.parametrize("inside", [True, False])
def test_a_rebuild_takes_no_source_from_the_folder_itself(merged, monkeypatch, inside):
    """Else a planted folder of its name would pass for a model on the Hub."""
    place = merged / ("lewis/org/base" if inside else "org/base")
    shutil.copytree(zoo_folder() / "base", place)
    lock = Lock.from_json((merged / "lewis/lock.json").read_text())
    planted = {
        path.relative_to(merged).as_posix(): OutputFile(sha256_of(path), path.stat().st_size)
        for path in place.iterdir()
    }
    recipe = {**lock.recipe, "base_model": "org/base"}
    base, *others = lock.inputs
    inputs = (replace(base, name="org/base", commit_sha="a" * 40), *others)
    outputs = lock.outputs | planted
    put_lock(merged, replace(lock, recipe=recipe, inputs=inputs, outputs=outputs))
    monkeypatch.chdir(merged)

    assert verify(merged)[1]["problems"] == []
    with pytest.raises(OutputError) as caught:
        lewis_hub.verify(ModelReference(name=str(merged)), rebuild=True)

    assert str(caught.value) == (
        f"{merged}: its source `org/base` is a file or folder in the merge itself.\n"
        "Move it out of there, if it is yours; else do not trust this merge."
    )


def test_a_folder_of_the_name_of_a_repo_is_not_the_repo(merged, tmp_path, monkeypatch):
    """A lock that states a commit is not confirmed by files without one."""
    shutil.copytree(zoo_folder() / "base", tmp_path / "org/base")
    lock = Lock.from_json((merged / "lewis/lock.json").read_text())
    base, *others = lock.inputs
    inputs = (replace(base, name="org/base", commit_sha="a" * 40), *others)
    put_lock(merged, replace(lock, recipe={**lock.recipe, "base_model": "org/base"}, inputs=inputs))
    monkeypatch.chdir(tmp_path)

    code, told = verify(merged, "--rebuild")

    assert (code, told["problems"]) == (
        1,
        ["lewis/lock.json: its sources is not what its recipe leads to."],
    )


def test_a_merge_on_the_way_does_not_pass_for_a_repo_of_its_name(tmp_path):
    zoo, recipe = zoo_folder(), tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: org/model\nmodels: [{zoo / 'expert-reverse'}]\nmerge_method: linear\n---\n"
        f"models: [org/model, {zoo / 'base'}]\nmerge_method: linear\n"
    )
    merged = lewis_hub.merge_models(lewis_hub.read_recipe(recipe), tmp_path / "merged").output
    assert verify(merged, "--rebuild")[1]["problems"] == []
    lock = Lock.from_json((merged / "lewis/lock.json").read_text())
    first, *others = lock.inputs
    forgeries = (
        replace(first, commit_sha="a" * 40),
        replace(first, files={path: f"sha256:{0:064}" for path in first.files}),
    )
    for forged in forgeries:
        put_lock(merged, replace(lock, inputs=(forged, *others)))

        assert verify(merged)[1]["problems"] == []
        assert verify(merged, "--rebuild")[1]["problems"] == [
            "lewis/lock.json: its sources is not what its recipe leads to."
        ]


@pytest.mark.parametrize("section", ["evaluate", "calibration"])
def test_a_rebuild_runs_no_code_of_a_merge_on_the_way(merged, section):
    tasks, ran = merged / "lewis/tasks", merged.parent / "ran"
    tasks.mkdir()
    (tasks / "own.py").write_text(f"open({str(ran)!r}, 'w')\ndef process(docs): return docs\n")
    data = zoo_folder() / "data/reverse/test.jsonl"
    (tasks / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\nprocess_docs: !function own.process\ndoc_to_text: '{{question}}'\n"
        "doc_to_target: '{{answer}}'\n"
    )
    lock = Lock.from_json((merged / "lewis/lock.json").read_text())
    part = {k: v for k, v in lock.recipe.items() if k != "dtype"} | {"name": "first"}
    if section == "evaluate":
        part["evaluate"] = {"tasks": ["own"], "include": "tasks", "limit": 1, "compare": []}
    else:
        own = {"task": "own", "include": "tasks", "split": "test", "samples": 2}
        part |= {"merge_method": "regmean", "calibration": {**own, "allow_overlap": True}}
        part["models"] = [{**part["models"][0], "parameters": {}}]
    recipe = {**lock.recipe, "models": [{"model": "first"}], "intermediate": [part]}
    put_lock(merged, replace(lock, recipe=recipe))

    with pytest.raises(LewisHubError, match=r"only a step to another merge|own task files"):
        lewis_hub.verify(ModelReference(name=str(merged)), rebuild=True)

    assert not ran.exists()


def test_weights_that_another_recipe_makes_are_found_by_making_them_again(merged):
    """Whoever swaps weights and forges the lock and the provenance is found by --rebuild."""
    other = zoo_folder() / "expert-cipher" / "model.safetensors"
    forge(merged, {"model.safetensors": other.read_bytes()})

    assert verify(merged)[0] == 0
    code, told = verify(merged, "--rebuild")
    assert code == 1
    (problem,) = told["problems"]
    assert problem.startswith("model.safetensors: made again it has sha256 ")


def test_files_that_a_link_to_their_folder_gives_another_name_are_found(merged):
    """transformers reads the chat templates in a folder of this name."""
    (merged / "lewis/t").mkdir()
    forge(merged, {"lewis/t/default.jinja": b"another template"})
    (merged / "additional_chat_templates").symlink_to("lewis/t")

    code, told = verify(merged, "--rebuild")

    assert code == 1
    assert told["problems"] == ["additional_chat_templates: it is a link to a folder."]


def test_code_that_no_merge_makes_is_found_by_making_it_again(merged):
    config = json.loads((merged / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    forge(
        merged,
        {"config.json": json.dumps(config).encode(), "modeling_mine.py": b"import os\n"},
    )

    assert verify(merged)[0] == 0
    code, told = verify(merged, "--rebuild")
    assert code == 1
    of_config, of_code = told["problems"]
    assert of_config.startswith("config.json: made again it has sha256 ")
    assert of_code == "modeling_mine.py: the merge that was made again lacks it."


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("sources", lambda one: {"inputs": [replace(one.inputs[0], name="meta/good")]}),
        (
            "sources",
            lambda one: {"inputs": [replace(source, files=OTHER) for source in one.inputs]},
        ),
        ("method", lambda _: {"method": "slerp"}),
        ("guide", lambda _: {"guide": "lewis"}),
        ("seed", lambda one: {"seed": one.seed + 1}),
    ],
)
def test_an_origin_that_the_recipe_does_not_have_is_found_by_making_it_again(merged, what, changes):
    """The weights are those of the recipe, but the lock claims other sources or settings."""
    true = Lock.from_json((merged / "lewis/lock.json").read_text())
    forged = replace(true, **changes(true))
    (merged / "lewis/lock.json").write_text(forged.to_json())
    (merged / "lewis/provenance.json").write_text(provenance(forged, NOW, NOW))

    assert verify(merged)[0] == 0
    code, told = verify(merged, "--rebuild")
    assert (code, told["problems"]) == (
        1,
        [f"lewis/lock.json: its {what} is not what its recipe leads to."],
    )


def test_a_lock_pads_embeddings_no_more_than_a_recipe(merged):
    true = Lock.from_json((merged / "lewis/lock.json").read_text())
    padded = {"source": "base", "pad_to_multiple_of": 10**9}
    forged = replace(true, recipe={**true.recipe, "tokenizer": padded})
    (merged / "lewis/lock.json").write_text(forged.to_json())

    with pytest.raises(LewisHubError, match=r"pad_to_multiple_of.*less than or equal to 65536"):
        lewis_hub.verify(ModelReference(name=str(merged)), rebuild=True)


def test_calibration_data_that_the_recipe_does_not_have_are_found_by_making_it_again(tmp_path):
    """Only the commit and the files were compared: others could be named, and other rows."""
    texts, recipe = tmp_path / "texts.jsonl", tmp_path / "recipe.yaml"
    texts.write_text("".join(f'{{"text": "reverse abc{n}"}}\n' for n in range(4)))
    recipe.write_text(
        f"base_model: {zoo_folder() / 'base'}\nmerge_method: regmean\n"
        f"models: [{zoo_folder() / 'expert-reverse'}]\n"
        f"calibration: {{dataset: {texts}, text: '{{text}}', samples: 2}}\n"
    )
    merged = lewis_hub.merge_models(lewis_hub.read_recipe(recipe), tmp_path / "merged").output
    assert verify(merged, "--rebuild")[1]["problems"] == []
    lock = Lock.from_json((merged / "lewis/lock.json").read_text())
    [data] = lock.calibration
    names = ({"name": "meta/good"}, {"name": "task gsm8k"})
    forgeries = [replace(data, **one) for one in (*names, {"config": "main"}, {"split": "test"})]
    forgeries.append(replace(data, rows=tuple({0, 1, 2, 3}.difference(data.rows))))
    for forged in forgeries:
        found = compare_origins(replace(lock, calibration=(forged,)), lock)

        assert found == ("lewis/lock.json: its calibration data is not what its recipe leads to.",)
    put_lock(merged, replace(lock, calibration=(forged,)))
    assert verify(merged, "--rebuild")[1]["problems"] == [*found]


def test_a_recipe_that_is_not_that_of_the_lock_is_named(merged):
    """Whoever merges by it would make another model than the one that was verified."""
    true = Lock.from_json((merged / "lewis/lock.json").read_text())
    other = (merged / "lewis/recipe.yaml").read_text().replace("0.4", "0.5")
    named = ["lewis/recipe.yaml: it is not that of the lock."]
    for text, problems in ((other, named), ("{", named), (json.dumps(dict(true.recipe)), [])):
        put_lock(merged, true, text)

        assert verify(merged)[1]["problems"] == problems


def test_a_merge_that_lacks_a_file_is_not_taken_for_finished(merged):
    recipe = lewis_hub.read_recipe(merged / "lewis" / "recipe.yaml")
    weights = merged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])

    for _ in range(2):
        with pytest.raises(OutputError, match="it exists and holds something else than this merge"):
            lewis_hub.merge_models(recipe, merged)
        weights.unlink(missing_ok=True)


@settings(deadline=None)
@given(st.data())
def test_a_changed_byte_anywhere_is_found_and_named(made, data):
    lock = Lock.from_json((made / "lewis/lock.json").read_text())
    names = ["lewis/lock.json", "lewis/provenance.json", *lock.outputs]
    file = made / data.draw(st.sampled_from(names))
    true = file.read_bytes()
    place = data.draw(st.integers(0, len(true) - 1))
    assume(not any(start <= place < stop for start, stop in dates(file, true)))
    changed = bytearray(true)
    changed[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(changed)
    try:
        problems = lewis_hub.verify(ModelReference(name=str(made))).problems
    except OutputError as error:  # of the lock, without which nothing can be held against it
        problems = (str(error).removeprefix(f"{made}: "),)
    finally:
        file.write_bytes(true)

    assert [problem.partition(": ")[0] for problem in problems] == [str(file.relative_to(made))]


def dates(file, content):
    """Where a provenance says when: that follows from nothing, so only a signature fixes it."""
    if file.name != "provenance.json":
        return []
    return [found.span() for found in re.finditer(rb"\d{4}-\d\d-\d\dT[\d:+]+", content)]


def test_missing_shortened_and_added_files_are_named(merged):
    (merged / "tokenizer.json").unlink()
    config = merged / "config.json"
    n_bytes = config.stat().st_size
    config.write_text("{}")
    (merged / "modeling.py").write_text("import os")

    assert verify(merged)[1]["problems"] == [
        f"config.json: it has 2 bytes, the lock says {n_bytes:,}.",
        "tokenizer.json: it is missing.",
        "modeling.py: it is not part of the merge.",
    ]


def test_what_only_tells_of_a_merge_may_be_changed_and_added(hub, merged, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    for name in ("README.md", "lewis/report.html", "lewis/cost.json"):
        (merged / name).write_text("---\nlicense: mit\n---\nchanged")
    (merged / ".eval_results").mkdir()
    (merged / ".eval_results" / "gsm8k.yaml").write_text("[]")
    assert verify(merged)[1]["problems"] == []
    api, repo = hub.api(), f"{hub.user}/merge"
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=merged)

    verdict = lewis_hub.verify(ModelReference(name=repo))

    assert "lewis/report.html" not in verdict.lock.outputs
    assert api.file_exists(repo, ".eval_results/gsm8k.yaml")
    assert verdict.problems == ()


def test_the_card_is_its_owner_s_to_change_and_pictures_may_be_added(merged):
    (merged / "README.md").write_text("# Mine\n")
    (merged / "images").mkdir()
    (merged / "images" / "logo.PNG").write_bytes(b"\x89PNG")

    assert verify(merged)[1]["problems"] == []


def test_a_merge_without_its_provenance_says_so(merged):
    (merged / "lewis" / "provenance.json").unlink()

    assert verify(merged)[1]["problems"] == ["lewis/provenance.json: it is missing."]


def test_a_changed_lock_is_named(merged):
    lock = merged / "lewis" / "lock.json"
    lock.write_text(lock.read_text().replace('"seed": 42', '"seed": 43'))

    with pytest.raises(OutputError) as raised:
        verify(merged)

    assert f"{merged}: lewis/lock.json: it states the digest " in str(raised.value)


def test_a_folder_without_a_lock_is_no_merge():
    with pytest.raises(OutputError) as raised:
        verify(zoo_folder() / "base")

    assert str(raised.value) == (
        f"{zoo_folder() / 'base'}: it has no lewis/lock.json, so lewis-hub did not make this "
        "merge.\nName a folder or repo that `merge` made."
    )


def test_a_published_merge_is_verified_without_its_weights(hub, merged, monkeypatch):
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    target = lewis_hub.open_target(Publishing(repo=f"{hub.user}/merge"))
    lewis_hub.publish(merged, target)

    verdict = lewis_hub.verify(ModelReference(name=f"{hub.user}/merge"))

    assert verdict.problems == ()
    blobs = [path for path in cache_root().rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in blobs) < 100_000


@pytest.mark.slow  # calibrates, twice
def test_a_published_merge_is_made_again_from_its_lock_at_any_revision(hub, tmp_path, monkeypatch):
    """Guided, calibrated on the Hub's data: all that fixes it comes from the lock."""
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    monkeypatch.chdir(tmp_path)
    text = (zoo_folder() / "recipe.yaml").read_text().replace("samples: 128", "samples: 4")
    repo = f"{hub.user}/merge"
    publish = f"publish: {{repo: {repo}, license: apache-2.0, tag: v1}}\n"
    (tmp_path / "recipe.yaml").write_text(text.partition("evaluate:")[0] + publish)
    done = CliRunner().invoke(cli, ["merge", "--push", "-q"])
    assert done.exit_code == 0, done.output
    weights = (zoo_folder() / "base" / "model.safetensors").read_bytes()
    hub.api().upload_file(repo_id=repo, path_or_fileobj=weights, path_in_repo="model.safetensors")
    shutil.rmtree(tmp_path / "merged")

    code, told = verify(f"{repo}@v1", "--rebuild")
    assert (code, told["status"], told["rebuilt"]) == (0, "verified", True)
    code, told = verify(repo)
    assert code == 1
    assert told["problems"][0].startswith("model.safetensors: it")


def test_diff_tells_what_two_merges_do_not_share(made, tmp_path):
    recipe = lewis_hub.read_recipe(made.parent / "recipe.yaml")
    other = lewis_hub.merge_models(recipe.model_copy(update={"seed": 7}), tmp_path / "other")

    told = CliRunner().invoke(cli, ["diff", str(made), str(other.output)])
    same = CliRunner().invoke(cli, ["diff", str(made), str(made), "--json"])

    assert told.stdout == "seed: 42 → 7\nweights: 1 of 1 files differ\n"
    assert json.loads(same.stdout) == {"status": "same", "differences": []}


def test_diff_of_two_recipes_asks_nobody(made, tmp_path):
    recipe = made.parent / "recipe.yaml"
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace("density: 0.4", "density: 0.5"))

    told = CliRunner().invoke(cli, ["diff", str(recipe), str(other)])

    assert told.stdout == "models[0].parameters.density: 0.4 → 0.5\n"


def test_diff_of_a_merge_and_a_recipe_tells_what_merging_it_now_would_change(made, tmp_path):
    recipe = made.parent / "recipe.yaml"
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text() + "seed: 7\n")

    same = CliRunner().invoke(cli, ["diff", str(made), str(recipe)])
    told = CliRunner().invoke(cli, ["diff", str(other), str(made)])

    assert same.stdout == "Nothing differs.\n"
    assert told.stdout == "seed: 7 → 42\n"


def test_the_schema_command_prints_either_schema():
    titles = [
        json.loads(CliRunner().invoke(cli, ["schema", *words]).stdout)["title"]
        for words in ([], ["recipe"], ["lock"])
    ]

    assert titles == ["Recipe", "Recipe", "Lock"]


def test_weights_by_statistics_may_differ_by_rounding_and_others_by_nothing(tmp_path):
    torch.manual_seed(0)
    matrix, steps = torch.randn(64, 64), torch.arange(4) + (1 << 24)  # float32 rounds these
    other = matrix + 1e-6 * matrix.norm() / 64 * torch.randn(64, 64)
    for name, tensors in {
        "stored": {"a.weight": matrix, "steps": steps},
        "rounded": {"a.weight": other, "steps": steps},
        "swapped": {"a.weight": matrix.flip(0), "steps": steps},
        "counted": {"a.weight": matrix, "steps": steps + 1},
        "shaped": {"a.weight": matrix, "steps": steps.reshape(2, 2)},
    }.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")

    alike = {
        name: weight_files_within_tolerance(tmp_path / "stored", tmp_path / name)
        for name in ("stored", "rounded", "swapped", "counted", "shaped")
    }

    whole, none = {"model.safetensors"}, dict.fromkeys(("swapped", "counted", "shaped"), set())
    assert alike == {"stored": whole, "rounded": whole, **none}


def test_a_copy_of_a_tensor_that_the_index_does_not_name_is_no_rounding(tmp_path):
    """transformers loads every tensor of every shard, and of two copies the later one."""
    one, two = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    first, second = {"a.weight": torch.ones(2, 2)}, {"b.weight": torch.ones(2, 2)}
    index = json.dumps({"weight_map": {"a.weight": one, "b.weight": two}})
    for name, last in {
        "stored": second | {"a.weight": torch.full((2, 2), 7.0)},
        "rebuilt": second,
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors.index.json").write_text(index)
        save_file(first, tmp_path / name / one)
        save_file(last, tmp_path / name / two)

    alike = weight_files_within_tolerance(tmp_path / "stored", tmp_path / "rebuilt")

    assert alike == {one}
