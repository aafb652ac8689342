"""An objective of a search; the answer loss, a metric of a task, and the items for them."""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from statistics import fmean
from typing import Any, Literal

from lewis_hub.calibration.texts import draw_rows
from lewis_hub.display import Advance, Progress
from lewis_hub.errors import EvaluationError, TuningError
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.benchmarks import (
    Commits,
    build_requests,
    free_split,
    prepared,
    reading_only_named,
)
from lewis_hub.evaluate.gate import unknown_metric
from lewis_hub.evaluate.harness import Benchmarks, evaluate_loaded
from lewis_hub.evaluate.items import (
    ANSWER_LOSS,
    Question,
    TaskRows,
    answer_losses,
    chat_of,
    load_rows,
)
from lewis_hub.evaluate.libraries import scoring_facts
from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks, require_metric
from lewis_hub.hub.source import Source
from lewis_hub.workflow.fetch import small_files
from lewis_hub.workflow.task_data import scored_commits
from lewis_hub.workflow.texts import DrawnText, ScoredTasks, count_overlap, drawn_items, overlaps

N_PARTS = 8  # a trial can be pruned after each part
N_ITEMS = 200  # of each task
LOOKED_AT = 16_384  # rows, most of which may be equal to those that a merge is fitted on
LOOKED_AT_PER_ROW = 64  # where many rows are asked for

ObjectiveName = Literal["answers", "drift"]  # scored answers, or distance from the experts


@dataclass(frozen=True)
class Search:
    """The settings of a search; methods and guides are tried besides the recipe's own."""

    n_trials: int = 30  # including those of earlier runs
    budget_s: float | None = None  # no trial begins after this time of this run; None: no limit
    tasks: tuple[str, ...] = ()  # empty: the tasks that the recipe scores
    split: str | None = None  # None: a split for few-shot examples that is not scored
    samples: int | None = None  # per task or expert; None: 200 items, or 64 texts
    objective: ObjectiveName = "answers"
    metric: str | None = None  # `metric,filter`; None: the answer loss
    methods: tuple[str, ...] = ()
    guides: tuple[str, ...] = ()  # may contain `none`; empty: `uniform` if the recipe has a guide


@dataclass(frozen=True)
class TuningItems:
    """The items of a task that a search tunes on."""

    task: str
    split: str
    rows: TaskRows
    indices: tuple[int, ...]  # of `rows`, in the order in which they are scored
    n_calibrated: int  # items that were skipped because calibration draws them
    commits: Commits  # of the data


@dataclass(frozen=True)
class TuningSplit:
    """Tasks, and the split of their data to tune on."""

    tasks: TaskSelection
    split: str


def choose_split(search: Search, scored: TaskSelection) -> TuningSplit:
    """Choose what a search tunes on; no data is read.

    Raises:
        EvaluationError: a task is unknown, or the tasks only declare splits that they score.
    """
    if scored.library == "mteb":
        problem = (
            "`backend: mteb` scores embeddings, but a search needs answers of a language model"
        )
        raise EvaluationError("evaluate", problem, "Give the parameters yourself.")
    tasks = replace(scored, names=search.tasks or scored.names)
    located = locate_tasks(tasks)
    split = search.split or free_split(located)
    if split is None:
        problem = "these tasks have no common split for few-shot examples that they do not score."
        remedy = "Name one with --split, or tasks made for tuning with --task."
        raise EvaluationError(", ".join(tasks.names), problem, remedy)
    return TuningSplit(tasks, split)


def draw_items(
    chosen: TuningSplit,
    n_samples: int,
    scored: ScoredTasks,
    calibrated: Sequence[DrawnText],
    seed: int,
    chat_model: Source | None,
) -> tuple[TuningItems, ...]:
    """Draw items of each task.

    Items that calibration draws are skipped; items that are scored are refused. The chat template
    of `chat_model` formats the prompts.

    Raises:
        EvaluationError: the split is unknown or scored.
        TuningError: an item is scored, or no item is left.
    """
    selection, split = chosen.tasks, chosen.split
    commits, chat = scored_commits(scored.api, selection), None
    if chat_model:
        from lewis_hub.calibration.model import load_tokenizer

        tokenizer = load_tokenizer(str(small_files(scored.api, chat_model)), chat_model.name)
        chat = chat_of(tokenizer)
    drawn = []
    for name in selection.names:
        allow_scored = name not in scored.selection.names
        one = replace(selection, names=(name,))
        rows = replace(load_rows(one, split, commits, allow_scored=allow_scored), chat=chat)
        found = free_items(rows, n_samples, calibrated, seed, scored.progress)
        drawn.append(TuningItems(name, split, rows, *found, commits))
        if not found[0]:
            problem = f"no item of split `{split}` is left that calibration does not draw"
            n_others = n_looked_at(n_samples)
            are_left = len(rows) > len(calibrated) + n_others
            problem += f", of the first {n_others:,} others" if are_left else ""
            remedy = "Name another split with --split, or fewer `samples` in `calibration`."
            raise TuningError(name, problem, remedy)
    _refuse_scored(scored, drawn)
    return tuple(drawn)


def draw_order(n_rows: int, n_wanted: int, n_fitted: int, seed: int) -> tuple[int, ...]:
    """The rows that a search looks at, in the order of the seed.

    A merge may be fitted on the first `n_fitted` of them, and the others may be equal to these.
    """
    return draw_rows(n_rows, n_fitted + n_looked_at(n_wanted), seed)


def n_looked_at(n_wanted: int) -> int:
    """How many rows a search looks at, at most, beside those that a merge is fitted on."""
    return max(LOOKED_AT, LOOKED_AT_PER_ROW * n_wanted)


def free_items(
    rows: TaskRows,
    n_samples: int,
    calibrated: Sequence[DrawnText],
    seed: int,
    progress: Progress,
) -> tuple[tuple[int, ...], int]:
    """The indices of `n_samples` items that no calibration text holds, and how many it holds.

    There are fewer where all items that are looked at are held.
    """
    order = draw_order(len(rows), n_samples, len(calibrated), seed)
    free, n_known, n_compared = list[int](), 0, 0
    while n_compared < len(order) and len(free) < n_samples:
        n_more = n_compared or n_samples + len(calibrated)
        some = order[n_compared : n_compared + n_more]
        n_compared += len(some)
        items = rows.items(some)  # more than once: a text with few-shot examples holds several
        with progress.stage(
            "Comparing items with calibration texts", len(some), "items"
        ) as advance:
            known = {id(item) for _, item in overlaps(calibrated, items, advance)}
        n_known += len(known)
        found = zip(some, items, strict=True)
        free += [index for index, item in found if item.answer and id(item) not in known]
    return tuple(free[:n_samples]), n_known


def _refuse_scored(scored: ScoredTasks, drawn: Sequence[TuningItems]) -> None:
    known = scored.items()
    for one in drawn:
        chosen = drawn_items(one.rows.items(one.indices))
        title = f"Comparing {one.task}, split {one.split}, with the items that are scored"
        with scored.progress.stage(title, len(known), "items") as advance:
            found = count_overlap(chosen, known, advance)
        if found:
            counts = ", ".join(f"{n} of {task}" for task, n in sorted(found.items()))
            raise TuningError(
                f"{one.task}, split `{one.split}`",
                f"of {len(one.indices)} items to tune on, `evaluate` scores {counts}",
                "A score on items that a merge was tuned on is meaningless: name another split\n"
                "with --split, or another task with --task.",
            )


@dataclass(frozen=True)
class Share:
    """A part of the mean of a task: a sum of values and their number."""

    task: str
    total: float
    n: float


Part = Callable[[Any, Advance], Sequence[Share]]  # (loaded model, advance) -> shares of tasks


@dataclass(frozen=True)
class Objective:
    """The objective of a model: the mean over tasks of each task's mean."""

    metric: str  # `metric,filter`
    lower_is_better: bool
    parts: tuple[Part, ...]  # groups of items, in the order in which they are scored
    n_items: int
    digest: str  # over the items and the metric

    def values(self, lm: Any, advance: Advance) -> Iterator[float]:
        """Yield the objective over the scored items after each part; `advance` counts items."""
        totals: defaultdict[str, float] = defaultdict(float)
        counts: defaultdict[str, float] = defaultdict(float)
        for part in self.parts:
            for share in part(lm, advance):
                totals[share.task] += share.total
                counts[share.task] += share.n
            yield fmean(totals[task] / n if n else nan for task, n in counts.items())


def by_answer_loss(drawn: Sequence[TuningItems]) -> Objective:
    """Return the objective "negative log-likelihood per token of the answer", in nats."""
    questions = _questions(drawn)

    def part(some: Sequence[Question]) -> Part:
        def measure(lm: Any, advance: Advance) -> Sequence[Share]:
            losses = zip(some, answer_losses(lm, some, advance), strict=True)
            return [Share(q.task, loss.nats, loss.n_tokens) for q, loss in losses if loss.n_tokens]

        return measure

    parts = tuple(map(part, _parts(questions)))
    digest = _digest(ANSWER_LOSS, questions)
    return Objective(ANSWER_LOSS, True, parts, len(questions), digest)  # noqa: FBT003


def by_metric(drawn: Sequence[TuningItems], metric: str, settings: EvaluationSettings) -> Objective:
    """Return the objective of an lm-eval metric, `name,filter`, which is a mean over items.

    Raises:
        EvaluationError: a task has no such metric.
    """
    for one in drawn:
        require_metric(one.rows.selection, one.task, metric)
    directions = {_lower_is_better(one, metric) for one in drawn}
    if len(directions) > 1:
        problem = f"`{metric}` is better if higher in one task, and if lower in another."
        raise EvaluationError("tune", problem, "Tune on one of these tasks, or on the answer loss.")
    items = [(one, index) for one in drawn for index in one.indices]
    parts = tuple(_metric_part(some, metric, settings) for some in _parts(items))
    digest = _digest(metric, _questions(drawn), *map(_scoring, drawn))
    return Objective(metric, directions.pop(), parts, len(items), digest)


def _metric_part(
    some: Sequence[tuple[TuningItems, int]], metric: str, settings: EvaluationSettings
) -> Part:
    by_task: defaultdict[str, list[int]] = defaultdict(list)
    drawn = {one.task: one for one, _ in some}
    for one, index in some:
        by_task[one.task].append(index)
    ready = [_benchmarks(drawn[task], indices) for task, indices in by_task.items()]

    def measure(lm: Any, advance: Advance) -> Sequence[Share]:
        shares = []
        for benchmarks, (task, indices) in zip(ready, by_task.items(), strict=True):
            with reading_only_named(drawn[task].rows.selection):
                found = evaluate_loaded(lm, benchmarks, settings, lambda _: None)
            shares += [_share(one.metrics, task, metric) for one in found.tasks.values()]
            advance(len(indices))
        return shares

    return measure


def _benchmarks(one: TuningItems, indices: Sequence[int]) -> Benchmarks:
    """Return the task with these items instead of its scored items."""
    tasks = {}
    with prepared(one.rows.selection, {}):
        for name, (task, documents) in one.rows.part_of(indices).items():
            again = copy.copy(task)
            again.fewshot_cfg = copy.copy(task.fewshot_cfg)
            # lm-eval leaves an item out of its own few-shot examples if both splits have one name
            is_shown = task.fewshot_cfg.split == one.split
            again.fewshot_cfg.split = task.config.test_split if is_shown else "another"
            again.has_test_docs = lambda: True
            again.test_docs = lambda chosen=documents: chosen
            build_requests(name, again, None)
            tasks[name] = again
    return Benchmarks(tasks, {}, None, one.rows.selection.allow_code)


def _share(metrics: Mapping[str, Any], task: str, metric: str) -> Share:
    if metric not in metrics:
        raise unknown_metric(task, metric, list(metrics))
    found = metrics[metric]
    if found.values is None:
        problem = f"its `{metric}` is not a mean over items, so it cannot be computed in parts."
        raise EvaluationError(task, problem, "Tune on another --metric, or on the answer loss.")
    known = [value for value in found.values if value is not None]
    return Share(task, sum(known), len(known))


def _lower_is_better(one: TuningItems, metric: str) -> bool:
    name = metric.partition(",")[0]
    return any(task.higher_is_better().get(name) is False for task, _ in one.rows.parts)


def _parts(items: Sequence[Any]) -> list[Sequence[Any]]:
    """Split items so that every part has items of every task."""
    n_parts = min(N_PARTS, len(items))
    return [items[first::n_parts] for first in range(n_parts)]


def _questions(drawn: Sequence[TuningItems]) -> list[Question]:
    return [question for one in drawn for question in one.rows.questions(one.indices)]


def _scoring(one: TuningItems) -> str:
    """What decides how a metric scores answers: the task files, and columns that no prompt has."""
    documents = [some for _, some in one.rows.part_of(one.indices).values()]
    return repr([*scoring_facts(one.rows.selection, one.commits), documents])


def _digest(metric: str, questions: Sequence[Question], *others: str) -> str:
    asked = (repr((q.task, q.prompt, q.answer)) for q in questions)
    lines = "\n".join([metric, *asked, *others])
    return hashlib.sha256(lines.encode()).hexdigest()
