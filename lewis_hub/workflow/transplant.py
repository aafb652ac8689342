"""Give a model the tokenizer of another one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from huggingface_hub import HfApi

from lewis_hub.calibration.grams import write_tensors
from lewis_hub.checkpoint.header import TensorHeader, torch_dtypes
from lewis_hub.checkpoint.ranges import Locations, SourceFiles, SourceTensor
from lewis_hub.checkpoint.reader import Reader, local_header, read_tensor
from lewis_hub.display import Progress, to_html
from lewis_hub.documents import read_json
from lewis_hub.errors import MERGE, NonFiniteError, PublishError
from lewis_hub.files import sha256_of, write_whole
from lewis_hub.hub.changes import local_states
from lewis_hub.hub.facts import combined_licence, model_facts
from lewis_hub.hub.fetch import bytes_to_download
from lewis_hub.merge.plan import Fitted, with_statistics
from lewis_hub.merge.runners import Backend, Ray, Runner, threads
from lewis_hub.merge.transplant import (
    MeanRows,
    RowOrigins,
    TransplantSettings,
    WeightedRows,
    new_table,
)
from lewis_hub.merge.workspace import open_workspace
from lewis_hub.progress import BY_DEFAULT, Shown, shown
from lewis_hub.recipe.reference import ModelReference
from lewis_hub.report import lock as locks
from lewis_hub.report.card import transplant_card
from lewis_hub.report.facts import TransplantFacts
from lewis_hub.report.lock import Lock
from lewis_hub.report.usage import usage_of
from lewis_hub.workflow import fetch
from lewis_hub.workflow.evaluate import CARD
from lewis_hub.workflow.merge import finish_model, write_weights
from lewis_hub.workflow.open import open_model
from lewis_hub.workflow.publish import complete_in
from lewis_hub.workflow.report import has_chat_template, locked_outputs
from lewis_hub.workflow.resolve import hub_api, resolve_one
from lewis_hub.workflow.resources import Execution
from lewis_hub.workflow.transplant_job import TransplantJob, compile_transplant

if TYPE_CHECKING:
    from torch import Tensor

LABEL = "new rows of the embeddings"
MANY = 4  # shared tokens for each token of a combination, below which a note is shown
BROKEN = "That model is broken: use another revision of it."
TOO_LARGE = "New rows do not fit into its dtype: choose another --method or a smaller --k."


@dataclass(frozen=True)
class Transplanted:
    """A model with the tokenizer of another one."""

    status: Literal["transplanted", "unchanged"]
    output: Path  # its folder
    settings: TransplantSettings
    origins: RowOrigins  # of the rows of its embeddings
    # the donor's matrix -> relative error of the combinations of `omp` there, on average; empty if
    # nothing was made
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def lines(self) -> tuple[str, ...]:
        """What was made, and where it is."""
        origins, n_near = self.origins, len(self.origins.approximated)
        counts = f"{origins.n_tokens:,} tokens: {origins.n_copied:,} copied, {n_near:,} "
        counts += f"approximated by {self.settings.method}, {origins.n_means:,} with the mean row"
        errors = (f"relative error {error:.2%} in {name}" for name, error in self.errors.items())
        done = "Wrote" if self.status == "transplanted" else "Nothing changed: this model is in"
        return (counts, *errors, f"{done} {self.output}")

    def __repr__(self) -> str:
        return "\n".join(self.lines)

    def _repr_html_(self) -> str:
        return to_html(*self.lines)


def transplant_tokenizer(
    model: ModelReference | Path | str,
    donor: ModelReference | Path | str,
    output: Path | str,
    settings: TransplantSettings | None = None,
    execution: Execution | None = None,
    progress: Shown = BY_DEFAULT,
) -> Transplanted:
    """Give a model the tokenizer of another one, without training.

    Rows of tokens that both have are copied; the others are combinations of the model's own rows.
    All other weights are copied. The folder appears whole or not at all.

    Args:
        model: a repo, repo@revision or folder.
        donor: the model with the wanted tokenizer. Only its embeddings are read, for `omp`.
        output: folder to make; an equal model in it is kept.
        settings: how new rows are made; None: `omp` with at most 64 tokens in a combination.
        execution: runner, maximum size of a file, and whether a folder may be replaced.
        progress: True: shown on stderr; False: nothing; or what shows it.

    Raises:
        LewisHubError: a model cannot be used, or the two have no token in common.

    Example:
        >>> made = lewis_hub.transplant_tokenizer("zoo/base", "zoo/expert-cipher", tmp_path / "new")
        >>> made.origins.n_copied
        390
    """
    output, progress, api = Path(output), shown(progress), hub_api()
    settings, execution = settings or TransplantSettings(), execution or Execution()
    execution.require_usable()
    opened = [open_model(api, resolve_one(one, api, progress)) for one in (model, donor)]
    job = compile_transplant(opened[0], opened[1], settings, execution.max_shard_bytes, api)
    found = None if execution.replace else complete_in(output)
    if found and found.digest == job.planned.digest:
        return Transplanted("unchanged", output, settings, job.origins)
    runner = execution.means(is_read_next=False).runner
    began = datetime.now(UTC)
    with open_workspace(output, replace=execution.replace) as work:
        n_made = job.plan.n_bytes + sum(table.n_bytes for table in (*job.changed, *job.matrices))
        fetch.require_disk(work.folder, bytes_to_download(opened[0].source), n_made)
        files = _fetch(job, api, progress)
        work.resume(local_states(files.sources.values()))
        made = _make_tables(job, files.locations, work.scratch, _threads(runner), progress)
        planned = with_statistics(job.plan, made.fitted)
        locations = {**files.locations, LABEL: made.folder}
        shards = write_weights(
            planned, locations, work.folder, Backend(runner), progress, "Writing the model"
        )
        written = finish_model(planned, shards, job.sidecars, files.sources, work.folder)
        outputs = locked_outputs(work.folder, shards, written.sidecars)
        lock = replace(job.planned, outputs=outputs)
        beside = {locks.FILE: lock.to_json()}
        beside[locks.PROVENANCE_FILE] = locks.provenance(lock, began, datetime.now(UTC))
        beside[CARD] = _card(job, work.folder, made.errors, lock, api)
        (work.folder / "lewis").mkdir(exist_ok=True)
        for name, text in beside.items():
            write_whole(work.folder / name, text)
        work.finish((*lock.outputs, *beside))
    return Transplanted("transplanted", output, settings, job.origins, made.errors)


def _fetch(job: TransplantJob, api: HfApi, progress: Progress) -> fetch.FetchedSources:
    """Download the model; of the donor only small files, its embeddings are read by ranges."""
    model, donor = job.model.opened.source, job.donor.opened.source
    ranges = fetch.open_ranges(api, [donor])
    whole = fetch.fetch_whole(api, [model], progress)
    return replace(
        whole,
        sources={**ranges.sources, **whole.sources},
        locations={**ranges.locations, **whole.locations},
    )


def _threads(runner: Runner | Ray) -> Runner:
    """Return the threads that compute rows; a cluster only writes files."""
    return threads() if isinstance(runner, Ray) else runner


@dataclass(frozen=True)
class _MadeTables:
    fitted: Fitted
    folder: Path
    errors: Mapping[str, float]  # as in `Transplanted`


def _make_tables(
    job: TransplantJob, locations: Locations, scratch: Path, runner: Runner, progress: Progress
) -> _MadeTables:
    """Write the model's tables with new rows, each into a file of its own."""
    folder = scratch / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    label = job.model.opened.pinned
    combined, errors = _combinations(job, locations, scratch, runner, progress)
    by_pieces = MeanRows.of(job.pieces) if job.settings.method == "subtoken" else None
    tokens = sorted(job.model.spelled.texts)
    headers: dict[str, TensorHeader] = {}
    digest = hashlib.sha256()
    with SourceFiles(locations, [], scratch / "ranges", 1) as files:
        for number, table in enumerate(job.changed):
            rows = combined.get(job.like(table).name) or by_pieces or MeanRows([])
            stored = _read(files.reader(label), table, label)
            new = new_table(stored, job.origins, rows, tokens).to(torch_dtypes()[table.dtype])
            if not new.isfinite().all():
                raise NonFiniteError(table.name, MERGE, TOO_LARGE)
            file = folder / f"{number}.safetensors"
            write_tensors({table.name: new}, file)
            headers |= {header.name: header for header in local_header(LABEL, file)}
            digest.update(sha256_of(file).encode())
    return _MadeTables(Fitted(LABEL, f"sha256:{digest.hexdigest()}", headers), folder, errors)


def _combinations(
    job: TransplantJob, locations: Locations, scratch: Path, runner: Runner, progress: Progress
) -> tuple[dict[str, WeightedRows], dict[str, float]]:
    """Approximate tokens in each of the donor's matrices; return rows and errors by its name."""
    import torch

    from lewis_hub.merge.matching_pursuit import pursue

    label, matrices, wanted = job.donor.opened.pinned, job.matrices, job.origins.approximated
    if not matrices:
        return {}, {}
    found, errors = dict[str, WeightedRows](), dict[str, float]()
    if job.settings.k > len(job.shared) / MANY:
        progress.say(
            f"Only {len(job.shared)} tokens are shared: combinations of up to {job.settings.k} of "
            "them may fit the donor by chance. Compare with a smaller --k."
        )
    theirs, ours = torch.tensor(job.shared).T
    steps = [[SourceTensor(label, matrix)] for matrix in matrices]
    total, longest = len(matrices) * len(wanted), max(matrix.n_bytes for matrix in matrices)
    with (
        SourceFiles(locations, steps, scratch / "ranges", longest) as files,
        progress.stage("Approximating tokens", total, "tokens") as advance,
    ):
        for matrix in matrices:
            rows = _read(files.reader(label), matrix, label)
            files.step_done()
            targets, atoms = rows[torch.tensor(wanted)], rows[theirs]
            del rows
            near = pursue(targets, atoms, job.settings.k, runner, advance)
            found[matrix.name] = WeightedRows(ours[near.indices], near.coefficients)
            errors[matrix.name] = float(near.errors.double().mean())
    return found, errors


def _read(reader: Reader, table: TensorHeader, label: str) -> Tensor:
    values = read_tensor(reader, table)
    if not values.isfinite().all():
        raise NonFiniteError(table.name, label, BROKEN)
    return values


def _card(
    job: TransplantJob, folder: Path, errors: Mapping[str, float], lock: Lock, api: HfApi
) -> str:
    model, donor = job.model.opened, job.donor.opened
    config = read_json((folder / "config.json").read_bytes())
    facts = {one.pinned: model_facts(api, one.source) for one in (model, donor)}
    try:
        licence = combined_licence(list(facts.values()), None)
    except PublishError:  # they differ
        licence = None
    return transplant_card(
        TransplantFacts(
            model=model.source,
            donor=donor.source,
            models=facts,
            licence=licence,
            settings=job.settings,
            origins=job.origins,
            errors=errors,
            usage=usage_of(folder, config, [facts[model.pinned]]),
            chat=has_chat_template(folder),
            digest=lock.digest,
        )
    )
