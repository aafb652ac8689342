"""The model card `README.md`: of a merge (`templates/card.md.j2`) and of an extracted adapter."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lewis_hub.hub.source import Source
from lewis_hub.report import findings, markdown, page, sections
from lewis_hub.report.citations import HARNESS, bibtex, papers
from lewis_hub.report.facts import CardFacts
from lewis_hub.report.lock import BUILDER
from lewis_hub.report.metadata import card_data
from lewis_hub.report.plots import Plot
from lewis_hub.report.profiles import short_name

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from lewis_hub.merge.extract_lora import Extracted

TEMPLATE = "card.md.j2"
PACKAGE = "lewis_hub"
N_WORST = 5  # modules that an adapter's card lists


def model_card(facts: CardFacts) -> ModelCard:
    """Write the card; the same facts give the same text."""
    from huggingface_hub import ModelCard
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("lewis_hub.templates").joinpath(TEMPLATE).read_text(encoding="utf-8")
    body = environment.from_string(template).render(**_description(facts), **_scores(facts))
    return ModelCard(f"---\n{card_data(facts).to_yaml(line_break=chr(10))}\n---\n\n{body}")


def _description(facts: CardFacts) -> dict[str, Any]:
    guided = facts.guided
    machine = sections.machine(facts.machine) if facts.machine else ""
    return {
        "title": markdown.text(facts.title),
        "summary": sections.summary(facts),
        "details": list(sections.details(facts)),
        "page": page.FILE,
        "snippet": markdown.fenced(usage(facts), "python"),
        "intended": list(sections.intended(facts)),
        "picture_note": sections.picture_note(guided) if guided else "",
        "pictures": list(_pictures(facts)),
        "densities": sections.densities(facts),
        "weights": sections.weights(facts),
        "inputs": sections.inputs(facts),
        "licence": sections.licence(facts),
        "stack": sections.stack(facts),
        "calibration": sections.calibration(facts),
        "measurement": sections.MEASUREMENT.get(guided.guide, "") if guided else "",
        "recipe": markdown.fenced(facts.recipe, "yaml"),
        "mergekit": facts.mergekit,
        "reproduce": markdown.fenced(_reproduce(facts), "bash"),
        "digest": markdown.code(facts.digest),
        "software": _software(facts),
        "cost": sections.cost(facts.costs),
        "machine": markdown.text(machine),
        "whole_process": any(cost.peak_over == "process" for cost in facts.costs),
        "bibtex": _bibtex(facts),
    }


def _scores(facts: CardFacts) -> dict[str, Any]:
    scores = facts.scores if findings.was_scored(facts.scores) else None
    found = findings.findings(scores) if scores else findings.Findings((), ())
    return {
        "scores": findings.scores_table(scores) if scores else None,
        "paired": findings.paired_table(scores) if scores else None,
        "twins": findings.twins(scores) if scores else (),
        "harness": markdown.text(f"lm-eval {facts.software.get('lm_eval', '')}".rstrip()),
        "in_chat": facts.scored_in_chat,
        "gate": findings.gate_section(facts.gate) if facts.gate else None,
        "gains": found.gains,
        "limits": [*found.limits, *sections.limits(facts)],
    }


def usage(facts: CardFacts) -> str:
    """A Python program that loads the model and generates text.

    A model without a repo is loaded from the folder in which the program is started.
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
            + ("" if facts.repo else "  # the folder of this card"),
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


def _pictures(facts: CardFacts) -> Iterator[tuple[str, list[str]]]:
    """(expert, its pictures) in the recipe's order."""
    plots = facts.guided.plots if facts.guided else ()
    for expert in dict.fromkeys(plot.expert for plot in plots):
        own = [_picture(facts, plot) for plot in plots if plot.expert == expert]
        yield markdown.code(short_name(expert)), own


def _picture(facts: CardFacts, plot: Plot) -> str:
    """A picture for light and dark pages.

    The Hub resolves a relative `src`; whether it resolves a relative `srcset` is not documented.
    """
    dark = f"lewis/{plot.dark}"
    if facts.repo and (url := markdown.web_address(f"{facts.endpoint}/{facts.repo}")):
        dark = f"{url}/resolve/main/{dark}"
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="lewis/{plot.light}" alt="{markdown.attribute(plot.caption)}"></picture>'
    )
    return f"{picture}\n\n{markdown.text(plot.note)}" if plot.note else picture


def _software(facts: CardFacts) -> str:
    """The versions of the libraries; lewis_hub with a link."""
    versions = {name: markdown.text(f"{name} {v}") for name, v in facts.software.items()}
    if PACKAGE in versions:
        versions[PACKAGE] = markdown.link(versions[PACKAGE], BUILDER)
    return ", ".join(versions.values())


def _reproduce(facts: CardFacts) -> str:
    version = facts.software.get(PACKAGE)
    package = f"lewis-hub=={version}" if version else "lewis-hub"
    lines = [f"pip install {shlex.quote(package)}"]
    if facts.repo:
        lines.append(f'hf download {shlex.quote(facts.repo)} --include "lewis/*" --local-dir .')
    return "\n".join([*lines, "lewis-hub merge lewis/recipe.yaml"])


def _bibtex(facts: CardFacts) -> str | None:
    cited = papers(facts.method.name, facts.guided.guide if facts.guided else None)
    keys = [*cited, HARNESS] if findings.was_scored(facts.scores) else cited
    return markdown.fenced("\n\n".join(bibtex(keys)), "bibtex") if keys else None


def adapter_card(base: Source, expert: Source, licence: str | None, extracted: Extracted) -> str:
    """The `README.md` of a LoRA adapter: metadata for the Hub, and the error of its updates."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=None if base.folder else base.name,
        base_model_relation=None if base.folder else "adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "lewis-hub"],
        license=licence,
    )
    worst = sorted(extracted.fits.items(), key=lambda item: -item[1].error)[:N_WORST]
    rows = [[markdown.code(module), str(fit.rank), f"{fit.error:.4f}"] for module, fit in worst]
    errors = [fit.error for fit in extracted.fits.values()]
    mean = math.fsum(errors) / len(errors) if errors else 0.0
    whole = (
        f"\n{len(extracted.whole)} other tensors differ too; the adapter stores them whole.\n"
        if extracted.whole
        else ""
    )
    return (
        f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n"
        f"A LoRA adapter that turns {markdown.code(base.pinned)} into "
        f"{markdown.code(expert.pinned)}. It was extracted by singular value decomposition of "
        "their difference, without training.\n\n"
        f"The mean error over {len(errors)} modules is {mean:.2%} (Frobenius norm of the error, "
        "relative to that of the task vector). The largest errors are:\n\n"
        f"{markdown.table(['module', 'rank', 'error'], rows, right=(1, 2))}\n{whole}"
    )
