"""Gather second moments of each expert's inputs, or fit matrices in sequence with them."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from lewis_hub.calibration.grams import GramFiles, GramRequest, read_grams, write_tensors
from lewis_hub.calibration.subject import Subject, Weights, in_folder
from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import TensorHeader, torch_dtypes
from lewis_hub.checkpoint.ranges import Locations, SourceFiles
from lewis_hub.checkpoint.reader import Checkpoint, local_header
from lewis_hub.errors import MERGE
from lewis_hub.files import sha256_of, write_whole
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.merge.aligned import AlignedModel
from lewis_hub.merge.engine import MakeTensor, per_tensor
from lewis_hub.merge.plan import (
    Fitted,
    Gram,
    MergePlan,
    Moments,
    ShardPlan,
    Statistics,
    lacking_statistics,
    with_statistics,
)
from lewis_hub.merge.sidecars import SidecarSettings
from lewis_hub.report.facts import Measured
from lewis_hub.workflow import token_shares
from lewis_hub.workflow.fetch import ModelLoader, small_files
from lewis_hub.workflow.merge import Folders, PlanSettings, report_nan
from lewis_hub.workflow.open import MergeSources, OpenedSource
from lewis_hub.workflow.resources import MomentSettings
from lewis_hub.workflow.texts import Sets, remap_token_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lewis_hub.calibration.affine import AffineOptions
    from lewis_hub.calibration.sequential import LayerMoments

VERSION = 6  # of the arithmetic of fitting in sequence
FOLDER = "fitted"  # in the scratch folder
INDEX = "fitted.json"
TABLES = "embeddings.safetensors"  # those that are fitted
LABEL = "matrices fitted in sequence"
REMEDY = "Set `inputs: own` in the recipe's `parameters`: then each matrix is fitted by itself."
N_SHOWN = 3  # tensors that a note lists
OUTPUT_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")  # of what an MLP adds


@dataclass(frozen=True)
class StatisticsSettings:
    """The settings for gathering second moments and fitting matrices with them."""

    method: str  # merge method, for messages
    moments: MomentSettings
    sources: MergeSources
    reader: OpenedSource  # source in whose token ids the merged model reads the texts
    plan: PlanSettings
    sidecars: SidecarSettings  # they hold the configuration of the merged model
    digest: str  # digest of the planned lock


@dataclass(frozen=True)
class Gathered:
    """The second moments of each expert, in the recipe's order, or the fitted matrices."""

    statistics: Sequence[Statistics] | Fitted = ()
    folders: Folders = field(default_factory=dict)  # label -> folder of the statistics
    measured: tuple[Measured, ...] = ()  # the sources and the data they were gathered on
    notes: tuple[str, ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()  # of the data that each expert was measured on
    generated: tuple[str, ...] = ()  # lines of texts that the experts wrote
    aligned: tuple[AlignedModel, ...] = ()  # models matched with another


def gather(
    settings: StatisticsSettings,
    sets: Sets,
    loader: ModelLoader,
    schedule: DensitySchedule | None,
    store: Path,
) -> Gathered:
    """Run each expert's calibration texts through it; results of an earlier run are used again.

    `schedule` is that of a guide, for matrices that are fitted in sequence. Statistics that do not
    depend on it are in the folder `store`.
    """
    if settings.moments.in_sequence:
        return _fit_in_sequence(settings, sets, loader, schedule)
    from lewis_hub.calibration.measure import gather_grams  # torch: only here
    from lewis_hub.calibration.model import run_refusals

    subjects = _subjects(settings, sets, loader)
    asked = wanted(settings, sets, loader, store)
    found = [read_grams(one) for one in asked]
    placed = [  # before the stage begins, because writing out is a stage of its own
        subject if files else loader.load_for_calibration(subject, expert)
        for subject, files, expert in zip(subjects, found, settings.sources.experts, strict=True)
    ]
    n_tokens = sum(s.n_tokens for s, files in zip(placed, found, strict=True) if not files)
    with loader.progress.stage("Gathering statistics", n_tokens, "tokens") as advance:
        for index, (subject, one) in enumerate(zip(placed, asked, strict=True)):
            if found[index] is None:
                with run_refusals(subject.source, f"method `{settings.method}`"):
                    found[index] = gather_grams(subject, one, loader.loading.device, advance)
    tensors, unmeasured = settings.sources.donor.checkpoint.tensors, settings.plan.plan(None)
    known = tuple(
        _statistics(tensors, subject.source, one.folder, files)
        for subject, one, files in zip(subjects, asked, found, strict=True)
        if files
    )
    if wanted_tables := _tables(settings, unmeasured, loader):
        tokens = token_shares.merged_tokens(sets, settings.reader, settings.sources)
        places = [one.folder for one in asked]
        known = token_shares.with_tables(known, wanted_tables, tokens, places)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    lacking = lacking_statistics(with_statistics(unmeasured, known), _matrices(shapes))
    solved = settings.moments.are_solved
    then = "average their task vectors" if solved else "trim them by magnitude"
    notes = _lacking_note(lacking, then, loader)
    folders = {own.label: one.folder for own, one in zip(known, asked, strict=True)}
    return Gathered(known, folders, _measured(subjects), notes)


def wanted(
    settings: StatisticsSettings, sets: Sets, loader: ModelLoader, store: Path
) -> tuple[GramRequest, ...]:
    """Return what `gather` expects in a folder, by expert; a guide's pass can write it there."""
    if settings.moments.in_sequence:
        return ()
    widest = settings.moments.widest
    facts = [subject.gram_facts(widest) for subject in _subjects(settings, sets, loader)]
    places = [store / "statistics" / _short_digest(one) for one in facts]
    return tuple(GramRequest(place, widest, one) for place, one in zip(places, facts, strict=True))


def _subjects(settings: StatisticsSettings, sets: Sets, loader: ModelLoader) -> tuple[Subject, ...]:
    """Return each expert with its texts in its own token ids."""
    return tuple(
        loader.subject(expert, remap_token_ids(own, expert, settings.sources.donor.name))
        for expert, own in zip(settings.sources.experts, sets, strict=True)
    )


def _measured(subjects: Sequence[Subject]) -> tuple[Measured, ...]:
    return tuple(Measured(subject.source, subject.sets[0].facts) for subject in subjects)


def _tables(
    settings: StatisticsSettings, planned: MergePlan, loader: ModelLoader
) -> dict[str, int]:
    """Return the token embeddings that are to be fitted, with their numbers of rows."""
    found = token_shares.tables(planned, settings.sources)
    if not found and token_shares.asks_for_tables(planned):
        loader.progress.say(token_shares.NO_TABLE)
    return found


def _statistics(
    tensors: Mapping[str, TensorHeader], source: str, folder: Path, files: GramFiles
) -> Statistics:
    """Return the statistics by the names of the checkpoint's tensors."""
    label = f"statistics of {source}"
    headers: dict[str, TensorHeader] = {
        f"{file}/{tensor.name}": tensor
        for file in files.files
        for tensor in local_header(label, folder / file)
    }
    grams: dict[str, Gram] = {}
    known = names.TensorNames(tensors)
    for module, gram in files.modules.items():
        named = known.find(f"{module}.weight") or known.find(module)
        if len(named) == 1:
            grams[named[0]] = Gram(headers[f"{gram.file}/{gram.tensor}"], gram.transposed)
    return Statistics(label, files.digest, grams)


def _matrices(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the tensors that are matrices of a block, or stacks of them."""
    return [
        name
        for name, shape in shapes.items()
        if names.block(name) is not None
        and (len(shape) == 3 or (name.endswith(".weight") and len(shape) >= 2))
    ]


def _lacking_note(lacking: Sequence[str], then: str, loader: ModelLoader) -> tuple[str, ...]:
    """Return a note on matrices without statistics, if there are any; `then`: what is done."""
    if not lacking:
        return ()
    shown = ", ".join(lacking[:N_SHOWN]) + (", ..." if len(lacking) > N_SHOWN else "")
    note = (
        f"{len(lacking)} weight matrices of the blocks have no statistics ({shown}), because no "
        f"token reached them or because their stored form differs. The merge will {then}."
    )
    loader.progress.say(note)
    return (note,)


def require_by_block(settings: StatisticsSettings | None, api: HfApi) -> None:
    """Refuse an architecture that cannot be fitted in sequence, before weights are downloaded.

    Raises:
        NotByBlockError: its blocks share weights, or an expert lacks matrices of its blocks.
    """
    if settings is None or not settings.moments.in_sequence:
        return
    from lewis_hub.calibration.meta_model import build_stacks
    from lewis_hub.calibration.sequential import require_beside

    donor = settings.sources.donor

    def parts(_: Sequence[Sequence[TensorHeader]]) -> Generator[dict[str, Tensor], None, None]:
        yield from ()

    folder = small_files(api, donor.source)
    made = build_stacks(Weights(folder, donor.checkpoint, parts, REMEDY), "cpu")
    require_beside(made, (expert.checkpoint for expert in settings.sources.experts))


def uncompensated_notes(moments: MomentSettings | None, donor: OpenedSource) -> list[str]:
    """Return a note if blocks that are fitted in sequence norm what their last matrix gives."""
    found = {one for one in OUTPUT_NORMS for name in donor.checkpoint.tensors if f".{one}." in name}
    if moments is None or not moments.in_sequence or moments.in_expert_blocks or not found:
        return []
    return [
        f"the blocks of {donor.name} norm what their last matrix gives (`{min(found)}`), so it is "
        "fitted like the others: `compensate` has no effect."
    ]


def _fit_in_sequence(
    settings: StatisticsSettings, sets: Sets, loader: ModelLoader, schedule: DensitySchedule | None
) -> Gathered:
    """Fit all matrices of the blocks; matrices of an earlier run are used again."""
    whole = replace(settings.plan, max_shard_bytes=sys.maxsize)
    [planned] = whole.plan(schedule).shards
    subjects = _subjects(settings, sets, loader)
    folder = _folder_of_merge(loader.scratch / FOLDER, settings.digest)
    facts = {
        "version": VERSION,
        "plan": planned.digest,
        "calibration": [{**subject.sets[0].facts} for subject in subjects],
        "widest": settings.moments.widest,
    }
    place = folder / _short_digest(facts)
    place.mkdir(parents=True, exist_ok=True)
    if not (place / INDEX).exists():
        if not loader.files.keeps_models:  # all models together fetch two shards ahead
            shared_bytes = 2 * loader.max_shard_bytes // (1 + len(subjects))
            loader = replace(loader, max_shard_bytes=shared_bytes)
        placed = [
            loader.load_for_calibration(subject, expert)
            for subject, expert in zip(subjects, settings.sources.experts, strict=True)
        ]
        files = _fit(settings, sets, placed, planned, loader, place)
        write_whole(place / INDEX, json.dumps({file.name: sha256_of(file) for file in files}))
    digests: dict[str, str] = json.loads((place / INDEX).read_text(encoding="utf-8"))
    tensors = {t.name: t for file in digests for t in local_header(LABEL, place / file)}
    digest = "sha256:" + hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    asked = _matrices({t.output.name: t.output.shape for t in planned.tensors})
    lacking = [name for name in asked if name not in tensors]
    notes = _lacking_note(lacking, "average their task vectors", loader)
    fitted = Fitted(LABEL, digest, tensors)
    return Gathered(fitted, {LABEL: place}, _measured(subjects), notes)


def _folder_of_merge(folder: Path, digest: str) -> Path:
    """Return the folder of a merge and its twin, without the large files of interrupted merges."""
    place = folder / _short_digest(digest)
    for other in folder.glob("*"):
        if other != place:
            shutil.rmtree(other)
    return place


def _short_digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _fit(
    settings: StatisticsSettings,
    sets: Sets,
    subjects: Sequence[Subject],
    planned: ShardPlan,
    loader: ModelLoader,
    place: Path,
) -> list[Path]:
    from lewis_hub.calibration.model import run_refusals
    from lewis_hub.calibration.sequential import ExpertTexts
    from lewis_hub.calibration.sequential import fit as fit_blocks

    locations, most_bytes = loader.files.locations, loader.max_shard_bytes
    in_merged_ids = token_shares.merged_tokens(sets, settings.reader, settings.sources)
    wanted_tables = _tables(settings, MergePlan((planned,)), loader)
    tables = token_shares.moments(wanted_tables, in_merged_ids)
    merged = _MergedBlocks(planned, locations, place / "ranges", most_bytes, tables)
    texts = [
        ExpertTexts(
            replace(subject.weights or in_folder(subject.source, subject.folder), remedy=REMEDY),
            subject.sets[0].tokens,
            tokens,
        )
        for subject, tokens in zip(subjects, in_merged_ids, strict=True)
    ]
    configuration = place / "configuration"
    configuration.mkdir(exist_ok=True)
    settings.sidecars.write(loader.files.sources, configuration)
    weights = Weights(configuration, merged.checkpoint, merged.parts, REMEDY)
    widest, device = settings.moments.widest, loader.loading.device
    n_tokens = sum(one.merged.n_tokens for one in texts)
    asked = f"method `{settings.method}`"
    with (
        loader.progress.stage("Fitting block by block", n_tokens, "tokens") as advance,
        run_refusals(settings.sources.donor.pinned, asked),
    ):
        affine_of = merged.affine_options if merged.fits_affine else None
        files = fit_blocks(
            *(weights, texts, merged.solve, place, widest, device, advance, affine_of),
            inputs="merged_block" if settings.moments.in_expert_blocks else "merged",
        )
    report_nan([Counter(label for label, _ in merged.replaced_nan)], loader.progress)
    if merged.fitted_tables:
        write_tensors(merged.fitted_tables, place / TABLES)
        files.append(place / TABLES)
    return files


class _MergedBlocks:
    """The blocks of a merge, made one by one while their tensors are fitted."""

    _make: MakeTensor  # set by `parts`

    def __init__(
        self,
        planned: ShardPlan,
        locations: Locations,
        scratch: Path,
        most_bytes: int,
        tables: Mapping[str, Moments],  # of token embeddings that are fitted
    ) -> None:
        self._planned, self._locations, self._scratch = planned, locations, scratch
        self._tables = tables
        self.fitted_tables: dict[str, Tensor] = {}
        self._tensors = {tensor.output.name: tensor for tensor in planned.tensors}
        self._most_bytes = most_bytes
        self.replaced_nan: set[tuple[str, str]] = set()  # (source, fitted tensor)

    @property
    def checkpoint(self) -> Checkpoint:
        """Its headers; no file holds its tensors."""
        outputs = [tensor.output for tensor in self._planned.tensors]
        headers = (TensorHeader(o.name, o.dtype, o.shape, "", 0, o.n_bytes) for o in outputs)
        return Checkpoint(MERGE, {header.name: header for header in headers})

    def parts(
        self, lists: Sequence[Sequence[TensorHeader]]
    ) -> Generator[dict[str, Tensor], None, None]:
        """Make the tensors of each list, without statistics but for tables of embeddings."""
        outputs = [tensor.output.name for tensor in self._planned.tensors]
        reads = dict(zip(outputs, self._planned.reads, strict=True))
        steps = [[read for tensor in tensors for read in reads[tensor.name]] for tensors in lists]
        with (
            SourceFiles(self._locations, steps, self._scratch, self._most_bytes) as files,
            per_tensor(self._planned, files.reader, self.replaced_nan) as self._make,
        ):
            for tensors in lists:
                yield {tensor.name: self._made(tensor.name) for tensor in tensors}
                files.step_done()

    def _made(self, tensor: str) -> Tensor:
        made = self._make(tensor, self._tables.get(tensor))
        if tensor in self._tables:
            self.fitted_tables[tensor] = made
        return made.float()

    @property
    def fits_affine(self) -> bool:
        """Whether a norm or bias is to be fitted."""
        return any(tensor.options.get("affine") for tensor in self._planned.tensors)

    def affine_options(self, tensor: str) -> AffineOptions | None:
        """How a norm or bias is fitted; None: it is not."""
        from lewis_hub.calibration.affine import AffineOptions

        planned = self._tensors[tensor]
        if planned.is_copied or not planned.options["affine"]:
            return None
        dtype = torch_dtypes()[planned.output.dtype]
        return AffineOptions(planned.weights, planned.options["ridge"], dtype)

    def solve(self, tensor: str, seen: Sequence[LayerMoments], transposed: bool) -> Tensor:  # noqa: FBT001
        """Fit a tensor of the list that `parts` made last."""
        crosses = [one.cross_covariance for one in seen]
        residuals = [one.residual_covariance for one in seen]
        grams, known = [one.gram for one in seen], () if None in crosses else crosses
        return self._make(
            tensor, Moments(grams, known, transposed, () if None in residuals else residuals)
        )
