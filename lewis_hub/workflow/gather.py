"""Fit: matrices one after the other, on what the merged model itself hands them."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.calibration.grams import Wanted
from lewis_hub.calibration.measure import CalibrationSet, Subject
from lewis_hub.calibration.meta_model import Weights, in_folder
from lewis_hub.calibration.model import run_refusals
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.ranges import Locations, SourceFiles
from lewis_hub.checkpoint.reader import Checkpoint, local_header
from lewis_hub.errors import MERGE, CalibrationError
from lewis_hub.files import sha256_of, write_whole
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.merge.in_memory import singly
from lewis_hub.merge.plan import Fitted, MergePlan, ShardPlan
from lewis_hub.merge.reference import Moments
from lewis_hub.recipe.rules import fits_in_sequence
from lewis_hub.workflow import grams
from lewis_hub.workflow.calibrate import brought, translated
from lewis_hub.workflow.fetch import small_files
from lewis_hub.workflow.grams import Gathered, matrices, measured, subjects_of, unknown_note
from lewis_hub.workflow.job import Execution, Folders, Step
from lewis_hub.workflow.merge import beside, plan_of, say_mended
from lewis_hub.workflow.resolve import needs_grams, widest_input

if TYPE_CHECKING:
    from torch import Tensor

    from lewis_hub.calibration.sequential import Seen
    from lewis_hub.merge.in_memory import Single


VERSION = 2  # of the arithmetic
FOLDER = "fitted"  # in `scratch`
INDEX = "fitted.json"
LABEL = "matrices fitted in sequence"
REMEDY = "Set `inputs: own` in the recipe's `parameters`: then each matrix is fitted by itself."


def fit(
    step: Step,
    sets: Sequence[CalibrationSet],
    folders: Folders,
    scratch: Path,
    schedule: DensitySchedule | None,
) -> Gathered:
    """Fit all matrices of the blocks; what an earlier run fitted is kept.

    Args:
        step: of a merge that was examined.
        sets: one an expert.
        folders: of all sources.
        scratch: for the fitted matrices, and for what measuring needs.
        schedule: None where the settings alone decide.

    Raises:
        CalibrationError: a model cannot be loaded or measured, or not block by block.
        CheckpointError: a source is broken, or holds NaN or infinity.
    """
    planned, subjects = _in_one(step, schedule), subjects_of(step, sets, folders)
    facts = _facts(planned, subjects, widest_input(step.recipe))
    place = _of_recipe(step, scratch / FOLDER) / _short_digest(facts)
    place.mkdir(parents=True, exist_ok=True)
    if not (place / INDEX).exists():
        step = _sharing(step, 1 + len(subjects))
        whole = [brought(step, subject, folders, scratch) for subject in subjects]
        files = _run(step, sets, whole, planned, folders, place)
        write_whole(place / INDEX, json.dumps({file.name: sha256_of(file) for file in files}))
    digests: dict[str, str] = json.loads((place / INDEX).read_text(encoding="utf-8"))
    tensors = {t.name: t for file in digests for t in local_header(LABEL, place / file)}
    digest = "sha256:" + hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    notes = _notes(planned, tensors)
    for note in notes:
        step.progress.say(note)
    return Gathered(
        Fitted(LABEL, digest, tensors),
        {LABEL: place},
        measured(subjects),
        tuple(one.tokens.rows for one in sets),
        notes,
    )


def _notes(planned: ShardPlan, fitted: Collection[str]) -> tuple[str, ...]:
    """Which matrices of the blocks were not fitted."""
    names = matrices({t.output.name: t.output.shape for t in planned.tensors})
    lacking = [name for name in names if name not in fitted]
    return unknown_note(lacking, "their task vectors are averaged")


def require_by_block(step: Step) -> None:
    """Refuse, before any weight is downloaded, an architecture that cannot go block by block.

    Raises:
        NotByBlockError: its blocks share weights, it is an encoder-decoder, or an expert lacks
            matrices of its blocks.
    """
    from lewis_hub.calibration.meta_model import skeleton
    from lewis_hub.calibration.sequential import require_beside

    donor = step.inputs.donor
    checkpoint = step.examined.checkpoints[donor.pinned]

    def parts(_: Sequence[Sequence[TensorHeader]]) -> Generator[dict[str, Tensor], None, None]:
        yield from ()

    made = skeleton(Weights(small_files(step.api, donor), checkpoint, parts, REMEDY), "cpu")
    require_beside(made, (step.examined.checkpoints[one.pinned] for one in step.inputs.experts))


def _sharing(step: Step, n_models: int) -> Step:
    """In a stream, where what is fetched ahead of all models takes no more than two shards."""
    if not step.places:
        return step
    n_bytes = 2 * step.execution.max_shard_bytes // n_models
    return replace(step, execution=replace(step.execution, max_shard_bytes=n_bytes))


def _in_one(step: Step, schedule: DensitySchedule | None) -> ShardPlan:
    """The plan of the merge without statistics, as one shard."""
    whole = replace(step, execution=replace(step.execution, max_shard_bytes=sys.maxsize))
    planned: MergePlan = plan_of(whole, schedule)
    [shard] = (planned.allowing_nan if step.execution.allow_nan else planned).shards
    return shard


def _facts(planned: ShardPlan, subjects: Sequence[Subject], widest: int) -> dict[str, Any]:
    """All that fixes the fitted matrices."""
    sets = [{**subject.sets[0].facts} for subject in subjects]
    return {"version": VERSION, "plan": planned.digest, "calibration": sets, "widest": widest}


def _of_recipe(step: Step, folder: Path) -> Path:
    """Where all that a recipe asks for lies: its merge and its uniform twin.

    What an interrupted run of another recipe fitted is deleted: it may be as large as a model.
    """
    recipe = step.recipe.model_dump_json(exclude={"evaluate", "publish"})
    place = folder / _short_digest(
        [recipe, [step.inputs.content(one) for one in step.inputs.models]]
    )
    for other in folder.glob("*"):
        if other != place:
            shutil.rmtree(other)
    return place


def _short_digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def _run(  # noqa: PLR0913
    step: Step,
    sets: Sequence[CalibrationSet],
    subjects: Sequence[Subject],
    planned: ShardPlan,
    folders: Folders,
    place: Path,
) -> list[Path]:
    from lewis_hub.calibration.sequential import Texts
    from lewis_hub.calibration.sequential import fit as fit_blocks

    merged = _Merged(planned, step.places or folders, place / "ranges", step.execution)
    own = step.examined.tokens.carried
    reader = own.donor if own else step.inputs.donor.pinned  # whose ids are the merge's
    source = next(one for one in step.inputs.models if one.pinned == reader)
    texts = [
        Texts(_weights(subject), subject.sets[0].tokens, translated(step, source, one).tokens)
        for subject, one in zip(subjects, sets, strict=True)
    ]
    configuration = place / "configuration"
    configuration.mkdir(exist_ok=True)
    beside(step, MergePlan((planned,)), {}, folders, configuration)
    weights = Weights(configuration, merged.checkpoint, merged.parts, REMEDY)
    widest, device = widest_input(step.recipe), step.execution.device
    n_tokens = sum(one.merged.n_tokens for one in texts)
    asked = f"method `{step.recipe.merge_method}`"
    with (
        step.progress.stage("Fitting block by block", n_tokens, "tokens") as advance,
        run_refusals(step.inputs.donor.pinned, asked),
    ):
        files = fit_blocks(weights, texts, merged.solve, place, widest, device, advance)
    say_mended(step, [Counter(label for label, _ in merged.mended)])
    return files


def _weights(subject: Subject) -> Weights:
    found = subject.weights or in_folder(subject.source, subject.folder)
    return replace(found, remedy=REMEDY)


class _Merged:
    """A merge without statistics, brought block by block; and its tensors fitted meanwhile.

    Args:
        planned: all of it.
        places: label of a source -> where its files are.
        scratch: for what is fetched of them.
    """

    def __init__(
        self, planned: ShardPlan, places: Locations, scratch: Path, execution: Execution
    ) -> None:
        self._planned, self._places, self._scratch = planned, places, scratch
        self._most_bytes = execution.max_shard_bytes
        self._make: Single | None = None
        self.mended: set[tuple[str, str]] = set()  # source and fitted tensor, with NaN or infinity

    @property
    def checkpoint(self) -> Checkpoint:
        """Its headers; its tensors lie nowhere."""
        outputs = [tensor.output for tensor in self._planned.tensors]
        headers = (TensorHeader(o.name, o.dtype, o.shape, "", 0, o.n_bytes) for o in outputs)
        return Checkpoint(MERGE, {header.name: header for header in headers})

    def parts(
        self, lists: Sequence[Sequence[TensorHeader]]
    ) -> Generator[dict[str, Tensor], None, None]:
        """Make one list of tensors after the other, without statistics."""
        names = [tensor.output.name for tensor in self._planned.tensors]
        reads = dict(zip(names, self._planned.reads, strict=True))
        steps = [[read for tensor in tensors for read in reads[tensor.name]] for tensors in lists]
        with (
            SourceFiles(self._places, steps, self._scratch, self._most_bytes) as files,
            singly(self._planned, files.reader, self.mended) as self._make,
        ):
            for tensors in lists:
                yield {tensor.name: self._make(tensor.name, None).float() for tensor in tensors}
                files.step_done()

    def solve(self, tensor: str, seen: Sequence[Seen], transposed: bool) -> Tensor:  # noqa: FBT001
        """Fit a tensor of the list that was brought last."""
        assert self._make
        crosses, gaps = [one.cross for one in seen], [one.gap for one in seen]
        grams, known = [one.gram for one in seen], () if None in crosses else crosses
        return self._make(tensor, Moments(grams, known, transposed, () if None in gaps else gaps))


def require_possible(step: Step) -> None:
    """Refuse, before any weight is downloaded, what a model's architecture does not allow.

    Raises:
        CalibrationError: its matrices cannot be fitted one after the other.
    """
    if fits_in_sequence(step.recipe):
        require_by_block(step)


def problems(step: Step) -> tuple[str, ...]:
    """What `require_possible` refuses, in one sentence after the other."""
    try:
        require_possible(step)
    except CalibrationError as error:
        return (" ".join(str(error).split("\n")),)
    return ()


def wanted(
    step: Step, sets: Sequence[CalibrationSet], folders: Folders, store: Path
) -> tuple[Wanted, ...]:
    """The second moments that `gather` will look for in a folder, one an expert, or none.

    A pass that measures the experts for a guide can leave them there.
    """
    if not needs_grams(step.recipe) or fits_in_sequence(step.recipe):
        return ()
    return grams.wanted(step, sets, folders, store)


def gather(  # noqa: PLR0913
    step: Step,
    sets: Sequence[CalibrationSet],
    folders: Folders,
    scratch: Path,
    schedule: DensitySchedule | None = None,
    store: Path | None = None,
) -> Gathered:
    """Run each expert's calibration texts through what they have to run through.

    Args:
        step: of a merge that was examined.
        sets: one an expert.
        folders: of all sources.
        scratch: for what measuring needs and nobody keeps.
        schedule: what a guide decided; matrices that are fitted on the way are fitted with it.
        store: where statistics that do not depend on it stay, to be found by a later run; None: in
            `scratch`.

    Returns:
        Nothing where the recipe merges without statistics.

    Raises:
        CalibrationError: a model cannot be loaded or measured.
    """
    if not needs_grams(step.recipe):
        return Gathered()
    if fits_in_sequence(step.recipe):
        return fit(step, sets, folders, scratch, schedule)
    return grams.gather(step, sets, folders, scratch, store)
