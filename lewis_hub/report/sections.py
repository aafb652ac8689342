"""What a card says of the model as such: shape, languages, what it is for, its licence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lewis_hub.calibration.profile import SourceImportance
from lewis_hub.guides.schedule import weighted_mean
from lewis_hub.hub.facts import Licence, stated_licence
from lewis_hub.hub.source import Source
from lewis_hub.recipe.schema import REPO
from lewis_hub.report import markdown
from lewis_hub.report.citations import GUIDES
from lewis_hub.report.cost import Machine, StageCost
from lewis_hub.report.facts import CardFacts, Guided, Measured
from lewis_hub.report.findings import MERGED
from lewis_hub.report.plots import PAIRED, WORDS, short_name

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from lewis_hub.merge.extract_lora import Extracted


IMPORTANCE = ("lewis", "lewis_reference")
WHY = {  # of a guide that we know: how the sentence about its densities ends
    "lewis": ", from how importance on calibration texts changed from base to expert",
    "lewis_reference": ", from how importance on calibration texts, as the authors' own procedure "
    "measures it, changed from base to expert",
    "magnitude": ", from how far the weights moved, relative to the base's",
    "activation_shift": ", from how much a module's output on calibration texts differs from base "
    "to expert",
    "aim": ", the less, the more evenly the input channels matter to the base on calibration texts",
    "owl": ", from each block's share of outliers in the expert on calibration texts",
    "random": "; as a control, the densities of LEWIS were dealt out at random among the blocks",
    "inverse": "; as a control, the densities of LEWIS were turned upside down",
}
HOW = {  # the two guides of one paper measure it
    "lewis": "Importance was measured in one forward pass of each unpruned model, over the texts' "
    "own tokens. The procedure that the authors published, guide `lewis_reference`, differs: texts "
    "are padded and padding counts, no mask is handed on, each measured block is pruned to half "
    "before the next one runs, sums over a text's tokens are averaged over texts, and shares are "
    "rounded to 5 decimals.",
    "lewis_reference": "Importance was measured by the procedure that the authors published: texts "
    "were padded and padding counted, no mask was handed on, each measured block was pruned to "
    "half before the next one ran, sums over a text's tokens were averaged over texts, and shares "
    "were rounded to 5 decimals. Guide `lewis` differs: it takes one forward pass of the unpruned "
    "model over the texts' own tokens.",
}


def sentence(guided: Guided) -> str:
    """What the guide decided, in Markdown."""
    paper = GUIDES.get(guided.guide)
    name = guided.guide.upper().replace("_", " ") if paper else guided.guide
    guide = markdown.link(markdown.text(name), paper.url if paper else None)
    experts, why = guided.schedule.experts, WHY.get(guided.guide, "")
    weights = _spread(expert.weights for expert in experts)
    if weights and not any(expert.tensors for expert in experts):
        return (
            f"The guide {guide} multiplied each expert's weight by a factor of its own in every "
            f"weight matrix of the blocks: {weights}{why}."
        )
    densities = _spread(expert.tensors for expert in experts) or "1.00"
    also = f" It multiplied the expert's weight there by a factor: {weights}." if weights else ""
    return (
        f"Of each task vector (expert minus base) the guide {guide} kept a fraction of its own in "
        f"every weight matrix of the blocks: {densities}{why}.{also}"
    )


def measured_how(guided: Guided) -> str:
    """What tells the guide's measure from one that is nearly the same; nothing of most."""
    return HOW.get(guided.guide, "")


def picture_note(guided: Guided) -> str:
    """What the pictures show."""
    told = "Density is the fraction of an expert's task vector that was kept."
    measures = guided.profile.measures if guided.profile else ()
    if not measures:
        return told
    first = measures[0]
    if first in IMPORTANCE:
        return (
            "The maps of importance show, per module, how much the calibration texts' weighted "
            "activations changed from base to expert, relative to the base. The guide shares each "
            "component's change out over the blocks; the maps of density show what it kept. "
        ) + told
    what = WORDS.get(first, first)
    how = "relative to the base" if first in PAIRED else "and its change from base to expert"
    return f"The first map shows, per module, the {what}, {how}. {told}"


def limits(guided: Guided) -> Iterator[str]:
    """What a reader should beware of."""
    yield from (markdown.text(note) for note in guided.notes)
    if guided.profile and any(entry.n_tokens for entry in guided.profile.sources):
        yield (
            "The densities suit tasks that resemble the calibration texts; elsewhere they may "
            "help nothing."
        )


def _spread(values: Iterator[Mapping[str, float]]) -> str:
    """The lowest and the highest of all; nothing where there are none."""
    every = [value for one in values for value in one.values()]
    if not every:
        return ""
    low, high = min(every), max(every)
    return f"{low:.2f}" if low == high else f"between {low:.2f} and {high:.2f}"


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
                _count_cell(told.get("n_texts")),
                _tokens(expert),
                _count_cell(told.get("n_truncated")),
            ]
        )
    header = ["expert", "dataset", "split", "template", "texts", "tokens", "texts cut"]
    return markdown.table(header, rows, right=range(4, 7)) if rows else None


def _tokens(expert: SourceImportance | Measured) -> str:
    """How many counted, and how many of them are padding where that does."""
    in_texts: Any = expert.calibration.get("n_tokens")
    if isinstance(expert, Measured) or in_texts in (None, expert.n_tokens):
        return _count_cell(in_texts)
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


def _count_cell(value: object) -> str:
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


def adapter_card(base: Source, expert: Source, licence: str | None, extracted: Extracted) -> str:
    """Its `README.md`: metadata as the Hub reads it, and how close each update comes."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=None if base.folder else base.name,
        base_model_relation=None if base.folder else "adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "lewis-hub"],
        license=licence,
    )
    worst = sorted(extracted.fits.items(), key=lambda item: -item[1].error)[:5]
    rows = [[markdown.code(module), str(fit.rank), f"{fit.error:.4f}"] for module, fit in worst]
    missed = markdown.table(["module", "rank", "missed"], rows, right=(1, 2))
    errors = [fit.error for fit in extracted.fits.values()]
    mean = math.fsum(errors) / len(errors) if errors else 0.0
    whole = f"\n{len(extracted.whole)} tensors that are no matrix of a block differ too, and are "
    whole += "kept whole.\n"
    return (
        f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n"
        f"A LoRA adapter that makes {markdown.code(expert.pinned)} of "
        f"{markdown.code(base.pinned)}, extracted by singular value decomposition of their "
        f"difference, without training.\n\n"
        f"Of the task vectors of {len(errors)} modules it misses {mean:.2%} on average (Frobenius "
        f"norm of the rest, as a share). The most is missed of:\n\n{missed}\n"
        f"{whole if extracted.whole else ''}"
    )


HUB_REPO = re.compile(rf"{REPO.pattern}|[A-Za-z0-9][\w.-]*", re.ASCII)  # gpt2 has no owner
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.-]*")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")


def card_data(facts: CardFacts) -> ModelCardData:
    """The metadata: parents, licence, languages, data, tags, and the merged model's own scores.

    What the Hub would not accept is left out: local folders, licence links that lead nowhere,
    scores that are not finite.
    """
    from huggingface_hub import ModelCardData

    results = list(_eval_results(facts))
    scored: dict[str, Any] = {"eval_results": results, "model_name": facts.title or "merge"}
    parents = [one.name for one in facts.sources if one.folder is None]
    data = [one.name for one in facts.datasets if one.folder is None]
    guide = [facts.guided.guide] if facts.guided else []
    return ModelCardData(
        base_model=_repos(parents) or None,
        base_model_relation="merge",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merge", "lewis-hub", *guide, facts.method.name],
        language=languages(facts) or None,
        datasets=_repos(data) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        **_licence(facts),
        **(scored if results else {}),
    )


def _repos(names: Iterable[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if HUB_REPO.fullmatch(name)]


def languages(facts: CardFacts) -> list[str]:
    """What the parents' cards state, each once; what is no language code is left out."""
    told = (facts.models[one.pinned].languages for one in facts.sources)
    found = dict.fromkeys(language for languages in told for language in languages)
    return [language for language in found if LANGUAGE.fullmatch(language)]


def _licence(facts: CardFacts) -> dict[str, Any]:
    """An identifier of the Hub's, or `other` with a name and, where there is one, a link."""
    licence = facts.licence
    if licence is None:
        return {}
    identifiers = licence.identifier.lower().split(" or ")
    if all(IDENTIFIER.fullmatch(identifier) for identifier in identifiers):
        told: dict[str, Any] = {"license": identifiers[0] if len(identifiers) == 1 else identifiers}
        name = licence.name
    else:
        told, name = {"license": "other"}, licence.name or licence.identifier
    slug = re.sub(r"[^a-z0-9.-]+", "-", (name or "").lower())[:60].strip("-.")
    if slug:
        told["license_name"] = slug
    if licence.link in ("LICENSE", "LICENSE.md", "LICENSE.txt"):
        told["license_link"] = licence.link
    elif address := markdown.web_address(licence.link):
        told["license_link"] = address
    return told


def _eval_results(facts: CardFacts) -> Iterable[EvalResult]:
    from huggingface_hub import EvalResult

    for task, scored in facts.scores.tasks.items() if facts.scores else ():
        for key, score in scored.models.get(MERGED, {}).items():
            if math.isfinite(score.value):
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=task,
                    dataset_name=task,
                    metric_type=key.partition(",")[0],
                    metric_name=key,
                    metric_value=float(score.value),
                )


DISAGREE = "The parents do not agree"
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
BLOCKS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def details(facts: CardFacts) -> Iterator[str]:
    """Lines of a list, as Markdown."""
    text_config = facts.config.get("text_config")
    config = text_config if isinstance(text_config, Mapping) else facts.config
    n_parameters, dtype = sum(facts.parameters.values()), facts.dtype or "its parents' precision"
    yield f"**Parameters:** {n_parameters:,} in {markdown.text(dtype)}"
    named = facts.config.get("architectures")
    n_blocks = _count(config, BLOCKS)
    if isinstance(named, list) and named:
        depth = f", {n_blocks:,} blocks" if n_blocks else ""
        yield f"**Architecture:** {markdown.code(named[0])}{depth}"
    if n_tokens := _count(config, CONTEXT):
        yield f"**Context:** {n_tokens:,} tokens"
    if n_vocabulary := _count(config, ("vocab_size",)):
        yield f"**Vocabulary:** {n_vocabulary:,} tokens"
    yield f"**Chat template:** {'yes' if facts.chat else 'none'}"
    spoken = ", ".join(markdown.text(language) for language in languages(facts))
    told = f"{spoken}, as its parents' cards say" if spoken else "its parents' cards say none"
    yield f"**Languages:** {told}"
    if facts.repo:
        owner = facts.repo.partition("/")[0]
        place = f"{facts.endpoint}/{owner}"
        talk = markdown.link("discussions", f"{facts.endpoint}/{facts.repo}/discussions")
        who = markdown.link(markdown.text(owner), place)
        yield f"**Published by:** {who}; questions and reports go to its {talk}"
    stated = markdown.text(facts.licence) if facts.licence else "none stated"
    yield f"**Licence:** {stated} ([why](#made-from))"


def intended(facts: CardFacts) -> Iterator[str]:
    """Lines of a list: for what, on what it was tested, and for what not."""
    sources = [source for source in facts.sources if facts.models[source.pinned].url]
    cards = ", ".join(model(facts, source) for source in sources)
    where = f": see {cards}" if cards else ""
    task = "Chat and other text generation" if facts.chat else "Text generation"
    yield f"**Meant for:** {task} of the kind that its parents were made for{where}."
    yield "**Further:** it can be fine-tuned, quantised or merged again like any of its parents."
    tasks = [markdown.code(name) for name in facts.scores.tasks] if facts.scores else []
    measured = f"Beyond {', '.join(tasks)} nothing" if tasks else "Nothing"
    yield (
        "**Not meant for**, until you have tested it for that yourself: what harms somebody when "
        "it goes wrong, such as advice on health, law or money, or decisions about people. "
        f"{measured} was measured here. What a parent's card or licence rules out is ruled out too."
    )


def licence(facts: CardFacts) -> str:
    """What each parent says, what follows from it, and who decided."""
    parents = [(one, stated_licence(facts.models[one.pinned])) for one in facts.sources]
    stated = list(dict.fromkeys(said for _, said in parents))
    if len(stated) > 1:
        reasons = "; ".join(f"{model(facts, one)} {_says(said)}" for one, said in parents)
        reason = f"{DISAGREE}: {reasons}."
    elif stated[0]:
        reason = f"The cards of all its parents say {_named(stated[0])}."
    else:
        reason = "None of the parents' cards states a licence."
    if facts.licence is None:
        return f"{reason} No licence is stated here. Ask their owners before you use or share it."
    name = _named(facts.licence)
    if not facts.licence_chosen:
        return f"{reason} So this model is under the same: {name}."
    if stated == [facts.licence]:
        return f"{reason} Its publisher states the same for this model: {name}."
    judged = f"{reason} Its publisher states {name} for this model, which is their own judgement"
    return (
        f"{judged}: without it lewis-hub refuses to publish." if len(stated) > 1 else f"{judged}."
    )


def _says(stated: Licence | None) -> str:
    return f"says {_named(stated)}" if stated else "says nothing"


def _named(stated: Licence) -> str:
    return markdown.link(markdown.text(stated), stated.link)


def _count(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    found = next((config[key] for key in keys if key in config), None)
    return found if type(found) is int else None
