"""The methods of PROTOCOL.md, each with its settings and where they were chosen.

A merge is a recipe in parts: what `parameters`, `guide` and `calibration` are. A row whose recipe
this version of lewis_hub refuses is told and left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from answers import PROMPT, TEXT

OURS = "ours"
BEGINNING = PROMPT.partition(" ")[0]  # of texts that an expert samples
WEIGHT = "$weight"  # replaced by the mean of task arithmetic's best weights
RATES = (1e-5, 3e-5, 1e-4)
COMMON = (0.2, 0.4, 0.6, 0.8, 1.0)  # weights of task arithmetic, then steps of one expert
STEPS = (-0.2, 0.2)
IN_SEQUENCE = {"inputs": "merged", "off_diagonal": 0.7}
FEATCAL = {  # the values of its authors' code; without biases and norms
    "inputs": "merged",
    "off_diagonal": 1.0,
    "compensate": False,
    "normalize_grams": "frobenius",
    "ridge": 0.05,
    "anchor_scale": 2.2 * 0.3,
    "interpolation": 0.25,
}
LEWIS = {"name": "lewis", "gamma": 0.3, "epsilon": 0.8}

Settings = Mapping[str, object]


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        kind: `base`, `experts`, `weights` (task arithmetic), `merge`, `twin` (uniform densities of
            the mean that LEWIS has) or `gradient`.
        grid: settings of `parameters` to choose from on tune items, by the lowest sum of losses.
        texts: how experts are calibrated: `none`, `own`, `prompts`, `sampled`.
        seconds: for `gradient`: multiple of the time that `ours` took.
        counts: numbers of experts that it merges; None: 2 and more.
        cost_s: core-seconds for one expert of 135 M parameters, before anything is measured.
    """

    name: str
    kind: str = "merge"
    merge: str = ""
    parameters: Settings = field(default_factory=dict)
    grid: Sequence[Settings] = ({},)
    guide: Settings | None = None
    texts: str = "none"
    n_texts: int | None = None
    seconds: int = 0
    counts: Sequence[int] | None = None
    cost_s: float = 30

    @property
    def has_texts(self) -> bool:
        """Whether another draw of calibration texts makes another merge."""
        return self.texts in ("own", "prompts")


def _grid(**values: Sequence[object]) -> tuple[Settings, ...]:
    return tuple(dict(zip(values, one, strict=True)) for one in product(*values.values()))


TRIMMED = _grid(density=(0.2, 0.5), **{"lambda": (1.0, 1.4)})
ORDERED = (
    Method("experts", "experts", cost_s=20),
    Method("task_arithmetic", "weights", "task_arithmetic", cost_s=130),
    Method(
        OURS,
        merge="regmean",
        parameters=IN_SEQUENCE,
        texts="own",
        cost_s=60,
    ),
    Method("ties", merge="ties", grid=TRIMMED, cost_s=60),
    Method("regmean", merge="regmean", parameters={"off_diagonal": 0.5}, texts="own", cost_s=45),
    Method("featcal", merge="regmean", parameters=FEATCAL, texts="own", cost_s=60),
    Method(
        "wudi_ridge",
        merge="wudi",
        parameters={"anchor_scale": WEIGHT},
        grid=_grid(ridge=(0.1, 1.0)),
        cost_s=60,
    ),
    Method(
        "prompts_alone",
        merge="regmean",
        parameters=IN_SEQUENCE,
        texts="prompts",
        cost_s=80,
    ),
    Method(
        "no_data",
        merge="regmean",
        parameters=IN_SEQUENCE,
        texts="sampled",
        cost_s=100,
    ),
    Method("base", "base", cost_s=20),
    Method(
        "lewis_ties",
        merge="ties",
        guide=LEWIS,
        grid=_grid(**{"lambda": (1.0, 1.4)}),
        texts="own",
        cost_s=50,
    ),
    Method("fine_tuning", "gradient", grid=_grid(rate=RATES), texts="own", seconds=1, cost_s=180),
    Method("distillation", "gradient", grid=_grid(rate=RATES), texts="own", seconds=1, cost_s=180),
    Method("dare_ties", merge="dare_ties", grid=TRIMMED, cost_s=60),
    Method("fine_tuning_10", "gradient", texts="own", seconds=10, cost_s=600),
    Method("distillation_10", "gradient", texts="own", seconds=10, cost_s=600),
    Method(  # added after the first cells, see PROTOCOL.md
        "regmean_plus_plus",
        merge="regmean",
        parameters={"inputs": "merged_block", "off_diagonal": 0.5},
        texts="own",
        cost_s=60,
    ),
    Method("lewis_alone", merge="ties", guide=LEWIS, texts="own", n_texts=15, counts=(1,)),
    Method("uniform_alone", "twin", "ties", texts="own", n_texts=15, counts=(1,)),
)
METHODS = {method.name: method for method in ORDERED}


def methods_for(n: int) -> tuple[Method, ...]:
    """The rows for a number of experts, in the order in which they run."""
    return tuple(m for m in ORDERED if (n in m.counts if m.counts else n > 1))


@dataclass(frozen=True)
class Inputs:
    """Models and calibration items of one cell."""

    base: Path
    experts: Sequence[Path]
    items: Sequence[Path]
    n_texts: int


def recipe(
    method: Method, given: Inputs, chosen: Settings, weights: Sequence[float] | None = None
) -> dict[str, object]:
    """The recipe as a mapping, with absolute paths.

    Args:
        method: a merge.
        given: what is merged.
        chosen: settings of the grid.
        weights: those of task arithmetic; of the experts if the method is task arithmetic.
    """
    own = method.merge == "task_arithmetic"
    models: list[dict[str, object]] = []
    for n, (expert, items) in enumerate(zip(given.experts, given.items, strict=True)):
        model: dict[str, object] = {"model": str(expert)}
        if own and weights:
            model["parameters"] = {"weight": weights[n]}
        if texts := _calibration(method, items, given.n_texts):
            model["calibration"] = texts
        models.append(model)
    mean = sum(weights) / len(weights) if weights else 1.0
    settings = {**method.parameters, **chosen}
    return {
        "base_model": str(given.base),
        "models": models,
        "merge_method": method.merge,
        "parameters": {k: mean if v == WEIGHT else v for k, v in settings.items()},
        "dtype": "bfloat16",
        "seed": 42,
    } | ({"guide": dict(method.guide)} if method.guide else {})


def _calibration(method: Method, items: Path, n_texts: int) -> dict[str, object] | None:
    n = method.n_texts or n_texts
    own = {"dataset": str(items), "samples": n, "max_tokens": 256}
    return {
        "none": None,
        "own": {**own, "text": TEXT},
        "prompts": {**own, "text": PROMPT, "answers": "model"},
        "sampled": {"from": "model", "prompt": BEGINNING, "samples": n, "max_tokens": 256},
    }[method.texts]
