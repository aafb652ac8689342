"""Sections of the model card as Markdown, each a function of the card's facts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lewis_hub.calibration.profile import SourceImportance
from lewis_hub.guides.schedule import weighted_mean
from lewis_hub.hub.facts import Licence, stated_licence
from lewis_hub.hub.source import Source
from lewis_hub.report import markdown
from lewis_hub.report.citations import GUIDES, METHODS, guide_url
from lewis_hub.report.cost import Machine, StageCost
from lewis_hub.report.facts import CardFacts, Guided, Measured
from lewis_hub.report.metadata import languages
from lewis_hub.report.plots import PAIRED, WORDS
from lewis_hub.report.profiles import short_name

DISAGREE = "The licences of the parents differ"
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
BLOCKS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
IMPORTANCE = ("lewis", "lewis_reference")
DERIVED = "It derives these values from"
WHY = {  # guide -> a sentence on the origin of its densities or factors
    "lewis": f"{DERIVED} the change of importance from base to expert on calibration texts.",
    "lewis_reference": f"{DERIVED} the change of importance from base to expert on calibration "
    "texts, measured by the procedure of its authors.",
    "magnitude": f"{DERIVED} the size of the weight changes, relative to the base's weights.",
    "activation_shift": f"{DERIVED} the difference between the outputs of base and expert on "
    "calibration texts.",
    "aim": f"{DERIVED} the importance of input channels to the base on calibration texts: a module "
    "gets the lower a value, the more evenly its channels matter.",
    "owl": f"{DERIVED} each block's share of outliers in the expert on calibration texts.",
    "random": "It is a control: it assigns the densities of LEWIS to the blocks at random.",
    "inverse": "It is a control: it inverts the densities of LEWIS.",
}
PROCEDURE = (  # of the authors of LEWIS
    "texts are padded and padding counts, the model gets no attention mask, each measured block is "
    "pruned to half before the next block runs, sums over a text's tokens are averaged over texts, "
    "and shares are rounded to 5 decimals"
)
MEASUREMENT = {  # the two guides of the same paper
    "lewis": "Importance was measured in one forward pass of each unpruned model over the texts' "
    f"own tokens. The procedure that the authors published, guide `lewis_reference`, differs: "
    f"{PROCEDURE}.",
    "lewis_reference": "Importance was measured by the procedure that the authors published: "
    f"{PROCEDURE}. Guide `lewis` differs: it runs one forward pass of the unpruned model over the "
    "texts' own tokens.",
}


def summary(facts: CardFacts) -> str:
    """Sources, method and guide in a few sentences."""
    known = METHODS.get(facts.method.name)
    method = known.title if known else f"the method {markdown.code(facts.method.name)}"
    method = markdown.link(method, facts.method.paper)
    sentences = [_stacked(facts, method) if facts.stack else _merged(facts, method)]
    if facts.guided:
        sentences.append(guidance(facts.guided))
    if facts.measured:
        sentences.append(_statistics(facts))
    return " ".join(sentences)


def _merged(facts: CardFacts, method: str) -> str:
    experts = _listed([model(facts, expert) for expert in facts.experts])
    takes_base = facts.base and facts.method.takes_base
    base = f" into {model(facts, facts.base)}" if facts.base and takes_base else ""
    return f"This model merges {experts}{base} by {method}, without training."


def _stacked(facts: CardFacts, method: str) -> str:
    sources = {source.pinned: source for part in facts.stack for source, _ in part.sources}
    parents = _listed([model(facts, source) for source in sources.values()])
    return (
        f"This model stacks {facts.stack[-1].blocks.stop} blocks that are made from blocks of "
        f"{parents} by {method}, slice by slice, without training."
    )


def _statistics(facts: CardFacts) -> str:
    if facts.in_sequence:
        return (
            "The weight matrices in the blocks were fitted one after the other on calibration "
            "texts of each expert: a matrix maps the inputs that it gets in the merged model as "
            "closely as possible to the outputs of the expert."
        )
    if facts.method.needs_grams:
        how = "Each expert's weight matrices in the blocks are weighted by second moments"
    else:
        how = "Entries were ranked by magnitude times the activation norm"
    return f"{how} of their inputs on calibration texts of that expert."


def guidance(guided: Guided) -> str:
    """The range of values that the guide decided, and what they are derived from."""
    experts = guided.schedule.experts
    name = guided.guide.upper().replace("_", " ") if guided.guide in GUIDES else guided.guide
    guide = markdown.link(markdown.text(name), guide_url(guided.guide))
    factors, why = _range(expert.weights for expert in experts), WHY.get(guided.guide, "")
    if factors and not any(expert.tensors for expert in experts):
        sentence = (
            f"The guide {guide} multiplied the weight of each expert by a factor for each weight "
            f"matrix in the blocks: {factors}."
        )
        return f"{sentence} {why}".rstrip()
    densities = _range(expert.tensors for expert in experts) or "1.00"
    sentence = (
        f"The guide {guide} chose the fraction of the task vector (expert minus base) that is kept "
        f"in each weight matrix of the blocks: {densities}. {why}"
    ).rstrip()
    also = f" It also multiplied the weight of each expert there by a factor: {factors}."
    return sentence + (also if factors else "")


def _range(experts: Iterable[Mapping[str, float]]) -> str:
    """The lowest and the highest of all values; empty if there are none."""
    values = [value for expert in experts for value in expert.values()]
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:.2f}" if low == high else f"between {low:.2f} and {high:.2f}"


def details(facts: CardFacts) -> Iterator[str]:
    """Items of a list: size, architecture, languages, publisher and licence."""
    text_config = facts.config.get("text_config")
    config = text_config if isinstance(text_config, Mapping) else facts.config
    dtype = facts.dtype or "the precision of its parents"
    yield f"**Parameters:** {sum(facts.parameters.values()):,} in {markdown.text(dtype)}"
    architectures, n_blocks = facts.config.get("architectures"), _integer(config, BLOCKS)
    if isinstance(architectures, list) and architectures:
        depth = f", {n_blocks:,} blocks" if n_blocks else ""
        yield f"**Architecture:** {markdown.code(architectures[0])}{depth}"
    if n_tokens := _integer(config, CONTEXT):
        yield f"**Context:** {n_tokens:,} tokens"
    if n_vocabulary := _integer(config, ("vocab_size",)):
        yield f"**Vocabulary:** {n_vocabulary:,} tokens"
    yield f"**Chat template:** {'yes' if facts.chat else 'none'}"
    codes = ", ".join(markdown.text(language) for language in languages(facts))
    stated = f"{codes}, according to its parents' cards" if codes else "not in its parents' cards"
    yield f"**Languages:** {stated}"
    if facts.repo:
        owner = facts.repo.partition("/")[0]
        who = markdown.link(markdown.text(owner), f"{facts.endpoint}/{owner}")
        talk = markdown.link("discussions", f"{facts.endpoint}/{facts.repo}/discussions")
        yield f"**Published by:** {who}. Please send questions and reports to the {talk}."
    name = markdown.text(facts.licence) if facts.licence else "none stated"
    yield f"**Licence:** {name} ([reason](#made-from))"


def _integer(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    value = next((config[key] for key in keys if key in config), None)
    return value if type(value) is int else None


def intended(facts: CardFacts) -> Iterator[str]:
    """Items of a list: uses that are intended, that are possible, and that are not intended."""
    sources = [source for source in facts.sources if facts.models[source.pinned].url]
    cards = ", ".join(model(facts, source) for source in sources)
    task = "chat and other text generation" if facts.chat else "text generation"
    see = f": see {cards}" if cards else ""
    yield f"**Intended for:** {task} of the kind that its parents are made for{see}."
    yield "**Further use:** it can be fine-tuned, quantised or merged again, as its parents can."
    tasks = [markdown.code(name) for name in facts.scores.tasks] if facts.scores else []
    measured = f"Only {_listed(tasks)} {'was' if len(tasks) == 1 else 'were'}" if tasks else ""
    yield (
        "**Not intended for**, unless you have tested it yourself: uses in which an error harms "
        "somebody, such as advice on health, law or money, or decisions about people. "
        f"{measured or 'Nothing was'} measured here. Restrictions in the card or licence of a "
        "parent apply here too."
    )


def limits(facts: CardFacts) -> Iterator[str]:
    """Items of a list: limits that follow from calibration, code and what was not measured."""
    guided = facts.guided
    if guided:
        yield from map(markdown.text, guided.notes)
        if guided.profile and any(entry.n_tokens for entry in guided.profile.sources):
            yield (
                "The densities fit tasks that resemble the calibration texts; on other tasks they "
                "may not help."
            )
    yield from map(markdown.text, facts.notes)
    if facts.measured:
        worse = "far worse" if facts.in_sequence else "no better"
        yield (
            "The statistics fit tasks whose prompts resemble the calibration texts; on other tasks "
            f"the merge may be {worse} than a merge without them."
        )
    if facts.custom_code:
        yield "Loading it runs Python code of its base: read that code before you trust it."
    yield (
        "Nothing else was measured: safety, bias, languages and long texts were not tested. The "
        "limits of its parents are limits of this model too."
    )


def inputs(facts: CardFacts) -> str:
    """A table of the sources with their commits and licences."""
    rows = []
    for source in facts.sources:
        card = facts.models[source.pinned]
        revision = markdown.code(source.revision) if source.revision else "default"
        licence = f"{card.licence} ({card.license_name})" if card.license_name else card.licence
        rows.append(
            [
                "base" if source == facts.base else "expert",
                model(facts, source),
                "–" if source.folder else revision,
                _commit(source, card.url),
                markdown.text(licence or "not stated"),
            ]
        )
    return markdown.table(["role", "model", "revision", "commit", "licence"], rows)


def stack(facts: CardFacts) -> str | None:
    """A table of the output's blocks and the sources' blocks; the base of a slice comes first."""
    rows = []
    for part in facts.stack:
        ordered = sorted(part.sources, key=lambda pair: pair[0] != part.base)
        named = [f"{model(facts, source)} {_blocks(blocks)}" for source, blocks in ordered]
        if part.base:
            named[0] = f"base {named[0]}"
        rows.append([_blocks(part.blocks), ", ".join(named)])
    return markdown.table(["blocks", "made from blocks of"], rows) if rows else None


def _blocks(blocks: range) -> str:
    first, last = blocks[0], blocks[-1]
    return str(first) if first == last else f"{first}–{last}"


def licence(facts: CardFacts) -> str:
    """The licences of the parents, and the licence that follows or that the publisher states."""
    parents = [(source, stated_licence(facts.models[source.pinned])) for source in facts.sources]
    stated = list(dict.fromkeys(licence for _, licence in parents))
    if len(stated) > 1:
        each = "; ".join(
            f"{model(facts, source)} states {_named(licence) if licence else 'none'}"
            for source, licence in parents
        )
        reason = f"{DISAGREE}: {each}."
    elif stated[0]:
        reason = f"The cards of all parents state {_named(stated[0])}."
    else:
        reason = "The cards of the parents state no licence."
    if facts.licence is None:
        return f"{reason} So none is stated here. Ask their owners before you use or share it."
    name = _named(facts.licence)
    if not facts.licence_chosen:
        return f"{reason} So this model has the same licence: {name}."
    if stated == [facts.licence]:
        return f"{reason} The publisher states the same licence for this model: {name}."
    judgement = f"{reason} The publisher states {name} for this model, on their own judgement"
    if len(stated) > 1:
        return f"{judgement}; without such a statement lewis-hub refuses to publish."
    return f"{judgement}."


def _named(licence: Licence) -> str:
    return markdown.link(markdown.text(licence), licence.link)


def picture_note(guided: Guided) -> str:
    """An explanation of the maps."""
    density = "Density is the fraction of an expert's task vector that was kept."
    measures = guided.profile.measures if guided.profile else ()
    if not measures:
        return density
    measure = measures[0]
    if measure in IMPORTANCE:
        return (
            "The importance maps show the change of importance from base to expert, relative to "
            "the "
            "base. Importance is the norm of a module's weights times the activations of their "
            "inputs on the calibration texts. The guide distributes the change of each component "
            f"over the blocks; the density maps show the result. {density}"
        )
    how = "relative to the base" if measure in PAIRED else "and its change from base to expert"
    return f"The first map shows, per module, the {WORDS.get(measure, measure)}, {how}. {density}"


def densities(facts: CardFacts) -> str | None:
    """A table of each expert's densities: parameter-weighted mean, lowest and highest."""
    experts = facts.guided.schedule.experts if facts.guided else ()
    rows = [(expert.source, expert.tensors, expert.default_density) for expert in experts]
    return _ranges("density", rows, facts.parameters)


def weights(facts: CardFacts) -> str | None:
    """A table of the factors on each expert's weight, as `densities`."""
    experts = facts.guided.schedule.experts if facts.guided else ()
    rows = [(expert.source, expert.weights, 1.0) for expert in experts]
    return _ranges("factor of the weight", rows, facts.parameters)


def _ranges(
    value: str, experts: Iterable[tuple[str, Mapping[str, float], float]], sizes: Mapping[str, int]
) -> str | None:
    """A row for each (source, tensor -> value, value of all other tensors) with values."""
    rows = []
    for source, values, others in experts:
        if values:
            numbers = (weighted_mean(values, sizes), min(values.values()), max(values.values()))
            cells = [f"{number:.3f}" for number in numbers]
            cells += [f"{len(values):,}", f"{others:.3f}"]
            rows.append([markdown.code(short_name(source)), *cells])
    header = ["expert", f"mean {value}", "lowest", "highest", "tensors", "all other tensors"]
    return markdown.table(header, rows, right=range(1, 6)) if rows else None


def calibration(facts: CardFacts) -> str | None:
    """A table of the texts that each expert was measured on."""
    profile = facts.guided.profile if facts.guided else None
    guided = profile.by(profile.measures[0]).experts if profile and profile.measures else ()
    on_texts = [expert for expert in guided if "dataset" in expert.calibration]
    datasets = {source.pinned: source for source in facts.datasets}
    rows = []
    for expert in on_texts or facts.measured:
        settings = expert.calibration
        source = datasets.get(str(settings.get("dataset")))
        split = [str(settings[key]) for key in ("config", "split") if settings.get(key)]
        rows.append(
            [
                markdown.code(short_name(expert.source)),
                _dataset(facts, source) if source else markdown.text(settings.get("dataset")),
                markdown.code("/".join(split)),
                markdown.code(_template(settings)),
                _count(settings.get("n_texts")),
                _tokens(expert),
                _count(settings.get("n_truncated")),
            ]
        )
    header = ["expert", "dataset", "split", "template", "texts", "tokens", "truncated texts"]
    return markdown.table(header, rows, right=range(4, 7)) if rows else None


def _tokens(expert: SourceImportance | Measured) -> str:
    """The number of tokens, and how many of them are padding if padding counts."""
    in_texts: Any = expert.calibration.get("n_tokens")
    if isinstance(expert, Measured) or in_texts in (None, expert.n_tokens):
        return _count(in_texts)
    return f"{expert.n_tokens:,} counted, {expert.n_tokens - in_texts:,} of them padding"


def _template(settings: Mapping[str, Any]) -> str:
    """The way from a row to a text, on one line."""
    task = settings.get("task")
    template = f"task {task}" if task else str(settings.get("text") or settings.get("messages"))
    return template.replace("\n", r"\n")


def cost(costs: Sequence[StageCost]) -> str | None:
    """A table of time, memory and bytes of each stage."""
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
    header += ["downloaded in ranges"] if streams else []
    total = duration(sum(stage.seconds for stage in costs))
    rows.append(["all", total, *[""] * (len(header) - 2)])
    return markdown.table(header, rows, range(1, len(header)))


def machine(described: Machine) -> str:
    """The machine of a run, as plain text."""
    memory = f", {size(described.memory_bytes)} of memory" if described.memory_bytes else ""
    cores = "1 core" if described.n_cores == 1 else f"{described.n_cores:,} cores"
    device = f"{described.accelerator}, and " if described.accelerator else ""
    return f"{device}{cores} of {described.processor}{memory}"


def model(facts: CardFacts, source: Source) -> str:
    """A model by its name; a local folder by its last part, which shows nothing of a disk."""
    if source.folder:
        return f"the local folder {markdown.code(source.folder.name)}"
    return markdown.link(markdown.code(source.name), facts.models[source.pinned].url)


def _dataset(facts: CardFacts, source: Source) -> str:
    if source.folder:
        return f"the local {markdown.code(source.folder.name)}, {_commit(source, None)}"
    url = f"{facts.endpoint}/datasets/{source.name}"
    return f"{markdown.link(markdown.code(source.name), url)} at {_commit(source, url)}"


def _commit(source: Source, url: str | None) -> str:
    short = markdown.code(source.commit_sha.removeprefix("sha256:")[:12])
    if source.folder:
        return f"content {short}"
    return markdown.link(short, f"{url}/tree/{source.commit_sha}" if url else None)


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def duration(seconds: float) -> str:
    """A time for readers: `12.3 s`, `1 min 16 s`, `2 h 3 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(n_bytes: int | None) -> str:
    """A size for readers: `250.0 MB`; a dash if it is unknown."""
    if n_bytes is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"
