"""What the quality gate found, in words."""

from __future__ import annotations

from collections.abc import Iterator

from lewis_hub.evaluate.gate import EXPERT, Check, GateVerdict
from lewis_hub.report import markdown
from lewis_hub.report.findings import NAMES, model_name, number, signed

RIVALS = {"base": "the base"} | {label: f"its {name}" for label, name in NAMES.items()}


def card_section(verdict: GateVerdict) -> str:
    """The part of a card that tells the verdict, as Markdown."""
    told = "refused this merge" if verdict.missed else "let this merge pass"
    rule = "A difference counts where its whole interval lies beyond what is tolerated."
    lines = [f"- {markdown.text(sentence)}" for sentence in sentences(verdict)]
    return "\n".join(["### Quality gate", "", f"The gate {told}. {rule}", "", *lines])


def sentences(verdict: GateVerdict) -> Iterator[str]:
    """One a check, what was missed first; plain text."""
    for check in sorted(verdict.checks, key=lambda check: not check.missed):
        yield f"{_told(check)}."


def refusal(verdict: GateVerdict) -> str:
    """By how much and on what, without a full stop."""
    return "; ".join(map(_told, verdict.missed))


def _told(check: Check) -> str:
    where = f"on {check.task} ({check.metric.removesuffix(',none')})"
    rival = _rival(check.against)
    if check.difference is None or check.ci95 is None or check.other is None:
        return f"{where} not compared with {rival}: {check.why}"
    word = "worse than" if check.missed else "not worse than"
    low, high = check.ci95
    allowed = f", {number(check.tolerance)} is tolerated" if check.tolerance else ""
    return (
        f"{where} {word} {rival}: {number(check.value)} against {number(check.other)} (difference "
        f"{signed(check.difference)}, 95 % interval {signed(low)} to {signed(high)}{allowed})"
    )


def _rival(label: str) -> str:
    repo, at, sha = label.partition("@")
    if at and not label.startswith(EXPERT):
        return f"{repo} at {sha[:8]}"
    return RIVALS.get(label, model_name(label))
