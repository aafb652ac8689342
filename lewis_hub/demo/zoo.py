"""The zoo: tiny trained models and their data, and how to upload them to a Hub."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from huggingface_hub import HfApi


OWNER = "zoo"
MODELS = ("base", "expert-reverse", "expert-cipher")
DATASETS = ("reverse", "cipher")


def zoo_folder() -> Path:
    """The folder of the zoo: a folder per model, `data/<skill>`, `tasks` and `recipe.yaml`.

    Example:
        >>> (lewis_hub.zoo_folder() / "recipe.yaml").is_file()
        True
    """
    return Path(str(files("lewis_hub.demo"))) / "zoo"


def seed_hub(api: HfApi) -> None:
    """Upload the zoo's models and datasets to the Hub of `api`, in one commit per repo.

    This creates missing repos. A repo that already holds the same files gets no commit.
    """
    for name in MODELS:
        _seed(api, f"{OWNER}/{name}", "model", zoo_folder() / name)
    for name in DATASETS:
        _seed(api, f"{OWNER}/{name}", "dataset", zoo_folder() / "data" / name)


def _seed(api: HfApi, repo_id: str, repo_type: Literal["model", "dataset"], folder: Path) -> None:
    from huggingface_hub import CommitOperationAdd

    api.create_repo(repo_id, repo_type=repo_type, exist_ok=True)
    api.create_commit(
        repo_id,
        [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())],
        repo_type=repo_type,
        commit_message="Add the zoo's files",
    )
