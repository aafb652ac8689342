"""Merge LoRA adapters of one base into one adapter."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.reader import Checkpoint, TensorReader
from lewis_hub.checkpoint.writer import DTYPES
from lewis_hub.errors import RecipeError
from lewis_hub.hub.changes import require_unchanged
from lewis_hub.merge.workspace import open_workspace
from lewis_hub.progress import BY_DEFAULT, Shown, shown
from lewis_hub.recipe.schema import Recipe
from lewis_hub.report.card import merged_adapter_card
from lewis_hub.report.usage import usage_of
from lewis_hub.workflow import fetch
from lewis_hub.workflow.evaluate import CARD
from lewis_hub.workflow.job import MergeJob, prepare
from lewis_hub.workflow.resolve import hub_api
from lewis_hub.workflow.resources import Execution

if TYPE_CHECKING:
    from lewis_hub.merge.task_vectors import Extracted


def merge_loras(
    recipe: Recipe,
    output: Path | str,
    progress: Shown = BY_DEFAULT,
    *,
    rank: int | None = None,
    error: float = 0.0,
) -> Extracted:
    """Merge adapters into one adapter in PEFT's format; the base's weights are not downloaded.

    The adapter on its base is the model that the recipe would make, but for what is cut off.
    `linear` and `task_arithmetic` put the ranks side by side: without a limit nothing is cut off.

    Args:
        recipe: its models are LoRA adapters of `base_model`. `evaluate` and `publish` are ignored.
        output: folder to make.
        progress: True: shown on stderr; False: nothing; or what shows it.
        rank: highest rank of a module's update; None: the sum of the adapters' ranks, or with
            `error` no limit.
        error: in [0, 1); each module gets the lowest rank whose relative error, in the Frobenius
            norm of its update, is at most this. 0: each module gets the highest rank.

    Raises:
        LewisHubError: a model cannot be used, or the result is no low-rank update.

    Example:
        >>> matrices = lewis_hub.LoraSettings(rank=4, include="proj")
        >>> adapters = [tmp_path / "reverse", tmp_path / "cipher"]
        >>> for folder in adapters:
        ...     expert = f"zoo/expert-{folder.name}"
        ...     _ = lewis_hub.extract_lora(expert, "zoo/base", folder, matrices)
        >>> recipe = lewis_hub.Recipe(base_model="zoo/base", models=adapters, merge_method="linear")
        >>> merged = lewis_hub.merge_loras(recipe, tmp_path / "merged")
        >>> {fit.rank for fit in merged.fits.values()}
        {8}
    """
    from lewis_hub.merge.adapted_model import task_type
    from lewis_hub.merge.low_rank import (
        Truncation,
        merge_updates,
        require_low_rank,
        require_memory,
        write_adapter,
    )

    output, progress, api = Path(output), shown(progress), hub_api()
    _require_mergeable(recipe)
    unscored = recipe.model_copy(update={"evaluate": None, "publish": None})
    job = prepare(unscored, Execution(max_shard_bytes=1 << 50), api, progress)
    plan = job.plan.plan(None)
    require_low_rank(plan)
    require_memory(plan, cut := Truncation(rank, error))
    adapters = [one.source for one in job.sources.distinct if one.source.is_adapter]
    with open_workspace(output, replace=None) as work, ExitStack() as opened:
        folders = fetch.download(api, adapters, progress)

        def open_adapter(label: str) -> TensorReader:
            return opened.enter_context(TensorReader(folders[label], label))

        n_tensors = sum(len(shard.tensors) for shard in plan.shards)
        with progress.stage("Merging adapters", n_tensors, "items") as advance:
            updates = merge_updates(plan, open_adapter, cut, advance)
            dtype = DTYPES[recipe.output_dtype or "float32"]
            task = task_type(job.sources.donor.config)
            found = write_adapter(updates, _base(job), dtype, work.folder, task)
        for source in adapters:
            require_unchanged(source)
        card = _card(job, work.folder, found)
        (work.folder / CARD).write_text(card, encoding="utf-8", newline="\n")
        work.finish((CARD, *found.files))
    return found


def _require_mergeable(recipe: Recipe) -> None:
    """Refuse what a merge of adapters alone cannot do, before anything is read."""
    if recipe.guide or recipe.calibration:
        key = "guide" if recipe.guide else "calibration"
        remedy = "Remove it, and give `density` yourself; or merge on the base with `merge`."
        raise RecipeError("recipe", key, "adapters alone cannot be measured.", remedy)
    if any(one.align for one in recipe.models):
        remedy = "Remove `align`: adapters of one base have the same units."
        raise RecipeError("recipe", "models", "adapters are not aligned.", remedy)
    if recipe.arithmetic == "float64":
        key = "dtype" if recipe.dtype == "float64" else "out_dtype"
        remedy = "Write `float32`; or merge on the base with `merge`, which computes in float64."
        raise RecipeError("recipe", key, "adapters are merged in float32 only.", remedy)
    if recipe.intermediate:
        remedy = "Merge the adapters of each step by itself, or use `merge`."
        raise RecipeError("recipe", "name", "adapters are merged in one step only.", remedy)


def _base(job: MergeJob) -> Checkpoint:
    return job.sources.donor.checkpoint


def _card(job: MergeJob, folder: Path, made: Extracted) -> str:
    facts, config = job.reporting.facts, job.sources.donor.config
    task = usage_of(folder, config, [facts.models[one.pinned] for one in facts.sources]).task
    licence = facts.licence.identifier if facts.licence else None
    return merged_adapter_card(facts, task, licence, made)
