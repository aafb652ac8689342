"""Layer stacking: the blocks of the output are numbered through slices of the sources.

A slice is a merge of its own, of checkpoints that were cut and renumbered: settings are looked up
at the source in the slice, then at the slice, then in the recipe; a gradient runs over the slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import MergeError
from lewis_hub.merge import parameters
from lewis_hub.merge.alignment import Alignment
from lewis_hub.merge.cutting import Place, count_blocks, cut, depths, misfits
from lewis_hub.merge.plan import MergePlan, TensorPlan
from lewis_hub.merge.planning import (
    MergeSettings,
    MergeSource,
    Schedule,
    plan_shards,
    plan_tensors,
    require_mergeable,
)
from lewis_hub.recipe_settings import Conditional, Setting, Settings

STAND_IN = "`missing: base`"  # what can be asked for whole models
UNLIKE = "Stack blocks that hold the same tensors, as models of one architecture do."


@dataclass(frozen=True)
class Blocks:
    """Consecutive blocks of a source."""

    source: MergeSource
    numbers: range


@dataclass(frozen=True)
class MergeSlice:
    """The next blocks of the output: one block of each source makes one.

    Attributes:
        base: None for a method that takes none.
        experts: of as many blocks as the base, in the recipe's order; at least one.
        parameters: for all of them; a source's own go first, and the recipe's hold otherwise.
    """

    base: Blocks | None
    experts: tuple[Blocks, ...]
    parameters: Settings = field(default_factory=dict)

    @property
    def sources(self) -> tuple[Blocks, ...]:
        """The base first."""
        return (self.base, *self.experts) if self.base else self.experts

    @property
    def n_blocks(self) -> int:
        """Of the output."""
        return len(self.sources[0].numbers)


@dataclass(frozen=True)
class StackSettings:
    """What is stacked, and how.

    Attributes:
        slices: from the input side to the head.
        donor: whose configuration the output has, with another number of blocks.
        parameters: the recipe's own, for all slices.
        dtype: of the output; None keeps that of each tensor's first source.
        seed: of random methods.
        alignment: of vocabularies that differ; None where row i means the same in all sources.
    """

    method: str
    slices: tuple[MergeSlice, ...]
    donor: Checkpoint
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 42
    alignment: Alignment | None = None


@dataclass(frozen=True)
class _Part:
    """A slice as a merge of its own: its checkpoints' tensors go by their names in the output."""

    where: str
    place: Place
    settings: MergeSettings


def make_stacked_plan(
    settings: StackSettings, max_shard_bytes: int, schedule: Schedule | None = None
) -> MergePlan:
    """Plan a stack from headers alone.

    Args:
        settings: what is stacked, and how.
        max_shard_bytes: largest output file, unless a single tensor is larger.
        schedule: a guide's densities by names in the output; they go before those of `settings`.

    Raises:
        MergeError: unknown method or parameter, a filter that fits no tensor, a range outside of
            its model, or sources that do not fit together or under the donor's configuration.
    """
    parts = _parts(settings)
    _require_fit(settings, parts)
    sources = {source.label: source for part in parts for source in part.settings.sources}
    numbers = {label: number for number, label in enumerate(sources)}
    made: dict[str, TensorPlan] = {}
    for part in parts:
        own = part.settings.sources
        at_depth = depths(own[0].checkpoint, part.place)
        for name, tensor in plan_tensors(part.settings, at_depth, schedule or {}).items():
            counted = tuple(numbers[own[place].label] for place in tensor.sources)
            made[name] = replace(tensor, sources=counted)
    return plan_shards(settings.method, tuple(sources.values()), made, max_shard_bytes)


def _parts(settings: StackSettings) -> list[_Part]:
    parts, first = [], 0
    for index, one in enumerate(settings.slices):
        is_last = index == len(settings.slices) - 1
        place = Place(first, one.n_blocks, is_first=index == 0, is_last=is_last)
        where = f"slices[{index}]"
        merged = MergeSettings(
            settings.method,
            _cut(where, one.base, place) if one.base else None,
            tuple(_cut(where, blocks, place) for blocks in one.experts),
            overlaid(one.parameters, settings.parameters),
            settings.dtype,
            settings.seed,
            alignment=settings.alignment,
        )
        parts.append(_Part(where, place, merged))
        first += one.n_blocks
    return parts


def _cut(where: str, blocks: Blocks, place: Place) -> MergeSource:
    checkpoint, wanted = blocks.source.checkpoint, blocks.numbers
    n_blocks = count_blocks(checkpoint)
    if wanted.stop > n_blocks:
        problem = f"{checkpoint.label} has no blocks [{wanted.start}, {wanted.stop}]"
        remedy = f"It has {n_blocks} blocks: [0, {n_blocks}] are all of them."
        raise MergeError(where, problem, remedy)
    return replace(blocks.source, checkpoint=cut(checkpoint, wanted, place))


def overlaid(own: Settings, common: Settings) -> dict[str, Setting]:
    """The slice's settings; where no filter of one fits, the recipe's holds."""
    found = dict(common) | dict(own)
    for name in own.keys() & common.keys():
        setting = own[name]
        if isinstance(setting, tuple) and isinstance(setting[0], Conditional):
            found[name] = _conditions(setting) + _conditions(common[name])
    return found


def _conditions(setting: Setting) -> tuple[Conditional, ...]:
    whole = setting if isinstance(setting, tuple) else ()
    found = tuple(one for one in whole if isinstance(one, Conditional))
    return found or (Conditional(value=setting),)


def _require_fit(settings: StackSettings, parts: Sequence[_Part]) -> None:
    for part in parts:
        _require_givers(settings.alignment, part)
        try:
            require_mergeable(part.settings)
        except MergeError as error:
            where = f"{part.where}, {error.where}"
            remedy = UNLIKE if STAND_IN in error.remedy else error.remedy
            raise MergeError(where, error.problem, remedy) from None
        made = part.settings.sources[0].checkpoint
        assembled = settings.alignment.tensors if settings.alignment else ()
        for found in misfits(settings.donor, made, part.place, assembled):
            remedy = UNLIKE if found.kind in ("missing", "extra", "tied") else found.remedy
            raise MergeError(part.where, f"{found.source} {found.problem}", remedy)
    given = [place for part in parts for place in _given(part.settings)]
    known = dict.fromkeys(name for part in parts for name in _names(part.settings))
    parameters.require_filters_fit(settings.parameters, given, known)


def _require_givers(alignment: Alignment | None, part: _Part) -> None:
    """Rows that stand in for tokens are read from the slice's own sources."""
    if (
        alignment is None
        or not alignment.tensors & part.settings.sources[0].checkpoint.tensors.keys()
    ):
        return
    labels = [source.label for source in part.settings.sources]
    for override in alignment.overrides.values():
        if override.source is not None and override.source not in labels:
            problem = f"a token is to have a row of {override.source}, which is none of its sources"
            remedy = "Rows of tokens come from the first slice's sources, of the head from the "
            raise MergeError(part.where, problem, remedy + "last's: name one of them.")


def _given(settings: MergeSettings) -> list[Settings]:
    return [settings.parameters, *(source.parameters for source in settings.experts)]


def _names(settings: MergeSettings) -> list[str]:
    """All that a filter may be part of: names in the output and in the sources."""
    return [
        name
        for source in settings.sources
        for own, tensor in source.checkpoint.tensors.items()
        for name in (own, tensor.name)
    ]
