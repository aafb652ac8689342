"""What a merge carries: what was pinned and belongs to a model, whatever else lies on the disk."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from zoo_hub import put_zoo

from lewis_hub import pipeline
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.display import Silent
from lewis_hub.errors import CheckFailedError, EvaluationError, RecipeError, SourceError
from lewis_hub.evaluate.benchmarks import own_files
from lewis_hub.files import visible_files
from lewis_hub.hub.source import cache_root
from lewis_hub.recipe.read import read_recipe
from lewis_hub.workflow.resolve import hub_api, resolve_inputs
from lewis_hub.workflow.snapshot import snapshot

RECIPE = (
    "base_model: {base}\nmerge_method: task_arithmetic\ndtype: bfloat16\n"
    "models: [{{model: {expert}, parameters: {{weight: 1.0}}}}]\n"
)
FOREIGN = (  # of other formats, of a training, of a user
    *("pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "tf_model.h5", "weights.gguf"),
    *("training_args.bin", "optimizer.pt", "trainer_state.json", "scheduler.pt"),
    *("id_ed25519", "key.pem", "credentials.json", "passwords.txt", "word2vec.model"),
    *("run.sh", "train.py", "tool", "adapter_config.json"),
)
TASK = "task: {name}\ndataset_path: zoo/reverse\ntest_split: test\ndoc_to_text: a\n"


def pollute(folder):
    for name in FOREIGN:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{"secret": 1}')


def merged(folder, **sources):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE.format(**sources))
    output = pipeline.merge_models(read_recipe(folder / "recipe.yaml"), folder / "merged").output
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and "lewis" not in path.parts and path.name != "README.md"
    }


def test_a_local_base_gives_only_the_files_that_belong_to_a_model(tmp_path):
    expert, base = zoo_folder() / "expert-reverse", tmp_path / "base"
    shutil.copytree(zoo_folder() / "base", base)
    clean = merged(tmp_path / "clean", base=base, expert=expert)
    pollute(base)

    assert merged(tmp_path / "polluted", base=base, expert=expert) == clean


def test_files_that_a_plain_download_left_in_the_cache_change_nothing(hub, tmp_path, monkeypatch):
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    sources = {"base": "zoo/base", "expert": "zoo/expert-reverse"}
    clean = merged(tmp_path / "clean", **sources)
    snapshots = list(cache_root().glob("models--zoo--*/snapshots/*"))
    for folder in snapshots:
        pollute(folder)
        (folder / "LICENSE").write_text("of nobody")  # of a kind that is carried, but not pinned

    assert len(snapshots) == 2
    assert merged(tmp_path / "polluted", **sources) == clean


def test_a_file_in_the_cache_that_is_another_is_downloaded_again(hub, tmp_path, monkeypatch):
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    sources = {"base": "zoo/base", "expert": "zoo/expert-reverse"}
    clean = merged(tmp_path / "first", **sources)
    (snapshot_of_base,) = cache_root().glob("models--zoo--base/snapshots/*")
    (tmp_path / "secret").write_text("{{ secret }}")
    template = snapshot_of_base / "chat_template.jinja"
    template.unlink()
    template.symlink_to(tmp_path / "secret")

    assert merged(tmp_path / "linked", **sources) == clean
    assert (tmp_path / "secret").read_text() == "{{ secret }}"
    template.unlink()
    template.write_text("{{ other }}")
    assert merged(tmp_path / "changed", **sources) == clean
    assert template.resolve().parent.name == "blobs"


def test_a_snapshot_of_the_cache_is_a_local_folder_like_any_other(hub, tmp_path, monkeypatch):
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    clean = merged(tmp_path / "hub", base="zoo/base", expert="zoo/expert-reverse")
    (base,) = cache_root().glob("models--zoo--base/snapshots/*")

    found = merged(tmp_path / "local", base=base, expert=zoo_folder() / "expert-reverse")

    assert (base / "config.json").is_symlink()
    assert {path: found[path] for path in clean if path != "mergekit_config.yml"} == {
        path: content for path, content in clean.items() if path != "mergekit_config.yml"
    }


def test_a_folder_in_a_snapshot_has_its_files_among_the_blobs_of_its_repo(tmp_path):
    repo, other = tmp_path / "models--me--a", tmp_path / "models--me--b"
    folder = repo / "snapshots" / ("a" * 40) / "models" / "small"
    for place in (folder, repo / "blobs", other / "blobs"):
        place.mkdir(parents=True)
    for blobs in (repo / "blobs", other / "blobs"):
        (blobs / "0123").write_text("{}")
    (folder / "config.json").symlink_to("../../../../blobs/0123")

    assert visible_files(folder, SourceError) == [folder / "config.json"]
    (folder / "added_tokens.json").symlink_to(other / "blobs" / "0123")
    with pytest.raises(SourceError, match="`added_tokens.json` is a link to outside"):
        visible_files(folder, SourceError)


@pytest.mark.parametrize("secret", ["outside", ".env"])
def test_a_link_in_a_local_base_is_never_followed_out_of_it(tmp_path, secret):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    place = tmp_path / secret if secret == "outside" else base / secret
    place.write_text("SECRET")
    (base / "vocab.txt").symlink_to(place)

    with pytest.raises(SourceError, match="`vocab.txt` is a link to (outside|a hidden file)"):
        merged(tmp_path / "work", base=base, expert=zoo_folder() / "expert-reverse")
    assert not (tmp_path / "work" / "merged").exists()


def test_a_fifo_in_a_local_base_is_refused_and_not_waited_for(tmp_path):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    os.mkfifo(base / "vocab.txt")

    with pytest.raises(SourceError) as caught:
        merged(tmp_path / "work", base=base, expert=zoo_folder() / "expert-reverse")

    assert str(caught.value) == (
        f"{base}: `vocab.txt` is a FIFO, a socket or a device.\nPut the file itself in its place."
    )


def scoring(folder, include, task="mine"):
    text = RECIPE.format(base=zoo_folder() / "base", expert=zoo_folder() / "expert-reverse")
    text += f"evaluate: {{tasks: [{task}], include: {include}}}\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    recipe = read_recipe(folder / "recipe.yaml")
    return snapshot(recipe, resolve_inputs(recipe, hub_api()))


@pytest.mark.parametrize("task", ["mine", "gsm8k"])
def test_task_files_outside_of_the_recipes_folder_are_refused(tmp_path, task):
    private = tmp_path / "private"
    private.mkdir()
    (private / "mine.yaml").write_text(TASK.format(name="mine"))
    (private / "notes.txt").write_text("SECRET")
    work = tmp_path / "work"

    for include in (private, "../private"):
        with pytest.raises(RecipeError) as caught:
            scoring(work, include, task)
        assert str(caught.value) == (
            f"recipe: `include`: {private} is not in the recipe's folder {work}, and the task "
            "files that are used become part of the merge.\nMove or copy the folder there."
        )
    (work / "tasks").symlink_to(private)
    with pytest.raises(RecipeError, match="is not in the recipe's folder"):
        scoring(work, "tasks", task)


def test_the_recipes_own_folder_is_no_folder_of_task_files(tmp_path):
    """Merges are written in it, with copies: a second run found each task twice."""
    (tmp_path / "mine.yaml").write_text(TASK.format(name="mine"))

    with pytest.raises(RecipeError) as caught:
        scoring(tmp_path, ".")

    assert str(caught.value) == (
        "recipe: `include`: it is the recipe's folder, where merges are written with copies of the "
        "files.\nMove the task files into a folder of their own, such as `tasks`."
    )


def test_only_task_files_that_are_used_and_what_they_name_are_copied(tmp_path):
    tasks = tmp_path / "tasks"
    (tasks / "deep").mkdir(parents=True)
    (tasks / "deep" / "template").write_text("include: shared.yaml\n" + TASK.format(name="t"))
    (tasks / "deep" / "shared.yaml").write_text("output_type: generate_until\n")
    mine = "task: mine\ninclude: deep/template\nprocess_docs: !function own.process\n"
    mine += f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tasks}/rows.jsonl}}}}\n"
    (tasks / "mine.yaml").write_text(mine)
    (tasks / "group.yaml").write_text("group: both\ntask: [mine, other]\n")
    (tasks / "other.yaml").write_text(TASK.format(name="other") + "tag: tagged\n")
    for name in ("own.py", "rows.jsonl", "notes.txt", "passwords.json", "unused.py", ".env"):
        (tasks / name).write_text("SECRET")
    (tasks / "unused.yaml").write_text(TASK.format(name="unused"))

    copied = scoring(tmp_path, "tasks")

    used = ["deep/shared.yaml", "deep/template", "mine.yaml", "own.py", "rows.jsonl"]
    assert sorted(copied.task_files) == [f"tasks/{name}" for name in used]
    assert copied.copy_tasks(tmp_path / "lewis") == [*copied.task_files]
    found = [path for path in (tmp_path / "lewis").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_path / "lewis")) for path in found) == sorted(
        copied.task_files
    )
    assert [*own_files(["both"], tasks)] == sorted([*used, "group.yaml", "other.yaml"])
    assert [*own_files(["tagged"], tasks)] == ["other.yaml"]
    assert own_files(["gsm8k"], tasks) == {}


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("doc_to_text: !function h.f", "h.py"),
        ("doc_to_text: !function k.f", "h.py"),
        ("include: ../common/b.yaml", "../common/b.yaml"),
        ("include: template", "../common/b.yaml"),
    ],
)
def test_task_files_that_lead_out_of_their_folder_are_refused(written, named, tmp_path):
    """An edit of them changed no digest: the same command said that nothing changed."""
    tasks, common = tmp_path / "tasks", tmp_path / "common"
    for folder in (tasks, common):
        folder.mkdir()
    (common / "h.py").write_text("def f(doc): return 'a'\n")
    (common / "b.yaml").write_text("doc_to_target: a\n")
    (tasks / "h.py").symlink_to("../common/h.py")
    (tasks / "template").symlink_to("../common/b.yaml")
    (tasks / "k.py").write_text("from h import f\n")
    mine = TASK.format(name="mine").replace("doc_to_text: a", written)
    (tasks / "mine.yaml").write_text(mine)

    with pytest.raises(EvaluationError) as refused:
        scoring(tmp_path, "tasks")

    place = (common if "common" in named else tasks) / Path(named).name
    assert str(refused.value) == (
        f"{tasks}/mine.yaml: uses {place}, which is outside of {tasks} or a link to outside of it."
        "\nPut the file itself into the folder."
    )


@pytest.mark.parametrize("is_folder", [False, True])
def test_data_of_a_task_that_are_a_link_out_of_its_folder_are_refused(is_folder, tmp_path):
    tasks, rows = tmp_path / "tasks", tmp_path / "data" / "rows.jsonl"
    for folder in (tasks, rows.parent):
        folder.mkdir()
    rows.write_text('{"question": "a", "answer": "b"}\n')
    (tasks / "own").symlink_to(rows.parent if is_folder else rows)
    mine = TASK.format(name="mine")
    named = f"json\ndataset_kwargs: {{data_files: {tasks}/own}}"
    mine = mine.replace("zoo/reverse", f"{tasks}/own" if is_folder else named)
    (tasks / "mine.yaml").write_text(mine)

    with pytest.raises(EvaluationError) as refused:
        scoring(tmp_path, "tasks")

    assert str(refused.value) == (
        f"{tasks}: `own` is a link to outside of the folder, or to nothing.\n"
        "Put the file itself in its place."
    )


def test_rows_in_the_folder_of_task_files_itself_are_copied(tmp_path):
    """They were in no digest: after an edit the old score was told, and that nothing changed."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "mine.yaml").write_text(TASK.format(name="mine").replace("zoo/reverse", str(tasks)))
    (tasks / "notes.txt.bak").write_text("SECRET")
    assert sorted(scoring(tmp_path, "tasks").task_files) == ["tasks/mine.yaml"]

    (tasks / "test.jsonl").write_text('{"question": "a", "answer": "b"}\n')

    found = sorted(scoring(tmp_path, "tasks").task_files)
    assert found == ["tasks/mine.yaml", "tasks/test.jsonl"]


def test_a_link_inside_of_the_folder_of_task_files_is_copied_under_its_own_name(tmp_path):
    """Only its target was, so that the Python that was imported was missing."""
    tasks = tmp_path / "tasks"
    (tasks / "lib").mkdir(parents=True)
    (tasks / "lib" / "real.py").write_text("def f(doc): return 'a'\n")
    (tasks / "h.py").symlink_to("lib/real.py")
    (tasks / "mine.yaml").write_text(TASK.format(name="mine").replace(": a", ": !function h.f"))

    assert sorted(scoring(tmp_path, "tasks").task_files) == ["tasks/h.py", "tasks/mine.yaml"]


@pytest.mark.parametrize("is_restored", [pytest.param(False, marks=pytest.mark.slow), True])
def test_task_files_that_are_edited_while_they_are_scored_are_refused(tmp_path, is_restored):
    """The merge would carry other task files than those that its scores are from."""
    tasks, data = tmp_path / "tasks", zoo_folder() / "data/reverse"
    tasks.mkdir()
    zoo_task = (zoo_folder() / "tasks" / "zoo_reverse.yaml").read_text()
    files = f"{{train: {data}/train.jsonl, test: {data}/test.jsonl}}"
    named = f"dataset_path: json\ndataset_kwargs: {{data_files: {files}}}"
    task = tasks / "zoo_reverse.yaml"
    task.write_text(zoo_task.replace("dataset_path: zoo/reverse", named))
    sources = {"base": zoo_folder() / "base", "expert": zoo_folder() / "expert-reverse"}
    text = RECIPE.format(**sources) + "evaluate: {tasks: [zoo_reverse], include: tasks, limit: 2}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    recipe, kept = read_recipe(tmp_path / "recipe.yaml"), task.read_text()

    class Editing(Silent):
        @contextmanager
        def stage(self, title, total, unit):
            if title == "Merging":
                task.write_text(task.read_text() + "# better words\n")
            if title == "Evaluating" and is_restored:
                task.write_text(kept)
            with super().stage(title, total, unit) as advance:
                yield advance

    with pytest.raises(SourceError) as caught:
        pipeline.merge_models(recipe, tmp_path / "merged", progress=Editing())

    assert not (tmp_path / "merged").exists()
    assert str(caught.value) == (
        f"{tasks}: `zoo_reverse.yaml` changed while it was used.\nRestore it, then run again."
    )


def test_a_link_among_task_files_is_not_followed_out_of_the_folder(tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tmp_path / "secret.yaml").write_text(TASK.format(name="mine"))
    (tasks / "mine.yaml").symlink_to(Path("../secret.yaml"))

    with pytest.raises(EvaluationError, match="`mine.yaml` is a link to outside"):
        own_files(["mine"], tasks)


UNREADABLE = {
    "a list": ("preprocessor_config.json", b"[]", "it is not a JSON object"),
    "Latin-1": ("generation_config.json", b'{"a": "\xe9"}', "'utf-8' codec can't decode byte 0xe9"),
    "half a letter": ("tokenizer_config.json", b'{"a": "\\ud800"}', "surrogates not allowed"),
    "deep": ("processor_config.json", b'{"a":' * 101 + b"1" + b"}" * 101, "more than 100 deep"),
    "a template in Latin-1": ("chat_template.jinja", b"{{ '\xe9' }}", "can't decode byte 0xe9"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_written_is_refused_before_a_weight_is_read(tmp_path, kind):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    path, content, problem = UNREADABLE[kind]
    (base / path).write_bytes(content)
    sources = {"base": base, "expert": zoo_folder() / "expert-reverse"}

    with pytest.raises(SourceError) as caught:
        merged(tmp_path / "work", **sources)
    with pytest.raises(SourceError):
        pipeline.check(read_recipe(tmp_path / "work" / "recipe.yaml"))

    said, remedy = str(caught.value).splitlines()
    assert said.startswith(f"{base}: `{path}` cannot be used: ")
    assert problem in said
    assert remedy == "The file is damaged: use an intact copy of the model."
    assert not (tmp_path / "work" / "merged.partial").exists()


def test_a_file_that_is_too_large_is_refused_before_a_weight_is_read(tmp_path):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    (base / "LICENSE").touch()
    os.truncate(base / "LICENSE", 100_000_001)

    with pytest.raises(SourceError, match="`LICENSE` has more than 100,000,000 bytes") as caught:
        merged(tmp_path / "work", base=base, expert=zoo_folder() / "expert-reverse")

    assert str(caught.value).startswith(f"{base}: ")
    assert not (tmp_path / "work" / "merged.partial").exists()


def test_a_configuration_that_is_no_object_is_refused(tmp_path):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    (base / "config.json").write_text("[1]")

    with pytest.raises(CheckFailedError, match=f"{base}: config.json is not a JSON object."):
        merged(tmp_path / "work", base=base, expert=zoo_folder() / "expert-reverse")


def test_a_model_folder_may_be_a_link_and_an_embedding_model_keeps_its_pooling(tmp_path):
    expert, base = zoo_folder() / "expert-reverse", tmp_path / "base"
    real = shutil.copytree(zoo_folder() / "base", tmp_path / "elsewhere" / "model")
    base.symlink_to(real)
    (real / "weights").mkdir()
    (real / "model.safetensors").rename(real / "weights" / "0")
    (real / "model.safetensors").symlink_to("weights/0")
    (real / "1_Pooling").mkdir()
    (real / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')

    found = merged(tmp_path / "work", base=base, expert=expert)

    clean = merged(tmp_path / "clean", base=zoo_folder() / "base", expert=expert)
    assert found["model.safetensors"] == clean["model.safetensors"]
    assert found.keys() - clean.keys() == {"1_Pooling/config.json"}


def test_task_files_that_are_not_there_are_named_with_the_key_to_set(tmp_path):
    with pytest.raises(EvaluationError) as caught:
        scoring(tmp_path, "tasks")

    assert str(caught.value) == (
        "tasks: is not a folder.\nSet `evaluate.include` to the folder with your task files."
    )
