"""The zoo, tiny trained models and their data, and the demo that merges them on an embedded Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lewis_hub.errors import OutputError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


OWNER = "zoo"
MODELS = ("base", "expert-reverse", "expert-cipher")
DATASETS = ("reverse", "cipher")
MARK = ".lewis-hub-demo"
RECIPES = ("recipe.yaml", "recipe-regmean.yaml")
MERGED, BY_REGMEAN = "merged", "merged-regmean"


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
    repos: list[tuple[Literal["model", "dataset"], str, Path]] = [
        *(("model", f"{OWNER}/{name}", zoo_folder() / name) for name in MODELS),
        *(("dataset", f"{OWNER}/{name}", zoo_folder() / "data" / name) for name in DATASETS),
    ]
    for kind, repo, folder in repos:
        api.create_repo(repo, repo_type=kind, exist_ok=True)
        message = "Add the zoo's files"
        api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder, commit_message=message)


@contextmanager
def run_demo(folder: Path, port: int, *, quiet: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Merge, score and publish the zoo; the Hub runs until the context ends.

    Args:
        folder: is created, or replaced if it contains an earlier demo.
        port: port of the embedded Hub; 0 selects a free one.
        quiet: print no progress on stderr.

    Yields:
        The Hub's address, and the document of `merge --push` with that of the second merge as
        `regmean`.

    Raises:
        OutputError: `folder` contains other files.
    """
    from lewis_hub.localhub.server import serve

    _prepare(folder)
    with serve(folder / "hub", port=port) as hub:
        os.environ.update(  # read when huggingface_hub is imported, and by the merges
            HF_ENDPOINT=hub.url,
            HF_TOKEN=hub.write_token,
            HF_HOME=str(folder / "cache"),
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            HF_HUB_OFFLINE="0",
        )
        seed_hub(hub.api())
        yield hub.url, _merge(folder, quiet=quiet)


def _merge(folder: Path, *, quiet: bool) -> dict[str, Any]:
    """Run both merges at the same time, and print the progress of the first.

    If a merge fails, its own message is on stderr, and this exits with its code.
    """
    first, second = RECIPES
    with (
        _started(folder, first, "--push", *(["-q"] if quiet else [])) as published,
        _started(folder, second, "-o", BY_REGMEAN, "-q") as by_regmean,
    ):
        outputs = [process.communicate()[0] for process in (published, by_regmean)]
    for process in (published, by_regmean):
        if process.returncode:
            raise SystemExit(process.returncode)
    document, other = map(json.loads, outputs)
    return {**document, "regmean": other}


def _started(folder: Path, recipe: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lewis_hub", "merge", recipe, "--json", *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, encoding="utf-8")


def _prepare(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        problem = "it contains files that are not from a demo."
        raise OutputError(str(folder), problem, "Name another folder with -o.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    note = "Made by `lewis-hub demo`, which replaces this folder.\n"
    (folder / MARK).write_text(note, encoding="utf-8", newline="\n")
    for name in RECIPES:
        shutil.copy(zoo_folder() / name, folder)
    shutil.copytree(zoo_folder() / "tasks", folder / "tasks")
