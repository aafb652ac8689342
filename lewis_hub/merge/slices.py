"""Stacks: the blocks of the output are slices of the sources, renumbered in order.

Each slice is a merge of its own, of checkpoints that contain only its blocks. A setting is looked
up at the source in the slice, then at the slice, then in the recipe. A gradient spans one slice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import MergeError
from lewis_hub.merge.alignment import Alignment
from lewis_hub.merge.compare import Mismatch, compare
from lewis_hub.merge.plan import (
    MergePlan,
    MergeSettings,
    MergeSource,
    Schedule,
    TensorPlan,
    plan_shards,
    plan_tensors,
    require_few,
    require_mergeable,
)
from lewis_hub.merge.settings import depths, require_filters_fit
from lewis_hub.recipe.schema import Arithmetic, Conditional, Setting, Settings

STAND_IN = "`missing: base`"  # a remedy for whole models only
UNLIKE = "Stack blocks that hold the same tensors, as models of one architecture do."
COUNTS = (  # keys of the number of blocks in configurations of transformers
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "decoder_layers",
    "encoder_layers",
    "depth",
)
TEXT = "text_config"  # key of the language model's configuration in a multimodal model's
NOT_BY_BLOCK = ("architectures", "token_id")  # parts of the keys of lists without entries per block


@dataclass(frozen=True)
class Blocks:
    """Consecutive blocks of a source."""

    source: MergeSource
    numbers: range


@dataclass(frozen=True)
class MergeSlice:
    """The next blocks of the output, each merged from one block of each source.

    Its parameters override the recipe's, and a source's own override them.
    """

    base: Blocks | None  # None for a method without a base
    experts: tuple[Blocks, ...]  # at least one, each with as many blocks as the base
    parameters: Settings = field(default_factory=dict)

    @property
    def n_blocks(self) -> int:
        """The number of blocks in the output."""
        return len((self.base or self.experts[0]).numbers)


@dataclass(frozen=True)
class StackSettings:
    """The slices of a stack, and how they are merged."""

    method: str
    slices: tuple[MergeSlice, ...]  # from the embeddings to the head
    donor: Checkpoint  # of the configuration, in which the number of blocks is changed
    parameters: Settings = field(default_factory=dict)  # the recipe's, for all slices
    dtype: str | None = None  # of the output; None keeps that of each tensor's first source
    seed: int = 42  # of random methods
    alignment: Alignment | None = None  # None: row i is the same token in all sources
    arithmetic: Arithmetic = "float32"  # float64: by the method's definition


@dataclass(frozen=True)
class _Place:
    """The position of a slice in the output."""

    where: str  # the slice, for messages
    first: int  # number of its first block
    n_blocks: int
    is_first: bool  # has the tensors before the blocks (embeddings)
    is_last: bool  # has the tensors after the blocks (final norm, head)


_Parts = Mapping[_Place, MergeSettings]  # the merge of each slice
_Shapes = Mapping[str, tuple[int, ...]]  # of a block's tensors


def make_stacked_plan(
    settings: StackSettings, max_shard_bytes: int, schedule: Schedule | None = None
) -> MergePlan:
    """Plan a stack from headers alone; a guide's densities go by names of the output.

    Raises:
        MergeError: a method or parameter is unknown, a filter names no tensor, a model lacks
            blocks, or sources do not fit together or the donor's configuration.
    """
    parts = _parts(settings)
    _require_fit(settings, parts)
    sources = {source.label: source for merge in parts.values() for source in merge.sources}
    numbers = {label: number for number, label in enumerate(sources)}
    made: dict[str, TensorPlan] = {}
    for place, merge in parts.items():
        labels = [source.label for source in merge.sources]
        at_depth = depths(merge.sources[0].checkpoint.tensors, place.first)
        for name, tensor in plan_tensors(merge, at_depth, schedule or {}).items():
            own = tuple(numbers[labels[source]] for source in tensor.sources)
            made[name] = replace(tensor, sources=own)
    planned = plan_shards(settings.method, tuple(sources.values()), made, max_shard_bytes)
    return planned.computed_in(settings.arithmetic)


def count_blocks(checkpoint: Checkpoint) -> int:
    """The number of blocks of a model, which must have one stack of them."""
    last = checkpoint.last_blocks
    if len(last) != 1:
        found = f"several stacks of blocks ({', '.join(sorted(last))})" if last else "no blocks"
        problem = f"{checkpoint.label} has {found}, and slices cut one stack"
        raise MergeError("slices", problem, "List whole models under `models`.")
    return next(iter(last.values())) + 1


def _parts(settings: StackSettings) -> _Parts:
    parts: dict[_Place, MergeSettings] = {}
    first = n_tensors = 0
    for index, one in enumerate(settings.slices):
        is_last = index == len(settings.slices) - 1
        place = _Place(f"slices[{index}]", first, one.n_blocks, index == 0, is_last)
        parts[place] = MergeSettings(
            settings.method,
            _cut_source(one.base, place) if one.base else None,
            tuple(_cut_source(blocks, place) for blocks in one.experts),
            _overridden(settings.parameters, one.parameters),
            settings.dtype,
            settings.seed,
            alignment=settings.alignment,
        )
        first += one.n_blocks
        n_tensors += len(parts[place].sources[0].checkpoint.tensors)
        require_few(n_tensors, "slices")
    return parts


def _cut_source(blocks: Blocks, place: _Place) -> MergeSource:
    checkpoint, wanted = blocks.source.checkpoint, blocks.numbers
    n_blocks = count_blocks(checkpoint)
    if wanted.stop > n_blocks:
        problem = f"{checkpoint.label} has no blocks [{wanted.start}, {wanted.stop}]"
        remedy = f"It has {n_blocks} blocks: [0, {n_blocks}] are all of them."
        raise MergeError(place.where, problem, remedy)
    return replace(blocks.source, checkpoint=_cut(checkpoint, wanted, place))


def _cut(checkpoint: Checkpoint, blocks: range, place: _Place) -> Checkpoint:
    """The tensors of a model that belong to a slice, by their names in the output."""
    by_block, found = checkpoint.by_block, dict[str, TensorHeader]()
    outside = by_block.get(None, {}) if place.is_first or place.is_last else {}
    before = {name: tensor for name, tensor in outside.items() if names.is_input_side(name)}
    if place.is_first:
        found |= before
    for number, block in enumerate(blocks, start=place.first):
        for name, tensor in by_block.get(block, {}).items():
            found[names.renumbered(name, number)] = tensor
    if place.is_last:
        found |= {name: tensor for name, tensor in outside.items() if name not in before}
    return replace(checkpoint, tensors=found)


def _overridden(common: Settings, own: Settings) -> dict[str, Setting]:
    """A slice's settings and the recipe's, which hold where no filter of the slice's fits."""
    found = dict(common) | dict(own)
    for name in own.keys() & common.keys():
        setting = own[name]
        if isinstance(setting, tuple) and isinstance(setting[0], Conditional):
            found[name] = _conditions(setting) + _conditions(common[name])
    return found


def _conditions(setting: Setting) -> tuple[Conditional, ...]:
    values = setting if isinstance(setting, tuple) else ()
    conditions = tuple(value for value in values if isinstance(value, Conditional))
    return conditions or (Conditional(value=setting),)


def _require_fit(settings: StackSettings, parts: _Parts) -> None:
    assembled = settings.alignment.tensors if settings.alignment else frozenset()
    donor = settings.donor
    shapes = {n: _shapes(block) for n, block in donor.by_block.items() if n is not None}
    for place, merge in parts.items():
        _require_own_overrides(settings.alignment, place, merge.sources)
        try:
            require_mergeable(merge)
        except MergeError as error:
            where = f"{place.where}, {error.where}"
            remedy = UNLIKE if STAND_IN in error.remedy else error.remedy
            raise MergeError(where, error.problem, remedy) from None
        made = merge.sources[0].checkpoint
        for found in _mismatches(donor, shapes, made, place, assembled):
            remedy = UNLIKE if found.kind in ("missing", "extra", "tied") else found.remedy
            raise MergeError(place.where, f"{found.source} {found.problem}", remedy)
    own: list[Settings] = []
    known: dict[str, None] = {}  # names in the output and in the sources
    for merge in parts.values():
        own += [merge.parameters, *(source.parameters for source in merge.experts)]
        for source in merge.sources:
            for name, tensor in source.checkpoint.tensors.items():
                known |= {name: None, tensor.name: None}
    require_filters_fit(settings.parameters, own, known)


def _require_own_overrides(
    alignment: Alignment | None, place: _Place, sources: Sequence[MergeSource]
) -> None:
    """Refuse the row of a token from a model that is no source of the slice."""
    if alignment is None or not alignment.tensors & sources[0].checkpoint.tensors.keys():
        return
    foreign = alignment.foreign_source([source.label for source in sources])
    if foreign is not None:
        problem = f"a token takes its row from {foreign}, but this slice does not use it"
        remedy = "Rows of tokens come from the first slice's sources, of the head from the "
        raise MergeError(place.where, problem, f"{remedy}last's: name one of them.")


def _mismatches(
    donor: Checkpoint,
    shapes: Mapping[int, _Shapes],
    made: Checkpoint,
    place: _Place,
    assembled: Collection[str],
) -> tuple[Mismatch, ...]:
    """Compare the tensors of a slice with those that the donor's configuration requires.

    A block fits if it has the tensors of some block of the donor, whose `shapes` are given. Tensors
    that are `assembled` may differ in their numbers of rows.
    """
    expected = dict(_cut(donor, range(0), place).tensors)
    templates, blocks = donor.by_block, made.by_block
    for number in range(place.first, place.first + place.n_blocks):
        own = _shapes(blocks.get(number, {}))
        alike = next((n for n, found in shapes.items() if found == own), min(shapes))
        for name, tensor in templates[alike].items():
            renamed = names.renumbered(name, number)
            expected[renamed] = replace(tensor, name=renamed)
    return compare(replace(donor, tensors=expected), [made], assembled=assembled)


def _shapes(block: Mapping[str, TensorHeader]) -> _Shapes:
    """Shapes by names that do not depend on the number of the block."""
    return {names.renumbered(name, 0): tensor.shape for name, tensor in block.items()}


@dataclass(frozen=True)
class Model:
    """A source's configuration, and the number of blocks of its weights."""

    label: str
    config: Mapping[str, Any]
    n_blocks: int


Origin = tuple[Model, int]  # a block of the first source that a block of the output is made from


def stacked_config(donor: Model, origins: Sequence[Origin]) -> dict[str, Any]:
    """Return the donor's configuration with the stack's number of blocks, given their origins.

    Lists with an entry per block, such as `layer_types`, get the entries of the blocks' sources.

    Raises:
        MergeError: it does not contain the number of blocks, or such a list cannot be changed.
    """
    text = donor.config.get(TEXT)
    parts = [donor.config, text] if isinstance(text, Mapping) else [donor.config]
    if not any(_counts(part, donor.n_blocks) for part in parts):
        problem = f"its config.json says nowhere that there are {donor.n_blocks} blocks"
        remedy = f"One of {', '.join(COUNTS)} has to: mend it, or use another `base_model`."
        raise MergeError(donor.label, problem, remedy)
    found = _stacked(donor, donor.config, origins, ())
    if isinstance(text, Mapping):
        found[TEXT] = _stacked(donor, text, origins, (TEXT,))
    return found


def _counts(config: Mapping[str, Any], n_blocks: int) -> list[str]:
    return [key for key in COUNTS if type(config.get(key)) is int and config[key] == n_blocks]


def _stacked(
    donor: Model, config: Mapping[str, Any], origins: Sequence[Origin], path: tuple[str, ...]
) -> dict[str, Any]:
    found = dict(config) | dict.fromkeys(_counts(config, donor.n_blocks), len(origins))
    for key, value in config.items():
        is_by_block = isinstance(value, list) and len(value) == donor.n_blocks
        if is_by_block and not any(part in key for part in NOT_BY_BLOCK):
            found[key] = [_entry(value, origin, (*path, key)) for origin in origins]
    return found


def _entry(donors: list[Any], origin: Origin, path: tuple[str, ...]) -> Any:
    """The entry of one block in its own model's list, or in the donor's if all are equal."""
    model, block = origin
    own: Any = model.config
    for key in path:
        own = own.get(key) if isinstance(own, Mapping) else None
    if isinstance(own, list) and len(own) == model.n_blocks:
        return own[block]
    if all(entry == donors[0] for entry in donors):
        return donors[0]
    problem = f"its config.json has no `{'.'.join(path)}` with one entry per block, the base's has"
    raise MergeError(model.label, problem, "Stack models of one architecture.")
