"""What the steps of an automated run found, as the page of the run shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lewis_hub.evaluate.gate import GateVerdict
from lewis_hub.evaluate.scores import VERSION, Scores
from lewis_hub.report import markdown
from lewis_hub.report.findings import scores_table
from lewis_hub.report.gate import card_section

TITLES = {
    "published": "Published",
    "unchanged": "Nothing changed",
    "refused": "Refused by the quality gate",
    "failed": "Failed",
}


def outcome(found: Mapping[str, Any]) -> str:
    """`published`, `unchanged`, `refused` or `failed`; a run that was cut off has failed."""
    status = found.get("status")
    if status == "merged" and found.get("commit"):  # from Hub to Hub, in one command
        return "published"
    return status if status in TITLES else "failed"


def step_summary(found: Mapping[str, Any]) -> str:
    """Status, link to the commit, error, scores and the gate's verdict, as Markdown.

    Args:
        found: the documents that the commands printed with `--json`, later ones over earlier ones.
    """
    parts = [f"## {TITLES[outcome(found)]}"]
    if why := found.get("why"):
        parts.append(markdown.text(why))
    if url := found.get("commit_url"):
        where = markdown.link(markdown.code(found.get("repo")), found.get("url"))
        commit = markdown.link(markdown.code(url.rpartition("/")[2][:12]), url)
        parts.append(f"{where} at {commit}" if found.get("url") else commit)
    if error := found.get("error"):
        parts.append(markdown.fenced(error["message"], "text"))
    if tasks := found.get("scores"):
        scores = Scores.from_json(json.dumps({"version": VERSION, "tasks": tasks}))
        parts.append(scores_table(scores))
    if gate := found.get("gate"):
        parts.append(card_section(GateVerdict.from_json(json.dumps(gate))))
    return "\n\n".join(parts) + "\n"
