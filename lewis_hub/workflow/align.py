"""Match blocks and units of models with those of the reference, before anything is measured."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lewis_hub.calibration.subject import FEWER, CalibrationSet
from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.ranges import SourceFiles, SourceTensor
from lewis_hub.checkpoint.reader import Reader
from lewis_hub.documents import MAX_TABLE_BYTES, read_json
from lewis_hub.errors import AlignmentError, ExtraMissingError, NonFiniteError
from lewis_hub.files import require_room, text_of, write_whole
from lewis_hub.merge.aligned import VERSION, AlignedModel, MatchedBlocks, MatchedWidths, Seen
from lewis_hub.merge.depth import Blocks, stored_name
from lewis_hub.merge.permutation import Order
from lewis_hub.merge.symmetries import RESIDUAL, Units, permute, units_of
from lewis_hub.merge.unit_sizes import require_units
from lewis_hub.merge.width import norm_scales, places_of
from lewis_hub.recipe.alignment import Align
from lewis_hub.recipe.schema import ModelEntry
from lewis_hub.workflow.alignment_needs import kept_sites
from lewis_hub.workflow.family import require_one_family
from lewis_hub.workflow.fetch import ModelLoader
from lewis_hub.workflow.open import MergeSources, OpenedSource
from lewis_hub.workflow.resources import Loading
from lewis_hub.workflow.size import sized
from lewis_hub.workflow.texts import Sets
from lewis_hub.workflow.tokenizers import Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from lewis_hub.merge.matching import ComparedModel, Matched
    from lewis_hub.merge.segments import Similarity

FOLDER = "aligned"  # in the scratch folder
ACTIVATIONS = ".activations"  # ending of the folder of two models' activations
WIDTH = 4  # bytes of a float32
PIECE = 1 << 16  # entries of a matrix that are compared at a time, of all blocks
ONE_SIZE = "Merge models of one architecture and size."
BROKEN = "It cannot be compared: use an intact copy, or remove `align` from the model."


@dataclass(frozen=True)
class AlignmentSettings:
    """The models to align, and the model that they are aligned with."""

    reference: OpenedSource
    experts: tuple[OpenedSource, ...]  # all that are merged, in the recipe's order
    asked: tuple[Align | None, ...]  # of each expert; None: it is merged as it is


def alignment_settings(
    entries: Sequence[ModelEntry], sources: MergeSources
) -> AlignmentSettings | None:
    """Return how the models of a recipe that are merged are aligned; None if none is."""
    asked = tuple(entry.align for entry in entries)
    if not any(asked):
        return None
    return AlignmentSettings(sources.donor, sources.experts, asked)


def alignment_problems(
    settings: AlignmentSettings | None, tokens: Tokens, loading: Loading
) -> list[str]:
    """Return why models cannot be aligned; only headers and configurations are looked at."""
    if settings is None:
        return []
    problems = []
    if find_spec("scipy") is None and any(one and one.matches_units for one in settings.asked):
        problems.append(str(ExtraMissingError("`align`", "align")))
    reference = settings.reference
    for expert, asked in zip(settings.experts, settings.asked, strict=True):
        if asked is None:
            continue
        try:
            if not (asked.depth or asked.width):
                _require_alike(reference, expert)
        except AlignmentError as error:
            problems.append(" ".join(str(error).split("\n")))
        if tokens.alignment is not None or expert.translation is not None:
            problems.append(
                f"{expert.name} cannot be aligned with {reference.name}: `align` compares both on "
                "the same tokens, and their tokenizers or the numbers of their embeddings differ. "
                "Give it the other tokenizer first: `lewis-hub transplant-tokenizer`."
            )
        for one in (reference, expert):
            if asked.needs_texts and loading.is_too_large(one.checkpoint):
                problems.append(
                    f"`align` runs whole models, and {one.name} takes "
                    f"{loading.model_bytes(one.checkpoint):,} bytes in memory, more than "
                    "`--max-memory` allows. Raise the limit"
                    + ("." if asked.always_runs else ", or set `weight_similarity: 1`.")
                )
    return list(dict.fromkeys(problems))


def _require_alike(reference: OpenedSource, expert: OpenedSource) -> None:
    """Refuse two models of which one cannot be matched with the other."""
    if expert.source.is_adapter:
        problem = "a LoRA adapter has the units of its base, so it is not aligned"
        raise AlignmentError(expert.name, problem, "Remove `align` from it.")
    ours, theirs = require_one_family(reference, expert, ONE_SIZE)
    for one, units in ((reference, ours), (expert, theirs)):
        require_units(one.name, units)
    for name in sorted(ours.axes.keys() ^ theirs.axes.keys()):
        lacks, has = (expert, reference) if name in ours.axes else (reference, expert)
        problem = f"it lacks {name}, which {has.name} has"
        raise AlignmentError(lacks.name, problem, "Remove `align` from the model.")


def align(settings: AlignmentSettings, sets: Sets, loader: ModelLoader) -> tuple[AlignedModel, ...]:
    """Match the units of each model that is to be aligned; an earlier run's orders are used again.

    Raises:
        CalibrationError: a model cannot be run on the texts.
    """
    texts: Sequence[CalibrationSet | None] = sets or [None] * len(settings.experts)
    return tuple(
        _align_one(settings.reference, expert, asked, own, loader)
        for expert, asked, own in zip(settings.experts, settings.asked, texts, strict=True)
        if asked
    )


def _align_one(
    reference: OpenedSource,
    expert: OpenedSource,
    asked: Align,
    texts: CalibrationSet | None,
    loader: ModelLoader,
) -> AlignedModel:
    texts = texts if asked.needs_texts else None
    calibration = {**texts.facts} if texts else {}
    facts = {
        "version": VERSION,
        "models": [reference.digest, expert.digest],
        "calibration": calibration,
        "align": asked.model_dump(mode="json"),
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    kept = loader.scratch / FOLDER / f"{name}.json"
    if known := _known(kept):  # the same models may have had other names
        return replace(known, source=expert.pinned, reference=reference.pinned)
    kept.parent.mkdir(parents=True, exist_ok=True)
    for left in kept.parent.glob(f"*{ACTIVATIONS}"):  # of a run that was killed
        shutil.rmtree(left)
    work = kept.with_suffix(ACTIVATIONS)
    try:
        ours, theirs = (
            _run(source, asked, texts, work / str(number), loader)
            for number, source in enumerate((reference, expert))
        )
        found = _match((ours, theirs), asked, calibration, loader)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_whole(kept, json.dumps(found.document()))
    return found


def _known(file: Path) -> AlignedModel | None:
    """Read what an earlier run found; None if it is missing, damaged or beyond the limits."""
    try:
        return AlignedModel.from_document(
            read_json(text_of(file, MAX_TABLE_BYTES), MAX_TABLE_BYTES)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class _Compared:
    """One of two models that are matched."""

    source: OpenedSource
    units: Units  # its own
    seen: Callable[[str], Tensor] | None  # site -> (tokens, units) float32; None: it was not run
    blocks: Blocks | None = None  # its own in each place of the reference; None: all are there

    def own_name(self, place: str) -> str:
        """What it calls a tensor, a site or a group of units in the places of the reference."""
        found = stored_name(place, self.blocks)
        assert found is not None  # an identity block has no units
        return found

    def of_blocks(self, compared: Seen) -> Iterator[Tensor]:
        """The output of each of its blocks, or what the block adds, (tokens, units) float32."""
        assert self.seen
        for before, after in pairwise(self.units.streams):
            output = self.seen(after)
            yield output if compared == "outputs" else output - self.seen(before)

    def seen_in_place(self, site: str) -> Tensor:
        """What its units are at a site of the reference, (tokens, units) float32."""
        assert self.seen
        return self.seen(self.own_name(site))


def _run(
    source: OpenedSource,
    asked: Align,
    texts: CalibrationSet | None,
    folder: Path,
    loader: ModelLoader,
) -> _Compared:
    """Run the texts, if there are any, through a model; its activations go to `folder`."""
    from lewis_hub.calibration.units import read_activations

    units = units_of(source.checkpoint, source.config)
    if texts is None:
        return _Compared(source, units, None)
    _write_activations(source, units, kept_sites(asked, units), texts, folder, loader)
    return _Compared(source, units, partial(read_activations, folder))


def _match(
    pair: tuple[_Compared, _Compared],
    asked: Align,
    calibration: Mapping[str, Any],
    loader: ModelLoader,
) -> AlignedModel:
    """Match the blocks of the second model with the first one's, then the units within them."""
    reference, expert = pair
    names_of_both = expert.source.pinned, reference.source.pinned
    found = AlignedModel(*names_of_both, asked.weight_similarity, calibration, {}, {}, {})
    units = reference.units
    if asked.depth:  # weights cannot be compared before units are matched
        weight = 0.0 if asked.matches_units else asked.weight_similarity
        compared: Seen = "updates" if asked.matches_units else "outputs"
        blocks = _match_blocks(pair, weight, compared, loader)
        units, expert = units.without(blocks.identity), replace(expert, blocks=blocks.numbers)
        found = replace(found, blocks=blocks)
    if asked.matches_units:
        matched = _match_units(reference, expert, units, asked.weight_similarity, loader)
        orders, before, after = matched.orders, matched.unmatched, matched.similarity
        found = replace(found, orders=orders, before=before, after=after)
        if asked.width:
            zipped = matched.nearest if asked.width == "neuron_zipping" else {}
            found = replace(found, widths=_widths(reference, expert, units, orders, zipped))
    return found


def _match_blocks(
    pair: tuple[_Compared, _Compared], weight: float, compared: Seen, loader: ModelLoader
) -> MatchedBlocks:
    """Match the blocks of the second model with those of the first, the reference."""
    from lewis_hub.merge.segments import match_blocks, weight_cosines

    sources = [one.source for one in pair]
    similarity = np.zeros([one.units.n_blocks for one in pair])
    if weight < 1:
        similarity += (1 - weight) * _cka(pair, compared, loader)
    with loader.progress.stage(f"Comparing blocks of {sources[1].name}", 1, "items") as advance:
        if weight > 0:
            with _reader(sources[0], loader) as ours, _reader(sources[1], loader) as theirs:
                similarity += weight * weight_cosines(_matrices(sources, (ours, theirs)))
        advance(1)
    rows = tuple(tuple(map(float, row)) for row in similarity)
    return MatchedBlocks(match_blocks(similarity), rows, weight, compared)


def _cka(pair: tuple[_Compared, _Compared], compared: Seen, loader: ModelLoader) -> Similarity:
    """The similarity of the outputs or updates of each pair of blocks."""
    from lewis_hub.merge.segments import linear_cka

    name = pair[1].source.name
    with loader.progress.stage(f"Comparing {compared} of {name}", 1, "items") as advance:
        found = linear_cka(*(one.of_blocks(compared) for one in pair))
        advance(1)
    return found


def _matrices(
    pair: Sequence[OpenedSource], readers: Sequence[Reader]
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """The matrices of the blocks of both models, in pieces of all blocks."""
    of_models = [_blocks_of(source) for source in pair]
    for name, first in of_models[0][0].items():
        if len(first.shape) == 2:
            stored = [[block[name] for block in blocks] for blocks in of_models]
            yield _pieces(pair, stored, readers)


def _blocks_of(source: OpenedSource) -> list[dict[str, TensorHeader]]:
    """The tensors of each block, by their names in block 0."""
    units = units_of(source.checkpoint, source.config)
    found: list[dict[str, TensorHeader]] = [{} for _ in range(units.n_blocks)]
    for name in units.axes:
        if (block := names.block(name)) is not None:
            found[block][names.renumbered(name, 0)] = source.checkpoint.tensors[name]
    return found


def _pieces(
    pair: Sequence[OpenedSource],
    stored: Sequence[Sequence[TensorHeader]],
    readers: Sequence[Reader],
) -> Iterator[tuple[Tensor, Tensor]]:
    import torch

    from lewis_hub.merge.quantised import read_floats

    n_elements = stored[0][0].n_elements
    for start in range(0, n_elements, PIECE):
        size = min(PIECE, n_elements - start)
        ours, theirs = (
            torch.stack([torch.from_numpy(read_floats(reader, one, start, size)) for one in blocks])
            for blocks, reader in zip(stored, readers, strict=True)
        )
        for source, blocks, piece in zip(pair, stored, (ours, theirs), strict=True):
            for one, row in zip(blocks, piece, strict=True):
                if not row.isfinite().all():
                    raise NonFiniteError(one.name, source.name, BROKEN)
        yield ours, theirs


def _match_units(
    reference: _Compared, expert: _Compared, units: Units, weight: float, loader: ModelLoader
) -> Matched:
    """Match the units of a model with those of the reference, in the blocks that both have."""
    from lewis_hub.merge.matching import match  # torch and scipy: only here

    with (
        _opened(reference, loader) as ours,
        _opened(expert, loader) as theirs,
        loader.progress.stage(f"Aligning {expert.source.name}", 1, "items") as advance,
    ):
        found = match(units, ours, theirs, weight)
        advance(1)
    return found


def _widths(
    reference: _Compared,
    expert: _Compared,
    units: Units,
    orders: Mapping[str, Order],
    nearest: Mapping[str, Order],
) -> MatchedWidths:
    """Where the units of a model go; scales of norms are from the texts that were run."""
    from lewis_hub.methods.numerics import torch_threads

    sizes = expert.units.sizes
    places = {
        group: places_of(order, sizes[expert.own_name(group)], nearest.get(group))
        for group, order in orders.items()
    }
    if units.sizes[RESIDUAL] == sizes[RESIDUAL]:
        return MatchedWidths(places, {})
    seen = reference.seen_in_place, expert.seen_in_place
    with torch_threads(1):  # on any number of threads the sums are the same
        return MatchedWidths(places, norm_scales(units, orders[RESIDUAL], *seen))


def _write_activations(
    source: OpenedSource,
    units: Units,
    wanted: Iterable[str],
    texts: CalibrationSet,
    folder: Path,
    loader: ModelLoader,
) -> None:
    """Run the texts through one of the models, which is freed on return."""
    from lewis_hub.calibration.model import load_model, run_refusals
    from lewis_hub.calibration.units import n_kept, write_activations

    folder.mkdir(parents=True)
    sites = {site: units.sites[site] for site in wanted}
    shapes = {name: tensor.shape for name, tensor in source.checkpoint.tensors.items()}
    widths = sum(map(replace(units, shapes=shapes).width_at, sites))
    n_bytes = n_kept(texts.tokens) * widths * WIDTH
    require_room(folder, n_bytes, "the activations of the texts", FEWER)
    placed = loader.materialize_checkpoint(source)
    with (
        run_refusals(source.pinned, "`align`"),
        loader.progress.stage(f"Running {source.name}", texts.tokens.n_tokens, "tokens") as advance,
    ):
        model = load_model(placed, loader.loading.device, source.pinned)
        write_activations(model, source.pinned, sites, texts.tokens, folder, advance)


@contextmanager
def _opened(model: _Compared, loader: ModelLoader) -> Iterator[ComparedModel]:
    """Open the tensors of a model, which are read one by one, in the places of the reference."""
    from lewis_hub.checkpoint.reader import read_tensor
    from lewis_hub.merge.matching import ComparedModel

    source = model.source
    with _reader(source, loader) as reader:

        def read(place: str) -> Tensor:
            name = model.own_name(place)
            tensor = read_tensor(reader, source.checkpoint.tensors[name])
            if not tensor.isfinite().all():
                raise NonFiniteError(name, source.name, BROKEN)
            return tensor

        yield ComparedModel(read, model.seen and model.seen_in_place)


@contextmanager
def _reader(source: OpenedSource, loader: ModelLoader) -> Iterator[Reader]:
    from lewis_hub.merge.readers import open_source

    base, tensors = source.checkpoint.base, source.checkpoint.tensors.values()
    steps = [[SourceTensor(source.pinned, one, base) for one in tensors]]
    ranges = loader.scratch / FOLDER / hashlib.sha256(source.pinned.encode()).hexdigest()[:16]
    with (
        SourceFiles(loader.files.locations, steps, ranges, loader.max_shard_bytes) as files,
        open_source(source.pinned, base, files.reader) as reader,
    ):
        yield reader


def aligner(
    models: Sequence[AlignedModel], reference: OpenedSource
) -> Callable[[OpenedSource], OpenedSource]:
    """Return what replaces a source by itself with its blocks and units in their new places."""
    known: Mapping[str, AlignedModel] = {one.source: one for one in models}

    def moved(source: OpenedSource) -> OpenedSource:
        found = known.get(source.pinned)
        if found is None:
            return source
        numbers = found.blocks.numbers if found.blocks else None
        if found.blocks or found.widths:
            source = sized(reference, source, numbers, found.widths)
        checkpoint = source.checkpoint
        if not found.widths:
            units = units_of(checkpoint, source.config)
            units = units.without(found.blocks.identity if found.blocks else ())
            checkpoint = permute(checkpoint, units, found.orders)
        return replace(source, checkpoint=checkpoint, digest=f"{source.digest}+{found.digest}")

    return moved
