"""The tables of PROTOCOL.md, in Markdown, from the stored cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import numpy as np
from guidance_tables import holm
from protocol_bootstrap import (
    LEAST_GAP,
    N_RESAMPLES,
    Interval,
    Place,
    Statistic,
    difference,
    estimate,
    lower_loss,
    mean_and_worst,
    p_value,
)
from protocol_cells import Cell, Result, Store, cells
from protocol_methods import METHODS, OURS, methods_for
from protocol_tasks import Family

REFERENCES = ("task_arithmetic", "experts")
SIGNIFICANT = 0.05
RIVALS = (  # ours is tested against each, at every N; fixed before the run
    *("task_arithmetic", "ties", "dare_ties", "lewis_ties", "regmean", "featcal", "wudi_ridge"),
    *("fine_tuning", "distillation", "fine_tuning_10", "distillation_10"),
)
TESTED = (2, 4, 8)  # numbers of experts
LEWIS_TEST = ("lewis_alone", "uniform_alone", "1")
AIM_S = 600  # of a merge of 135 M parameters


@dataclass(frozen=True)
class Known:
    """All stored results of a number of experts, by family, draws and method."""

    n: int
    results: dict[Cell, Result]
    n_resamples: int

    def estimate(self, places: Sequence[Place], statistic: Statistic) -> list[Interval]:
        return estimate(places, statistic, self.n_resamples)

    def p_value(self, places: Sequence[Place], statistic: Statistic) -> float:
        return p_value(places, statistic, self.n_resamples)

    def places(self, *methods: str) -> list[Place]:
        """Where all of the methods are stored; one that reads no texts counts at every draw."""
        found = []
        for cell in self._draws():
            own = [self.at(cell, method) for method in methods]
            if not all(own):
                continue
            losses = np.array([[*one.scores.losses.values()] for one in own if one])
            gap = losses[0].mean(-1) - losses[1].mean(-1)
            counted = gap >= LEAST_GAP
            if counted.any() or self.n == 1:
                found.append(Place(cell.family, cell.tasks, cell.texts, losses, counted))
        return found

    def at(self, cell: Cell, method: str) -> Result | None:
        texts = cell.texts if METHODS[method].has_texts else 1
        return self.results.get(replace(cell, method=method, texts=texts))

    def of_method(self, method: str) -> list[Result]:
        return [result for cell, result in self.results.items() if cell.method == method]

    def not_counted(self) -> list[str]:
        """Tasks with no gap to close, by family and draw."""
        told = []
        for place in self.places(*REFERENCES):
            if place.texts == 1 and not place.counted.all():
                names = [*self._first(place).scores.losses]
                left = [n for n, c in zip(names, place.counted, strict=True) if not c]
                told.append(f"{place.family}, draw {place.tasks}: {', '.join(left)}")
        return told

    def _first(self, place: Place) -> Result:
        return self.results[Cell(place.family, self.n, place.tasks, 1, REFERENCES[0])]

    def _draws(self) -> Iterator[Cell]:
        seen: set[tuple[str, int, int, int]] = set()
        for cell in self.results:
            if cell.place not in seen:
                seen.add(cell.place)
                yield cell


def tables(store: Store, families: Sequence[Family], n_resamples: int = N_RESAMPLES) -> str:
    """All tables; a method or a number of experts without stored cells is left out."""
    whole = cells(families)
    stored = {cell: result for cell in whole if (result := store.read(cell))}

    def of(n: int) -> Known:
        own = {cell: result for cell, result in stored.items() if cell.n == n}
        return Known(n, own, n_resamples)

    lines = [f"{len(stored)} of {len(whole)} cells of the protocol are stored.", ""]
    known = [of(n) for n in (2, 4, 8, 16)]
    known = [one for one in known if one.results]
    for one in known:
        lines += _of_count(one)
    alone = of(1)
    lines += [*_curve(known), *_tests(known, alone), *_alone(alone)]
    return "\n".join([*lines, *_aims(known), ""])


def _of_count(known: Known) -> list[str]:
    head = ["method", "places", "gap closed, mean", "worst expert", "exact", "perplexity"]
    head += ["abilities", "core-seconds", "peak memory"]
    lines = [f"### {known.n} experts", "", *_head(head)]
    for method in methods_for(known.n):
        results = known.of_method(method.name)
        if results:
            lines.append(_row([method.name, *_values(known, method.name, results)]))
    if left := known.not_counted():
        lines += ["", f"No gap to close (below {LEAST_GAP} nats): {'; '.join(left)}."]
    return [*lines, ""]


def _values(known: Known, method: str, results: Sequence[Result]) -> list[str]:
    places = known.places(*REFERENCES, method)
    gap = [str(one) for one in known.estimate(places, mean_and_worst)] if places else ["", ""]
    exact = fmean(fmean(v) for r in results for v in r.scores.right.values())
    forgotten = _forgotten(known, results)
    abilities = _abilities(known, results)
    made = [r.cost for r in results if r.cost.cpu_s]
    seconds = f"{median(cost.cpu_s for cost in made):.0f}" if made else ""
    peaks = [cost.peak_bytes for cost in made if cost.peak_bytes]
    memory = f"{max(peaks) / 1e6:,.0f} MB" if peaks else ""
    return [
        str(len(places)),
        *gap,
        f"{exact:.3f}",
        "" if forgotten is None else f"{100 * forgotten:+.1f} %",
        "" if abilities is None else f"{100 * abilities:+.1f}",
        seconds,
        memory,
    ]


def _forgotten(known: Known, results: Sequence[Result]) -> float | None:
    """Perplexity of general text over that of the base, less 1."""

    def rise(result: Result, base: Result) -> float | None:
        if not result.scores.general:
            return None
        return math.exp(fmean(result.scores.general) - fmean(base.scores.general)) - 1

    return _beside_base(known, results, rise)


def _abilities(known: Known, results: Sequence[Result]) -> float | None:
    """The mean accuracy of lm-eval's tasks less that of the base."""

    def rise(result: Result, base: Result) -> float | None:
        own, before = result.scores.abilities, base.scores.abilities
        if not own or own.keys() != before.keys():
            return None
        return fmean(own[name] - before[name] for name in own)

    return _beside_base(known, results, rise)


def _beside_base(
    known: Known, results: Sequence[Result], rise: Callable[[Result, Result], float | None]
) -> float | None:
    pairs = [(one, known.at(one.cell, "base")) for one in results]
    found = [rise(one, base) for one, base in pairs if base]
    told = [one for one in found if one is not None]
    return fmean(told) if told else None


def _curve(known: Sequence[Known]) -> list[str]:
    """Mean gap closed as the number of experts grows."""
    lines = ["### As N grows", "", *_head(["method", *(f"N = {one.n}" for one in known)])]
    for method in methods_for(2):
        values = [_mean_gap(one, method.name) for one in known]
        if any(values) and method.name not in REFERENCES:
            lines.append(_row([method.name, *(f"{v.value:.2f}" if v else "" for v in values)]))
    return [*lines, ""]


def _mean_gap(known: Known, method: str) -> Interval | None:
    places = known.places(*REFERENCES, method)
    return known.estimate(places, mean_and_worst)[0] if places else None


def _tests(known: Sequence[Known], alone: Known) -> list[str]:
    """The family of tests; one that cannot be made yet counts as p = 1 in Holm's correction."""
    p = {(OURS, rival, str(n)): 1.0 for n in TESTED for rival in RIVALS} | {LEWIS_TEST: 1.0}
    rows: dict[tuple[str, str, str], tuple[Interval, int]] = {}
    for one in known:
        for rival in RIVALS if one.n in TESTED else ():
            places = one.places(*REFERENCES, OURS, rival)
            if places:
                key = (OURS, rival, str(one.n))
                rows[key] = (one.estimate(places, difference)[0], len(places))
                p[key] = one.p_value(places, difference)
    if places := alone.places(*LEWIS_TEST[:2]):
        rows[LEWIS_TEST] = (alone.estimate(places, lower_loss)[0], len(places))
        p[LEWIS_TEST] = alone.p_value(places, lower_loss)
    corrected = holm(p)
    lines = [
        "### Tests",
        "",
        f"{len(rows)} of the {len(p)} tests can be made; p after Holm over all {len(p)}. "
        f"{OURS}: mean gap closed, less that of the rival. lewis_alone: loss of the uniform "
        "twin, less that of the guided merge.",
        "",
        *_head(["of", "against", "N", "places", "difference", "p"]),
    ]
    for key, (value, n_places) in rows.items():
        digits = 4 if key == LEWIS_TEST else 2
        mark = " *" if corrected[key] < SIGNIFICANT else ""
        told = [*key, str(n_places), value.told(digits), f"{corrected[key]:.3f}{mark}"]
        lines.append(_row(told))
    return [*lines, ""]


def _alone(known: Known) -> list[str]:
    """LEWIS in its own setting: one expert merged onto its base."""
    rows = []
    for guided in known.of_method("lewis_alone"):
        uniform = known.at(guided.cell, "uniform_alone")
        if uniform:
            task = next(iter(guided.scores.losses))
            told = [fmean(one.scores.losses[task]) for one in (guided, uniform)]
            density = f"{guided.chosen['mean_density']:.3f}"
            rows.append(_row([guided.cell.family, task, density, *(f"{x:.4f}" for x in told)]))
    head = ["family", "task", "mean density", "loss, guided", "loss, uniform"]
    title = "### LEWIS in its own setting: one expert, equal mean density"
    return [title, "", *_head(head), *rows, ""] if rows else []


def _aims(known: Sequence[Known]) -> list[str]:
    """What the protocol aims at, and what was found."""
    by_n = {one.n: one for one in known}
    rows = [
        ("gap closed, own texts, N = 2", 0.97, by_n.get(2), OURS, 0),
        ("worst expert, own texts, N = 2", 0.80, by_n.get(2), OURS, 1),
        ("gap closed, prompts alone, N = 8", 0.90, by_n.get(8), "prompts_alone", 0),
        ("gap closed, no data, N = 2", 0.60, by_n.get(2), "no_data", 0),
    ]
    lines = ["### Aims", "", *_head(["aim", "at least", "found", "met"])]
    for title, aim, one, method, which in rows:
        places = one.places(*REFERENCES, method) if one else []
        found = one.estimate(places, mean_and_worst)[which] if one and places else None
        met = "not measured" if found is None else "yes" if found.value >= aim else "no"
        lines.append(_row([title, f"{aim:.2f}", str(found or ""), met]))
    if 2 in by_n and (ours := by_n[2].of_method(OURS)):
        lines += _upper("forgetting (perplexity), %", 1.0, _percent(by_n[2], ours))
        lines += _upper("seconds of a merge, N = 2", AIM_S, max(r.cost.wall_s for r in ours))
    return lines


def _percent(known: Known, results: Sequence[Result]) -> float | None:
    forgotten = _forgotten(known, results)
    return None if forgotten is None else 100 * forgotten


def _upper(title: str, aim: float, found: float | None) -> list[str]:
    met = "not measured" if found is None else "yes" if found <= aim else "no"
    value = "" if found is None else f"{found:.1f}"
    return [_row([title, f"at most {aim:g}", value, met])]


def _head(names: Sequence[str]) -> list[str]:
    return [_row(names), "|---|" + "---:|" * (len(names) - 1)]


def _row(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"
