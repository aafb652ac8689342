"""The model card `README.md`: of a merge (`templates/card.md.j2`) and of an extracted adapter.

Also the entries of leaderboards, `.eval_results/*.yaml`. The Hub takes them only for datasets that
it lists as benchmarks, so they are written only for the benchmarks that the recipe names.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from math import isfinite
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from lewis_hub.display import size
from lewis_hub.evaluate.scores import MERGED, Scores, settings_words
from lewis_hub.guides.registry import guides
from lewis_hub.guides.schedule import weighted_mean
from lewis_hub.hub.facts import HUB, Licence, ModelFacts
from lewis_hub.hub.source import Source
from lewis_hub.recipe.evaluation import Benchmark
from lewis_hub.recipe.formats import ExportFormat, file_name, file_type
from lewis_hub.recipe.reference import REPO
from lewis_hub.report import findings, markdown
from lewis_hub.report.cost import duration
from lewis_hub.report.facts import (
    GUIDES,
    METHODS,
    CardFacts,
    Guided,
    Measured,
    TransplantFacts,
)
from lewis_hub.report.lock import BUILDER
from lewis_hub.report.plots import PAIRED, WORDS
from lewis_hub.report.profiles import short_name, unique_slugs
from lewis_hub.report.usage import ModelUsage
from lewis_hub.report.verdict import verdict

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData

    from lewis_hub.calibration.profile import SourceImportance
    from lewis_hub.merge.task_vectors import Extracted

DISAGREE = "The licences of the parents differ"
N_WORST = 5  # modules that an adapter's card lists
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
BLOCKS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
FOLDER = ".eval_results"
DIGITS = 6
HUB_REPO = re.compile(rf"{REPO.pattern}|[A-Za-z0-9][\w.-]*", re.ASCII)  # gpt2 has no owner
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.-]*")
FILTERS = {
    **{name: getattr(markdown, name) for name in ("attribute", "code", "fenced", "link", "text")},
    "count": lambda value: f"{value:,}" if isinstance(value, int) else "–",
    "duration": duration,
    "json": json.dumps,
    "shell": shlex.quote,
    "short_name": short_name,
    "size": lambda n_bytes: "–" if n_bytes is None else size(n_bytes),
    "weighted_mean": weighted_mean,
}


def model_card(facts: CardFacts) -> ModelCard:
    """Write the card; the same facts give the same text."""
    from huggingface_hub import ModelCard

    return ModelCard(
        _document(
            card_data(facts),
            "card.md.j2",
            {"model": partial(_model, facts.models), "listed": _listed, "licence": _licence_link},
            facts=facts,
            **_description(facts),
            **guidance_values(facts.guided),
            **_scores(facts),
        )
    )


def _document(data: ModelCardData, template: str, filters: Mapping[str, Any], **values: Any) -> str:
    body = _rendered(template, filters, **values)
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{body}"


def _rendered(template: str, filters: Mapping[str, Any], **values: Any) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {**FILTERS, **filters}
    text = files("lewis_hub.templates").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(values)


def snippet(usage: ModelUsage, repo: str | None, *, chat: bool, custom_code: bool) -> str:
    """Python code that runs a model from its repo, or without one from the folder of its card."""
    return _rendered(
        f"usage/{usage.family.snippet}.py.j2",
        {},
        usage=usage,
        chat=chat,
        name=name_line(repo),
        options=", trust_remote_code=True" if custom_code else "",
    )


def name_line(repo: str | None) -> str:
    """The line of a snippet that names the model; None: the folder of the card."""
    return f"name = {json.dumps(repo or '.')}{'' if repo else '  # the folder of this card'}"


def _commands(facts: CardFacts) -> dict[str, str | None]:
    """The commands that run a language model in llama.cpp and in mlx-lm, where they can."""
    usage, exports = facts.usage, facts.exports
    prompt = usage.message if facts.chat else usage.example
    files = [{"file": file_name(one), "type": file_type(one)} for one in exports]
    values = {"model": facts.repo or ".", "repo": facts.repo, "prompt": prompt, "exports": files}
    on_mlx = usage.mlx and not facts.custom_code
    return {
        "llama_cpp": _rendered("usage/llama-cpp.sh.j2", {}, **values) if exports else None,
        "mlx": _rendered("usage/mlx.sh.j2", {}, **values) if on_mlx else None,
    }


def command_starts(repo: str | None, exports: Iterable[ExportFormat]) -> list[str]:
    """The commands of a card, up to the prompt: a parent's card may give that."""
    model = repo or "."
    files = [f"-hf {repo}:{file_type(e)}" if repo else f"-m {file_name(e)}" for e in exports]
    return [
        f"mlx_lm.generate --model {model} ",
        f"mlx_lm.convert --hf-path {model} ",
        *(f"llama-cli {file} " for file in files),
    ]


def _description(facts: CardFacts) -> dict[str, Any]:
    usage = facts.usage
    licences = [facts.models[source.pinned].licence for source in facts.sources]
    experts = facts.mixture.experts if facts.mixture else ()
    return {
        "hub": HUB,
        "methods": METHODS,
        "mixed": list(dict.fromkeys(one.source for one in experts)),
        "routed": [one for one in experts if not one.is_shared],
        "usage": usage,
        **_commands(facts),
        "exported": [file_name(one) for one in facts.exports],
        "snippet": snippet(usage, facts.repo, chat=facts.chat, custom_code=facts.custom_code),
        "stacked": list(dict.fromkeys(s for part in facts.stack for s, _ in part.sources)),
        "config": _configuration(facts.config),
        "tasks": list(facts.scores.tasks) if facts.scores else [],
        "dark_folder": dark_folder(facts),
        "licences": list(dict.fromkeys(licences)),
        "disagree": DISAGREE,
        "calibrated": calibrated_on(facts),
        "datasets": {source.pinned: source for source in facts.datasets},
        "streams": any(cost.fetched_bytes is not None for cost in facts.costs),
        "builder": BUILDER,
    }


def dark_folder(facts: CardFacts) -> str:
    """The address of the dark plots, or their folder if the merge stays on disk.

    The Hub resolves a relative `src`; whether it resolves a relative `srcset` is unknown.
    """
    url = markdown.web_address(f"{HUB}/{facts.repo}") if facts.repo else None
    return f"{url}/resolve/main/lewis" if url else "lewis"


def guidance_values(guided: Guided | None) -> dict[str, Any]:
    """The values that a guide decided: expert, tensor -> value, value of all other tensors."""
    experts = guided.schedule.experts if guided else ()
    known = GUIDES.get(guided.guide) if guided else None
    name = guided.guide if guided else ""
    title = name.upper().replace("_", " ") if known and known.paper else name
    papers = {guide.name: guide.paper for guide in guides()}
    measures = guided.profile.measures if guided and guided.profile else ()
    return {
        "guide_name": name,
        "guide": markdown.link(markdown.text(title), papers.get(name)),
        "origin": known.origin if known else "",
        "densities": [(e.source, e.tensors, e.default_density) for e in experts if e.tensors],
        "factors": [(e.source, e.weights, 1.0) for e in experts if e.weights],
        "density_range": _range(expert.tensors for expert in experts),
        "factor_range": _range(expert.weights for expert in experts),
        "measure": measures[0] if measures else None,
        "measure_words": WORDS,
        "paired_measures": PAIRED,
    }


def _scores(facts: CardFacts) -> dict[str, Any]:
    scores = facts.scores if facts.was_scored else None
    gains, limits = findings.findings(scores) if scores else ([], [])
    return {
        "verdict": verdict(scores) if scores else None,
        "scores_table": findings.scores_table(scores) if scores else None,
        "paired_table": findings.paired_table(scores) if scores else None,
        "twins": findings.twins(scores) if scores else (),
        "settings": settings_words(scores.settings) if scores and scores.settings else None,
        "library": _library(facts),
        "gate": findings.gate_section(facts.gate) if facts.gate else None,
        "gains": gains,
        "limits": limits,
    }


def _library(facts: CardFacts) -> str:
    """The library that scored the models, with lm-eval's version."""
    if facts.scores and facts.scores.settings.get("backend") == "mteb":
        return "mteb"
    return f"lm-eval {facts.software.get('lm_eval', '')}".strip()


def _range(experts: Iterable[Mapping[str, float]]) -> str:
    """The lowest and the highest of all values; empty if there are none."""
    values = [value for expert in experts for value in expert.values()]
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:.2f}" if low == high else f"between {low:.2f} and {high:.2f}"


def _configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `config.json` that the card shows; None if they are not there."""
    architectures, text = config.get("architectures"), config.get("text_config")
    text = text if isinstance(text, Mapping) else config

    def number(keys: Sequence[str]) -> int | None:
        value = next((text[key] for key in keys if key in text), None)
        return value if type(value) is int else None

    return {
        "architecture": next(iter(architectures), None)
        if isinstance(architectures, list)
        else None,
        "n_blocks": number(BLOCKS),
        "n_context_tokens": number(CONTEXT),
        "n_vocabulary": number(("vocab_size",)),
    }


def calibrated_on(facts: CardFacts) -> Sequence[SourceImportance | Measured]:
    """The experts that were measured on texts."""
    profile = facts.guided.profile if facts.guided else None
    guided = profile.by(profile.measures[0]).experts if profile and profile.measures else ()
    return [expert for expert in guided if "dataset" in expert.calibration] or (
        facts.measured or [Measured(one.source, one.calibration) for one in facts.aligned]
    )


def _model(models: Mapping[str, ModelFacts], source: Source) -> str:
    """A model by its name; a local folder by its last part, which shows nothing of a disk."""
    if source.folder:
        return f"the local folder {markdown.code(source.folder.name)}"
    return markdown.link(markdown.code(source.name), models[source.pinned].url)


def _licence_link(licence: Licence | None) -> str:
    return markdown.link(markdown.text(licence), licence.link) if licence else "none"


def _listed(items: Iterable[str]) -> str:
    *others, last = items
    return f"{', '.join(others)} and {last}" if others else last


def adapter_card(
    base: Source, expert: Source, task: str | None, licence: str | None, extracted: Extracted
) -> str:
    """The `README.md` of a LoRA adapter: metadata for the Hub, and the error of its updates."""
    return _document(
        _adapter_data(base, task, licence),
        "adapter.md.j2",
        {},
        base=base,
        expert=expert,
        **_errors(extracted),
    )


def merged_adapter_card(
    facts: CardFacts, task: str | None, licence: str | None, made: Extracted
) -> str:
    """The `README.md` of a LoRA adapter that was merged from others."""
    base = facts.base or facts.experts[0]
    return _document(
        _adapter_data(base, task, licence),
        "merged_adapter.md.j2",
        {"model": partial(_model, facts.models), "listed": _listed},
        facts=facts,
        methods=METHODS,
        **_errors(made),
    )


def transplant_card(facts: TransplantFacts) -> str:
    """The `README.md` of a model with another model's tokenizer."""
    return _document(
        _transplant_data(facts),
        "transplant.md.j2",
        {"model": partial(_model, facts.models), "licence": _licence_link},
        facts=facts,
        disagree=DISAGREE,
        snippet=snippet(facts.usage, None, chat=facts.chat, custom_code=False),
    )


def _transplant_data(facts: TransplantFacts) -> ModelCardData:
    from huggingface_hub import ModelCardData

    repos = _repos(one.name for one in facts.sources if not one.folder)
    return ModelCardData(
        base_model=repos or None,
        base_model_relation="merge" if repos else None,
        library_name=facts.usage.library,
        pipeline_tag=facts.usage.task,
        widget=facts.usage.widget(chat=facts.chat),
        tags=["lewis-hub", "tokenizer-transplant"],
        **_licence(facts.licence),
    )


def _adapter_data(base: Source, task: str | None, licence: str | None) -> ModelCardData:
    from huggingface_hub import ModelCardData

    return ModelCardData(
        base_model=None if base.folder else base.name,
        base_model_relation=None if base.folder else "adapter",
        library_name="peft",
        pipeline_tag=task,
        tags=["lora", "lewis-hub"],
        license=licence,
    )


def _errors(extracted: Extracted) -> dict[str, Any]:
    """The mean and the largest errors of an adapter's updates."""
    errors = [fit.error for fit in extracted.fits.values()]
    return {
        "extracted": extracted,
        "mean_error": fmean(errors) if errors else 0.0,
        "worst": sorted(extracted.fits.items(), key=lambda item: -item[1].error)[:N_WORST],
    }


def card_data(facts: CardFacts) -> ModelCardData:
    """The YAML block: parents, licence, languages, data, tags, and the merged model's own scores.

    Values that the Hub does not accept are left out: local folders, licence links that are no web
    addresses, scores that are not finite.
    """
    from huggingface_hub import ModelCardData

    results = list(_card_results(facts))
    scored: dict[str, Any] = {"eval_results": results, "model_name": facts.title or "merge"}
    guide = [facts.guided.guide] if facts.guided else []
    return ModelCardData(
        base_model=_repos(source.name for source in facts.sources if not source.folder) or None,
        base_model_relation="merge",
        library_name=facts.usage.library,
        pipeline_tag=facts.usage.task,
        widget=facts.usage.widget(chat=facts.chat),
        tags=["merge", "lewis-hub", *guide, facts.method.name],
        language=facts.languages or None,
        datasets=_repos(data.name for data in facts.datasets if not data.folder) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        **_licence(facts.licence),
        **(scored if results else {}),
    )


def eval_results(
    scores: Scores, benchmarks: Mapping[str, Benchmark], facts: CardFacts
) -> dict[str, str]:
    """The leaderboard entries of the merged model, a file for each dataset: path -> YAML.

    A benchmark that was not scored, or whose score is not finite, has no entry.

    Args:
        scores: of a merge that was scored on all items.
        benchmarks: task -> its benchmark.
        facts: their repo, if there is one, is named as the source.
    """
    from huggingface_hub import eval_result_entries_to_yaml

    by_dataset: dict[str, list[EvalResultEntry]] = {}
    for task, benchmark in benchmarks.items():
        scored = scores.tasks.get(task)
        score = scored.models.get(MERGED, {}).get(benchmark.metric) if scored else None
        if scored and score and isfinite(score.value):
            entry = _entry(task, scores, benchmark, facts)
            by_dataset.setdefault(benchmark.dataset, []).append(entry)
    paths = eval_result_paths(benchmarks)
    return {
        paths[dataset]: str(
            yaml.safe_dump(
                eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True
            )
        )
        for dataset, entries in by_dataset.items()
    }


def eval_result_paths(benchmarks: Mapping[str, Benchmark]) -> dict[str, str]:
    """The file of leaderboard entries for each dataset of benchmarks, scored or not."""
    datasets = dict.fromkeys(benchmark.dataset for benchmark in benchmarks.values())
    names = (f"{FOLDER}/{slug}.yaml" for slug in unique_slugs(datasets))
    return dict(zip(datasets, names, strict=True))


def _entry(task: str, scores: Scores, benchmark: Benchmark, facts: CardFacts) -> EvalResultEntry:
    from huggingface_hub import EvalResultEntry

    url = markdown.web_address(f"{HUB}/{facts.repo}") if facts.repo else None
    scored, error = scores.tasks[task], ""
    score = scored.models[MERGED][benchmark.metric]
    how = f", {settings_words(scores.settings)}" if scores.settings else ""
    if score.stderr is not None:
        error = f", standard error {findings.number(score.stderr * benchmark.scale)}"
    name = "mteb" if _library(facts) == "mteb" else "lm-eval"
    notes = f"{name} {task}, version {scored.version}, {benchmark.metric}, n = {scored.n}"
    return EvalResultEntry(
        dataset_id=benchmark.dataset,
        task_id=benchmark.task_id,
        value=round(float(score.value * benchmark.scale), DIGITS),
        source_url=url,
        source_name="Model card" if url else None,
        notes=markdown.visible(notes + error + how),
    )


def _card_results(facts: CardFacts) -> Iterator[EvalResult]:
    """The merged model's scores; a task on local files is its own dataset."""
    from huggingface_hub import EvalResult

    for task, scored in facts.scores.tasks.items() if facts.scores else ():
        data = facts.scored_data.get(task)
        repo = data.repo if data and HUB_REPO.fullmatch(data.repo) else None
        for key, score in scored.models.get(MERGED, {}).items():
            if isfinite(score.value):
                yield EvalResult(
                    task_type=facts.usage.task or "text-generation",
                    dataset_type=repo or task,
                    dataset_name=task,
                    dataset_config=data.config if data and repo else None,
                    dataset_split=data.split if data and repo else None,
                    dataset_revision=data.commit_sha if data and repo else None,
                    metric_type=key.partition(",")[0],
                    metric_name=findings.readable_metric(key),
                    metric_value=float(score.value),
                )


def _repos(names: Iterable[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if HUB_REPO.fullmatch(name)]


def _licence(licence: Licence | None) -> dict[str, Any]:
    """An identifier of the Hub, or `other` with a name and, if there is one, a link."""
    if licence is None:
        return {}
    identifiers = licence.identifier.lower().split(" or ")
    if all(IDENTIFIER.fullmatch(identifier) for identifier in identifiers):
        name = licence.name
        data: dict[str, Any] = {"license": identifiers[0] if len(identifiers) == 1 else identifiers}
    else:
        data, name = {"license": "other"}, licence.name or licence.identifier
    slug = re.sub(r"[^a-z0-9.-]+", "-", (name or "").lower())[:60].strip("-.")
    if slug:
        data["license_name"] = slug
    if licence.link in ("LICENSE", "LICENSE.md", "LICENSE.txt"):
        data["license_link"] = licence.link
    elif address := markdown.web_address(licence.link):
        data["license_link"] = address
    return data
