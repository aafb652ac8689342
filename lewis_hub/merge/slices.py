"""Layer stacking: the blocks of the output are numbered through slices of the sources.

A slice is a merge of its own, of checkpoints that were cut and renumbered: settings are looked up
at the source in the slice, then at the slice, then in the recipe; a gradient runs over the slice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import MergeError
from lewis_hub.merge import settings
from lewis_hub.merge import settings as parameters
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
    require_mergeable,
)
from lewis_hub.recipe.schema import Conditional, Setting, Settings


@dataclass(frozen=True)
class Place:
    """Where a slice lies in the output.

    Attributes:
        first: number of its first block.
        is_first: whether the tensors before the blocks (embeddings) are its own.
        is_last: whether those after them (final norm, head) are.
    """

    first: int
    n_blocks: int
    is_first: bool
    is_last: bool


def count_blocks(checkpoint: Checkpoint) -> int:
    """How many blocks a model has.

    Raises:
        MergeError: it has none, or several stacks of them.
    """
    last: dict[str, int] = {}
    for name in checkpoint.tensors:
        stack, number = names.stack(name), names.block(name)
        if stack is not None and number is not None:
            last[stack] = max(number, last.get(stack, 0))
    if len(last) != 1:
        found = f"several stacks of blocks ({', '.join(sorted(last))})" if last else "no blocks"
        problem = f"{checkpoint.label} has {found}, and slices cut one stack"
        raise MergeError("slices", problem, "List whole models under `models`.")
    return next(iter(last.values())) + 1


def cut(checkpoint: Checkpoint, blocks: range, place: Place) -> Checkpoint:
    """What of a model goes into a slice, by its names in the output."""
    inside, found = _by_block(checkpoint), dict[str, TensorHeader]()
    outside = inside.get(None, {})
    before = {name: tensor for name, tensor in outside.items() if names.is_input_side(name)}
    if place.is_first:
        found |= before
    for number, block in enumerate(blocks, start=place.first):
        for name, tensor in inside.get(block, {}).items():
            found[names.renumbered(name, number)] = tensor
    if place.is_last:
        found |= {name: tensor for name, tensor in outside.items() if name not in before}
    return replace(checkpoint, tensors=found)


def depths(checkpoint: Checkpoint, place: Place) -> dict[str, float]:
    """How deep in its slice each tensor lies, as `parameters.depths` has it for whole models."""
    numbers = {name: names.block(name) for name in checkpoint.tensors}
    own = {
        name: name if number is None else names.renumbered(name, number - place.first)
        for name, number in numbers.items()
    }
    found = settings.depths(own.values())
    return {name: found[own_name] for name, own_name in own.items()}


def misfits(
    donor: Checkpoint, made: Checkpoint, place: Place, assembled: Collection[str] = ()
) -> tuple[Mismatch, ...]:
    """Hold what a slice makes against the model whose configuration says what will be loaded.

    A block fits where its tensors are those of some block of the donor. Tensors that are
    `assembled` row by row may have other numbers of rows.
    """
    expected = dict(cut(donor, range(0), place).tensors)
    templates, blocks = _by_block(donor), _by_block(made)
    shapes = {number: _shapes(block) for number, block in templates.items() if number is not None}
    for number in range(place.first, place.first + place.n_blocks):
        own = _shapes(blocks.get(number, {}))
        alike = next((n for n, found in shapes.items() if found == own), min(shapes))
        for name, tensor in templates[alike].items():
            renamed = names.renumbered(name, number)
            expected[renamed] = replace(tensor, name=renamed)
    return compare(replace(donor, tensors=expected), [made], assembled=assembled)


def _by_block(checkpoint: Checkpoint) -> Mapping[int | None, dict[str, TensorHeader]]:
    """The tensors of each block; under None those outside of the blocks."""
    found: defaultdict[int | None, dict[str, TensorHeader]] = defaultdict(dict)
    for name, tensor in checkpoint.tensors.items():
        found[names.block(name)][name] = tensor
    return found


def _shapes(block: Mapping[str, TensorHeader]) -> dict[str, tuple[int, ...]]:
    """By what a tensor is, in whichever block."""
    return {names.renumbered(name, 0): tensor.shape for name, tensor in block.items()}


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
            problem = (
                f"a token takes its row from {override.source}, but this slice does not use it"
            )
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


COUNTS = (  # what transformers calls the number of blocks, by architecture
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "decoder_layers",
    "encoder_layers",
    "depth",
)
TEXT = "text_config"  # of the language part of a model of several parts
NOT_BY_BLOCK = ("architectures", "token_id")  # parts of names of lists that count something else


@dataclass(frozen=True)
class Model:
    """A source's configuration, and how many blocks its weights have."""

    label: str
    config: Mapping[str, Any]
    n_blocks: int


@dataclass(frozen=True)
class Origin:
    """What a block of the output is made from: this block of this model, before others."""

    model: Model
    block: int


def stacked_config(donor: Model, origins: Sequence[Origin]) -> dict[str, Any]:
    """Say the new number of blocks wherever the donor's configuration says its own.

    Lists of one entry a block, such as `layer_types`, follow the blocks.

    Args:
        donor: whose configuration it is otherwise.
        origins: one a block of the output.

    Raises:
        MergeError: it says nowhere how many blocks there are, or such a list cannot follow.
    """
    if not any(_counts(part, donor.n_blocks) for part in _configuration_parts(donor.config)):
        problem = f"its config.json says nowhere that there are {donor.n_blocks} blocks"
        remedy = f"One of {', '.join(COUNTS)} has to: mend it, or use another `base_model`."
        raise MergeError(donor.label, problem, remedy)
    found = _stacked(donor, donor.config, origins, ())
    if isinstance(text := donor.config.get(TEXT), Mapping):
        found[TEXT] = _stacked(donor, text, origins, (TEXT,))
    return found


def _configuration_parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    text = config.get(TEXT)
    return [config, text] if isinstance(text, Mapping) else [config]


def _counts(config: Mapping[str, Any], n_blocks: int) -> list[str]:
    return [key for key in COUNTS if type(config.get(key)) is int and config[key] == n_blocks]


def _stacked(
    donor: Model, config: Mapping[str, Any], origins: Sequence[Origin], path: tuple[str, ...]
) -> dict[str, Any]:
    found = dict(config) | dict.fromkeys(_counts(config, donor.n_blocks), len(origins))
    for key, value in config.items():
        named = any(part in key for part in NOT_BY_BLOCK)
        if isinstance(value, list) and len(value) == donor.n_blocks and not named:
            found[key] = [_entry(value, origin, (*path, key)) for origin in origins]
    return found


def _entry(donors: list[Any], origin: Origin, path: tuple[str, ...]) -> Any:
    """A list's entry for one block: its own model's, or the donor's where all are alike."""
    own: Any = origin.model.config
    for key in path:
        own = own.get(key) if isinstance(own, Mapping) else None
    if isinstance(own, list) and len(own) == origin.model.n_blocks:
        return own[origin.block]
    if all(entry == donors[0] for entry in donors):
        return donors[0]
    problem = f"its config.json has no `{'.'.join(path)}` with one entry per block, the base's has"
    raise MergeError(origin.model.label, problem, "Stack models of one architecture.")
