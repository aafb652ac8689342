"""The tables of a card, in Markdown; those of the scores are in `findings`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lewis_hub.guides.budget import weighted_mean
from lewis_hub.guides.importance import SourceImportance
from lewis_hub.hub.source import Source
from lewis_hub.report import markdown
from lewis_hub.report.cost import StageCost
from lewis_hub.report.facts import CardFacts, Measured
from lewis_hub.report.machine import Machine
from lewis_hub.report.plots import short_name


def inputs(facts: CardFacts) -> str:
    """Each source with the commit that it was pinned to."""
    rows = []
    for source in facts.sources:
        told = facts.models[source.pinned]
        role = "base" if source == facts.base else "expert"
        asked = markdown.code(source.revision) if source.revision else "default"
        licence = f"{told.licence} ({told.license_name})" if told.license_name else told.licence
        rows.append(
            [
                role,
                model(facts, source),
                asked if source.folder is None else "–",
                _commit(source, told.url),
                markdown.text(licence or "not stated"),
            ]
        )
    return markdown.table(["role", "model", "revision asked", "pinned to", "licence"], rows)


def stack(facts: CardFacts) -> str | None:
    """Which blocks of which source became which of the output; the base of a slice first."""
    if not facts.stack:
        return None
    rows = []
    for one in facts.stack:
        ordered = sorted(one.sources, key=lambda pair: pair[0] != one.base)
        named = [f"{model(facts, source)} {_blocks(blocks)}" for source, blocks in ordered]
        if one.base:
            named[0] = f"base {named[0]}"
        rows.append([_blocks(one.blocks), ", ".join(named)])
    return markdown.table(["blocks", "made from blocks of"], rows)


def _blocks(blocks: range) -> str:
    first, last = blocks[0], blocks[-1]
    return str(first) if first == last else f"{first}–{last}"


def densities(facts: CardFacts) -> str | None:
    """Each expert's densities in short; the mean is weighted by parameters."""
    if facts.guided is None:
        return None
    experts = facts.guided.schedule.experts
    densities = [(e.source, e.tensors, e.default_density) for e in experts]
    return _in_short("density", densities, facts.parameters)


def weights(facts: CardFacts) -> str | None:
    """Likewise, what each expert's weight was multiplied by."""
    experts = facts.guided.schedule.experts if facts.guided else ()
    factors = [(e.source, e.weights, 1.0) for e in experts]
    return _in_short("factor of the weight", factors, facts.parameters)


def _in_short(
    what: str,
    experts: Iterable[tuple[str, Mapping[str, float], float]],
    sizes: Mapping[str, int],
) -> str | None:
    """A row for each (source, tensor -> value, value of all others) that has any."""
    rows = []
    for source, values, others in experts:
        if values:
            told = (weighted_mean(values, sizes), min(values.values()), max(values.values()))
            numbers = [f"{value:.3f}" for value in told]
            name = markdown.code(short_name(source))
            rows.append([name, *numbers, f"{len(values):,}", f"{others:.3f}"])
    header = ["expert", f"mean {what}", "lowest", "highest", "tensors", "all other tensors"]
    return markdown.table(header, rows, right=range(1, 6)) if rows else None


def calibration(facts: CardFacts) -> str | None:
    """What each expert was measured on."""
    profile = facts.guided.profile if facts.guided else None
    guided = profile.by(profile.measures[0]).experts if profile and profile.measures else ()
    on_texts = [expert for expert in guided if "dataset" in expert.calibration]
    datasets = {source.pinned: source for source in facts.datasets}
    rows = []
    for expert in on_texts or facts.measured:
        told = expert.calibration
        source = datasets.get(str(told.get("dataset")))
        split = "/".join(str(part) for part in (told.get("config"), told.get("split")) if part)
        rows.append(
            [
                markdown.code(short_name(expert.source)),
                _dataset(facts, source) if source else markdown.text(told.get("dataset")),
                markdown.code(split),
                markdown.code(_template(told)),
                _count(told.get("n_texts")),
                _tokens(expert),
                _count(told.get("n_truncated")),
            ]
        )
    header = ["expert", "dataset", "split", "template", "texts", "tokens", "texts cut"]
    return markdown.table(header, rows, right=range(4, 7)) if rows else None


def _tokens(expert: SourceImportance | Measured) -> str:
    """How many counted, and how many of them are padding where that does."""
    in_texts: Any = expert.calibration.get("n_tokens")
    if isinstance(expert, Measured) or in_texts in (None, expert.n_tokens):
        return _count(in_texts)
    return f"{expert.n_tokens:,} counted, {expert.n_tokens - in_texts:,} of them padding"


def _template(told: Mapping[str, Any]) -> str:
    """How rows became texts, in one line."""
    task = told.get("task")
    named = f"task {task}" if task else str(told.get("text") or told.get("messages"))
    return named.replace("\n", r"\n")


def cost(costs: Sequence[StageCost]) -> str | None:
    """What each stage took."""
    if not costs:
        return None
    streams = any(stage.fetched_bytes is not None for stage in costs)
    rows = [
        [
            markdown.text(stage.stage),
            duration(stage.seconds),
            size(stage.peak_rss_bytes),
            size(stage.read_bytes),
            size(stage.written_bytes),
            *([size(stage.fetched_bytes)] if streams else []),
        ]
        for stage in costs
    ]
    header = ["stage", "time", "peak memory", "read", "written"]
    header += ["from the Hub by ranges"] if streams else []
    seconds = duration(sum(stage.seconds for stage in costs))
    rows.append(["all", seconds, *[""] * (len(header) - 2)])
    return markdown.table(header, rows, range(1, len(header)))


def machine(found: Machine) -> str:
    """What a run was made on, as plain text."""
    memory = f", {size(found.memory_bytes)} of memory" if found.memory_bytes else ""
    cores = "1 core" if found.n_cores == 1 else f"{found.n_cores:,} cores"
    device = f"{found.accelerator}, and " if found.accelerator else ""
    return f"{device}{cores} of {found.processor}{memory}"


def model(facts: CardFacts, source: Source) -> str:
    """A model by its name; of a local folder only the last part, which tells nothing of a disk."""
    if source.folder:
        return f"the local folder {markdown.code(source.folder.name)}"
    return markdown.link(markdown.code(source.name), facts.models[source.pinned].url)


def _dataset(facts: CardFacts, source: Source) -> str:
    if source.folder:
        return f"the local {markdown.code(source.folder.name)}, {_commit(source, None)}"
    url = f"{facts.endpoint}/datasets/{source.name}"
    return f"{markdown.link(markdown.code(source.name), url)} at {_commit(source, url)}"


def _commit(source: Source, url: str | None) -> str:
    short = source.commit_sha.removeprefix("sha256:")[:12]
    if source.folder:
        return f"content {markdown.code(short)}"
    return markdown.link(markdown.code(short), f"{url}/tree/{source.commit_sha}" if url else None)


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def duration(seconds: float) -> str:
    """A time as people read it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(n_bytes: int | None) -> str:
    """A size as people read it; a dash where nobody counted."""
    if n_bytes is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"
