"""The merges that `guidance.py` compares: names and recipes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from answers import PROMPT, TEXT

from lewis_hub.guides import registry

ALONE = "experts alone"  # no merge: each skill's own expert
BASE = "base alone"
MEAN_DENSITIES = (0.05, 0.1, 0.2, 0.35, 0.5)
SEEDS = (42, 43, 44)
GUIDES = tuple(guide.name for guide in registry.guides())
PLAIN = ("task_arithmetic", "ties", "linear")  # families that know nothing of any text
MERGED = {"inputs": "merged"}  # matrices are fitted one after the other
FEATCAL = {  # of the code of arXiv 2605.13030; without biases and norms
    "normalize_grams": "frobenius",
    "ridge": 0.05,
    "anchor_scale": 2.2 * 0.3,
    "interpolation": 0.25,
    "compensate": False,
}
MAX_TOKENS = 64  # no item of the benchmark is longer; `lewis_reference` pads to it
SHOWN = (  # on the test split, whichever of their families the tune split picks
    *("regmean 0.5 lambda 1.0", "regmean merged 0.7"),  # what a recipe has unless it says otherwise
    *("regmean 0.5 generic", "regmean merged 0.[579] generic"),
)
GENERIC = {  # beside the skills' folder
    "math": ("gsm8k/train.jsonl", "{question} {answer}"),
    "strings": ("mbpp/mbpp_train_full.jsonl", "{text} {code}"),
}


@dataclass(frozen=True)
class Bench:
    """Models and data: `base`, `expert-SKILL`; SKILL_{train,tune,test}.jsonl."""

    models: Path
    data: Path
    skills: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """One merge.

    Attributes:
        family: variants that differ only in hyperparameters; the tune split selects one of them.
        against: the variants, or families, to compare with.
        seeds: several seeds if the merge is random.
        own: whether experts are calibrated on their own training items or on generic texts.
        written: settings of texts that the experts write, with or without those items' questions.
    """

    name: str
    method: str
    parameters: Mapping[str, object] = field(default_factory=dict)
    guide: Mapping[str, object] | None = None
    family: str | None = None
    against: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS[:1]
    samples: int = 64
    own: bool = True
    written: Mapping[str, object] | None = None

    def recipe(self, bench: Bench, seed: int) -> dict[str, object]:
        """The recipe as a mapping, with absolute paths."""
        experts = [
            {
                "model": str(bench.models / f"expert-{skill}"),
                "calibration": self._texts(bench, skill),
            }
            for skill in bench.skills
        ]
        return {
            "base_model": str(bench.models / "base"),
            "models": experts,
            "merge_method": self.method,
            "parameters": dict(self.parameters),
            "dtype": "bfloat16",
            "seed": seed,
        } | ({"guide": dict(self.guide)} if self.guide else {})

    def _texts(self, bench: Bench, skill: str) -> dict[str, object]:
        told = {"samples": self.samples, "max_tokens": MAX_TOKENS, **(self.written or {})}
        if "from" in told:
            return told
        if "answers" in told:
            return {"dataset": str(bench.data / f"{skill}_train.jsonl"), "text": PROMPT} | told
        file, text = (f"{skill}_train.jsonl", TEXT) if self.own else GENERIC[skill]
        folder = bench.data if self.own else bench.data.parent
        limit = {"max_tokens": MAX_TOKENS} if self.own else {}
        return {"dataset": str(folder / file), "text": text, "samples": self.samples} | limit


def variants(bench: Bench) -> dict[str, Variant]:
    """All variants, by name."""
    generic = all(one in GENERIC for one in bench.skills)
    alone = (Variant(ALONE, "none"), Variant(BASE, "none"))
    found = [
        *alone,
        *_unguided(),
        *_without_data(),
        *_by_statistics(generic=generic),
        *_written(),
        *_guided(),
        *_combined(),
    ]
    return {variant.name: variant for variant in found}


def _unguided() -> Iterator[Variant]:
    yield Variant("linear", "linear", family="linear")
    for weight in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        method = "task_arithmetic"
        yield Variant(f"{method} {weight}", method, {"weight": weight}, family=method)
    for density in (0.2, 0.35, 0.5, 0.7):
        for lambda_ in (1.0, 1.3, 1.6):
            settings = {"density": density, "lambda": lambda_}
            yield Variant(f"ties {density} lambda {lambda_}", "ties", settings, family="ties")


def _without_data() -> Iterator[Variant]:
    for method in ("tsv_m", "iso_c"):
        for lambda_ in (0.5, 0.7, 1.0, 1.4):
            settings = {"lambda": lambda_}
            yield Variant(f"{method} lambda {lambda_}", method, settings, family=method)
    for lambda_ in (1.0, 1.4):
        for density in (0.3, 1.0):
            settings = {"density": density, "lambda": lambda_}
            name = f"knots_ties {density} lambda {lambda_}"
            yield Variant(name, "knots_ties", settings, family="knots_ties")
    for ridge in (0.01, 0.1, 1.0):
        for scale in (0.8, 1.0):
            settings = {"ridge": ridge, "anchor_scale": scale}
            yield Variant(f"wudi ridge {ridge} scale {scale}", "wudi", settings, family="wudi")


def _by_statistics(*, generic: bool) -> Iterator[Variant]:
    for alpha in (0.0, 0.3, 0.5, 0.7, 0.9, 0.99):
        for lambda_ in (1.0, 1.1, 1.2, 1.4):
            yield _regmean(f"regmean {alpha} lambda {lambda_}", alpha, lambda_, "regmean")
        for samples in (256, 1024):
            name = f"regmean {alpha} samples {samples}"
            yield _regmean(name, alpha, 1.0, f"regmean samples {samples}", samples)
        for samples in (64, 256, 1024):
            family = "regmean merged" + (f" samples {samples}" if samples != 64 else "")
            name = family.replace("merged", f"merged {alpha}")
            yield _regmean(name, alpha, 1.0, family, samples, MERGED)
        if generic:
            for more in ({}, MERGED):
                family = f"regmean{' merged' if more else ''} generic"
                name = family.replace(" generic", f" {alpha} generic")
                yield _regmean(name, alpha, 1.0, family, 64, more, own=False)
    yield from _anchored(generic=generic)
    for name, alpha, more in (("regmean 0.5", 0.5, {}), ("regmean merged 0.7", 0.7, MERGED)):
        settings = {**more, "embeddings": True}
        yield _regmean(f"{name} embeddings", alpha, 1.0, f"{name} embeddings", 64, settings)


def _anchored(*, generic: bool) -> Iterator[Variant]:
    """With a ridge towards another merge; with norms; FeatCal by its authors' settings.

    The ridge pulls towards task arithmetic by .8 unless the name says otherwise.
    """
    for own in (True, False) if generic else (True,):
        more = "" if own else " generic"
        for ridge in (0.001, 0.01, 0.1, 1.0):
            settings = {**MERGED, "ridge": ridge, "anchor_scale": 0.8}
            family = f"regmean merged anchored{more}"
            yield _regmean(
                f"regmean merged 0.7 ridge {ridge}{more}", 0.7, 1.0, family, 64, settings, own=own
            )
            if ridge == 0.1:
                for anchor, scale in (("ties", 1.0), ("base", 1.0)):
                    by = {**settings, "anchor": anchor, "anchor_scale": scale}
                    name = f"regmean merged 0.7 ridge {ridge} {anchor}{more}"
                    yield _regmean(name, 0.7, 1.0, family, 64, by, own=own)
        settings = {**MERGED, "affine": True}
        name = f"regmean merged 0.7 affine{more}"
        yield _regmean(name, 0.7, 1.0, f"regmean merged affine{more}", 64, settings, own=own)
        settings = {**MERGED, **FEATCAL}
        yield _regmean(f"featcal{more}", 1.0, 1.0, f"featcal{more}", 64, settings, own=own)


def _regmean(  # noqa: PLR0913 (what differs between variants)
    name: str,
    alpha: float,
    lambda_: float,
    family: str,
    samples: int = 64,
    more: Mapping[str, object] = MappingProxyType({}),
    *,
    own: bool = True,
) -> Variant:
    settings = {"off_diagonal": alpha, "lambda": lambda_, **more}
    against = (*PLAIN, "regmean") if more and own else PLAIN
    return Variant(
        name, "regmean", settings, family=family, against=against, samples=samples, own=own
    )


def _written() -> Iterator[Variant]:
    """On texts that the experts write: answers to their training prompts, or all of each text."""
    begun = {"from": "model", "prompt": "Question:"}
    for ridge in (0.0, 0.1):
        more = {"ridge": ridge, "anchor_scale": 0.8} if ridge else {}
        settings = {"off_diagonal": 0.7, **MERGED, **more}
        name = f"regmean merged 0.7{f' ridge {ridge}' if ridge else ''}"
        yield Variant(f"{name} answers", "regmean", settings, written={"answers": "model"})
        for temperature, top_p, samples in ((1.0, 1.0, 64), (0.7, 0.9, 64), (0.7, 0.9, 256)):
            written = {**begun, "temperature": temperature, "top_p": top_p, "samples": samples}
            told = f"{name} from temperature {temperature} top_p {top_p} samples {samples}"
            yield Variant(told, "regmean", settings, written=written)


def _guided() -> Iterator[Variant]:
    """Every guide, trim and mean density; the twin is uniform, or trimmed by magnitude.

    DARE does not rank entries, so it has no trim.
    """
    for method in ("ties", "dare_ties", "della"):
        seeds = SEEDS[:1] if method == "ties" else SEEDS
        for density in MEAN_DENSITIES:
            for trim in ("magnitude", "activation") if method != "dare_ties" else ("magnitude",):
                for guide in GUIDES:
                    yield _under(method, density, guide, trim, seeds)


def _under(method: str, density: float, guide: str, trim: str, seeds: tuple[int, ...]) -> Variant:
    by = "" if trim == "magnitude" else " by activation"
    twin = f"{method} {density} uniform{'' if guide == 'uniform' else by}"
    parameters = {} if trim == "magnitude" else {"trim": trim}
    name = f"{method} {density} {guide}{by}"
    more = SEEDS if guide == "random" else seeds
    against = () if name == twin else (twin,)
    return Variant(name, method, parameters, _guide(guide, density), None, against, more)


def _guide(name: str, mean: float) -> dict[str, object]:
    """Densities from half to one and a half of the mean, shifted until the mean is exact."""
    if name == "uniform":
        return {"name": name, "gamma": mean, "epsilon": mean}
    bounds = {"gamma": round(0.5 * mean, 4), "epsilon": round(1.5 * mean, 4)}
    return {"name": name, **bounds, "mean_density": mean}


def _combined() -> Iterator[Variant]:
    """Regmean after trimming, with independent matrices or in sequence."""
    for name, given in (
        ("regmean 0.5", {}),
        ("regmean merged 0.7", {**MERGED, "off_diagonal": 0.7}),
    ):
        for density in (0.2, 0.35, 0.5):
            uniform = f"{name} density {density} uniform"
            for guide in GUIDES:
                more = SEEDS if guide == "random" else SEEDS[:1]
                twin = (
                    (f"{name} lambda 1.0" if not given else name) if guide == "uniform" else uniform
                )
                told = f"{name} density {density} {guide}"
                yield Variant(told, "regmean", given, _guide(guide, density), None, (twin,), more)
            by = {**given, "trim": "activation"}
            told = f"{uniform} by activation"
            yield Variant(told, "regmean", by, _guide("uniform", density), None, (uniform,))
