"""The tables that `guidance.py` prints, in Markdown.

First: loss and exact match of every merge, for each skill. Second: the guides, with a table of
losses and one of exact match per method and trim, for each mean density. `+` marks a loss lower
than that of the twin and `-` a higher one (p < .01). The twin is uniform; that of `uniform by
activation` trims by magnitude. Third: every merge compared with its twins. t is for the paired
differences in loss, and negative if the merge is better. p is two-sided, by the normal distribution
(there are many items), after Holm's correction over all skills of all rows.

Scores of several seeds are averaged item by item, so a mark says nothing about other seeds. For
methods that drop entries at random, `lower` therefore counts the densities, skills and seeds with a
lower loss than the twin of the same seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from answers import Scored
from guidance_variants import GUIDES, MEAN_DENSITIES, Variant

SIGNIFICANT = 0.01

Found = Mapping[str, Mapping[str, Sequence[Scored]]]  # variant -> skill -> seed by seed
Test = tuple[str, str, str]  # a merge, its twin, and a skill


@dataclass(frozen=True)
class Tested:
    """Tests of every merge against its twins."""

    pairs: Sequence[tuple[str, str]]
    t: Mapping[Test, float]
    p: Mapping[Test, float]

    def mark(self, name: str, skill: str) -> str:
        """The mark of a merge compared with its only twin."""
        for test, p in self.p.items():
            if test[0] == name and test[2] == skill and p < SIGNIFICANT:
                return "+" if self.t[test] < 0 else "-"
        return ""


def best_of(family: str, known: Mapping[str, Variant], tuned: Found) -> str:
    """The variant of the family with the lowest sum of losses on the tune split."""
    sums = {
        name: sum(statistics.fmean(_losses(one)) for one in scores.values())
        for name, scores in tuned.items()
        if known[name].family == family
    }
    if not sums:
        raise SystemExit(f"nothing of {family} was scored on the tune split: --split tune first")
    return min(sums, key=sums.__getitem__)


def tables(skills: Sequence[str], known: Mapping[str, Variant], found: Found, tuned: Found) -> str:
    """All tables."""
    tested = _tested(skills, list(_pairs(known, found, tuned)), found)
    kinds = [(method, "") for method in ("ties", "dare_ties", "della")]
    kinds += [(method, " by activation") for method in ("ties", "della")]
    grids = [line for kind in kinds for line in _grid(*kind, skills, found, tested)]
    return "\n".join([*_means(skills, found), *grids, *_tests(skills, tested)])


def _tested(skills: Sequence[str], pairs: Sequence[tuple[str, str]], found: Found) -> Tested:
    t = {
        (*pair, skill): paired_t(*(_losses(found[name][skill]) for name in pair))
        for pair in pairs
        for skill in skills
    }
    p = holm({key: math.erfc(abs(value) / math.sqrt(2)) for key, value in t.items()})
    return Tested(pairs, t, p)


def holm(p: Mapping[Test, float]) -> dict[Test, float]:
    """Holm's correction: the k-th smallest p times n - k + 1, never decreasing."""
    corrected: dict[Test, float] = {}
    highest = 0.0
    for rank, key in enumerate(sorted(p, key=p.__getitem__)):
        highest = max(highest, min(1.0, p[key] * (len(p) - rank)))
        corrected[key] = highest
    return corrected


def paired_t(first: Sequence[float], second: Sequence[float]) -> float:
    """Student's t of the paired differences; 0 if all differences are 0."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    spread = statistics.stdev(differences)
    return statistics.fmean(differences) / (spread / math.sqrt(len(differences))) if spread else 0.0


def _pairs(known: Mapping[str, Variant], found: Found, tuned: Found) -> Iterator[tuple[str, str]]:
    families = {variant.family for variant in known.values()}
    for name in found:
        for against in known[name].against:
            is_tuned = against in families and any(known[n].family == against for n in tuned)
            twin = best_of(against, known, tuned) if is_tuned else against
            if twin in found:
                yield name, twin


def _means(skills: Sequence[str], found: Found) -> Iterator[str]:
    columns = [f"{what}, {skill}" for what in ("loss", "exact") for skill in skills]
    yield f"\n| merge | {' | '.join(columns)} |"
    yield "|---|" + "---:|" * len(columns)
    for name, scores in found.items():
        losses = [f"{statistics.fmean(_losses(scores[skill])):.3f}" for skill in skills]
        right = [f"{statistics.fmean(_right(scores[skill])):.3f}" for skill in skills]
        yield f"| {' | '.join([name, *losses, *right])} |"


def _grid(
    method: str, trim: str, skills: Sequence[str], found: Found, tested: Tested
) -> Iterator[str]:
    rows = {
        guide: [f"{method} {density} {guide}{trim}" for density in MEAN_DENSITIES]
        for guide in ("uniform", *(g for g in GUIDES if g != "uniform"))
    }
    if not any(name in found for names in rows.values() for name in names):
        return
    for what, values in (("loss", _losses), ("exact", _right)):
        counts = what == "loss" and method != "ties"
        columns = [*map(str, MEAN_DENSITIES), *(["lower"] if counts else [])]
        yield f"\n| {method}{trim}, {what} | {' | '.join(columns)} |"
        yield "|---|" + "---:|" * len(columns)
        for guide, names in rows.items():
            cells = [
                " / ".join(
                    f"{statistics.fmean(values(found[name][skill])):.3f}"
                    + (tested.mark(name, skill) if what == "loss" else "")
                    for skill in (skills if name in found else ())
                )
                for name in names
            ]
            if counts:
                twins = rows["uniform"]
                cells.append("" if names == twins else lower(names, twins, skills, found))
            yield f"| {guide} | {' | '.join(cells)} |"


def lower(names: Sequence[str], twins: Sequence[str], skills: Sequence[str], found: Found) -> str:
    """Number of skills and seeds with a lower loss than the twin of the same seed."""
    means = [
        [statistics.fmean(scored.losses) for scored in (one, other)]
        for name, twin in zip(names, twins, strict=True)
        if name in found and twin in found
        for skill in skills
        for one, other in zip(found[name][skill], found[twin][skill], strict=True)
    ]
    return f"{sum(own < its_twin for own, its_twin in means)} of {len(means)}"


def _tests(skills: Sequence[str], tested: Tested) -> Iterator[str]:
    yield "\n| merge | against | t | p |\n|---|---|---:|---:|"
    for pair in tested.pairs:
        t = " / ".join(f"{tested.t[*pair, skill]:+.1f}" for skill in skills)
        p = " / ".join(_probability(tested.p[*pair, skill]) for skill in skills)
        yield f"| {' | '.join([*pair, t, p])} |"


def _probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def _losses(seeds: Sequence[Scored]) -> list[float]:
    return [statistics.fmean(one) for one in zip(*(s.losses for s in seeds), strict=True)]


def _right(seeds: Sequence[Scored]) -> list[float]:
    return [statistics.fmean(one) for one in zip(*(s.right for s in seeds), strict=True)]
