"""The demo: the embedded Hub, the zoo on it, and the real command run against it over HTTP."""

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
    """What the demo left behind.

    Attributes:
        folder: holds the recipes, MERGED and BY_REGMEAN, and the Hub's files.
        url: of the embedded Hub while it serves.
        document: what ``lewis-hub merge --push --json`` printed, and under `regmean` what the
            second merge did.
    """

    folder: Path
    url: str
    document: Mapping[str, Any]


@contextmanager
def run_demo(folder: Path, port: int, *, quiet: bool) -> Iterator[Demo]:
    """Run the whole path on the zoo; the Hub serves until the context is left.

    Args:
        folder: made anew; one that is there must be an earlier demo's.
        port: of the embedded Hub; 0 takes a free one.
        quiet: no progress on stderr.

    Raises:
        OutputError: `folder` holds something else.
    """
    from lewis_hub.localhub.server import serve

    _make_anew(folder)
    for name in RECIPES:
        shutil.copy(zoo_folder() / name, folder)
    shutil.copytree(zoo_folder() / "tasks", folder / "tasks")
    with serve(folder / "hub", port=port) as hub:
        os.environ.update(_environment(folder, hub))  # read when huggingface_hub is imported
        seed_hub(hub.api())
        yield Demo(folder, hub.url, _merge(folder, quiet=quiet))


def _environment(folder: Path, hub: Hub) -> dict[str, str]:
    """What makes every client of this process and its children talk to the embedded Hub."""
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
    """Type the commands, as a user would; a failure has said why on stderr already.

    Both run at once, and the first tells how far it is.
    """
    first, second = RECIPES
    with (
        _started(folder, first, "--push", *(["-q"] if quiet else [])) as published,
        _started(folder, second, "-o", BY_REGMEAN, "-q") as by_regmean,
    ):
        told = [process.communicate()[0] for process in (published, by_regmean)]
    for process in (published, by_regmean):
        if process.returncode:
            raise SystemExit(process.returncode)
    document, other = map(json.loads, told)
    return {**document, "regmean": other}


def _started(folder: Path, recipe: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lewis_hub", "merge", recipe, "--json", *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)


def _make_anew(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise OutputError(
            str(folder),
            "it holds something else than a demo.",
            "Name another folder with -o.",
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).write_text("Made by `lewis-hub demo`, which replaces this folder.\n")
