"""Models in folders and on the embedded Hub, for tests that go the whole way."""

import os
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from lewis_hub.localhub.store import git_file
from lewis_hub.recipe.read import parse_recipe

RECIPE = """base_model: BASE
models:
  - model: EXPERT
    parameters: {weight: 1.0}
merge_method: ties
"""
DENSITY = "parameters: {density: 0.4}\n"


def recipe(base="zoo/base", expert="zoo/expert-reverse", more=DENSITY):
    text = RECIPE.replace("BASE", str(base)).replace("EXPERT", str(expert))
    return parse_recipe(text + more, "recipe.yaml")


def pushed(api, folder, repo):
    """A new repo with the files of a folder; returns its name."""
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)
    return repo


def weights(folder):
    """The bytes of each file of weights."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def push_meanwhile(hub, repo):
    """Somebody else's commit; not over HTTP, for the server is in the midst of a request."""
    found = hub.store.find("models", repo)
    head = found.resolve("main")
    files = {**head.files, "theirs": git_file(b"x", hub.store.blobs.add(b"x"))}
    theirs = replace(head, parent=head.sha, title="Theirs", files=files)
    hub.store.add_commit(found, theirs, "refs/heads/main")


@contextmanager
def listening(hub, hear):
    """`hear` is called with the method and the target of each request before it is answered."""
    strike = hub.faults.take

    def take(method, target):
        hear(method, target)
        return strike(method, target)

    hub.faults.take = take
    try:
        yield
    finally:
        hub.faults.take = strike


def bytes_in(*folders):
    """The size of all files in folders that somebody works in, but of JSON: what goes counts 0."""
    total = 0
    for place, _, names in (walked for folder in folders for walked in os.walk(folder)):
        for name in (name for name in names if not name.endswith(".json")):
            with suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_size
    return total
