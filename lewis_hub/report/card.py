"""The model card: `README.md`, from `templates/card.md.j2`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lewis_hub.report import findings, markdown, page, sections
from lewis_hub.report.citations import HARNESS, METHODS, papers
from lewis_hub.report.facts import CardFacts
from lewis_hub.report.findings import card_section
from lewis_hub.report.lock import BUILDER
from lewis_hub.report.plots import Plot, short_name
from lewis_hub.report.sections import card_data

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


TEMPLATE = "card.md.j2"
OURSELVES = "lewis_hub"


def model_card(facts: CardFacts) -> ModelCard:
    """Write the card: what the model is, how good, from what, at which cost, and how to redo it.

    The same facts give the same text.
    """
    from huggingface_hub import ModelCard
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("lewis_hub.templates").joinpath(TEMPLATE).read_text(encoding="utf-8")
    body = environment.from_string(template).render(
        **_what_it_is(facts), **_how_good(facts), **_from_what(facts), **_how_again(facts)
    )
    return ModelCard(f"---\n{card_data(facts).to_yaml(line_break=chr(10))}\n---\n\n{body}")


def _what_it_is(facts: CardFacts) -> dict[str, Any]:
    return {
        "title": markdown.text(facts.title),
        "summary": _summary(facts),
        "details": list(sections.details(facts)),
        "intended": list(sections.intended(facts)),
        "page": page.FILE,
        "snippet": markdown.fenced(usage(facts), "python"),
        "pictures": list(_pictures(facts)),
        "densities": sections.densities(facts),
        "weights": sections.weights(facts),
        "picture_note": sections.picture_note(facts.guided) if facts.guided else "",
    }


def _how_good(facts: CardFacts) -> dict[str, Any]:
    scores = facts.scores if findings.was_scored(facts.scores) else None
    found = findings.findings(scores) if scores else None
    return {
        "scores": findings.scores_table(scores) if scores else None,
        "paired": findings.paired_table(scores) if scores else None,
        "twins": findings.twins(scores) if scores else (),
        "harness": markdown.text(f"lm-eval {facts.software.get('lm_eval', '')}".rstrip()),
        "in_chat": facts.scored_in_chat,
        "gate": card_section(facts.gate) if facts.gate else None,
        "gains": found.gains if found else (),
        "limits": [*(found.limits if found else ()), *_limits(facts)],
    }


def _from_what(facts: CardFacts) -> dict[str, Any]:
    return {
        "inputs": sections.inputs(facts),
        "stack": sections.stack(facts),
        "licence": sections.licence(facts),
        "calibration": sections.calibration(facts),
        "measured_how": sections.measured_how(facts.guided) if facts.guided else "",
        "recipe": markdown.fenced(facts.recipe, "yaml"),
        "mergekit": facts.mergekit,
        "bibtex": _bibtex(facts),
    }


def _how_again(facts: CardFacts) -> dict[str, Any]:
    return {
        "reproduce": markdown.fenced(_reproduce(facts), "bash"),
        "digest": markdown.code(facts.digest),
        "software": _software(facts),
        "cost": sections.cost(facts.costs),
        "machine": markdown.text(sections.machine(facts.machine)) if facts.machine else None,
        "whole_process": any(cost.peak_over == "process" for cost in facts.costs),
    }


def _software(facts: CardFacts) -> str:
    """What the work was done with; ourselves with an address."""
    told = {name: markdown.text(f"{name} {version}") for name, version in facts.software.items()}
    if OURSELVES in told:
        told[OURSELVES] = markdown.link(told[OURSELVES], BUILDER)
    return ", ".join(told.values())


def usage(facts: CardFacts) -> str:
    """A Python program that loads the model and lets it write.

    A model that has no repo is loaded from the folder in which the program is started.
    """
    options = ", trust_remote_code=True" if facts.custom_code else ""
    if facts.chat:
        question = 'messages = [{"role": "user", "content": "What can you do?"}]'
        encode = (
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
            ").to(model.device)"
        )
    else:
        question = 'prompt = "Once upon a time"'
        encode = 'inputs = tokenizer(prompt, return_tensors="pt").to(model.device)'
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"name = {json.dumps(facts.repo or '.')}"
            + ("" if facts.repo else "  # the folder that holds this card"),
            f"tokenizer = AutoTokenizer.from_pretrained(name{options})",
            f'model = AutoModelForCausalLM.from_pretrained(name, device_map="auto"{options})',
            "",
            question,
            encode,
            "output = model.generate(**inputs, max_new_tokens=64)",
            'answer = output[0, inputs["input_ids"].shape[1] :]',
            "print(tokenizer.decode(answer, skip_special_tokens=True))",
        ]
    )


def _summary(facts: CardFacts) -> str:
    known = METHODS.get(facts.method.name)
    method = known.title if known else f"the method {markdown.code(facts.method.name)}"
    method = markdown.link(method, facts.method.paper)
    told = [_stacked(facts, method) if facts.stack else _merged(facts, method)]
    if facts.guided:
        told.append(sections.sentence(facts.guided))
    if facts.measured:
        told.append(_statistics(facts))
    return " ".join(told)


def _merged(facts: CardFacts, method: str) -> str:
    experts = _listed([sections.model(facts, one) for one in facts.experts])
    base = (
        f" into {sections.model(facts, facts.base)}"
        if facts.base and facts.method.takes_base
        else ""
    )
    return f"This model merges {experts}{base} by {method}; nothing was trained."


def _stacked(facts: CardFacts, method: str) -> str:
    sources = {source.pinned: source for one in facts.stack for source, _ in one.sources}
    parents = _listed([sections.model(facts, source) for source in sources.values()])
    return (
        f"This model stacks {facts.stack[-1].blocks.stop} blocks, made from blocks of {parents} by "
        f"{method}, slice by slice; nothing was trained."
    )


def _statistics(facts: CardFacts) -> str:
    if facts.in_sequence:
        return (
            "The weight matrices in the blocks were fitted one after the other: on calibration "
            "texts of each expert's own, a matrix makes of the inputs that the merged model itself "
            "hands it the outputs that the expert has there, as nearly as it can."
        )
    if facts.method.needs_grams:
        how = "Each expert's weight matrices in the blocks count by second moments of the inputs"
    else:
        how = "Entries were ranked by magnitude times the activation norm of the inputs"
    return f"{how} that calibration texts of the expert's own drive through them."


def _pictures(facts: CardFacts) -> Iterator[tuple[str, list[str]]]:
    """(expert, its pictures) in the recipe's order."""
    plots = facts.guided.plots if facts.guided else ()
    for expert in dict.fromkeys(plot.expert for plot in plots):
        own = [_picture(facts, plot) for plot in plots if plot.expert == expert]
        yield markdown.code(short_name(expert)), own


def _picture(facts: CardFacts, plot: Plot) -> str:
    """The Hub turns a relative `src` into an address, but is not known to do so in `srcset`."""
    dark = f"lewis/{plot.dark}"
    if facts.repo and (place := markdown.web_address(f"{facts.endpoint}/{facts.repo}")):
        dark = f"{place}/resolve/main/{dark}"
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="lewis/{plot.light}" alt="{markdown.attribute(plot.caption)}"></picture>'
    )
    return f"{picture}\n\n{markdown.text(plot.note)}" if plot.note else picture


def _limits(facts: CardFacts) -> Iterator[str]:
    if facts.guided:
        yield from sections.limits(facts.guided)
    yield from (markdown.text(note) for note in facts.notes)
    if facts.measured:
        worse = "far worse" if facts.in_sequence else "no better"
        yield (
            "The statistics suit tasks whose prompts resemble the calibration texts; with other "
            f"texts the merge may be {worse} than without them."
        )
    if facts.custom_code:
        yield "It runs Python code of its base to load: read it before you trust it."
    yield (
        "What was not measured here is not known: safety, bias, languages and long texts were "
        "not tested. What limits the models above limits this one."
    )


def _reproduce(facts: CardFacts) -> str:
    version = facts.software.get(OURSELVES)
    package = f"lewis-hub=={version}" if version else "lewis-hub"
    lines = [f"pip install {shlex.quote(package)}"]
    if facts.repo:
        where = shlex.quote(facts.repo)
        lines.append(f'hf download {where} --include "lewis/*" --local-dir .')
    return "\n".join([*lines, "lewis-hub merge lewis/recipe.yaml"])


def _bibtex(facts: CardFacts) -> str | None:
    cited = papers(facts.method.name, facts.guided.guide if facts.guided else None)
    entries = [paper.bibtex for paper in cited]
    entries += [HARNESS] if findings.was_scored(facts.scores) else []
    return markdown.fenced("\n\n".join(entries), "bibtex") if entries else None


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
