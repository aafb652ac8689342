from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from lewis_hub.calibration.profile import ImportanceProfile, SourceImportance
from lewis_hub.evaluate.benchmarks import ScoredData
from lewis_hub.evaluate.items import TaskItem
from lewis_hub.evaluate.samples import Samples, collect_samples
from lewis_hub.evaluate.scores import (
    Answers,
    MetricResult,
    MetricScore,
    ModelResult,
    PairedTest,
    Scores,
    TaskResult,
    TaskScores,
)
from lewis_hub.guides.schedule import DensitySchedule, ExpertSchedule
from lewis_hub.hub.facts import Licence, ModelFacts
from lewis_hub.hub.source import Source
from lewis_hub.methods import registry
from lewis_hub.report.cost import StageCost
from lewis_hub.report.facts import CardFacts, Guided
from lewis_hub.report.plots import Picture

COMPONENTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
SHA = {name: f"{number:040x}" for number, name in enumerate(["base", "math", "text", "data"], 10)}
DATA = f"zoo/sums@{SHA['data']}"
CALIBRATION = {
    "measure": "lewis",
    "dataset": DATA,
    "dataset_sha": SHA["data"],
    "config": None,
    "split": "train",
    "text": "Q: {question}\nA: {answer}",
    "samples": 64,
    "max_tokens": 32,
    "seed": 42,
    "tokenizer": "sha256:00",
    "rows_digest": "sha256:11",
    "n_texts": 63,
    "n_empty": 1,
    "n_tokens": 1234,
    "n_truncated": 2,
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 6,
    "max_position_embeddings": 2048,
    "vocab_size": 49152,
}


@dataclass(frozen=True)
class Fake:
    """A profile and a schedule of made-up numbers, the same each time."""

    profile: ImportanceProfile
    schedule: DensitySchedule


def fake_merge(
    n_blocks: int = 6,
    components: Sequence[str] = COMPONENTS,
    experts: Sequence[str] = ("zoo/math", "zoo/text"),
) -> Fake:
    modules = [f"model.layers.{b}.{c}" for b in range(n_blocks) for c in components]
    base = {module: 10.0 + i % 7 for i, module in enumerate(modules)}
    sources = [SourceImportance(f"zoo/base@{SHA['base']}", "", "base", 1234, CALIBRATION, base)]
    schedules = []
    for k, expert in enumerate(experts):
        pinned = f"{expert}@{k + 11:040x}"
        change = {m: 1.1 + 0.1 * math.sin(k + i / 5) for i, m in enumerate(modules)}
        measured = {module: base[module] * change[module] for module in modules}
        sources.append(SourceImportance(pinned, "", "expert", 1234, CALIBRATION, measured))
        densities = {f"{m}.weight": 0.3 + 2.5 * (change[m] - 1) for m in modules}
        schedules.append(ExpertSchedule(pinned, 1.0, densities))
    profile = ImportanceProfile("lewis", CALIBRATION, tuple(sources))
    return Fake(profile, DensitySchedule(tuple(schedules)))


@pytest.fixture
def fake() -> Fake:
    return fake_merge()


@pytest.fixture
def make_fake() -> Callable[..., Fake]:
    return fake_merge


def source(
    name: str, sha: str, *, folder: Path | None = None, revision: str | None = None
) -> Source:
    return Source(name, "model", revision, sha, (), folder)


def told(name: str, licence: str | None = "apache-2.0") -> ModelFacts:
    url = f"https://huggingface.co/{name}"
    return ModelFacts(name, licence and Licence(licence), ("en",), url)


def scores(merged: float = 0.7, twin: float = 0.68, p: float = 0.6) -> Scores:
    """One task; the merged model against base 0.05, experts 0.9 and 0.1, and its twin."""
    rivals = {"base": 0.05, f"expert:zoo/math@{SHA['math']}": 0.9}
    rivals |= {f"expert:zoo/text@{SHA['text']}": 0.1, "uniform": twin}
    models = {label: {"exact_match,none": MetricScore(v, 0.02)} for label, v in rivals.items()}
    models["merged"] = {"exact_match,none": MetricScore(merged, 0.026)}
    tests = []
    for label, value in rivals.items():
        d, p_value = round(merged - value, 3), p if label == "uniform" else 0.0001
        ci95 = (round(d - 0.05, 3), round(d + 0.05, 3))
        tests.append(PairedTest("exact_match,none", label, d, ci95, p_value, p_value))
    return Scores({"sums": TaskScores(300, "1.0", models, tuple(tests))})


def results(scores: Scores, n: int = 300) -> dict[str, ModelResult]:
    """What each model of `scores` did: right on the last items, as many as its score says."""
    found = {}
    for label, metrics in scores.tasks["sums"].models.items():
        n_right = round(n * metrics["exact_match,none"].value)
        values = tuple(float(i >= n - n_right) for i in range(n))
        metric = MetricResult(n_right / n, values, higher_is_better=True)
        ids = tuple(f"{i:016x}" for i in range(n))
        found[label] = ModelResult(
            {"sums": TaskResult("1.0", ids, ids, {"exact_match,none": metric})}
        )
    return found


def samples(scores: Scores, n: int = 300) -> Samples:
    """The items of `results`, without texts."""
    return collect_samples(results(scores, n), {}, {"sums": "Nobody kept them."})


def told_samples(scores: Scores, n: int = 300) -> Samples:
    """The same with texts: sums, whose wrong answers name the model."""
    spoken, items = {}, []
    for number in range(n):
        items.append(TaskItem("sums", f"What is {number} + 1?", str(number + 1), {}))
    for label, result in results(scores, n).items():
        task = result.tasks["sums"]
        values = task.metrics["exact_match,none"].values or ()
        given = [f"{i + 1}" if v else f"{label[:8]} says {i}" for i, v in enumerate(values)]
        spoken[label] = replace(
            result, tasks={"sums": replace(task, answers=Answers(tuple(given)))}
        )
    return collect_samples(spoken, {"sums": items}, {})


def card_facts(**changes: Any) -> CardFacts:
    """A guided, scored merge of two repos into a third."""
    fake = fake_merge()
    base, math_, text = (source(f"zoo/{name}", SHA[name]) for name in ("base", "math", "text"))
    maps = Picture("maps-light.png", "maps-dark.png", "A caption.")
    facts = CardFacts(
        title="zoo-merge",
        repo="me/zoo-merge",
        base=base,
        experts=(math_, text),
        models={one.pinned: told(one.name) for one in (base, math_, text)},
        datasets=(Source("zoo/sums", "dataset", None, SHA["data"], (), None),),
        parameters={name: 64 for name in fake.schedule.experts[0].tensors} | {"norm.weight": 8},
        dtype="bfloat16",
        method=registry.find("ties"),
        guided=Guided("lewis", fake.profile, fake.schedule, ("One block stands out.",), maps),
        scores=scores(),
        scored_data={"sums": ScoredData("zoo/sums", None, "test", SHA["data"])},
        chart=Picture("scores-light.png", "scores-dark.png", "Scores."),
        costs=(
            StageCost("calibrate", 12.34, 1_200_000_000, "stage", 3_000_000, 2_500, 0, 0),
            StageCost("merge", 75.6, 250_000_000, "stage", None, None, None, None),
        ),
        recipe="base_model: zoo/base\nmerge_method: ties\n",
        licence=Licence("apache-2.0"),
        licence_chosen=False,
        config=CONFIG,
        chat=True,
        custom_code=False,
        mergekit=True,
        digest="sha256:" + "ab" * 32,
        software={"lewis_hub": "0.1.0", "torch": "2.9.0"},
    )
    return replace(facts, **changes)


@pytest.fixture
def make_facts() -> Callable[..., CardFacts]:
    return card_facts


@pytest.fixture
def make_results() -> Callable[..., dict[str, ModelResult]]:
    return results


@pytest.fixture
def make_samples() -> Callable[..., Samples]:
    return samples


@pytest.fixture
def make_told_samples() -> Callable[..., Samples]:
    return told_samples


@pytest.fixture
def make_scores() -> Callable[..., Scores]:
    return scores


@pytest.fixture
def make_source() -> Callable[..., Source]:
    return source
