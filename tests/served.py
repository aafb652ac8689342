"""Models in folders and on the embedded Hub, for tests that go the whole way."""


def pushed(api, folder, repo):
    """A new repo with the files of a folder; returns its name."""
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)
    return repo


def weights(folder):
    """The bytes of each file of weights."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
