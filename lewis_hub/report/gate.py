"""What the quality gate found, in words."""

from __future__ import annotations

from collections.abc import Iterator

from lewis_hub.evaluate.gate import Check, GateVerdict
from lewis_hub.report import markdown
from lewis_hub.report.findings import model_name, number, signed

HEADING = "### Quality gate"


def card_section(verdict: GateVerdict) -> str:
    """The part of a card that tells the verdict, as Markdown."""
    told = "This merge passed." if not verdict.missed else "This merge was refused."
    lines = [f"- {markdown.text(sentence)}" for sentence in sentences(verdict)]
    return "\n".join(
        [HEADING, "", f"{told} It is refused where the whole interval lies below.", "", *lines]
    )


def sentences(verdict: GateVerdict) -> Iterator[str]:
    """One a check, what was missed first; plain text."""
    for check in sorted(verdict.checks, key=lambda check: not check.missed):
        yield f"{check.task} ({check.metric}): {_found(check)}."


def refusal(verdict: GateVerdict) -> str:
    """By how much and on what, for a message."""
    missed = GateVerdict(verdict.missed)
    return "; ".join(sentence.rstrip(".") for sentence in sentences(missed))


def _found(check: Check) -> str:
    rival = model_name(check.against)
    if check.difference is None or check.ci95 is None or check.other is None:
        return f"not compared with {rival}: {check.why}"
    word = "worse than" if check.missed else "not worse than"
    low, high = check.ci95
    allowed = f", {number(check.tolerance)} is tolerated" if check.tolerance else ""
    return (
        f"{number(check.value)} is {word} {rival} with {number(check.other)} (difference "
        f"{signed(check.difference)}, 95 % interval {signed(low)} to {signed(high)}{allowed})"
    )
