"""A merge with GGUF files: in its lock, its card and its repo, and added later."""

import errno
import json
import shutil
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
from click.testing import CliRunner
from file_calls import failing, recorded
from zoo_hub import put_zoo

import lewis_hub
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.display import Silent
from lewis_hub.errors import OutputError
from lewis_hub.files import sha256_of
from lewis_hub.merge.workspace import alone_at, alone_with
from lewis_hub.report.lock import Lock

RECIPE = (
    "base_model: zoo/base\nmerge_method: ties\ndtype: bfloat16\n"
    "models: [{model: zoo/expert-reverse}, {model: zoo/expert-cipher}]\n"
)
FILE = "model-Q8_0.gguf"


@pytest.fixture
def place(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    monkeypatch.chdir(tmp_path)
    put_zoo(hub)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def run(*words, code=0):
    done = CliRunner().invoke(cli, [*words, "--json"])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def lock(folder):
    return json.loads(Path(folder, "lewis/lock.json").read_text())


def test_a_merge_with_exports_locks_names_and_pushes_their_files(hub, place):
    repo = f"{hub.user}/exported"

    run("merge", "--export", "gguf:q8_0", "--export", "gguf", "--push", "--repo", repo)

    found = lock("merged")
    assert found["recipe"]["export"] == ["gguf:f16", "gguf:q8_0"]
    for name in ("model-F16.gguf", FILE):
        assert found["outputs"][name]["sha256"] == sha256_of(Path("merged", name))
        assert hub.api().file_exists(repo, name)
    assert run("verify", "merged")["problems"] == run("verify", repo)["problems"] == []
    card = Path("merged/README.md").read_text()
    assert (
        "In [llama.cpp](<https://github.com/ggml-org/llama.cpp>), which reads `model-F16.gguf` and "
        "`model-Q8_0.gguf`:\n\n```bash\n"
        f"llama-cli -hf {repo}:F16 -p 'What can you do?'\n"
        f"llama-cli -hf {repo}:Q8_0 -p 'What can you do?'\n```\n"
    ) in card
    assert f"mlx_lm.generate --model {repo} --prompt 'What can you do?'\n" in card
    again = run("merge", "--export", "gguf", "--push", "--repo", repo)
    assert again["status"] == "unchanged"


def test_an_export_of_a_finished_merge_is_what_a_merge_with_it_writes(place):
    run("merge")
    written = Path("merged/model.safetensors").stat().st_mtime_ns

    assert run("merge", "--export", "gguf:q8_0")["status"] == "unchanged"
    run("merge", "--export", "gguf:q8_0", "-o", "direct")

    assert Path("merged/model.safetensors").stat().st_mtime_ns == written
    for name in (FILE, "lewis/recipe.yaml", "lewis/lock.json"):
        assert Path("merged", name).read_bytes() == Path("direct", name).read_bytes()
    cards = [Path(folder, "README.md").read_text() for folder in ("merged", "direct")]
    assert cards[0].partition("### Cost")[0] == cards[1].partition("### Cost")[0]
    assert run("verify", "merged", "--rebuild")["problems"] == []


def test_the_command_adds_a_file_to_a_merge_and_its_lock_and_card(place):
    run("merge")

    done = run("export", "merged", "--to", "gguf:q8_0")

    assert done == {
        "status": "exported", "output": "merged/model-Q8_0.gguf",
        "bytes": Path("merged", FILE).stat().st_size,
    }  # fmt: skip
    assert lock("merged")["recipe"]["export"] == ["gguf:q8_0"]
    assert run("verify", "merged")["problems"] == []
    assert f"llama-cli -m {FILE} -p 'What can you do?'" in Path("merged/README.md").read_text()
    run("export", "merged")
    assert lock("merged")["recipe"]["export"] == ["gguf:f16", "gguf:q8_0"]
    assert run("verify", "merged")["problems"] == []


def test_a_merge_is_not_changed_while_it_is_published(hub, place):
    repo, told = f"{hub.user}/whole", []
    run("merge", "--push", "--repo", f"{hub.user}/first")

    class Exporting(Silent):
        @contextmanager
        def stage(self, title, total, unit):
            for words in (["export", "merged", "--to", "gguf:q8_0"], ["push", "merged", repo]):
                told.append(str(CliRunner().invoke(cli, words).exception))
            with super().stage(title, total, unit) as advance:
                yield advance

    lewis_hub.publish("merged", lewis_hub.open_target(lewis_hub.Publishing(repo=repo)), Exporting())

    assert len(told) == 2
    for message in told:
        assert "merged: another run is working on it.\nWait until it ends" in message
    assert run("verify", repo)["problems"] == []
    assert FILE not in lock("merged")["outputs"]
    assert not list(place.glob(".merged*"))
    run("export", "merged", "--to", "gguf:q8_0")
    assert FILE in lock("merged")["outputs"]


@pytest.mark.parametrize("work", ["add the file", "rewrite the card"])
def test_a_merge_that_is_published_is_not_changed_by_a_merge_of_its_recipe(hub, place, work):
    run("merge")
    changed = RECIPE + f"publish: {{repo: {hub.user}/other}}\n"
    Path("recipe.yaml").write_text(RECIPE + "export: gguf\n" if work == "add the file" else changed)
    before = lock("merged")

    with alone_with(Path("merged")), pytest.raises(OutputError, match="another run is working"):
        run("merge")

    assert lock("merged") == before
    run("merge")
    assert lock("merged") != before


@pytest.mark.parametrize("changes", [{"publish": "a/b"}, {"publish": {"repo": 5}}, {"export": 7}])
def test_a_lock_of_others_is_one_message_before_the_export_or_has_no_effect(place, changes):
    run("merge", "-o", "merged")
    file = Path("merged/lewis/lock.json")
    true = Lock.from_json(file.read_text())
    file.write_text(replace(true, recipe={**true.recipe, **changes}).to_json())

    if "export" in changes:  # an unreadable one counts as none
        assert run("export", "merged")["output"] == "merged/model-F16.gguf"
        return
    with pytest.raises(OutputError, match="`publish` cannot be read"):
        lewis_hub.export_model("merged", "gguf:f16", progress=False)
    assert not Path("merged/model-F16.gguf").exists()
    for words in (["push", "merged"], ["push", "merged", "me/other"]):
        with pytest.raises(OutputError, match="`publish` cannot be read"):
            CliRunner().invoke(cli, words, catch_exceptions=False)


def test_a_lock_that_the_system_cannot_read_now_is_an_error_and_not_no_lock(place):
    """The file was written, and neither lock nor card named it."""
    run("merge")
    shutil.copytree("merged", "read")
    file = str(Path("read/lewis/lock.json").resolve())
    calls = recorded([file], lambda: lewis_hub.export_model("read", "gguf:f16", progress=False))

    for call in calls:
        shutil.rmtree("read")
        shutil.copytree("merged", "read")
        with failing([file], call, errno.EIO), suppress(OSError):
            lewis_hub.export_model("read", "gguf:f16", progress=False)
            assert lock("read")["recipe"].get("export") == ["gguf:f16"], call


def test_the_command_writes_the_file_of_a_repo_into_a_folder(place):
    done = run("export", "zoo/base", "--to", "gguf:bf16", "-o", "out")

    assert done["output"] == "out/model-BF16.gguf"
    assert [path.name for path in Path("out").iterdir()] == ["model-BF16.gguf"]
    shutil.copytree(zoo_folder() / "base", "base")
    assert run("export", "base", "--to", "gguf:bf16")["output"] == "base/model-BF16.gguf"
    assert Path("base/model-BF16.gguf").read_bytes() == Path(done["output"]).read_bytes()
    found = gguf.GGUFReader("out/model-BF16.gguf")
    assert len(found.tensors) == 2 + 6 * 9  # the head is that of the embeddings


def test_a_disk_without_room_is_one_message(place, monkeypatch):
    """The message had a remedy inside a remedy."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))

    base = str(zoo_folder() / "base")
    done = CliRunner().invoke(cli, ["export", base, "--to", "gguf:bf16", "-o", "out"])

    assert done.exit_code == 1
    assert str(done.exception).endswith(
        "the bytes of `model-BF16.gguf` need 0.00 GB, 0.00 GB are free.\n"
        "Free some space, or name a folder on another disk with -o."
    )


def test_one_run_at_a_time_writes_a_file(place, tmp_path):
    words = ["export", "zoo/base", "--to", "gguf:q8_0"]
    with (
        alone_at(Path(f".{FILE}.lock"), Path(FILE)),
        pytest.raises(OutputError, match=f"^{FILE}: another run is working on it"),
    ):
        run(*words)

    run("export", "zoo/base", "--to", "gguf:f16")
    run(*words)
    assert {path.name for path in tmp_path.glob("*.gguf")} == {FILE, "model-F16.gguf"}
    assert not list(tmp_path.glob(".model*"))


def test_an_architecture_without_rules_is_a_problem_before_any_weights_are_read(place):
    for name in ("base", "expert-reverse"):
        shutil.copytree(zoo_folder() / name, name)
        config = json.loads(Path(name, "config.json").read_text())
        config |= {"architectures": ["OlmoForCausalLM"], "model_type": "olmo"}
        Path(name, "config.json").write_text(json.dumps(config))
    Path("other.yaml").write_text(
        "base_model: ./base\nmerge_method: ties\nmodels: [{model: ./expert-reverse}]\n"
        "export: gguf\n"
    )

    [problem] = run("check", "other.yaml", code=1)["problems"]
    assert "GGUF needs rules for its architecture (OlmoForCausalLM), and there are only" in problem
    recipe = lewis_hub.read_recipe("other.yaml")
    with pytest.raises(lewis_hub.LewisHubError, match=r"convert_hf_to_gguf\.py knows more"):
        lewis_hub.merge_models(recipe, "other", progress=False)
    assert not Path("other").exists()
    assert not Path("other.partial").exists()


def test_a_stream_with_an_export_is_refused(hub, place):
    repo = f"{hub.user}/streamed"
    words = ["merge", "--stream", "--push", "--repo", repo, "--export", "gguf"]

    done = CliRunner().invoke(cli, words)

    assert "an export reads the merged weights on the disk" in str(done.exception)
    assert "lewis-hub export --to gguf:f16 REPO" in str(done.exception)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("gguf", ("gguf:f16",)),
        ("[gguf:q8_0, gguf, 'gguf:f16']", ("gguf:f16", "gguf:q8_0")),
    ],
)
def test_a_recipe_names_one_format_or_several(tmp_path, given, read):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{RECIPE}export: {given}\n")

    assert lewis_hub.read_recipe(file).export == read


@pytest.mark.parametrize("given", ["gguf:q4_k", "[]", "[7]"])
def test_an_unknown_format_is_refused(tmp_path, given):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{RECIPE}export: {given}\n")

    with pytest.raises(lewis_hub.LewisHubError, match="export"):
        lewis_hub.read_recipe(file)
