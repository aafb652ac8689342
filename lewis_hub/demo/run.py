"""The demo: run `lewis-hub merge` on the zoo, against an embedded Hub over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.demo.zoo import seed_hub, zoo_folder
from lewis_hub.errors import OutputError

if TYPE_CHECKING:
    from lewis_hub.localhub.hub import Hub


MARK = ".lewis-hub-demo"
RECIPES = ("recipe.yaml", "recipe-regmean.yaml")
MERGED, BY_REGMEAN = "merged", "merged-regmean"


@dataclass(frozen=True)
class Demo:
    """The results of the demo.

    Attributes:
        folder: contains the recipes, MERGED and BY_REGMEAN, and the Hub's files.
        url: address of the embedded Hub while it runs.
        document: the output of ``lewis-hub merge --push --json``; `regmean` in it is that of the
            second merge.
    """

    folder: Path
    url: str
    document: Mapping[str, Any]


@contextmanager
def run_demo(folder: Path, port: int, *, quiet: bool) -> Iterator[Demo]:
    """Merge, score and publish the zoo; the Hub runs until the context ends.

    Args:
        folder: is created, or replaced if it contains an earlier demo.
        port: port of the embedded Hub; 0 selects a free one.
        quiet: print no progress on stderr.

    Raises:
        OutputError: `folder` contains other files.
    """
    from lewis_hub.localhub.server import serve

    _prepare(folder)
    for name in RECIPES:
        shutil.copy(zoo_folder() / name, folder)
    shutil.copytree(zoo_folder() / "tasks", folder / "tasks")
    with serve(folder / "hub", port=port) as hub:
        os.environ.update(_environment(folder, hub))  # read when huggingface_hub is imported
        seed_hub(hub.api())
        yield Demo(folder, hub.url, _merge(folder, quiet=quiet))


def _environment(folder: Path, hub: Hub) -> dict[str, str]:
    """The variables that point this process and its children at the embedded Hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.write_token,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
    }


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
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)


def _prepare(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise OutputError(
            str(folder),
            "it contains files that are not from a demo.",
            "Name another folder with -o.",
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).write_text("Made by `lewis-hub demo`, which replaces this folder.\n")
