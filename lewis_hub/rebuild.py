"""Verify a merged model against its lock, also by making it again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from lewis_hub.display import Progress
from lewis_hub.hub.source import Source
from lewis_hub.pipeline import merge_models
from lewis_hub.progress import BY_DEFAULT, Shown, shown
from lewis_hub.recipe.reference import ModelReference
from lewis_hub.report.lock import Lock
from lewis_hub.workflow import fetch
from lewis_hub.workflow import verify as verification
from lewis_hub.workflow.resolve import depends_on_processor, hub_api, named_inside, resolve_one
from lewis_hub.workflow.resources import Execution
from lewis_hub.workflow.transplant import transplant_tokenizer
from lewis_hub.workflow.transplant_job import asked_in


def verify(
    model: ModelReference | Path | str,
    execution: Execution | None = None,
    progress: Shown = BY_DEFAULT,
    *,
    rebuild: bool = False,
    public_key: Path | None = None,
) -> verification.Verdict:
    """Compare a merged model with its lock; the model is not run or loaded.

    Args:
        model: a repo, repo@revision or folder of a merge.
        execution: settings of a rebuild.
        progress: True: shown on stderr; False: nothing; or what shows it.
        rebuild: also repeat the merge from the lock, with all measurements, and compare weights,
            configuration, tokenizer and code.
        public_key: PEM file of the key that must have signed it; None: signatures are ignored.

    Raises:
        LewisHubError: the lock is missing or was changed, or a source was deleted.

    Example:
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> plain = recipe.model_copy(update={"evaluate": None, "guide": None})
        >>> merged = lewis_hub.merge_models(plain, tmp_path / "merged")
        >>> lewis_hub.verify(merged.output).problems
        ()
    """
    progress, api = shown(progress), hub_api()
    execution = execution or Execution()
    source = resolve_one(model, api, progress)
    lock = verification.read_lock(source, api)
    verdict = verification.verify_files(source, lock, api, progress, public_key)
    if not rebuild:
        return verdict
    with TemporaryDirectory() as folder:
        output = Path(folder) / "merged"
        same = replace(execution, max_shard_bytes=lock.max_shard_bytes, measures_again=True)
        rounds_differently = _make_again(lock, source, output, same, progress)
        again = verification.read_lock(resolve_one(output, api, progress), api)
        differing, alike = verification.compare_models(lock, again), frozenset[str]()
        if differing and rounds_differently:
            stored = fetch.download(api, [source], progress)[source.pinned]
            alike = verification.weight_files_within_tolerance(stored, output)
            differing = verification.compare_models(lock, again, alike)
    origins = verification.compare_origins(lock, again)
    return replace(verdict, problems=(*verdict.problems, *origins, *differing))


def _make_again(
    lock: Lock, source: Source, output: Path, execution: Execution, progress: Progress
) -> bool:
    """Repeat the work of a lock; return whether other kinds of machines may round it differently.

    They do so with second moments, LAPACK, router weights and rows of new tokens.
    """
    if asked := asked_in(lock, source.pinned):
        model, donor, settings = asked
        verification.require_outside(source, named_inside([model, donor], source.folder))
        transplant_tokenizer(model, donor, output, settings, execution, progress)
        return True
    recipe = verification.recipe_of(lock, source, allow_code=execution.allow_code)
    merge_models(recipe, output, execution, progress)
    return depends_on_processor(recipe)
