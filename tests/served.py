"""Models in folders and on the embedded Hub, for tests that go the whole way."""

import os
from contextlib import suppress
from pathlib import Path


def pushed(api, folder, repo):
    """A new repo with the files of a folder; returns its name."""
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)
    return repo


def weights(folder):
    """The bytes of each file of weights."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def bytes_in(folder):
    """The size of all files in a folder that somebody works in: what goes meanwhile counts 0."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_size
    return total
