"""Work on models without a merge: score, measure, extract a LoRA adapter, compare."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from huggingface_hub import HfApi

from lewis_hub.calibration.profile import ImportanceProfile, Measure
from lewis_hub.calibration.subject import FEWER, STATES, Subject, missing
from lewis_hub.checkpoint.header import MERGEABLE
from lewis_hub.checkpoint.reader import Checkpoint, TensorReader, local_checkpoint
from lewis_hub.documents import MAX_TABLE_BYTES
from lewis_hub.errors import (
    CalibrationError,
    CalibrationModelError,
    ExtractionError,
    SourceError,
)
from lewis_hub.evaluate.embedding_files import of_source
from lewis_hub.evaluate.embeddings import require_embedder
from lewis_hub.evaluate.libraries import library_of
from lewis_hub.evaluate.paired import compare
from lewis_hub.evaluate.scorable import require_scorable, require_tokenizer_files
from lewis_hub.evaluate.scores import Scores
from lewis_hub.files import (
    path_of,
    require_inside,
    require_no_links_among,
    require_room,
    require_writable,
    write_whole,
)
from lewis_hub.guides import registry as guides
from lewis_hub.hub.changes import require_unchanged, unchanged
from lewis_hub.hub.facts import model_facts
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.resolve import resolve_model
from lewis_hub.hub.source import MODULES
from lewis_hub.merge.adapter_settings import LoraSettings
from lewis_hub.merge.compare import compare as compare_checkpoints
from lewis_hub.merge.workspace import LOCK, alone_at, open_workspace
from lewis_hub.progress import BY_DEFAULT, Shown, shown
from lewis_hub.recipe.evaluation import Evaluation
from lewis_hub.recipe.reference import ModelReference
from lewis_hub.recipe.schema import Calibration, Recipe
from lewis_hub.report.card import adapter_card
from lewis_hub.report.difference import differences, recipe_differences
from lewis_hub.report.lock import Lock
from lewis_hub.report.maps import draw_maps
from lewis_hub.report.usage import usage_of
from lewis_hub.workflow import examine, fetch, heads, job, resolve, resources, verify
from lewis_hub.workflow.calibrate import known_profile
from lewis_hub.workflow.evaluate import CARD, Candidate, score, settings_of
from lewis_hub.workflow.fetch import fetch_whole
from lewis_hub.workflow.open import (
    MergeSources,
    OpenedSource,
    has_tied_head,
    open_model,
    ties,
)
from lewis_hub.workflow.resolve import (
    hub_api,
    model_reference,
    resolve_data,
    resolve_inputs,
    resolve_one,
)
from lewis_hub.workflow.resources import Execution, Loading, Measurement
from lewis_hub.workflow.snapshot import snapshot
from lewis_hub.workflow.tensor_names import with_common_names
from lewis_hub.workflow.texts import ScoredTasks, TextSettings, draw

if TYPE_CHECKING:
    from lewis_hub.merge.task_vectors import Extracted

TIED = (
    " ties head and embeddings, but PEFT applies a low-rank update of the embeddings to the "
    "embeddings alone. Store them whole: leave out `--embeddings low-rank`."
)
PROFILE = "importance.json"
IN_A_MERGE = f"lewis/{PROFILE}"
GUIDE: Measure = "lewis"
RECIPES = (".yaml", ".yml")


def evaluate_model(
    model: ModelReference | Path | str,
    asked: Evaluation,
    execution: Execution | None = None,
    progress: Shown = BY_DEFAULT,
) -> Scores:
    """Score one model on tasks of lm-eval, or by the backend `mteb` on those of mteb.

    Pickled weights are converted first. Quantised weights that a merge can read are scored from a
    bfloat16 copy; transformers loads all others.

    Args:
        model: a repo, repo@revision or folder.
        asked: tasks, the user's task files and the limit.
        execution: device, and whether benchmarks may run code.
        progress: True: shown on stderr; False: nothing; or what shows it.

    Raises:
        LewisHubError: the model or a task cannot be used.

    Example:
        >>> tasks = str(lewis_hub.zoo_folder() / "tasks")
        >>> asked = lewis_hub.Evaluation(tasks=("zoo_reverse",), include=tasks, limit=5)
        >>> scores = lewis_hub.evaluate_model("zoo/expert-reverse", asked)
        >>> scores.tasks["zoo_reverse"].n
        5
    """
    execution, progress = execution or Execution(), shown(progress)
    execution.require_usable()
    api = hub_api()
    how = settings_of(asked, execution.device)
    source = resolve_one(model, api, progress, allow_pickle=execution.allow_pickle)
    selected = examine.task_selection(asked, _in_working_folder, allow_code=execution.allow_code)
    library_of(selected).require_tasks(selected)
    tasks = ScoredTasks(selected, are_scored_now=True, api=api, progress=progress)
    if how.backend == "local-completions":  # the server has the weights
        with TemporaryDirectory() as kept:
            candidate = Candidate(source.pinned, source.commit_sha, fetch.small_files(api, source))
            results = score([candidate], tasks.loaded, asked.limit, how, Path(kept), progress)
            require_unchanged(source)
            return compare(results)
    has_modules = source.file(MODULES) is not None
    config = open_model(api, source).config
    require_scorable(source.name, config, how.backend, has_modules=has_modules)
    require_tokenizer_files(source.pinned, (file.path for file in source.files), config)
    if how.backend == "mteb":
        require_embedder(of_source(api, source))
    whole = source
    if source.is_pickled:
        whole = fetch.convert_pickles([source], (), api, progress)[source]
    files = fetch_whole(api, [whole], progress)
    with TemporaryDirectory() as scratch:
        folder = files.folders[whole.pinned]
        opened = open_model(api, whole)
        if opened.checkpoint.is_computed and not opened.problem:
            means = execution.means(is_read_next=True)
            size, loading = execution.max_shard_bytes, execution.loading
            loader = fetch.ModelLoader(files, Path(scratch), loading, means, size, progress)
            folder = loader.materialize_checkpoint(opened)
        candidate = Candidate(source.pinned, source.commit_sha, folder)
        results = score([candidate], tasks.loaded, asked.limit, how, Path(scratch), progress)
        require_unchanged(source)
        return compare(results)


def _in_working_folder(name: str) -> str:
    """Return the path of a file in the working folder, or the name if there is no such file."""
    path = path_of(name)
    return str(path.resolve()) if path.exists() else name


def extract_lora(
    model: ModelReference | Path | str,
    base: ModelReference | Path | str,
    output: Path | str,
    settings: LoraSettings | None = None,
    progress: Shown = BY_DEFAULT,
) -> Extracted:
    """Write a LoRA adapter in PEFT's format; the folder appears whole or not at all.

    Args:
        model: the fine-tuned model: a repo, repo@revision or folder.
        base: the model that it was fine-tuned from.
        output: folder to make.
        settings: rank or error, and which modules are stored how; None: rank 32.
        progress: True: shown on stderr; False: nothing; or what shows it.

    Raises:
        LewisHubError: a model cannot be used, or the two do not fit together or are equal.

    Example:
        >>> expert, base = "zoo/expert-reverse", "zoo/base"
        >>> settings = lewis_hub.LoraSettings(rank=4)
        >>> adapter = lewis_hub.extract_lora(expert, base, tmp_path / "adapter", settings)
        >>> {fit.rank for fit in adapter.fits.values()}
        {4}
    """
    from lewis_hub.merge.adapted_model import adapted_model
    from lewis_hub.merge.quantised import ScaledReader
    from lewis_hub.merge.task_vectors import extract

    output, progress, api = Path(output), shown(progress), hub_api()
    settings = settings or LoraSettings()
    sources = [resolve_one(base, api, progress), resolve_one(model, api, progress)]
    opened_base = open_model(api, sources[0], "base")
    opened = with_common_names(MergeSources(opened_base, (open_model(api, sources[1]),)))
    opened = heads.without_copies(opened)
    headers = _fitting(opened)
    heads.require_copies(api, opened.models, heads.FIRST_BYTES)
    is_tied = has_tied_head(opened_base.config, headers[0])
    if settings.embeddings == "low-rank" and (is_tied or ties(opened_base.config)):
        raise ExtractionError((f"{sources[0].pinned}{TIED}",))
    with open_workspace(output, replace=None) as work, ExitStack() as stack:
        folders = fetch.download(api, sources, progress)
        heads.require_copies(api, opened.models)
        readers = [
            ScaledReader(stack.enter_context(TensorReader(folders[source.pinned], source.pinned)))
            for source in sources
        ]
        tensors = headers[0].tensors.values()
        n_elements = sum(t.n_elements for t in tensors if t.dtype in MERGEABLE)
        folder = folders[sources[0].pinned]
        adapted = adapted_model(folder, opened_base.config, headers[0], has_tied_head=is_tied)
        named = map(adapted.renamed, headers)
        pairs = list(zip(named, readers, strict=True))
        with progress.stage("Extracting", n_elements, "items") as advance:
            found = extract(pairs[0], pairs[1], settings, work.folder, advance, adapted)
        for source in sources:
            require_unchanged(source)
        facts = model_facts(api, sources[1])
        identifier = facts.licence.identifier if facts.licence else None
        task = usage_of(folders[opened_base.pinned], opened_base.config, [facts]).task
        card = adapter_card(sources[0], sources[1], task, identifier, found)
        (work.folder / CARD).write_text(card, encoding="utf-8", newline="\n")
        work.finish((CARD, *found.files))
    return found


def _fitting(sources: MergeSources) -> list[Checkpoint]:
    """Return the headers of base and expert, which must fit each other."""
    if refused := [model.problem for model in sources.models if model.problem]:
        raise ExtractionError(tuple(refused))
    headers = [one.checkpoint for one in sources.models]
    if misfits := compare_checkpoints(headers[0], headers[1:]):
        remedy = "Name the base that it was fine-tuned from."
        raise ExtractionError(tuple(f"{m.source} {m.problem}. {remedy}" for m in misfits))
    return headers


def read_profile(name: Path | str) -> ImportanceProfile:
    """Read the importance of modules that `calibrate`, `measure_model` or a merge wrote.

    Args:
        name: an `importance.json`, a folder with one, or the repo of a merge.

    Raises:
        SourceError: there is no `importance.json`, or `name` cannot be a name.
        ProfileError: the file cannot be read.

    Example:
        >>> texts = lewis_hub.Calibration(dataset="zoo/reverse", text="{question}", samples=4)
        >>> measured = lewis_hub.measure_model("zoo/base", texts, tmp_path)
        >>> lewis_hub.read_profile(tmp_path) == measured
        True
    """
    name = str(name)
    path = path_of(name)
    if path.is_file():
        return ImportanceProfile.from_json(_text_in(path), name)
    if path.is_dir():
        found = next((path / p for p in (PROFILE, IN_A_MERGE) if (path / p).is_file()), None)
        if found:
            require_inside(path, found, SourceError)
            return ImportanceProfile.from_json(_text_in(found), str(found))
        raise _without(name)
    api, reference = hub_api(), model_reference(name)
    source = resolve_model(api, reference.name, reference.revision)
    content = read_small(api, source, IN_A_MERGE)
    if content is None:
        raise _without(source.pinned)
    where = f"{source.pinned}: {IN_A_MERGE}"
    return ImportanceProfile.from_json(content.decode("utf-8", errors="replace"), where)


def _text_in(file: Path) -> str:
    """The text of a file, which is not JSON any more if it is beyond the limit."""
    with file.open("rb") as opened:
        return opened.read(MAX_TABLE_BYTES + 1).decode("utf-8", errors="replace")


def _without(name: str) -> SourceError:
    remedy = f"Name an {PROFILE}, a merge with a guide that measures, or run "
    remedy += "`lewis-hub importance MODEL --task TASK` first."
    return SourceError(name, f"it has no {PROFILE}", remedy)


def measure_model(
    model: ModelReference | Path | str,
    calibration: Calibration,
    output: Path | str,
    execution: Execution | None = None,
    progress: Shown = BY_DEFAULT,
    *,
    seed: int = 42,
) -> ImportanceProfile:
    """Measure the importance of one model's modules, without a recipe.

    Args:
        model: a repo, repo@revision or folder.
        calibration: its relative paths are looked up in the working folder.
        output: folder for `importance.json` and its plot; a measurement of the same model and
            texts that is in it is reused.
        execution: device, and whether tasks may run code; None: the CPU.
        progress: True: shown on stderr; False: nothing; or what shows it.
        seed: draws the texts.

    Raises:
        LewisHubError: the model or the data cannot be used, or another run measures there.

    Example:
        >>> texts = lewis_hub.Calibration(dataset="zoo/reverse", text="{question}", samples=4)
        >>> folder = tmp_path / "importance"
        >>> profile = lewis_hub.measure_model("zoo/expert-reverse", texts, folder)
        >>> round(profile.sources[0].modules["model.layers.0.self_attn.q_proj"], 1)
        11.9
    """
    from lewis_hub.calibration.measure import calibrate  # torch: only here

    output, execution, progress = Path(output), execution or Execution(), shown(progress)
    execution.require_usable()
    if calibration.is_written:
        problem = "an expert writes its texts for a merge, and this is a model alone"
        remedy = "Give texts with answers, or name the recipe of the merge."
        raise CalibrationError(f"calibration on {calibration.data}", problem, remedy)
    require_no_links_among(output)
    require_writable(output)
    api = hub_api()
    source = resolve_one(model, api, progress)
    data = resolve_data([calibration], api, _in_working_folder)
    texts = TextSettings(source, seed, execution.allow_code, data, (calibration,))
    drawn = draw(texts, calibration, api, progress)
    tokens = drawn.tokens.measured(GUIDE)
    measurement = Measurement(guides.find(GUIDE), None, (calibration,))
    opened, n_tokens = open_model(api, source), tokens.tokens.n_tokens
    _require_fits(measurement, opened, n_tokens, output, execution.loading)
    folder = fetch.download(api, [source], progress)[source.pinned]
    subject = Subject(source.pinned, source.commit_sha, "expert", folder, (tokens,))
    checkpoint = local_checkpoint(source.pinned, folder)
    subject = fetch.choose_loading(subject, checkpoint, execution.loading, output)
    output.mkdir(parents=True, exist_ok=True)
    file = output / PROFILE
    document = calibration.model_dump(mode="json", exclude_none=True)
    with alone_at(output / LOCK, output):
        before = known_profile(file)
        known = ImportanceProfile(GUIDE, document, before.sources if before else ())
        n_tokens = sum(one.n_tokens for one in missing([subject], known))
        with unchanged([source]), progress.stage("Calibrating", n_tokens, "tokens") as advance:
            profile = calibrate([subject], known, execution.device, advance, lambda _: None)
        write_whole(file, profile.to_json())
        draw_maps(profile, None, output)
    return profile


def _require_fits(
    measurement: Measurement, model: OpenedSource, n_tokens: int, output: Path, loading: Loading
) -> None:
    """Refuse, before weights are downloaded, a model that does not fit into memory or disk."""
    checkpoint = model.checkpoint
    if not loading.has_room_for_blocks(checkpoint):
        n_bytes = resources.blocks_bytes(checkpoint)
        problem = f"block by block it takes {n_bytes:,} bytes in memory, {resources.EVEN_SO}"
        raise CalibrationModelError(model.name, problem, resources.ALLOW)
    drawn = dict.fromkeys(measurement.calibrations, n_tokens)
    if n_bytes := measurement.waiting_bytes(drawn, [checkpoint], loading):
        require_room(output, n_bytes, STATES, FEWER)


def diff_merges(before: Path | str, after: Path | str) -> tuple[str, ...]:
    """Describe the differences between two merges or recipes, a sentence each.

    A recipe is compared with a merge as the merge that it would make now, so a source that has a
    new commit is a difference. Two recipes are compared by their settings alone.

    Args:
        before: a recipe file (.yaml), or a folder, repo or repo@revision that a merge made.
        after: likewise.

    Raises:
        LewisHubError: a recipe or merge cannot be found or read.

    Example:
        >>> recipe = lewis_hub.zoo_folder() / "recipe.yaml"
        >>> again = tmp_path / "again.yaml"
        >>> _ = again.write_text(recipe.read_text().replace("seed: 42", "seed: 7"))
        >>> lewis_hub.diff_merges(recipe, again)
        ('seed: 42 → 7',)
    """
    api = hub_api()
    old, new = _recipe_or_lock(before, api), _recipe_or_lock(after, api)
    if isinstance(old, Recipe):
        if isinstance(new, Recipe):
            return tuple(recipe_differences(_told(old), _told(new)))
        old = _planned(old, new, api)
    elif isinstance(new, Recipe):
        new = _planned(new, old, api)
    return differences(old, new)


def _recipe_or_lock(name: Path | str, api: HfApi) -> Recipe | Lock:
    if Path(name).suffix in RECIPES:
        return resolve.read_recipe(name)
    return verify.read_lock(resolve_one(name, api), api)


def _told(recipe: Recipe) -> dict[str, object]:
    return recipe.model_dump(mode="json", by_alias=True, exclude_none=True)


def _planned(recipe: Recipe, like: Lock, api: HfApi) -> Lock:
    inputs = resolve_inputs(recipe, api, allow_pickle=True)
    return job.planned_lock(recipe, inputs, like.max_shard_bytes, snapshot(recipe, inputs))
