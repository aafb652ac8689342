"""The output is a function of the lock: nothing else on the disk or in the environment counts."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from zoo_hub import put_zoo

import lewis_hub
from hardening.fuzz import limits
from lewis_hub import pipeline
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import LewisHubError, OutputError
from lewis_hub.hub.source import cache_root
from lewis_hub.recipe.read import read_recipe

CANARY = "canary-5d1f"
RECIPE = """base_model: BASE
models: [{model: EXPERT, parameters: {weight: 1.0}}]
merge_method: ties
parameters: {density: 0.5}
tokenizer_source: union
"""
TOLD = {"README.md", "lewis/cost.json", "lewis/provenance.json", "lewis/report.html"}  # times
NAMES = (  # of files that a merge carries, reads or loads in other circumstances
    *("LICENSE.txt", "NOTICE", "USE_POLICY.md", "vocab.json", "merges.txt", "vocab.txt"),
    *(
        "added_tokens.json",
        "tokenizer.model",
        "tekken.json",
        "chat_template.json",
        "processor_config.json",
    ),
    *("preprocessor_config.json", "modules.json", "1_Pooling/config.json", "hf_quant_config.json"),
    *("additional_chat_templates/rag.jinja", "model.py", "modeling_own.py", "custom_generate/g.py"),
    *("pytorch_model.bin", "model-00001-of-00002.safetensors", "adapter_model.safetensors"),
    *("training_args.bin", "optimizer.pt", ".env", ".git/config", "id_rsa", "importance.json"),
)
KINDS = ("a link", "a link to a folder", "a link to a hidden file", "a FIFO", "a pickle")
KINDS += ("a hidden link",)


def merge(folder, base, expert):
    folder.mkdir(parents=True)
    text = RECIPE.replace("BASE", str(base)).replace("EXPERT", str(expert))
    (folder / "recipe.yaml").write_text(text)
    return pipeline.merge_models(read_recipe(folder / "recipe.yaml"), folder / "merged").output


def contents(folder):
    """All files but those that tell times; paths of this machine are left out of the others."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in TOLD}


def pollute(folder, names=NAMES):
    for name in names:
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps({"a": CANARY}))


def test_pollution_of_cache_and_folders_changes_no_byte(hub, tmp_path, monkeypatch):
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    clean = contents(merge(tmp_path / "clean", "zoo/base", "zoo/expert-reverse"))
    polluted = tmp_path / "polluted"

    snapshots = [*cache_root().glob("models--zoo--*/snapshots/*")]
    for folder in snapshots:
        pollute(folder)
        pollute(folder.parents[1] / "blobs", ["0" * 64, "f" * 40])
        pollute(folder.parents[1] / "snapshots", ["0" * 40 + "/config.json"])
        pollute(folder.parents[1] / "refs", ["other"])
    pollute(cache_root(), ["models--zoo--other/snapshots/x/config.json", "version.txt"])
    work = tmp_path / "elsewhere"
    pollute(work, [*NAMES, "zoo/other/config.json", "tasks/own.py", "sitecustomize.py"])
    monkeypatch.chdir(work)
    monkeypatch.setenv("CANARY", CANARY)
    found = contents(merge(polluted, "zoo/base", "zoo/expert-reverse"))

    assert len(snapshots) == 2
    assert found.keys() == clean.keys()
    assert [name for name in clean if found[name] != clean[name]] == []
    assert len(clean) > 8


@pytest.mark.parametrize("broken", [False, True], ids=["of other names", "no JSON"])
def test_a_cached_header_that_is_not_that_of_the_hub_changes_no_byte(
    hub, tmp_path, monkeypatch, broken
):
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    clean = contents(merge(tmp_path / "clean", "zoo/base", "zoo/expert-reverse"))

    (weights,) = cache_root().glob("models--zoo--expert-reverse/snapshots/*/model.safetensors")
    content = weights.read_bytes()
    other = b"#".join(content.split(b"{", 1)) if broken else swapped(content)
    weights.resolve().write_bytes(other)
    found = contents(merge(tmp_path / "damaged", "zoo/base", "zoo/expert-reverse"))

    assert len(other) == len(content)
    assert other != content
    assert found == clean
    assert weights.read_bytes() == content


def swapped(content):
    """Weights where two matrices of one shape have each other's name."""
    first, second = b"layers.0.mlp.gate_proj.weight", b"layers.0.mlp.up_proj.weight"
    parts = (part.replace(second, first) for part in content.split(first))
    return second.join(parts)


# Python reads most of these once, when it starts, so each merge is a process of its own
ORDERED = "from lewis_hub.cli.main import main; main()"
SHUFFLED = f"""import os, random
draw, listdir, scandir = random.Random(1), os.listdir, os.scandir
class Drawn:
    def __init__(self, place):
        with scandir(place) as found: self.found = list(found)
        draw.shuffle(self.found)
    __iter__ = lambda self: iter(self.found)
    __next__ = lambda self: self.found.pop()
    __enter__ = lambda self: self
    __exit__ = close = lambda self, *_: None
def listed(place="."):
    found = listdir(place)
    draw.shuffle(found)
    return found
os.scandir, os.listdir = (lambda place=".": Drawn(place)), listed
os.umask(0o077)
{ORDERED}"""
ELSEWHERE = {
    **{"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"},
    **{"PYTHONUTF8": "0", "OMP_NUM_THREADS": "2", "COLUMNS": "40", "USER": "another"},
}
MANY = """base_model: zoo/base
models: [{model: MORE}, {model: zoo/expert-cipher}]
merge_method: dare_ties
dtype: bfloat16
tokenizer_source: union
"""
GUIDE = """guide:
  name: lewis
  calibration: {dataset: zoo/reverse, text: "{question} – {answer}", samples: 4}
"""
RAN = re.compile(r'[\d.]+ (?:s|B|kB|MB|GB)\b|width="[\d.]+"|"(?:started|finished)On": ".*"')


def with_more_tokens(folder):
    """An expert whose tokenizer has tokens that the base's has not; also in its embeddings."""
    shutil.copytree(zoo_folder() / "expert-reverse", folder)
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    made = [(left, right) for left in "BCDFGHJK" for right in "QVWXZ"]
    made = [pair for pair in made if "".join(pair) not in vocabulary]
    vocabulary |= {"".join(pair): len(vocabulary) + i for i, pair in enumerate(made)}
    document["model"]["merges"] += map(list, made)
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].repeat(2, 1)[: len(vocabulary)].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(vocabulary)}))
    assert len(made) > 20
    return folder


@pytest.mark.parametrize("guide", ["", pytest.param(GUIDE, marks=pytest.mark.slow)])
def test_the_process_and_its_environment_change_no_byte(hub, tmp_path, guide):
    put_zoo(hub)
    more, made = with_more_tokens(tmp_path / "more"), []
    always = {"HF_TOKEN": hub.write_token, "PYTHONPATH": os.pathsep.join(sys.path)}
    for number, (code, own) in enumerate(
        ((ORDERED, {"PYTHONHASHSEED": "1"}), (SHUFFLED, ELSEWHERE))
    ):
        work = tmp_path / str(number)
        work.mkdir()
        text = MANY.replace("MORE", str(more)) + guide
        (work / "recipe.yaml").write_text(text, encoding="utf-8")
        words = [sys.executable, "-c", code, "merge", "-q", "--max-shard-size", "500KB"]
        done = subprocess.run(
            words, cwd=work, env={**os.environ, **always, **own}, capture_output=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
        folder = work / "merged"
        told = {name: (folder / name).read_text(encoding="utf-8") for name in sorted(TOLD)}
        del told["lewis/cost.json"]
        made.append(contents(folder) | {name: RAN.sub("", text) for name, text in told.items()})

    clean, found = made
    assert found.keys() == clean.keys()
    assert [name for name in clean if found[name] != clean[name]] == []
    assert "BQ" in json.loads(clean["tokenizer.json"])["model"]["vocab"]


def test_other_files_beside_local_models_change_no_byte(tmp_path):
    models = {}
    for place in ("clean", "polluted"):
        models[place] = shutil.copytree(zoo_folder(), tmp_path / place / "zoo")
    kept = [name for name in NAMES if not name.endswith(CARRIED_KINDS)]
    for name in ("base", "expert-reverse"):
        pollute(models["polluted"] / name, kept)

    found = {
        place: contents(merge(tmp_path / place / "work", zoo / "base", zoo / "expert-reverse"))
        for place, zoo in models.items()
    }

    texts = {
        place: {
            name: content.replace(str(models[place]).encode(), b"ZOO")
            for name, content in files.items()
        }
        for place, files in found.items()
    }
    assert len(kept) >= 10
    assert found["polluted"].keys() == found["clean"].keys()
    same = {n for n in texts["clean"] if texts["clean"][n] == texts["polluted"][n]}
    # digests of a folder are over all its visible files
    assert texts["clean"].keys() - same <= {"lewis/lock.json", "lewis/recipe.yaml"}
    assert CANARY.encode() not in b"".join(texts["polluted"].values())


# such a file beside a local model belongs to the model, and is pinned by its digest
CARRIED_KINDS = (
    *("LICENSE.txt", "NOTICE", "USE_POLICY.md", ".jinja", "tokenizer.model", "modules.json"),
    *("_config.json", "1_Pooling/config.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("added_tokens.json", "tekken.json", "chat_template.json", ".safetensors"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.model", "chat_template.jinja", "notes.txt"])
def test_nothing_outside_of_a_source_reaches_the_output(kind, name, tmp_path):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    secret = tmp_path / "private" / "secret"
    secret.parent.mkdir()
    secret.write_text(CANARY)
    place = base / name
    place.unlink(missing_ok=True)
    if kind == "a FIFO":
        os.mkfifo(place)
    elif kind == "a link to a hidden file":
        secret.rename(base / ".env")
        place.symlink_to(".env")
    elif kind == "a pickle":
        (base / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    elif kind == "a hidden link":
        (base / ".cache").symlink_to(secret.parent)
    else:
        place.symlink_to(secret if kind == "a link" else secret.parent)

    if kind not in ("a pickle", "a hidden link"):
        told = "link to outside|link to a hidden file|FIFO"
        with pytest.raises(LewisHubError, match=f"`{name}` is a ({told})"):
            merge(tmp_path / "work", base, zoo_folder() / "expert-reverse")
    else:
        assert merge(tmp_path / "work", base, zoo_folder() / "expert-reverse").is_dir()
    made = [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert not any(CANARY.encode() in path.read_bytes() for path in made)
    assert not [path for path in made if path.is_symlink() or path.suffix == ".bin"]
    assert not Path("pwned").exists()


def writers(recipe, output):
    """All that write into a folder of their own; a merge is tested beside them."""
    texts = lewis_hub.Calibration(dataset="rows.jsonl", text="{text}")
    yield lambda: lewis_hub.calibrate(recipe, output, progress=False)
    yield lambda: lewis_hub.tune_recipe(recipe, lewis_hub.Search(), output, progress=False)
    yield lambda: lewis_hub.measure_model("zoo/base", texts, output, progress=False)


@pytest.mark.parametrize("place", ["", "importance.json.new", "importance.png", "study.log"])
def test_nothing_is_written_through_a_link_that_came_with_a_recipe(tmp_path, place):
    recipe = read_recipe(zoo_folder() / "recipe.yaml")
    mine, output = tmp_path / "mine", tmp_path / "output"
    mine.write_text(CANARY)
    (output / place).parent.mkdir(exist_ok=True)
    (output / place).symlink_to(mine)

    for write in writers(recipe, output):
        with pytest.raises(OutputError, match="it is a link"):
            write()

    assert mine.read_text() == CANARY


def test_a_folder_that_is_named_may_have_links_of_its_user(tmp_path, monkeypatch):
    """`-o .` in a project: the Python of its environment is a link."""
    texts = lewis_hub.Calibration(dataset="rows.jsonl", text="{text}", samples=1)
    (tmp_path / "rows.jsonl").write_text('{"text": "reverse BAKOT"}\n')
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "runs/first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    Path(".venv/bin/python").symlink_to("/usr/bin/env")
    Path("runs/latest").symlink_to("first")
    Path("data").symlink_to("runs")

    lewis_hub.measure_model(zoo_folder() / "base", texts, ".", progress=False)

    assert Path("importance.json").is_file()


def test_a_comparison_is_not_drawn_through_a_link(tmp_path):
    mine, output = tmp_path / "mine", tmp_path / "comparison"
    mine.write_text(CANARY)
    output.mkdir()
    (output / "change-base-light.png").symlink_to(mine)

    done = CliRunner().invoke(cli, ["compare", "a", "b", "-o", str(output)])

    assert isinstance(done.exception, OutputError)
    assert f"{output}/change-base-light.png: it is a link" in str(done.exception)
    assert mine.read_text() == CANARY


def test_an_export_does_not_follow_a_hidden_link(tmp_path):
    pytest.importorskip("gguf")
    model, mine = shutil.copytree(zoo_folder() / "base", tmp_path / "base"), tmp_path / "mine"
    mine.write_text(CANARY)
    (model / ".model-F16.gguf.partial").symlink_to(mine)

    path = lewis_hub.export_model(model, "gguf:f16", progress=False)

    assert (mine.read_text(), path.read_bytes()[:4]) == (CANARY, b"GGUF")


def test_an_export_is_not_written_into_a_link(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "gguf").symlink_to("mine")

    with pytest.raises(OutputError, match="it is a link"):
        lewis_hub.export_model(zoo_folder() / "base", "gguf:f16", tmp_path / "gguf", progress=False)

    assert [*(tmp_path / "mine").iterdir()] == []


@pytest.mark.parametrize("signed", [False, True])
def test_a_push_writes_and_deletes_nothing_through_a_link(hub, tmp_path, monkeypatch, signed):
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    zoo, key = zoo_folder(), tmp_path / "key.pem"
    merged = merge(tmp_path / "clone", zoo / "base", zoo / "expert-reverse")
    (merged / "lewis").rename(tmp_path / "own")
    (merged / "lewis").symlink_to(tmp_path / "own", target_is_directory=True)
    for name in ("changelog.json", "gate.json"):
        (tmp_path / "own" / name).write_text("own")
    before = {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    key.write_text("")

    words = ["push", str(merged), f"{hub.user}/merge", *(["--sign", str(key)] if signed else [])]
    done = CliRunner().invoke(cli, words)

    assert done.exit_code == 1
    assert "`lewis` is a link to outside of the folder" in str(done.exception)
    assert {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()} == before


@pytest.mark.parametrize("name", ["README.md", "lewis/recipe.yaml", "lewis/report.html"])
def test_nothing_behind_a_link_becomes_a_file_of_a_merge_that_came_with_a_recipe(
    hub, tmp_path, monkeypatch, name
):
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    base, repo = zoo_folder() / "base", f"{hub.user}/linked"
    merged = merge(tmp_path / "clone", base, zoo_folder() / "expert-reverse")
    recipe, mine = merged.with_name("recipe.yaml"), tmp_path / "mine"
    recipe.write_text(f"{recipe.read_text()}publish: {{repo: {repo}}}\n")
    mine.write_text(CANARY)
    (merged / name).unlink()
    (merged / name).symlink_to(mine)

    for words in (["merge", str(recipe), "--push"], ["merge", str(recipe)], ["push", str(merged)]):
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 1
        assert f"`{name}` is a link to outside of the folder" in str(done.exception)

    assert (merged / name).is_symlink()
    assert not hub.api().repo_exists(repo)


@pytest.mark.parametrize("kind", ["a FIFO", "a device"])
def test_a_lock_that_never_ends_is_refused(hub, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    merged = merge(tmp_path / "clone", zoo_folder() / "base", zoo_folder() / "expert-reverse")
    lock = merged / "lewis" / "lock.json"
    lock.unlink()
    if kind == "a FIFO":
        os.mkfifo(lock)
    else:
        lock.symlink_to("/dev/zero")

    with limits():
        for words in (["merge", str(merged.with_name("recipe.yaml"))], ["push", str(merged)]):
            done = CliRunner().invoke(cli, words)
            assert isinstance(done.exception, LewisHubError)
            assert "`lewis/lock.json` is " in str(done.exception)


def test_merges_on_the_way_are_not_written_through_a_link(tmp_path):
    base, mine = zoo_folder() / "base", tmp_path / "mine"
    mine.mkdir()
    (tmp_path / "merged.parts").symlink_to(mine)
    one = f"base_model: {base}\nmerge_method: linear\nmodels: [{zoo_folder() / 'expert-cipher'}]\n"
    (tmp_path / "recipe.yaml").write_text(
        f"name: first\n{one}---\nmerge_method: linear\nmodels: [first]\n"
    )

    with pytest.raises(OutputError, match="merged.parts: it is a link"):
        pipeline.merge_models(read_recipe(tmp_path / "recipe.yaml"), tmp_path / "merged")

    assert list(mine.iterdir()) == []
