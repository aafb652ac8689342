"""Secrets of the environment, the endpoint and neighbouring files are in nothing that is made.

Every artefact, stream and commit of a merge and a push is searched, also of those that fail.
"""

import base64
import json
import os
import subprocess
import sys
import zipfile
from urllib.parse import quote

import pytest
from zoo_hub import put_zoo

from lewis_hub.demo.zoo import zoo_folder

RECIPE = """base_model: zoo/base
models: [{model: zoo/expert-reverse, parameters: {weight: 1.0}}]
merge_method: ties
parameters: {density: 0.5}
tokenizer_source: union
export: ["gguf:q8_0"]
publish: {repo: lewis/canary, license: apache-2.0}
"""
PASSWORD, NEIGHBOUR, VARIABLE = "canary-password-1f", "canary-neighbour-2e", "canary-variable-3d"
NEIGHBOURS = (".env", "credentials.json", "notes.txt", "id_rsa", "tasks.yaml", "data.jsonl")
FAILURES = {
    "a wrong token": ({"HF_TOKEN": "hf_canarytokenwrong4c"}, RECIPE, "hf_canarytokenwrong4c"),
    "no such model": ({}, RECIPE.replace("zoo/base", "zoo/none"), None),
    "a bad recipe": ({}, RECIPE + "nonsense: 1\n", None),
    "no server": ({"HF_ENDPOINT": f"http://me:{PASSWORD}@127.0.0.1:9"}, RECIPE, None),
    "a password that is refused": ({"HF_ENDPOINT": f"http://me:{PASSWORD}@HOST"}, RECIPE, None),
    "a password with a space": ({"HF_ENDPOINT": f"http://me:a {PASSWORD}@HOST"}, RECIPE, None),
    "an address that is none": ({"HF_ENDPOINT": f"http://me:{PASSWORD}@:x"}, RECIPE, None),
}


@pytest.fixture
def place(hub, tmp_path, monkeypatch):
    """A working folder with secrets around it, and the environment that knows them."""
    put_zoo(hub)
    work = tmp_path / "work"
    work.mkdir()
    for name in NEIGHBOURS:
        (work / name).write_text(NEIGHBOUR)
        (tmp_path / name).write_text(NEIGHBOUR)
    environment = {
        **{"HF_TOKEN": hub.write_token, "HF_ENDPOINT": hub.url},
        **{"AWS_SECRET_ACCESS_KEY": VARIABLE, "GITHUB_TOKEN": VARIABLE, "CANARY": VARIABLE},
        **{"PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / "home")},
    }
    return work, environment


def run(work, environment, *words):
    return subprocess.run(
        [sys.executable, "-m", "lewis_hub", *words],
        cwd=work,
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )


def spelled(secret):
    """A secret as logs and files could show it."""
    return {
        secret.encode(),
        base64.b64encode(secret.encode()),
        quote(secret, safe="").encode(),
        json.dumps(secret).encode()[1:-1],
    }


def searched(*places):
    """Everything in folders, archives opened, but the recipe's neighbours themselves."""
    for path in (p for place in places for p in place.rglob("*") if p.is_file()):
        if path.parent in places and path.name in NEIGHBOURS:
            continue
        content = path.read_bytes()
        yield path, content
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from ((path, archive.read(name)) for name in archive.namelist())


def found(secrets, streams, *places):
    patterns = {one for secret in secrets for one in spelled(secret)}
    held = [("a stream", stream) for stream in streams] + [*searched(*places)]
    return [str(where) for where, content in held if any(one in content for one in patterns)]


def test_a_merge_that_is_pushed_contains_no_secret(hub, place, tmp_path):
    work, environment = place
    (work / "recipe.yaml").write_text(RECIPE)

    done = run(work, environment, "merge", "--push", "--json", "-o", "merged")

    assert done.returncode == 0, done.stderr.decode()[-2000:]
    secrets = [hub.write_token, PASSWORD, NEIGHBOUR, VARIABLE]
    streams = (done.stdout, done.stderr)
    assert found(secrets, streams, work, hub.root / "repos", hub.root / "blobs") == []
    assert found(secrets, (), tmp_path / "home") == []
    assert (work / "merged" / "model-Q8_0.gguf").is_file()
    assert len(list((work / "merged").rglob("*"))) > 10
    assert hub.api().repo_exists("lewis/canary")


@pytest.mark.parametrize("kind", FAILURES)
def test_a_run_that_fails_tells_no_secret(hub, place, kind):
    work, environment = place
    changed, text, own = FAILURES[kind]
    (work / "recipe.yaml").write_text(text)
    host = hub.url.removeprefix("http://")
    changed = {name: value.replace("HOST", host) for name, value in changed.items()}

    done = run(work, environment | changed, "merge", "--push", "--json")

    secrets = [hub.write_token, PASSWORD, NEIGHBOUR, VARIABLE, *([own] if own else [])]
    assert done.returncode == 1, done.stderr.decode()[-2000:]
    assert b"Traceback" not in done.stderr, done.stderr.decode()[-3000:]
    assert json.loads(done.stdout)["status"] == "failed"
    assert found(secrets, (done.stdout, done.stderr), work) == []


def test_the_search_finds_a_secret_in_each_spelling(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b", PASSWORD)
    (tmp_path / "c").write_bytes(base64.b64encode(VARIABLE.encode()))
    (tmp_path / "merged").mkdir()
    for place in (tmp_path, tmp_path / "merged"):
        (place / "notes.txt").write_text(NEIGHBOUR)

    assert found([PASSWORD], [], tmp_path) == [str(tmp_path / "a.zip")]
    assert found([NEIGHBOUR], [], tmp_path) == [str(tmp_path / "merged" / "notes.txt")]
    assert found([VARIABLE], [VARIABLE.encode()], tmp_path) == ["a stream", str(tmp_path / "c")]
    assert found(["canary-of-nobody"], [b"x"], tmp_path, zoo_folder() / "base") == []
