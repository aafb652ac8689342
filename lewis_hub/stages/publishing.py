"""Publish: where a merge goes is looked at first and written to last."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.errors import GateRefusedError
from lewis_hub.evaluate.gate import GateVerdict
from lewis_hub.hub.publish import Publication, Published, folder_bytes, publish
from lewis_hub.hub.target import Target, open_target
from lewis_hub.progress import Progress
from lewis_hub.recipe import Publishing
from lewis_hub.report import markdown
from lewis_hub.report.findings import scores_table
from lewis_hub.report.gate import refusal, sentences
from lewis_hub.stages.gating import read_scores, read_verdict

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
    folder: Path, destination: Destination, api: HfApi, progress: Progress, *, force: bool
) -> Published:
    """Push a folder in one commit, unless somebody pushed to the repo since it was looked at.

    What the quality gate refused goes nowhere, or into a pull request that says so, as the gate
    asks; with `force` it goes where everything goes, and the commit says so.

    Raises:
        PublishError: the repo is as it was before.
        GateRefusedError: so it is here.
    """
    asked, verdict = destination.asked, read_verdict(folder)
    missed = verdict if verdict and verdict.missed else None
    if missed and missed.stops and not force:
        raise refused(folder, missed, None)
    proposes = missed is not None and not force
    publication = Publication(
        message="Merge with lewis-hub" + (", below the quality gate" if missed else ""),
        description=_below(folder, missed) if missed else "",
        landing="pull-request" if proposes else asked.landing,
        tag=None if proposes else asked.tag,
        private=asked.private,
        expected_parent=destination.target.head,
    )
    with progress.stage("Publishing", folder_bytes(folder), "bytes") as advance:
        return publish(api, folder, asked.repo, publication, advance)


def refused(folder: Path, verdict: GateVerdict, proposed_at: str | None) -> GateRefusedError:
    """The gate's message: by how much, on what, and what can be done.

    Args:
        folder: the merged model's.
        verdict: one that was missed.
        proposed_at: the address of the pull request that was opened instead.
    """
    problem = f"below the quality gate: {refusal(verdict)}"
    if proposed_at:
        remedy = f"Main is as it was; the merge is proposed at {proposed_at}."
    else:
        command = f"lewis-hub push {shlex.quote(str(folder))} OWNER/NAME --force"
        remedy = f"Nothing was pushed. The merge is kept: `{command}` publishes it all the same."
    return GateRefusedError(str(folder), problem, remedy)


def _below(folder: Path, verdict: GateVerdict) -> str:
    """Verdict and scores, as a pull request shows them."""
    told = "\n".join(f"- {markdown.text(sentence)}" for sentence in sentences(verdict))
    scores = read_scores(folder)
    table = scores_table(scores) if scores else ""
    return f"This merge missed its quality gate.\n\n{told}\n\n{table}"
