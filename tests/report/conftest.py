from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from lewis_hub.guides.density import DensitySchedule, ExpertSchedule
from lewis_hub.guides.importance import ImportanceProfile, SourceImportance

COMPONENTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
SHA = {name: f"{number:040x}" for number, name in enumerate(["base", "math", "text", "data"], 10)}
DATA = f"zoo/sums@{SHA['data']}"
CALIBRATION = {
    "measure": "lewis",
    "dataset": DATA,
    "dataset_sha": SHA["data"],
    "config": None,
    "split": "train",
    "text": "{question} {answer}",
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
    sources = [SourceImportance(f"zoo/base@{SHA['base']}", "", "base", 1234, base, CALIBRATION)]
    schedules = []
    for k, expert in enumerate(experts):
        pinned = f"{expert}@{k + 11:040x}"
        change = {m: 1.1 + 0.1 * math.sin(k + i / 5) for i, m in enumerate(modules)}
        measured = {module: base[module] * change[module] for module in modules}
        sources.append(SourceImportance(pinned, "", "expert", 1234, measured, CALIBRATION))
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
