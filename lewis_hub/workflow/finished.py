"""Export a finished merge, or another model, to GGUF."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from lewis_hub.display import Progress
from lewis_hub.errors import OutputError
from lewis_hub.export.gguf import plan_gguf
from lewis_hub.files import require_no_link, require_writable
from lewis_hub.merge.workspace import alone_with
from lewis_hub.progress import BY_DEFAULT, Shown, shown
from lewis_hub.recipe.formats import FORMATS, ExportFormat, exports_in, file_name
from lewis_hub.recipe.reference import ModelReference
from lewis_hub.recipe.schema import Recipe
from lewis_hub.report.lock import Lock, OutputFile
from lewis_hub.workflow.export import plan_of, small_files, write_exports
from lewis_hub.workflow.fetch import download
from lewis_hub.workflow.open import open_model
from lewis_hub.workflow.publish import lock_in
from lewis_hub.workflow.report import described
from lewis_hub.workflow.republish import facts_of, require_stated, restate
from lewis_hub.workflow.resolve import hub_api, resolve_one


def add_exports(
    folder: Path, found: Lock, exports: Iterable[ExportFormat], progress: Progress
) -> Lock:
    """Add formats to a finished merge; return its new lock.

    Recipe, card and lock name the new files. A signature of the folder would not be valid any
    more, and is deleted.

    Raises:
        OutputError: another run works on it, or has changed it since its lock was `found`.
    """
    with alone_with(folder):
        if lock_in(folder) != found:
            raise OutputError(str(folder), "another run changed it", "Run the same command again.")
        require_stated(found)
        asked = {*exports}
        new = [one for one in FORMATS if one in asked]
        written = write_exports(plan_of(folder), folder, folder, new, progress)
        outputs = {name: OutputFile(one.sha256, one.n_bytes) for name, one in written.items()}
        asked |= {*exports_in(found.recipe)}
        recipe = {**found.recipe, "export": [one for one in FORMATS if one in asked]}
        keys = (field.alias or name for name, field in Recipe.model_fields.items())
        ordered = {key: recipe[key] for key in (*keys, *recipe) if key in recipe}
        lock = replace(found, recipe=ordered, outputs={**found.outputs, **outputs})
        return restate(described(facts_of(found), folder), found, lock, folder)


def export_model(
    model: ModelReference | Path | str,
    export: ExportFormat,
    output: Path | None = None,
    progress: Shown = BY_DEFAULT,
) -> Path:
    """Write a model as a GGUF file, which llama.cpp and Ollama run.

    Args:
        model: a repo, repo@revision or folder.
        export: `gguf:f16`, `gguf:bf16` or `gguf:q8_0`.
        output: folder for the file; None: the model's own folder, or for a repo the working
            folder. In the folder of a merge, its recipe, card and lock then name the file.
        progress: True: shown on stderr; False: nothing; or what shows it.

    Returns:
        The path of the file. A file of this name is replaced.

    Raises:
        LewisHubError: the model cannot be found or exported; nothing is downloaded then.

    Example:
        >>> base = lewis_hub.zoo_folder() / "base"
        >>> lewis_hub.export_model(base, "gguf:q8_0", tmp_path).name
        'model-Q8_0.gguf'
    """
    api, progress = hub_api(), shown(progress)
    if output is not None:
        require_no_link(output)
    source = resolve_one(model, api, progress)
    opened = open_model(api, source)
    plan = plan_gguf(opened.checkpoint, opened.config, small_files(source, api))
    target = output or source.folder or Path()
    require_writable(target)
    own = source.folder and source.folder.resolve() == target.resolve()
    found = lock_in(target) if own else None
    if found:
        add_exports(target, found, [export], progress)
    else:
        folder = source.folder or download(api, [source], progress)[source.pinned]
        target.mkdir(parents=True, exist_ok=True)
        write_exports(plan, folder, target, [export], progress)
    return target / file_name(export)
