"""Publish: where a merge goes is looked at first and written to last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.hub.change import Additions
from lewis_hub.hub.publish import Publication, Published, folder_bytes, publish
from lewis_hub.hub.target import Target, open_target
from lewis_hub.progress import Progress
from lewis_hub.recipe import Publishing

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Destination:
    """A repo as it was before the work began, and how the result is to land in it."""

    asked: Publishing
    target: Target


def open_destination(asked: Publishing, api: HfApi) -> Destination:
    """Make sure, before any work, that a push can end well.

    Raises:
        PublishError: no token, one that may not write there, or no such namespace.
    """
    return Destination(asked, open_target(api, asked.repo, asked.landing))


def push(
    folder: Path,
    destination: Destination,
    api: HfApi,
    progress: Progress,
    sent: Additions | None = None,
) -> Published:
    """Push a folder in one commit, unless somebody pushed to the repo since it was looked at.

    Args:
        folder: the model.
        destination: where it goes.
        api: the Hub.
        progress: told the bytes.
        sent: files of the model that were sent ahead.

    Raises:
        PublishError: the repo is as it was before.
    """
    asked = destination.asked
    publication = Publication(
        message="Merge with lewis-hub",
        landing=asked.landing,
        tag=asked.tag,
        private=asked.private,
        expected_parent=destination.target.head,
    )
    with progress.stage("Publishing", folder_bytes(folder), "bytes") as advance:
        return publish(api, folder, asked.repo, publication, advance, sent)
